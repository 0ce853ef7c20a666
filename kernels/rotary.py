"""Rotary positions (RoPE): pairs of a head's channels turned by an angle that grows with a token's place."""

import torch


def turned(rows: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rows whose pairs of channels are turned further. Turning by a and then by b is turning by a + b, so that a key of
    one place becomes that of another.

    rows: [B, tokens, heads x d]. angles: radians for each pair of a head, [1 or B, d / 2]. interleaved: whether a pair
    is two neighbouring channels; else channel i and i + d / 2. Returns [B, tokens, heads x d] in the rows' type, B the
    larger of the two.
    """
    cosine, sine = (
        part.float()[:, None, None].to(rows.device, non_blocking=True) for part in (angles.cos(), angles.sin())
    )
    pairs = angles.shape[-1]
    axis = -1 if interleaved else -2
    first, second = rows.float().unflatten(-1, (-1, pairs, 2) if interleaved else (-1, 2, pairs)).unbind(axis)
    done = torch.stack([cosine * first - sine * second, sine * first + cosine * second], axis)
    return done.flatten(-3).to(rows.dtype)
