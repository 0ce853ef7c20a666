"""Keys that are turned as if their tokens stood elsewhere, for every family with RoPE."""

import logging
from types import SimpleNamespace

import pytest
import torch

from montage.methods.layout_retouch import LiveMask, ObjectMask, Place
from montage.methods.mca_ctrl import SAGI, SALQ, MaskArea
from montage.methods.position_shift import Shift, centre, moved_queries, shift_of
from montage.nodes.layout_retouch import MultiSourceSwap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.patching.models import family_of
from montage.patching.schedule import Window
from montage.patching.streams import Stream
from montage.patching.terms import TargetRows
from montage.workshop.random_models import random_model
from montage.workshop.random_transformers import (
    TRANSFORMERS,
    build_transformer,
    empty_latent,
    prompt,
    random_transformer,
)
from montage.workshop.sampling import close, recorder, run_of, same, sample

WITH_ROPE = [name for name in TRANSFORMERS if name != "SD3.5 medium"]
SHIFT = 2, 1  # tokens down and to the right


def features(name, model):
    """{(role, site): [Q K V] of the image's tokens after RoPE} of one evaluation."""
    model, latent = recorder(model, empty_latent(name), cache_mb=64)
    run = run_of(sample(model, latent, 1, prompt(name, 1), prompt(name, 99), cfg=3.0, steps=1))
    return next(iter(run.evaluations.values())).features


def at_shifted_places(monkeypatch, network):
    """The network's own embedder computes RoPE of every token SHIFT further down and right."""
    if hasattr(network, "pos_embedder"):
        plain = network.pos_embedder.generate_embeddings

        def cropped(shape, **settings):
            b, t, h, w, c = shape
            whole = plain((b, t, h + SHIFT[0], w + SHIFT[1], c), **settings)
            whole = whole.unflatten(0, (t, h + SHIFT[0], w + SHIFT[1]))
            return whole[:, SHIFT[0] :, SHIFT[1] :].flatten(0, 2)

        monkeypatch.setattr(network.pos_embedder, "generate_embeddings", cropped)
        return
    embedder = getattr(network, "pe_embedder", None) or network.rope_embedder
    places = embedder.forward

    def moved(ids):
        by = torch.zeros(ids.shape[-1], device=ids.device)
        first = 0 if len(by) == 2 else 1
        by[first : first + 2] = torch.tensor(SHIFT, dtype=by.dtype)
        return places(ids + by)

    monkeypatch.setattr(embedder, "forward", moved)


@pytest.mark.parametrize("name", WITH_ROPE)
def test_turned_keys_are_those_of_the_models_own_rope_at_shifted_ids(name, monkeypatch):
    """At every site. All tokens are shifted, so that their distances, and with them all that the network computes,
    stay the same but for the angles.
    """
    model = build_transformer(name)
    before = features(name, model)
    at_shifted_places(monkeypatch, model.model.diffusion_model)
    after, family = features(name, model), family_of(model)
    assert family.has_positions and len(before) == 2 * len(family.sites())
    for key, rows in before.items():
        moved = family.moved(rows, torch.tensor([SHIFT]))
        _, k, v = moved.chunk(3, -1)
        close(k, after[key].chunk(3, -1)[1], 1e-4)
        close(v, after[key].chunk(3, -1)[2], 1e-4)
        assert (k - rows.chunk(3, -1)[1]).abs().max() > 1e-2
        assert same(family.moved(rows, torch.zeros(1, 2)), rows)
        back = family.moved(moved, -torch.tensor([SHIFT]))
        close(back, rows, 1e-5)


def test_the_distance_of_tokens_is_that_of_scale_rope(monkeypatch):
    """With ScaleROPE at 2, one token is two places."""
    rows = torch.randn(1, 24, 192, generator=torch.Generator().manual_seed(0))
    plain_model, scaled = random_transformer("Flux.1"), random_transformer("Flux.1").clone()
    scaled.set_model_rope_options(2.0, 0.0, 0.5, 0.0, 1.0, 0.0)
    one, two = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    close(family_of(scaled).moved(rows, one), family_of(plain_model).moved(rows, two), 1e-6)
    qwen = random_transformer("Qwen-Image").clone()  # which does not heed it
    qwen.set_model_rope_options(2.0, 0.0, 0.5, 0.0, 1.0, 0.0)
    assert same(family_of(qwen).moved(rows, one), family_of(random_transformer("Qwen-Image")).moved(rows, one))


