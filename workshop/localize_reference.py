"""Reference outputs of the original packages with seeded weights, for tests/test_localize_reference.py.

Run in an environment of its own, where the originals work as published:
    pip install groundingdino-py==0.4.0 transformers==4.49.0 segment-anything==1.0
    python workshop/localize_reference.py tests/data
Writes one localize_<model>.safetensors each: the outputs, and the checkpoint's keys and shapes as metadata.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

CAPTION = "a red cat . is it a blue dog ? hot ball ."
WORDS = ["a", "red", "cat", "is", "it", "blue", "dog", "hot", "ball"]
DETECT_SIZE = 240
IMAGE_SIZE = 150, 211  # odd on purpose: every rounding shows
BOX, POINTS = (40.0, 30.0, 151.0, 109.0), [(90.0, 70.0, 1), (20.0, 140.0, 0)]
DETECTORS = {"swint": "swin_T_224_1k", "swinb": "swin_B_384_22k"}


def picture() -> np.ndarray:
    """uint8 (H, W, 3): smooth waves, so that resizing matters but aliasing does not."""
    h, w = IMAGE_SIZE
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    waves = [np.sin(x / 17 + c) * np.cos(y / (11 + 3 * c)) for c in range(3)]
    return np.round(127.5 * (1 + np.stack(waves, -1))).astype(np.uint8)


def vocabulary() -> dict[str, int]:
    """As long as BERT's and with its special tokens in their places, but only our words in it."""
    tokens = [f"[unused{i}]" for i in range(30522)]
    for at, token in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        tokens[at] = token
    tokens[2000 : 2000 + len(WORDS)] = WORDS
    return {token: at for at, token in enumerate(tokens)}


def seeded(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Random weights that depend on nothing but their name and shape, and keep activations at a sane size."""
    return {key: _weight(key, shape) for key, shape in shapes.items()}


def _weight(key: str, shape: list[int]) -> torch.Tensor:
    # One box head serves all layers: the file lists it many times, and every copy has to be the same.
    name = re.sub(r"^transformer\.decoder\.bbox_embed", "bbox_embed", key)
    name = re.sub(r"^bbox_embed\.\d+", "bbox_embed.0", name)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        noise *= 0.8 / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        noise = 1 + 0.1 * noise
    else:
        noise *= 0.1
    return torch.from_numpy(np.ascontiguousarray(noise))


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Of the floating tensors; index tables are computed, not learned."""
    return {k: list(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}


class TopK(torch.overrides.TorchFunctionMode):
    """Records what torch.topk chose. The 900 best places are paired with queries by rank, so a tie in the last
    digit exchanges queries: whoever compares must replay the choice."""

    def __init__(self):
        super().__init__()
        self.indices: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.topk:
            self.indices.append(result[1])
        return result


def detector_reference(kind: str) -> tuple[dict, dict]:
    import groundingdino
    import groundingdino.datasets.transforms as T
    from groundingdino.models import build_model
    from groundingdino.util.slconfig import SLConfig
    from PIL import Image
    from transformers import BertConfig, BertModel, BertTokenizer

    config = {"swint": "GroundingDINO_SwinT_OGC.py", "swinb": "GroundingDINO_SwinB_cfg.py"}[kind]
    with tempfile.TemporaryDirectory() as bert:
        Path(bert, "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        BertTokenizer(f"{bert}/vocab.txt").save_pretrained(bert)
        BertModel(BertConfig()).save_pretrained(bert)
        args = SLConfig.fromfile(str(Path(groundingdino.__file__).parent / "config" / config))
        args.device, args.text_encoder_type = "cpu", bert
        model = build_model(args).eval()
    shapes = shapes_of(model)
    model.load_state_dict(seeded(shapes), strict=False)

    resize = T.Compose(
        [
            T.RandomResize([DETECT_SIZE], max_size=1333),
            T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    pixels, _ = resize(Image.fromarray(picture()), None)
    with torch.no_grad(), TopK() as top:
        out = model(pixels[None], captions=[CAPTION])
    tokens = len(model.tokenizer(CAPTION)["input_ids"])
    return {
        "pixels_shape": torch.tensor(pixels.shape),
        "pixels_mean": pixels.mean((1, 2)),
        "ids": torch.tensor(model.tokenizer(CAPTION)["input_ids"]),
        "logits": out["pred_logits"][0, :, :tokens],
        "boxes": out["pred_boxes"][0],
        "top": top.indices[0][0].int(),
    }, shapes


def segmenter_reference() -> tuple[dict, dict]:
    from segment_anything import SamPredictor, sam_model_registry

    model = sam_model_registry["vit_b"]().eval()
    shapes = shapes_of(model)
    model.load_state_dict(seeded(shapes))
    predictor = SamPredictor(model)
    predictor.set_image(picture())
    outputs = {"embedding": predictor.features[0, ::8, ::8, ::8]}
    points = np.array([p[:2] for p in POINTS]), np.array([p[2] for p in POINTS])
    prompts = {
        "box": {"box": np.array(BOX), "multimask_output": False},
        "points": {"point_coords": points[0], "point_labels": points[1], "multimask_output": True},
        "both": {"box": np.array(BOX), "point_coords": points[0], "point_labels": points[1], "multimask_output": False},
    }
    for name, prompt in prompts.items():
        logits, quality, _ = predictor.predict(**prompt, return_logits=True)
        outputs[f"{name}_logits"] = torch.from_numpy(logits)[:, ::5, ::5]
        outputs[f"{name}_area"] = torch.from_numpy((logits > 0).sum((1, 2)))
        outputs[f"{name}_quality"] = torch.from_numpy(quality)
    return outputs, shapes


if __name__ == "__main__":
    from safetensors.torch import save_file

    for name, make in {
        "swint": detector_reference,
        "swinb": detector_reference,
        "vit_b": lambda _: segmenter_reference(),
    }.items():
        tensors, shapes = make(name)
        path = Path(sys.argv[1]) / f"localize_{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"shapes": json.dumps(shapes)})
        print(path, path.stat().st_size, {k: tuple(v.shape) for k, v in tensors.items()})
