"""Per-layer harmonisation and ControlNet by place."""

import math
import time

import pytest
import torch
from comfy.model_sampling import ModelSamplingFlux
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

from montage.kernels import noise_map as kernel
from montage.nodes.collage import CollageControl, CollageCrossAttn, CollageNoise
from montage.patching.run_masks import part_of_schedule
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.random_models import control_net, random_model, text_encoder
from montage.workshop.sampling import NEGATIVE, close, empty, same, sample, sample_advanced, words
from nodes import ControlNetApplyAdvanced

STEPS = 6


def collage(noise=(0.8, 0.0), background=0.8, **settings):
    """Two layers on 64x64: the left half and the right half."""
    left = layer(plain(RED, 64, 32), x=0.25, scale=1.0, noise=noise[0], control=2.0)
    right = layer(plain(BLUE, 64, 32), x=0.75, scale=1.0, noise=noise[1], control=0.0, behind=left)
    return canvas(right, background_noise=background, **settings)[0]


def start(batch=1, size=(8, 8), **extra):
    return {"samples": torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(3)), **extra}


def harmonise(collage_, latent=None, model=None, dilation=0.0, **settings):
    model, denoise = CollageNoise.execute(model or random_model("sd15-small"), collage_, dilation).args
    return sample(model, latent or start(), steps=STEPS, **{"denoise": denoise, **settings})["samples"]


# ---------------------------------------------------------------- the rule


def test_a_place_is_free_from_its_time_on():
    """At t <= h, and a place of more noise is never later."""
    noise = torch.linspace(0, 1, 11).reshape(1, 1, 1, 11)
    previous = torch.zeros_like(noise)
    for t in (1.0, 0.81, 0.8, 0.45, 0.05, 0.0):
        free = kernel.free(noise, t, 0)
        assert same(free[0, 0, 0].bool(), (noise[0, 0, 0] >= t - 1e-6) & (noise[0, 0, 0] > 0)), t
        assert (free.diff(dim=-1) >= 0).all() and (free >= previous).all()
        previous = free


def test_the_freest_places_are_always_free():
    assert kernel.free(torch.full((1, 1, 4, 4), 0.5), 1.0, 4).all()
    assert same(kernel.free(torch.tensor([[[[0.2, 0.5]]]]), 0.9, 0), torch.tensor([[[[0.0, 1.0]]]]))
    assert not kernel.free(torch.zeros(1, 1, 4, 4), 0.0, 4).any()


@pytest.mark.parametrize("t, radius", [(1.0, 4), (0.8, 3), (0.5, 2), (0.26, 1), (0.24, 0), (0.0, 0)])
def test_what_is_not_free_is_dilated(t, radius):
    """By int(4 t) latent pixels."""
    noise = torch.ones(1, 1, 15, 15)
    noise[0, 0, 7, 7] = 0
    assert (kernel.free(noise, t, 4.0) == 0).sum() == (2 * radius + 1) ** 2


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        ("euler", "normal"),
        ("euler_ancestral", "normal"),
        ("dpmpp_2m", "karras"),
        ("heun", "normal"),
        ("uni_pc", "normal"),
    ],
)
def test_a_layer_of_noise_0_is_kept_bit_for_bit(sampler, scheduler):
    latent = start(2)
    out = harmonise(collage(), latent, sampler=sampler, scheduler=scheduler)
    assert same(out[..., 4:], latent["samples"][..., 4:])
    assert (out[..., :4] - latent["samples"][..., :4]).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("denoise, scheduler", [(0.8, "normal"), (0.8, "karras"), (1.0, "normal"), (0.3, "normal")])
def test_one_noise_everywhere_is_image_to_image(denoise, scheduler):
    """The law of a patch that has nothing to do."""
    found = harmonise(collage((0.8, 0.8), blur=5.0), denoise=denoise, scheduler=scheduler, dilation=4.0)
    assert same(
        found, sample(random_model("sd15-small"), start(), steps=STEPS, denoise=denoise, scheduler=scheduler)["samples"]
    )


def test_the_denoise_output_is_the_maps_maximum():
    assert CollageNoise.execute(random_model("sd15-small"), collage((0.3, 0.6), background=1.0), 0.0).args[
        1
    ] == pytest.approx(0.6)  # no background is seen


@pytest.mark.parametrize("blur", [0.0, 5.0])
def test_the_denoise_output_takes_the_steps_that_the_widget_would(blur):
    """Samplers take int(steps / denoise) steps of a schedule: the same for every number of steps and every noise."""
    for percent in range(1, 101):
        noise = percent / 100
        denoise = CollageNoise.execute(
            random_model("sd15-small"), collage((noise, noise), background=noise, blur=blur), 0.0
        ).args[1]
        assert [int(steps / denoise) for steps in range(1, 101)] == [int(steps / noise) for steps in range(1, 101)]


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_layers_of_one_noise_are_image_to_image_by_the_denoise_output(steps):
    model, denoise = CollageNoise.execute(random_model("sd15-small"), collage((0.8, 0.8)), 4.0).args
    found = sample(model, start(), steps=steps, denoise=denoise)["samples"]
    assert same(found, sample(random_model("sd15-small"), start(), steps=steps, denoise=0.8)["samples"])


