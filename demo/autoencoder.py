"""The autoencoder: TAESD's structure, 8 times down to four channels, with ComfyUI's key names.

ComfyUI fixes TAESD at 64 channels. On a CPU that is too slow to train, so the network here may be slimmer;
`taesd_state` pads the missing channels and blocks with zeros, which changes no output.
"""

import re

import torch
from torch import Tensor, nn

LATENT = 4
FULL_WIDTH = 64
# Channels and residual blocks at 1/1, 1/2, 1/4 and 1/8 of the image.
FULL = {"widths": (64, 64, 64, 64), "encoder_blocks": (1, 3, 3, 3), "decoder_blocks": (1, 3, 3, 3)}
SLIM = {"widths": (16, 32, 48, 64), "encoder_blocks": (0, 1, 2, 2), "decoder_blocks": (1, 1, 2, 3)}


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        nn.init.zeros_(self.conv[4].weight)  # starts as the identity: converges far faster

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class Autoencoder(nn.Module):
    def __init__(self, widths, encoder_blocks, decoder_blocks):
        super().__init__()
        encoder = [_conv(3, widths[0]), *_blocks(widths[0], encoder_blocks[0], 1)]
        for level in (1, 2, 3):
            encoder += [
                _conv(widths[level - 1], widths[level], stride=2, bias=False),
                *_blocks(widths[level], encoder_blocks[level], 3),
            ]
        self.encoder = nn.Sequential(*encoder, _conv(widths[3], LATENT))
        decoder = [Squash(), _conv(LATENT, widths[3]), nn.ReLU()]
        for level in (3, 2, 1):
            decoder += [
                *_blocks(widths[level], decoder_blocks[level], 3),
                nn.Upsample(scale_factor=2),
                _conv(widths[level], widths[level - 1], bias=False),
            ]
        self.decoder = nn.Sequential(*decoder, *_blocks(widths[0], decoder_blocks[0], 1), _conv(widths[0], 3))
        nn.init.constant_(self.decoder[-1].bias, 0.5)

    def encode(self, image: Tensor) -> Tensor:
        """(n, 3, h, w) in [0, 1] -> (n, 4, h/8, w/8), about unit variance."""
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """(n, 4, h, w) -> (n, 3, 8h, 8w), about [0, 1]."""
        return self.decoder(latent)


def _conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    conv = nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _blocks(width: int, present: int, slots: int) -> list[nn.Module]:
    # A block whose weights are all zero is a ReLU.
    return [Block(width) for _ in range(present)] + [nn.ReLU() for _ in range(slots - present)]


def taesd_state(model: Autoencoder) -> dict[str, Tensor]:
    """The weights as ComfyUI's TAESD has them, 64 channels everywhere."""
    template = Autoencoder(**FULL).state_dict()
    state = {key: torch.zeros_like(value) for key, value in template.items()}
    for key, value in model.state_dict().items():
        state[key][tuple(slice(n) for n in value.shape)] = value.detach().cpu()
    return {_rename(key): value for key, value in state.items()}


def load_taesd(model: Autoencoder, state: dict[str, Tensor]) -> None:
    """Reads what `taesd_state` wrote into a model of the same or smaller widths."""
    model.load_state_dict(
        {key: state[_rename(key)][tuple(slice(n) for n in value.shape)] for key, value in model.state_dict().items()}
    )


def _rename(key: str) -> str:
    return re.sub(r"^(en|de)coder", r"taesd_\1coder", key)
