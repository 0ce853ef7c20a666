"""What a model family is: the attention sites of a diffusion model, and how to get at them.

A family is one file with one subclass of ModelFamily, listed in FAMILIES; nothing else in this pack asks what kind of
model it works on.
"""

from .base import (
    ModelFamily,
    SelfAttention,
    SelfAttentionRows,
    Site,
    SiteHandler,
    TextAttention,
    TextBias,
)
from .families import family_of, parse_sites, require_unet, sites_of

__all__ = [
    "ModelFamily",
    "SelfAttention",
    "SelfAttentionRows",
    "Site",
    "SiteHandler",
    "TextAttention",
    "TextBias",
    "family_of",
    "parse_sites",
    "require_unet",
    "sites_of",
]
