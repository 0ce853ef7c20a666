"""Which features of the demo transformer tell where objects end: the choice of DiT.cut_features.

python dev.py benchmark edges

Scenes whose objects are known are encoded and shown to the transformer nearly without noise. For each feature: the area
under the ROC curve of the distance between neighbouring tokens, as a sign that they belong to different objects.
"""

import comfy.samplers
import numpy as np
import torch

from ...demo import scenes
from ...workshop.random_models import demo_transformer

SCENES, SEED, SIGMA, GRID = 48, 5, 0.06, (8, 8)
WIDTH = 192  # of the network
TOKENS = GRID[0] * GRID[1]


def watched(network, kept: dict[str, torch.Tensor]) -> list:
    """Hooks that keep the image's K before RoPE and V of every block, [images, tokens, channels]."""

    def keep(name, part):
        return lambda module, args, out: kept.__setitem__(name, part(out).detach()[:, -TOKENS:].float())

    def keys(out):
        return out[1].transpose(1, 2).flatten(2)

    hooks = []
    for number, block in enumerate(network.double_blocks):
        values = keep(f"double{number} V", lambda out: out[..., 2 * WIDTH : 3 * WIDTH])
        hooks.append(block.img_attn.qkv.register_forward_hook(values))
        hooks.append(block.img_attn.norm.register_forward_hook(keep(f"double{number} K before RoPE", keys)))
    for number, block in enumerate(network.single_blocks):
        values = keep(f"single{number} V", lambda out: out[..., 2 * WIDTH : 3 * WIDTH])
        hooks.append(block.linear1.register_forward_hook(values))
        hooks.append(block.norm.register_forward_hook(keep(f"single{number} K before RoPE", keys)))
    return hooks


def neighbours(grid: torch.Tensor, distance) -> np.ndarray:
    """distance(a, b) of all tokens of a grid [images, h, w, ...] with those to their right and below."""
    pairs = (grid[:, 1:], grid[:, :-1]), (grid[:, :, 1:], grid[:, :, :-1])
    return np.concatenate([distance(a, b).flatten().numpy() for a, b in pairs])


def area_under_curve(values: np.ndarray, positive: np.ndarray) -> float:
    ranks = values.argsort().argsort() + 1
    count, others = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def main() -> None:
    model, clip, vae = demo_transformer()
    scene = scenes.sample(SCENES, torch.Generator().manual_seed(SEED), count=2)
    latent = vae.encode(scenes.render(scene, 128).movedim(1, -1))
    shares = torch.nn.functional.adaptive_avg_pool2d(scenes.masks(scene, 128), GRID)
    owner = torch.where(shares.amax(1) > 0.5, shares.argmax(1) + 1, 0)
    is_edge = neighbours(owner, torch.ne)
    kept: dict[str, torch.Tensor] = {}
    hooks = watched(model.model.diffusion_model, kept)
    guider = comfy.samplers.CFGGuider(model)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    guider.set_conds(empty, empty)
    guider.set_cfg(1.0)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
    guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), torch.tensor([SIGMA, 0.0]), disable_pbar=True)
    for hook in hooks:
        hook.remove()
    print("| feature | AUC |\n| --- | --- |")
    for name, features in sorted(kept.items()):
        found = neighbours(features.unflatten(1, GRID), lambda a, b: (a - b).norm(dim=-1))
        print(f"| {name} | {area_under_curve(found, is_edge):.3f} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
