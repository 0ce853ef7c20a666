"""The small trained model that this pack brings along, and pictures of its world, for the example workflows and
tests.
"""

import comfy.controlnet
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker


class MontageDemoModel(io.ComfyNode):
    NAME = "Montage Demo Model"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MontageDemoModel",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Loads Montage's own small model, so that the example workflows run without a download: 128x128 "
                'scenes such as "a red striped ball and a blue star on grass", about a second each on a CPU.'
            ),
            search_aliases=["tiny model", "test model"],
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=["unet", "dit"],
                    default="unet",
                    optional=True,
                    tooltip=(
                        "unet: SD1.x's structure, with a ControlNet. dit: a diffusion transformer of Flux's structure"
                        " (rectified flow, CFG 3), without one."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="A small UNet of SD1.x's structure, or a transformer of Flux's."),
                io.Clip.Output(
                    "clip",
                    tooltip=(
                        "Its text encoder. Words: colours, plain striped dotted checkered, ball box star ring tree"
                        " house, in the sky, on grass, on sand, at night, by a brick wall, on snow."
                    ),
                ),
                io.Vae.Output("vae", tooltip="Its autoencoder."),
                io.ControlNet.Output(
                    "control_net",
                    tooltip=(
                        "The UNet's ControlNet. Hint: the objects' outlines, white on black, as Canny draws them. The"
                        " transformer has none."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, architecture: str = "unet") -> io.NodeOutput:
        from ..demo import supported_model

        supported_model.register()
        path = supported_model.DIT_WEIGHTS if architecture == "dit" else supported_model.WEIGHTS
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(path), embedding_directory=folder_paths.get_folder_paths("embeddings")
        )
        if architecture == "dit":
            # ComfyUI shows the message when a node that this output is connected to would run.
            control = ExecutionBlocker(
                f'{cls.NAME}: there is no ControlNet for architecture "dit". Disconnect control_net, or choose "unet".'
            )
        else:
            control = comfy.controlnet.load_controlnet(
                str(supported_model.WEIGHTS.with_name("demo-controlnet.safetensors"))
            )
        return io.NodeOutput(model, clip, vae, control)


class MontageDemoCutout(io.ComfyNode):
    NAME = "Montage Demo Cutout"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MontageDemoCutout",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Draws one object of the demo model's world as a cut-out with alpha, so that the example collages "
                "run without a download."
            ),
            search_aliases=["test picture", "sample image"],
            inputs=[
                io.String.Input(
                    "words",
                    default="a red striped ball",
                    tooltip=(
                        "A colour (red green blue yellow purple orange white black), a texture (nothing, striped,"
                        " dotted or checkered) and a shape (ball box star ring tree house)."
                    ),
                ),
                io.Int.Input(
                    "look",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip=(
                        "Random seed of what the words do not describe: brightness, light, outline, direction and size "
                        "of the texture."
                    ),
                ),
            ],
            outputs=[io.Image.Output("cutout", display_name="IMAGE", tooltip="128x128 with alpha, for Collage Layer.")],
        )

    @classmethod
    def execute(cls, words: str, look: int) -> io.NodeOutput:
        from ..demo import scenes

        drawn = scenes.sample(1, torch.Generator().manual_seed(look), count=1)
        named = words.lower().split()
        for slot, known in (
            (drawn.shape, scenes.SHAPES),
            (drawn.colour, list(scenes.COLOURS)),
            (drawn.texture, scenes.TEXTURES),
        ):
            found = [word for word in named if word in known] or (["plain"] if known is scenes.TEXTURES else [])
            if len(found) != 1:
                raise ValueError(
                    f'{cls.NAME}: "{words}" has {len(found)} of the words {", ".join(known)}. Write one colour, one'
                    " shape, and one texture or none: a red striped ball."
                )
            slot[:, 0] = known.index(found[0])
        drawn.centre[:, 0], drawn.radius[:, 0] = (
            0.5,
            0.22,
        )  # as large as in the scenes of two that the model knows, and twice as fine
        return io.NodeOutput(scenes.cutouts(drawn, 0, 256)[:, :, 64:192, 64:192].movedim(1, -1))


class MontageDemoSubject(io.ComfyNode):
    NAME = "Montage Demo Subject"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MontageDemoSubject",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Applies a LoRA of a personal subject (a ball with a swirl) to the demo model, and outputs a photo "
                "of it, so that the example workflows of personal subjects run without a download. Its trigger "
                'word is "sks": a sks ball on grass.'
            ),
            search_aliases=["test lora", "personal subject"],
            inputs=[
                io.Model.Input("model", tooltip="The demo model."),
                io.Int.Input("photo", default=0, min=0, max=7, tooltip="Which of the eight training photos to output."),
            ],
            outputs=[
                io.Model.Output("personal_model", display_name="MODEL", tooltip="The model with the subject's LoRA."),
                io.Image.Output("photo_image", display_name="IMAGE", tooltip="The photo, 128x128."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, photo: int) -> io.NodeOutput:
        from ..demo import scenes, supported_model

        path = supported_model.LORAS[supported_model.architecture(model)]
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        personal, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        return io.NodeOutput(personal, scenes.photos()[1][photo : photo + 1].movedim(1, -1))


NODES = [MontageDemoModel, MontageDemoCutout, MontageDemoSubject]
