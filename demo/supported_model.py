"""Teaches ComfyUI the demo model's family, so that its own checkpoint loader opens the file.

SD1.x's structure at a fifth of its width: ComfyUI reads every size from the weights except the number of
heads and the sizes of the text encoder, and those are what this file states.
"""

from pathlib import Path

import comfy.model_base
import comfy.supported_models
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget

WEIGHTS = Path(__file__).parent / "weights" / "demo-model.safetensors"

WIDTH = 64  # of the UNet's first level and of a text token
CLIP_ROWS = 49408  # vocabulary of SD1.x's tokenizer
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


class MontageDemo(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": WIDTH, "model_channels": WIDTH}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def model_type(self, state_dict, prefix=""):
        model_type = comfy.model_base.ModelType
        return model_type.V_PREDICTION if "v_pred" in state_dict else model_type.EPS

    def process_clip_state_dict(self, state_dict):
        # The file stores the rows of the words it was trained on, and last the row of every other word.
        ids = state_dict.pop("cond_stage_model.token_ids", None)
        if ids is not None:
            key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
            rows = state_dict[key]
            state_dict[key] = rows[-1:].repeat(CLIP_ROWS, 1)
            state_dict[key][ids.long()] = rows[:-1]
        return super().process_clip_state_dict(state_dict)

    def clip_target(self, state_dict=None):
        return ClipTarget(DemoTokenizer, DemoClipModel)


def register() -> None:
    """Makes the family known to ComfyUI's loaders. Calling it again changes nothing."""
    known = comfy.supported_models.models
    # By name: a second copy of this pack, imported under another module name, is the same family.
    if not any(family.__name__ == MontageDemo.__name__ for family in known):
        known.append(MontageDemo)
