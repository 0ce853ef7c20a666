"""SubjectLocalize without the models: boxes, phrases, files, messages. And with small models of random weights."""

import functools
import itertools
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as mm
import comfy_extras.nodes_rtdetr as core_rtdetr
import folder_paths
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from montage.localize import Problem, boxes, files, grounding_dino, pipeline, segment_anything, vocabulary
from montage.localize.managed import FeatureCache, ManagedModel
from montage.nodes import localize as nodes
from montage.workshop import bootstrap
from montage.workshop import localize_reference as reference

H, W = 48, 70


def box(x, y, width, height, label="cat", score=0.5):
    return {"x": x, "y": y, "width": width, "height": height, "label": label, "score": score}


def images(count=1, height=H, width=W, channels=3):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ boxes


@pytest.mark.parametrize(
    "given_boxes, expected",
    [
        (None, [[], []]),
        ([], [[], []]),
        (box(1, 2, 3, 4), [[box(1, 2, 3, 4)]] * 2),
        ([box(1, 2, 3, 4)], [[box(1, 2, 3, 4)]] * 2),
        ([[box(1, 2, 3, 4)]], [[box(1, 2, 3, 4)]] * 2),
        ([[], [box(1, 2, 3, 4)]], [[], [box(1, 2, 3, 4)]]),
    ],
)
def test_every_form_of_boxes_becomes_one_list_an_image(given_boxes, expected):
    assert boxes.per_image(given_boxes, 2) == expected


def test_boxes_of_another_batch_are_refused():
    with pytest.raises(Problem, match="boxes of 3 images and 2 images; connect the same batch"):
        boxes.per_image([[], [], []], 2)


def test_boxes_are_cut_to_the_picture_and_worthless_ones_dropped():
    assert boxes.inside(box(-10, 5, 30, 100), H, W) == box(0, 5, 20, 43)
    for worthless in (
        box(5, 5, 0, 9),
        box(5, 5, -4, 9),
        box(W + 1, 0, 9, 9),
        box(3, 3, 0.5, 9),
        box(float("nan"), 0, 9, 9),
        box(0, 0, float("inf"), 9),
    ):
        assert boxes.inside(worthless, H, W) is None


def test_what_is_no_box_is_answered():
    for wrong in ({"x": 1, "y": 2}, {"x": "a", "y": 2, "width": 3, "height": 4}, [1, 2, 3, 4]):
        with pytest.raises(Problem, match="is not a box; ComfyUI's boxes have x, y, width and height"):
            boxes.inside(wrong, H, W)


def test_choices_are_made_among_the_boxes_of_one_label():
    small, big, dog = box(0, 0, 5, 5, score=0.9), box(9, 9, 20, 20, score=0.4), box(3, 3, 9, 9, "dog", 0.6)
    three = [big, dog, small]
    assert boxes.choose(three, "best score", 0) == [small, dog]
    assert boxes.choose(three, "largest", 0) == [big, dog]
    assert boxes.choose(three, "all", 0) == [small, big, dog]
    assert boxes.choose(three, "index", 1) == [big]
    assert boxes.choose(three, "index", 7) == boxes.choose([], "largest", 0) == []
    by_hand = {"x": 0, "y": 0, "width": 2, "height": 2}
    assert boxes.choose([{**by_hand, "score": 0.9}, by_hand], "best score", 0) == [by_hand]
    assert boxes.score({**by_hand, "score": None}) == boxes.score(by_hand) == 1.0


def test_duplicates_are_dropped_only_within_a_label():
    best, same, dog = box(0, 0, 10, 10, score=0.9), box(0, 0, 10, 9, score=0.8), box(0, 0, 10, 10, "dog", 0.7)
    assert boxes.without_duplicates([same, dog, best], 0.8) == [best, dog]
    assert boxes.without_duplicates([same, dog, best], 1.0) == [best, same, dog]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_dilation_is_that_by_a_square(pixels, seed):
    mask = np.random.default_rng(seed).random((2, 17, 23)) < 0.05
    expected = scipy.ndimage.binary_dilation(mask, np.ones((1, 2 * pixels + 1, 2 * pixels + 1)))
    assert np.array_equal(boxes.dilate(torch.from_numpy(mask).float(), pixels).numpy() > 0.5, expected)


