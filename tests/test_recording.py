"""Recording: what a LATENT with a history holds, and that it is always its own."""

import gc
import logging
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider

from montage.patching import install, streams
from montage.patching.internals import KEY
from montage.patching.models import Site
from montage.patching.streams import LATENT_KEY, CondRole, streams_of
from montage.workshop.random_models import control_net, random_model
from montage.workshop.sampling import (
    CFG,
    NEGATIVE,
    SAMPLERS,
    SIZE,
    STEPS,
    compose,
    empty,
    halves,
    low_memory,
    masks_of,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_advanced,
    sample_custom,
    stack,
    words,
)
from nodes import LatentFromBatch

UNCOND, COND = CondRole("negative", 0), CondRole("positive", 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recording_changes_nothing_and_loses_nothing(sampler):
    """Every evaluation has its own record, also where a sampler visits a sigma twice."""
    calls = []
    model = random_model("sd15-small").clone()
    model.add_wrapper_with_key(
        WrappersMP.PREDICT_NOISE, "test", lambda executor, *args: (calls.append(float(args[1][0])), executor(*args))[1]
    )
    plain = sample(model, empty(), sampler=sampler)["samples"]
    expected, calls[:] = list(calls), []
    recorded = record(model=model, sampler=sampler, cache_mb=64)
    assert same(recorded["samples"], plain)
    run = run_of(recorded)
    assert [sigma for sigma, *_ in run.evaluations] == expected == calls
    assert len(run.evaluations) == len(expected)
    assert all(len(e.features) == 2 * 16 for e in run.evaluations.values())


def test_heun_records_the_same_with_split_and_batched_halves(monkeypatch):
    together = run_of(record(sampler="heun", cache_mb=64))
    low_memory(monkeypatch)
    apart = run_of(record(sampler="heun", cache_mb=64))
    assert together.evaluations.keys() == apart.evaluations.keys()
    for key, evaluation in together.evaluations.items():
        assert evaluation.features.keys() == apart.evaluations[key].features.keys()
        for name, n in evaluation.features.items():
            torch.testing.assert_close(n, apart.evaluations[key].features[name], rtol=0, atol=5e-3)


def test_a_batch_is_as_many_streams_and_a_picked_row_finds_its_own():
    recorded = record(latent=empty(3), cache_mb=64)
    streams = streams_of("test", [recorded])
    assert [s.row for s in streams] == [0, 1, 2] and len({s.run for s in streams}) == 1
    (row,) = LatentFromBatch().frombatch(recorded, 1, 1)
    assert streams_of("test", [row]) == [streams[1]]


def test_several_recordings_join_into_one_stack():
    first, second = record(seed=1, latent=empty(2)), record(seed=2)
    streams = streams_of("test", [first, second])
    assert [s.row for s in streams] == [0, 1, 0] and streams[0].run is not streams[2].run


def test_a_new_seed_pairs_with_its_own_run_and_the_old_one_is_still_found():
    model, latent = recorder(cache_mb=64)
    old = sample(model, latent, seed=1)
    new = sample(model, latent, seed=2)
    for result, seed in ((old, 1), (new, 2)):
        (stream,) = streams_of("test", [result])
        assert same(stream.run.final, sample(random_model("sd15-small"), empty(), seed=seed)["samples"])
    assert all(e.features for e in run_of(old).evaluations.values())  # both are within the budget
    assert all(e.features for e in run_of(new).evaluations.values())


def test_every_run_of_a_recorder_is_held_and_the_budget_is_of_all_together():
    model, latent = recorder(cache_mb=64)
    size = run_of(sample(model, latent)).feature_bytes
    latent[LATENT_KEY].budget = int(2.5 * size)
    results = [sample(model, latent, seed=seed) for seed in range(2, 12)]
    assert len({id(run_of(result)) for result in results}) == 10
    kept = [bool(run_of(result).feature_bytes) for result in results]
    assert kept == [False] * 8 + [True] * 2  # the oldest lose their features first


def test_trajectories_are_bounded(monkeypatch):
    model, latent = recorder()
    first = sample(model, latent, seed=1001)
    monkeypatch.setattr(streams, "TRAJECTORIES", 2 * run_of(first).trajectory_bytes)
    later = [sample(model, latent, seed=seed) for seed in (1002, 1003)]
    assert [run_of(result).images for result in later] == [1, 1]
    with pytest.raises(ValueError, match="its recorder holds 2 runs and none ends in it"):
        streams_of("Node", [first])


@pytest.mark.parametrize(
    "change", [lambda s: s * 1.1, lambda s: s.flip(-1), lambda s: torch.nn.functional.interpolate(s, scale_factor=2)]
)
def test_a_changed_latent_is_refused(change):
    recorded = record()
    changed = {**recorded, "samples": change(recorded["samples"])}
    with pytest.raises(ValueError, match="Node: row 0 of latent 0 .* is not the result of a recorded run"):
        streams_of("Node", [changed])


def test_an_unrecorded_latent_is_refused():
    with pytest.raises(ValueError, match="Node: latent 1 was not recorded. Connect MODEL and LATENT of a Feature"):
        streams_of("Node", [record(), empty()])


def test_the_model_that_came_in_stays_unpatched():
    model = random_model("sd15-small")
    before = sample(model, empty())["samples"]
    options = str(model.model_options), str(model.wrappers), str(model.attachments)
    a, b = record(seed=1, cache_mb=64), record(seed=2, cache_mb=64)
    compose([a, b], masks_of(halves()))
    assert (str(model.model_options), str(model.wrappers), str(model.attachments)) == options
    assert same(sample(model, empty())["samples"], before)


def test_the_budget_decides_what_is_kept_and_the_log_says_it_once(caplog):
    caplog.set_level(logging.INFO)
    everything = run_of(record(cache_mb=64))
    size = everything.evaluation_bytes
    model, latent = recorder(cache_mb=0)
    latent[LATENT_KEY].budget = int(2.5 * size)
    part = run_of(sample(model, latent))
    assert [bool(e.features) for e in part.evaluations.values()] == [True, True, False, False]
    latent[LATENT_KEY].budget = size - 1
    none = run_of(sample(model, latent, seed=5))
    assert not any(e.features for e in none.evaluations.values())
    lines = [r.message for r in caplog.records if "Feature Recorder" in r.message]
    assert len(lines) == 3 and "features of 2 kept" in lines[1] and "features of 0 kept (0.0 MB)" in lines[2]


def test_the_budget_holds_at_every_moment(monkeypatch):
    """Inside an evaluation too, and the old run's features together with those of the new one."""
    everything = run_of(record(cache_mb=64))
    model, latent = recorder(cache_mb=0)
    recording, held = latent[LATENT_KEY], []
    evaluations = weakref.WeakSet()

    class Watched(streams.Evaluation):
        def __init__(self, *given):
            super().__init__(*given)
            evaluations.add(self)

    monkeypatch.setattr("montage.patching.recorder.Evaluation", Watched)
    model.set_model_attn1_patch(lambda *args: held.append(sum(one.bytes for one in evaluations)) or args[:3])
    for budget in (2.5, 0.9, 1.5):
        recording.budget = int(budget * everything.evaluation_bytes)
        held.clear()
        sample(model, latent, seed=int(10 * budget))
        assert len(held) > 16 * STEPS / 2 and max(held) <= recording.budget


def test_cached_features_are_a_third_of_q_k_and_v():
    run = run_of(record(cache_mb=64))
    q_k_v = (
        3
        * 2
        * sum(tokens * channels for tokens, channels in [(64, 32)] * 5 + [(16, 32)] * 5 + [(4, 64)] * 5 + [(1, 64)])
        * 4
    )
    assert run.evaluation_bytes * 3 == q_k_v


def test_keys_are_those_of_the_last_evaluation():
    """K of the first layer at the lowest sigma, the same when the run is repeated."""
    seen = []
    model = random_model("sd15-small").clone()

    def watch(q, k, v, extra):
        seen.append((float(extra["sigmas"][0]), extra["cond_or_uncond"], k))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    model.set_model_attn1_replace(watch, "input", 1)
    run = run_of(record(model=model))
    sigma, roles, k = seen[-1]
    assert sigma == min(s for s, *_ in seen) and roles == [1, 0]
    assert same(run.keys[UNCOND], k[:1]) and same(run.keys[COND], k[1:])
    assert run.keys_grid == SIZE and not same(seen[0][2], k)
    assert same(run_of(record(model=model)).keys[COND], run.keys[COND])


def test_a_patch_that_writes_into_its_input_does_not_reach_the_recording():
    model = random_model("sd15-small").clone()
    model.set_model_attn1_patch(lambda n, k, v, extra: (n.mul_(1.3), k, v))
    first = run_of(record(model=model, cache_mb=64)), run_of(record(cache_mb=64))
    site = (COND, Site("input", 1, 0))  # the first block: what comes before it is the same
    a, b = (run.evaluations[run.sigmas[0], 0, 0].features[site] for run in first)
    assert same(a, b)


def test_cfg_one_records_the_half_that_was_computed():
    run = run_of(record(cfg=1.0, cache_mb=64))
    assert {half for half, _ in next(iter(run.evaluations.values())).features} == {COND}
    assert set(run.conds) == {"positive", "negative"}  # a composite with CFG can still replay the other half


def test_prompts_of_different_length():
    recorded = record(positive=words(1, tokens=154), cache_mb=64)
    other = record(seed=2, positive=words(2, tokens=231), cache_mb=64)
    replayed = [record(positive=words(1, tokens=154)), record(seed=2, positive=words(2, tokens=231))]
    masks = masks_of(halves())
    torch.testing.assert_close(compose([recorded, other], masks), compose(replayed, masks), rtol=1e-4, atol=1e-3)


def test_ksampler_advanced_records_a_part_of_the_schedule():
    model, latent = recorder()
    result = sample_advanced(model, latent, end=2, leftover="enable")
    run = run_of(result)
    assert len(run.evaluations) == 2 and run.sigmas[-1] > 0


def test_sampler_custom_advanced_with_every_guider():
    model, latent = recorder(cache_mb=64)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    for guider, roles in (
        (BasicGuider.execute(model, words(1)).args[0], {"positive"}),
        (CFGGuider.execute(model, words(1), NEGATIVE, CFG).args[0], {"positive", "negative"}),
        (
            DualCFGGuider.execute(model, words(1), words(2), NEGATIVE, CFG, 3.0, "regular").args[0],
            {"positive", "middle", "negative"},
        ),
    ):
        output, denoised = sample_custom(latent, guider, sigmas)
        run = run_of(output)
        assert {half.role for half, _ in run.evaluations[run.sigmas[0], 0, 0].features} == roles
        assert run_of(denoised) is run


def test_controlnet_is_replayed():
    control = control_net()
    control.set_cond_hint(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), strength=1.0)

    def controlled(seed):
        text, extra = words(seed)[0]
        return [[text, {**extra, "control": control, "control_apply_to_uncond": True}]]

    plain = record(positive=words(1))["samples"]
    cached = [record(seed=s, positive=controlled(s), cache_mb=64) for s in (1, 2)]
    assert (cached[0]["samples"] - plain).abs().max() > 0.01  # it does something
    replayed = [record(seed=s, positive=controlled(s)) for s in (1, 2)]
    masks = masks_of(halves())
    from_cache = compose(cached, masks, positive=controlled(1))
    torch.testing.assert_close(compose(replayed, masks, positive=controlled(1)), from_cache, rtol=1e-4, atol=1e-3)
    # A composite without ControlNet replays its streams with theirs all the same.
    torch.testing.assert_close(compose(replayed, masks), compose(cached, masks), rtol=1e-4, atol=1e-3)
    assert same(compose(replayed, masks_of(torch.zeros(SIZE), 2), positive=controlled(1)), replayed[0]["samples"])


