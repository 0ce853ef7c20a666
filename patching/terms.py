"""Attention terms: how a recipe feeds one attention site from several attentions, each over rows of its own.

What a recipe gives goes through the module's own projections at once: the terms' rows stand one after the other along
the token axis, so that each row is projected once and an attention costs queries x keys of its term only. All
conditionings of a model call are composed together: on a fast card a step costs what it launches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch

Tensor = torch.Tensor
# (q, k, v, the target's tokens that ask or None for all, the images of the batch) -> like q
Attention = Callable[[Tensor, Tensor, Tensor, Optional[Tensor], slice], Tensor]  # noqa: UP045  evaluated at import
EVERY = slice(None)  # image of the batch


class TargetRows(NamedTuple):
    """The rows that the target's Q, K and V are made of, [conditionings, B, tokens, channels] each: one tensor three
    times, unless an earlier recipe composed them.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionTerm(NamedTuple):
    """One attention, softmax(Q K^T / sqrt d) V, of all conditionings. Where the terms of a site meet in a token they
    are summed.

    q, k, v: rows of which Q, K and V are made, [conditionings, 1 or B, tokens, channels]. rows: the target's tokens
    that the result goes to, int64 [tokens of q] (None: all of them, in order). weight: of the result, [1 or B, tokens
    of q, 1] in q's type (None: 1). allowed: the keys that each image of the batch may attend to, int64 for each of 1 or
    B images (None: all; at least one must be). projected: what is made of Q, K and V before they attend, (q, k, v)
    [conditionings x B, tokens, heads x d] -> the same of any length (None: nothing).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None
    allowed: Sequence[Tensor] | None = None
    projected: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def is_plain(self) -> bool:
        return self.rows is self.weight is self.allowed is self.projected is None


class PackedTerm(NamedTuple):
    """A term after the projections: the lengths of its parts, and what becomes of its result."""

    queries: int
    keys: int
    rows: Tensor | None
    weight: Tensor | None
    allowed: Sequence[Tensor] | None
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
        """The attention of the target, [conditionings x B, tokens, channels], from packed q, k and v."""
        queries, keys = [term.queries for term in self.terms], [term.keys for term in self.terms]
        parts = zip(self.terms, q.split(queries, 1), k.split(keys, 1), v.split(keys, 1))
        results = [_of_term(term, own_q, own_k, own_v, attention) for term, own_q, own_k, own_v in parts]
        if len(results) == 1 and self.terms[0].rows is None:
            return results[0]
        out = q.new_zeros(q.shape[0], self.tokens, v.shape[-1])
        for term, result in zip(self.terms, results):
            if term.rows is None:
                out += result
            else:
                out.index_add_(1, term.rows, result)
        return out


def _of_term(term: PackedTerm, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    """The weighed result of one term, [conditionings x B, its tokens, channels]."""
    if term.projected is not None:
        q, k, v = term.projected(q, k, v)
    if term.allowed is None:
        result = attention(q, k, v, term.rows, EVERY)
    else:
        result = _attend_each(q, k, v, term.rows, term.allowed, attention)
    if term.weight is None:
        return result
    weighed = result.reshape(-1, len(term.weight), *result.shape[1:]) * term.weight
    return weighed.view(result.shape)


def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, allowed: Sequence[Tensor], attention: Attention
) -> Tensor:
    """Image by image, over its own keys: gathered, since a mask would need queries x keys of memory in some
    backends.
    """
    found = []
    for i in range(len(q)):
        image, keys = slice(i, i + 1), allowed[i % len(allowed)]
        own = k[image].index_select(1, keys), v[image].index_select(1, keys)
        found.append(attention(q[image], *own, rows, image))
    return torch.cat(found)


def pack(
    terms: Sequence[AttentionTerm], batch: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, PackedAttention | None]:
    """Rows for Q, K and V of what a recipe gave, [conditionings x B, tokens of all terms, channels] each, and how to
    take them apart; None where one plain term needs nothing.

    batch: images of a conditioning. tokens: of the target.
    """
    q, k = (_stacked([getattr(term, name) for term in terms], batch) for name in "qk")
    v = k if all(term.v is term.k for term in terms) else _stacked([term.v for term in terms], batch)
    if len(terms) == 1 and terms[0].is_plain:
        return q, k, v, None
    packed = [PackedTerm(term.q.shape[2], term.k.shape[2], *term[3:]) for term in terms]
    return q, k, v, PackedAttention(tuple(packed), tokens)


def _stacked(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Rows of the terms, one after the other: [conditionings x B, tokens of all terms, C]."""
    images = [part.expand(-1, batch, -1, -1) for part in parts]
    whole = images[0] if len(images) == 1 else torch.cat(images, 2)
    return whole.reshape(-1, *whole.shape[2:])
