"""SubjectLocalize: a mask from text. Grounding DINO detects the phrase, Segment Anything segments it.

Whoever has boxes or points from elsewhere (RT-DETR, SAM 3, a hand) gives them to SubjectSegment; whoever has
a mask needs nothing of this file.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io

from ..localize import Problem, boxes, files, pipeline
from ..localize.vocabulary import split_phrases
from .inputs import fraction, refuse_nan

log = logging.getLogger(__name__)

CATEGORY = "montage/localize"
DETECTOR, SEGMENTER = io.Custom("MONTAGE_DETECTOR"), io.Custom("MONTAGE_SEGMENTER")
EMPTY, ERROR = "empty mask", "error"

files.register_folders()


@contextmanager
def said_by(node: str) -> Iterator[None]:
    """A problem inside becomes an error that begins with the node's name."""
    try:
        yield
    except Problem as problem:
        raise ValueError(f"{node}: {problem}") from problem


class SubjectLocalizeLoader(io.ComfyNode):
    NAME = "Load Subject Localizer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectLocalizeLoader",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Loads Grounding DINO, which detects objects from text, and Segment Anything (SAM), which segments "
                "them."
            ),
            search_aliases=["GroundingDINO", "grounding dino loader", "segment anything loader", "SAM loader"],
            inputs=[
                io.Combo.Input(
                    "detector",
                    options=files.offered(files.DETECTORS),
                    tooltip=(
                        "Grounding DINO checkpoint in models/grounding-dino: swint is smaller, swinb finds more. "
                        "Files that are not there yet are listed too: running the node then says where to get them. "
                        "none if you only segment boxes or points."
                    ),
                ),
                io.Combo.Input(
                    "segmenter",
                    options=files.offered(files.SEGMENTERS),
                    tooltip=(
                        "Segment Anything checkpoint in models/sams: vit_b is the fastest, vit_h the most "
                        "accurate. Files that are not there yet are listed too. none if boxes are enough."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp32", "fp16"],
                    advanced=True,
                    tooltip=(
                        "Precision of the segmenter's image encoder. auto: fp16 on GPUs that support it well, fp32 "
                        "elsewhere. The detector always runs in fp32."
                    ),
                ),
            ],
            outputs=[
                DETECTOR.Output("detector", tooltip="Detects objects from text: for Subject Localize."),
                SEGMENTER.Output(
                    "segmenter", tooltip="Segments boxes and points: for Subject Localize and Subject Segment."
                ),
            ],
        )

    @classmethod
    def execute(cls, detector: str, segmenter: str, precision: str) -> io.NodeOutput:
        with said_by(cls.NAME):
            files.check_present(detector, segmenter)
            return io.NodeOutput(
                None if detector == files.NONE else files.load_detector(detector),
                None if segmenter == files.NONE else files.load_segmenter(segmenter, precision),
            )


def choice_inputs(default: str) -> list:
    return [
        io.Combo.Input(
            "choose",
            options=boxes.CHOICES,
            default=default,
            tooltip=(
                "Which of the boxes with the same label to segment: the one with the best score, the largest, all, "
                "or the one at index."
            ),
        ),
        io.Int.Input(
            "index",
            default=0,
            min=0,
            max=899,
            tooltip="For choose = index: 0 is the best score, 1 the next. The overlay shows the numbers.",
        ),
    ]


def mask_inputs() -> list:
    return [
        io.Int.Input(
            "dilation",
            default=5,
            min=0,
            max=512,
            tooltip="Pixels by which edit_mask is larger than subject_mask on every side. MCA-Ctrl uses 5 at 512 px.",
        ),
        io.Combo.Input(
            "if_nothing_found",
            options=[EMPTY, ERROR],
            tooltip=(
                "empty mask: an image without the subject gets a black mask and a warning in the log. error: the "
                "run stops with a message."
            ),
        ),
    ]


def outputs() -> list:
    return [
        io.Mask.Output(
            "subject_mask",
            tooltip="Segmentation of the subject, one mask per image. For MCA-Ctrl: M_S of the reference image.",
        ),
        io.Mask.Output(
            "edit_mask",
            tooltip="subject_mask grown by dilation: the region to edit. For MCA-Ctrl: M_C of the image to edit.",
        ),
        io.BoundingBox.Output("boxes", tooltip="The chosen boxes of each image, in pixels, with label and score."),
        io.Image.Output(
            "overlay",
            tooltip=(
                "Each image with the subject tinted, the border of edit_mask in yellow, the chosen boxes in colour and"
                " those left out in grey, each with its index, label and score."
            ),
        ),
    ]


