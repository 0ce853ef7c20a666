"""What other packs do to a run, by the protocols that they follow (workshop/neighbours.py): it goes together to the
bit, or the run is refused in a sentence. And recordings that are found again whatever becomes of their LATENT.
"""

import contextlib

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_rebatch import LatentRebatch

from montage.nodes.collage import CollageCrossAttn
from montage.nodes.layout_retouch import MultiSourceSwap, TokenAttentionMap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.nodes.record import FeatureRecorder
from montage.nodes.textual_inversion import LearnLayerToken
from montage.patching.streams import distance, streams_of
from montage.workshop import neighbours
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.random_models import control_net, random_model, text_encoder
from montage.workshop.sampling import (
    MIXED,
    STEPS,
    close,
    compose,
    empty,
    evaluations_of,
    halves,
    inject,
    masks_of,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_advanced,
    two,
    words,
)
from nodes import ConditioningSetArea

BASE = masks_of(torch.zeros(8, 8), 2)
PROMPT = "a red cat beside a blue dog"


def plain_model():
    return random_model("sd15-small")


# ---------------------------------------------------------------- what goes together


@pytest.mark.parametrize("name", ["told_halves", "told_rows", "both_halves"])
@pytest.mark.parametrize("cache_mb", [0, 256])
def test_patches_that_tell_halves_and_rows_apart_are_replayed_as_recorded(name, cache_mb):
    """Both prompts are the same text; the images are the rows of one batch, of which the second is the base."""
    model = getattr(neighbours, name)(plain_model())
    batch = record(model=model, latent=empty(2), cache_mb=cache_mb, positive=words(1), negative=words(1))
    settings = {"model": model, "positive": words(1), "negative": words(1)}
    if name == "told_rows":  # the composite is the first of its batch: composed of the second's rows it is another
        both = [compose([batch], MIXED, base=0, **settings), cached_or_not(model, settings)]
        close(*both)
    else:
        close(compose([batch], masks_of(torch.ones(8, 8), 2), base=1, **settings), batch["samples"][1:])


def cached_or_not(model, settings):
    """The same composite of images whose features were all kept."""
    kept = record(model=model, latent=empty(2), cache_mb=256, positive=words(1), negative=words(1))
    return compose([kept], MIXED, base=0, **settings)


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_a_prompt_with_an_area_is_not_taken_for_the_others(cache_mb):
    """ComfyUI gives every other prompt a copy with that area, under the same uuid. An area over the whole picture."""
    positive = ConditioningSetArea().append(words(1), 64, 64, 0, 0, 1.0)[0]
    image = record(positive=positive, cache_mb=cache_mb)
    close(compose([image, image], BASE, positive=positive), image["samples"])


def test_prompts_of_a_batch_repeat_as_in_the_recording():
    """Three images with two prompts: ComfyUI takes them in turn."""
    three = {"latent": empty(3), "positive": words(1, batch=2)}
    kept, replayed = record(cache_mb=256, **three), record(cache_mb=0, **three)
    masks = torch.nn.functional.one_hot(torch.arange(8).remainder(3).expand(8, 8), 3).movedim(-1, 0).float()
    close(*(compose([batch], masks, positive=words(1)) for batch in (kept, replayed)))


def test_a_hint_for_each_image_of_a_batch():
    """The composite is one image and takes the ControlNet's first hint; the recorded ones keep theirs."""
    control = control_net()
    control.set_cond_hint(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), strength=1.0)
    positive = [[words(1)[0][0], {"control": control, "control_apply_to_uncond": True}]]
    kept, replayed = (record(latent=empty(2), positive=positive, cache_mb=cache) for cache in (256, 0))
    close(*(compose([batch], MIXED, positive=positive) for batch in (kept, replayed)), atol=3e-3)


def test_a_recording_outside_of_its_latent():
    """Samplers that return a LATENT of their own, lists of latents, a latent that was rounded to fp16."""
    (a,), b = [record(latent=empty(2))], record(seed=5)
    fresh = [{"samples": sampled} for sampled in a["samples"].split(1)]
    assert [stream.row for stream in streams_of("test", fresh)] == [0, 1]
    parts = LatentRebatch.execute([a], [1]).args[0]
    assert [streams_of("test", [part])[0].run is run_of(a) for part in parts] == [True, True]
    rounded = {**b, "samples": b["samples"].half().float()}
    assert streams_of("test", [rounded])[0].run is run_of(b)


def test_one_recorder_for_many_samplers():
    """However many runs: each is found as long as its LATENT lives."""
    model, latent = recorder()
    images = [sample(model, latent, seed=seed, steps=1) for seed in range(32)]
    assert [run_of(image).final is not None and same(run_of(image).final, image["samples"]) for image in images] == [
        True
    ] * 32


