"""Textual inversion: a new token is learned by backpropagation through a frozen model, inside ComfyUI.

ComfyUI makes weights in inference mode, and autograd refuses such tensors. `differentiable` lets every operation copy
its own weights while it is computed, so that no second model is needed; with `checkpointed` the copies and activations
of one block at a time are alive.
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch.utils.checkpoint import checkpoint

from ..kernels.masked_mean import masked_mean
from . import internals
from .tokens import content, is_id, same

MADE_BY = "montage_learned_token"  # key of our own entry in the file's metadata
BETAS, WEIGHT_DECAY, MOST_GRADIENT = (0.9, 0.999), 1e-2, 1.0  # the authors'
PATIENCE = 4  # steps without a usable gradient, at the start, before that is an error


class Row(NamedTuple):
    """Stands in tokens for a row of the token that is being learned."""

    number: int


class Token:
    """An embedding that is being learned, and all that is needed to go on with it.

    rows: {encoder: [vectors, width]}, float32. belongs: what it is learned from, as a text. losses: one for each step
    done.
    """

    @torch.inference_mode(False)
    def __init__(self, rows: dict[str, torch.Tensor], belongs: str) -> None:
        self.rows = {name: row.clone().requires_grad_() for name, row in rows.items()}
        self.belongs, self.losses = belongs, []
        self.optimizer = torch.optim.AdamW(list(self.rows.values()), betas=BETAS, weight_decay=WEIGHT_DECAY)

    @classmethod
    def new(cls, clip: CLIP, words: str, vectors: int, belongs: str) -> "Token":
        """Begin with the embeddings of some words, over and over until there are as many as vectors are wanted.
        Raises ValueError if there are none."""
        rows = {}
        for name, tokens in content(clip, words).items():
            if not tokens:
                raise ValueError("init is empty: write a word to initialise the embedding from, such as a.")
            table = getattr(clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings().weight
            values: list[Any] = [table[token.value] if is_id(token.value) else token.value for token in tokens]
            rows[name] = torch.stack([values[number % len(values)].float().cpu() for number in range(vectors)])
        return cls(rows, belongs)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: Path) -> "Token | None":
        """A Token from its file; None if somebody else made the file."""
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        if MADE_BY not in (metadata or {}):
            return None
        assert metadata is not None
        kept = json.loads(metadata[MADE_BY])
        token = cls({key.removeprefix("clip_"): rows for key, rows in tensors.items()}, kept["belongs"])
        token.losses = kept["losses"]
        state = {}
        for key, value in load_tensors(base64.b64decode(kept["optimizer"])).items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
        token.optimizer.load_state_dict({**token.optimizer.state_dict(), "state": state})
        return token

    def save(self, path: Path) -> None:
        """As an embedding that ComfyUI and others read; how far it is goes into the file's metadata."""
        moments = {
            f"{number}.{name}": value
            for number, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        kept = {
            "belongs": self.belongs,
            "losses": self.losses,
            "optimizer": base64.b64encode(save_tensors(moments)).decode(),
        }
        part = path.with_suffix(".part")  # never half a file
        tensors = {f"clip_{name}": rows.detach().clone() for name, rows in self.rows.items()}
        comfy.utils.save_torch_file(tensors, str(part), metadata={MADE_BY: json.dumps(kept)})
        part.replace(path)

    def tokenize(self, clip: CLIP, text: str) -> dict:
        """The tokens of a text that names the embedding, as it was last saved; in its place stand Rows. Weights count
        for nothing.
        """

        def marked(name: str, values: Iterator) -> Iterator:
            rows, met = self.rows[name], 0  # its vectors stand in their order, and may be equal
            for value in values:
                if is_id(value) or not same(value, rows[met % len(rows)]):
                    yield value
                else:
                    yield Row(met % len(rows))
                    met += 1

        tokens = {}
        for name, chunks in clip.tokenize(text).items():
            values = marked(name, (value for chunk in chunks for value, _ in chunk))
            tokens[name] = [[next(values) for _ in chunk] for chunk in chunks]
        return tokens

    def living(self, tokens: dict) -> dict:
        """Tokens for the text encoder, through which the rows learn."""
        return {
            name: [
                [(self.rows[name][value.number] if isinstance(value, Row) else value, 1.0) for value in chunk]
                for chunk in chunks
            ]
            for name, chunks in tokens.items()
        }


class Task(NamedTuple):
    """What is learned from. latent: [1, 4, h, w], as the model sees it. mask: [1, 1, h, w] in [0, 1], where errors
    count. texts: prompts that name the embedding, of which each sample draws one. seed: of all that is drawn."""

    latent: torch.Tensor
    mask: torch.Tensor
    texts: list
    seed: int


def learn(
    token: Token,
    path: Path,
    model: ModelPatcher,
    clip: CLIP,
    task: Task,
    steps: int,
    learning_rate: float,
    batch: int,
    done: Callable[[], None],
) -> None:
    """Go on until `steps` steps are done in all, call done() after each, and keep what is learned at `path`, whatever
    happens.

    Each step draws noise, a time t in U[0, 1000) and a text for each of `batch` samples, one after the other in memory,
    and lowers the model's own training error where the mask is (paper, section 3.3). A step depends on the seed and its
    number alone, so that a run that was cut off goes on as if it had not been. Raises InterruptProcessingException on a
    cancel.
    """
    token.save(path)
    texts = [token.tokenize(clip, text) for text in task.texts]
    for group in token.optimizer.param_groups:
        group["lr"] = learning_rate
    comfy.model_management.load_models_gpu(
        [model, clip.patcher], memory_required=3 * model.memory_required([1, *task.latent.shape[1:]])
    )
    unet, rows = model.model.diffusion_model, list(token.rows.values())
    scale = (
        2.0**12 if model.model.get_dtype_inference() == torch.float16 else 1.0
    )  # half precision loses small gradients
    try:
        with differentiable(unet), differentiable(clip.cond_stage_model), checkpointed(unet):
            latent, mask = (t.clone().to(model.load_device) for t in (task.latent, task.mask))
            while len(token.losses) < steps:
                comfy.model_management.throw_exception_if_processing_interrupted()
                generator = torch.Generator().manual_seed((task.seed * 1_000_003 + len(token.losses)) % 2**63)
                losses, gradients = [], [torch.zeros_like(row) for row in rows]
                for _ in range(batch):
                    text = texts[int(torch.randint(len(texts), (), generator=generator))]
                    t = 1000 * torch.rand(1, generator=generator)
                    noise = torch.randn(latent.shape, generator=generator).to(latent)
                    loss = error(model.model, latent, noise, t, mask, *encode(clip, token.living(text))).mean()
                    for gradient, part in zip(
                        gradients, torch.autograd.grad(loss * scale, rows)
                    ):  # of the rows alone: all else is frozen
                        gradient += part / (scale * batch)
                    losses.append(loss.item())
                for row, gradient in zip(rows, gradients):
                    row.grad = gradient
                if all(torch.isfinite(gradient).all() for gradient in gradients):
                    torch.nn.utils.clip_grad_norm_(rows, MOST_GRADIENT)
                    token.optimizer.step()
                elif not token.optimizer.state and len(token.losses) >= PATIENCE:
                    raise ValueError(
                        "Learn Layer Token: every gradient contains NaN or infinite values, so nothing can be trained."
                        " Start ComfyUI with --force-fp32, or use a checkpoint in another precision."
                    )
                token.losses.append(round(sum(losses) / batch, 5))
                done()
    finally:
        token.save(path)


def encode(clip: CLIP, tokens: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(features, pooled features) of tokens, as CLIP.encode_from_tokens gives them, without loading the model again."""
    clip.cond_stage_model.reset_clip_options()
    if clip.layer_idx is not None:
        clip.cond_stage_model.set_clip_options({"layer": clip.layer_idx})
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
    return clip.cond_stage_model.encode_token_weights(tokens)[:2]


def error(
    model: Any,
    latent: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    mask: torch.Tensor,
    features: torch.Tensor,
    pooled: torch.Tensor | None,
) -> torch.Tensor:
    """The model's training error at time t, over the mask alone: mean of (output - target)^2, [B].

    The target is what the model is trained for, noise or velocity: its output is affine in the denoised latent, so both
    errors differ by a factor of the noise level.
    """
    sampling = model.model_sampling
    sigma = sampling.sigma(t.to(latent.device)).clone()
    noised = sampling.noise_scaling(sigma[:, None, None, None], noise, latent)
    height, width = (8 * side for side in latent.shape[-2:])
    conds = model.extra_conds(
        cross_attn=features,
        pooled_output=pooled,
        noise=noised,
        latent_image=latent,  # a checkpoint for inpainting is to paint everything, and is shown a blank picture
        device=latent.device,
        width=width,
        height=height,
        prompt_type="positive",
    )
    conds = {name: cond.process_cond(batch_size=len(latent), area=None).cond for name, cond in conds.items()}
    options = {
        "optimized_attention_override": lambda _, *args, **kwargs: attention.attention_pytorch(*args, **kwargs)
    }  # others know no backward
    denoised = model.apply_model(noised, sigma, transformer_options=options, **conds)
    one, none = torch.ones_like(latent), torch.zeros_like(latent)
    slope = sampling.calculate_denoised(sigma, one, none) - sampling.calculate_denoised(sigma, none, none)
    return masked_mean(((denoised - latent) / slope) ** 2, mask)


@contextlib.contextmanager
def differentiable(module: torch.nn.Module) -> Iterator[None]:
    """Every operation of a module computes with a copy of its weights, which autograd may keep. What is loaded stays as
    it is. And norms get a copy of what they are given, since ComfyUI's text encoders add to it in place."""

    def copied(part: torch.nn.Module, args: tuple) -> tuple:
        return args[0].clone(), *args[1:]

    with torch.inference_mode(False), torch.enable_grad(), internals.copied_weights(module) as operations:
        hooks = [part.register_forward_pre_hook(copied) for part in operations if isinstance(part, torch.nn.LayerNorm)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def checkpointed(unet: torch.nn.Module) -> Iterator[None]:
    """The blocks of a UNet keep their inputs alone for the backward pass, and compute the rest again."""
    blocks = [part for part in unet.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]

    def cheap(forward: Callable) -> Callable:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    before = [vars(block).get("forward") for block in blocks]  # another pack's own, or none
    for block in blocks:
        block.forward = cheap(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before):
            del block.forward
            if forward:
                block.forward = forward
