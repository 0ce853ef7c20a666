"""The bias of Collage Diffusion on cross-attention, and life beside other patches."""

import logging
import math

import comfy.ldm.modules.attention as attention
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from montage.kernels import token_bias as kernel
from montage.nodes.collage import CollageCrossAttn, owned_tokens
from montage.patching.models import TextAttention, sites_of
from montage.patching.models.masks import say_left_out
from montage.workshop.collages import BLUE, RED, THINGS, canvas, layer, plain
from montage.workshop.random_models import demo_model, random_model, text_encoder
from montage.workshop.sampling import (
    close,
    empty,
    inject,
    low_memory,
    masks_of,
    recorder,
    same,
    sample,
    sample_advanced,
    words,
)
from nodes import ConditioningConcat, ConditioningSetArea, ConditioningSetMask

PROMPT = "a photo of a red cat beside a blue dog, on grass"


@pytest.fixture(scope="module")
def clip():
    return text_encoder("sd15-small")


def two_layers(w_pos=0.6, w_neg=0.8, texts=("a red cat", "a blue dog"), **settings):
    cat = layer(plain(RED), texts[0], x=0.25, scale=0.5, w_pos=w_pos, w_neg=w_neg)
    return canvas(
        layer(plain(BLUE), texts[1], x=0.75, scale=0.5, w_pos=w_pos, w_neg=w_neg, behind=cat, node="2"),
        **{"prompt": PROMPT, **settings},
    )[0]


def biased(
    clip, collage=None, model=None, strength=1.0, growth="log log", start=0.0, end=1.0, sites="all", conditioning=None
):
    """(MODEL, CONDITIONING)."""
    return CollageCrossAttn.execute(
        model or random_model("sd15-small"),
        clip,
        collage or two_layers(),
        strength,
        growth,
        start,
        end,
        sites,
        conditioning,
    ).args


def run(clip, latent=None, **settings):
    node = {
        key: settings.pop(key)
        for key in ("collage", "model", "strength", "growth", "start", "end", "sites", "conditioning")
        if key in settings
    }
    model, positive = biased(clip, **node)
    return sample(model, latent or empty(), positive=positive, **settings)["samples"]


def unbiased(clip, latent=None, model=None, prompt=PROMPT, **settings):
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return sample(model or random_model("sd15-small"), latent or empty(), positive=positive, **settings)["samples"]


# ---------------------------------------------------------------- the mathematics


def test_growth_is_the_papers():
    """At true sigmas, of 50 steps."""
    for sigma, value in ((5.0, 1.027), (2.21, 0.775), (1.12, 0.562), (0.533, 0.360), (0.029, 0.038), (0.0, 0.0099)):
        assert kernel.GROWTH["log log"](sigma) == pytest.approx(value, abs=1.5e-3)
    assert kernel.GROWTH["log"](5.0) == pytest.approx(math.log(6.01))