def test_points_are_read_from_json_and_nonsense_is_answered():
    assert boxes.read_points('[{"x": 3, "y": 4.5}]', "positive_coords") == [(3.0, 4.5)]
    assert boxes.read_points(None, "p") == boxes.read_points("  ", "p") == []
    for wrong in ("[1, 2]", "{", '{"x": 1}', '[{"x": 1}]', '[{"x": "a", "y": 1}]', "7"):
        with pytest.raises(Problem, match="negative_coords is not a list of points; write"):
            boxes.read_points(wrong, "negative_coords")
    with pytest.raises(Problem, match="not a number"):
        boxes.read_points('[{"x": NaN, "y": 1}]', "positive_coords")


def test_overlay_marks_the_subject_and_leaves_the_rest():
    image, subject = torch.full((200, 200, 3), 0.5), torch.zeros(200, 200)
    subject[100:120, 100:140] = 1
    edit = boxes.dilate(subject[None], 6)[0]
    drawn = boxes.overlay(image, subject, edit, [box(100, 100, 40, 20)], [box(10, 150, 20, 20)])
    assert drawn.shape == image.shape
    assert torch.allclose(drawn[:60], image[:60], atol=0.003)
    assert (drawn[110, 120] - 0.5).abs().max() > 0.1
    assert torch.allclose(drawn[126, 120], torch.tensor(boxes.EDGE) / 255, atol=0.01)  # the pixel next to edit_mask
    assert torch.equal(drawn[123, 130], drawn[124, 130])  # inside edit_mask but not the subject: as it was


def test_points_help_the_box_they_lie_in_and_the_others_stand_alone():
    prompts = pipeline.prompts_of([box(0, 0, 10, 10), box(20, 20, 10, 10)], [(5, 5), (40, 40)], [(25, 25), (45, 40)])
    assert prompts == [
        pipeline.Prompt((0, 0, 10, 10), ((5, 5, 1),)),
        pipeline.Prompt((20, 20, 30, 30), ((25, 25, 0),)),
        pipeline.Prompt(None, ((40, 40, 1), (45, 40, 0))),
    ]
    assert pipeline.prompts_of([], [], [(1, 1)]) == []


# ------------------------------------------------------------------------------------------ phrases


def test_phrases_are_split_at_lines_full_stops_and_question_marks():
    assert vocabulary.split_phrases(" a cat. Blue dog\n\n?ball. ") == ["a cat", "Blue dog", "ball"]
    assert vocabulary.split_phrases(" . \n?") == []
    assert vocabulary.caption_of(["A cat", "dog"]) == "a cat . dog ."


def test_every_phrase_knows_its_tokens():
    pieces = vocabulary.WordPieces(reference.vocabulary())
    assert pieces.spans("a red cat . dog . ") == [range(1, 4), range(5, 6)]
    assert pieces.spans("\u200b . dog . ") == [range(1, 1), range(2, 3)]


def test_a_vocabulary_is_read_from_both_kinds_of_file_and_another_berts_is_refused(tmp_path):
    words = reference.vocabulary()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"[PAD]": 0, "cat": 1}}}', encoding="utf-8")
    assert vocabulary.read_vocabulary(tmp_path / "vocab.txt") == words
    assert vocabulary.read_vocabulary(tmp_path / "tokenizer.json") == {"[PAD]": 0, "cat": 1}
    assert vocabulary.vocabulary_fault(words, 30522) is None
    assert vocabulary.vocabulary_fault(words, 28996) == "it has 30522 tokens where the checkpoint has 28996"
    moved = {**words, ".": words["?"], "?": words["."]}
    assert vocabulary.vocabulary_fault(moved, 30522) == "., ? stand at other ids than in bert-base-uncased"


# ------------------------------------------------------------------------------------------ the node, detections given


def run(node, **inputs):
    """The node's outputs, run with its schema's defaults."""
    schema = node.define_schema()
    defaults = {
        i.id: (
            getattr(i, "default", None)
            or (i.options[0] if getattr(i, "options", None) else getattr(i, "default", None))
        )
        for i in schema.inputs
        if not i.optional
    }
    return node.execute(**{**defaults, **inputs}).result


