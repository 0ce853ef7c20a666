"""Textual inversion of one layer of a collage (Collage Diffusion, arXiv 2303.00262, section 3.3)."""

import hashlib
import json
import re
from pathlib import Path

import comfy.sample
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..kernels import collage as kernel
from ..methods.collage import Collage, Layer, owned_tokens
from ..patching import internals, textual_inversion
from ..patching.models import require_unet
from ..patching.tokens import is_clip, token_runs
from .collage import CATEGORY, COLLAGE
from .inputs import connected, refuse_nan

TEMPLATES = (
    "a photo of {}\n{}\na close-up photo of {}\na bright photo of {}\na dark photo of {}\na good photo of {}\na picture"
    " of {}\na rendition of {}"
)
SHOW_EVERY = 25  # steps
DRAWING = {"steps": 12, "cfg": 5.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}


class LearnLayerToken(io.ComfyNode):
    NAME = "Learn Layer Token"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnLayerToken",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Trains a textual-inversion embedding of one layer of a collage, so that it keeps its appearance at a "
                "high denoise (Collage Diffusion). Saved as an ordinary embedding; cancelled runs resume."
            ),
            is_output_node=True,  # its own run button: learn without sampling
            search_aliases=[
                "collage diffusion",
                "textual inversion",
                "train embedding",
                "personalize",
                "dreambooth",
                "style transfer",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model as loaded from its checkpoint. It is not changed."),
                io.Clip.Input("clip", tooltip="The model's text encoder. It is not changed."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                COLLAGE.Input(
                    "collage", tooltip="From Collage Canvas, or another Learn Layer Token for the next layer."
                ),
                io.Int.Input("layer", default=0, min=0, max=999, tooltip="Which layer to train on: 0 is at the back."),
                io.String.Input(
                    "name",
                    default="my-layer",
                    tooltip=(
                        "Name of the embedding: saved as NAME.safetensors in the embeddings folder, and used in "
                        "any prompt as embedding:NAME."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=250,
                    min=1,
                    max=100000,
                    tooltip=(
                        "Training steps in total, including those of earlier runs (paper: 250). 1 uses the "
                        "embedding as it is."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=4e-4,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Paper: 0.0004. Larger is faster and rougher.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Random seed of the training. Another seed trains another embedding from the start.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100000,
                    tooltip="Samples a preview with the embedding every so many steps. 0: never.",
                ),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip=(
                        "Gradient accumulation: samples per step, one after the other, for a smoother loss. Costs "
                        "time, not memory (paper: 4)."
                    ),
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    advanced=True,
                    tooltip="Number of tokens of the embedding (paper: 1). More hold more detail.",
                ),
                io.String.Input(
                    "init", default="a", advanced=True, tooltip="Words to initialise the embedding from (paper: a)."
                ),
                io.String.Input(
                    "templates",
                    default=TEMPLATES,
                    multiline=True,
                    advanced=True,
                    tooltip=(
                        "Prompt templates of the training, one per line; {} is replaced by the embedding and the "
                        "layer's text. Each sample uses one of them."
                    ),
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Resumes an earlier run of the same picture, text, seed, vectors, init and checkpoint. "
                        "Off: always trains from the start."
                    ),
                ),
            ],
            outputs=[
                COLLAGE.Output(
                    "learned",
                    display_name="collage",
                    tooltip=(
                        "The collage with embedding:NAME inserted before the layer's text, in the layer and in "
                        "the prompt."
                    ),
                ),
                io.String.Output("embedding", tooltip="embedding:NAME as text, for other prompts."),
                io.Image.Output("loss_picture", display_name="loss", tooltip="Loss per step, and its running mean."),
                io.Image.Output("pictures", tooltip="The training picture, followed by the previews."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        collage: Collage,
        layer: int,
        name: str,
        steps: int,
        learning_rate: float,
        seed: int,
        preview_every: int,
        batch: int,
        vectors: int,
        init: str,
        templates: str,
        resume: bool,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, learning_rate=learning_rate)
        connected(cls.NAME, "clip", clip)
        if not is_clip(clip):
            raise ValueError(
                f"{cls.NAME}: it trains an embedding of CLIP, and the text encoder"
                f" {type(clip.cond_stage_model).__name__} is another. Connect the CLIP of the model's own checkpoint"
                " (Load Checkpoint)."
            )
        require_unet(cls.NAME, model, "it trains an embedding of CLIP through the model's cross-attention")
        connected(cls.NAME, "vae", vae)
        path = cls.path(clip, name)
        learned = cls.with_token(clip, collage, layer, name)
        texts = cls.texts(templates, learned.layers[layer].text)
        picture, mask = cls.target(collage, layer)
        token = cls.token(model, clip, path, collage.layers[layer], vectors, init, seed, resume)

        latent = model.model.process_latent_in(vae.encode(picture.movedim(0, -1)[None]))
        task = textual_inversion.Task(
            latent, F.interpolate(mask[None, None], size=latent.shape[-2:], mode="area"), texts, seed
        )
        pictures, bar = [picture.movedim(0, -1)], comfy.utils.ProgressBar(steps)

        def show() -> None:
            bar.update_absolute(
                len(token.losses), preview=("JPEG", beside(losses_picture(token.losses), pictures[-1]), 1024)
            )

        def done() -> None:
            show() if len(token.losses) % SHOW_EVERY == 0 else bar.update_absolute(len(token.losses))

        while len(token.losses) < steps:
            pause = min(steps, (len(token.losses) // preview_every + 1) * preview_every) if preview_every else steps
            textual_inversion.learn(token, path, model, clip, task, pause, learning_rate, batch, done)
            if preview_every:
                pictures.append(cls.drawn(model, clip, vae, texts[0], latent.shape, seed))
                show()
        loss = losses_picture(token.losses)
        return io.NodeOutput(
            learned,
            f"embedding:{name}",
            loss[None],
            torch.stack([fitted(one, pictures[0]) for one in pictures]),
            ui=ui.PreviewImage(loss[None], cls=cls),
        )

    @classmethod
    def path(cls, clip: CLIP, name: str) -> Path:
        """Where the embedding is kept: in the first folder that the CLIP finds embeddings in."""
        if not re.fullmatch(r"[\w.-]*\w", name, re.ASCII):
            raise ValueError(f'{cls.NAME}: "{name}" cannot be the name of an embedding. Use letters, digits, - and _.')
        folders = next(
            (
                part.embedding_directory
                for part in vars(clip.tokenizer).values()
                if hasattr(part, "embedding_directory")
            ),
            None,
        )
        if not folders:
            raise ValueError(
                f"{cls.NAME}: this CLIP was loaded without a folder of embeddings, so that it could not use"
                " the embedding. Load it with Load Checkpoint or another of ComfyUI's loaders."
            )
        folder = Path(folders if isinstance(folders, str) else folders[0])
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.safetensors"

    @classmethod
    def with_token(cls, clip: CLIP, collage: Collage, number: int, name: str) -> Collage:
        """The collage in which the embedding stands before the layer's own words."""
        if number >= len(collage.layers):
            raise ValueError(
                f"{cls.NAME}: layer {number} is not there: the collage has {len(collage.layers)}, counted from 0 at the"
                " back."
            )
        layer = collage.layers[number]
        if not layer.text:
            raise ValueError(
                f"{cls.NAME}: layer {number} (node {layer.node}) has no text, and the embedding is trained together"
                " with it. Write what the layer shows into its text."
            )
        if f"embedding:{name}" in layer.text.split():
            return collage
        owned = owned_tokens(cls.NAME, clip, collage)
        runs = token_runs(clip, collage.prompt, layer.text)
        words = r"(?<!\w)" + r"\s+".join(map(re.escape, layer.text.split())) + r"(?!\w)"
        places = list(re.finditer(words, collage.prompt, re.IGNORECASE))
        if len(places) != len(runs):
            raise ValueError(
                f'{cls.NAME}: "{layer.text}" (layer {number}) occurs in the prompt "{collage.prompt}" with weights or'
                " other characters in between. Write it there exactly as in the layer."
            )
        prompt = collage.prompt
        for place, run in reversed(list(zip(places, runs))):
            if all(number in owned.get(position, ()) for position in run):
                before = prompt[: place.start()]
                prompt = (
                    f"{before}{' ' if before.strip() == before != '' else ''}embedding:{name} {prompt[place.start() :]}"
                )
        layers = list(collage.layers)
        layers[number] = layer._replace(text=f"embedding:{name} {layer.text}")
        return collage._replace(layers=tuple(layers), prompt=prompt)

    @classmethod
    def texts(cls, templates: str, text: str) -> list[str]:
        lines = [line.strip() for line in templates.splitlines() if line.strip()]
        wrong = [line for line in lines if "{}" not in line]
        if wrong or not lines:
            raise ValueError(
                f'{cls.NAME}: the template "{"".join(wrong[:1])}" has no {{}} for the layer\'s words. Write it like: a'
                " photo of {}."
            )
        return [line.replace("{}", text) for line in lines]

    @classmethod
    def target(cls, collage: Collage, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is learned from: the collage with the layer on top of it [3, H, W], and where the layer is [H, W]."""
        picture, _ = kernel.over(collage.place, number + 1, collage.background)
        mask = collage.place(number)[3]
        if not mask.any():
            raise ValueError(
                f"{cls.NAME}: layer {number} (node {collage.layers[number].node}) lies outside the canvas. Move it"
                " back."
            )
        return picture, mask

    @classmethod
    def token(
        cls, model: ModelPatcher, clip: CLIP, path: Path, layer: Layer, vectors: int, init: str, seed: int, resume: bool
    ) -> textual_inversion.Token:
        """The token of an earlier run, if it is the same; else a new one."""
        checkpoint = internals.unpatched_weight(model, "diffusion_model.out.2.weight")
        learned_from = [layer.text, vectors, init, seed, digest(layer.picture), digest(checkpoint)]
        belongs = hashlib.sha256(json.dumps(learned_from).encode()).hexdigest()
        found = None
        if path.exists():
            found = textual_inversion.Token.load(path)
            if found is None:
                raise ValueError(
                    f"{cls.NAME}: an embedding {path.name} exists already that this node did not make. Choose"
                    " another name."
                )
        if resume and found and found.belongs == belongs:
            return found
        try:
            return textual_inversion.Token.new(clip, init, vectors, belongs)
        except ValueError as error:
            raise ValueError(f"{cls.NAME}: {error}") from None

    @classmethod
    def drawn(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, text: str, shape: tuple[int, ...], seed: int
    ) -> torch.Tensor:
        """A picture of the token, [H, W, 3]."""
        latent = torch.zeros(shape)
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (text, ""))
        samples = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed),
            **DRAWING,
            positive=positive,
            negative=negative,
            latent_image=latent,
            disable_pbar=True,
            seed=seed,
        )
        return vae.decode(samples)[0].cpu().float()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def losses_picture(losses: list[float], width: int = 640, height: int = 320, margin: int = 36) -> torch.Tensor:
    """The loss of each step as a dot, their running mean as a line, [H, W, 3]."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    values = np.array(losses or [0.0])
    top = np.quantile(values, 0.98) * 1.1 or 1.0  # a few outliers must not flatten the rest
    window = max(1, len(values) // 10)
    sums = np.cumsum([0.0, *values])
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]

    def at(step: int, value: float) -> tuple[float, float]:
        return margin + (width - 2 * margin) * step / max(1, len(values) - 1), height - margin - (
            height - 2 * margin
        ) * min(value / top, 1.0)

    pen.rectangle([margin, margin, width - margin, height - margin], outline="#bbbbbb")
    for step, value in enumerate(values):
        x, y = at(step, value)
        pen.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], fill="#b8cbe8")
    pen.line([at(step, value) for step, value in enumerate(means)], fill="#1f4e9c", width=3)
    pen.text(
        (margin, 12),
        f"loss over {len(losses)} steps; line: mean of the last {window}, now {means[-1]:.4f}",
        fill="black",
    )
    pen.text((4, margin - 6), f"{top:.3g}", fill="#666666")
    pen.text((4, height - margin - 6), "0", fill="#666666")
    return torch.from_numpy(np.array(image)).float() / 255


def beside(*pictures: torch.Tensor) -> Image.Image:
    """Pictures [H, W, 3] side by side, as one image."""
    images = [Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()) for picture in pictures]
    high = max(image.height for image in images)
    images = [image.resize((round(image.width * high / image.height), high)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in images), high))
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width
    return row


def fitted(picture: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A picture [H, W, 3] at another one's size: a VAE crops what its blocks do not fill."""
    if picture.shape == like.shape:
        return picture
    return F.interpolate(picture.movedim(-1, 0)[None], size=like.shape[:2], mode="bilinear", antialias=True)[0].movedim(
        0, -1
    )


NODES = [LearnLayerToken]