def test_only_own_tokens_are_biased_by_their_maximum():
    """Every other column is 0. And every sample has its own maximum."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 16, generator=generator), torch.randn(2, 10, 16, generator=generator)
    weights = torch.randn(2, 12, generator=generator)
    drawn = torch.zeros(12, 10)
    drawn[:, [3, 7]] = weights.T
    bias = kernel.attention_bias(q, k, 2, drawn * 0.5 * kernel.logit_scale(k, 2))
    logits = torch.einsum("bphd,bkhd->bhpk", q.unflatten(-1, (2, 8)), k.unflatten(-1, (2, 8))) / 8**0.5
    expected = torch.zeros(2, 1, 12, 10)
    for sample_ in range(2):
        for column, row in ((3, 0), (7, 1)):
            expected[sample_, 0, :, column] = 0.5 * logits[sample_, :, :, column].max() * weights[row]
    assert torch.allclose(bias, expected, atol=1e-6)
    twice = kernel.attention_bias(q, k.repeat(1, 3, 1), 2, drawn.repeat(1, 3) * 0.5 * kernel.logit_scale(k, 2))
    assert torch.allclose(twice, expected.repeat(1, 1, 1, 3), atol=1e-6)


def test_negative_logits_turn_nothing_round():
    q, k = torch.ones(1, 4, 8), -torch.ones(1, 5, 8)
    assert same(kernel.maxima(q, k, 2), torch.zeros(1, 5))
    assert same(kernel.attention_bias(q, k, 2, torch.ones(4, 5)), torch.zeros(1, 1, 4, 5))


@pytest.mark.parametrize("dtype, size", [(torch.float16, 30.0), (torch.bfloat16, 30.0), (torch.float16, 300.0)])
def test_half_precision_stays_finite(dtype, size):
    """The largest logit that fp16 has is where it ends."""
    q, k = torch.full((1, 4, 80), size, dtype=dtype), torch.full((1, 77, 80), size, dtype=dtype)
    weights = torch.zeros(4, 77, dtype=dtype)
    weights[:, 1], weights[:, 2] = 0.5, -1.0
    bias = kernel.attention_bias(q, k, 2, weights * kernel.logit_scale(k, 2))
    largest = min(size**2 * 40, torch.finfo(dtype).max)
    assert bias.dtype == dtype and torch.isfinite(bias).all()
    assert bias[0, 0, 0, 1].item() == pytest.approx(0.5 * largest / 40**0.5, rel=0.01)


def test_the_mask_at_every_level_is_the_share_of_each_cell():
    masks = torch.zeros(2, 65, 48)
    masks[0, :32, :24], masks[1, 32:] = 1, 1
    for grid in ((9, 6), (5, 3), (3, 2)):
        weights = kernel.spatial_weights(masks, [1.0, 0.5], [0.0, 0.25], [(0,), (1,), (0, 1)], grid)
        assert weights.shape == (3, grid[0] * grid[1])
        first = weights[0].reshape(grid)
        assert first[0, 0] == 1 and first[-1, -1] == 0 and first.min() >= 0
        second = (weights[1] + 0.25) / 0.75  # w_pos m - w_neg (1 - m)
        assert torch.allclose(weights[2], weights[0] + 0.5 * second - 0.25 * (1 - weights[0] - second), atol=1e-6)


@pytest.mark.parametrize(
    "runs, owned",
    [
        ({0: [(1, 2)], 1: [(4,)]}, {1: (0,), 2: (0,), 4: (1,)}),
        ({0: [(2,), (5,)], 1: [(1, 2)]}, {1: (1,), 2: (1,), 5: (0,)}),  # "cat" is the other one, not that of "red cat"
        ({0: [(2,)], 1: [(1, 2)]}, {1: (1,), 2: (0, 1)}),  # there is no other cat
        ({0: [(1, 2), (5, 6)], 3: [(1, 2), (5, 6)]}, {1: (0,), 2: (0,), 5: (3,), 6: (3,)}),  # one each
        ({0: [(1, 2)], 3: [(1, 2)]}, {1: (0, 3), 2: (0, 3)}),  # together
        ({0: [(1, 2), (5, 6)]}, {1: (0,), 2: (0,), 5: (0,), 6: (0,)}),
        ({}, {}),
    ],
)
def test_who_owns_a_token(runs, owned):
    assert kernel.owners(runs) == owned


# ---------------------------------------------------------------- against the paper, written out


def explicit(model, collage, positions, conditioning, w_pos, w_neg):
    """The paper's own way: logits, softmax and all, in the cond half of every block."""

    def attend(q, k, v, extra):
        heads, sigma, grid = extra["n_heads"], float(extra["sigmas"][0]), extra["activations_shape"][-2:]
        split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        logits = split[0] @ split[1].transpose(2, 3) / split[0].shape[-1] ** 0.5
        for chunk, role in zip(logits.chunk(len(extra["cond_or_uncond"])), extra["cond_or_uncond"]):
            if role == 0:
                unmodified = chunk.clone()
                for number, run_ in enumerate(positions):
                    m = torch.nn.functional.interpolate(
                        collage.masks[None, number : number + 1], size=tuple(grid), mode="area"
                    ).flatten()
                    for j in run_:
                        maximum = unmodified[..., j].amax((1, 2)).clamp(min=0)
                        gain = math.log(math.log(sigma + 1.01) + 1)
                        chunk[..., j] += gain * maximum[:, None, None] * (w_pos * m - w_neg * (1 - m))
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    patched = model.clone()
    for site in sites_of(model):
        patched.set_model_attn2_replace(attend, *site)
    return patched


