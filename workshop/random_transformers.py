"""Small transformers of ComfyUI's own classes with random weights, for the tests: one for each family that this pack
works on.
"""

import functools
from typing import Any, NamedTuple
from unittest import mock

import comfy.controlnet
import comfy.ldm.anima.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models as supported
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.model_patcher import ModelPatcher

WIDTH = 48  # of the text features


class Transformer(NamedTuple):
    """family: ComfyUI's class of supported_models. unet: its configuration. latent: (channels[, frames], h, w) of the
    latents that the tests sample. extra: what a conditioning carries besides text and pooled features.
    """

    family: type
    unet: dict[str, Any]
    latent: tuple[int, ...]
    extra: dict[str, Any] = {}  # noqa: RUF012  never written to


FLUX = dict(  # noqa: C408
    image_model="flux",
    in_channels=16,
    out_channels=16,
    vec_in_dim=24,
    context_in_dim=WIDTH,
    hidden_size=64,
    mlp_ratio=4.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
    txt_ids_dims=[],
    axes_dim=[8, 12, 12],
    theta=10000,
)
FLUX2 = dict(
    FLUX,
    image_model="flux2",
    vec_in_dim=None,
    depth=1,
    depth_single_blocks=1,
    patch_size=1,
    in_channels=128,
    out_channels=128,
    mlp_ratio=3.0,
    theta=2000,
    axes_dim=[8, 8, 8, 8],
    txt_ids_dims=[3],
    global_modulation=True,
    mlp_silu_act=True,
    qkv_bias=False,
    ops_bias=False,
)
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 64,
    "n_layers": 1,
}
SD35_MEDIUM = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 2,
    "num_blocks": 3,
    "input_size": None,
    "adm_in_channels": 24,
    "num_patches": 256,
    "pos_embed_max_size": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}},
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
    "pos_embed_scaling_factor": None,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 12, 12),
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": WIDTH,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [8, 12, 12],
    "axes_lens": [256, 64, 64],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
Z_IMAGE = dict(
    LUMINA,
    dim=256,  # what its modulation is made for
    n_kv_heads=2,
    n_layers=2,
    axes_dims=[32, 48, 48],
    rope_theta=256.0,
    ffn_dim_multiplier=0.5,
    z_image_modulation=True,
    time_scale=1000.0,
    pad_tokens_multiple=32,
)
COSMOS = {
    "image_model": "cosmos_predict2",
    "in_channels": 16,
    "out_channels": 16,
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 8,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 3,
    "num_heads": 2,
    "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
# Anima's network takes no sizes for the adapter of its text, whose own would be a hundred times the network's
ADAPTER = functools.partial(comfy.ldm.anima.model.LLMAdapter, WIDTH, WIDTH, 32, num_layers=1, num_heads=2)
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": WIDTH,
    "num_heads": 2,
    "num_layers": 3,
    "in_dim": 16,
    "out_dim": 16,
}
HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "caption_channels": [WIDTH, WIDTH],
    "text_emb_dim": 24,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (16, 24, 24),
    "max_resolution": (128, 128),
    "llama_layers": [0, 1, 1, 0],
}
HUNYUAN_IMAGE = {
    "image_model": "hunyuan_video",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": [1, 1],
    "vec_in_dim": None,
    "axes_dim": [16, 16],
    "theta": 256,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "qkv_bias": True,
    "byt5": False,
    "meanflow": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}

SMALL, FLAT = (16, 12, 8), (16, 1, 12, 8)
TRANSFORMERS = {
    "Flux.1": Transformer(supported.Flux, FLUX, SMALL, {"guidance": 3.5}),
    "Flux.2": Transformer(supported.Flux2, FLUX2, (128, 6, 4), {"guidance": 3.5}),
    "Chroma": Transformer(supported.Chroma, CHROMA, SMALL),
    "SD3.5 medium": Transformer(supported.SD3, SD35_MEDIUM, SMALL),
    "Qwen-Image": Transformer(supported.QwenImage, QWEN, FLAT),
    "Z-Image": Transformer(supported.ZImage, Z_IMAGE, SMALL),
    "Lumina 2": Transformer(supported.Lumina2, LUMINA, SMALL),
    "Cosmos-Predict2": Transformer(supported.CosmosT2IPredict2, COSMOS, FLAT),
    "Anima": Transformer(supported.Anima, {**COSMOS, "image_model": "anima"}, FLAT),
    "Wan 2.1": Transformer(supported.WAN21_T2V, WAN, FLAT),
    "HiDream-I1": Transformer(supported.HiDream, HIDREAM, SMALL),
    "Hunyuan-Image": Transformer(supported.HunyuanImage21, HUNYUAN_IMAGE, (64, 6, 4)),
}


def fill(network: torch.nn.Module, seed: int) -> None:
    """Random weights of a size that keeps activations in range; norms are 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point() or not value.numel():
                continue
            if value.ndim > 1 and "pos_embed" not in name:
                scale = 0.8 / value[0].numel() ** 0.5
            elif "norm" in name or name.endswith(("scale", "ln_q.weight", "ln_k.weight")):
                value.fill_(1)
                continue
            else:
                scale = 1.0 if "pos_embed" in name else 0.1
            value.copy_(scale * torch.randn(value.shape, generator=generator))


def build_transformer(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **unet: Any) -> ModelPatcher:
    """A MODEL of a structure with random weights. unet: other values of its configuration."""
    kind = TRANSFORMERS[name]
    config = kind.family({**kind.unet, **unet})
    config.set_inference_dtype(dtype, None)
    with mock.patch("comfy.ldm.anima.model.LLMAdapter", ADAPTER):
        model = config.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


@functools.cache
def random_transformer(name: str, seed: int = 0) -> ModelPatcher:
    return build_transformer(name, seed)


def control_net(seed: int = 7) -> comfy.controlnet.ControlNet:
    """A ControlNet for the random Flux.1 with random weights, one block of each kind. Its hint is as large as the
    picture.
    """
    config = {key: value for key, value in FLUX.items() if key not in ("image_model", "out_channels")}
    config |= {"depth": 1, "depth_single_blocks": 1, "in_channels": 16, "out_channels": 16}
    network = ControlNetFlux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    fill(network, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network, load_device=device, extra_conds=["y", "guidance"])


def prompt(name: str, seed: int, tokens: int = 20, batch: int = 1, **extra: Any) -> list:
    """A CONDITIONING of random features."""
    generator = torch.Generator().manual_seed(1000 + seed)
    settings = {"pooled_output": torch.randn(batch, 24, generator=generator), **TRANSFORMERS[name].extra, **extra}
    if name == "HiDream-I1":
        settings["conditioning_llama3"] = torch.randn(batch, 2, tokens, WIDTH, generator=generator)
    if name == "Anima":  # the same text in T5's tokens
        settings["t5xxl_ids"] = torch.randint(32128, (tokens,), generator=generator)
        settings["t5xxl_weights"] = torch.ones(tokens)
    return [[torch.randn(batch, tokens, WIDTH, generator=generator), settings]]


def empty_latent(name: str, batch: int = 1, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """An empty LATENT."""
    *channels, h, w = TRANSFORMERS[name].latent
    return {"samples": torch.zeros(batch, *channels, *(size or (h, w)))}