def test_time_counts_as_in_the_paper():
    """The model's steps are 0 to 999, and a place of h = 0.8 is free from step 800 on; radius of dilation 0 to 3."""
    sampling = random_model("sd15-small").get_model_object("model_sampling")
    for step in (0, 1, 799, 800, 801, 999):
        assert part_of_schedule(sampling, sampling.sigmas[step]) == step / 1000
    lone = torch.tensor([[[[0.8, 1.0]]]])
    freed = [kernel.free(lone, part_of_schedule(sampling, sampling.sigmas[step]), 0)[0, 0, 0, 0] for step in (800, 801)]
    assert freed == [1, 0]
    assert int(4.0 * part_of_schedule(sampling, sampling.sigma_max)) == 3
    flow = ModelSamplingFlux()
    assert part_of_schedule(flow, flow.sigma_max) == 1 and part_of_schedule(flow, flow.sigma_min) == 0


def test_every_place_starts_at_its_own_noise_level():
    """The model's own view: locked places hold the image at the sampler's noise level until t <= h."""
    seen = []
    model = random_model("sd15-small").clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: (
            seen.append((float(args["timestep"][0]), args["input"][:1])),
            apply(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    latent = start()
    clean = model.model.process_latent_in(latent["samples"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))  # of the sampler's seed
    harmonise(collage((0.8, 0.4)), latent, model)
    sampling = model.get_model_object("model_sampling")
    changed = []
    for sigma, x in seen:
        t = float(sampling.timestep(torch.tensor(sigma))) / 999
        at_start = torch.allclose(x[..., 4:], (clean + sigma * noise)[..., 4:], atol=1e-4)
        changed.append(not at_start)
        if t > 0.4:
            assert at_start, t
    assert changed[-1] and not changed[0]


def test_a_latents_own_mask_still_acts():
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4, :] = 0
    latent = start(noise_mask=mask)
    out = harmonise(collage((0.8, 0.0)), latent)
    clean = latent["samples"]
    assert same(out[..., 4:], clean[..., 4:])
    close(out[:, :, :4], clean[:, :, :4])
    assert (out[:, :, 4:, :4] - clean[:, :, 4:, :4]).abs().min() > 1e-4


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_differential_diffusion_in_either_order(first):
    ramp = torch.linspace(0.1, 1, 8).reshape(1, 1, 8, 1).expand(1, 1, 8, 8)
    latent, model, one = start(noise_mask=ramp), random_model("sd15-small"), collage((0.8, 0.0))
    if first == "ours":
        model, denoise = CollageNoise.execute(model, one, 0.0).args
        out = sample(DifferentialDiffusion.execute(model).args[0], latent, steps=STEPS, denoise=denoise)["samples"]
    else:
        out = harmonise(one, latent, DifferentialDiffusion.execute(model).args[0])
    alone = sample(
        (
            DifferentialDiffusion.execute(model).args[0]
            if first == "theirs"
            else DifferentialDiffusion.execute(random_model("sd15-small")).args[0]
        ),
        latent,
        steps=STEPS,
        denoise=0.8,
    )["samples"]
    assert same(out[..., 4:], latent["samples"][..., 4:])
    assert (alone[..., 4:] - latent["samples"][..., 4:]).abs().max() > 0.1 and (
        out - harmonise(one, start())
    ).abs().max() > 0.01


def test_a_latent_of_another_size_and_noise_that_is_left():
    one = canvas(layer(plain(BLUE, 130, 64), x=0.75, scale=1.0, noise=0.0), width=128, height=130, blur=3.0)[0]
    latent = start(size=(16, 16))
    assert same(harmonise(one, latent)[..., 8:], latent["samples"][..., 8:])
    model, _ = CollageNoise.execute(random_model("sd15-small"), collage(), 0.0).args
    left = sample_advanced(model, start(), end=2, leftover="enable")["samples"]
    assert (left[..., 4:] - start()["samples"][..., 4:]).abs().max() > 1  # still under noise, as the rest


def test_the_model_that_came_in_is_unchanged():
    model = random_model("sd15-small")
    before = sample(model, start(), steps=2)["samples"]
    harmonise(collage(), model=model)
    CollageControl.execute(model, collage(), 0.0)
    assert same(sample(model, start(), steps=2)["samples"], before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Collage Noise: the latent is empty"):
        harmonise(collage(), empty())
    with pytest.raises(ValueError, match="Collage Noise: the canvas is 64x64 and the latent 12x8, another shape"):
        harmonise(collage(), start(size=(8, 12)))
    (model,) = CollageControl.execute(random_model("sd15-small"), collage(), 0.0).args
    with pytest.raises(ValueError, match="Collage Control: no ControlNet acts in this run"):
        sample(model, start())


# ---------------------------------------------------------------- ControlNet


def controlled(model, strength=1.0, seed=5, **settings):
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        words(1), NEGATIVE, control_net(), hint, strength, 0.0, 1.0
    )
    return sample(model, start(), positive=positive, negative=negative, steps=2, **settings)["samples"]


def test_one_control_everywhere_is_the_controlnets_own_strength():
    model = random_model("sd15-small")

    def everywhere(factor):
        whole = canvas(layer(plain(RED, 64, 64), scale=1.0, control=factor))[0]
        return controlled(CollageControl.execute(model, whole, 0.0).args[0])

    assert same(everywhere(1.0), controlled(model))
    close(everywhere(0.5), controlled(model, 0.5))
    close(everywhere(0.0), controlled(model, 0.0))
    assert (everywhere(0.0) - everywhere(1.0)).abs().max() > 0.1


def test_residuals_are_multiplied_by_the_map_in_both_halves(monkeypatch):
    """At every level, by the layers that are seen there and the background's own."""
    from comfy.ldm.modules.diffusionmodules import openaimodel

    residuals = {"plain": [], "mapped": []}
    original = openaimodel.apply_control

    def run(name, model):
        def watch(h, control, block):
            if control and control.get(block):
                residuals[name].append(control[block][-1].clone())
            return original(h, control, block)

        monkeypatch.setattr(openaimodel, "apply_control", watch)
        controlled(model)

    run("plain", random_model("sd15-small"))
    one = canvas(layer(plain(RED, 64, 32), x=0.25, scale=1.0, control=2.0))[0]
    run("mapped", CollageControl.execute(random_model("sd15-small"), one, 0.25).args[0])
    for plain_, mapped in list(zip(*residuals.values()))[:13]:  # the first evaluation, where both see the same latent
        assert plain_.shape[0] == 2
        width = plain_.shape[-1]
        factor = torch.full((width,), 0.25)
        factor[: width // 2] = 2.0
        if width == 1:
            factor[:] = (2.0 + 0.25) / 2
        close(mapped, plain_ * factor, 1e-5)


@pytest.mark.parametrize("name", ["sd15-small", "sdxl-small"])
def test_noise_and_control_and_bias_and_an_inpaint_mask_together(name):
    """On two images that are not square: what is locked by noise 0 is kept bit for bit, what the latent's mask holds
    back up to rounding.
    """
    layers = layer(plain(RED, 64, 48), "a red cat", x=0.25, scale=1.0, noise=0.8, control=0.25)
    one = canvas(
        layer(plain(BLUE, 64, 48), "a blue dog", x=0.75, scale=1.0, noise=0.0, behind=layers), width=96, blur=3.0
    )[0]
    mask = torch.ones(1, 1, 8, 12)
    mask[..., :4, :] = 0
    latent, (clip, plain_model) = start(2, (8, 12), noise_mask=mask), (text_encoder(name), random_model(name))
    model, positive = CollageCrossAttn.execute(plain_model, clip, one, 1.0, "log log", 0.0, 1.0, "all").args
    words_alone = clip.encode_from_tokens_scheduled(clip.tokenize(one.prompt))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def out(model, positive):
        hint = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(5))
        conditionings = ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control_net(name), hint, 1.0, 0.0, 1.0
        )
        return harmonise(one, latent, model, 4.0, **dict(zip(("positive", "negative"), conditionings)))

    both, clean = out(CollageControl.execute(model, one, 0.0).args[0], positive), latent["samples"]
    assert same(both[..., 6:], clean[..., 6:])
    close(both[:, :, :4], clean[:, :, :4], 1e-4)
    free = both[:, :, 4:, :6]
    assert torch.isfinite(free).all() and (free - clean[:, :, 4:, :6]).abs().min() > 1e-5
    for other in (
        out(model, positive),
        out(CollageControl.execute(plain_model, one, 0.0).args[0], words_alone),
    ):  # each of the two acts
        assert (both - other).abs().max() > 1e-3


