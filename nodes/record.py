"""Histories: recording what a sampler does, and finding the one that an existing image could have had."""

import math

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..kernels import inversion
from ..patching.recipes import install
from ..patching.session import recorded_options, taking_keys
from ..patching.streams import INVERSION, LATENT_KEY, Evaluation, Recording, Run, Weights, recorded_conds
from .inputs import finite

MEBIBYTE = 2**20


class FeatureRecorder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatureRecorder",
            display_name="Feature Recorder",
            category="montage",
            description=(
                "Records how a sampler makes its images, so that Graph Cut Montage and Composite Attention Inject "
                "can build one image out of them. Wire MODEL and LATENT through it into one sampler; what that sampler "
                "returns carries the recording."
            ),
            search_aliases=["record attention", "generative photomontage", "stack", "montage recorder"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SD1.x, SD2.x or SDXL model, with whatever patches the images are to have."
                ),
                io.Latent.Input(
                    "latent", tooltip="The latent that the sampler starts from. A batch of N is a stack of N images."
                ),
                io.Int.Input(
                    "cache_mb",
                    default=1024,
                    min=0,
                    max=1_000_000,
                    step=64,
                    tooltip=(
                        "Main memory that attention features may take, in MiB. Inside it a composite costs little more"
                        " than a plain run; beyond it (or at 0) the images are replayed, which gives the same picture,"
                        " stores a few MB and costs one more model evaluation per image and step. SD1.5 at 512x512:"
                        " about 44 MiB per image and step in fp16."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "recorded_model", display_name="MODEL", tooltip="The model that records. Connect it to one sampler."
                ),
                io.Latent.Output(
                    "recorded_latent",
                    display_name="LATENT",
                    tooltip="The same latent, carrying the recording. Connect it to the same sampler.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent, cache_mb):
        recording = Recording(budget=cache_mb * MEBIBYTE)
        return io.NodeOutput(install(model, recording=recording), {**latent, LATENT_KEY: recording})


class InvertImage(io.ComfyNode):
    NAME = "Invert Image"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InvertImage",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Gives an existing picture a history: DDIM inversion finds the noise and the latents of every step that"
                " lead to it, so that it can stand in a stack beside generated images."
            ),
            search_aliases=["ddim inversion", "unsampler", "real image"],
            inputs=[
                io.Model.Input("model", tooltip="The SD1.x, SD2.x or SDXL model that will sample with it."),
                io.Latent.Input("latent", tooltip="The picture, encoded by the VAE. A batch of N is N images."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip=(
                        "The schedule of the runs that it will be used in (Basic Scheduler, denoise 1), ending in 0."
                    ),
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="An empty prompt (the papers' choice), or the picture's own description. Used at CFG 1.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "image_latent", display_name="LATENT", tooltip="The picture's latent, carrying its history."
                ),
                io.Latent.Output(
                    "noise_latent",
                    display_name="noise",
                    tooltip=(
                        "The noise it came from. Sample it without adding noise (KSampler Advanced, add_noise"
                        " disabled)."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent, sigmas, conditioning):
        samples = finite(cls.NAME, "latent", latent["samples"])
        if len(sigmas) < 2 or sigmas[-1] != 0 or (sigmas[:-1] <= sigmas[1:]).any():
            raise ValueError(
                f"{cls.NAME}: sigmas are {[round(s, 3) for s in sigmas.tolist()][:6]}: a descending schedule that ends"
                " in 0 was expected. Use Basic Scheduler."
            )
        smallest = float(model.get_model_object("model_sampling").sigma_min)
        ladder = torch.cat([torch.tensor([min(smallest, float(sigmas[-2]))]), sigmas[:-1].flip(0).cpu()])
        run = Run(Weights(model), INVERSION, sigmas, torch.zeros_like(samples), torch.zeros_like(samples), None)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning, conditioning)
        guider.set_cfg(1.0)
        noise = guider.sample(
            torch.zeros_like(samples),
            samples,
            comfy.samplers.KSAMPLER(inversion_sampler, extra_options={"run": run}),
            ladder,
            callback=latent_preview.prepare_callback(model, len(ladder) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )
        run.noise, run.final = as_noise(model, run.evaluations[run.sigmas[0], 0, 0].x, run.sigmas[0]), samples.cpu()
        recording = Recording()
        recording.add(run)
        return io.NodeOutput({**latent, LATENT_KEY: recording}, {"samples": noise.to(samples)})


def inversion_sampler(model, x, sigmas, extra_args, callback, disable, run):
    """A k-diffusion sampler over ascending sigmas, which fills `run` with the history that it finds."""
    run.conds = recorded_conds(model.inner_model.conds)
    run.options = {0: recorded_options(extra_args["model_options"])}
    keyed = {**extra_args, "model_options": taking_keys(run, model.inner_model, extra_args["model_options"])}
    ones, history = x.new_ones(x.shape[0]), {}

    def predict_noise(y, sigma):
        denoised = model(
            y, sigma * ones, **(extra_args if run.keys else keyed)
        )  # keys of the first, which sees the picture itself
        callback({"i": len(history) - 1, "denoised": denoised, "x": y, "sigma": sigma})
        return (y - denoised) / sigma

    for sigma, y in inversion.invert(x, predict_noise, sigmas, model.inner_model.inner_model.model_sampling.sigma_data):
        history[float(sigma), 0, 0] = Evaluation(
            y
        )  # where the ladder starts with a sigma of the schedule, they are equal
    run.evaluations = {key: history[key] for key in reversed(history) if key[0] in run.sigmas}
    return y


def as_noise(model, x, sigma):
    """The noise that ComfyUI's samplers scale to x at sigma."""
    sampling = model.get_model_object("model_sampling")
    highest = float(sampling.sigma_max)
    is_start = math.isclose(highest, sigma, rel_tol=1e-5) or sigma > highest
    return x / sampling.noise_scaling(torch.tensor(sigma), torch.ones(1), torch.zeros(1), is_start)


NODES = [FeatureRecorder, InvertImage]