@pytest.mark.parametrize("size", [(8, 8), (13, 6)])
def test_the_bias_is_the_papers(clip, size):
    collage = two_layers(width=size[1] * 8, height=size[0] * 8)
    model, latent = random_model("sd15-small"), empty(2, size)
    positions = [(4, 5, 6), (8, 9, 10)]
    assert owned_tokens("", clip, collage) == {**dict.fromkeys(positions[0], (0,)), **dict.fromkeys(positions[1], (1,))}
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    expected = sample(explicit(model, collage, positions, conditioning, 0.6, 0.8), latent, positive=conditioning)[
        "samples"
    ]
    found = run(clip, latent, collage=collage)
    close(found, expected)
    assert (found - unbiased(clip, latent)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sd2-small", "sdxl-small"])
def test_other_structures(name):
    clip, model, latent = text_encoder(name), random_model(name), empty(size=(16, 12))
    settings = {"model": model, "negative": words(9, name=name), "steps": 2}
    collage = two_layers(width=96, height=128)
    found = run(clip, latent, collage=collage, **settings)
    close(
        found,
        sample(
            explicit(model, collage, [(4, 5, 6), (8, 9, 10)], None, 0.6, 0.8),
            latent,
            positive=clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT)),
            negative=settings["negative"],
            steps=2,
        )["samples"],
    )
    assert (found - unbiased(clip, latent, **settings)).abs().max() > 0.01


def test_twenty_layers_in_a_prompt_of_two_chunks(clip):
    """Every layer's word has its own mask, on either side of the 77th token."""
    layers = ()
    for number, thing in enumerate(THINGS):
        layers = layer(
            plain(RED),
            thing,
            x=(number % 5 + 0.5) / 5,
            y=(number // 5 + 0.5) / 4,
            scale=0.3,
            w_pos=0.6,
            w_neg=0.8,
            behind=layers,
        )
    collage = canvas(layers, width=96, height=64, prompt="word, " * 30 + ", ".join(THINGS))[0]
    positions = [
        1 + place + 2 * (place // 75) for place in range(60, 100, 2)
    ]  # a chunk holds 75 tokens between its begin and its end
    assert owned_tokens("", clip, collage) == {position: (number,) for number, position in enumerate(positions)}
    latent, conditioning = empty(size=(8, 12)), clip.encode_from_tokens_scheduled(clip.tokenize(collage.prompt))
    expected = sample(
        explicit(random_model("sd15-small"), collage, [(position,) for position in positions], None, 0.6, 0.8),
        latent,
        positive=conditioning,
    )["samples"]
    close(run(clip, latent, collage=collage), expected)
    assert (expected - unbiased(clip, latent, prompt=collage.prompt)).abs().max() > 0.1


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize(
    "off", [{"strength": 0.0}, {"start": 0.5, "end": 0.5}, {"collage": "zero weights"}, {"collage": "no words"}]
)
def test_switched_off_it_is_the_plain_model(clip, off):
    collages = {"zero weights": two_layers(w_pos=0.0, w_neg=0.0), "no words": two_layers(texts=("", ""))}
    off = {key: collages.get(value, value) for key, value in off.items()}
    assert same(run(clip, **off), unbiased(clip))


def test_the_model_that_came_in_is_unchanged(clip):
    model = random_model("sd15-small")
    before = unbiased(clip)
    run(clip, model=model)
    assert same(unbiased(clip, model=model), before)


def test_the_uncond_half_is_untouched(clip, monkeypatch):
    """At the first step, where both halves see the same latent."""

    def uncond(model, positive):
        seen = []
        model = model.clone()
        model.set_model_sampler_post_cfg_function(
            lambda args: (seen.append((args["uncond_denoised"], args["cond_denoised"])), args["denoised"])[1],
            disable_cfg1_optimization=True,
        )
        sample(model, empty(), positive=positive, steps=1)
        return seen[0]

    model, positive = biased(clip)
    plain, patched = uncond(random_model("sd15-small"), positive), uncond(model, positive)
    close(plain[0], patched[0], 1e-4)  # the halves are attended to one by one
    assert (plain[1] - patched[1]).abs().max() > 0.01
    low_memory(monkeypatch)
    close(uncond(model, positive)[1], patched[1])


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "uni_pc"])
def test_samplers_and_split_halves(clip, sampler, monkeypatch):
    together = run(clip, sampler=sampler)
    low_memory(monkeypatch)
    close(run(clip, sampler=sampler), together)


def test_cfg_1_and_a_window(clip):
    assert (run(clip, cfg=1.0) - unbiased(clip, cfg=1.0)).abs().max() > 0.01

    def steps(model, positive):
        seen, model = [], model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: (seen.append(args["denoised"]), args["denoised"])[1])
        sample(model, empty(), positive=positive)
        return seen

    model, positive = biased(clip, start=0.5, end=0.75)
    plain, window = steps(random_model("sd15-small"), positive), steps(model, positive)
    assert [same(*pair) for pair in zip(plain, window)] == [True, True, False, False]
    assert (run(clip, sites="m0") - run(clip)).abs().max() > 0.001