class SubjectLocalize(io.ComfyNode):
    NAME = "Subject Localize"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectLocalize",
            display_name=cls.NAME,
            category=CATEGORY,
            description="Mask from text: detects the phrases in each image (Grounding DINO) and segments them (SAM).",
            search_aliases=[
                "text to mask",
                "mask from text",
                "sam",
                "segment",
                "GroundingDINO",
                "grounding dino sam",
                "segment anything",
                "MCA-Ctrl",
                "subject mask",
            ],
            inputs=[
                DETECTOR.Input("detector", tooltip="From Load Subject Localizer."),
                io.Image.Input("image", tooltip="One image or a batch; every image gets its own mask."),
                io.String.Input(
                    "phrase",
                    multiline=True,
                    default="a cat",
                    tooltip=(
                        "What to find. Several phrases: one per line, or separated by full stops; the mask is "
                        "their union."
                    ),
                ),
                fraction(
                    "box_threshold",
                    default=0.3,
                    tooltip=(
                        "Minimum score of a box (that of its best word). 0.25 to 0.35 is usual; lower finds more, "
                        "and more false detections."
                    ),
                ),
                fraction(
                    "text_threshold",
                    default=0.25,
                    tooltip=(
                        "Minimum score that the best word of a phrase must have in a box for the box to get that "
                        "phrase as its label."
                    ),
                ),
                *choice_inputs("best score"),
                *mask_inputs(),
                io.Int.Input(
                    "detect_size",
                    default=800,
                    min=128,
                    max=1333,
                    advanced=True,
                    tooltip=(
                        "Detection resolution: short side in pixels. 800 is the detector's own; MCA-Ctrl uses 400, "
                        "which is faster but misses small objects."
                    ),
                ),
                fraction(
                    "nms_threshold",
                    default=0.8,
                    advanced=True,
                    tooltip=(
                        "Non-maximum suppression: of boxes with the same label that overlap by more than this "
                        "(IoU), only the best is kept. 1 keeps all."
                    ),
                ),
                SEGMENTER.Input(
                    "segmenter",
                    optional=True,
                    tooltip="From Load Subject Localizer. Without it the masks are the filled boxes.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        detector: Any,
        image: torch.Tensor,
        phrase: str,
        box_threshold: float,
        text_threshold: float,
        choose: str,
        index: int,
        dilation: int,
        if_nothing_found: str,
        detect_size: int,
        nms_threshold: float,
        segmenter: Any | None = None,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, box_threshold=box_threshold, text_threshold=text_threshold, nms_threshold=nms_threshold)
        with said_by(cls.NAME):
            if detector is None:
                raise Problem("the loader has detector = none; choose a Grounding DINO file in Load Subject Localizer.")
            phrases = split_phrases(phrase)
            if not phrases:
                raise Problem("the phrase is empty; write what to find, for example: a cat")
            pictures, size = pipeline.as_bytes(image), (image.shape[1], image.shape[2])
            tick = progress(len(pictures) * (2 if segmenter else 1))

            chosen, others, reasons = [], [], []
            for found in pipeline.find(detector, pictures, phrases, detect_size, tick):
                candidates = boxes.without_duplicates(
                    pipeline.labelled(found, phrases, size, box_threshold, text_threshold), nms_threshold
                )
                chosen.append(boxes.choose(candidates, choose, index))
                others.append([box for box in candidates if box not in chosen[-1]])
                reasons.append(why_nothing(phrases, float(found.scores.max()), candidates, chosen[-1], index))

            if segmenter is None:
                masks = torch.stack([boxes.fill(kept, *size) for kept in chosen])
            else:
                masks = pipeline.cut(segmenter, pictures, [pipeline.prompts_of(kept, [], []) for kept in chosen], tick)
            return result(cls.NAME, image, masks, dilation, chosen, others, reasons, if_nothing_found)


class SubjectSegment(io.ComfyNode):
    NAME = "Subject Segment"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectSegment",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Segments boxes or points from elsewhere (SAM): from RT-DETR, SAM 3, another detector, or typed in."
            ),
            search_aliases=["segment anything", "SAM", "box to mask", "points to mask", "mask from box", "RT-DETR"],
            inputs=[
                SEGMENTER.Input("segmenter", tooltip="From Load Subject Localizer."),
                io.Image.Input("image", tooltip="One image or a batch; every image gets its own mask."),
                *choice_inputs("all"),
                *mask_inputs(),
                io.BoundingBox.Input(
                    "boxes",
                    optional=True,
                    force_input=True,
                    tooltip="Boxes in pixels: one list for each image, or one box or list for all of them.",
                ),
                io.String.Input(
                    "positive_coords",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        'Points on the subject, in pixels, as JSON: [{"x": 120, "y": 80}]. Points inside a box '
                        "refine that box; points outside all boxes give one more mask."
                    ),
                ),
                io.String.Input(
                    "negative_coords",
                    optional=True,
                    force_input=True,
                    tooltip='Points outside the subject, in pixels, as JSON: [{"x": 20, "y": 10}].',
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        segmenter: Any,
        image: torch.Tensor,
        choose: str,
        index: int,
        dilation: int,
        if_nothing_found: str,
        boxes: Any | None = None,
        positive_coords: str | None = None,
        negative_coords: str | None = None,
    ) -> io.NodeOutput:
        with said_by(cls.NAME):
            if segmenter is None:
                raise Problem(
                    "the loader has segmenter = none; choose a Segment Anything file in Load Subject Localizer."
                )
            if boxes is None and not (positive_coords or "").strip():
                raise Problem("there is nothing to segment; connect boxes or positive_coords.")
            return segment(
                segmenter, image, choose, index, dilation, if_nothing_found, boxes, positive_coords, negative_coords
            )