@pytest.fixture
def sees(monkeypatch):
    """sees([(x, y, w, h, score per phrase), ..], ..): what the detector answers for each image, in pixels."""

    def answer(*rows_of_images):
        def find(detector, pictures, phrases, short_side, tick):
            found = []
            for rows in rows_of_images:
                scores = (
                    torch.tensor([row[4:] for row in rows]).view(len(rows), -1)
                    if rows
                    else torch.zeros(1, len(phrases))
                )
                centres = [((x + w / 2) / W, (y + h / 2) / H, w / W, h / H) for x, y, w, h, *_ in rows] or [
                    (0.5, 0.5, 0.1, 0.1)
                ]
                found.append(grounding_dino.Detections(torch.tensor(centres), scores.amax(1), scores))
            return found

        monkeypatch.setattr(pipeline, "find", find)

    return answer


def test_as_many_masks_as_images_and_a_warning_for_the_empty_one(sees, caplog):
    sees([(10, 10, 20, 20, 0.9)], [], [(30, 5, 8, 8, 0.2), (0, 0, 4, 4, 0.5)])
    with caplog.at_level(logging.WARNING):
        subject, edit, found, overlay = run(nodes.SubjectLocalize, detector="d", image=images(3), phrase="a cat")
    assert subject.shape == edit.shape == (3, H, W) and overlay.shape == (3, H, W, 3)
    assert [int(mask.sum()) for mask in subject] == [400, 0, 16]
    assert subject.dtype == torch.float32 and set(subject.unique().tolist()) == {0.0, 1.0}
    assert (
        "Subject Localize: nothing found in image 1: the best score for 'a cat' is 0.00; lower the thresholds"
        in caplog.text
    )
    assert [len(row) for row in found] == [1, 0, 1]
    assert found[0][0] == pytest.approx(
        {"x": 10, "y": 10, "width": 20, "height": 20, "label": None, "score": 0.9} | {"label": "a cat"}, abs=1e-4
    )


def test_nothing_found_stops_the_run_if_the_user_says_so(sees):
    sees([(10, 10, 20, 20, 0.9)], [])
    with pytest.raises(
        ValueError, match=r"^Subject Localize: nothing found in image 1: the best score for 'a cat' is 0\.00"
    ):
        run(nodes.SubjectLocalize, detector="d", image=images(2), phrase="a cat", if_nothing_found="error")
    sees([(10, 10, 20, 20, 0.9)])
    with pytest.raises(ValueError, match="no label has 4 boxes; lower index"):
        run(
            nodes.SubjectLocalize,
            detector="d",
            image=images(1),
            phrase="a cat",
            choose="index",
            index=3,
            if_nothing_found="error",
        )


def test_several_phrases_at_once_each_with_its_best_box(sees):
    sees([(0, 0, 5, 5, 0.9, 0.1), (10, 10, 5, 5, 0.6, 0.2), (30, 30, 10, 10, 0.1, 0.5)])
    subject, _, found, _ = run(nodes.SubjectLocalize, detector="d", image=images(1), phrase="a cat. a dog")
    assert [(b["label"], round(b["score"], 2)) for b in found[0]] == [("a cat", 0.9), ("a dog", 0.5)]
    assert subject.sum() == 25 + 100


def test_thresholds(sees):
    sees([(0, 0, 5, 5, 0.5), (10, 10, 5, 5, 0.31), (30, 30, 10, 10, 0.29)])
    counts = [
        len(run(nodes.SubjectLocalize, detector="d", image=images(1), phrase="x", choose="all", box_threshold=t)[2][0])
        for t in (0.28, 0.3, 0.4, 0.6)
    ]
    assert counts == [3, 2, 1, 0]
    counts = [
        len(run(nodes.SubjectLocalize, detector="d", image=images(1), phrase="x", choose="all", text_threshold=t)[2][0])
        for t in (0.25, 0.4, 1.0)
    ]
    assert counts == [2, 1, 0]


def test_the_two_masks_of_mca_ctrl(sees):
    sees([(20, 20, 10, 10, 0.9)])
    subject, edit, _, _ = run(nodes.SubjectLocalize, detector="d", image=images(1), phrase="a cat")
    assert [o.id for o in nodes.SubjectLocalize.define_schema().outputs[:2]] == ["subject_mask", "edit_mask"]
    assert subject.sum() == 100 and edit.sum() == 20 * 20  # grown by the paper's 5 on every side
    subject, edit, _, _ = run(nodes.SubjectLocalize, detector="d", image=images(1), phrase="a cat", dilation=0)
    assert torch.equal(subject, edit)


def test_core_draws_our_boxes(sees):
    sees([(10, 10, 20, 20, 0.9)], [])
    found = run(nodes.SubjectLocalize, detector="d", image=images(2), phrase="a cat")[2]
    assert core_rtdetr.DrawBBoxes.execute(found, images(2)).result[0].shape == (2, H, W, 3)


