"""Grounding DINO by the installed `groundingdino` module, under any version of transformers.

The module comes from rf_groundingdino or groundingdino-py. Both build their text encoder through
helpers that transformers 5 removed, and their settings through a .py file that is executed. Here the
settings are read from the checkpoint's own tensors, the text encoder is wrapped, and the module's
forward is inherited unchanged.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .vocabulary import MAX_TOKENS, WordPieces, caption_of

LONGEST_SIDE = 1333  # the authors' limit
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# In the published files, read by nothing at inference. position_ids were a stored buffer in old transformers.
UNUSED_KEYS = ("label_enc.", "bert.pooler.", "bert.embeddings.position_ids")
COMPUTED_KEYS = "relative_position_index"  # Swin makes this table itself


@dataclass
class ImageFeatures:
    """What the image backbone made of one picture.

    maps: 3 tensors (1, c, h, w), at strides 8, 16 and 32. mask: (1, H, W) bool, False everywhere:
    one picture at a time has no padding.
    """

    maps: list[Tensor]
    mask: Tensor

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.maps, self.mask]

    def to(self, device: Any) -> ImageFeatures:
        return ImageFeatures([m.to(device) for m in self.maps], self.mask.to(device))


@dataclass
class Detections:
    """All queries of one picture: boxes (n, 4) as centre x, centre y, width, height in 0..1;
    scores (n,), the best token's, in 0..1; phrase_scores (n, phrases), the best of the phrase's own tokens."""

    boxes: Tensor
    scores: Tensor
    phrase_scores: Tensor


def is_grounding_dino(state_dict: dict[str, Tensor]) -> bool:
    return {
        "backbone.0.patch_embed.proj.weight",
        "transformer.level_embed",
        "bert.embeddings.word_embeddings.weight",
    } <= state_dict.keys()


def build_detector(state_dict: dict[str, Tensor], vocabulary: dict[str, int]) -> nn.Module:
    """A Grounding DINO in fp32 with the checkpoint's weights. ImportError without the package, and
    ValueError if the checkpoint lacks weights."""
    detector = _detector_class()(_settings(state_dict), WordPieces(vocabulary))
    missing, unexpected = detector.load_state_dict(state_dict, strict=False)
    missing = [key for key in missing if not key.endswith(COMPUTED_KEYS)]
    unexpected = [key for key in unexpected if not key.startswith(UNUSED_KEYS)]
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} weights are missing and {len(unexpected)} unknown, "
            f"the first is {(missing + unexpected)[0]}"
        )
    return detector.float().eval().requires_grad_(False)


def detect_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The (height, width) at which a picture is searched: the short side as asked for, the long one at most 1333."""
    short, long = min(height, width), max(height, width)
    if long / short * short_side > LONGEST_SIDE:
        short_side = int(round(LONGEST_SIDE * short / long))
    other = int(short_side * long / short)
    return (short_side, other) if height <= width else (other, short_side)