def segment(
    segmenter: Any,
    image: torch.Tensor,
    choose: str,
    index: int,
    dilation: int,
    if_nothing_found: str,
    given: Any,
    positive_coords: str | None,
    negative_coords: str | None,
) -> io.NodeOutput:
    pictures, (height, width) = pipeline.as_bytes(image), image.shape[1:3]
    positive = boxes.read_points(positive_coords, "positive_coords")
    negative = boxes.read_points(negative_coords, "negative_coords")
    candidates = [
        [box for box in (boxes.inside(box, height, width) for box in row) if box]
        for row in boxes.per_image(given, len(pictures))
    ]
    chosen = [boxes.choose(row, choose, index) for row in candidates]
    others = [[box for box in row if box not in kept] for row, kept in zip(candidates, chosen, strict=True)]
    prompts = [pipeline.prompts_of(kept, positive, negative) for kept in chosen]
    masks = pipeline.cut(segmenter, pictures, prompts, progress(len(pictures)))
    reasons = [
        "the segmenter found nothing in the boxes and points." if row else "no box was given for it." for row in prompts
    ]
    return result(SubjectSegment.NAME, image, masks, dilation, chosen, others, reasons, if_nothing_found)


def progress(steps: int) -> Callable[[], None]:
    """One step of a progress bar; it raises when the user cancels."""
    bar = comfy.utils.ProgressBar(steps)

    def tick() -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick


def why_nothing(phrases: list[str], best: float, candidates: list[dict], chosen: list[dict], index: int) -> str:
    """Why an image's mask is empty, if it is, and what to do."""
    if chosen:
        return "the segmenter found nothing in the boxes; try other words or a larger segmenter."
    if candidates:
        return f"no label has {index + 1} boxes; lower index."
    return (
        f"the best score for {', '.join(map(repr, phrases))} is {best:.2f}; lower the thresholds or describe it in"
        " other words."
    )


def result(
    node: str,
    image: torch.Tensor,
    masks: torch.Tensor,
    dilation: int,
    chosen: list,
    others: list,
    reasons: list[str],
    if_nothing_found: str,
) -> io.NodeOutput:
    """Both masks, the boxes and the overlay; reasons[i] is said if mask i is empty."""
    for number, mask in enumerate(masks):
        if not mask.any():
            sentence = f"nothing found in image {number}: {reasons[number]}"
            if if_nothing_found == ERROR:
                raise Problem(sentence)
            log.warning("%s: %s", node, sentence)
    subject = masks.float()
    edit = boxes.dilate(subject, dilation)
    drawn = torch.stack(
        [boxes.overlay(*row) for row in zip(pipeline.rgb_of(image), subject, edit, chosen, others, strict=True)]
    )
    place = {"device": mm.intermediate_device(), "dtype": mm.intermediate_dtype()}
    return io.NodeOutput(subject.to(**place), edit.to(**place), chosen, drawn.to(**place))


NODES = [SubjectLocalizeLoader, SubjectLocalize, SubjectSegment]
