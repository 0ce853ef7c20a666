"""Recipes that feed one attention from several: the split, its neighbours, and the hooks on a run's latents."""

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from montage.patching.install import install
from montage.patching.models import sites_of
from montage.patching.recipe import Recipe
from montage.patching.schedule import Window
from montage.patching.terms import AttentionTerm, pack
from montage.workshop.neighbours import replaced_attention, scaled_queries
from montage.workshop.random_models import random_model
from montage.workshop.sampling import MIXED, SIZE, STEPS, close, empty, inject, low_memory, same, sample, two


def plain_attention(q, k, v, bias=0):
    """One head, written out."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(branches, tokens, batch=1):
    """Of one conditioning."""
    q, k, v, split = pack([b._replace(q=b.q[None], k=b.k[None], v=b.v[None]) for b in branches], batch, tokens)
    return split.attend(q, k, v, lambda q, k, v, rows, images: plain_attention(q, k, v))


def test_branches_over_parts_of_the_rows_are_the_whole():
    n = random(2, 6, 8)
    rows = torch.tensor([4, 0, 1]), torch.tensor([2, 3, 5])
    close(attended([AttentionTerm(n[:, r], n, n, r) for r in rows], 6, 2), plain_attention(n, n, n), 1e-6)


def test_keys_of_each_image_are_gathered_as_a_masked_softmax_would():
    q, k, v = random(2, 5, 8), random(1, 7, 8, seed=1), random(1, 7, 8, seed=2)
    allowed = torch.tensor([[1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    bias = torch.where(allowed, 0, -torch.inf)[:, None]
    assert (
        attended([AttentionTerm(q, k, v, allowed=[own.nonzero()[:, 0] for own in allowed])], 5, 2)
        - plain_attention(q, k, v, bias)
    ).abs().max() <= 1e-6


def test_weights_are_of_each_image_and_results_are_summed():
    n, source = random(2, 6, 8), random(1, 4, 8, seed=1)
    weight = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(3))
    mixed = attended([AttentionTerm(n, n, n, weight=1 - weight), AttentionTerm(n, source, source, weight=weight)], 6, 2)
    close(mixed, (1 - weight) * plain_attention(n, n, n) + weight * plain_attention(n, source, source), 1e-6)


def test_one_plain_branch_needs_no_slot():
    n = random(2, 2, 6, 8)
    q, k, v, split = pack([AttentionTerm(n, n, n)], 2, 6)
    assert split is None and q.shape == (4, 6, 8) and v is k


class Halved(Recipe):
    """The plain self-attention in two branches: of the upper and of the lower rows."""

    node = "Halved"
    several_terms = True

    def attend(self, context, target, sources, grid):
        n, k, v = target
        middle = n.shape[2] // 2
        rows = torch.arange(middle, device=n.device), torch.arange(middle, n.shape[2], device=n.device)
        return [AttentionTerm(n[:, :, r], k, v, r) for r in rows if len(r)]


class Doubled(Halved):
    node = "Doubled"

    def attend(self, context, target, sources, grid):
        return [
            branch._replace(weight=torch.full((1, branch.q.shape[2], 1), 2.0))
            for branch in super().attend(context, target, sources, grid)
        ]


class Projected(Halved):
    """The same, with V doubled after its projection."""

    node = "Projected"

    def attend(self, context, target, sources, grid):
        def doubled(q, k, v):
            return q, k, 2 * v

        return [term._replace(projected=doubled) for term in super().attend(context, target, sources, grid)]


def window(model=None, start=0.0, end=1.0, part=slice(None)):
    return Window(start, end, sites_of(model or random_model("sd15-small"))[part])


def split_model(recipe=Halved, model=None, **settings):
    model = model or random_model("sd15-small")
    return install(model, recipe(window(**settings)))


@pytest.mark.parametrize("separate", [False, True])
def test_a_split_attention_is_the_plain_one(separate, monkeypatch):
    if separate:
        low_memory(monkeypatch)
    close(sample(split_model(), empty(2))["samples"], sample(random_model("sd15-small"), empty(2))["samples"])
    assert (
        sample(split_model(Doubled), empty(2))["samples"] - sample(random_model("sd15-small"), empty(2))["samples"]
    ).abs().max() > 0.05


def test_a_recipe_may_act_on_what_is_projected():
    close(sample(split_model(Projected), empty(2))["samples"], sample(split_model(Doubled), empty(2))["samples"])


@pytest.mark.parametrize("neighbour", [scaled_queries, replaced_attention])
def test_neighbours_act_on_every_branch(neighbour):
    """Another pack's attn1_patch, and another in the slot: ours hands each branch on to it."""
    model = neighbour(random_model("sd15-small"))
    options = str(model.model_options)
    expected = sample(model, empty())["samples"]
    close(sample(split_model(model=model), empty())["samples"], expected)
    close(sample(neighbour(split_model()), empty())["samples"], expected)
    assert str(model.model_options) == options and same(sample(model, empty())["samples"], expected)