def test_each_image_has_a_shift_of_its_own():
    family = family_of(random_transformer("Flux.1"))
    rows = torch.randn(1, 24, 192, generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    both = family.moved(rows, shifts)
    assert same(both[:1], family.moved(rows, shifts[:1]))
    close(both[1:], rows, 1e-6)


@pytest.mark.parametrize("model", [lambda: random_transformer("SD3.5 medium"), lambda: random_model("sd15-small")])
def test_without_rope_nothing_is_moved(model, caplog):
    model, rows = model(), torch.randn(1, 24, 96)
    assert not family_of(model).has_positions
    assert same(family_of(model).moved(rows, torch.tensor([SHIFT])), rows)
    with caplog.at_level(logging.INFO):
        assert shift_of("Node", model, "8, 0", (64, 64)) is None
    assert "Node: shift does nothing on this" in caplog.text


def test_auto_on_a_unet_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        assert shift_of("Node", random_model("sd15-small"), "auto", (64, 64)) is None
    assert not caplog.text


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("auto", Shift()),
        (" Auto ", Shift()),
        ("none", None),
        ("16, -8", Shift((-8 / 96, 16 / 64))),
        ("+16 -8.0", Shift((-8 / 96, 16 / 64))),
    ],
)
def test_what_the_input_may_say(text, wanted):
    assert shift_of("Node", random_transformer("Flux.1"), text, (96, 64)) == wanted


@pytest.mark.parametrize("text", ["", "16", "left", "nan, 0", "1, 2, 3", "inf, 1"])
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=r'Collaborative Attention: shift: ".*" was not understood. Write auto, none'):
        shift_of("Collaborative Attention", random_transformer("Flux.1"), text, (96, 64))


def test_where_something_lies():
    mask = torch.zeros(2, 6, 4)
    mask[0, 1:3, 3] = 1
    assert centre(mask[:1]).tolist() == [[1.5, 3.0]]
    assert Shift().tokens(centre(mask[:1]), torch.tensor([[4.0, 0.0]]), (6, 4)).tolist() == [[2.0, -3.0]]
    assert Shift().tokens(centre(mask), torch.tensor([[4.0, 0.0]]), (6, 4))[1].tolist() == [0, 0]  # it is nowhere
    assert Shift((-8 / 96, 16 / 64)).tokens(centre(mask), centre(mask), (6, 4)).tolist() == [[0.0, 1.0]]


def test_moved_queries_are_those_of_where_they_come_from():
    grid, rows = (3, 4), torch.arange(12.0)[None, :, None]
    found = moved_queries(rows, torch.tensor([5, 11]), torch.tensor([[1.0, 1.0], [0.0, -5.0]]), grid)
    assert found[..., 0].tolist() == [[0, 6], [7, 11]]


# ---------------------------------------------------------------- in the methods

NAME = "Flux.1"
LEFT, RIGHT = torch.zeros(96, 64, dtype=torch.bool), torch.zeros(96, 64, dtype=torch.bool)
LEFT[16:48, :32], RIGHT[48:80, 32:] = True, True  # two tokens of 16 pixels to the right and down
GRID, BY = (6, 4), torch.tensor([[2.0, 2.0]])