@pytest.mark.parametrize("sigma", [0.5, 10, 63, 65, 500])
@pytest.mark.parametrize("size", [(40, 56), (1, 30)])
def test_a_blur_is_the_sum_with_a_gaussian(sigma, size):
    """Also above the sigma from which Fourier transforms compute it, where the picture is far smaller than the blur."""
    picture = torch.rand(size, generator=torch.Generator().manual_seed(1))
    radius = math.ceil(3 * sigma)
    kernel_1d = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    blurred = picture.double()
    for _ in range(2):
        rows = torch.nn.functional.pad(blurred.T[None], [radius, radius], mode="replicate")[0]
        blurred = rows.unfold(1, 2 * radius + 1, 1) @ (kernel_1d / kernel_1d.sum())
    assert (kernel.gaussian(picture, sigma) - blurred).abs().max() < 1e-6


def test_the_widest_blur_of_a_large_canvas_takes_no_minutes():
    """0.14 s of a core; the direct sum took 104."""
    began = time.process_time()
    kernel.gaussian(torch.rand(1024, 1024), 500)
    assert time.process_time() - began < 10


def test_one_noise_for_all_is_exact_at_any_blur():
    masks = torch.rand(3, 20, 30) / 3
    for blur in (0, 10, 500):
        assert (kernel.noise_map(masks, [0.8] * 3, 0.8, blur) == torch.tensor(0.8)).all()
