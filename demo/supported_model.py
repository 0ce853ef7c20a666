"""Teaches ComfyUI the demo models' families, so that its own checkpoint loader opens their files.

SD1.x's structure at a fifth of its width, and Flux's at a sixteenth: ComfyUI reads most sizes from the weights; those
of the heads and of the text encoder, which it cannot, are what this file states.
"""

from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.flux.model import Flux
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget

WEIGHTS = Path(__file__).parent / "weights" / "demo-model.safetensors"
DIT_WEIGHTS = WEIGHTS.with_name("demo-dit.safetensors")
LORAS = {  # of the personal subject
    "unet": WEIGHTS.with_name("demo-subject-lora.safetensors"),
    "dit": WEIGHTS.with_name("demo-dit-subject-lora.safetensors"),
}

WIDTH = 64  # of the UNet's first level and of a text token
CLIP_ROWS = 49408  # vocabulary of SD1.x's tokenizer
DIT_WIDTH, DIT_HEADS, DIT_AXES = 192, 3, [16, 24, 24]
DIT_WORDS = 24  # text tokens that the transformer reads, of CLIP's 77
TEXT_CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}


class DemoTextModel(SDClipModel):
    def __init__(self, **kwargs):
        super().__init__(return_projected_pooled=False, textmodel_json_config=dict(TEXT_CONFIG), **kwargs)


class DemoClipModel(SD1ClipModel):
    def __init__(self, **kwargs):
        super().__init__(clip_model=DemoTextModel, **kwargs)


class DemoTokens(SDTokenizer):
    def __init__(self, **kwargs):
        super().__init__(embedding_size=WIDTH, **kwargs)


class DemoTokenizer(SD1Tokenizer):
    def __init__(self, **kwargs):
        super().__init__(tokenizer=DemoTokens, **kwargs)


def _all_rows(state_dict: dict) -> dict:
    """Expands the token embedding: the file stores the rows of the words it was trained on, and last the row of every
    other word."""
    ids = state_dict.pop("cond_stage_model.token_ids", None)
    if ids is not None:
        key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        rows = state_dict[key]
        state_dict[key] = rows[-1:].repeat(CLIP_ROWS, 1)
        state_dict[key][ids.long()] = rows[:-1]
    return state_dict


class MontageDemo(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": WIDTH, "model_channels": WIDTH}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def model_type(self, state_dict, prefix=""):
        model_type = comfy.model_base.ModelType
        return model_type.V_PREDICTION if "v_pred" in state_dict else model_type.EPS

    def process_clip_state_dict(self, state_dict):
        return super().process_clip_state_dict(_all_rows(state_dict))

    def clip_target(self, state_dict=None):
        return ClipTarget(DemoTokenizer, DemoClipModel)


class FewWords(comfy.model_base.Flux):
    """Flux's model that reads the first text tokens only: of CLIP's 77 the captions fill 22 at most."""

    most_text_tokens = DIT_WORDS

    def extra_conds(self, **kwargs):
        conds = super().extra_conds(**kwargs)
        if "c_crossattn" in conds:
            conds["c_crossattn"] = comfy.conds.CONDRegular(conds["c_crossattn"].cond[:, :DIT_WORDS])
        return conds


class MontageDemoDiT(comfy.supported_models.FluxSchnell):
    unet_config = {
        **comfy.supported_models.FluxSchnell.unet_config,
        "hidden_size": DIT_WIDTH,
        "context_in_dim": WIDTH,
    }
    unet_extra_config = {"num_heads": DIT_HEADS, "axes_dim": DIT_AXES, "out_channels": 4}
    latent_format = comfy.latent_formats.SD15
    supported_inference_dtypes = [torch.float16, torch.float32]  # as for the UNet: in single precision on a CPU
    vae_key_prefix = comfy.supported_models.SD15.vae_key_prefix
    text_encoder_key_prefix = comfy.supported_models.SD15.text_encoder_key_prefix

    def get_model(self, state_dict, prefix="", device=None):
        return FewWords(self, model_type=comfy.model_base.ModelType.FLOW, device=device)

    def process_clip_state_dict(self, state_dict):
        return comfy.supported_models.SD15.process_clip_state_dict(self, _all_rows(state_dict))

    def clip_target(self, state_dict=None):
        return ClipTarget(DemoTokenizer, DemoClipModel)


def architecture(model) -> str:
    """ "unet" or "dit", of a MODEL."""
    return "dit" if isinstance(model.model.diffusion_model, Flux) else "unet"


def register() -> None:
    """Makes the families known to ComfyUI's loaders. Calling it again changes nothing."""
    known = comfy.supported_models.models
    # By name: a second copy of this pack, imported under another module name, is the same family.
    names = {family.__name__ for family in known}
    if MontageDemo.__name__ not in names:
        known.append(MontageDemo)
    if MontageDemoDiT.__name__ not in names:
        known.insert(0, MontageDemoDiT)  # before FluxSchnell, whose description fits it too
