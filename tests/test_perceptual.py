"""The perceptual measures of the evidence: they say what they should of pictures whose likeness is known."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from montage.demo import scenes
from montage.evidence import perceptual
from montage.workshop.photographs import NAMES, photograph

SIDE = 128


def renders(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(scenes.render(scenes.sample(count, generator, count=2), SIDE, generator).movedim(1, -1))


PICTURES = {**{name: photograph(name) for name in NAMES}, **{f"scene {n}": p for n, p in enumerate(renders(2))}}


def blurred(picture: torch.Tensor, deviation: float) -> torch.Tensor:
    return torch.from_numpy(gaussian_filter(picture.numpy(), (deviation, deviation, 0)))


def noisy(picture: torch.Tensor, deviation: float) -> torch.Tensor:
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    return (picture + deviation * noise).clamp(0, 1)


def compressed(picture: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)) / 255).float()


def shifted(picture: torch.Tensor, pixels: int) -> torch.Tensor:
    return torch.roll(picture, pixels, 1)


def test_the_network_knows_what_it_was_taught():
    for name, classes in (("chelsea", range(281, 286)), ("coffee", [967])):  # ImageNet's house cats, and espresso
        with torch.inference_mode():
            seen = perceptual.network().classes(perceptual._batch(photograph(name, 224)))[0]
        assert seen.argmax().item() in classes and seen[list(classes)].sum() > 0.7


def test_weights_that_were_not_pinned_are_not_read(monkeypatch):
    monkeypatch.setattr(perceptual, "SHA256", "0" * 64)
    perceptual.network.cache_clear()
    with pytest.raises(ValueError, match="not the weights that were pinned"):
        perceptual.network()


@pytest.mark.parametrize("name", PICTURES)
def test_same_and_other_pictures(name):
    picture = PICTURES[name]
    tinted = (picture + torch.tensor([0.02, -0.02, 0.02])).clamp(0, 1)
    assert perceptual.feature_distance(picture, picture) == 0
    assert perceptual.feature_distance(picture, tinted) < 0.05
    assert perceptual.embedding_cosine(picture, picture) == pytest.approx(1, abs=1e-5)
    assert perceptual.embedding_cosine(picture, tinted) > 0.95
    for other in PICTURES:
        if other != name:
            assert perceptual.feature_distance(picture, PICTURES[other]) > 0.3
            assert perceptual.embedding_cosine(picture, PICTURES[other]) < 0.9


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    ("change", "amounts"),
    [
        (blurred, (0.5, 1, 2, 4)),
        (noisy, (0.02, 0.05, 0.1, 0.2)),
        (compressed, (90, 60, 30, 10)),
        (shifted, (1, 2, 4, 8)),
    ],
)
def test_more_of_a_change_is_further_away(name, change, amounts):
    picture = PICTURES[name]
    found = [perceptual.feature_distance(picture, change(picture, amount)) for amount in amounts]
    assert found == sorted(found) and found[0] > 0 and len(set(found)) == len(found)


def test_only_what_the_mask_holds_counts():
    picture, mask = PICTURES["scene 0"], torch.zeros(SIDE, SIDE)
    changed = picture.clone()
    changed[:, : SIDE // 2] = PICTURES["scene 1"][:, : SIDE // 2]
    mask[:, -SIDE // 4 :] = 1
    assert perceptual.feature_distance(changed, picture, mask) < 0.3 * perceptual.feature_distance(
        changed, picture, 1 - mask
    )
    with pytest.raises(ValueError, match="mask is empty"):
        perceptual.feature_distance(picture, picture, 0 * mask)


def test_a_cut_out_is_alike_wherever_it_stands():
    picture, mask = torch.full((SIDE, SIDE, 3), 0.2), torch.zeros(SIDE, SIDE)
    picture[20:60, 20:60], mask[20:60, 20:60] = photograph("chelsea", 40), 1
    moved, moved_mask = torch.ones(SIDE, SIDE, 3), torch.roll(mask, (50, 60), (0, 1))
    moved[70:110, 80:120] = photograph("chelsea", 40)
    assert perceptual.embedding_cosine(picture, moved, mask, moved_mask) == pytest.approx(1, abs=1e-5)
    moved[70:110, 80:120] = photograph("coffee", 40)
    assert perceptual.embedding_cosine(picture, moved, mask, moved_mask) < 0.7
    assert perceptual.cut_out(picture, mask).shape == (48, 48, 3)