def test_a_stream_is_replayed_with_the_patches_of_its_own_model():
    def patched(scale):
        model = random_model("sd15-small").clone()
        model.set_model_attn2_output_patch(lambda n, extra: n * scale)
        return model

    masks = masks_of(halves())
    cached = [record(seed=s, model=patched(s), cache_mb=64) for s in (1, 2)]
    replayed = [record(seed=s, model=patched(s)) for s in (1, 2)]
    torch.testing.assert_close(
        compose(replayed, masks, model=patched(1)), compose(cached, masks, model=patched(1)), rtol=1e-4, atol=1e-3
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [Stopped, comfy.model_management.InterruptProcessingException])
def test_an_interrupt_leaves_nothing_behind(error, monkeypatch):
    sessions, evaluations = [], []
    original = install.Session.__init__
    monkeypatch.setattr(
        install.Session, "__init__", lambda self, *args: (sessions.append(weakref.ref(self)), original(self, *args))[1]
    )
    keep = streams.Evaluation.__init__
    monkeypatch.setattr(
        streams.Evaluation,
        "__init__",
        lambda self, *given: (evaluations.append(weakref.ref(self)), keep(self, *given))[1],
    )

    def interrupt(executor, *args, **kwargs):
        if len(evaluations) % STEPS == 3:
            raise error()
        return executor(*args, **kwargs)

    a, b = record(seed=1), record(seed=2)
    finished = len(evaluations)
    model = random_model("sd15-small").clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", interrupt)
    recording_model, latent = recorder(model, cache_mb=64)
    with pytest.raises(error):
        sample(recording_model, latent)
    assert latent[LATENT_KEY].runs == []
    with pytest.raises(error):
        compose([a, b], masks_of(halves()), model=recording_model)
    gc.collect()
    assert len(sessions) == 4 and not any(ref() for ref in sessions)
    assert len(evaluations) > finished and not any(ref() for ref in evaluations[finished:])
    assert KEY not in model.model_options["transformer_options"]
    plain = random_model("sd15-small")
    assert same(sample(plain, empty())["samples"], a["samples"])


