"""Models for the tests: the demo model, and UNets and text encoders of real structure with random weights."""

import functools
import math
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.sd1_clip import SD1ClipModel
from comfy.supported_models_base import ClipTarget

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
}
SD15 = dict(
    COMMON,
    num_res_blocks=[2] * 4,
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1] * 6 + [0, 0],
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
    adm_in_channels=None,
)
SDXL = dict(
    COMMON,
    num_res_blocks=[2] * 3,
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    num_classes="sequential",
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
    adm_in_channels=2816,
    use_linear_in_transformer=True,
)

STRUCTURES = {  # name: (ComfyUI's family, UNet configuration)
    "sd15": (
        comfy.supported_models.SD15,
        dict(SD15, model_channels=320, context_dim=768, use_linear_in_transformer=False),
    ),
    # an eighth of the weights, and a checkpoint that ComfyUI takes for SD1.5
    "sd15-narrow": (
        comfy.supported_models.SD15,
        dict(SD15, channel_mult=[1] * 4, model_channels=320, context_dim=768, use_linear_in_transformer=False),
    ),
    "sd15-small": (
        comfy.supported_models.SD15,
        dict(SD15, channel_mult=[1, 1, 2, 2], model_channels=32, context_dim=16, use_linear_in_transformer=False),
    ),
    "sd15-inpaint-small": (
        comfy.supported_models.SD15,
        dict(
            SD15,
            in_channels=9,
            channel_mult=[1, 1, 2, 2],
            model_channels=32,
            context_dim=16,
            use_linear_in_transformer=False,
        ),
    ),
    "sd2-small": (
        comfy.supported_models.SD20,
        dict(SD15, channel_mult=[1, 1, 2, 2], model_channels=64, context_dim=16, use_linear_in_transformer=True),
    ),
    # pruned ones, without attention in the middle (SDXS without a middle at all)
    "ssd-1b-small": (
        comfy.supported_models.SSD1B,
        dict(
            SDXL,
            channel_mult=[1, 2, 2],
            model_channels=64,
            context_dim=16,
            transformer_depth=[0, 0, 2, 2, 4, 4],
            transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
            transformer_depth_middle=-1,
        ),
    ),
    "koala-small": (
        comfy.supported_models.KOALA_700M,
        dict(
            SDXL,
            num_res_blocks=[1] * 3,
            channel_mult=[1, 2, 2],
            model_channels=64,
            context_dim=16,
            transformer_depth=[0, 2, 5],
            transformer_depth_output=[0, 0, 2, 2, 5, 5],
            transformer_depth_middle=-2,
        ),
    ),
    "sdxs-small": (
        comfy.supported_models.SD15,
        dict(
            COMMON,
            num_res_blocks=[1] * 3,
            channel_mult=[1, 2, 2],
            model_channels=64,
            context_dim=16,
            num_head_channels=32,
            transformer_depth=[1, 1, 1],
            transformer_depth_output=[1] * 6,
            transformer_depth_middle=-2,
            adm_in_channels=None,
            use_linear_in_transformer=True,
            disable_self_attentions=[True, False, False],
        ),
    ),
    "sdxl": (comfy.supported_models.SDXL, dict(SDXL, model_channels=320, context_dim=2048)),
    "sdxl-small": (comfy.supported_models.SDXL, dict(SDXL, channel_mult=[1, 2, 2], model_channels=64, context_dim=16)),
}


def fill(module, seed, scale=0.8):
    """Random weights of a size that keeps activations in range: matrices scale / sqrt(fan-in), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                parameter.zero_()
        for layer in module.modules():
            if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                layer.weight.fill_(1)
    return module


def build(name, seed=0, device="cpu"):
    """A MODEL of a structure with random weights."""
    family, unet = STRUCTURES[name]
    config = family(dict(unet))
    model = fill(config.get_model({}, "", device=device), seed)
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def half(model):
    """The MODEL, in fp16 from now on."""
    model.model.half().diffusion_model.dtype = torch.float16
    return model


@functools.cache
def random_model(name, seed=0):
    return build(name, seed)


def control_net(name="sd15-small", seed=7):
    """A ControlNet of a structure with random weights (its zero convolutions are not zero)."""
    _, unet = STRUCTURES[name]
    settings = {**unet, "num_heads": 8, "num_head_channels": -1, "operations": comfy.ops.disable_weight_init}
    for unused in ("out_channels", "transformer_depth_output", "use_temporal_attention", "use_temporal_resblock"):
        settings.pop(unused)
    return comfy.controlnet.ControlNet(
        fill(comfy.cldm.cldm.ControlNet(hint_channels=3, **settings), seed, scale=0.3),
        load_device=comfy.model_management.get_torch_device(),
    )


SD_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def half_weights(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Its weights in fp16, each name after `prefix`."""
    return {prefix + name: value.half() for name, value in module.state_dict().items()}


def save_checkpoint(path: Path, name: str = "sd15") -> None:
    """Writes a checkpoint of random weights in fp16: a UNet of the structure `name`, and SD1.5's own CLIP and VAE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        weights = half_weights(build(name).model.diffusion_model, "model.diffusion_model.")
        weights |= half_weights(fill(SD1ClipModel(device="cpu").clip_l, 1), "cond_stage_model.")
        weights |= half_weights(fill(AutoencoderKL(ddconfig=SD_VAE, embed_dim=4), 2), "first_stage_model.")
    comfy.utils.save_torch_file(weights, str(path))


SMALL_CLIP = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def text_encoder(name="sd15-small", seed=3, embeddings=None):
    """A CLIP for a small structure of that name, with random weights. embeddings: the folder of its textual
    inversions.
    """
    family = STRUCTURES[name][0]
    target = family(dict(STRUCTURES[name][1])).clip_target({})
    width = 8 if name.startswith("sdxl") else 16  # SDXL joins the features of two encoders
    config = {**SMALL_CLIP, "hidden_size": width}
    options = {"model_name": "clip_h"} if name.startswith("sd2") else {}
    options.update({f"clip_{encoder}_model_config": config for encoder in "lgh"})
    clip = comfy.sd.CLIP(
        ClipTarget(target.tokenizer, target.clip), embedding_directory=embeddings, model_options=options
    )
    for encoder in "lgh":
        if hasattr(clip.tokenizer, f"clip_{encoder}"):
            getattr(clip.tokenizer, f"clip_{encoder}").embedding_size = width
    if name.startswith("sdxl"):  # the size that SDXL's UNet takes the pooled features in
        clip.cond_stage_model.clip_g.transformer.text_projection = comfy.ops.manual_cast.Linear(width, 1280, bias=False)
    fill(clip.cond_stage_model, seed)
    return clip


@functools.cache
def demo():
    from ..nodes.demo_model import MontageDemoModel

    return tuple(MontageDemoModel.execute().args)


def demo_model():
    """(MODEL, CLIP, VAE) of the demo model."""
    return demo()[:3]


@functools.cache
def demo_transformer():
    """(MODEL, CLIP, VAE) of the demo's diffusion transformer."""
    from ..nodes.demo_model import MontageDemoModel

    return tuple(MontageDemoModel.execute("dit").args)[:3]


def demo_control_net():
    """Its ControlNet."""
    return demo()[3]
