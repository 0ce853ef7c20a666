"""Layers on a canvas: where they lie, who is seen, how freely each place may change."""

import pytest
import torch
from PIL import Image

from montage.kernels import collage as kernel
from montage.nodes import previews
from montage.nodes.collage import CollageCanvas
from montage.workshop.collages import BLUE, RED, canvas, layer, plain


def shown(layers, **settings):
    return CollageCanvas.execute(layers, 64, 48, "", "#102030", 0.8, 0.0, **settings).ui["montage_canvas"][0]


def noisy(height, width, channels=4, seed=0):
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- placing


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (65, 31)])
def test_a_layer_of_the_canvas_size_lies_where_it_is(size):
    picture = kernel.premultiplied(noisy(*size)[0, ..., :3], noisy(*size)[0, ..., 3])
    assert torch.allclose(kernel.place(picture, size, 0.5, 0.5, 1.0, 0.0), picture, atol=1e-5)


def test_turns_are_clockwise():
    picture = kernel.premultiplied(noisy(40, 40)[0, ..., :3], torch.ones(40, 40))
    turned = kernel.place(picture, (40, 40), 0.5, 0.5, 1.0, 90.0)
    assert torch.allclose(turned, picture.rot90(-1, (1, 2)), atol=1e-4)  # rot90 turns the other way
    assert torch.allclose(kernel.place(picture, (40, 40), 0.5, 0.5, 1.0, -270.0), turned, atol=1e-4)


@pytest.mark.parametrize(
    "size, picture, box",
    [
        ((64, 64), (10, 10), (16, 16, 48, 48)),  # 32 of 64
        ((64, 128), (10, 10), (16, 48, 48, 80)),  # contained: the short side decides
        ((128, 64), (40, 80), (56, 16, 72, 48)),
        ((64, 64), (200, 100), (16, 24, 48, 40)),  # larger than its place
    ],
)
def test_scale_is_the_part_of_the_canvas_that_contains_it(size, picture, box):
    top, left, bottom, right = box
    placed = kernel.place(torch.ones(4, *picture), size, 0.5, 0.5, 0.5, 0.0)
    inside = torch.zeros(size)
    inside[top:bottom, left:right] = 1
    assert torch.allclose(placed, inside.expand(4, -1, -1), atol=1e-4)


def test_the_centre_may_lie_anywhere():
    square = torch.ones(4, 16, 16)
    at = kernel.place(square, (64, 64), 0.25, 0.75, 0.25, 0.0)[3]
    rows, columns = (at > 0.5).nonzero().unbind(1)
    assert [edge.item() for edge in (rows.min(), rows.max(), columns.min(), columns.max())] == [40, 55, 8, 23]
    half = kernel.place(square, (64, 64), 0.0, 0.5, 0.25, 0.0)[3]
    assert half.sum() == pytest.approx(128) and half[:, 8:].sum() == 0
    assert kernel.place(square, (64, 64), 2.0, 0.5, 0.25, 0.0).sum() == 0
    assert kernel.place(square, (64, 64), 0.5, 0.5, 0.25, 45.0)[3].sum() == pytest.approx(256, rel=0.02)


def test_transparent_pixels_have_no_colour():
    """A green fringe that cannot be seen stays unseen when the layer is made smaller."""
    image = plain((0.0, 1.0, 0.0), 64, 64, alpha=0.0).clone()
    image[:, 16:48, 16:48] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    _, composite, masks, *_ = canvas(layer(image, scale=0.3, rotation=17.0, trim=False), background="#000000")
    assert composite[..., 1].max() == 0 and composite[..., 0].max() > 0.99
    assert torch.allclose(composite[0, ..., 0], masks[0], atol=1e-6)


# ---------------------------------------------------------------- who is seen


def test_the_visible_masks_and_the_background_sum_to_one():
    """With soft edges: "over" squares no alpha."""
    a, b = plain(RED, alpha=0.5), plain(BLUE, alpha=0.5)
    _, composite, masks, *_ = canvas(layer(b, behind=layer(a)), background="#ffffff")
    assert torch.allclose(masks[:, 32, 32], torch.tensor([0.25, 0.5]))
    assert torch.allclose(composite[0, 32, 32], torch.tensor([0.5, 0.25, 0.75]))


