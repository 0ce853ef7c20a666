"""The denoising network, its text encoder and its ControlNet in plain torch, with ComfyUI's key names.

The structure is SD1.x's at a fifth of its width: `demo-model.safetensors` runs in ComfyUI's own classes,
and a test holds the two to the same output. Training then needs torch alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CONTEXT, HEADS, TOKENS = 64, 64, 4, 77
MULTIPLIERS = (1, 1, 2, 2)  # channels at latent, 1/2, 1/4, 1/8 resolution
ATTENTION = (True, True, True, False)
RES_BLOCKS = 2
TIMESTEPS = 1000


def alphas_bar() -> Tensor:
    """(1000,) SD1.x's noise schedule: the share of the image's variance left at each timestep."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """(n, tokens, channels) each -> (n, tokens of q, channels), over HEADS heads."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    if q.is_cpu and q.dtype == torch.bfloat16 and not causal:  # there PyTorch's fused attention is slow backwards
        return (((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class GroupNorm(nn.GroupNorm):
    """In single precision, for accuracy and because PyTorch's CPU kernel for bfloat16 is slow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _conv(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1)


class ResBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(32, n_in), nn.SiLU(), _conv(n_in, n_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTH, n_out))
        self.out_layers = nn.Sequential(GroupNorm(32, n_out), nn.SiLU(), nn.Identity(), _zero(_conv(n_out, n_out)))
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, channels: int, context: int):
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1, self.attn2 = Attention(channels, channels), Attention(channels, CONTEXT)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels)])
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (n, hw, c)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = _conv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor, size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def _run(block: nn.ModuleList, x: Tensor, time: Tensor, context: Tensor, size=None) -> Tensor:
    for layer in block:
        if isinstance(layer, ResBlock):
            x = layer(x, time)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x)
    return x


class Encoder(nn.Module):
    """The half that UNet and ControlNet share: time embedding, input blocks, middle block."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.input_blocks = nn.ModuleList([nn.ModuleList([_conv(4, WIDTH)])])
        self.skips = [channels := WIDTH]
        for level, multiplier in enumerate(MULTIPLIERS):
            for _ in range(RES_BLOCKS):
                layers = [ResBlock(channels, multiplier * WIDTH)]
                channels = multiplier * WIDTH
                if ATTENTION[level]:
                    layers.append(SpatialTransformer(channels))
                self.input_blocks.append(nn.ModuleList(layers))
                self.skips.append(channels)
            if level < len(MULTIPLIERS) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                self.skips.append(channels)
        self.middle_block = nn.ModuleList(
            [ResBlock(channels, channels), SpatialTransformer(channels), ResBlock(channels, channels)]
        )

    def embed_time(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, device=t.device) / (WIDTH // 2))
        angles = t[:, None] * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))


class UNet(Encoder):
    def __init__(self):
        super().__init__()
        skips, channels = list(self.skips), self.skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(MULTIPLIERS))):
            for i in range(RES_BLOCKS + 1):
                layers = [ResBlock(channels + skips.pop(), MULTIPLIERS[level] * WIDTH)]
                channels = MULTIPLIERS[level] * WIDTH
                if ATTENTION[level]:
                    layers.append(SpatialTransformer(channels))
                if level and i == RES_BLOCKS:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(GroupNorm(32, channels), nn.SiLU(), _zero(_conv(channels, 4)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: list[Tensor] | None = None) -> Tensor:
        """x (n, 4, h, w), t (n,) in 0..999, context (n, 77, 64), control as ControlNet returns it -> v."""
        time, skips = self.embed_time(t), []
        for block in self.input_blocks:
            x = _run(block, x, time, context)
            skips.append(x)
        x = _run(self.middle_block, x, time, context)
        if control is not None:
            x, skips = x + control[-1], [skip + extra for skip, extra in zip(skips, control)]
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            x = _run(block, x, time, context, skips[-1].shape[2:] if skips else None)
        return self.out(x)


class ControlNet(Encoder):
    """A trainable copy of the UNet's encoder that reads a hint picture and adds to the UNet's skips."""

    def __init__(self):
        super().__init__()
        channels, strides = (3, 16, 16, 32, 32, 96, 96, 256), (1, 1, 2, 1, 2, 1, 2)
        hint = []
        for n_in, n_out, stride in zip(channels, channels[1:], strides):
            hint += [_conv(n_in, n_out, stride), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*hint, _zero(_conv(channels[-1], WIDTH)))
        self.zero_convs = nn.ModuleList([nn.Sequential(_zero(nn.Conv2d(c, c, 1))) for c in self.skips])
        self.middle_block_out = nn.Sequential(_zero(nn.Conv2d(self.skips[-1], self.skips[-1], 1)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """hint (n, 3, 8h, 8w) in [0, 1] -> one tensor for each skip of the UNet and one for its middle."""
        time, control = self.embed_time(t), []
        for i, (block, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs)):
            x = _run(block, x, time, context)
            if i == 0:
                x = x + self.input_hint_block(hint)
            control.append(zero_conv(x))
        return [*control, self.middle_block_out(_run(self.middle_block, x, time, context))]


class TextLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(CONTEXT), nn.LayerNorm(CONTEXT)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(CONTEXT, CONTEXT) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(CONTEXT, 4 * CONTEXT), "fc2": nn.Linear(4 * CONTEXT, CONTEXT)})

    def forward(self, x: Tensor) -> Tensor:
        n = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](n) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](attend(q, k, v, causal=True))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))  # quick GELU


class TextEncoder(nn.Module):
    """CLIP's text tower over the few words that captions use."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_model = model = nn.Module()
        model.embeddings = nn.ModuleDict(
            {"token_embedding": nn.Embedding(vocabulary, CONTEXT), "position_embedding": nn.Embedding(TOKENS, CONTEXT)}
        )
        model.encoder = nn.ModuleDict({"layers": nn.ModuleList([TextLayer() for _ in range(2)])})
        model.final_layer_norm = nn.LayerNorm(CONTEXT)
        self.text_projection = nn.Linear(CONTEXT, CONTEXT, bias=False)  # ComfyUI reads it; nothing uses it
        nn.init.normal_(model.embeddings["token_embedding"].weight, std=0.3)
        nn.init.normal_(model.embeddings["position_embedding"].weight, std=0.05)
        nn.init.eye_(self.text_projection.weight).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, up to 77) rows of the vocabulary -> (n, as many, 64)."""
        return self.encode(self.text_model.embeddings["token_embedding"](ids))

    def encode(self, embedded: Tensor) -> Tensor:
        """(n, up to 77, 64) token embeddings, a learned one among them -> (n, as many, 64)."""
        x = embedded + self.text_model.embeddings["position_embedding"].weight[: embedded.shape[1]]
        for layer in self.text_model.encoder["layers"]:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
