"""Token Attention Map: where a model looks for words, while it samples and after."""

import comfy.samplers
import node_helpers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_custom_sampler import CFGGuider

from montage.nodes.layout_retouch import TokenAttentionMap, tokens_of
from montage.patching.attention_maps import LiveAttentionMap, TokenMap, indicator, marked, shares
from montage.patching.install import install
from montage.patching.models import Site, family_of, parse_sites
from montage.patching.streams import streams_of
from montage.workshop.random_models import random_model, text_encoder
from montage.workshop.sampling import NEGATIVE, empty, recorder, sample, sample_custom, words
from nodes import ConditioningCombine, ConditioningSetArea

NAMES = ["sd15-small", "sd2-small", "sdxl-small"]
PROMPT, WORDS = "a red cat and a blue dog", "cat, blue dog"


def measuring(model=None, latent=None, prompt=PROMPT, phrase=WORDS, sites="d@2-4,u@2-4", name="sd15-small"):
    """(MODEL, LATENT, CONDITIONING)"""
    return TokenAttentionMap.execute(
        model or random_model(name), latent or empty(), text_encoder(name), prompt, phrase, sites
    ).args


def run_of(latent):
    return streams_of("test", [latent])[0].run


def finished(latent):
    (found,) = run_of(latent).maps.values()
    return found


