"""Pictures and masks that are none: each node says so in one sentence, which names the node and the input."""

import pytest
import torch
from comfy_api.latest import io

from montage.nodes.collage import CollageLayer
from montage.nodes.layout_retouch import AdaptiveMaskBlend, MultiSourceSwap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.nodes.record import InvertImage
from montage.workshop.collages import RED, canvas, layer, plain
from montage.workshop.package_contents import schemas
from montage.workshop.random_models import random_model
from montage.workshop.sampling import cut, halves, inject, masks_of, record, sample, words

SIZE = (64, 64)


def broken(shape, value):
    tensor = torch.rand(shape)
    tensor.view(-1)[5] = value
    return tensor


IMAGES = {
    "NaN": broken((1, *SIZE, 3), float("nan")),
    "infinite": broken((1, *SIZE, 3), float("inf")),
    "no pixels": torch.zeros(1, 0, 64, 3),
    "one channel": torch.zeros(1, *SIZE, 1),
    "no batch": torch.zeros(*SIZE, 3),
    "none": torch.zeros(0, *SIZE, 3),
}
MASKS = {
    "NaN": broken((1, *SIZE), float("nan")),
    "no pixels": torch.zeros(1, 0, 64),
    "a picture's rank": torch.zeros(1, 1, 1, *SIZE),
    "a row": torch.zeros(64),
}


@pytest.fixture(scope="module")
def recorded():
    with torch.inference_mode():
        return [record(seed) for seed in (1, 2)]


def swap(recorded, **masks):
    given = {"subject_mask": torch.ones(SIZE), "edit_mask": torch.ones(SIZE), **masks}
    return CollaborativeAttention.execute(
        random_model("sd15-small"),
        recorded[0],
        given["subject_mask"],
        {"preset": "notebook edit"},
        5,
        False,
        False,
        "SAGI first",
        0.3,
        "soft",
        recorded[1],
        given["edit_mask"],
    )


TAKE_IMAGES = {
    ("Collage Layer", "image"): lambda recorded, image: CollageLayer.picture(image, None, True),
    ("Collage Canvas", "background_image"): lambda recorded, image: canvas(
        layer(plain(RED), "red"), background_image=image
    ),
    ("Graph Cut Montage", "image0"): lambda recorded, image: cut(recorded, [image, torch.zeros(1, *SIZE, 3)]),
    ("Graph Cut Montage", "stroke_picture"): lambda recorded, image: cut(
        recorded, [torch.zeros(1, *SIZE, 3)] * 2, stroke_picture=image
    ),
}
TAKE_MASKS = {
    ("Collage Layer", "mask"): lambda recorded, mask: CollageLayer.picture(torch.ones(1, *SIZE, 3), mask, True),
    ("Graph Cut Montage", "stroke_masks"): lambda recorded, mask: cut(
        recorded, [torch.zeros(1, *SIZE, 3)] * 2, stroke_masks=mask
    ),
    ("Composite Attention Inject", "masks"): lambda recorded, mask: inject(recorded, mask),
    ("Collaborative Attention", "subject_mask"): lambda recorded, mask: swap(recorded, subject_mask=mask),
    ("Collaborative Attention", "edit_mask"): lambda recorded, mask: swap(recorded, edit_mask=mask),
    ("Adaptive Mask Blend", "sam_mask"): lambda recorded, mask: AdaptiveMaskBlend.execute(0.3, 0.01, "sam", None, mask),
    ("Multi Source Swap", "mask"): lambda recorded, mask: MultiSourceSwap.execute(
        random_model("sd15-small"), recorded[0], recorded[1], 0.2, 0.6, 1.0, "all", mask=mask
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("node, name", TAKE_IMAGES)
def test_what_is_no_picture_is_refused(recorded, node, name, kind):
    with pytest.raises(ValueError, match=f"^{node}: {name} "):
        TAKE_IMAGES[node, name](recorded, IMAGES[kind])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("node, name", TAKE_MASKS)
def test_what_is_no_mask_is_refused(recorded, node, name, kind):
    with pytest.raises(ValueError, match=f"^{node}: {name} "):
        TAKE_MASKS[node, name](recorded, MASKS[kind])


def test_a_latent_of_a_vae_that_overflowed_is_refused():
    with pytest.raises(ValueError, match="^Invert Image: latent holds 1 values .* --fp32-vae"):
        InvertImage.execute(
            random_model("sd15-small"),
            {"samples": broken((1, 4, 8, 8), float("nan"))},
            torch.tensor([10.0, 1.0, 0.0]),
            words(1),
        )


def test_masks_of_other_packs_are_taken(recorded):
    """[B, 1, H, W] means what [B, H, W] does."""
    masks = masks_of(halves())
    own, theirs = (sample(*inject(recorded, given), steps=4)["samples"] for given in (masks, masks[:, None]))
    assert torch.equal(own, theirs)


def nested(inputs):
    for one in inputs:
        yield one
        for option in getattr(one, "options", None) or ():
            yield from nested(getattr(option, "inputs", ()))


def test_every_number_has_bounds():
    """So that ComfyUI itself refuses an absurd one, by the node's id and the input's name, before anything runs."""
    numbers = [
        (schema.node_id, one)
        for schema in schemas()
        for one in nested(schema.inputs)
        if isinstance(one, (io.Int.Input, io.Float.Input))
    ]
    assert numbers and not [(node, one.id) for node, one in numbers if one.min is None or one.max is None]