def test_a_batch_is_its_images(clip):
    """The maxima are each sample's own."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def go(rows):
        model, positive = biased(clip)
        return sample_advanced(model, {"samples": latents[rows]}, positive=positive, noise="disable")["samples"]

    close(go(slice(0, 2)), torch.cat([go(slice(0, 1)), go(slice(1, 2))]))


def test_prompts_of_unequal_length(clip, monkeypatch):
    """ComfyUI repeats the shorter one in a batch; computed alone it is not."""
    long = words(99, tokens=154)
    together = run(clip, negative=long)
    low_memory(monkeypatch)
    close(together, run(clip, negative=long))


def test_long_prompts_and_weights(clip):
    collage = two_layers(prompt="word, " * 40 + "(a red cat:1.3) and a blue dog")
    assert min(owned_tokens("", clip, collage)) > 77
    assert (run(clip, collage=collage) - unbiased(clip, prompt=collage.prompt)).abs().max() > 0.01


@pytest.mark.parametrize(
    "backend", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch", "attention_flash"]
)
def test_every_attention_of_comfyui(clip, backend, monkeypatch, caplog):
    expected = run(clip)
    monkeypatch.setattr(attention, "optimized_attention_masked", getattr(attention, backend))
    close(run(clip), expected)
    assert not [r for r in caplog.records if "Flash" in r.message]


def overridden(model, override):
    """As SageAttention nodes patch a MODEL."""
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("adapter", [False, True])
def test_who_knows_no_masks_is_left_out_where_one_is_needed(clip, adapter, caplog):
    """As on transformers: the bias acts all the same, said once; every other attention is still the override's. With
    an adapter in the attn2 slots too.
    """
    say_left_out.cache_clear()
    masked = []

    def heedless(func, q, k, v, heads, mask=None, **kwargs):
        masked.append(mask is not None)
        return func(q, k, v, heads, None, **kwargs)

    def adapted(q, k, v, extra):
        return attention.optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra) + 0.1 * q

    model = random_model("sd15-small").clone()
    if adapter:
        for site in sites_of(model):
            model.set_model_attn2_replace(adapted, site.block, site.number, site.index)
    wanted = run(clip, model=model)
    with caplog.at_level(logging.INFO):
        made = run(clip, model=overridden(model, heedless))
    close(made, wanted)
    assert (made - unbiased(clip, model=model)).abs().max() > 0.01
    said = [r.message for r in caplog.records if "supports no attention masks" in r.message]
    assert len(said) == 1 and said[0].startswith("Montage: another node's attention")
    assert masked.count(True) == 1 and masked.count(False) > len(sites_of(model))


def test_an_override_that_heeds_masks_computes_every_attention(clip):
    masks = []

    def heeding(func, q, k, v, heads, mask=None, **kwargs):
        masks.append(mask)
        return func(q, k, v, heads, mask, **kwargs)

    model = random_model("sd15-small")
    close(run(clip, model=overridden(model, heeding)), run(clip))
    assert sum(mask is not None for mask in masks) >= len(sites_of(model))


def test_another_conditioning_is_not_touched(clip):
    """A prompt of its own beside the collage's, as masks and two positives make it."""
    model, positive = biased(clip)
    own = clip.encode_from_tokens_scheduled(clip.tokenize("a green field"))
    left, right = masks_of(torch.tensor([[0, 1]]).repeat_interleave(4, 1).expand(8, 8))

    def masked(conditioning, mask):
        return ConditioningSetMask().append(conditioning, mask[None], "default", 1.0)[0]

    mixed = sample(model, empty(), positive=masked(positive, left) + masked(own, right), steps=1)["samples"]
    plain = sample(random_model("sd15-small"), empty(), positive=masked(positive, left) + masked(own, right), steps=1)[
        "samples"
    ]
    close(mixed[..., 4:], plain[..., 4:])
    assert (mixed[..., :4] - plain[..., :4]).abs().max() > 0.01