def explicit(model, latent, positive, tokens, sites, **settings):
    """The map by the plain formula: softmax over all text tokens, from what a replacement of every attention sees."""
    seen, spied = [], model.clone()

    def spy(q, k, v, extra):
        heads = extra["n_heads"]
        for number, part in enumerate(extra["cond_or_uncond"]):
            if part == 0:
                rows = slice(
                    number * len(q) // len(extra["cond_or_uncond"]),
                    (number + 1) * len(q) // len(extra["cond_or_uncond"]),
                )
                qh, kh = (t[rows].unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
                weights = (
                    (qh @ kh.transpose(2, 3) / extra["dim_head"] ** 0.5).softmax(3)[..., list(tokens)].sum(3).mean(1)
                )
                seen.append(weights.unflatten(1, tuple(extra["activations_shape"][-2:])))
        return optimized_attention(q, k, v, heads, attn_precision=extra["attn_precision"], transformer_options=extra)

    for site in sites:
        spied.set_model_attn2_replace(spy, *site)
    sample(spied, latent, positive=positive, **settings)
    finest = max(found.shape[1:] for found in seen)
    total = sum(torch.nn.functional.interpolate(found[:, None], size=finest, mode="bilinear")[:, 0] for found in seen)
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_the_run(name):
    """A latent of odd size: what the model's layers are counted to is what its patches see."""
    model, seen = random_model(name).clone(), {}

    def look(n, context, value, extra):
        seen[tuple(extra["block"])] = tuple(extra["activations_shape"][-2:])
        return n, context, value

    model.set_model_attn2_patch(look)
    sample(model, empty(size=(11, 13)), steps=1, positive=words(1, name=name), negative=words(9, name=name))
    scales = family_of(model).scales()
    assert seen and all(grid == (-(-11 // scales[block]), -(-13 // scales[block])) for block, grid in seen.items())


def test_sites_by_scale():
    model = random_model("sd15-small")
    assert parse_sites("test", model, "u@1-2") == tuple(
        Site("output", number, 0) for number in range(6, 12)
    )  # "layers 10-15"
    assert parse_sites("test", model, "d@2-4,u@2-4") == tuple(Site("input", n, 0) for n in (4, 5, 7, 8)) + tuple(
        Site("output", n, 0) for n in range(3, 9)
    )
    assert {site.number for site in parse_sites("test", random_model("sdxl-small"), "u@1-2")} == {3, 4, 5}
    with pytest.raises(
        ValueError, match=r'"u@16": this model has no attention there, only at the scales \[1, 2, 4, 8\]'
    ):
        parse_sites("test", model, "u@16")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(8, 8), (11, 14)])
def test_the_map_is_the_plain_formula(name, size):
    model, latent, positive = measuring(latent=empty(size=size), name=name)
    tokens = tokens_of("test", text_encoder(name), PROMPT, WORDS)
    assert tokens == (3, 6, 7)  # of "a red cat and a blue dog": cat, blue, dog (by the tokenizer, several words summed)
    negative = text_encoder(name)
    negative = negative.encode_from_tokens_scheduled(negative.tokenize(""))
    found = finished(sample(model, latent, positive=positive, negative=negative))
    expected = explicit(
        random_model(name), latent, positive, tokens, parse_sites("test", model, "d@2-4,u@2-4"), negative=negative
    )
    assert found.shape == expected.shape == (1, -(-size[0] // 2), -(-size[1] // 2))
    assert (found - expected).abs().max() < 1e-4
    assert found.min() == 0 and found.max() == 1


def test_sampling_is_unchanged():
    """Law of every patching node, in a stronger form: it measures and changes nothing."""
    model, latent, positive = measuring()
    plain = sample(random_model("sd15-small"), empty(), positive=positive)["samples"]
    assert torch.equal(sample(model, latent, positive=positive)["samples"], plain)
    assert torch.equal(sample(random_model("sd15-small"), empty(), positive=positive)["samples"], plain)


def test_a_longer_negative_prompt_does_not_move_the_map():
    """ComfyUI repeats the shorter prompt until both are as long: the copies of a token count together."""
    model, latent, positive = measuring()
    long = [[NEGATIVE[0][0].repeat(1, 2, 1), {}]]
    short, repeated = (
        finished(sample(*measuring()[:2], positive=positive, negative=negative)) for negative in (NEGATIVE, long)
    )
    assert (short - repeated).abs().max() < 1e-4


def test_each_image_of_a_batch_by_itself():
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def one(rows):
        model, latent, positive = measuring(latent={"samples": noise[rows]})
        return finished(sample(model, latent, positive=positive, denoise=0.5, sampler="euler", seed=5))

    both = one(slice(0, 2))
    assert both.shape[0] == 2 and not torch.allclose(both[0], both[1])
    # The sampler's noise differs between the rows of a batch, so the first row alone is the one to compare.
    assert (one(slice(0, 1))[0] - both[0]).abs().max() < 1e-4


def test_only_the_marked_prompt_counts_and_split_calls_are_the_same(monkeypatch):
    """The map is that of the cond half, in one call with the other or alone."""

    def go():
        model, latent, positive = measuring()
        return finished(sample(model, latent, positive=positive))

    together = go()
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1e30)
    assert (go() - together).abs().max() < 1e-4
    monkeypatch.undo()
    model, latent, positive = measuring()
    beside = ConditioningCombine().combine(positive, words(5))[0]
    expected = explicit_of_first(random_model("sd15-small"), beside)
    assert (finished(sample(model, latent, positive=beside)) - expected).abs().max() < 1e-4


def explicit_of_first(model, beside):
    """As `explicit`, for the first of two positive conditionings that run together with the negative: [1, 0, 0]
    reversed.
    """
    seen, spied = [], model.clone()

    def spy(q, k, v, extra):
        assert extra["cond_or_uncond"] == [1, 0, 0]
        qh, kh = (t[2:].unflatten(2, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k))
        weights = (qh @ kh.transpose(2, 3) / extra["dim_head"] ** 0.5).softmax(3)[..., [3, 6, 7]].sum(3).mean(1)
        seen.append(weights.unflatten(1, tuple(extra["activations_shape"][-2:])))
        return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)

    for site in parse_sites("test", model, "d@2-4,u@2-4"):
        spied.set_model_attn2_replace(spy, *site)
    sample(spied, empty(), positive=beside)
    total = sum(torch.nn.functional.interpolate(found[:, None], size=(4, 4), mode="bilinear")[:, 0] for found in seen)
    return (total - total.min()) / (total.max() - total.min())


def test_others_patches_stay_in_effect():
    """A replacement and a patch of another pack act as without us, whichever came first on the MODEL."""

    def patch(n, context, value, extra):
        return n, context * 1.5, value * 0.5

    def replace(q, k, v, extra):
        return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra) * 2

    def patched(model):
        model = model.clone()
        model.set_model_attn2_patch(patch)
        model.set_model_attn2_replace(replace, "output", 6)
        return model

    plain = random_model("sd15-small")
    positive = measuring()[2]
    expected = sample(patched(plain), empty(), positive=positive)["samples"]
    assert not torch.equal(expected, sample(plain, empty(), positive=positive)["samples"])
    before, latent, _ = measuring(patched(plain))
    assert torch.equal(sample(before, latent, positive=positive)["samples"], expected)
    after, latent, _ = measuring()
    assert torch.equal(sample(patched(after), latent, positive=positive)["samples"], expected)


def test_two_maps_in_one_run():
    model, latent, positive = measuring(phrase="cat")
    model, latent, positive = measuring(model, latent, phrase="blue dog")
    maps = run_of(sample(model, latent, positive=positive)).maps
    assert list(maps) == ["cat", "blue dog"]
    alone = finished(sample(*measuring(phrase="cat")[:2], positive=positive))
    assert torch.equal(maps["cat"], alone)


def test_the_map_is_read_during_the_run():
    """By recipes, as of the evaluations before; what this one has found so far depends on the order of the CFG
    halves.
    """
    model = random_model("sd15-small")
    sites = parse_sites("test", model, "d@2-4,u@2-4")
    counts, seen, before = {}, [], []
    wanted = TokenMap("cat", PROMPT, (3,), sites)
    positive = measuring()[2]

    def look(n, k, v, extra):
        (running,) = extra["montage"].context.maps
        site = Site(*extra["block"], extra["block_index"])
        counts.setdefault(site, []).append(running.count)
        seen.append(running.read())
        before.append(running.before())
        return n, k, v

    model = install(model, token_map=wanted)
    model.set_model_attn1_patch(look)
    sample(model, empty(), positive=positive, steps=2)
    assert counts[Site("input", 1, 0)] == [0, len(sites)]
    assert counts[Site("output", 6, 0)] == [
        7,
        7 + len(sites),
    ]  # d4, d5, d7, d8, u3, u4, u5: all before the first site of the swap
    assert counts[Site("output", 7, 0)] == [8, 8 + len(sites)]
    assert seen[0] is None and before[:16] == [None] * 16 and all(torch.equal(found, seen[16]) for found in before[16:])
    assert all(found.min() >= 0 and found.max() == 1 for found in seen[-9:])


def test_a_flat_map_is_zero():
    conds = {"positive": [{"uuid": 1, "cross_attn": torch.zeros(1, 77, 16), "montage_prompt": PROMPT}]}
    running = LiveAttentionMap(TokenMap("cat", PROMPT, (3,), ()), conds)
    running.add(torch.full((2, 1, 16), 0.25), (4, 4))
    assert torch.equal(running.read(), torch.zeros(2, 4, 4))


def test_probability_of_repeated_contexts():
    attention = family_of(random_model("sd15-small")).transformer_block(Site("input", 4, 0)).attn2
    generator = torch.Generator().manual_seed(0)
    n, context = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 7, 16, generator=generator)

    def of(context, tokens):
        q, k = attention.to_q(n), attention.to_k(context)
        return shares(q, k, attention.heads, indicator(k, attention.heads, tokens, 7)).sum(1)

    once = of(context, (2, 3))
    assert (of(context.repeat(1, 3, 1), (2, 3)) - once).abs().max() < 1e-6
    assert (of(context, tuple(range(7))) - 1).abs().max() < 1e-6


