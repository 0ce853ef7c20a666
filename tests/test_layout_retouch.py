"""Layout-and-Retouch: two models in one run, and a target fed from a layout and a reference."""

import gc
import logging
import weakref
from collections import Counter
from functools import partial

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider

from montage.kernels import adaptive_mask as kernel
from montage.methods.layout_retouch import ObjectMask
from montage.nodes.layout_retouch import (
    AdaptiveMaskBlend,
    FromBoth,
    LiveMask,
    MultiSourceSwap,
    StepBlendSampler,
    TokenAttentionMap,
)
from montage.nodes.record import InvertImage
from montage.patching.models import sites_of
from montage.patching.schedule import Window
from montage.patching.step_blend import Stage, shares
from montage.patching.streams import streams_of
from montage.patching.terms import TargetRows, pack
from montage.workshop.random_models import build, control_net, random_model, text_encoder
from montage.workshop.sampling import (
    CFG,
    NEGATIVE,
    SIZE,
    STEPS,
    close,
    empty,
    evaluations_of,
    image_latent,
    low_memory,
    record,
    recorder,
    same,
    sample,
    sample_custom,
    words,
)
from nodes import ControlNetApplyAdvanced

# ---------------------------------------------------------------- the step blend


def plain_model():
    """The MODEL that guider() has; personal_model() is another of its kind."""
    return random_model("sd15-small", 0)


def personal_model():
    return random_model("sd15-small", 5)


def guider(seed=0, prompt=1, model=None, cfg=CFG, name="sd15-small"):
    return CFGGuider.execute(
        model or random_model(name, seed), words(prompt, name=name), words(99, name=name), cfg
    ).args[0]


def blend(first, then, switch=0.5, ramp=0.0):
    return StepBlendSampler.execute(first, then, switch, ramp).args[0]


def sigmas(steps=STEPS, model=None):
    return BasicScheduler.execute(model or plain_model(), "normal", steps, 1.0).args[0]


def run(guide, latent=None, sampler="euler", steps=STEPS, seed=1):
    return sample_custom(latent or empty(), guide, sigmas(steps), seed, sampler)[0]["samples"]


def evaluations(model, act):
    """(sigma, rows) of each evaluation of a MODEL while act() runs."""
    found = []

    def note(module, args, kwargs):
        found.append((float(kwargs["transformer_options"]["sigmas"][0]), len(args[0])))

    hook = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    act()
    hook.remove()
    return found


def seen_sigmas(model, act):
    return [sigma for sigma, _ in evaluations(model, act)]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "heun", "uni_pc", "euler_cfg_pp"])
def test_one_alone_is_the_pure_run(sampler):
    """Lambda 1 of 0 is the second model's run, of T the first's, bit for bit."""
    plain, personal = guider(0, 1), guider(5, 2)
    assert same(run(blend(plain, personal, 0.0), sampler=sampler), run(personal, sampler=sampler))
    assert same(run(blend(plain, personal, 1.0), sampler=sampler), run(plain, sampler=sampler))


@pytest.mark.parametrize("steps, switch", [(10, 0.3), (47, 0.06)])  # 3 / 47 * 47 is less than 3
def test_the_first_has_the_highest_sigmas(steps, switch):
    schedule = sigmas(steps).tolist()
    both = blend(guider(0), guider(5), switch)
    begun = seen_sigmas(plain_model(), lambda: run(both, steps=steps))
    assert begun == pytest.approx(schedule[:3], rel=1e-5)
    ended = seen_sigmas(personal_model(), lambda: run(both, steps=steps))
    assert ended == pytest.approx(schedule[3:-1], rel=1e-5)


