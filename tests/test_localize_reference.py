"""The adapters against the packages they stand in for: groundingdino-py 0.4.0 under transformers 4.49, and
segment-anything 1.0. Their outputs with seeded weights are stored; workshop/localize_reference.py made them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from montage.localize import grounding_dino, segment_anything
from montage.workshop import localize_reference as reference

pytestmark = pytest.mark.slow
DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4


def stored(name: str) -> tuple[dict, dict]:
    """The original's outputs, and seeded weights under the keys that a published checkpoint has."""
    with safe_open(DATA / f"localize_{name}.safetensors", "pt") as file:
        outputs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return outputs, reference.seeded(json.loads(file.metadata()["shapes"]))


class ReplayedTopK(torch.overrides.TorchFunctionMode):
    def __init__(self, indices: torch.Tensor):
        super().__init__()
        self.indices = indices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return (result[0], self.indices) if func is torch.topk else result


@pytest.mark.parametrize("name", ["swint", "swinb"])
def test_grounding_dino(name):
    pytest.importorskip("groundingdino")
    expected, weights = stored(name)
    model = grounding_dino.build_detector(weights, reference.vocabulary())
    assert model.tokenizer.ids(reference.CAPTION) == expected["ids"].tolist()
    features = model.image_features(reference.picture(), reference.DETECT_SIZE)
    assert tuple(features.mask.shape[1:]) == tuple(expected["pixels_shape"][1:].tolist())

    def differences(found):
        tokens = expected["logits"].shape[1]
        assert torch.isinf(found["pred_logits"][0, :, tokens:]).all()
        return (found["pred_logits"][0, :, :tokens] - expected["logits"]).abs().amax(1), (
            found["pred_boxes"][0] - expected["boxes"]
        ).abs().amax(1)

    with ReplayedTopK(expected["top"].long()[None]):
        logits, boxes = differences(model.raw(features, reference.CAPTION))
    assert logits.max() < TOLERANCE and boxes.max() < TOLERANCE
    # On its own choice a tie in the last digit (it depends on the number of threads) may exchange a few of the 900
    # queries;
    # the others attend to them, and move by a little.
    logits, boxes = differences(model.raw(features, reference.CAPTION))
    assert ((logits > 50 * TOLERANCE) | (boxes > 50 * TOLERANCE)).sum() <= 9
    # The comparison says something: the answers differ from query to query.
    assert expected["logits"].std() > 1 and expected["boxes"].std(0).min() > 0.05


def test_segment_anything():
    pytest.importorskip("segment_anything")
    expected, weights = stored("vit_b")
    model = segment_anything.build_segmenter(weights)
    embedding = model.embed(reference.picture())
    assert (embedding[0, ::8, ::8, ::8] - expected["embedding"]).abs().max() < TOLERANCE
    for name, box, points in (
        ("box", reference.BOX, ()),
        ("points", None, reference.POINTS),
        ("both", reference.BOX, reference.POINTS),
    ):
        logits, quality = model.prompt(embedding, reference.IMAGE_SIZE, box, points, several=box is None)
        assert (logits[:, ::5, ::5] - expected[f"{name}_logits"]).abs().max() < TOLERANCE
        assert (quality - expected[f"{name}_quality"]).abs().max() < TOLERANCE
        assert (
            (logits > 0).sum((1, 2)) - expected[f"{name}_area"]
        ).abs().max() <= 2  # a pixel whose logit is all but 0
        mask, best = model.cut(embedding, reference.IMAGE_SIZE, box, points)
        assert mask.shape == reference.IMAGE_SIZE and best == pytest.approx(float(quality.max()))
    assert expected["box_logits"].std() > 0.1