def test_a_recorder_beside_it_has_the_map_too():
    model, latent, positive = measuring(*recorder(cache_mb=0))
    found = run_of(sample(model, latent, positive=positive))
    assert found.maps.keys() == {WORDS} and found.evaluations
    model, latent, positive = measuring()
    found = run_of(sample(*recorder(model, latent), positive=positive))
    assert found.maps.keys() == {WORDS}


def test_custom_samplers():
    model, latent, positive = measuring()
    guider = CFGGuider.execute(model, positive, NEGATIVE, 5.0).args[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    output, _ = sample_custom(latent, guider, sigmas)
    assert finished(output).max() == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda positive: words(1),
            'no conditioning of the prompt "a red cat and a blue dog". Connect the CONDITIONING',
        ),
        (lambda positive: marked(words(1), "another"), "no conditioning of the prompt"),
        (lambda positive: ConditioningSetArea().append(positive, 32, 32, 0, 0, 1.0)[0], "masks instead of areas"),
    ],
)
def test_conditionings_that_do_not_fit(change, message):
    model, latent, positive = measuring()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sample(model, latent, positive=change(positive))


def test_words_that_are_not_there():
    with pytest.raises(ValueError, match='Token Attention Map: words: "bird" is not in the prompt "a red cat'):
        measuring(phrase="cat, bird")
    with pytest.raises(ValueError, match="Token Attention Map: sites: "):
        measuring(sites="x")


def test_the_conditioning_goes_through_other_nodes():
    model, latent, positive = measuring()
    positive = node_helpers.conditioning_set_values(positive, {"start_percent": 0.0, "end_percent": 0.6})
    assert finished(sample(model, latent, positive=positive)).max() == 1