def test_ksampler_advanced_in_two_parts_recorded_and_composed_in_two_parts():
    def parts(models, latents):
        half = sample_advanced(models[0], latents[0], end=2, leftover="enable", positive=words(1))
        whole = sample_advanced(models[1], latents[1] or half, start=2, noise="disable", positive=words(1))
        return half, whole

    def recorded(seed):
        first, latent = recorder()
        half = sample_advanced(first, latent, seed=seed, end=2, leftover="enable", positive=words(seed))
        second, latent = recorder(latent=half)
        return half, sample_advanced(second, latent, start=2, noise="disable", positive=words(seed))

    (half_a, a), (half_b, b) = recorded(1), recorded(2)
    composed = {}
    for name, masks in (("base", BASE), ("both", MIXED)):
        first, latent = inject([half_a, half_b], masks)
        second, _ = inject([a, b], masks)
        composed[name] = parts((first, second), (latent, None))[1]["samples"]
    close(composed["base"], a["samples"])
    assert (composed["both"] - a["samples"]).abs().max() > 0.01
    whole = two()
    close(composed["both"], compose(whole, MIXED, positive=words(1)))


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_a_wrapper_on_the_composite_alone_is_not_asked_in_a_replay(cache_mb):
    images = two(cache_mb=cache_mb)
    wrapped = neighbours.reads_its_options(plain_model())
    close(compose(images, MIXED, model=wrapped), compose(images, MIXED))


@pytest.mark.parametrize("node", [FeatureRecorder, TokenAttentionMap])
def test_equal_nodes_that_record_stay_apart(node):
    """ComfyUI runs nodes with equal inputs once, but for these: each has a recording of its own."""
    assert node.NOT_IDEMPOTENT and not CollageCrossAttn.NOT_IDEMPOTENT


def test_a_rounded_latent_of_sdxl_is_found_and_another_is_not():
    """A VAE's latents are what a model works on divided by 0.13: fp16 rounds those above 32 by up to 0.016."""
    latents = [torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(seed)) / 0.13025 for seed in range(40)]
    assert all(distance(latent, latent.half().float()) is not None for latent in latents)
    assert all(distance(a, b) is None for a, b in zip(latents, latents[1:]))


# ---------------------------------------------------------------- what is refused before sampling


def refused(act, message, model=None):
    """The sentence comes before the model is evaluated."""
    with pytest.raises(ValueError, match=message):
        assert evaluations_of(model or plain_model(), act) == "never reached"


def downscaled(model, factor=2.0):
    return PatchModelAddDownscale.execute(model, 3, factor, 0.0, 1.0, True, "bicubic", "bicubic").args[0]


def test_what_resizes_inside_is_on_both_sides_or_refused():
    """Deep Shrink."""
    size = {"latent": empty(size=(16, 16))}
    shrunk = [record(seed=s, model=downscaled(plain_model()), positive=words(s), **size) for s in (1, 2)]
    plainly = [record(seed=s, positive=words(s), **size) for s in (1, 2)]
    masks = masks_of(torch.zeros(16, 16), 2)
    close(compose(shrunk, masks, model=downscaled(plain_model()), positive=words(1)), shrunk[0]["samples"])
    mixed = masks_of(halves((16, 16)))
    refused(
        lambda: compose(plainly, mixed, model=downscaled(plain_model())), "Deep Shrink resizes .* on this MODEL and"
    )
    refused(lambda: compose(shrunk, mixed), "Deep Shrink resizes .* on the MODEL of its images alone. Disconnect")
    with pytest.raises(ValueError, match="resizes what block .* tokens for its images and .* in this run"):
        compose(shrunk, mixed, model=downscaled(plain_model(), 1.5))


@pytest.mark.parametrize("change, part", [("v_prediction", "V_PREDICTION"), ("lora", "patched"), ("zsnr", "sigma_max")])
def test_what_changes_the_model_behind_the_node_is_refused(change, part):
    images = two()
    model, latent = inject(images, MIXED)
    changed = {
        "v_prediction": lambda: ModelSamplingDiscrete().patch(model, "v_prediction", False)[0],
        "zsnr": lambda: ModelSamplingDiscrete().patch(model, "eps", True)[0],
        "lora": lambda: neighbours.lora(model),
    }[change]()
    refused(lambda: sample(changed, latent), f"images were recorded with .* but the MODEL that is sampled is .*{part}")


