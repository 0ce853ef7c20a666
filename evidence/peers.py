"""Other ways to the same end, written here for comparison alone: sharing of attention as in StyleAligned, and regional
prompting by masked cross-attention (attention couple).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher

from ..kernels import labels
from ..patching.install import install
from ..patching.models import parse_sites
from ..patching.recipe import Recipe, RunContext, Start, begin_on
from ..patching.schedule import Window
from ..patching.streams import Stream, streams_of
from ..patching.terms import AttentionTerm, TargetRows

Tensor = torch.Tensor


def adain(x: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """AdaIN (StyleAligned, section 4): x [B, tokens, C] with the mean and deviation that `style` has over its tokens,
    channel by channel.
    """
    (mean, deviation), (style_mean, style_deviation) = (
        (t.float().mean(1, keepdim=True), (t.float().var(1, correction=0, keepdim=True) + eps).sqrt())
        for t in (x, style)
    )
    return ((x.float() - mean) / deviation * style_deviation + style_mean).to(x)


class SharedAttention(Recipe):
    """StyleAligned (arXiv 2312.02133, section 4), region by region: the target's tokens attend to the target and to the
    whole image that their region is kept from, with Q and K brought to that image's statistics.
    """

    node = "Shared Attention"
    several_terms = True
    longer_keys = True

    def __init__(self, window: Window, stack: Sequence[Stream], owner: Tensor, base: int) -> None:
        """owner: [H, W] int64, whose image each place is kept from."""
        super().__init__(window)
        self.streams, self.owner, self.base = tuple(stack), owner, base

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        n, owner = target.q, labels.at_grid(self.owner, grid).flatten()
        terms = []
        for image, source in enumerate(sources):
            rows = (owner == image).nonzero()[:, 0].to(n.device)
            if not len(rows):
                continue
            given = source.expand(-1, n.shape[1], -1, -1)
            queries, keys = torch.cat([n[:, :, rows], given], 2), torch.cat([n, given], 2)
            terms.append(AttentionTerm(queries, keys, keys, rows, projected=aligned(len(rows), n.shape[2])))
        return terms

    def start(self, context: RunContext, start: Start) -> Start:
        """Begin where the base image was, as the composite does."""
        return Start(*begin_on(self.streams[self.base], self, context, start), start.sigmas)


def aligned(asking: int, tokens: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What becomes of projected Q, K and V whose first `asking` queries and `tokens` keys are the target's, and the
    others the reference's: the target's in the reference's statistics; the reference's own queries are left out.
    """

    def projected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = adain(k[:, :tokens], k[:, tokens:])
        return adain(q[:, :asking], q[:, asking:]), torch.cat([own, k[:, tokens:]], 1), v

    return projected


def share(latents: Sequence[dict], masks: Tensor, base: int, model: ModelPatcher) -> tuple[ModelPatcher, dict]:
    """(MODEL, LATENT) that sample the base's noise with attention shared as above. masks: [N, H, W]."""
    stack = streams_of(SharedAttention.node, latents)
    window = Window(0.0, 1.0, parse_sites(SharedAttention.node, model, "all"))
    run, row = stack[base]
    recipe = SharedAttention(window, stack, labels.from_masks(masks, base), base)
    return install(model, recipe), {"samples": run.latent_image[row : row + 1]}


def attention_couple(
    model: ModelPatcher, regions: Sequence[tuple[Tensor, Tensor]], whole: Tensor, size: tuple[int, int]
) -> ModelPatcher:
    """A UNet in which the tokens of each region attend to the words of that region alone, and the others to the whole
    prompt's, as the field's "attention couple" does.

    regions: (mask [H, W] in [0, 1], text features [1, L, D]); where they overlap, their results are averaged. whole:
    text features [1, L, D]. size: of the latent. The negative conditioning is left as it is.
    """
    masks = torch.stack([mask for mask, _ in regions])
    masks = torch.cat([masks, (masks.sum(0) == 0).float()[None]])
    words = [features for _, features in regions] + [whole]
    length = max(each.shape[1] for each in words)
    words = torch.cat([each.repeat(1, -(-length // each.shape[1]), 1)[:, :length] for each in words])

    def weights(tokens: int) -> Tensor:
        """[regions, tokens, 1], of sum 1 for each token."""
        scale = (size[0] * size[1] / tokens) ** 0.5
        grid = round(size[0] / scale), round(size[1] / scale)
        shares = F.interpolate(masks[:, None], size=grid, mode="area").flatten(1)[..., None]
        return shares / shares.sum(0)

    def positive(extra: dict, batch: int) -> list[bool]:
        roles = extra["cond_or_uncond"]
        return [role == 0 for role in roles for _ in range(batch // len(roles))]

    def couple(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Each positive row once for each region, with that region's words."""
        queries, context = [], []
        for row, is_positive in enumerate(positive(extra, len(q))):
            copies = len(words) if is_positive else 1
            queries.append(q[row : row + 1].expand(copies, -1, -1))
            if is_positive:
                context.append(words.to(k))
            else:
                context.append(k[row : row + 1].repeat(1, -(-length // k.shape[1]), 1)[:, :length])
        keys = torch.cat(context)
        return torch.cat(queries), keys, keys

    def merge(out: Tensor, extra: dict) -> Tensor:
        """The regions' results, each where its region is."""
        roles, merged, first = extra["cond_or_uncond"], [], 0
        images = len(out) // sum(len(words) if role == 0 else 1 for role in roles)
        for role in roles:
            for _ in range(images):
                copies = len(words) if role == 0 else 1
                part = out[first : first + copies]
                merged.append((part * weights(out.shape[1]).to(out)).sum(0, keepdim=True) if copies > 1 else part)
                first += copies
        return torch.cat(merged)

    patched = model.clone()
    patched.set_model_attn2_patch(couple)
    patched.set_model_attn2_output_patch(merge)
    return patched
