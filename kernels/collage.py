"""Collage Diffusion (arXiv 2303.00262): layers on a canvas, who is seen where, and the bias on cross-attention.

Pictures are premultiplied RGBA [4, H, W] in [0, 1]: what is transparent has no colour, so nothing bleeds in when they
are resized.
"""

import math

import torch
import torch.nn.functional as F


def premultiplied(image, alpha):
    """image: [H, W, 3], alpha: [H, W], in [0, 1] -> [4, H, W]."""
    return torch.cat([image.movedim(-1, 0) * alpha, alpha[None]])


def trim(picture):
    """A picture without the rows and columns at its borders where all is transparent; None where nothing is left."""
    seen = picture[3] > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    if not len(rows):
        return None
    return picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place(picture, size, x, y, scale, rotation):
    """A picture on a canvas: scaled, rotated, and moved.

    picture: [4, h, w], premultiplied. size: (H, W) of the canvas. x, y: where the centre lies, in fractions of the
    canvas.
    scale: 1 is as large as the canvas contains it upright. rotation: degrees, clockwise. Returns [4, H, W].
    """
    (height, width), (h, w) = size, picture.shape[1:]
    factor = scale * min(height / h, width / w)  # canvas pixels for one of the picture's
    if factor < 1:  # sampling single points of a larger picture would skip others
        small = max(1, math.ceil(h * factor)), max(1, math.ceil(w * factor))
        picture = F.interpolate(picture[None], size=small, mode="bilinear", antialias=True)[0]
    turn = math.radians(rotation)
    # From the canvas to the picture: each canvas pixel's offset from the layer's centre, turned back.
    across = (torch.arange(width) + 0.5 - x * width)[None, :]
    down = (torch.arange(height) + 0.5 - y * height)[:, None]
    across, down = math.cos(turn) * across + math.sin(turn) * down, math.cos(turn) * down - math.sin(turn) * across
    grid = torch.stack([across / (w * factor / 2), down / (h * factor / 2)], -1)
    sampled = F.grid_sample(
        picture[None], grid[None].to(picture), mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    edge = [
        (side * factor / 2 - offset.abs() + 0.5).clamp(0, 1) for side, offset in ((w, across), (h, down))
    ]  # how much of a pixel it covers
    return sampled * (edge[0] * edge[1]).to(picture)


def over(layers, background):
    """Layers over a background (Porter and Duff 1984), and who is seen where.

    layers: [N, 4, H, W], premultiplied, back to front. background: [3, H, W].
    Returns the composite [3, H, W] and the visible masks [N, H, W], m_i = alpha_i prod_{k above i} (1 - alpha_k); with
    the background's, prod_k (1 - alpha_k), they sum to one.
    """
    above = torch.ones_like(background[0])  # how much is left to be seen through everything above
    composite, masks = torch.zeros_like(background), []
    for layer in layers.flip(0):
        composite = composite + above * layer[:3]
        masks.append(above * layer[3])
        above = above * (1 - layer[3])
    return composite + above * background, torch.stack(masks[::-1])


def noise_map(masks, noise, background_noise, blur):
    """Where a pixel begins to change, h in [0, 1]: free as soon as t <= 1000 h (paper, section 3.4).

    masks: visible masks [N, H, W]. noise: h of each layer, [N]. background_noise: h where no layer is. blur: standard
    deviation of the Gaussian over the map, in pixels of the canvas. A pixel in which a layer of noise 0 has the largest
    part keeps 0, whatever is beside it. Returns [H, W].
    """
    parts = torch.cat([masks, (1 - masks.sum(0)).clamp(min=0)[None]])
    levels = torch.tensor([*noise, background_noise]).to(masks)
    mixed = torch.einsum("nhw,n->hw", parts, levels).clamp(levels.min(), levels.max())
    return gaussian(mixed, blur).clamp(levels.min(), levels.max()) * (levels[parts.argmax(0)] > 0)


def gaussian(picture, sigma):
    """Gaussian blur of [H, W]; beyond its borders the picture goes on as it ends."""
    if sigma <= 0:
        return picture
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).to(picture) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(picture[None, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[0, 0]


# ---------------------------------------------------------------- cross-attention

GROWTH = {  # g(sigma): the bias is strong while the layout is made and fades with the noise
    "log log": lambda sigma: math.log(math.log(sigma + 1.01) + 1),  # the authors' default
    "log": lambda sigma: math.log(sigma + 1.01),  # their other; eDiff-I's is log(sigma + 1)
    "constant": lambda sigma: 1.0,
}


def owners(runs):
    """Which layers own which token: {position: (layer, ...)}.

    runs: {layer: [run, ...]}, where a layer's words stand in the prompt (patching.tokens.token_runs). A token belongs
    to the longest phrase around it: of "cat" and "red cat" the latter owns both words of a red cat, and the former
    other cats only, if there are any. Layers of the same words own them one each, in order, if they stand there as
    often; else together.
    """

    def length(position):
        return max(len(run) for found in runs.values() for run in found if position in run)

    owned = {}
    for layer, found in runs.items():
        alike = [other for other in runs if runs[other] == found]
        if len(alike) == len(found):
            found = [found[alike.index(layer)]]
        own = [run for run in found if all(length(position) == len(run) for position in run)]
        for position in {position for run in own or found for position in run}:
            owned[position] = (*owned.get(position, ()), layer)
    return dict(sorted(owned.items()))


def spatial_weights(masks, w_pos, w_neg, owned, grid):
    """w_pos A_pos - w_neg A_neg of the layers' own tokens (paper, eq. 3 and 4), [tokens, h w].

    masks: visible masks [N, H, W]. w_pos, w_neg: of each layer, [N]. owned: [(layer, ...)], who owns each token. grid:
    (h, w) of the attention. Where several layers own a token it is drawn to each and kept away from where none is seen.
    """
    masks = F.interpolate(masks[None], size=tuple(grid), mode="area")[0].flatten(1)
    rows = []
    for layers in owned:
        seen = masks[list(layers)]
        drawn = (seen * torch.tensor([w_pos[layer] for layer in layers]).to(seen)[:, None]).sum(0)
        rows.append(drawn - max(w_neg[layer] for layer in layers) * (1 - seen.sum(0)))
    return torch.stack(rows)


def maxima(q, k, heads):
    """M_j: the largest logit that each token has with any pixel in any head, for each sample; never below 0, where it
    would turn attraction into repulsion.

    q: [B, pixels, C], k: [B, tokens, C], C = heads * d; logits are q k^T / sqrt(d). Returns [B, tokens].
    """
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k * (k.shape[-1] // heads) ** -0.5))
    return (q @ k.transpose(2, 3)).amax((1, 2)).clamp(min=0)


def attention_bias(q, k, heads, columns, weights, gain):
    """What is added to the cross-attention's logits: S_pj += g(sigma) M_j (w_pos A_pos - w_neg A_neg)_pj (paper,
    section 3.2).

    q: [B, pixels, C], k: [B, K, C]. columns: [copies, tokens], where the layers' tokens stand among K, once for each
    copy of the prompt (ComfyUI repeats prompts of unequal length). weights: [tokens, pixels]. gain: g(sigma).
    Returns [B, 1, pixels, K] in q's type, 0 for all other tokens.
    """
    values = gain * maxima(q, k[:, columns[0]], heads)[:, None, None, :] * weights.T
    aligned = -k.shape[1] % 16  # attention kernels copy masks whose rows are not aligned
    bias = q.new_zeros(q.shape[0], 1, q.shape[1], k.shape[1] + aligned)[..., : k.shape[1]]
    for copy in columns:
        bias[..., copy] = values.to(bias)
    return bias


# ---------------------------------------------------------------- harmonisation


def free(noise, t, dilation):
    """Where the latent may change at time t (paper, section 3.4): at t <= h, and never where h is 0.

    noise: noise map h [B, 1, h, w]. t: in [0, 1], the model's time step / 1000. dilation: latent pixels by which what
    is not yet free is grown at t = 1, less the lower t is (the authors': 4). The freest places are free at every t: a
    run that begins later than they could loses nothing, and a map of one value is plain image-to-image. Returns [B, 1,
    h, w], 0 or 1.
    """
    locked = noise < min(t, float(noise.max())) - 1e-4  # equal up to rounding
    radius = int(dilation * t)
    if radius:
        locked = F.max_pool2d(locked.float(), 2 * radius + 1, stride=1, padding=radius) > 0
    return (~locked & (noise > 0)).float()


# ---------------------------------------------------------------- textual inversion


def masked_mean(errors, mask):
    """Mean over a mask: what is outside counts for nothing, and a small layer as much as a large one.

    errors: [B, C, h, w]. mask: [B, 1, h, w] in [0, 1], not 0 everywhere. Returns [B].
    """
    return (errors * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * errors.shape[1])