def predictor(model, positive, cfg=CFG):
    """x, sigma -> denoised, by ComfyUI's own sampling function."""

    def predict(x, sigma):
        guide = comfy.samplers.CFGGuider(model)
        guide.set_conds(positive, NEGATIVE)
        guide.set_cfg(cfg)
        out = {}

        def once(model_k, noise, sigmas, extra_args, callback, disable):
            out["denoised"] = model_k(x, sigma, **extra_args)
            return noise

        guide.sample(torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(once), sigma[:1])
        return out["denoised"]

    return predict


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_each_step_is_of_the_model_whose_turn_it_is(sampler, ramp):
    """Against the sampler run by hand over single evaluations: the state of a multistep sampler goes on across the
    switch.
    """
    models = plain_model(), personal_model()
    predictors = [predictor(model, words(prompt)) for model, prompt in zip(models, (1, 2))]
    schedule, steps = sigmas(8), 8
    weight = {i: 0.0 if i < 4 else (min(1, (i - 3) / 5) if ramp else 1.0) for i in range(steps)}

    def model(x, sigma, **extra):
        share = weight[schedule.tolist().index(float(sigma[0]))]
        return sum(part * predict(x, sigma) for part, predict in zip((1 - share, share), predictors) if part)

    noise = torch.randn(1, 4, *SIZE, generator=torch.manual_seed(1))
    scaled = models[0].model.model_sampling.noise_scaling(schedule[0], noise, torch.zeros_like(noise), True)
    expected = models[0].model.process_latent_out(
        getattr(sampling, f"sample_{sampler}")(model, scaled, schedule, disable=True)
    )
    close(run(blend(guider(0, 1), guider(5, 2), 0.5, ramp), sampler=sampler, steps=8), expected, 1e-4)


def test_shares():
    stages = [Stage(None, 0.0, 0.0), Stage(None, 0.2, 0.3), Stage(None, 0.8, 0.0)]
    found = [shares(stages, step, 10) for step in range(10)]
    assert found[:2] == [{0: 1.0}] * 2 and found[5:8] == [{1: 1.0}] * 3 and found[8:] == [{2: 1.0}] * 2
    assert [step[1] for step in found[2:5]] == [0.25, 0.5, 0.75] and all(sum(step.values()) == 1 for step in found)
    assert shares(stages[:1], 3, 10) == {0: 1.0}
    ramp = [shares([Stage(None, 0.0, 0.0), Stage(None, 0.1, 0.2)], step, 10).get(1, 0) for step in range(4)]
    assert ramp == pytest.approx([0, 1 / 3, 2 / 3, 1])  # two steps, though 0.1 + 0.2 is more than 0.3


def test_three_by_chaining():
    first, then, last = guider(0, 1), guider(5, 2), guider(6, 3)
    three = blend(blend(first, then, 0.25), last, 0.5)
    counts = [len(seen_sigmas(random_model("sd15-small", seed), lambda: run(three, steps=8))) for seed in (0, 5, 6)]
    assert counts == [2, 2, 4]
    assert same(run(blend(blend(first, then, 0.25), last, 0.25)), run(blend(first, last, 0.25)))
    with pytest.raises(ValueError, match="then is itself a Step Blend Sampler"):
        blend(first, three)
    with pytest.raises(ValueError, match="takes over at 0.1, before the one it follows"):
        blend(three, last, 0.1)


@pytest.mark.parametrize(
    "switches, steps, told",
    [
        ((0.9,), 4, [2]),  # the last of 4 steps begins at 0.75
        ((0.3, 0.4), 2, [2]),  # between the steps at 0 and 0.5, whose second is the third guider's
        ((0.1,), 1, [2]),
        ((0.0,), 4, []),  # the second alone is asked for
        ((1.0,), 4, []),
        ((0.25, 0.25), 4, []),
        ((0.5,), 4, []),
    ],
)
def test_a_guider_whose_part_holds_no_step_is_named_in_the_log(switches, steps, told, caplog):
    whole = guider(0)
    for number, switch in enumerate(switches):
        whole = blend(whole, guider(5 + number), switch)
    with caplog.at_level(logging.WARNING):
        run(whole, steps=steps)
    expected = [f"Step Blend Sampler: none of the {steps} steps is left for guider {number}." for number in told]
    assert [message for message in caplog.messages if message.startswith("Step Blend")] == expected


def changes(model, strength=0.05, seed=3):
    """{key: what is added to the weight}, for every self-attention."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: value for key, value in model.model_state_dict().items() if "attn1.to_" in key and key.endswith("weight")
    }
    return {key: strength * torch.randn(value.shape, generator=generator) for key, value in weights.items()}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_lora_of_one_does_not_leak_into_the_other(reverse):
    """Both MODELs share their weights' module. As if its weights were baked into a model of its own."""
    plain, baked = plain_model(), build("sd15-small")
    personal = plain.clone()
    personal.add_patches({key: (change,) for key, change in changes(plain).items()})
    for key, change in changes(plain).items():
        baked.model.state_dict()[key].add_(change)
    before = run(guider(0, 1))
    pair, expected = (
        (guider(prompt=1), guider(prompt=2, model=personal)),
        (
            guider(prompt=1),
            guider(prompt=2, model=baked),
        ),
    )
    if reverse:
        pair, expected = pair[::-1], expected[::-1]
    assert (run(guider(prompt=2, model=personal)) - run(guider(prompt=2))).abs().max() > 0.05
    for ramp in (0.0, 0.5):
        close(run(blend(*pair, 0.5, ramp)), run(blend(*expected, 0.5, ramp)), 1e-4)
    assert same(run(guider(0, 1)), before)


