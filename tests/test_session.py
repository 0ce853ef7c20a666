"""A sampling run from its beginning to its end, where another node, the guider or the user does what few do."""

import gc
import weakref

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from comfy_extras.nodes_custom_sampler import CFGGuider, Noise_RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_perpneg import PerpNegGuider

from montage.nodes.layout_retouch import MultiSourceSwap, StepBlendSampler
from montage.nodes.photomontage import keys_of
from montage.nodes.record import InvertImage
from montage.patching import recorder as recorders
from montage.patching.streams import streams_of
from montage.workshop.random_models import random_model
from montage.workshop.sampling import (
    CFG,
    MIXED,
    NEGATIVE,
    STROKES,
    close,
    compose,
    cut,
    empty,
    halves,
    image_latent,
    inject,
    masks_of,
    pictures,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_custom,
    schedule,
    two,
    words,
)

ALL_BASE = masks_of(torch.zeros_like(halves()), 2)


def guided(model, latent, seed, positive, sigmas=None, kind=comfy.samplers.CFGGuider):
    guider = kind(model)
    guider.set_conds(positive, NEGATIVE)
    guider.set_cfg(CFG)
    return sample_custom(latent, guider, schedule(model) if sigmas is None else sigmas, seed)[0]


# ---------------------------------------------------------------- at which sigma it is


def test_evaluations_that_another_node_leaves_out_are_not_counted():
    """Outside of this pack's wrappers, where only some of the sampler's evaluations arrive."""
    asked = []

    def every_second(execute, x, timestep, options, seed):
        asked.append(float(timestep[0]))
        return execute(x, timestep, options, seed) if len(asked) % 2 else x

    model = random_model("sd15-small").clone()
    model.add_wrapper_with_key("predict_noise", "other", every_second)
    assert [key[0] for key in run_of(record(model=model)).evaluations] == asked[::2]


class Shifting(comfy.samplers.CFGGuider):
    def __call__(self, x, sigma, **kwargs):
        return super().__call__(x, sigma * 0.9, **kwargs)


class Twice(comfy.samplers.CFGGuider):
    """Evaluates the model twice in a step."""

    def __call__(self, *args, **kwargs):
        return (super().__call__(*args, **kwargs) + super().__call__(*args, **kwargs)) / 2


class Sparing(comfy.samplers.CFGGuider):
    """Leaves out every second evaluation."""

    last = None

    def __call__(self, *args, **kwargs):
        self.last = super().__call__(*args, **kwargs) if self.last is None else None
        return args[0] if self.last is None else self.last


class Older(comfy.samplers.CFGGuider):
    """Calls the sampler as ComfyUI did before it had wrappers around samplers."""

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **_
    ):
        extra = {"model_options": self.model_options, "seed": seed}
        given = noise, self.conds, device, latent_image, denoise_mask, seed
        self.conds = comfy.samplers.process_conds(self.inner_model, *given)
        return sampler.sample(self, sigmas.to(device), extra, callback, noise, latent_image, denoise_mask, disable_pbar)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("kind, steps", [(Twice, [0, 0, 1, 1, 2, 2, 3, 3]), (Sparing, [0, 2]), (Older, [0, 1, 2, 3])])
def test_guiders_that_do_not_evaluate_once_a_step(kind, steps, sampler):
    model, latent = recorder()
    guider = kind(model)
    guider.set_conds(words(1), NEGATIVE)
    output, _ = sample_custom(latent, guider, schedule(model), 1, sampler)
    run = run_of(output)
    assert [key[0] for key in run.evaluations] == [run.sigmas[step] for step in steps]


def test_sigmas_that_change_unseen_are_an_error():
    """Not a recording that says other sigmas than the model met."""
    model, latent = recorder()
    with pytest.raises(RuntimeError, match="another node changes the sigmas at which euler.*dpmpp_2m"):
        guided(model, latent, 1, words(1), kind=Shifting)
    guider = Shifting(model)
    guider.set_conds(words(1), NEGATIVE)
    sample_custom(latent, guider, schedule(model), 1, "dpmpp_2m")


def test_a_churning_euler_is_read():
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 10.0})
    model, latent = recorder()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(words(1), NEGATIVE)
    output = SamplerCustomAdvanced.execute(Noise_RandomNoise(1), guider, sampler, schedule(model), latent).args[0]
    met = [key[0] for key in run_of(output).evaluations]
    assert all(high > planned for high, planned in zip(met, schedule(model).tolist()))


# ---------------------------------------------------------------- what changes from step to step


def stronger(n, k, v, extra):
    return n * 1.5, k, v


def patched_late(execute, x, timestep, options, seed):
    """A PREDICT_NOISE wrapper of another pack, which patches the attention in the last steps alone."""
    if float(timestep[0]) < 5:
        options = create_model_options_clone(options)
        patches = options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), stronger]
    return execute(x, timestep, options, seed)


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_options_that_change_from_step_to_step_are_replayed(cache_mb):
    model = random_model("sd15-small").clone()
    model.add_wrapper_with_key("predict_noise", "other", patched_late)
    a, b = two(model=model, cache_mb=cache_mb)
    assert len(run_of(a).options) == 2
    close(compose([a, b], ALL_BASE, model=model, positive=words(1)), a["samples"])