@pytest.mark.parametrize("phrase", ["", "  ", ".\n?"])
def test_an_empty_phrase_is_answered(phrase):
    with pytest.raises(ValueError, match="^Subject Localize: the phrase is empty; write what to find"):
        run(nodes.SubjectLocalize, detector="d", image=images(1), phrase=phrase)


def test_a_picture_of_nan_is_answered():
    broken = images(2)
    broken[1, 3, 3] = float("nan")
    with pytest.raises(
        ValueError, match="^Subject Localize: image 1 holds values that are not numbers; .* decode it in fp32"
    ):
        run(nodes.SubjectLocalize, detector="d", image=broken)


def test_a_batch_without_images_is_answered():
    with pytest.raises(ValueError, match="^Subject Localize: the batch holds no image"):
        run(nodes.SubjectLocalize, detector="d", image=images(0))


def test_models_set_to_none_are_answered():
    with pytest.raises(ValueError, match="^Subject Localize: the loader has detector = none; choose"):
        run(nodes.SubjectLocalize, detector=None, image=images(1))
    with pytest.raises(ValueError, match="^Subject Segment: the loader has segmenter = none; choose"):
        run(nodes.SubjectSegment, segmenter=None, image=images(1))
    with pytest.raises(
        ValueError, match="^Subject Segment: there is nothing to segment; connect boxes or positive_coords"
    ):
        run(nodes.SubjectSegment, segmenter="s", image=images(1))


def test_pictures_with_one_or_four_channels_become_rgb():
    grey, rgba = images(2, channels=1), images(2, channels=4)
    assert [p.shape for p in pipeline.as_bytes(grey)] == [p.shape for p in pipeline.as_bytes(rgba)] == [(H, W, 3)] * 2
    eight_bit = torch.arange(256).view(1, 16, 16, 1) / 255
    assert np.array_equal(pipeline.as_bytes(eight_bit)[0][..., 0].ravel(), np.arange(256))


def test_every_input_and_output_is_explained():
    for node in nodes.NODES:
        schema = node.define_schema()
        assert schema.category == "montage/localize" and schema.description
        for part in itertools.chain(schema.inputs, schema.outputs):
            assert part.tooltip, f"{schema.node_id}.{part.id}"
        assert (Path(nodes.__file__).parents[1] / "web" / "docs" / f"{schema.node_id}.md").is_file()


def test_the_feature_cache_forgets_the_oldest_and_keeps_the_newest():
    cache, kilobyte = FeatureCache(2500), torch.zeros(250)
    for name in "abc":
        cache.put((name,), name, [kilobyte])
        cache.get(("a",))
    assert (cache.get(("a",)), cache.get(("b",)), cache.get(("c",))) == ("a", None, "c")
    cache.put(("d",), "d", [torch.zeros(9999)])
    assert cache.get(("d",)) == "d" and cache.get(("c",)) is None


@pytest.mark.slow
def test_importing_the_nodes_imports_no_model_package():
    """In a process of its own, since this one has imported everything."""
    code = (
        "import sys; from bootstrap import start; start(); import montage.nodes.localize;"
        "print([m for m in ('groundingdino', 'segment_anything', 'timm', 'supervision') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(bootstrap.__file__).parent, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip().splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder that ComfyUI looks into."""
    for key, names in files.FOLDERS.items():
        (tmp_path / key).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / name) for name in names], set()))
    folder_paths.filename_list_cache.clear()
    return tmp_path


def load(**inputs):
    return run(nodes.SubjectLocalizeLoader, **{"detector": "none", "segmenter": "none", **inputs})


def test_the_published_files_are_offered_before_they_are_there(models):
    (models / "sams" / "sam_vit_b_01ec64.pth").touch()
    (models / "sams" / "mine.safetensors").touch()
    (models / "sams" / "sam_hq.cfg.py").touch()
    assert files.offered("sams") == [
        "mine.safetensors",
        "sam_vit_b_01ec64.pth",
        "sam_vit_l_0b3195.pth",
        "sam_vit_h_4b8939.pth",
        "none",
    ]
    assert load() == (None, None)


