"""What the tests do with models: condition, sample with ComfyUI's own nodes, record, compose."""

import comfy.model_patcher
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, SamplerCustomAdvanced

from nodes import KSampler, KSamplerAdvanced

from ..nodes.photomontage import CompositeAttentionInject, GraphCutMontage
from ..nodes.record import FeatureRecorder, InvertImage
from ..patching.streams import streams_of
from .random_models import STRUCTURES, random_model

STEPS, CFG, SIZE = 4, 7.5, (8, 8)


def words(seed, tokens=77, name="sd15-small", batch=1):
    """A CONDITIONING of random text features."""
    _, unet = STRUCTURES[name]
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(batch, 1280, generator=generator)} if unet.get("adm_in_channels") else {}
    return [[torch.randn(batch, tokens, unet["context_dim"], generator=generator), extra]]


NEGATIVE = words(99)


def empty(batch=1, size=SIZE):
    return {"samples": torch.zeros(batch, 4, *size)}


def sample(
    model,
    latent,
    seed=1,
    positive=None,
    negative=NEGATIVE,
    sampler="euler",
    scheduler="normal",
    steps=STEPS,
    cfg=CFG,
    denoise=1.0,
):
    """KSampler."""
    return KSampler().sample(
        model, seed, steps, cfg, sampler, scheduler, positive or words(1), negative, latent, denoise
    )[0]


def sample_advanced(
    model,
    latent,
    seed=1,
    positive=None,
    sampler="euler",
    start=0,
    end=1000,
    noise="enable",
    leftover="disable",
    steps=STEPS,
):
    """KSamplerAdvanced."""
    return KSamplerAdvanced().sample(
        model, noise, seed, steps, CFG, sampler, "normal", positive or words(1), NEGATIVE, latent, start, end, leftover
    )[0]


def sample_custom(latent, guider, sigmas, seed=1, sampler="euler"):
    """SamplerCustomAdvanced: (output, denoised_output)."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    return SamplerCustomAdvanced.execute(
        Noise_RandomNoise(seed), guider, comfy.samplers.sampler_object(sampler), sigmas, latent
    ).args


def recorder(model=None, latent=None, cache_mb=0):
    return FeatureRecorder.execute(model or random_model("sd15-small"), latent or empty(), cache_mb).args


def record(seed=1, model=None, latent=None, cache_mb=0, **settings):
    """A recorded LATENT."""
    return sample(*recorder(model, latent, cache_mb), seed=seed, **settings)


def stack(*latents):
    return {f"latent{number}": latent for number, latent in enumerate(latents)}


def masks_of(labels, count=None):
    labels = torch.as_tensor(labels)
    return torch.stack([(labels == k).float() for k in range(count or int(labels.max()) + 1)])


def halves(size=SIZE):
    """Left half 0, right half 1."""
    labels = torch.zeros(size, dtype=torch.long)
    labels[:, size[1] // 2 :] = 1
    return labels


def inject(
    latents, masks, base=0, model=None, start=0.0, end=1.0, sites="all", base_q="model", kv="composite", **optional
):
    """(MODEL, LATENT) that compose."""
    return CompositeAttentionInject.execute(
        model or random_model("sd15-small"), stack(*latents), masks, base, start, end, sites, base_q, kv, **optional
    ).args


def compose(latents, masks, base=0, seed=1, **settings):
    """The composite's latent samples."""
    node = {key: settings.pop(key) for key in ("model", "start", "end", "sites", "base_q", "kv") if key in settings}
    return sample(*inject(latents, masks, base, **node), seed=seed, **settings)["samples"]


def cut(
    latents,
    images,
    strokes="",
    base=0,
    lam=100.0,
    sigma=10.0,
    components=10,
    solver="scipy",
    unmarked_is_base=False,
    **marks,
):
    """(masks, label picture, paste)."""
    pictures = {f"image{number}": image for number, image in enumerate(images)}
    return GraphCutMontage.execute(
        stack(*latents), pictures, base, lam, sigma, components, solver, unmarked_is_base, strokes, **marks
    ).args[:3]


SAMPLERS = ["euler", "ddim", "uni_pc", "dpmpp_2m", "heun", "dpm_2", "euler_ancestral", "dpmpp_2s_ancestral", "lcm"]


def run_of(latent):
    return streams_of("test", [latent])[0].run


def same(a, b):
    return torch.equal(a, b)


def low_memory(monkeypatch):
    """ComfyUI then computes cond and uncond in calls of their own."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)


MIXED = masks_of(halves())


def close(a, b, atol=1e-3):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def two(**settings):
    return record(seed=1, positive=words(1), **settings), record(seed=2, positive=words(2), **settings)


def pictures(*seeds, size=64):
    return [torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(s)) for s in seeds]


STROKES = (
    '{"v":1,"base":0,"strokes":[{"k":0,"r":500,"p":[1000,1000,1000,9000]},{"k":1,"r":500,"p":[9000,1000,9000,9000]}]}'
)


def schedule(model, steps=STEPS, scheduler="normal", denoise=1.0):
    """SIGMAS."""
    return BasicScheduler.execute(model, scheduler, steps, denoise).args[0]


def invert(latent, model=None, steps=STEPS, conditioning=None, scheduler="normal", denoise=1.0):
    model = model or random_model("sd15-small")
    return InvertImage.execute(model, latent, schedule(model, steps, scheduler, denoise), conditioning or words(5))


def image_latent(seed=3, batch=1, size=SIZE):
    return {"samples": torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))}


def evaluations_of(model, act):
    """How many images the UNet evaluates while act() runs."""
    seen = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    act()
    hook.remove()
    return sum(seen)