def test_equal_options_are_kept_once():
    assert len(run_of(record()).options) == 1


# ---------------------------------------------------------------- guiders and schedules


class PastPredictNoise(comfy.samplers.CFGGuider):
    def __call__(self, x, timestep, model_options={}, seed=None):  # noqa: B006  ComfyUI's
        conds = (self.conds["negative"], self.conds["positive"])
        return comfy.samplers.sampling_function(self.inner_model, x, timestep, *conds, self.cfg, model_options, seed)


def test_a_guider_whose_steps_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="Feature Recorder: PastPredictNoise, or a node on this MODEL, evaluates"):
        guided(*recorder(), 1, words(1), kind=PastPredictNoise)
    with pytest.raises(ValueError, match="Composite Attention Inject: PastPredictNoise"):
        guided(*inject(two(), MIXED), 1, words(1), kind=PastPredictNoise)


def test_a_schedule_of_doubles():
    """Evaluations are known by the sigma that the model is shown, which is a float32."""
    model = random_model("sd15-small")
    sigmas = schedule(model).double() * 0.9123456789
    a, b = (guided(*recorder(model), seed, words(seed), sigmas) for seed in (1, 2))
    assert all(sigma in run_of(a).sigmas for sigma, _, _ in run_of(a).evaluations) and run_of(a).keys
    model_of_composite, start = inject([a, b], ALL_BASE, model=model)
    close(guided(model_of_composite, start, 7, words(1), sigmas)["samples"], a["samples"])
    cut([a, b], pictures(1, 2), STROKES)
    guided(*MultiSourceSwap.execute(model, a, b, 0.5, 0.5, 1.0, "u@1-2").args, 1, words(1), sigmas)
    inverted = InvertImage.execute(model, image_latent(), sigmas, words(5)).args[0]
    guided(*inject([inverted, inverted], ALL_BASE, model=model), 1, words(5), sigmas)


def test_the_graph_cut_reads_the_halves_of_cfg():
    model = random_model("sd15-small")
    measured, latent = recorder(model)
    guider = PerpNegGuider.execute(measured, words(1), NEGATIVE, words(8), 7.0, 1.0).args[0]
    (stream,) = streams_of("test", [sample_custom(latent, guider, schedule(model))[0]])
    found = {half.role: keys for half, keys in stream.run.keys.items()}
    assert len(found) == 3
    assert all(map(same, keys_of(stream), (found["positive"][0], found["negative"][0])))


def test_images_of_two_kinds_of_model_are_not_cut():
    other = sample(
        *recorder(random_model("sdxl-small")),
        positive=words(2, name="sdxl-small"),
        negative=words(9, name="sdxl-small"),
    )
    with pytest.raises(ValueError, match="Graph Cut Montage: image 0 was recorded with SD15 and image 1 with SDXL"):
        cut([record(), other], pictures(1, 2), STROKES)


def test_a_run_of_which_the_first_steps_were_recorded_is_refused_before_sampling():
    model, evaluations = random_model("sd15-small"), []
    stack = []
    for seed in (1, 2):
        measured, latent = recorder(model)
        guiders = [CFGGuider.execute(one, words(1), NEGATIVE, CFG).args[0] for one in (measured, model)]
        blend = StepBlendSampler.execute(*guiders, 0.5, 0.0).args[0]
        stack.append(sample_custom(latent, blend, schedule(model), seed)[0])
    composing, latent = inject(stack, MIXED)
    composing.add_wrapper_with_key("predict_noise", "seen", lambda execute, *args: evaluations.append(execute(*args)))
    with pytest.raises(ValueError, match="2 of its 4 steps were not recorded"):
        sample(composing, latent)
    assert not evaluations


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0, 1.3, 2.0])
def test_composing_on_the_recorders_own_model(share):
    """Its budget, however full, does not take from the images what the composite is about to read."""
    one = run_of(record(cache_mb=64)).feature_bytes
    model, latent = recorder()
    latent["montage"].budget = int(share * one)
    a, b = (sample(model, latent, seed, words(seed)) for seed in (1, 2))
    made = sample(*inject([a, b], MIXED, model=model), positive=words(1))["samples"]
    close(made, compose([a, b], MIXED, positive=words(1)))


def test_a_cancelled_recording_holds_no_features(monkeypatch):
    runs, original = [], recorders.Recorder.__init__

    def begin(self, run, *args):
        runs.append(weakref.ref(run))
        original(self, run, *args)

    def stop(execute, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return execute(*args, **kwargs)

    calls: list[None] = []
    monkeypatch.setattr(recorders.Recorder, "__init__", begin)
    model = random_model("sd15-small").clone()
    model.add_wrapper_with_key("diffusion_model", "stop", stop)
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(*recorder(model, empty(), 64))
        assert runs and all(run() is None or not run().feature_bytes for run in runs)
    finally:
        gc.enable()