def test_a_missing_file_is_answered_with_its_folder(models):
    (models / "bert-base-uncased" / "vocab.txt").touch()
    with pytest.raises(ValueError) as error:
        load(detector="groundingdino_swint_ogc.pth")
    assert (
        str(error.value) == "Load Subject Localizer: there is no groundingdino_swint_ogc.pth; put it (694 MB, "
        f"github.com/IDEA-Research/GroundingDINO/releases) into {models / 'grounding-dino'}."
    )
    with pytest.raises(ValueError, match=r"there is no sam_vit_h_4b8939.pth; put it \(2.6 GB, .*\) into .*sams"):
        load(segmenter="sam_vit_h_4b8939.pth")


def test_all_missing_files_are_named_at_once(models):
    with pytest.raises(ValueError) as error:
        load(detector="groundingdino_swint_ogc.pth", segmenter="sam_vit_b_01ec64.pth")
    said = str(error.value)
    for name, folder in (
        ("groundingdino_swint_ogc.pth", "grounding-dino"),
        ("sam_vit_b_01ec64.pth", "sams"),
        ("vocab.txt", "bert-base-uncased"),
    ):
        assert name in said and str(models / folder) in said
    assert said.count("Load Subject Localizer") == 1


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_pickled_code_does_not_run(models):
    bomb = Bomb()
    bomb.target = str(models / "exploded")
    torch.save({"model": bomb}, models / "sams" / "bomb.pth")
    (models / "sams" / "raw.pth").write_bytes(pickle.dumps(bomb))
    (models / "sams" / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (models / "sams" / "torn.safetensors").write_bytes(b"\xff" * 64)
    for name in ("bomb.pth", "raw.pth", "torn.pth", "torn.safetensors"):
        with pytest.raises(
            ValueError, match=f"^Load Subject Localizer: {name} in models/sams cannot be read as plain weights"
        ):
            load(segmenter=name)
    assert not (models / "exploded").exists()


def test_models_of_another_kind_are_refused(models):
    for name, weights, answer in [
        (
            "hq",
            {"mask_decoder.hf_token.weight": torch.zeros(1)},
            "hq.safetensors in models/sams is a SAM-HQ model; take sam_vit_b",
        ),
        (
            "mobile",
            {"image_encoder.layers.0.weight": torch.zeros(1)},
            "mobile.safetensors in models/sams is another kind of model",
        ),
    ]:
        save_file(weights, models / "sams" / f"{name}.safetensors")
        with pytest.raises(ValueError, match=answer):
            load(segmenter=f"{name}.safetensors")
    save_file({"x": torch.zeros(1)}, models / "grounding-dino" / "other.safetensors")
    with pytest.raises(
        ValueError,
        match="other.safetensors in models/grounding-dino is not a Grounding DINO checkpoint; take groundingdino_swint",
    ):
        load(detector="other.safetensors")


# ------------------------------------------------------------------------------------------ small models of random
# weights

WORDS = 1040  # just past the special tokens


@functools.cache
def small_detector() -> dict[str, torch.Tensor]:
    pytest.importorskip("groundingdino")
    shape = SimpleNamespace(
        swin={
            "embed_dim": 32,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
            "window_size": 4,
            "out_indices": (1, 2, 3),
        },
        bert={
            "vocab_size": WORDS,
            "hidden_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
        },
        hidden_dim=256,
        nheads=8,
        num_feature_levels=4,
        enc_layers=1,
        dec_layers=2,
        dim_feedforward=64,
        num_queries=20,
        enc_n_points=4,
        dec_n_points=4,
        query_dim=4,
        num_patterns=0,
        position_embedding="sine",
        pe_temperatureH=20,
        pe_temperatureW=20,
        two_stage_type="standard",
        embed_init_tgt=True,
        transformer_activation="relu",
        pre_norm=False,
        use_text_enhancer=True,
        use_fusion_layer=True,
        use_text_cross_attention=True,
        use_checkpoint=False,
        use_transformer_ckpt=False,
        dropout=0.0,
        text_dropout=0.0,
        fusion_dropout=0.0,
        fusion_droppath=0.0,
    )
    with torch.inference_mode(False):
        model = grounding_dino._detector_class()(shape, vocabulary.WordPieces(small_vocabulary()))
        return reference.seeded(reference.shapes_of(model))


def small_vocabulary() -> dict[str, int]:
    words = list(reference.vocabulary())[:WORDS]
    words[-len(reference.WORDS) :] = reference.WORDS
    return {word: at for at, word in enumerate(words)}


@functools.cache
def small_segmenter() -> dict[str, torch.Tensor]:
    parts = pytest.importorskip("segment_anything.modeling")
    model = torch.nn.Module()
    model.image_encoder = parts.ImageEncoderViT(
        img_size=128,
        patch_size=16,
        embed_dim=32,
        depth=2,
        out_chans=32,
        num_heads=2,
        use_rel_pos=True,
        global_attn_indexes=[1],
        window_size=5,
    )
    model.prompt_encoder = parts.PromptEncoder(
        embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
    )
    model.mask_decoder = parts.MaskDecoder(
        transformer_dim=32,
        iou_head_hidden_dim=32,
        transformer=parts.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=64),
    )
    return reference.seeded(reference.shapes_of(model))