def test_patches_and_conditionings_stay_with_their_model():
    """What patches one MODEL sees its own steps and text only; a text encoder each (DreamBooth)."""
    seen = {0: [], 5: []}

    def watched(seed, encoder):
        model = random_model("sd15-small", seed).clone()

        def look(n, context, value, extra):
            seen[seed].append((round(float(extra["sigmas"][0]), 3), context))
            return n, context, value

        model.set_model_attn2_patch(look)
        clip = text_encoder(seed=encoder)
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red vase"))
        return CFGGuider.execute(model, positive, NEGATIVE, CFG).args[0], positive[0][0]

    (first, text), (then, other) = watched(0, 3), watched(5, 4)
    assert not torch.equal(text, other)
    run(blend(first, then, 0.5))
    for steps, own, contexts in ((seen[0], text, slice(0, 2)), (seen[5], other, slice(2, 4))):
        assert sorted({sigma for sigma, _ in steps}, reverse=True) == [
            round(sigma, 3) for sigma in sigmas().tolist()[contexts]
        ]
        assert all(any(torch.equal(row, own[0]) for row in context) for _, context in steps)


def test_models_take_turns(monkeypatch):
    """One swap: the second is loaded when its turn comes, and not before; a pure run loads one."""
    loaded, original = [], comfy.model_management.load_models_gpu

    def load(models, *args, **kwargs):
        loaded.append(models[0].model)
        return original(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    plain, personal = plain_model().model, personal_model().model
    counts = []
    hook = personal.diffusion_model.register_forward_pre_hook(lambda *args: counts.append(len(loaded)))
    run(blend(guider(0), guider(5), 0.5))
    hook.remove()
    assert [id(model) for model in loaded] == [id(plain), id(personal)] and counts == [2, 2]
    loaded.clear()
    run(blend(guider(0), guider(5), 0.0))
    assert [id(model) for model in loaded] == [id(personal)]


@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_a_lora_on_a_small_card(ramp, monkeypatch):
    """--lowvram: no weight stays on the device; each is cast, and patched, when it is called."""
    personal = plain_model().clone()
    personal.add_patches({key: (change,) for key, change in changes(personal).items()})
    both = blend(guider(prompt=1), guider(prompt=2, model=personal), 0.5, ramp)
    expected, load = run(both), comfy.model_management.LoadedModel.model_load
    monkeypatch.setattr(
        comfy.model_management.LoadedModel, "model_load", lambda self, memory=0, **how: load(self, 1, **how)
    )
    comfy.model_management.unload_all_models()
    close(run(both), expected)
    assert personal.model.model_lowvram
    comfy.model_management.unload_all_models()


def test_a_controlnet_stays_with_its_guider():
    hint = torch.rand(1, 64, 64, 3, generator=torch.manual_seed(0))
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        words(2), words(99), control_net(), hint, 1.0, 0.0, 1.0
    )
    plain, controlled = guider(prompt=1), CFGGuider.execute(personal_model(), positive, negative, CFG).args[0]
    assert same(run(blend(plain, controlled, 0.0)), run(controlled)) and same(
        run(blend(plain, controlled, 1.0)), run(plain)
    )
    assert (run(blend(plain, controlled)) - run(blend(plain, guider(5, 2)))).abs().max() > 0.1


def test_the_guiders_that_came_in_are_unchanged():
    first, then = guider(0), guider(5)
    options = str(first.model_options), str(then.model_options)
    plain = run(first), run(then)
    blended = run(blend(first, then))
    assert (
        (str(first.model_options), str(then.model_options)) == options
        and same(run(first), plain[0])
        and same(run(then), plain[1])
    )
    assert not same(blended, plain[0]) and not same(blended, plain[1])
    assert same(run(blend(first, then)), blended)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_blended_run_can_be_recorded(sampler):
    """The second MODEL's recorder keeps its part of the trajectory: what a layout is."""
    model, latent = recorder(personal_model())
    guide = blend(guider(0, 1), guider(prompt=2, model=model), 0.5)
    result = sample_custom(latent, guide, sigmas(), 1, sampler)[0]
    (stream,) = streams_of("test", [result])
    assert {key[0] for key in stream.run.evaluations} == set(sigmas().tolist()[2:-1])
    assert stream.run.sampler == f"sample_{sampler}" and same(stream.run.final, result["samples"])


