"""Segment Anything by the installed `segment_anything` package: one picture's embedding, then a mask per prompt."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
POINT, BACKGROUND_POINT = 1, 0


def segmenter_fault(state_dict: dict[str, Tensor]) -> str | None:
    """Why a state dict is not a Segment Anything model, or None. Other families share its file names."""
    if "mask_decoder.hf_token.weight" in state_dict:
        return "a SAM-HQ model"
    if not {"image_encoder.patch_embed.proj.weight", "prompt_encoder.no_mask_embed.weight"} <= state_dict.keys():
        return "another kind of model (MobileSAM, SAM 2 and SAM 3 have their own)"
    return None


def build_segmenter(state_dict: dict[str, Tensor], half: bool = False) -> Segmenter:
    """A segmenter with the checkpoint's weights; half: its image encoder computes in fp16.
    ImportError without the package, and ValueError if the checkpoint does not fit."""
    with torch.device("meta"):  # no random numbers for 640 M weights that are replaced at once
        segmenter = Segmenter(state_dict)
    missing, unexpected = segmenter.load_state_dict(state_dict, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} weights are missing and {len(unexpected)} unknown, "
            f"the first is {(missing + unexpected)[0]}"
        )
    segmenter = segmenter.float().eval().requires_grad_(False)
    return segmenter.halve() if half else segmenter


class Segmenter(nn.Module):
    """The package's three parts under the checkpoint's names. Its own Sam class is left out: a read-only
    `device` there keeps ComfyUI from managing it."""

    def __init__(self, sd: dict[str, Tensor]):
        super().__init__()
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

        patches = sd["image_encoder.patch_embed.proj.weight"]  # (width, 3, patch, patch)
        width, patch = patches.shape[0], patches.shape[-1]
        grid = sd["image_encoder.pos_embed"].shape[1]
        tables = {
            int(key.split(".")[2]): table.shape  # (2 * tokens a side - 1, head width)
            for key, table in sd.items()
            if key.endswith("attn.rel_pos_h")
        }
        everywhere = [i for i, (rows, _) in tables.items() if rows == 2 * grid - 1]
        windows = [(rows + 1) // 2 for i, (rows, _) in tables.items() if i not in everywhere]
        dim = sd["prompt_encoder.no_mask_embed.weight"].shape[1]

        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # the package asks for a class and calls it
        self.size = grid * patch  # pixels a side of what the encoder reads, 1024
        self.in_fp16 = False
        self.image_encoder = ImageEncoderViT(
            img_size=self.size,
            patch_size=patch,
            embed_dim=width,
            depth=len(tables),
            out_chans=dim,
            num_heads=width // tables[0][1],
            use_rel_pos=True,
            global_attn_indexes=tuple(everywhere),
            window_size=windows[0] if windows else 0,
            mlp_ratio=sd["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / width,
            norm_layer=norm,
        )
        self.prompt_encoder = PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(self.size, self.size),
            mask_in_chans=sd["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        )
        layers = {key.split(".")[3] for key in sd if key.startswith("mask_decoder.transformer.layers.")}
        self.mask_decoder = MaskDecoder(
            transformer_dim=dim,
            iou_head_depth=3,
            num_multimask_outputs=sd["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            iou_head_hidden_dim=sd["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
            transformer=TwoWayTransformer(
                depth=len(layers),
                embedding_dim=dim,
                num_heads=8,
                mlp_dim=sd["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
            ),
        )

    @property
    def stages(self) -> list[nn.Module]:
        """The parts that run one after another, for progress and cancelling."""
        return [*self.image_encoder.blocks, self.mask_decoder]

    def halve(self) -> Segmenter:
        """fp16 for the matrix products of the image encoder, where the time and the memory go. The norms and the
        position embedding stay in fp32, and with them, under autocast, the residual stream: plain fp16 loses mask
        detail.
        """
        for part in self.image_encoder.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.half()
        self.in_fp16 = True
        return self

    def scale(self, height: int, width: int) -> float:
        """The encoder's pixels for one pixel of a picture."""
        return self.size / max(height, width)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that a picture has in front of the encoder; the rest of the square is empty."""
        scale = self.scale(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def embed(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) -> (1, c, grid, grid) fp32: all that the prompts need of the picture."""
        height, width = self.shape(*image.shape[:2])
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].float()
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
        pixels = F.pad((pixels - mean) / std, (0, self.size - width, 0, self.size - height))
        device = self.prompt_encoder.no_mask_embed.weight.device
        # autocast, not comfy.ops: the module is the package's own, and its norms must stay in fp32 (see halve).
        with torch.autocast(device.type, torch.float16) if self.in_fp16 else nullcontext():
            return self.image_encoder(pixels.to(device)).float()

    def cut(
        self, embedding: Tensor, size: tuple[int, int], box: Any | None = None, points: Any = ()
    ) -> tuple[Tensor, float]:
        """One prompt -> its mask (H, W) bool and the quality (IoU) that the model expects of it.

        size: the picture's (H, W). box: (x0, y0, x1, y1) in its pixels. points: (x, y, POINT or BACKGROUND_POINT).
        Points without a box are ambiguous (the button, the shirt, the person): of the model's three answers
        it takes the one that the model trusts most. A box has one answer.
        """
        logits, quality = self.prompt(embedding, size, box, points, several=box is None)
        best = int(quality.argmax())
        return logits[best] > 0, float(quality[best])

    def prompt(
        self, embedding: Tensor, size: tuple[int, int], box: Any, points: Any, several: bool
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (k, H, W) and their qualities (k,); k is 3 for several, else 1."""
        device = self.prompt_encoder.no_mask_embed.weight.device
        embedding = embedding.to(device)
        shape = self.shape(*size)
        ratio = torch.tensor([shape[1] / size[1], shape[0] / size[0]])  # x, y
        boxes = None if box is None else (torch.tensor(box).view(2, 2) * ratio).view(1, 4).to(device)
        marks = None
        if len(points):
            points = torch.tensor(points, dtype=torch.float32)
            marks = (points[None, :, :2] * ratio).to(device), points[None, :, 2].int().to(device)
        sparse, dense = self.prompt_encoder(points=marks, boxes=boxes, masks=None)
        low, quality = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        square = F.interpolate(low, (self.size, self.size), mode="bilinear", align_corners=False)
        logits = F.interpolate(square[..., : shape[0], : shape[1]], size, mode="bilinear", align_corners=False)
        return logits[0], quality[0]