def test_a_prompt_that_another_node_encoded(clip):
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT), add_dict={"width": 64})
    model, conditioning = biased(clip, conditioning=encoded)
    assert (
        conditioning[0][1]["width"] == 64
        and "width" in encoded[0][1]
        and len(encoded[0][1]) + 1 == len(conditioning[0][1])
    )
    assert same(sample(model, empty(), positive=conditioning)["samples"], run(clip))


def test_recorded_runs_replay_with_their_bias(clip):
    """A photomontage of collages: everything from the base is the base, and replays are what was cached."""
    model, positive = biased(clip)
    mixed = masks_of(torch.tensor([[0, 1]]).repeat_interleave(4, 1).expand(8, 8))
    found = []
    for cache_mb in (0, 64):
        both = [sample(*recorder(model, cache_mb=cache_mb), seed=seed, positive=positive) for seed in (1, 2)]
        assert same(
            sample(*inject(both, masks_of(torch.zeros(8, 8), 2), model=model), positive=positive)["samples"],
            both[0]["samples"],
        )
        found.append(sample(*inject(both, mixed, model=model), positive=positive)["samples"])
    close(*found)


# ---------------------------------------------------------------- neighbours (test_neighbours.py has the others)


def test_an_adapter_adds_the_same_to_biased_and_plain_attention(clip):
    """One step, all blocks but one without the adapter: out = biased + (adapter - plain)."""
    model = random_model("sd15-small").clone()
    seen = {}

    def other(q, k, v, extra):
        out = attention.optimized_attention(q, k, v, extra["n_heads"])
        seen["plain"] = out
        return out + 0.3 * q

    model.set_model_attn2_replace(other, "input", 1)
    reached = {}
    model.set_model_attn2_output_patch(lambda n, extra: (reached.setdefault(extra["block"], n), n)[1])
    patched, positive = biased(clip, model=model, sites="d0")
    sample(patched, empty(), positive=positive, steps=1)
    with_adapter = reached.pop(("input", 1))
    reached.clear()
    alone = random_model("sd15-small").clone()
    alone.set_model_attn2_output_patch(lambda n, extra: (reached.setdefault(extra["block"], n), n)[1])
    patched, positive = biased(clip, model=alone, sites="d0")
    sample(patched, empty(), positive=positive, steps=1)
    to_out = random_model("sd15-small").model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_out
    difference = with_adapter - reached[("input", 1)]
    reached.clear()
    plain = random_model("sd15-small").clone()
    plain.set_model_attn2_replace(other, "input", 1)
    plain.set_model_attn2_output_patch(lambda n, extra: (reached.setdefault(extra["block"], n), n)[1])
    sample(plain, empty(), positive=positive, steps=1)
    close(difference, reached[("input", 1)] - to_out(seen["plain"]), 1e-4)


def test_a_compiled_model_keeps_the_bias(clip, caplog):
    """torch.compile runs a graph without the patches: it is left out, with one warning (test_neighbours.py runs it for
    real).
    """
    compiled = random_model("sd15-small").clone()
    compiled.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "torch.compile", lambda *args, **kwargs: pytest.fail("the compiled graph ran")
    )
    assert same(run(clip, model=compiled), run(clip))
    assert (
        len([r for r in caplog.records if "torch.compile is skipped" in r.message and r.levelno == logging.WARNING])
        == 1
    )


# ---------------------------------------------------------------- refusals


def test_layers_whose_words_are_not_in_the_prompt_are_named(clip):
    with pytest.raises(
        ValueError,
        match=r'Collage Cross Attention: layer 1 \(counted from the back; node 2\): "a green dog" is not in the prompt',
    ):
        biased(clip, two_layers(texts=("a red cat", "a green dog")))


def test_repeated_words_keep_every_layers_own_mask(clip):
    """And no hang."""
    collage = two_layers(texts=("a red cat", "a red cat"), prompt="a red cat and a red cat")
    assert owned_tokens("", clip, collage) == {**dict.fromkeys((1, 2, 3), (0,)), **dict.fromkeys((5, 6, 7), (1,))}
    assert torch.isfinite(run(clip, collage=collage)).all()