def test_context_windows_and_areas_are_refused():
    model, latent = recorder(cache_mb=64)
    windowed = model.clone()
    windowed.model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="Feature Recorder: context windows .* Disconnect"):
        sample(windowed, latent)
    text, extra = words(1)[0]
    with pytest.raises(ValueError, match="use masks instead of areas"):
        sample(model, latent, positive=[[text, {**extra, "area": (4, 4, 0, 0)}], *words(2)])


def test_a_masked_conditioning_is_recorded():
    text, extra = words(1)[0]
    mask = torch.zeros(1, *SIZE)
    mask[:, :4] = 1
    positive = [[text, {**extra, "mask": mask, "set_area_to_bounds": False}], *words(2)]
    cached, replayed = (record(positive=positive, cache_mb=mb) for mb in (64, 0))
    other = record(seed=2)
    masks = masks_of(1 - halves())
    assert {half.number for half, _ in run_of(cached).evaluations[run_of(cached).sigmas[0], 0, 0].features} == {0, 1}
    torch.testing.assert_close(
        compose([cached, other], masks, positive=positive),
        compose([replayed, other], masks, positive=positive),
        rtol=1e-4,
        atol=1e-3,
    )


def test_conditioning_hooks_are_refused_before_a_replay():
    import comfy.hooks

    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.WeightHook())
    text, extra = words(1)[0]
    recorded = record()
    run_of(recorded).conds["positive"][0]["hooks"] = hooks
    with pytest.raises(ValueError, match="hooks on their conditioning"):
        compose([recorded, record(seed=2)], masks_of(halves()))


def test_stack_helper_names_inputs_as_comfyui_does():
    assert list(stack("a", "b")) == ["latent0", "latent1"]


def test_a_lora_by_injection_is_noticed():
    """Load LoRA Bypass leaves the weights as they are and acts beside them."""
    import comfy.sd

    def with_lora(strength):
        generator = torch.Generator().manual_seed(7)
        name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        parts = {f"{name}.lora_{part}.weight": torch.randn(32, 32, generator=generator) for part in ("up", "down")}
        return comfy.sd.load_bypass_lora_for_models(random_model("sd15-small"), None, parts, strength, 0.0)[0]

    a, b = (record(seed=seed, model=with_lora(0.5)) for seed in (81, 82))
    assert len(with_lora(0.5).injections) == 1
    with pytest.raises(ValueError, match="LoRA in bypass mode"):
        compose([a, b], masks_of(halves()))
    with pytest.raises(ValueError, match="image 0 was recorded with"):
        compose([a, b], masks_of(halves()), model=with_lora(0.9))
    assert torch.isfinite(compose([a, b], masks_of(halves()), model=with_lora(0.5))).all()