def test_twenty_layers():
    layers = ()
    for number in range(20):
        layers = layer(
            noisy(40, 30, seed=number),
            x=number / 20,
            y=(number * 7 % 20) / 20,
            scale=0.4,
            rotation=18.0 * number,
            behind=layers,
        )
    background = torch.full((1, 64, 96, 3), 0.25)
    _, composite, masks, noise, _ = canvas(layers, width=96, height=64, background_image=background)
    assert masks.shape == (20, 64, 96) and masks.min() >= 0 and masks.sum(0).max() <= 1 + 1e-5
    nothing = masks.sum(0) == 0
    assert nothing.any() and torch.equal(composite[0][nothing], background[0][nothing])
    assert noise.shape == (1, 64, 96)


def test_depth_goes_before_the_chain_and_equal_depths_keep_it():
    def top(*depths):
        layers = ()
        for number, (colour, depth) in enumerate(zip((RED, BLUE), depths)):
            layers = layer(plain(colour), depth=depth, behind=layers, node=str(number))
        collage, composite, *_ = canvas(layers)
        return [one.node for one in collage.layers], tuple(composite[0, 32, 32].tolist())

    assert top(0, 0) == (["0", "1"], BLUE)
    assert top(1, 0) == (["1", "0"], RED)
    assert top(-5, -5) == (["0", "1"], BLUE)


# ---------------------------------------------------------------- how freely it may change


def two_halves(left, right, soft=1.0, **settings):
    below = layer(plain(RED, 64, 64), noise=left)
    above = torch.zeros(1, 64, 64, 4)
    above[:, :, 32:] = torch.tensor([*BLUE, soft])
    return canvas(layer(above, noise=right, trim=False, behind=below), **settings)[3][0]


def test_the_noise_map_holds_each_layers_noise():
    """What the released code gets wrong is a map of the largest noise everywhere."""
    noise = two_halves(0.8, 0.2)
    assert torch.allclose(noise[:, :32], torch.tensor(0.8)) and torch.allclose(noise[:, 32:], torch.tensor(0.2))
    assert torch.allclose(two_halves(0.8, 0.2, soft=0.5)[:, 32:], torch.tensor(0.5))  # alpha once, not twice
    assert torch.allclose(two_halves(0.8, 0.8, blur=10.0), torch.tensor(0.8), atol=1e-6)


@pytest.mark.parametrize("blur", [0.0, 3.0, 10.0])
def test_a_layer_without_noise_keeps_0_under_the_blur(blur):
    noise = two_halves(0.8, 0.0, blur=blur)
    assert (noise[:, 32:] == 0).all() and (noise[:, :32] > 0).all()
    if blur:
        assert noise[32, 31] < 0.5 < noise[32, 2]


def test_more_noise_never_starts_later():
    previous = two_halves(0.5, 0.0, blur=6.0)
    for step in (0.2, 0.5, 0.7, 1.0):
        current = two_halves(0.5, step, blur=6.0)
        assert (current >= previous - 1e-6).all()
        previous = current


def test_the_blur_is_in_pixels_of_the_canvas():
    edge = two_halves(1.0, 0.5, blur=4.0)[32]
    profile = (edge - 0.5) * 2
    expected = 0.5 * (1 - torch.erf((torch.arange(64) + 0.5 - 32) / (4.0 * 2**0.5)))
    assert torch.allclose(profile, expected, atol=0.01)


def test_the_background_has_its_own_noise():
    noise = canvas(layer(plain(RED), scale=0.5, noise=0.3), background_noise=0.0)[3][0]
    assert noise[32, 32] == pytest.approx(0.3) and noise[2, 2] == 0


# ---------------------------------------------------------------- the nodes


def test_what_cuts_a_layer_out():
    rgb, mask = noisy(20, 30, 3), torch.zeros(1, 20, 30)
    mask[:, 5:15, 10:20] = 1
    assert layer(rgb)[0].picture.shape == (4, 20, 30)
    cut = layer(rgb, mask=mask)[0].picture
    assert cut.shape == (4, 10, 10) and torch.equal(cut[:3], rgb[0, 5:15, 10:20].movedim(-1, 0))
    assert layer(rgb, mask=mask, trim=False)[0].picture.shape == (4, 20, 30)
    assert torch.equal(layer(torch.cat([rgb, mask[..., None]], -1))[0].picture, cut)
    assert torch.equal(layer(torch.cat([rgb, mask[..., None]], -1), mask=1 - mask)[0].picture[3], 1 - mask[0])


