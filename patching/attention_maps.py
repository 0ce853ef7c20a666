"""Where a model looks for words: the cross-attention maps of a sampling run, while it samples and after it.

A TokenMap says what to measure; a RunningMap measures it, for one run. It takes part as an attn2_patch that changes
nothing and stands before every other, and computes the probabilities of the wanted tokens from the module's own
projections: whatever another pack puts in the attn2 slot stays in effect. Only the conditionings that carry the map's
prompt are measured (`marked`), each image of a batch by itself.
"""

from typing import NamedTuple

import torch

from .sites import Site, transformer_block

MARK = "montage_prompt"  # where a CONDITIONING says which text it was made of


class TokenMap(NamedTuple):
    """What to measure. words: str, the map's name. prompt: str, whose conditionings are measured. tokens: positions of
    the words on the token axis of that conditioning, tuple of int. sites: the cross-attentions to look at."""

    words: str
    prompt: str
    tokens: tuple
    sites: tuple


def marked(conditioning, prompt):
    """The CONDITIONING that a prompt was encoded to, saying so."""
    return [[embedding, {**settings, MARK: prompt}] for embedding, settings in conditioning]


class RunningMap:
    """A TokenMap in one run: the mean over heads, over the sites and over the steps so far (MCA-Ctrl and MasaCtrl take
    1/4 of the latent, Layout-and-Retouch says "decoder"), min-max normalised for each image.

    before: what recipes read while the model is evaluated, the map of the evaluations before this one (None in the
    first). What this one has found so far depends on which CFG half ComfyUI evaluates first, or whether both at once.
    """

    def __init__(self, wanted, model, conds):
        """conds: a guider's, {role: [conditioning]}."""
        self.wanted = wanted
        self.attentions = {site: transformer_block(model, site).attn2 for site in wanted.sites}
        self.lengths = {
            cond["uuid"]: cond["cross_attn"].shape[1]
            for group in conds.values()
            for cond in group
            if cond.get(MARK) == wanted.prompt
        }
        self.sums, self.count = {}, 0  # grid -> sum of maps [B, h, w]
        self.before = None
        if not self.lengths:
            raise ValueError(
                f'Token Attention Map: this sampler has no conditioning of the prompt "{wanted.prompt}". Connect the'
                " CONDITIONING of "
                f"Token Attention Map to the sampler's positive, through a ControlNet if there is one."
            )

    def begin(self):
        """A new evaluation."""
        self.before = self.read()

    def patch(self, n, context, value, extra):
        """The attn2_patch. n: [conds x B, tokens, channels], context: [conds x B, text tokens, features]."""
        site = Site(*extra["block"], extra["block_index"])
        if site in self.attentions:
            grid = tuple(extra["activations_shape"][-2:])
            uuids = extra["uuids"]
            for uuid, queries, keys in zip(uuids, n.chunk(len(uuids)), context.chunk(len(uuids))):
                if uuid in self.lengths:
                    self.add(
                        probability(self.attentions[site], queries, keys, self.wanted.tokens, self.lengths[uuid]), grid
                    )
        return n, context, value

    def add(self, found, grid):
        """Count one site in. found: [B, tokens]."""
        found = found.unflatten(1, grid)
        self.sums[grid] = self.sums[grid] + found if grid in self.sums else found
        self.count += 1

    def read(self):
        """The map so far, [B, h, w] in [0, 1] at the finest grid that was measured; None before the first site. A flat
        map is 0.
        """
        if not self.sums:
            return None
        finest = max(self.sums)
        total = sum(resized(found, finest) for found in self.sums.values()) / self.count
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        return (total - low) / torch.where(high > low, high - low, 1)


def probability(attention, n, context, tokens, length):
    """Softmax probability that cross-attention gives to some tokens together, mean over heads: [B, queries].

    attention: ComfyUI's CrossAttention. n: [B, queries, channels], context: [B, text tokens, features]. tokens:
    positions on a text axis of `length`, which ComfyUI may have repeated to batch prompts of different lengths: the
    copies count together.
    """
    q, k = (
        part.unflatten(2, (attention.heads, -1)).transpose(1, 2).float()
        for part in (attention.to_q(n), attention.to_k(context))
    )
    copies = [token + start for start in range(0, context.shape[1], length) for token in tokens]
    logits = q @ k.transpose(2, 3) * attention.dim_head**-0.5
    return (logits[..., copies].logsumexp(3) - logits.logsumexp(3)).exp().mean(1)


def resized(maps, grid):
    """Maps [B, h, w] at another grid, bilinear."""
    return (
        maps
        if tuple(maps.shape[1:]) == tuple(grid)
        else torch.nn.functional.interpolate(maps[:, None], size=tuple(grid), mode="bilinear")[:, 0]
    )