def test_a_recording_of_a_blend_holds_no_model():
    """Else gigabytes stay with a LATENT, and ComfyUI, which sees a model that nobody can unload, collects garbage
    before every load.
    """
    model = build("sd15-small")
    patched, latent, positive = TokenAttentionMap.execute(
        model, empty(), text_encoder(), "a red ball", "ball", "u@1-2"
    ).args
    then = CFGGuider.execute(patched, positive, words(99), CFG).args[0]
    kept, held = sample_custom(latent, blend(guider(model=model), then), sigmas())[0], weakref.ref(model.model)
    comfy.model_management.unload_all_models()
    del model, patched, then
    gc.collect()
    assert held() is None and streams_of("test", [kept])


def test_models_must_share_a_latent():
    with pytest.raises(
        ValueError, match="Step Blend Sampler: the first MODEL is SD15 and the other SDXL, whose latents differ"
    ):
        blend(guider(), guider(name="sdxl-small"))
    assert torch.isfinite(run(blend(guider(), guider(name="sd2-small")))).all()


def test_an_embedding_is_the_same_model_with_another_prompt():
    result = run(blend(guider(prompt=1), guider(prompt=2)))
    assert not any(same(result, run(guider(prompt=prompt))) for prompt in (1, 2))
    assert same(result, run(blend(guider(prompt=1), guider(prompt=2, model=plain_model().clone()))))


def test_the_switch_counts_steps_that_the_first_leaves_out():
    model, latent = swap(layout_end=0.5, model=plain_model())
    both = blend(guider(model=model), guider(5), 0.75)
    counts = [len(seen_sigmas(model, lambda: run(both, latent))) for model in (plain_model(), personal_model())]
    assert counts == [2, 1]  # of the third step, target and photo


def test_a_noise_mask_and_a_batch():
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :4] = 1
    latent = {"samples": torch.randn(2, 4, *SIZE, generator=torch.manual_seed(0)), "noise_mask": mask}
    result = run(blend(guider(0), guider(5)), latent)
    assert result.shape == (2, 4, *SIZE) and (result - latent["samples"])[..., 4:].abs().max() < 1e-4
    assert (result - latent["samples"])[..., :4].abs().max() > 0.1


