"""Recordings: of a sampling run, and of an existing image by inversion."""

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..methods import inversion
from ..patching import recording_files
from ..patching.install import install
from ..patching.streams import LATENT_KEY, Recording, streams_of
from .inputs import finite, latent_of

MEBIBYTE = 2**20
RECORDING = ".recording.safetensors"  # how the files of recordings end


class FeatureRecorder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatureRecorder",
            display_name="Feature Recorder",
            category="montage",
            description=(
                "Records a sampling run (its latents and attention features), so that Composite Attention Inject "
                "can combine several images into one. Connect MODEL and LATENT through this node into one sampler; "
                "the LATENT that the sampler returns carries the recording."
            ),
            search_aliases=[
                "record attention",
                "generative photomontage",
                "image stack",
                "save attention features",
                "combine images",
                "seam",
            ],
            not_idempotent=True,  # ComfyUI would make one recorder of all equal ones
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, including its LoRAs and other patches."),
                io.Latent.Input(
                    "latent", tooltip="The latent that the sampler starts from. A batch of N is recorded as N images."
                ),
                io.Int.Input(
                    "cache_mb",
                    default=1024,
                    min=0,
                    max=1_000_000,
                    step=64,
                    tooltip=(
                        "Memory for recorded attention features, in MiB: the GPU's while it has room, else RAM. Steps "
                        "that fit make a composite nearly as fast as a plain run. Steps beyond that (all of them at "
                        "0) are replayed: same image, a few MB, but one more model evaluation per image and step. "
                        "SD1.5 at 512x512 in fp16 takes 44 MiB per image and step: 3520 for 4 images of 20 steps."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "recorded_model", display_name="MODEL", tooltip="The recording model. Connect it to one sampler."
                ),
                io.Latent.Output(
                    "recorded_latent",
                    display_name="LATENT",
                    tooltip="The same latent, carrying the recording. Connect it to the same sampler.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict[str, Any], cache_mb: int) -> io.NodeOutput:
        latent_of("Feature Recorder", model, latent)
        recording = Recording(budget=cache_mb * MEBIBYTE)
        return io.NodeOutput(install(model, recording=recording), {**latent, LATENT_KEY: recording})


class InvertImage(io.ComfyNode):
    NAME = "Invert Image"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InvertImage",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Inverts an image (DDIM inversion) so that it can be used like a recorded one: finds the noise, "
                "and the latents of every step, from which the model would sample it."
            ),
            search_aliases=["ddim inversion", "inversion", "unsampler", "real image editing", "image to noise"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample with the inverted image."),
                io.Latent.Input("latent", tooltip="The image, encoded by the VAE. A batch of N is N images."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The schedule of the runs that will use it (Basic Scheduler, denoise 1), ending in 0.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "For a subject swap an empty prompt (as in MCA-Ctrl); for a reference image of Multi Source "
                        "Swap that with its trigger word; else a description of the image. Used at CFG 1."
                    ),
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=20,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Model evaluations per step: more come closer to the exact inverse (fixed-point "
                        "iteration). 0 chooses: one for SD models (DDIM inversion), three for rectified-flow "
                        "models, which lose the image with one."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "image_latent", display_name="LATENT", tooltip="The latent of the image, carrying its recording."
                ),
                io.Latent.Output(
                    "noise_latent",
                    display_name="noise",
                    tooltip=(
                        "The inverted noise. Sample it without adding noise (KSampler Advanced, add_noise disabled). "
                        "For rectified-flow models (Flux, SD3, Qwen-Image, ...) it is the noise itself, for nodes that "
                        "take a latent as noise: their samplers keep nothing of a latent at the first step."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, latent: dict[str, Any], sigmas: torch.Tensor, conditioning: list, iterations: int = 0
    ) -> io.NodeOutput:
        samples = finite(cls.NAME, "latent", latent_of(cls.NAME, model, latent))
        samples = comfy.sample.fix_empty_latent_channels(model, samples)  # some models' latents have frames
        if len(sigmas) < 2 or sigmas[-1] != 0 or (sigmas[:-1] <= sigmas[1:]).any():
            raise ValueError(
                f"{cls.NAME}: sigmas are {[round(s, 3) for s in sigmas.tolist()][:6]}: a descending schedule that ends"
                " in 0 was expected. Use Basic Scheduler."
            )
        recording, noise = inversion.invert(
            model,
            samples,
            conditioning,
            sigmas,
            iterations,
            latent_preview.prepare_callback(model, len(sigmas) - 1),
            comfy.utils.PROGRESS_BAR_ENABLED,
        )
        return io.NodeOutput({**latent, "samples": samples, LATENT_KEY: recording}, {"samples": noise.to(samples)})


class SaveRecording(io.ComfyNode):
    NAME = "Save Recording"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveRecording",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Saves a recorded latent to a file, so that it can be used another day or on another machine. "
                "Prompts, ControlNets and the MODEL are not stored: connect them again to Load Recording."
            ),
            is_output_node=True,
            search_aliases=["save latent", "export recording", "keep recording"],
            inputs=[
                io.Latent.Input(
                    "latent", tooltip="A recorded latent: the LATENT of a sampler behind Feature Recorder."
                ),
                io.Model.Input("model", tooltip="The model that it was sampled with."),
                io.String.Input(
                    "filename_prefix",
                    default="recordings/montage",
                    tooltip="Folder and beginning of the file's name, inside ComfyUI's output folder.",
                ),
            ],
            outputs=[io.String.Output("filename", tooltip="The file, as Load Recording lists it.")],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], model: ModelPatcher, filename_prefix: str) -> io.NodeOutput:
        streams = streams_of(cls.NAME, [latent])
        height, width = streams[0].run.size
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        path = Path(folder) / f"{name}_{number:05}{RECORDING}"
        recording_files.save(cls.NAME, path, streams, model)
        shown = f"{subfolder.replace(chr(92), '/')}/{path.name}".lstrip("/")
        ui = {
            "text": [f"{shown} ({path.stat().st_size / MEBIBYTE:.1f} MB)"],
            "recordings": [{"filename": path.name, "subfolder": subfolder, "type": "output"}],  # for ComfyUI's API
        }
        return io.NodeOutput(f"{shown} [output]", ui=ui)