def _pixels(image: np.ndarray, short_side: int) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, h, w), resized on bytes by PIL as the package does, normalised."""
    rows, columns = image.shape[:2]
    height, width = detect_shape(rows, columns, short_side)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def _count(keys: Any, pattern: str) -> int:
    """One more than the largest number that stands at (\\d+) in the keys."""
    found = (re.match(pattern, key) for key in keys)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _settings(sd: dict[str, Tensor]) -> SimpleNamespace:
    """The published configurations' values; those that tell one checkpoint from another are read from it."""
    stages = _count(sd, r"backbone\.0\.layers\.(\d+)\.")
    tables = [sd[f"backbone.0.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
    levels, hidden = sd["transformer.level_embed"].shape
    points = 4
    heads = sd["transformer.encoder.layers.0.self_attn.attention_weights.weight"].shape[0] // (levels * points)
    words, text_width = sd["bert.embeddings.word_embeddings.weight"].shape
    swin = {
        "embed_dim": sd["backbone.0.patch_embed.proj.weight"].shape[0],
        "depths": [_count(sd, rf"backbone\.0\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (round(tables[0].shape[0] ** 0.5) + 1) // 2,
        "out_indices": tuple(i for i in range(stages) if f"backbone.0.norm{i}.weight" in sd),
    }
    bert = {
        "vocab_size": words,
        "hidden_size": text_width,
        "num_attention_heads": text_width // 64,
        "num_hidden_layers": _count(sd, r"bert\.encoder\.layer\.(\d+)\."),
        "intermediate_size": sd["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": sd["bert.embeddings.position_embeddings.weight"].shape[0],
    }
    return SimpleNamespace(
        swin=swin,
        bert=bert,
        hidden_dim=hidden,
        nheads=heads,
        num_feature_levels=levels,
        enc_layers=_count(sd, r"transformer\.encoder\.layers\.(\d+)\."),
        dec_layers=_count(sd, r"transformer\.decoder\.layers\.(\d+)\."),
        dim_feedforward=sd["transformer.encoder.layers.0.linear1.weight"].shape[0],
        num_queries=sd["transformer.tgt_embed.weight"].shape[0],
        enc_n_points=points,
        dec_n_points=points,
        query_dim=4,
        num_patterns=0,
        position_embedding="sine",
        pe_temperatureH=20,
        pe_temperatureW=20,
        two_stage_type="standard",
        embed_init_tgt=True,
        transformer_activation="relu",
        pre_norm=False,
        use_text_enhancer=True,
        use_fusion_layer=True,
        use_text_cross_attention=True,
        use_checkpoint=False,
        use_transformer_ckpt=False,
        dropout=0.0,
        text_dropout=0.0,
        fusion_dropout=0.0,
        fusion_droppath=0.0,
    )


class TextEncoder(nn.Module):
    """BERT's embeddings and encoder with an attention mask for every pair of tokens: phrases must not see
    each other. Their names inside make its keys those of the checkpoint."""

    def __init__(self, settings: dict):
        super().__init__()
        from transformers import BertConfig, BertModel

        bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
        self.embeddings, self.encoder = bert.embeddings, bert.encoder

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> Any:
        """attention_mask: (b, n, n) bool, True where a token may look."""
        x = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        hidden = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(~attention_mask, torch.finfo(x.dtype).min)
        return {"last_hidden_state": self.encoder(x, attention_mask=hidden[:, None])[0]}


@functools.cache
def _detector_class() -> type[nn.Module]:
    """The detector's class. It is made at the first call, because its base is in the optional package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package imports timm by an old name
        from groundingdino.models.GroundingDINO.backbone.position_encoding import build_position_encoding
        from groundingdino.models.GroundingDINO.backbone.swin_transformer import SwinTransformer
        from groundingdino.models.GroundingDINO.groundingdino import GroundingDINO
        from groundingdino.models.GroundingDINO.transformer import build_transformer
        from groundingdino.models.GroundingDINO.utils import MLP, ContrastiveEmbed
        from groundingdino.util.misc import NestedTensor

    class Backbone(nn.Sequential):
        """(Swin, position encoding). The package calls it for the features; ours were made beforehand."""

        def forward(self, image: ImageFeatures) -> Any:
            maps = [NestedTensor(m, torch.zeros_like(m[:, 0], dtype=torch.bool)) for m in image.maps]
            return maps, [self[1](m) for m in maps]

    class Detector(GroundingDINO):
        def __init__(self, settings: SimpleNamespace, tokenizer: WordPieces):
            nn.Module.__init__(self)  # the package's own constructor downloads a BERT
            hidden, layers = settings.hidden_dim, settings.dec_layers
            swin = SwinTransformer(drop_path_rate=0.0, **settings.swin)
            self.backbone: Any = Backbone(swin, build_position_encoding(settings))
            self.transformer: Any = build_transformer(settings)
            self.bert, self.tokenizer = TextEncoder(settings.bert), tokenizer
            # torch's own layers here: ManagedModel loads the module whole, so that comfy.ops would have nothing to do.
            self.feat_map = nn.Linear(settings.bert["hidden_size"], hidden)

            # Every backbone map is projected to `hidden` channels; further levels halve the last one.
            widths = [swin.num_features[i] for i in swin.out_indices]
            halvings = [widths[-1], *[hidden] * settings.num_feature_levels][
                : settings.num_feature_levels - len(widths)
            ]
            convs = [nn.Conv2d(c, hidden, 1) for c in widths]
            convs += [nn.Conv2d(c, hidden, 3, stride=2, padding=1) for c in halvings]
            self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, hidden)) for conv in convs)

            # One box head and one text head for all decoder layers, and one of each for the encoder's proposals.
            self.bbox_embed = nn.ModuleList([MLP(hidden, hidden, 4, 3)] * layers)
            self.class_embed = nn.ModuleList([ContrastiveEmbed()] * layers)
            self.transformer.decoder.bbox_embed = self.bbox_embed
            self.transformer.decoder.class_embed = self.class_embed
            self.transformer.enc_out_bbox_embed = MLP(hidden, hidden, 4, 3)
            self.transformer.enc_out_class_embed = ContrastiveEmbed()

            # What the inherited forward reads besides; the third name is misspelt in the package.
            self.num_feature_levels, self.num_queries = settings.num_feature_levels, settings.num_queries
            self.max_text_len, self.sub_sentence_present = MAX_TOKENS, True
            self.specical_tokens = sorted(tokenizer.separators)

        @property
        def stages(self) -> list[nn.Module]:
            """The parts that run one after another, for progress and cancelling."""
            blocks = [block for layer in self.backbone[0].layers for block in layer.blocks]
            return [*blocks, *self.transformer.encoder.layers, *self.transformer.decoder.layers]

        def image_features(self, image: np.ndarray, short_side: int) -> ImageFeatures:
            """uint8 (H, W, 3) -> the features that do not depend on the words."""
            pixels = _pixels(image, short_side).to(self.feat_map.weight.device)
            mask = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
            maps = self.backbone[0](NestedTensor(pixels, mask))
            return ImageFeatures([m.tensors for m in maps.values()], mask)

        def raw(self, image: ImageFeatures, caption: str) -> dict[str, Tensor]:
            """The package's forward: pred_logits (1, n, 256), -inf past the caption; pred_boxes (1, n, 4)."""
            try:
                return self(image, captions=[caption])
            finally:
                # rf_groundingdino keeps the features on the module until its forward ends: if that was
                # cancelled, the next picture would be searched in this one's features.
                for name in ("features", "poss"):
                    self.__dict__.pop(name, None)

        def detect(self, image: ImageFeatures, phrases: list[str]) -> Detections:
            caption = caption_of(phrases)
            found = self.raw(image, caption)
            scores = found["pred_logits"][0].sigmoid().cpu()
            # A phrase of nothing but control characters has no tokens.
            of_phrase = [
                scores[:, list(span)].amax(1) if span else torch.zeros(len(scores))
                for span in self.tokenizer.spans(caption)
            ]
            return Detections(found["pred_boxes"][0].cpu(), scores.amax(1), torch.stack(of_phrase, 1))

        def places(self, height: int, width: int) -> int:
            """How many places on all levels a searched picture of this size has."""
            return sum(
                -(-height // stride) * -(-width // stride)
                for stride in (8 << level for level in range(self.num_feature_levels))
            )

    return Detector