@pytest.mark.parametrize("prediction", ["v_prediction", "x0", "lcm"])
def test_another_prediction_before_the_node_is_refused(prediction):
    model = ModelSamplingDiscrete().patch(plain_model(), prediction, False)[0]
    with pytest.raises(ValueError, match="image 0 was recorded with .*EPS.* but the MODEL here is "):
        inject(two(), MIXED, model=model)


@pytest.mark.parametrize(
    "key, title", [("lazycache", "LazyCache"), ("TeaCache", "TeaCache"), ("fb_cache", "First Block")]
)
def test_a_cache_is_known_by_the_key_of_its_wrapper(key, title):
    model = plain_model().clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, lambda executor, *args, **kwargs: executor(*args))
    refused(lambda: record(model=model), f"^Feature Recorder: {title}.* on this MODEL skips .* Disconnect {title}")


def test_a_half_that_was_not_evaluated_is_said_to_be_missing():
    """As a negative prompt that ends early, or a node that leaves evaluations out."""
    early = [[words(99)[0][0], {"start_percent": 0.0, "end_percent": 0.5}]]
    a, b = two(negative=early)
    with pytest.raises(RuntimeError, match="this run has a negative conditioning at .* a node that skips evaluations"):
        compose([a, b], MIXED)


def test_caches_are_named():
    def cached(model):
        return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]

    refused(lambda: record(model=cached(plain_model())), "^Feature Recorder: EasyCache on this MODEL skips")
    images = two()
    model, latent = inject(images, MIXED)
    refused(lambda: sample(cached(model), latent), "^Composite Attention Inject: EasyCache on this MODEL skips")


@pytest.mark.parametrize("steps, windows", [(1, (0.5, 0.6, 1.0)), (2, (0.9, 0.9, 1.0))])
def test_a_swap_in_whose_windows_no_step_lies_is_refused(steps, windows):
    layout, reference = two(steps=steps)
    model, latent = MultiSourceSwap.execute(plain_model(), layout, reference, *windows, "all").args
    refused(lambda: sample(model, latent, steps=steps), "^Multi Source Swap: it would have no effect: none of the")


def test_one_window_of_several_without_a_step_is_said_in_the_log(caplog):
    a, b = two()
    ones = torch.ones(1, 64, 64)
    window = {
        "preset": "custom",
        "sagi_start": 0.02,
        "sagi_end": 0.1,
        "sagi_sites": "all",
        "salq_start": 0.1,
        "salq_end": 1.0,
        "salq_sites": "all",
    }
    model, latent = CollaborativeAttention.execute(
        plain_model(), a, ones, window, 0, False, False, "SAGI first", 0.3, "soft", b, ones
    ).args
    sample(model, latent)
    (record_,) = [r for r in caplog.records if "none of the 4 steps lies in its window 0.02 to 0.1" in r.getMessage()]
    assert record_.getMessage().startswith("Collaborative Attention")


def biased(model, clip, start=0.0, end=1.0):
    collage = canvas(
        layer(plain(BLUE), "a blue dog", x=0.75, scale=0.5, behind=layer(plain(RED), "a red cat", x=0.25, scale=0.5)),
        prompt=PROMPT,
    )[0]
    return CollageCrossAttn.execute(model, clip, collage, 1.0, "log log", start, end, "all").args


def test_a_bias_in_whose_window_no_step_lies_is_refused():
    model, positive = biased(plain_model(), text_encoder(), 0.8, 0.9)
    refused(lambda: sample(model, empty(), positive=positive), "^Collage Cross Attention: it would have no effect")


def test_a_bias_that_another_node_goes_past_is_an_error():
    """At the end of the run: only then it is known that no evaluation came by."""
    model, positive = biased(plain_model(), text_encoder())
    with pytest.raises(RuntimeError, match="^Collage Cross Attention: it had no effect: .*another node ran the model"):
        sample(neighbours.in_its_own_way(model), empty(), positive=positive)


def test_windows_of_another_packs_own_are_refused():
    model, latent = recorder(latent=empty(2))
    with pytest.raises(ValueError, match="^Feature Recorder: another node evaluates the model on 1 of the 2 images"):
        sample(neighbours.own_windows(model), latent)
    assert torch.isfinite(sample(neighbours.own_windows(model, 2), latent)["samples"]).all()


def test_noise_that_another_node_changes_after_the_start():
    """A recording takes it as it arrives at the sampler; what composes could not begin where its images did."""
    model, latent = recorder()
    a, b = sample(neighbours.own_noise(model), latent, positive=words(1)), record(seed=2)
    close(compose([a, b], BASE, positive=words(1)), a["samples"])
    model, latent = inject([a, b], MIXED)
    refused(
        lambda: sample(neighbours.own_noise(model), latent),
        "^Composite Attention Inject: another node changes the noise after this run was begun",
    )


