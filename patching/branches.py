"""Branches: how a recipe feeds one attention site from several attentions, each over rows of its own.

What a recipe gives goes through the module's own projections at once: the branches' rows stand one after the other
along the token axis, so that each row is projected once and an attention costs queries x keys of its branch only.
"""

from typing import Any, NamedTuple

import torch


class Branch(NamedTuple):
    """One attention, softmax(Q K^T / sqrt d) V, of one CFG half. Where the branches of a site meet in a token they are
    summed.

    q, k, v: the inputs of Q, K and V, rows of n: [1 or B, tokens, channels]. rows: the target's tokens that the result
    goes to, int64 [tokens of q] (None: all of them, in order). weight: of the result, [1 or B, tokens of q, 1] (None:
    1).
    allowed: the keys that each image of the batch may attend to, bool [1 or B, tokens of k] (None: all; at least one
    must be).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: Any = None
    weight: Any = None
    allowed: Any = None

    @property
    def plain(self):
        return self.rows is self.weight is self.allowed is None


class Piece(NamedTuple):
    """A branch after the projections: the lengths of its parts, and what becomes of its result, for all CFG halves."""

    queries: int
    keys: int
    rows: Any
    weight: Any
    allowed: Any


class Split(NamedTuple):
    """How to take a joined attention apart again. tokens: of the target."""

    pieces: tuple
    tokens: int

    @property
    def lengths(self):
        """Tokens of (q, k, v)."""
        keys = sum(piece.keys for piece in self.pieces)
        return sum(piece.queries for piece in self.pieces), keys, keys

    def attend(self, q, k, v, attention):
        """The attention of the target, [B, tokens, channels], from the joined q, k and v. attention: (q, k, v) -> like
        q.
        """
        out = q.new_zeros(q.shape[0], self.tokens, v.shape[-1])
        queries, keys = [piece.queries for piece in self.pieces], [piece.keys for piece in self.pieces]
        for piece, *parts in zip(self.pieces, q.split(queries, 1), k.split(keys, 1), v.split(keys, 1)):
            result = attention(*parts) if piece.allowed is None else _attend_each(*parts, piece.allowed, attention)
            if piece.weight is not None:
                result = result * piece.weight.to(result)
            if piece.rows is None:
                out += result
            else:
                out.index_add_(1, piece.rows, result)
        return out


def _attend_each(q, k, v, allowed, attention):
    """Image by image, over its own keys: gathered, since a mask would need queries x keys of memory in some
    backends.
    """
    return torch.cat(
        [attention(*(part[i : i + 1] for part in (q, k[:, rows], v[:, rows]))) for i, rows in enumerate(allowed)]
    )


def join(halves, batch, tokens):
    """The inputs of Q, K and V for what a recipe gave: (q, k, v, Split), the Split None where one plain branch needs
    none.

    halves: the branches of each CFG half, as many and of the same lengths in each. batch: images of a half.
    """

    def rows(name):
        parts = [[getattr(branch, name).expand(batch, -1, -1) for branch in branches] for branches in halves]
        return torch.cat([part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts])

    def whole(number, name):
        parts = [getattr(branches[number], name) for branches in halves]
        return None if parts[0] is None else torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])

    q, k = rows("q"), rows("k")
    v = k if all(branch.v is branch.k for branches in halves for branch in branches) else rows("v")
    first = halves[0]
    if len(first) == 1 and first[0].plain:
        return q, k, v, None
    pieces = [
        Piece(branch.q.shape[1], branch.k.shape[1], branch.rows, whole(number, "weight"), whole(number, "allowed"))
        for number, branch in enumerate(first)
    ]
    return q, k, v, Split(tuple(pieces), tokens)
