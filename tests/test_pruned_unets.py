"""UNets without attention in the middle (SSD-1B, Vega, KOALA, SDXS): every default of every node works on them."""

import pytest
import torch

from montage.methods.mca_ctrl import LATE, PRESETS
from montage.nodes.layout_retouch import MultiSourceSwap, TokenAttentionMap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.patching.models import parse_sites, sites_of
from montage.workshop.random_models import random_model
from montage.workshop.sampling import MIXED, close, compose, masks_of, record, sample, words

PRUNED = ["ssd-1b-small", "koala-small", "sdxs-small"]
pruned = pytest.mark.parametrize("name", PRUNED)


def default_of(node: type, name: str) -> str:
    return next(entry.default for entry in node.define_schema().inputs if entry.id == name)


@pruned
def test_every_default_names_sites(name):
    model = random_model(name)
    assert not any(site.block == "middle" for site in sites_of(model))
    texts = [default_of(MultiSourceSwap, "sites"), default_of(TokenAttentionMap, "sites"), LATE]
    for text in [*texts, "all", "encoder", "decoder", *(preset.salq_sites for preset in PRESETS.values())]:
        assert parse_sites("test", model, text), text
    assert parse_sites("test", model, "d,m,u") == parse_sites("test", model, "all") == sites_of(model)
    for text in ("middle", "m", "m0"):
        with pytest.raises(ValueError, match="no attention there|no m0"):
            parse_sites("test", model, text)


def test_attention_to_text_in_the_place_of_self_attention_is_no_site():
    """The first level of SDXS has no self-attention: its attn1 looks at the text."""
    sites = sites_of(random_model("sdxs-small"))
    assert len(sites) == 6 and ("input", 1, 0) not in sites


@pruned
def test_compose_and_swap_on_them(name):
    model, size = random_model(name), {"size": (8, 8)}
    a, b = (
        record(seed=seed, model=model, steps=2, positive=words(seed, name=name), negative=words(9, name=name))
        for seed in (1, 2)
    )
    settings = {"positive": words(1, name=name), "negative": words(9, name=name), "steps": 2}
    close(compose([a, b], masks_of(torch.zeros(size["size"]), 2), model=model, **settings), a["samples"])
    assert torch.isfinite(compose([a, b], MIXED, model=model, **settings)).all()
    ones = torch.ones(1, 64, 64)
    for preset in PRESETS:
        target, latent = CollaborativeAttention.execute(
            model, a, ones, {"preset": preset}, 0, False, False, "SAGI first", 0.3, "soft", b, ones
        ).args
        assert torch.isfinite(sample(target, latent, **{**settings, "steps": 2})["samples"]).all(), preset