def test_negpip_is_refused_where_words_are_looked_for():
    clip = neighbours.NegPip(text_encoder())
    message = "this CLIP encodes the prompt's 77 tokens to 154: another node changes them .NegPip"
    refused(lambda: biased(plain_model(), clip), f"^Collage Cross Attention: {message}")
    refused(
        lambda: TokenAttentionMap.execute(plain_model(), empty(), clip, PROMPT, "red cat", "all"),
        f"^Token Attention Map: {message}",
    )


@pytest.mark.parametrize("cut", ["tome", "hypertile"])
@pytest.mark.parametrize("node", ["concat", "several images"])
def test_what_cuts_tokens_is_refused_beside_longer_attention(cut, node):
    a, b = two()
    if node == "concat":
        model, latent = inject([a, b], MIXED, kv="concat")
    else:
        mask = halves((64, 64)).float()[None]
        model, latent = MultiSourceSwap.execute(plain_model(), a, b, 0.0, 0.0, 1.0, "all", mask).args
    title = {"tome": "ToMe", "hypertile": "HyperTile"}[cut]
    refused(lambda: sample(getattr(neighbours, cut)(model), latent), f"{title} on this MODEL .* Disconnect HyperTile")


def test_a_refusal_survives_a_node_that_swallows_it():
    """Impact's regional sampler takes every ValueError of a sampler for "nothing to do", and samples on."""
    a, b = two()
    model, latent = inject([a, b], MIXED)

    def regional():
        for _ in range(2):
            with contextlib.suppress(ValueError):
                sample(model, latent, steps=STEPS + 1)

    with (
        CurrentNodeContext("a prompt", "7"),
        pytest.raises(RuntimeError, match="^Composite Attention Inject: .*Set the sampler's steps"),
    ):
        regional()
    with CurrentNodeContext("the next prompt", "7"):
        assert torch.isfinite(sample(model, latent)["samples"]).all()


# ---------------------------------------------------------------- inputs that are not what they seem


def test_latents_of_another_vae_are_refused():
    """Of 16 channels, or of a video; an empty one is made to fit by ComfyUI."""
    for shape in ((1, 16, 8, 8), (1, 4, 3, 8, 8)):
        with pytest.raises(ValueError, match="^Feature Recorder: the latent has the shape .*another VAE. Encode"):
            recorder(latent={"samples": torch.ones(shape)})
    image = record(latent={"samples": torch.zeros(1, 16, 8, 8)})
    assert image["samples"].shape == (1, 4, 8, 8) and run_of(image)
    model, _ = inject(two(), MIXED)
    refused(lambda: sample(model, {"samples": torch.ones(1, 16, 8, 8)}), "made with another VAE")


def test_a_loader_without_a_text_encoder_or_vae_is_named():
    model, collage = plain_model(), canvas(layer(plain(RED), "a cat"), prompt="a cat")[0]
    calls = {
        "clip": [
            lambda: CollageCrossAttn.execute(model, None, collage, 1.0, "log log", 0.0, 1.0, "all"),
            lambda: TokenAttentionMap.execute(model, empty(), None, PROMPT, "red cat", "all"),
            lambda: learned(model, None, object(), collage),
        ],
        "vae": [lambda: learned(model, text_encoder(), None, collage)],
    }
    for name, acts in calls.items():
        for act in acts:
            with pytest.raises(ValueError, match=f": {name} is empty: the file that was loaded has no"):
                act()


def learned(model, clip, vae, collage):
    return LearnLayerToken.execute(model, clip, vae, collage, 0, "x", 1, 1e-3, 0, 0, 1, 1, "a", "a {}", False)


def test_nan_from_a_sampler_is_named():
    """FreeU's own division by zero, where the middle block has one token."""
    image = record(model=neighbours.freeu(plain_model()))
    assert image["samples"].isnan().any()
    with pytest.raises(ValueError, match="latent 0 holds NaN or infinite values: sampling it failed"):
        inject([image, image], MIXED)


def test_load_images_empty_mask_is_named():
    a, b = two(latent=empty(size=(16, 16)))
    with pytest.raises(ValueError, match="mask is 64x64 and empty: Load Image gives such a mask"):
        MultiSourceSwap.execute(plain_model(), a, b, 0.0, 0.5, 1.0, "all", torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="masks is 64x32 and the picture 128x128, another aspect ratio"):
        inject([a, b], torch.ones(2, 32, 64))
