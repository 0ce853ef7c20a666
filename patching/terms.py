"""Attention terms: how a recipe feeds one attention site from several attentions, each over rows of its own.

What a recipe gives goes through the module's own projections at once: the terms' rows stand one after the other along
the token axis, so that each row is projected once and an attention costs queries x keys of its term only.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Optional

import torch

Tensor = torch.Tensor
# (q, k, v, the target's tokens that ask or None for all, the images of the batch) -> like q
Attention = Callable[[Tensor, Tensor, Tensor, Optional[Tensor], slice], Tensor]  # noqa: UP045  evaluated at import
EVERY = slice(None)  # image of the batch


class TargetRows(NamedTuple):
    """The rows that the target's Q, K and V are made of, [B, tokens, channels] each: one tensor three times, unless an
    earlier recipe composed them.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionTerm(NamedTuple):
    """One attention, softmax(Q K^T / sqrt d) V, of one conditioning. Where the terms of a site meet in a token they are
    summed.

    q, k, v: rows of which Q, K and V are made, [1 or B, tokens, channels]. rows: the target's tokens that the result
    goes to, int64 [tokens of q] (None: all of them, in order). weight: of the result, [1 or B, tokens of q, 1] (None:
    1). allowed: the keys that each image of the batch may attend to, bool [1 or B, tokens of k] (None: all; at least
    one must be). projected: what is made of Q, K and V before they attend, (q, k, v) [B, tokens, heads x d] -> the same
    of any length (None: nothing); the same in every conditioning.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None
    allowed: Tensor | None = None
    projected: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def is_plain(self) -> bool:
        return self.rows is self.weight is self.allowed is self.projected is None


class PackedTerm(NamedTuple):
    """A term after the projections: the lengths of its parts, and what becomes of its result, for all conditionings."""

    queries: int
    keys: int
    rows: Tensor | None
    weight: Tensor | None
    allowed: Tensor | None
    projected: Callable | None


class PackedAttention(NamedTuple):
    """How to take packed rows apart again. tokens: of the target."""

    terms: tuple[PackedTerm, ...]
    tokens: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of (q, k, v)."""
        keys = sum(term.keys for term in self.terms)
        return sum(term.queries for term in self.terms), keys, keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """The attention of the target, [B, tokens, channels], from packed q, k and v."""
        out = q.new_zeros(q.shape[0], self.tokens, v.shape[-1])
        queries, keys = [term.queries for term in self.terms], [term.keys for term in self.terms]
        parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1))
        for term, (own_q, own_k, own_v) in zip(self.terms, parts):
            if term.projected is not None:
                own_q, own_k, own_v = term.projected(own_q, own_k, own_v)
            if term.allowed is None:
                result = attention(own_q, own_k, own_v, term.rows, EVERY)
            else:
                result = _attend_each(own_q, own_k, own_v, term.rows, term.allowed, attention)
            if term.weight is not None:
                result = result * term.weight.to(result)
            if term.rows is None:
                out += result
            else:
                out.index_add_(1, term.rows, result)
        return out


def _attend_each(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, allowed: Tensor, attention: Attention) -> Tensor:
    """Image by image, over its own keys: gathered, since a mask would need queries x keys of memory in some
    backends.
    """
    found = []
    for i, keys in enumerate(allowed):
        image = slice(i, i + 1)
        found.append(attention(q[image], k[image, keys], v[image, keys], rows, image))
    return torch.cat(found)


def pack(
    terms: Sequence[Sequence[AttentionTerm]], batch: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, PackedAttention | None]:
    """Rows for Q, K and V of what a recipe gave, and how to take them apart; None where one plain term needs nothing.

    terms: of each conditioning, as many and of the same lengths in each. batch: images of a conditioning. tokens: of
    the target.
    """
    every = [term for of_cond in terms for term in of_cond]
    q, k = (_stacked(([getattr(term, name) for term in of_cond] for of_cond in terms), batch) for name in "qk")
    v = k if all(term.v is term.k for term in every) else _stacked(([t.v for t in c] for c in terms), batch)
    first = terms[0]
    if len(first) == 1 and first[0].is_plain:
        return q, k, v, None

    def for_all(number: int, name: str) -> Tensor | None:
        parts = [getattr(of_cond[number], name) for of_cond in terms]
        return None if parts[0] is None else torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])

    packed = [
        PackedTerm(
            term.q.shape[1],
            term.k.shape[1],
            term.rows,
            for_all(number, "weight"),
            for_all(number, "allowed"),
            term.projected,
        )
        for number, term in enumerate(first)
    ]
    return q, k, v, PackedAttention(tuple(packed), tokens)


def _stacked(rows: Iterable[Sequence[Tensor]], batch: int) -> Tensor:
    """Rows of the terms of each conditioning, one after the other: [conditionings x B, tokens of all terms, C]."""
    parts = [[part.expand(batch, -1, -1) for part in of_cond] for of_cond in rows]
    return torch.cat([part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts])