def test_the_slot_is_taken_in_its_own_steps_and_sites_only():
    taken = []
    model = split_model(start=0.5, part=slice(0, 2))
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(
            len(kwargs["transformer_options"].get("patches_replace", {}).get("attn1", {}))
        ),
        with_kwargs=True,
    )
    sample(model, empty())
    hook.remove()
    assert taken == [0, 0, 2, 2]


def test_whoever_holds_the_whole_block_is_called_for_each_branch():
    seen = []
    model = random_model("sd15-small").clone()
    model.set_model_attn1_replace(
        lambda q, k, v, extra: (seen.append(q.shape[1]), optimized_attention(q, k, v, extra["n_heads"]))[1], "input", 1
    )
    sample(split_model(model=model), empty(), steps=1)
    assert seen == [32, 32]


def test_what_cuts_the_tokens_or_gives_another_shape_is_named():
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = HyperTile.execute(random_model("sd15-small"), 128, 2, 0, False)
    model, latent = getattr(tiled, "args", tiled)[0], empty(size=(32, 32))
    with pytest.raises(ValueError, match="Halved: HyperTile on this MODEL expects .*Disconnect HyperTile"):
        sample(split_model(model=model), latent)
    values = random_model("sd15-small").clone()
    values.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    with pytest.raises(
        ValueError, match=r"Doubled: another node replaces the self-attention of block \('middle', 0, 0\)"
    ):
        sample(split_model(Uneven, model=values), empty(size=(16, 16)))


class Uneven(Halved):
    node = "Doubled"

    def attend(self, context, target, sources, grid):
        return [
            branch._replace(k=branch.k[:, :, :1], v=branch.v[:, :, :1])
            for branch in super().attend(context, target, sources, grid)
        ]


def test_an_attention_is_split_by_one_recipe_only():
    both = install(split_model(end=0.5), Doubled(window(start=0.25, part=slice(3, 5))))
    with pytest.raises(
        ValueError, match=r"Doubled: at sigma .* Halved already feeds the attention of block \('input', 5, 0\)"
    ):
        sample(both, empty())
    apart = install(split_model(end=0.5), Doubled(window(start=0.5)))
    other = install(split_model(part=slice(0, 3)), Doubled(window(part=slice(3, 5))))
    assert all(torch.isfinite(sample(model, empty())["samples"]).all() for model in (apart, other))


@pytest.mark.parametrize("composite_first", [False, True])
def test_a_split_acts_on_what_is_composed(composite_first):
    """Whatever the order of the nodes: composites are of rows, and rows can be split afterwards."""
    a, b = two(cache_mb=64)
    composing, latent = inject([a, b], MIXED)
    model = split_model(model=composing) if composite_first else inject([a, b], MIXED, model=split_model())[0]
    close(sample(model, latent)["samples"], sample(composing, latent)["samples"])


def test_recipes_of_one_node_count_as_one():
    """A node whose second part alone is sampled is no mistake; one that never acts is."""
    late = install(random_model("sd15-small"), Halved(window(end=0.25)), Halved(window(start=0.25)))
    sample(late, empty())
    with pytest.raises(ValueError, match=r"Halved: it would have no effect.*\(0.8 to 0.85 and 0.9 to 0.95\)"):
        sample(
            install(
                random_model("sd15-small"), Halved(window(start=0.8, end=0.85)), Halved(window(start=0.9, end=0.95))
            ),
            empty(),
        )


# ---------------------------------------------------------------- latents


class Pinned(Recipe):
    """Holds the upper half of the latent at 0.5."""

    node = "Pinned"

    def pin(self, x):
        x = x.clone()
        x[:, :, : SIZE[0] // 2] = 0.5
        return x

    def latent(self, context, x):
        return self.pin(x)

    denoised = output = latent


def test_a_recipe_may_hold_a_part_of_the_latent():
    seen = []
    model = install(random_model("sd15-small"), Pinned(Window(0, 1, ())), Halved(window()))
    model.set_model_unet_function_wrapper(
        lambda apply, args: (seen.append(args["input"]), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    result = sample(model, empty())["samples"]
    assert (
        len(seen) == STEPS
        and all((x[:, :, :4] == 0.5).all() for x in seen)
        and not any((x[:, :, 4:] == 0.5).any() for x in seen)
    )
    assert (result[:, :, :4] == 0.5).all() and (result[:, :, 4:] != 0.5).all()


class Later(Recipe):
    """Leaves the first step out."""

    def start(self, context, start):
        return start._replace(sigmas=start.sigmas[1:])


def test_a_recipe_may_shorten_the_schedule():
    calls = []
    model = install(random_model("sd15-small"), Later(Window(0, 1, ())), Halved(window()))
    model.set_model_unet_function_wrapper(
        lambda apply, args: (calls.append(1), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    sample(model, empty())
    assert len(calls) == STEPS - 1