class LoadRecording(io.ComfyNode):
    NAME = "Load Recording"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadRecording",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Loads a recorded latent from a file of Save Recording. Connect the MODEL, prompts and ControlNets "
                "that it was sampled with; what does not match is refused."
            ),
            search_aliases=["load latent", "import recording"],
            inputs=[
                io.MultiType.Input(
                    io.Combo.Input("file", options=recordings()),
                    types=[io.String],
                    tooltip=(
                        "From ComfyUI's input folder, or from its output folder ([output]). The filename of Save "
                        "Recording can be connected instead."
                    ),
                ),
                io.Model.Input("model", tooltip="The model that it was sampled with."),
                io.Conditioning.Input("positive", tooltip="The positive prompt that it was sampled with."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt that it was sampled with."
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="The latent, carrying its recording.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """file: None where it is connected, and known when the node runs."""
        return True if file is None or path_of(file) else cls.missing(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **inputs: Any) -> int | None:
        """Changes with the file. file: None where it is connected; then the node runs again when what names it did."""
        path = None if file is None else path_of(file)
        return None if path is None else path.stat().st_mtime_ns

    @classmethod
    def missing(cls, file: str) -> str:
        return f"{cls.NAME}: there is no file {file}. Press R to refresh the list, and choose one."

    @classmethod
    def execute(cls, file: str, model: ModelPatcher, positive: list, negative: list | None = None) -> io.NodeOutput:
        path = path_of(file)
        if path is None:
            raise ValueError(cls.missing(file))
        prompts = {"positive": positive, "negative": negative}
        samples, recording = recording_files.load(cls.NAME, path, model, prompts)
        return io.NodeOutput({"samples": samples, LATENT_KEY: recording})


def path_of(name: str) -> Path | None:
    """The file of a recording's name; None if there is none, or if the name leads out of ComfyUI's folders."""
    try:
        path = Path(folder_paths.get_annotated_filepath(name))
    except ValueError:
        return None
    return path if path.name.endswith(RECORDING) and path.is_file() else None


def recordings() -> list[str]:
    """The files that Load Recording offers, the newest first."""
    found = []
    for folder, note in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")):
        for path in Path(folder).rglob(f"*{RECORDING}"):
            found.append((path.stat().st_mtime, f"{path.relative_to(folder).as_posix()}{note}"))
    return [name for _, name in sorted(found, reverse=True)]


NODES = [FeatureRecorder, InvertImage, SaveRecording, LoadRecording]