def test_what_does_not_fit_is_refused(clip):
    model, positive = biased(clip)
    with pytest.raises(ValueError, match="its MODEL is sampled without its CONDITIONING"):
        sample(model, empty(), positive=words(1))
    with pytest.raises(ValueError, match="the canvas is 64x64 and the latent 12x8, another shape"):
        sample(model, empty(size=(8, 12)), positive=positive)
    with pytest.raises(ValueError, match="Areas and tiles do not match the canvas"):
        sample(model, empty(), positive=ConditioningSetArea().append(positive, 32, 64, 0, 0, 1.0)[0])
    with pytest.raises(ValueError, match="context windows cut the latent"):
        with_context = model.clone()
        with_context.model_options["context_handler"] = object()
        sample(with_context, empty(), positive=positive)
    with pytest.raises(ValueError, match='Collage Cross Attention: sites: "d9": this model has no d9'):
        biased(clip, sites="d9")
    with pytest.raises(ValueError, match="the canvas's words are not in the conditioning"):
        biased(clip, conditioning=words(1, tokens=40))
    couple = model.clone()
    couple.set_model_attn2_patch(lambda n, k, v, extra: (n.repeat(2, 1, 1), k.repeat(2, 1, 1), v.repeat(2, 1, 1)))
    with pytest.raises(ValueError, match="multiplies the batch inside cross-attention"):
        sample(couple, empty(), positive=positive)


def test_a_block_that_another_pack_runs_in_its_own_way_is_named(clip, monkeypatch):
    block = attention.BasicTransformerBlock
    original = block.forward
    monkeypatch.setattr(
        block,
        "forward",
        lambda self, x, context=None, transformer_options={}: (
            x if transformer_options["block"] == ("output", 7) else original(self, x, context, transformer_options)
        ),
    )
    with pytest.raises(
        RuntimeError,
        match=r"cross-attention of 1 of its 16 blocks was never reached, the first of them \('output', 7, 0\)",
    ):
        run(clip)


# ---------------------------------------------------------------- where the words stand in a conditioning

DEMO_PROMPT = "a red ball beside a blue cube on grass"


def positions_of(conditioning):
    """The tokens that the bias acts on, of each part of a CONDITIONING; () where it has none."""
    return [tuple(extra["montage_bias"].owned) if "montage_bias" in extra else () for _, extra in conditioning]


def test_the_words_are_found_wherever_an_encoder_put_them():
    """Joined before or behind other words, weighted, behind a prefix, combined with another prompt."""
    model, clip, _ = demo_model()
    collage = two_layers(texts=("a red ball", "a blue cube"), prompt=DEMO_PROMPT)

    def encoded(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def found(conditioning):
        return positions_of(biased(clip, collage, model, conditioning=conditioning)[1])

    own, other = encoded(DEMO_PROMPT), encoded("on sand")
    there = (1, 2, 3, 5, 6, 7)
    assert found(None) == found(own) == [there]
    assert found(ConditioningConcat().concat(own, other)[0]) == [there]
    assert found(ConditioningConcat().concat(other, own)[0]) == [tuple(p + 77 for p in there)]
    assert found(encoded("a (red:1.4) ball beside a (blue:0.6) cube on grass")) == [there]
    assert found(encoded("masterpiece, best, " + DEMO_PROMPT)) == [tuple(p + 4 for p in there)]
    assert found([*own, *other]) == [there, ()]


@pytest.mark.parametrize("text", ["", "a green tree under a yellow sun on sand", "a green ball beside a blue cube"])
def test_a_conditioning_without_the_words_is_refused(text):
    model, clip, _ = demo_model()
    collage = two_layers(texts=("a red ball", "a blue cube"), prompt=DEMO_PROMPT)
    with pytest.raises(ValueError, match="^Collage Cross Attention: the canvas's words are not in the conditioning"):
        biased(clip, collage, model, conditioning=clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def test_a_bias_in_a_joined_prompt_acts_on_the_same_words(clip):
    """A prompt behind 77 tokens of padding attends as the model makes it; the bias moves with its words."""
    collage, seen = two_layers(), []
    own = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    joined = [[torch.cat([torch.zeros_like(own[0][0]), own[0][0]], 1), own[0][1]]]
    for conditioning in (own, joined):
        _, given = biased(clip, collage, conditioning=conditioning)
        bias, tokens = given[0][1]["montage_bias"], given[0][0].shape[1]
        q, k = (torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)) for n in (64, 77))
        k = torch.cat([torch.zeros_like(k), k], 1) if tokens > 77 else k
        prepared = bias.prepare((8, 8), tokens, 1, q)
        out = torch.zeros(1, 1, 64, tokens)
        attention = TextAttention(None, [0], q, k, 4, 1, (8, 8), (8, 8))
        bias.write(out, bias.at(prepared, 1.0, attention), attention)
        seen.append(out[..., -77:])
    assert same(*seen) and seen[0].any()