@pytest.fixture(scope="module")
def files_of_small_models(tmp_path_factory) -> Path:
    """As published: {"model": {"module....}} for the detector."""
    folder = tmp_path_factory.mktemp("small")
    torch.save({"model": {f"module.{k}": v for k, v in small_detector().items()}}, folder / "detector.pth")
    torch.save(small_segmenter(), folder / "segmenter.pth")
    return folder


@pytest.fixture
def small_files(models, files_of_small_models):
    """The small models and their vocabulary in the models folder."""
    for kind, folder in (("detector", "grounding-dino"), ("segmenter", "sams")):
        shutil.copy(files_of_small_models / f"{kind}.pth", models / folder / "small.pth")
    (models / "bert-base-uncased" / "vocab.txt").write_text("\n".join(small_vocabulary()) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def loaded():
    """The two small models are the same in all tests; a ModelPatcher must not outlive ComfyUI's modules."""
    cache = []
    yield cache
    cache.clear()


@pytest.fixture
def small(small_files, loaded):
    """Both models, as the loader node gives them, without features of earlier tests."""
    if not loaded:
        loaded += load(detector="small.pth", segmenter="small.pth")
    detector, segmenter = loaded
    detector.features.values.clear()
    segmenter.features.values.clear()
    return SimpleNamespace(detector=detector, segmenter=segmenter)


def localize(small, image, phrase="a red cat", **inputs):
    return run(
        nodes.SubjectLocalize,
        detector=small.detector,
        segmenter=small.segmenter,
        image=image,
        phrase=phrase,
        detect_size=128,
        **inputs,
    )


def test_nothing_reaches_for_the_network(small_files, monkeypatch):
    """Loading and a first run, with every connection refused."""

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    detector, segmenter = load(detector="small.pth", segmenter="small.pth")
    assert localize(SimpleNamespace(detector=detector, segmenter=segmenter), images(1))[0].shape == (1, H, W)


@pytest.mark.parametrize("count, height, width", [(3, 48, 70), (1, 131, 97), (2, 64, 64)])
def test_masks_boxes_and_overlay_of_a_batch_of_any_size(small, count, height, width):
    subject, edit, found, overlay = localize(
        small, images(count, height, width), box_threshold=0.0, text_threshold=0.0, choose="all"
    )
    assert subject.shape == edit.shape == (count, height, width) and overlay.shape == (count, height, width, 3)
    assert len(found) == count and all(found)
    for one in itertools.chain(*found):
        assert (
            one["x"] >= 0 and one["x"] + one["width"] <= width and one["y"] >= 0 and one["y"] + one["height"] <= height
        )
        assert 0 <= one["score"] <= 1 and one["label"] == "a red cat"
    assert (edit >= subject).all() and overlay.min() >= 0 and overlay.max() <= 1


def test_a_batch_gives_what_its_images_give_alone(small):
    batch = images(3)
    together = localize(small, batch, box_threshold=0.0, text_threshold=0.0)
    for row in range(3):
        alone = localize(small, batch[row : row + 1], box_threshold=0.0, text_threshold=0.0)
        assert torch.equal(together[0][row], alone[0][0]) and together[2][row] == alone[2][0]


def test_a_second_phrase_computes_no_image_feature_and_finds_the_same(small):
    batch, calls = images(2), []
    hooks = [
        encoder.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        for encoder in (small.detector.load().backbone[0], small.segmenter.load().image_encoder)
    ]
    localize(small, batch, "a red cat", box_threshold=0.0, text_threshold=0.0)
    assert sorted(calls) == ["ImageEncoderViT"] * 2 + ["SwinTransformer"] * 2
    calls.clear()
    second = localize(small, batch, "blue dog", box_threshold=0.0, text_threshold=0.0)
    assert calls == []
    for hook in hooks:
        hook.remove()
    small.detector.features.values.clear()
    small.segmenter.features.values.clear()
    again = localize(small, batch, "blue dog", box_threshold=0.0, text_threshold=0.0)
    assert second[2] == again[2] and torch.equal(second[0], again[0])


@pytest.fixture
def interrupted():
    yield lambda: mm.interrupt_current_processing(True)
    mm.interrupt_current_processing(False)


def test_cancel_stops_in_the_middle_of_a_picture_and_leaves_nothing_behind(small, interrupted):
    first, second = images(2).split(1)
    wanted = localize(small, second, box_threshold=0.0, text_threshold=0.0)[2]
    small.detector.features.values.clear()

    hook = small.detector.patcher.model.transformer.encoder.layers[0].register_forward_hook(lambda *_: interrupted())
    with pytest.raises(mm.InterruptProcessingException):
        localize(small, first, box_threshold=0.0, text_threshold=0.0)
    hook.remove()
    mm.interrupt_current_processing(False)
    assert localize(small, second, box_threshold=0.0, text_threshold=0.0)[2] == wanted


def test_cancel_stops_between_the_boxes(small, interrupted):
    decoder, calls = small.segmenter.patcher.model.mask_decoder, []
    hook = decoder.register_forward_hook(lambda *_: calls.append(1) or interrupted())
    with pytest.raises(mm.InterruptProcessingException):
        run(
            nodes.SubjectSegment,
            segmenter=small.segmenter,
            image=images(1),
            boxes=[box(2, 2, 20, 20), box(30, 9, 20, 20)],
        )
    hook.remove()
    assert len(calls) == 1


def test_boxes_of_core_rtdetr_and_of_sam3_are_cut_out(small, monkeypatch):
    """RTDETR_detect itself on a network that answers this; SAM3_Detect returns the same without labels."""
    answer = [
        {
            "boxes": torch.tensor([[3.2, 4.8, 23.7, 34.9], [40.0, 2.0, 58.0, 22.0]]),
            "labels": torch.tensor([0, 16]),
            "scores": torch.tensor([0.93, 0.71]),
        },
        {"boxes": torch.zeros(1, 4), "labels": torch.tensor([3]), "scores": torch.tensor([0.1])},
    ]
    network = SimpleNamespace(model=SimpleNamespace(diffusion_model=lambda pixels, size: answer))
    monkeypatch.setattr(mm, "load_model_gpu", lambda model: None)
    rtdetr = core_rtdetr.RTDETR_detect.execute(network, images(2), 0.5, "all", 100).result[0]
    assert [len(row) for row in rtdetr] == [2, 0]
    sam3 = [
        [{"x": 3.2, "y": 4.8, "width": 20.5, "height": 30.1, "score": 0.93}],
        [{"x": 1.0, "y": 1.0, "width": 30.0, "height": 30.0, "score": 0.5}],
    ]
    for given_boxes in (rtdetr, sam3):
        subject, edit, found, _ = run(
            nodes.SubjectSegment, segmenter=small.segmenter, image=images(2), boxes=given_boxes
        )
        assert subject.shape == (2, H, W) and [len(row) for row in found] == [len(row) for row in given_boxes]
        assert [bool(mask.any()) for mask in subject] == [bool(row) for row in given_boxes]


def test_each_box_is_its_own_prompt_and_the_mask_their_union(small):
    one, two = box(3, 4, 20, 30), box(40, 2, 18, 20, "dog")
    masks = [
        run(nodes.SubjectSegment, segmenter=small.segmenter, image=images(1), boxes=given_boxes)[0]
        for given_boxes in (one, two, [one, two])
    ]
    assert torch.equal(torch.maximum(masks[0], masks[1]), masks[2]) and not torch.equal(masks[0], masks[1])


def test_points_from_elsewhere(small):
    image, spot = images(1), '[{"x": 30, "y": 20}]'
    alone = run(nodes.SubjectSegment, segmenter=small.segmenter, image=image, positive_coords=spot)
    assert alone[0].shape == (1, H, W) and alone[2] == [[]]
    model = small.segmenter.load()
    embedding = model.embed(pipeline.as_bytes(image)[0])
    logits, quality = model.prompt(embedding, (H, W), None, ((30, 20, 1),), several=True)
    assert torch.equal(alone[0][0] > 0, logits[quality.argmax()] > 0) and len(logits) == 3
    beside = run(
        nodes.SubjectSegment,
        segmenter=small.segmenter,
        image=image,
        positive_coords=spot,
        negative_coords='[{"x": 5, "y": 5}]',
    )
    assert not torch.equal(model.prompt(embedding, (H, W), None, ((30, 20, 1), (5, 5, 0)), True)[0], logits) and beside[
        0
    ].shape == (1, H, W)


def test_fp16_changes_the_masks_little(small):
    whole = small.segmenter.load()
    half = segment_anything.build_segmenter(small_segmenter(), half=True)
    assert (
        half.image_encoder.blocks[0].attn.qkv.weight.dtype == torch.float16
        and half.mask_decoder.iou_token.weight.dtype == torch.float32
    )
    picture = reference.picture()
    a, b = (model.cut(model.embed(picture), picture.shape[:2], reference.BOX)[0] for model in (whole, half))
    assert (a & b).sum() / (a | b).sum() > 0.98
    assert not torch.equal(whole.embed(picture), half.embed(picture))


def test_a_long_phrase_and_a_thin_image_are_answered(small):
    with pytest.raises(
        ValueError,
        match=r"^Subject Localize: the phrases are \d+ tokens long and Grounding DINO reads 256; ask for fewer",
    ):
        localize(small, images(1), "cat " * 300)
    with pytest.raises(
        ValueError,
        match="^Subject Localize: an image of 600x2 is searched at 1200x4, too few pixels; raise detect_size",
    ):
        small.detector.load().num_queries, before = 900, small.detector.load().num_queries
        try:
            localize(small, images(1, 2, 600))
        finally:
            small.detector.load().num_queries = before


def test_missing_or_wrong_vocabulary_is_answered(small_files, models):
    path = models / "bert-base-uncased" / "vocab.txt"
    path.write_text("\n".join(list(small_vocabulary())[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=(
            "needs BERT's vocabulary; put vocab.txt .* into .*bert-base-uncased. .* is not it: it has 1039 tokens where"
        ),
    ):
        load(detector="small.pth")
    path.unlink()
    with pytest.raises(ValueError) as error:
        load(detector="small.pth")
    assert (
        str(error.value) == "Load Subject Localizer: Grounding DINO needs BERT's vocabulary; put vocab.txt (232 KB, "
        f"huggingface.co/google-bert/bert-base-uncased) into {models / 'bert-base-uncased'}."
    )


def test_a_damaged_checkpoint_is_answered(small_files, models):
    weights = dict(small_segmenter())
    weights.pop("mask_decoder.iou_token.weight")
    save_file(weights, models / "sams" / "cut.safetensors")
    with pytest.raises(
        ValueError,
        match=(
            r"cut.safetensors does not fit \(1 weights are missing and 0 unknown, the first is"
            r" mask_decoder.iou_token.weight\)"
        ),
    ):
        load(segmenter="cut.safetensors")
    weights = dict(small_detector())
    weights["feat_map.weight"] = torch.zeros(3, 3)
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, models / "grounding-dino" / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd.safetensors does not fit \(size mismatch for feat_map.weight"):
        load(detector="odd.safetensors")


@pytest.mark.parametrize(
    "module, package, inputs",
    [
        ("segment_anything", "segment-anything", {"segmenter": "small.pth"}),
        ("groundingdino", "rf_groundingdino", {"detector": "small.pth"}),
    ],
)
def test_a_missing_package_is_answered(small_files, monkeypatch, module, package, inputs):
    grounding_dino._detector_class.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError,
        match=f"^Load Subject Localizer: a Python package is missing .*{module}.*; run `pip install {package}`",
    ):
        load(**inputs)
    grounding_dino._detector_class.cache_clear()


def test_other_models_that_need_the_memory_get_it(small):
    """On a device that counts: everything is on it after load, and back after ComfyUI takes the memory."""
    managed = ManagedModel(segment_anything.build_segmenter(small_segmenter()), 0)
    managed.patcher.load_device = torch.device("meta")
    managed.patcher.load(torch.device("meta"), full_load=True)
    assert {p.device.type for p in managed.patcher.model.parameters()} == {"meta"}
    mm.unload_all_models()
    assert localize(small, images(1)) and any(
        loaded.model is small.detector.patcher for loaded in mm.current_loaded_models
    )
    mm.unload_all_models()
    assert not any(loaded.model is small.detector.patcher for loaded in mm.current_loaded_models)
    assert localize(small, images(1))
