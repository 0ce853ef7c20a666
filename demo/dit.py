"""The demo's diffusion transformer in plain torch, with ComfyUI's key names (comfy.ldm.flux.model.Flux).

Flux's structure at a sixteenth of its width: double blocks in which image and text tokens keep weights of their own
and meet in the attention, then single blocks over both. Tokens are patches of 2x2 latent pixels. It learns rectified
flow: x = (1 - sigma) image + sigma noise, and predicts the velocity noise - image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion import CONTEXT

HIDDEN, HEADS, DOUBLE, SINGLE, PATCH = 192, 3, 2, 4, 2
AXES = (16, 24, 24)  # of a head's 64 channels, how many each of a position's three numbers turns: (unused, y, x)
THETA = 10_000
CHANNELS = 4  # of a latent
MLP = 4 * HIDDEN
WORDS = 24  # text tokens it reads, of CLIP's 77: captions of three objects have 22 at most
TIME_CHANNELS = 256


def rotations(height: int, width: int, words: int) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines, (words + h * w, 32) each. Text tokens stand at 0, image tokens at (0, y, x)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)
    positions = torch.cat([torch.zeros(words, 3, dtype=image.dtype), image]).double()
    angles = torch.cat(
        [
            positions[:, axis, None] / THETA ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            for axis, size in enumerate(AXES)
        ],
        1,
    )
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(n, heads, tokens, 64): neighbouring channels turned as pairs."""
    cos, sin = (part.to(x.dtype) for part in turn)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(n, heads, tokens, 64) each -> (n, tokens, HIDDEN)."""
    q, k = rotate(q, turn), rotate(k, turn)
    if q.is_cpu and q.dtype == torch.bfloat16:  # there PyTorch's fused attention is slow backwards
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):
    """In single precision, whatever the tokens are in."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(HIDDEN // HEADS), RMSNorm(HIDDEN // HEADS)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, tokens, 3 * HIDDEN) -> queries, keys, values, (n, HEADS, tokens, 64) each."""
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), QKNorm(), nn.Linear(HIDDEN, HIDDEN)


class Modulation(nn.Module):
    """What the time says: shift, scale and gate of a layer's tokens, all 0 before the training."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts, self.lin = parts, nn.Linear(HIDDEN, parts * HIDDEN)
        nn.init.zeros_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """(n, HIDDEN) -> `parts` tensors (n, 1, HIDDEN)."""
        return self.lin(F.silu(time))[:, None].chunk(self.parts, -1)


class DoubleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        for stream in ("img", "txt"):
            mlp = nn.Sequential(nn.Linear(HIDDEN, MLP), nn.GELU(approximate="tanh"), nn.Linear(MLP, HIDDEN))
            self.add_module(f"{stream}_mod", Modulation(6))
            self.add_module(f"{stream}_attn", SelfAttention())
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, time: Tensor, turn) -> tuple[Tensor, Tensor]:
        """img (n, h * w, HIDDEN), txt (n, words, HIDDEN), time (n, HIDDEN) -> img, txt."""
        of_img, of_txt = self.img_mod(time), self.txt_mod(time)
        i = self.img_attn.norm.split(self.img_attn.qkv(normed(img) * (1 + of_img[1]) + of_img[0]))
        t = self.txt_attn.norm.split(self.txt_attn.qkv(normed(txt) * (1 + of_txt[1]) + of_txt[0]))
        out = attend(*(torch.cat(pair, 2) for pair in zip(t, i)), turn)
        words = txt.shape[1]
        img = img + of_img[2] * self.img_attn.proj(out[:, words:])
        img = img + of_img[5] * self.img_mlp(normed(img) * (1 + of_img[4]) + of_img[3])
        txt = txt + of_txt[2] * self.txt_attn.proj(out[:, :words])
        txt = txt + of_txt[5] * self.txt_mlp(normed(txt) * (1 + of_txt[4]) + of_txt[3])
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(HIDDEN, 3 * HIDDEN + MLP)
        self.linear2 = nn.Linear(HIDDEN + MLP, HIDDEN)
        self.norm, self.modulation = QKNorm(), Modulation(3)

    def forward(self, x: Tensor, time: Tensor, turn) -> Tensor:
        """x (n, words + h * w, HIDDEN), time (n, HIDDEN) -> x."""
        shift, scale, gate = self.modulation(time)
        qkv, mlp = self.linear1(normed(x) * (1 + scale) + shift).split([3 * HIDDEN, MLP], -1)
        out = attend(*self.norm.split(qkv), turn)
        return x + gate * self.linear2(torch.cat([out, F.gelu(mlp, approximate="tanh")], -1))


class TimeEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(TIME_CHANNELS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, sigma: Tensor) -> Tensor:
        """(n,) in [0, 1] -> (n, HIDDEN)."""
        half = TIME_CHANNELS // 2
        angles = 1000 * sigma[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device) / half)
        return self.out_layer(F.silu(self.in_layer(torch.cat([angles.cos(), angles.sin()], 1))))


class LastLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, CHANNELS * PATCH**2)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 2 * HIDDEN))
        for layer in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, -1)
        return self.linear(normed(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(CHANNELS * PATCH**2, HIDDEN), nn.Linear(CONTEXT, HIDDEN)
        self.time_in = TimeEmbedding()
        self.double_blocks = nn.ModuleList([DoubleBlock() for _ in range(DOUBLE)])
        self.single_blocks = nn.ModuleList([SingleBlock() for _ in range(SINGLE)])
        self.final_layer = LastLayer()

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, 4, h, w) of even h and w, sigma (n,) in [0, 1], context (n, words, 64)
        -> velocity (n, 4, h, w), and the image tokens after half of the single blocks (n, HIDDEN, h / 2, w / 2).
        """
        patches = F.pixel_unshuffle(x, PATCH)
        height, width = patches.shape[2:]
        img, txt = self.img_in(patches.flatten(2).transpose(1, 2)), self.txt_in(context)
        words, time = txt.shape[1], self.time_in(sigma)
        turn = tuple(part.to(x.device) for part in rotations(height, width, words))
        for block in self.double_blocks:
            img, txt = block(img, txt, time, turn)
        tokens = torch.cat([txt, img], 1)
        for number, block in enumerate(self.single_blocks):
            if number == SINGLE // 2:
                features = tokens[:, words:]
            tokens = block(tokens, time, turn)
        velocity = self.final_layer(tokens[:, words:], time)
        velocity, features = (rows.transpose(1, 2).unflatten(2, (height, width)) for rows in (velocity, features))
        return F.pixel_shuffle(velocity, PATCH), features