def test_load_image_can_be_wired_as_it_comes():
    rgb, shape = noisy(20, 30, 3), torch.zeros(1, 20, 30)
    shape[:, 5:15, 10:20] = 1
    wired = {"1": {"inputs": {"mask": ["5", 1]}}, "5": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}}
    cut = layer(rgb, mask=shape)[0].picture
    assert torch.equal(layer(rgb, mask=1 - shape, mask_is="auto", prompt=wired)[0].picture, cut)
    assert torch.equal(layer(rgb, mask=1 - shape, mask_is="transparency")[0].picture, cut)
    opaque = layer(rgb, mask=torch.zeros(1, 64, 64), mask_is="auto", prompt=wired)[0].picture
    assert opaque.shape == (4, 20, 30) and (opaque[3] == 1).all()
    inverted = wired | {"5": {"class_type": "InvertMask", "inputs": {"mask": ["6", 1]}}}
    painted = wired | {"5": {"class_type": "LoadImage", "inputs": {"image": "clipspace/painted.png [input]"}}}
    for prompt in (inverted, painted, None):
        assert torch.equal(layer(rgb, mask=shape, mask_is="auto", prompt=prompt)[0].picture, cut)
    assert torch.equal(layer(rgb, mask=shape, prompt=wired)[0].picture, cut)  # saved before mask_is: the shape


def test_a_mask_taken_the_wrong_way_is_named():
    with pytest.raises(ValueError, match="taken as the layer's shape.*set mask_is to transparency"):
        layer(noisy(8, 8), mask=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="1 everywhere and was taken as transparency.*set mask_is to shape"):
        layer(noisy(8, 8), mask=torch.ones(1, 8, 8), mask_is="transparency")


def test_flip_mirrors():
    rgb = noisy(20, 30, 3)
    assert torch.equal(layer(rgb, flip=True)[0].picture, layer(rgb)[0].picture.flip(-1))


def test_a_layer_off_the_canvas_is_told(caplog):
    canvas(layer(plain(RED), "a red square", x=-1.5, scale=0.5, node="12"))
    assert 'the layer "a red square" (node 12) lies off the canvas' in caplog.text


def test_the_prompt():
    layers = layer(plain(RED), "a red square", behind=layer(plain(BLUE), behind=layer(plain(BLUE), " a blue square ")))
    assert canvas(layers)[4] == "a blue square, a red square"
    assert canvas(layers, prompt=" a red square on a blue square\n")[4] == "a red square on a blue square"


def test_what_the_editor_gets(tmp_path, monkeypatch):
    monkeypatch.setattr(previews.folder_paths, "get_temp_directory", lambda: str(tmp_path))
    soft = plain(RED, 10, 20, alpha=0.5).clone()
    soft[:, 0] = 0
    layers = layer(soft, "a red card", behind=layer(plain(BLUE), depth=3, node="5:7"), node="12")
    data = shown(layers)
    assert (data["width"], data["height"], data["background"]) == (64, 48, "#102030")
    card, other = data["layers"]
    assert (card["node"], card["text"], card["width"], card["height"]) == ("12", "a red card", 20, 9)
    assert (other["node"], other["text"]) == ("5:7", "")
    picture = Image.open(tmp_path / "montage" / f"{card['picture']}.png")
    assert picture.mode == "RGBA" and picture.size == (20, 9) and picture.getpixel((3, 3)) == (255, 0, 0, 128)
    data = shown(layers, background_image=torch.full((1, 96, 128, 3), 0.5))
    assert Image.open(tmp_path / "montage" / f"{data['background']}.jpg").size == (64, 48)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: layer(noisy(8, 8).repeat(2, 1, 1, 1)), "Collage Layer: 2 images came in one batch"),
        (lambda: layer(noisy(8, 8), mask=torch.ones(1, 4, 4)), "Collage Layer: the mask is 4x4 and the image 8x8"),
        (lambda: layer(noisy(8, 8), mask=torch.zeros(1, 8, 8)), "its mask is 0 everywhere.*Invert Mask"),
        (lambda: layer(plain(RED, alpha=0.0)), "its alpha is 0 everywhere"),
        (
            lambda: canvas(layer(noisy(8, 8)), background="grey"),
            'Collage Canvas: background "grey" is not a colour. Write it as #rrggbb',
        ),
        (
            lambda: canvas(layer(noisy(8, 8)), background_image=noisy(8, 8, 3).repeat(3, 1, 1, 1)),
            "background_image is a batch of 3",
        ),
    ],
)
def test_errors(made, message):
    with pytest.raises(ValueError, match=message):
        made()