def drawn(seed, batch=1):
    return torch.randn(batch, 24, 192, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def context():
    return SimpleNamespace(family=family_of(random_transformer(NAME)), measures_words=False)


def front(recipe, context, shift):
    """The first term of a recipe: what the edited area is fed from."""
    recipe = recipe(Window(0, 1, ()), Stream(None, 0), Stream(None, 0), LEFT, MaskArea(RIGHT), None, shift)
    n, subject, condition = (drawn(seed) for seed in range(3))
    held = [recipe.select(number, source[None], GRID) for number, source in enumerate((subject, condition))]
    term = recipe.attend(context, TargetRows(*[n[None]] * 3), held, GRID)[0]
    return term._replace(q=term.q[0], k=term.k[0]), n, subject


def test_salq_turns_the_subjects_keys(context):
    term, n, subject = front(SALQ, context, Shift())
    inside = LEFT.unflatten(0, (6, 16)).unflatten(2, (4, 16))[:, 0, :, 0].flatten()
    assert same(term.k, context.family.moved(subject[:, inside], BY))
    assert same(term.q, n[:, term.rows])
    assert same(front(SALQ, context, None)[0].k, subject[:, inside])
    given = front(SALQ, context, Shift((32 / 96, 32 / 64)))[0]
    assert same(given.k, term.k)


def test_sagi_takes_the_subjects_outputs_from_where_it_stands(context):
    term, _, subject = front(SAGI, context, Shift())
    assert same(term.q, subject[:, term.rows - 2 * 4 - 2])
    assert same(term.k, front(SAGI, context, None)[0].k)


def test_a_place_is_from_the_references_mask_to_the_layouts(context):
    reference = drawn(1)[None]
    to_right = ObjectMask(RIGHT[None].float())
    moved = Place(Shift(), LEFT[None].float(), to_right).moved(context, reference, GRID)
    assert same(moved[0], context.family.moved(reference[0], BY))
    assert Place(Shift(), None, to_right).moved(context, reference, GRID) is reference
    assert Place(Shift(), LEFT[None].float()).moved(context, reference, GRID) is reference
    assert same(Place(Shift((32 / 96, 32 / 64))).moved(context, reference, GRID), moved)
    both = ObjectMask(torch.stack([RIGHT, LEFT]).float())
    each = Place(Shift(), LEFT[None].float(), both).moved(context, reference, GRID)
    assert same(each[:, :1], moved)
    close(each[:, 1:], reference, 1e-6)
    with pytest.raises(ValueError, match="a running mask needs Token Attention Map"):
        ObjectMask(LiveMask(None, 0.1, 0.01, "or")).check("Multi Source Swap", context)


def recorded(name, seed):
    return sample(*recorder(random_transformer(name), empty_latent(name), 0), seed, prompt(name, seed), prompt(name, 9))


def settings(shift):
    preset = {"preset": "custom", "sagi_start": 0.0, "sagi_end": 0.5, "sagi_sites": "all"}
    preset |= {"salq_start": 0.5, "salq_end": 1.0, "salq_sites": "all"}
    return {
        "subject_mask": LEFT[None].float(), "edit_mask": RIGHT[None].float(), "preset": preset, "dilation": 0,
        "background_lock": False, "fresh_noise": False, "order": "SAGI first", "map_share": 0.3, "map_form": "soft",
        "shift": shift,
    }  # fmt: skip


@pytest.mark.parametrize("name", [NAME, "SD3.5 medium", "Z-Image", "Cosmos-Predict2"])
def test_the_nodes_move_what_they_read(name):
    """auto is the pixels from centre to centre; SD3 has no places."""
    subject, condition = recorded(name, 1), recorded(name, 2)
    positive, negative = prompt(name, 2), prompt(name, 9)

    def swapped(shift):
        node = CollaborativeAttention.execute(random_transformer(name), subject, condition=condition, **settings(shift))
        return sample(*node.args, 3, positive, negative)["samples"]

    def retouched(**node):
        fed = {"layout_end": 0.0, "mask_start": 0.5, "end": 1.0, "sites": "all", "mask": RIGHT[None].float(), **node}
        model, latent = MultiSourceSwap.execute(random_transformer(name), condition, subject, **fed).args
        return sample(model, latent, 3, positive, negative)["samples"]

    mask = {"reference_mask": LEFT[None].float()}
    for made, by_hand, plain_one in (
        (swapped("auto"), swapped("32, 32"), swapped("none")),
        (retouched(**mask), retouched(shift="32, 32"), retouched(**mask, shift="none")),
    ):
        assert same(made, by_hand) and made.isfinite().all()
        assert same(made, plain_one) == (name == "SD3.5 medium")
    assert same(retouched(), retouched(shift="none"))  # where the subject is, nobody has said
