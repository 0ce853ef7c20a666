"""DDIM inversion, and inverted pictures in a stack."""

import gc
import weakref

import comfy.model_management
import pytest
import torch

from montage.kernels import inversion
from montage.nodes.collage import CollageNoise
from montage.nodes.record import InvertImage
from montage.patching.attention_maps import TokenMap
from montage.patching.bias import Bias, attach
from montage.patching.install import install
from montage.patching.internals import KEY
from montage.patching.models import sites_of
from montage.patching.schedule import Window
from montage.patching.streams import LATENT_KEY, Recording, streams_of, with_prompt
from montage.workshop.collages import RED, canvas, layer, plain
from montage.workshop.random_models import build, random_model
from montage.workshop.sampling import (
    MIXED,
    NEGATIVE,
    SIZE,
    STEPS,
    STROKES,
    close,
    compose,
    cut,
    empty,
    evaluations_of,
    halves,
    image_latent,
    inject,
    invert,
    masks_of,
    pictures,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_advanced,
    words,
)


def test_the_recursion_is_the_official_one():
    """VP latents and timesteps against VE latents and sigmas, on a toy network in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    timesteps = [0] + list(range(1, 1000, 20))  # the image at abar[0], then 50 steps with an offset of 1
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3

    def network(x, t):
        return torch.tanh(x @ weight + t / 1000)

    x = image = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    official = [x]
    for t, following in zip(timesteps, timesteps[1:]):
        eps = network(x, following)
        x0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        x = abar[following] ** 0.5 * x0 + (1 - abar[following]) ** 0.5 * eps
        official.append(x)

    sigmas = [((1 - abar[t]) / abar[t]) ** 0.5 for t in timesteps]
    timestep_of = {float(s): t for s, t in zip(sigmas, timesteps)}

    def difference(predict, variance=lambda sigma: 1 + sigma**2):
        steps = inversion.invert(image * (1 + sigmas[0] ** 2) ** 0.5, predict, sigmas, variance)
        found = [y / (1 + s**2) ** 0.5 for s, y in steps]
        return max((a - b).abs().max().item() for a, b in zip(found, official))

    def k_diffusion(y, sigma):  # scales its input by the sigma it is called with
        return network(y / (1 + sigma**2) ** 0.5, timestep_of[float(sigma)])

    assert difference(k_diffusion) < 1e-12
    y, s, following, data, called = image, 2.0, 3.0, 0.5, []  # of another scale: the network sees the latent of s
    list(inversion.invert(y, lambda y, sigma: called.append(y) or y, [s, following], lambda sigma: data**2 + sigma**2))
    assert (called[0] / (data**2 + following**2) ** 0.5 - y / (data**2 + s**2) ** 0.5).abs().max() < 1e-12
    assert difference(k_diffusion, lambda sigma: 1.0) > 1e-2  # the compensation forgotten


def test_the_history_begins_with_the_noise_and_ends_with_the_picture():
    """Sampling step i of T reads the latent at its own sigma, list[-1-i]; the last result is list[0], the picture."""
    picture = image_latent(batch=2)
    latent, noise = invert(picture).args
    run = run_of(latent)
    assert same(latent["samples"], picture["samples"]) and same(run.final, picture["samples"])
    assert [sigma for sigma, *_ in run.evaluations] == list(run.sigmas[:-1]) and run.sigmas[-1] == 0
    model = random_model("sd15-small").model
    first, last = run.evaluations[run.sigmas[0], 0, 0].x, run.evaluations[run.sigmas[-2], 0, 0].x
    close(model.process_latent_out(first), noise["samples"])
    smallest = float(model.model_sampling.sigma_min)
    assert run.sigmas[-2] >= smallest
    scaled = model.process_latent_in(picture["samples"]) * (1 + smallest**2) ** 0.5
    assert (last - scaled).abs().max() < (first - scaled).abs().max() / 10  # nearest to the picture at the end


def test_sampling_from_the_noise_begins_where_the_inversion_ended():
    latent, noise = invert(image_latent()).args
    started = []
    model = random_model("sd15-small").clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: (started.append(args["input"][:1]), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    sample_advanced(model, noise, noise="disable")
    close(started[0], run_of(latent).evaluations[run_of(latent).sigmas[0], 0, 0].x)


def test_a_locked_picture_comes_back_exactly():
    """With everything locked, the final latent is list[0]."""
    latent, _ = invert(image_latent()).args
    locked = {**latent, "noise_mask": torch.zeros(1, *SIZE)}
    close(sample(random_model("sd15-small"), locked)["samples"], latent["samples"], 1e-6)


def test_an_inverted_picture_in_a_stack():
    latent, _ = invert(image_latent(), conditioning=words(1)).args
    other = record(seed=2)
    masks, *_ = cut([latent, other], pictures(1, 2), STROKES)
    assert (masks.sum(0) == 1).all() and 0 < masks[0].mean() < 1
    mixed = masks_of(halves())
    composed = compose([latent, other], mixed)
    assert (
        torch.isfinite(composed).all()
        and (composed - compose([latent, other], masks_of(torch.zeros(SIZE), 2))).abs().max() > 0.05
    )
    # As the base, it starts from its own noise.
    started = compose([latent, other], masks_of(torch.zeros(SIZE), 2), kv="model", positive=words(1))
    _, noise = invert(image_latent(), conditioning=words(1)).args
    close(
        started, sample_advanced(random_model("sd15-small"), noise, noise="disable", positive=words(1))["samples"], 1e-2
    )


def test_one_evaluation_serves_both_halves_of_a_stream_with_one_prompt():
    latent, _ = invert(image_latent(), conditioning=words(1)).args
    other, _ = invert(image_latent(4), conditioning=words(1)).args
    model, mixed = random_model("sd15-small"), masks_of(halves())
    plain = evaluations_of(model, lambda: sample(model, empty()))
    assert evaluations_of(model, lambda: compose([latent, other], mixed)) == plain + 2 * STEPS
    assert run_of(latent).served == {"positive": "positive", "negative": "positive"}
    # As if both halves had been evaluated:
    once = compose([latent, other], mixed)
    for run in (run_of(latent), run_of(other)):
        run.served = {role: role for role in run.conds}
    assert evaluations_of(model, lambda: close(compose([latent, other], mixed), once, 5e-3)) == plain + 4 * STEPS
    recorded = run_of(record())
    assert recorded.served == {"positive": "positive", "negative": "negative"}


def test_a_stream_may_have_a_prompt_of_its_own():
    """Its trajectory stays, its attention is that of the other prompt."""
    (recorded,) = streams_of("test", [record(positive=words(1), cache_mb=64)])
    prompted = with_prompt(recorded, random_model("sd15-small"), positive=words(2))
    assert (
        prompted.run.served == recorded.run.served
        and prompted.run.evaluations.keys() == recorded.run.evaluations.keys()
    )
    assert not any(evaluation.features for evaluation in prompted.run.evaluations.values())
    assert same(prompted.run.conds["positive"][0]["model_conds"]["c_crossattn"].cond, words(2)[0][0])
    assert same(recorded.run.conds["positive"][0]["model_conds"]["c_crossattn"].cond, words(1)[0][0])
    equal = with_prompt(recorded, random_model("sd15-small"), positive=NEGATIVE, negative=NEGATIVE)
    assert equal.run.served == {"positive": "positive", "negative": "positive"}


def recording_model():
    model, latent = recorder(cache_mb=64)
    return model, lambda: latent[LATENT_KEY].runs == []


def composing_model():
    return inject([record(seed=1, cache_mb=64), record(seed=2, cache_mb=64)], MIXED)[0], None


def measuring_model():
    recording = Recording()
    wanted = TokenMap("cat", "a cat", (2,), tuple(sites_of(random_model("sd15-small"))))
    return install(random_model("sd15-small"), recording=recording, token_map=wanted), lambda: recording.runs == []


def harmonising_model():
    """Most of the picture is kept."""
    collage = canvas(layer(plain(RED), x=0.5, scale=0.5, noise=0.8), background_noise=0.0)[0]
    return CollageNoise.execute(random_model("sd15-small"), collage, 0.0).args[0], None


def biased_model():
    return install(random_model("sd15-small"), heed_bias=True), None


@pytest.mark.parametrize("made", [recording_model, composing_model, measuring_model, harmonising_model, biased_model])
def test_what_is_for_sampling_runs_stays_out_of_an_inversion(made):
    """One MODEL may serve a whole graph, whatever of this pack is on it."""
    expected = invert(image_latent())
    model, is_untouched = made()
    before = str(model.wrappers), model.get_attachment(KEY)
    found = invert(image_latent(), model=model)
    for latent, other in zip(found.args, expected.args):
        assert same(latent["samples"], other["samples"])
    evaluations, others = (run_of(output.args[0]).evaluations for output in (found, expected))
    assert evaluations.keys() == others.keys() and all(same(evaluations[key].x, others[key].x) for key in others)
    assert is_untouched is None or is_untouched()
    assert (str(model.wrappers), model.get_attachment(KEY)) == before


class Counting(Bias):
    """Draws everything to the first words."""

    def __init__(self):
        super().__init__(Window(0, 1, tuple(sites_of(random_model("sd15-small")))), SIZE)
        self.written = 0

    def write(self, out, ready, attention):
        self.written += 1
        out[..., :5] = 4


def test_an_inversion_is_replayed_with_the_bias_that_it_had():
    bias = Counting()
    model, conditioning = install(random_model("sd15-small"), heed_bias=True), attach(words(5), bias)
    latent, _ = invert(image_latent(), model=model, conditioning=conditioning).args
    unbiased, _ = invert(image_latent(), conditioning=conditioning).args
    first = [next(iter(run_of(one).evaluations.values())).x for one in (latent, unbiased)]
    assert bias.written and (first[0] - first[1]).abs().max() > 0.1
    assert run_of(latent).heeds_bias and not run_of(unbiased).heeds_bias
    other, bias.written = record(seed=2), 0
    compose([unbiased, other], MIXED)
    assert not bias.written
    compose([latent, other], MIXED)
    assert bias.written


def test_a_history_holds_no_model():
    """Not even where another node's patches of the MODEL were at work in the inversion."""
    model = build("sd15-small")
    patched, conditioning = install(model, heed_bias=True), attach(words(1), Counting())
    kept, held = invert(empty(), patched, conditioning=conditioning).args[0], weakref.ref(model.model)
    comfy.model_management.unload_all_models()
    del model, patched
    gc.collect()
    assert held() is None and streams_of("test", [kept])


@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [2.0, 1.0], [0.0], []])
def test_a_schedule_that_is_none_is_refused(sigmas):
    with pytest.raises(ValueError, match="Invert Image: sigmas are .* a descending schedule that ends in 0"):
        InvertImage.execute(random_model("sd15-small"), empty(), torch.tensor(sigmas), words(1))
