import pytest
import torch

from montage.patching.models import Site, parse_sites, sites_of
from montage.patching.schedule import Visits, Window, position
from montage.workshop.random_models import STRUCTURES, random_model


def on_meta(name):
    """A MODEL's structure without its weights."""
    import comfy.model_patcher

    family, unet = STRUCTURES[name]
    model = family(dict(unet)).get_model({}, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["sd15", "sd15-small", "sd2-small"])
def test_sixteen_sites_in_the_order_of_execution(name):
    expected = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    assert sites_of(on_meta(name)) == tuple(Site(*block, 0) for block in expected)


def test_sdxl_has_seventy_sites_and_none_at_full_resolution():
    sites = sites_of(on_meta("sdxl"))
    assert len(sites) == 70
    assert sites[0] == Site("input", 4, 0) and sites[-1] == Site("output", 5, 1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("all", range(16)),
        ("encoder", range(6)),
        ("middle", [6]),
        ("decoder", range(7, 16)),
        ("d0", [0]),
        ("d1-3,m0", [1, 2, 3, 6]),
        (" u8 , d5 ", [5, 15]),
        ("u", range(7, 16)),
        ("d0.0", [0]),
        ("u2-", range(9, 16)),
        ("d1-,m,u", range(1, 16)),
    ],
)
def test_texts_name_sites(text, expected):
    model = random_model("sd15-small")
    assert parse_sites("test", model, text) == tuple(sites_of(model)[i] for i in expected)


def test_ranges_of_transformer_blocks():
    sites = parse_sites("test", on_meta("sdxl"), "d2.2-9,u0.0")
    assert sites == tuple(Site("input", 7, i) for i in range(2, 10)) + (Site("output", 0, 0),)


@pytest.mark.parametrize(
    "text, part",
    [
        ("d6", "no d6"),
        ("q1", '"q1" names no'),
        ("", '"" names no'),
        ("d0.1", "has 1 transformer block"),
        ("d3-1", "empty range"),
        ("u9-", "empty range"),
        ("d0,,u1", '""'),
    ],
)
def test_a_wrong_text_lists_what_the_model_has(text, part):
    with pytest.raises(ValueError) as error:
        parse_sites("test", random_model("sd15-small"), text)
    assert part in str(error.value) and "d0-5" in str(error.value) and "u0-8" in str(error.value)


def test_positions_are_fractions_of_the_steps():
    sigmas = (8.0, 4.0, 2.0, 1.0, 0.0)
    assert [position(s, sigmas) for s in sigmas[:-1]] == [0, 0.25, 0.5, 0.75]
    assert position(3.0, sigmas) == 0.25  # the middle of a DPM-2 step belongs to it
    assert position(0.5, sigmas) == 0.75 and position(9.0, sigmas) == 0


def test_a_window_holds_its_start_and_not_its_end():
    window = Window(0.1, 0.4, ("site",))
    assert [step for step in range(50) if window.has(step / 50)] == list(range(5, 20))
    assert Window(0.5, 0.5, ("site",)).is_empty and not Window(0, 1, ("site",)).is_empty


def test_visits_tell_equal_sigmas_apart():
    visits = Visits()
    assert [visits.next(s) for s in (2.0, 1.0, 1.0, 2.0)] == [(2.0, 0), (1.0, 0), (1.0, 1), (2.0, 1)]