def test_cancelling_leaves_nothing_behind():
    before = run(guider(0)), run(guider(5))
    model = personal_model().clone()

    def stop(apply, args):
        raise comfy.model_management.InterruptProcessingException

    model.set_model_unet_function_wrapper(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(blend(guider(0), guider(model=model)))
    assert same(run(guider(0)), before[0]) and same(run(guider(5)), before[1])


# ---------------------------------------------------------------- the swap


def reference(seed=3, conditioning=None, steps=STEPS, size=SIZE, name="sd15-small", batch=1):
    samples = torch.cat([image_latent(seed + row, size=size)["samples"] for row in range(batch)])
    return InvertImage.execute(
        random_model(name), {"samples": samples}, sigmas(steps, random_model(name)), conditioning or words(9, name=name)
    ).args[0]


def layout(seed=1, **settings):
    return record(seed, **settings)


def test_layouts_with_and_without_a_noise_mask():
    """Each goes on with its own: one without may change everywhere."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    plain, masked = (
        record(seed=seed, latent=image_latent() | more) for seed, more in ((1, {}), (2, {"noise_mask": mask}))
    )
    both = {"samples": torch.cat([plain["samples"], masked["samples"]])}
    made = swap(both)[1]["noise_mask"]
    assert made.shape[0] == 2 and made[0].min() == 1 and 0 == made[1].min() < made[1].max()


def swap(source=None, subject=None, layout_end=0.25, mask_start=0.5, end=1.0, sites="u@1-2", model=None, **optional):
    """(MODEL, LATENT)"""
    return MultiSourceSwap.execute(
        model or random_model("sd15-small"),
        source or layout(),
        subject or reference(),
        layout_end,
        mask_start,
        end,
        sites,
        **optional,
    ).args


def retouch(*sources, seed=7, positive=None, **settings):
    node = {
        key: settings.pop(key)
        for key in (
            "layout_end",
            "mask_start",
            "end",
            "sites",
            "model",
            "mask",
            "running_mask",
            "layout_prompt",
            "reference_prompt",
        )
        if key in settings
    }
    return sample(*swap(*sources, **node), seed=seed, positive=positive or words(2), **settings)["samples"]


OBJECT = torch.zeros(1, *SIZE)
OBJECT[:, 2:6, 2:6] = 1


def test_nothing_at_zero_is_the_plain_run():
    """Law of every patching node: with its windows empty, bit for bit."""
    model = random_model("sd15-small")
    plain = sample(model, empty(), seed=7)["samples"]
    patched, latent = swap(layout_end=0.0, end=0.0, mask=OBJECT)
    assert same(sample(patched, latent, seed=7)["samples"], plain)
    retouch(mask=OBJECT)
    assert same(sample(model, empty(), seed=7)["samples"], plain)


@pytest.mark.parametrize("mask", [None, OBJECT])
def test_all_of_the_schedule_from_the_layout_is_the_layout(mask):
    """Lambda 2 = T: nothing is computed, and the result is the layout."""
    source, subject = layout(), reference()
    model = random_model("sd15-small")
    count = evaluations_of(
        model, lambda: close(retouch(source, subject, layout_end=1.0, mask=mask), source["samples"], 0)
    )
    assert count == 0


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "euler_ancestral"])
def test_the_target_begins_on_the_layout(sampler):
    """Lambda 2 steps in, z_t is z_o, whatever the target's prompt and seed, and the steps before were not computed."""
    source, subject = layout(sampler=sampler), record(4, sampler=sampler)
    (stream,) = streams_of("test", [source])
    model, latent = swap(source, subject, layout_end=0.5)
    sigma = stream.run.sigmas[2]
    visit = stream.run.visit_that_continues(sigma)
    expected = stream.run.evaluations[sigma, visit, 0].x
    assert visit == {"heun": 1}.get(sampler, 0)
    started, latent_image, schedule = start_of(model, latent, sampler)
    assert schedule[0] == sigma and len(schedule) == STEPS - 1
    close(latent_image * random_model("sd15-small").model.latent_format.scale_factor + started * sigma, expected, 1e-6)


def start_of(model, latent, sampler):
    """(noise, latent image, sigmas) with which a run of KSampler begins."""
    seen = []
    watched = model.clone()
    watched.add_wrapper_with_key(
        WrappersMP.SAMPLER_SAMPLE,
        "test",
        lambda executor, guide, sigmas, extra, callback, noise, image, *rest: (
            seen.append((noise, image, sigmas)),
            executor(guide, sigmas, extra, callback, noise, image, *rest),
        )[1],
    )
    sample(watched, latent, seed=7, positive=words(2), sampler=sampler)
    return seen[0]


def test_what_the_skipped_steps_rest_on():
    """From the layout's noise, with Q, K and V of the layout in every self- and cross-attention (so, with what those
    give), a target of any other prompt is the layout: the steps before layout_end need no computing."""
    given = {}

    def model(keep):
        patched = random_model("sd15-small").clone()

        def attend(kind, q, k, v, extra):
            key = kind, *extra["block"], extra["block_index"], float(extra["sigmas"][0])
            if keep:
                given[key] = optimized_attention(q, k, v, extra["n_heads"])
            return given[key]

        for site in sites_of(patched):
            patched.set_model_attn1_replace(partial(attend, 1), *site)
            patched.set_model_attn2_replace(partial(attend, 2), *site)
        return patched

    laid = sample(model(True), empty())["samples"]
    assert same(sample(model(False), empty(), positive=words(2), negative=words(3))["samples"], laid)
    assert (
        sample(random_model("sd15-small"), empty(), positive=words(2), negative=words(3))["samples"] - laid
    ).abs().max() > 0.1


def test_a_target_fed_with_the_layout_alone_is_the_layout():
    """M = 0 everywhere and always, at all sites, and the layout's prompt."""
    source = layout()
    close(
        retouch(
            source,
            reference(),
            layout_end=0.0,
            mask_start=0.0,
            sites="all",
            mask=torch.zeros(1, *SIZE),
            positive=words(1),
        ),
        source["samples"],
        2e-3,
    )


def test_mask_of_nothing_and_of_everything():
    """M = 0 everywhere, from the first step, in all layers: the target's self-attention is the layout's. M = 1: no
    blending.
    """
    source, subject = layout(), reference()
    everything = {"layout_end": 0.0, "mask_start": 0.0, "sites": "all"}
    close(retouch(source, subject, **everything, mask=torch.ones(1, *SIZE)), retouch(source, subject, **everything))
    nothing = retouch(source, subject, **everything, mask=torch.zeros(1, *SIZE))
    assert (nothing - retouch(source, subject, **everything)).abs().max() > 0.05


def test_a_mask_blends_each_place_by_its_weight():
    """Equation 4 at one site, against the attentions written out."""
    generator = torch.Generator().manual_seed(0)
    n, r, o = (torch.randn(1, 64, 32, generator=generator) for _ in range(3))
    mask = torch.rand(2, *SIZE, generator=generator) * OBJECT
    recipe = FromBoth(Window(0, 1, ()), [None], [None], ObjectMask(mask))
    terms = recipe.attend(None, TargetRows(*[n.expand(1, 2, -1, -1)] * 3), [r[None], o[None]], SIZE)
    q, k, v, split = pack(terms, 2, 64)
    found = split.attend(q, k, v, lambda q, k, v, *_: optimized_attention(q, k, v, 4))
    weight = mask.flatten(1)[..., None]
    target, source = optimized_attention(n, r, r, 4), optimized_attention(o, o, o, 4)
    close(found, weight * target + (1 - weight) * source, 1e-5)
    assert q.shape[1] == 16 + 64 and torch.equal(terms[0].rows, OBJECT.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("end, last", [(1.0, 5), (0.8, 2)])
def test_where_and_when_the_sources_are_read(end, last):
    """The reference in u@1-2 from layout_end to end, the layout from mask_start on; streams that are not read cost
    nothing.
    """
    steps = 10
    model = random_model("sd15-small")
    patched, latent = swap(layout(steps=steps), reference(steps=steps), 0.2, 0.6, end, mask=OBJECT)
    counts = Counter()
    for sigma, rows in evaluations(model, lambda: sample(patched, latent, steps=steps)):
        counts[sigma] += rows
    # Target 2; reference 1, since both of its halves have one prompt; layout 2.
    assert [counts[sigma] for sigma in sigmas(steps).tolist()[:-1]] == [0, 0, 3, 3, 3, 3, 5, 5, last, last]


def test_evaluations_of_the_whole_method():
    """350 UNet evaluations for 50 steps, 70 for 10. With a photo that was inverted with the prompt it is read with,
    whose halves are one, 310 and 62."""
    steps = 10

    def whole(**optional):
        subject = InvertImage.execute(personal_model(), image_latent(), sigmas(steps), words(9)).args[0]
        model, latent = recorder(personal_model())
        laid = sample_custom(latent, blend(guider(0, 1), guider(prompt=2, model=model), 0.1), sigmas(steps))[0]
        sample(
            *swap(laid, subject, 0.2, 0.6, mask=OBJECT, model=personal_model(), **optional),
            steps=steps,
            positive=words(2),
        )

    def count(**optional):
        return (
            evaluations_of(
                plain_model(), lambda: found.append(evaluations_of(personal_model(), lambda: whole(**optional)))
            )
            + found.pop()
        )

    found = []
    assert count(reference_prompt=words(4)) == 20 + 10 + 4 * 4 + 4 * 6
    assert count() == 20 + 10 + 4 * 3 + 4 * 5


def test_the_sources_are_what_they_are_without_us():
    """The reference's and the layout's rows as in an unpatched run: what a composite of them alone shows (0.0 in
    test_composite), and here in that a cache, taken from their own runs, gives the same as replaying them."""
    subject = reference()
    replayed = retouch(layout(), subject, mask=OBJECT)
    close(retouch(layout(cache_mb=64), subject, mask=OBJECT), replayed)


def test_the_reference_is_felt_and_its_prompt_too():
    source, subject = layout(), reference()
    one = retouch(source, subject)
    assert (one - retouch(source, reference(8))).abs().max() > 0.01
    assert (one - retouch(source, subject, reference_prompt=words(5))).abs().max() > 1e-3
    close(one, retouch(source, subject, reference_prompt=words(9)))
    masked = retouch(source, subject, mask=OBJECT, mask_start=0.25)
    assert (masked - retouch(source, subject, mask=OBJECT, mask_start=0.25, layout_prompt=words(5))).abs().max() > 1e-3
    close(masked, retouch(source, subject, mask=OBJECT, mask_start=0.25, layout_prompt=words(1)))


def test_separate_calls_are_the_same(monkeypatch):
    source, subject = layout(), reference()
    together = retouch(source, subject, mask=OBJECT)
    low_memory(monkeypatch)
    close(retouch(source, subject, mask=OBJECT), together, 1e-4)


def test_a_batch_of_layouts():
    """N layouts for N images, with masks of their own; each as if alone."""
    both, subject = layout(latent=empty(2)), reference()
    masks = torch.stack([OBJECT[0], 1 - OBJECT[0]])
    result = retouch(both, subject, mask=masks)
    assert result.shape[0] == 2
    for row in range(2):
        alone = {**both, "samples": both["samples"][row : row + 1]}
        close(retouch(alone, subject, mask=masks[row : row + 1]), result[row : row + 1], 1e-4)
    close(retouch(both, reference(batch=2), mask=masks)[:1], result[:1], 1e-4)


@pytest.mark.parametrize("name, size", [("sd2-small", (8, 8)), ("sdxl-small", (8, 8)), ("sd15-small", (9, 14))])
def test_structures_and_odd_sizes(name, size):
    model = random_model(name)
    laid = sample(*recorder(model, empty(size=size)), positive=words(1, name=name), negative=words(99, name=name))
    mask = torch.zeros(1, 8 * size[0], 8 * size[1])
    mask[:, :30] = 0.7
    patched, latent = swap(
        laid, reference(size=size, name=name), model=model, mask=mask, reference_prompt=words(4, name=name)
    )
    result = sample(patched, latent, positive=words(2, name=name), negative=words(99, name=name))["samples"]
    assert result.shape == (1, 4, *size) and torch.isfinite(result).all()


def test_a_layout_of_two_models_is_followed_from_where_the_second_began():
    personal = personal_model()
    model, latent = recorder(personal)
    laid = sample_custom(latent, blend(guider(0, 1), guider(prompt=2, model=model), 0.5), sigmas())[0]
    result = retouch(laid, reference(), layout_end=0.5, model=personal, mask=OBJECT, mask_start=0.5)
    assert torch.isfinite(result).all() and not same(result, laid["samples"])
    with pytest.raises(
        ValueError, match="another model made the layout up to 0.5 of its schedule.*Set layout_end to 0.5 or more"
    ):
        retouch(laid, reference(), layout_end=0.25, model=personal)
    model, latent = recorder(plain_model())
    begun = sample_custom(latent, blend(guider(prompt=1, model=model), guider(5, 2), 0.5), sigmas())[0]
    with pytest.raises(
        ValueError,
        match="the layout was recorded over 2 of its 4 steps. Put Feature Recorder on the MODEL that finishes it",
    ):
        swap(begun, model=personal)


def test_a_picture_as_layout():
    """A layout that was inverted: the target begins at its latent, and M = 0 in all layers keeps it."""
    source = reference(4, words(1))
    close(retouch(source, reference(), layout_end=1.0), source["samples"], 0)
    assert torch.isfinite(retouch(source, reference(), mask=OBJECT, layout_prompt=words(1))).all()


def test_a_running_mask(monkeypatch):
    """It is what Adaptive Mask Blend would give for the map of each step; no words at all is no object."""
    clip = text_encoder()
    source, subject = layout(), reference()
    rule = AdaptiveMaskBlend.execute(0.1, 0.01, "or", sam_mask=OBJECT).args[1]
    model, latent = swap(source, subject, running_mask=rule)
    with pytest.raises(ValueError, match="a running mask needs Token Attention Map"):
        sample(model, latent)
    measured, latent, positive = TokenAttentionMap.execute(model, latent, clip, "a red cat", "cat", "d@2-4,u@2-4").args
    made, adaptive = [], kernel.adaptive
    monkeypatch.setattr(kernel, "adaptive", lambda *args: (made.append(args), adaptive(*args))[1])
    result = sample(measured, latent, positive=positive)["samples"]
    assert len(made) == 2 and not torch.equal(made[0][0], made[1][0])  # once a step, of the map as it is by then
    none = AdaptiveMaskBlend.execute(1.0, 1.0, "cross").args[1]
    model, latent = swap(source, subject, running_mask=none)
    measured, latent, positive = TokenAttentionMap.execute(model, latent, clip, "a red cat", "cat", "d@2-4,u@2-4").args
    nothing = sample(measured, latent, positive=positive)["samples"]
    assert (nothing - result).abs().max() > 1e-3
    close(nothing, retouch(source, subject, positive=positive, mask=torch.zeros(1, *SIZE)))
    all_of_it = AdaptiveMaskBlend.execute(0.0, 0.0, "cross").args[1]
    model, latent = swap(source, subject, running_mask=all_of_it)
    measured, latent, positive = TokenAttentionMap.execute(model, latent, clip, "a red cat", "cat", "d@2-4,u@2-4").args
    close(sample(measured, latent, positive=positive)["samples"], retouch(source, subject, positive=positive))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": torch.zeros(3, *SIZE)}, "3 masks for 1 layouts"),
        ({"sites": "x9"}, "Multi Source Swap: sites: "),
        ({"mask": OBJECT, "running_mask": object()}, "mask and running_mask are both connected"),
        (
            {"subject": {"steps": 3}},
            (
                "the layout was recorded over 4 steps .* and the reference over 3 steps .* Sample all of them with"
                " the same scheduler"
            ),
        ),
        ({"subject": {"batch": 2}}, "2 references for 1 layouts"),
        ({"source": empty()}, "Multi Source Swap: layout: latent 0 was not recorded"),
        (
            {"model": random_model("sdxl-small")},
            "the MODEL is SDXL and a recording was made with SD15. Use models of one family",
        ),
        ({"running_mask": LiveMask(torch.zeros(3, *SIZE), 0.1, 0.01, "or")}, "3 masks for 1 layouts"),
    ],
)
def test_what_does_not_fit(change, message):
    if isinstance(change.get("subject"), dict):
        change = {**change, "subject": reference(**change["subject"])}
    with pytest.raises(ValueError, match=message):
        swap(**change)


