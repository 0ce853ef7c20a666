"""Checkpoints for inpainting: their UNet reads nine channels, the mask and the masked picture beside the latent."""

import pytest
import torch

from montage.nodes.collage import CollageNoise
from montage.nodes.layout_retouch import MultiSourceSwap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.patching import textual_inversion
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.random_models import random_model, text_encoder
from montage.workshop.sampling import MIXED, NEGATIVE, close, compose, halves, masks_of, record, same, sample, words

INPAINT = "sd15-inpaint-small"


def hole() -> dict:
    """A picture's latent with a noise mask over its left half."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"samples": latent, "noise_mask": (halves() == 0).float()[None]}


def concatenated(model, act) -> list[torch.Tensor]:
    """The five channels beside the latent, [B, 5, h, w], of every evaluation while act() runs."""
    seen = []

    def look(module, args):
        seen.append(args[0][:, 4:].clone())

    hook = model.model.diffusion_model.register_forward_pre_hook(look)
    act()
    hook.remove()
    return seen


def test_an_image_beside_a_mask_is_recorded_and_composed():
    model = random_model(INPAINT)
    settings = {"model": model, "latent": hole()}
    a, b = record(seed=1, positive=words(1), **settings), record(seed=2, positive=words(2), **settings)
    close(compose([a, b], masks_of(torch.zeros(8, 8), 2), model=model, positive=words(1)), a["samples"])
    composed = compose([a, b], MIXED, model=model, positive=words(1))
    assert torch.isfinite(composed).all() and not same(composed, a["samples"])


@pytest.mark.parametrize("node", ["layout", "subject"])
def test_prompts_of_their_own_keep_the_mask_and_the_picture(node):
    """A replay with the prompt that the stream was recorded with anyway is the same replay, channels and all."""
    model, ones = random_model(INPAINT), torch.ones(1, 64, 64)
    a, b = (record(seed=seed, positive=words(seed), model=model, latent=hole()) for seed in (1, 2))

    def patched(first=None, second=None):
        if node == "layout":
            mask = halves((64, 64)).float()[None]
            return MultiSourceSwap.execute(
                model, a, b, 0.2, 0.2, 1.0, "all", mask, layout_prompt=first, reference_prompt=second
            ).args
        window = {"preset": "paper swap"}
        return CollaborativeAttention.execute(
            model, a, ones, window, 0, False, False, "SAGI first", 0.3, "soft", b, ones,
            subject_positive=first, condition_positive=second, negative=NEGATIVE if first else None,
        ).args  # fmt: skip

    def sampled(*prompts):
        target, latent = patched(*prompts)
        return concatenated(model, lambda: results.append(sample(target, latent, positive=words(3))["samples"]))

    results = []
    for plain_call, own_call in zip(sampled(), sampled(words(1), words(2))):
        close(own_call.mean((0, 2, 3)), plain_call.mean((0, 2, 3)))
    close(results[1], results[0])


def test_collage_noise_shows_the_model_what_a_plain_run_shows():
    """Without a mask everything is to be painted: ones, and a blank picture instead of the collage."""
    collage = canvas(layer(plain(BLUE), x=0.75, noise=0.8, behind=layer(plain(RED), x=0.25, noise=0.2)))[0]
    latent = {"samples": hole()["samples"]}
    model, denoise = CollageNoise.execute(random_model(INPAINT), collage, 0.0).args
    plainly, ours = (
        concatenated(sampled, lambda sampled=sampled: sample(sampled, latent, denoise=denoise))
        for sampled in (random_model(INPAINT), model)
    )
    assert len(plainly) == len(ours) and all(map(same, plainly, ours))
    assert (ours[0][:, 0] == 1).all() and len(ours[0][:, 1:].flatten(2).unique(dim=2)[0, 0]) == 1


def test_a_token_is_learned_from_a_checkpoint_for_inpainting(tmp_path):
    model, clip = random_model(INPAINT), text_encoder("sd15-small", embeddings=str(tmp_path))
    token = textual_inversion.Token.new(clip, "a", 1, "here")
    before = {name: row.detach().clone() for name, row in token.rows.items()}
    task = textual_inversion.Task(hole()["samples"], torch.ones(1, 1, 8, 8), ["a photo of embedding:x"], 0)
    textual_inversion.learn(token, tmp_path / "x.safetensors", model, clip, task, 1, 1e-3, 1, lambda: None)
    assert all(torch.isfinite(row).all() and not same(row.detach(), before[name]) for name, row in token.rows.items())
