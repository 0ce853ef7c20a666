"""The interface between the engine and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ..terms import PackedAttention, TargetRows
from .masks import MaskCheck


class Site(NamedTuple):
    """One attention of the diffusion model: where a recipe may act."""

    block: str  # the kind of block: "input", "middle" or "output" of a UNet, "double" or "single" of a transformer
    number: int  # of the block among its kind, as ComfyUI counts them
    index: int  # of the attention inside it


class SelfAttention(NamedTuple):
    """The attention among the image tokens of a site, before it is computed, for the conditionings of a model call.

    rows: [conditionings x B, tokens, C]: what Q, K and V are made of, row by row. A UNet's are the input n = norm1(x)
    of all three; a transformer's are Q, K and V themselves, after RoPE, packed one after the other. grid: (h, w) of the
    tokens. latent_size: (h, w) of the latent that the model is run on.
    """

    site: Site
    uuids: Sequence[Any]
    rows: torch.Tensor
    grid: tuple[int, int]
    latent_size: tuple[int, int]


class SelfAttentionRows(NamedTuple):
    """What the engine wants computed instead: rows for Q, K and V, [conditionings x B, any, C].

    packed: how to attend where that takes more than one attention (None: plainly). own: with packed rows, the target's
    own as they were before these, for the text that attends to the image (None: as the model made them). beside:
    further images that each conditioning holds after its B, of which nothing is changed.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    packed: PackedAttention | None = None
    own: TargetRows | None = None
    beside: int = 0


class TextAttention(NamedTuple):
    """The attention of a site's image tokens to the text, after the projections.

    q: [conditionings x B, tokens, heads x d], k: [conditionings x B, text tokens, heads x d]. images: rows that the
    model was given, of all conditionings.
    """

    site: Site
    uuids: Sequence[Any]
    q: torch.Tensor
    k: torch.Tensor
    heads: int
    images: int
    grid: tuple[int, int]
    latent_size: tuple[int, int]


class TextBias(NamedTuple):
    """What is added to the logits of an attention to the text. whole: [conditionings x B, 1, tokens, text tokens].
    acts: of each conditioning, whether any of it is not 0.
    """

    whole: torch.Tensor
    acts: Sequence[bool]

    def parts(self) -> list[torch.Tensor | None]:
        """Of each conditioning, [B, 1, tokens, text tokens]; None where it does not act."""
        return [part if acts else None for part, acts in zip(self.whole.chunk(len(self.acts)), self.acts)]


class SiteHandler:
    """What happens at the attentions of one model evaluation. A family calls it at the sites that it lists; a subclass
    has the methods that it lists sites for.
    """

    self_attention_sites: frozenset[Site] = frozenset()  # where self_attention is to be called, at least; none: nowhere
    packed_sites: frozenset[Site] = frozenset()  # where self_attention may return packed rows
    measured_sites: frozenset[Site] = frozenset()  # where text_attention is to be called
    biased_sites: frozenset[Site] = frozenset()  # where bias is to be called

    def self_attention(self, attention: SelfAttention) -> SelfAttentionRows | None:
        """Rows to compute with instead, or None to leave the attention as it is."""
        raise NotImplementedError

    def text_attention(self, attention: TextAttention) -> None:
        """Look at an attention."""
        raise NotImplementedError

    def bias(self, attention: TextAttention) -> TextBias | None:
        """What is added to the logits, or None."""
        raise NotImplementedError

    def wrong_result(self, site: Site, got: tuple[int, ...], queries: tuple[int, ...]) -> ValueError:
        """The error for another node's attention that returns another shape than that of its queries."""
        raise NotImplementedError

    def wrong_rows(self, site: Site, got: tuple[int, ...], wanted: tuple[int, ...]) -> ValueError:
        """The error for another node that changes the number of tokens after they were composed."""
        raise NotImplementedError

    def wrong_tokens(self, site: Site, got: tuple[int, ...], wanted: str) -> ValueError:
        """The error for an attention that is not over the tokens that the model makes of its latent."""
        raise NotImplementedError

    def skipped(self, blocks: Sequence[Site]) -> RuntimeError:
        """The error for a network in which blocks were left out, or run more than once."""
        raise NotImplementedError

    def references(self, title: str) -> ValueError:
        """The error for reference images whose tokens cannot be told from the picture's own."""
        raise NotImplementedError


class ModelFamily(ABC):
    """A kind of diffusion model. Made anew for each question: it holds the MODEL's network and nothing else.

    lockstep: whether streams are by default evaluated as further images of the target's own batch, which holds nothing,
    instead of being replayed before it, which is exact to the bit. is_unet: whether it has levels, maps [B, C, h, w] of
    features, and is small enough to be trained through. has_positions: whether keys say where their token stands, so
    that queries look at their own place in another image too.
    """

    lockstep = False
    is_unet = False
    has_positions = False

    def __init__(self, model: ModelPatcher, network: torch.nn.Module) -> None:
        self.model, self.network = model, network
        self.masks = MaskCheck()

    @classmethod
    @abstractmethod
    def owns(cls, network: torch.nn.Module) -> bool:
        """Whether a diffusion model is of this family."""

    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Every attention site, in the order of execution."""

    @property
    def text_sites(self) -> frozenset[Site]:
        """The sites whose image tokens attend to text."""
        return frozenset(self.sites())

    @property
    def most_text_tokens(self) -> int | None:
        """How many of a conditioning's tokens the model reads; None: all."""
        return None

    def own_text(self, tokens: int, length: int) -> tuple[slice, int]:
        """Which of the text's rows in an attention are those of a conditioning's tokens, and how many rows one copy of
        it takes: ComfyUI repeats texts to batch them. tokens: of the conditioning. length: rows of the text.
        """
        return slice(0, length), tokens

    @abstractmethod
    def parse_sites(self, text: str) -> tuple[Site, ...]:
        """The sites that a text names, in the order of execution. Raises ValueError that lists what the model has."""

    @abstractmethod
    def hooked(self, options: dict, handler: SiteHandler) -> dict:
        """Model options (of which this may change the copy it was given) whose attentions go through the handler."""

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of a latent, of families that have one grid for all sites."""
        raise NotImplementedError

    def moved(self, rows: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Rows, [1 or B, tokens, C], whose keys say that their tokens stand elsewhere; the same rows where keys say
        nothing of places. shifts: (down, right) in tokens, [1 or B, 2].
        """
        return rows

    @abstractmethod
    def cut_site(self) -> Site:
        """The site whose features serve the graph cut."""

    @abstractmethod
    def cut_features(self, rows: torch.Tensor) -> torch.Tensor:
        """The graph cut's features of rows at that site, [B, tokens, channels]."""