def test_a_photo_is_not_followed_where_its_history_has_no_evaluation():
    with pytest.raises(
        ValueError, match=r"As sampler, use one of a single evaluation a step \(euler, ddim, dpmpp_2m\)"
    ):
        retouch(layout(sampler="heun"), reference(), sampler="heun")


# ---------------------------------------------------------------- the mask's node


def test_the_adaptive_mask_of_a_finished_map():
    model, latent, positive = TokenAttentionMap.execute(
        random_model("sd15-small"), empty(2), text_encoder(), "a red cat", "cat", "d@2-4,u@2-4"
    ).args
    latent = sample(model, latent, positive=positive)
    mask, _, pictures = AdaptiveMaskBlend.execute(0.3, 0.01, "or", latent).args
    assert mask.shape == (2, 64, 64) and pictures.shape == (12, 64, 64, 3)
    assert torch.equal(pictures[11, ..., 0], mask[1]) and mask.min() >= 0 and mask.max() == 1
    found = torch.stack([list(run.maps.values())[0][row] for run, row in streams_of("test", [latent])])
    assert torch.allclose(
        torch.nn.functional.adaptive_avg_pool2d(pictures[0::6, ..., 0][:, None], 4)[:, 0], found, atol=0.2
    )
    segmented, _, _ = AdaptiveMaskBlend.execute(0.3, 0.01, "or", latent, torch.ones(1, 32, 32)).args
    assert segmented.shape == (2, 32, 32) and (segmented >= 0.5).all()
    with pytest.raises(ValueError, match="3 sam_masks for 2 images"):
        AdaptiveMaskBlend.execute(0.3, 0.01, "or", latent, torch.ones(3, 32, 32))
    with pytest.raises(ValueError, match="the latent carries no map"):
        AdaptiveMaskBlend.execute(0.3, 0.01, "or", record())
    with pytest.raises(
        ValueError, match="Adaptive Mask Blend: sam_mask is 48x32 and the picture 64x64, another aspect"
    ):
        AdaptiveMaskBlend.execute(0.3, 0.01, "or", latent, torch.ones(1, 32, 48))
    assert torch.equal(AdaptiveMaskBlend.execute(0.3, 0.01, "or").args[0], torch.zeros(1, 64, 64))
    assert AdaptiveMaskBlend.execute(0.3, 0.01, "sam", sam_mask=torch.ones(3, 32, 48)).args[0].shape == (3, 32, 48)
    for mode in ("and", "sam"):
        with pytest.raises(ValueError, match=f'Adaptive Mask Blend: mode "{mode}" needs sam_mask'):
            AdaptiveMaskBlend.execute(0.3, 0.01, mode, latent)
