"""The scenes: what the caption tells is drawn, what it does not tell is shared, and a seed repeats itself."""

import pytest
import torch

from montage.demo import inputs, scenes, subject, vocabulary


def sample(n=64, seed=0, **kwargs):
    return scenes.sample(n, torch.Generator().manual_seed(seed), **kwargs)


def render(drawn, seed=0, size=128):
    return scenes.render(drawn, size, torch.Generator().manual_seed(seed))


def test_a_seed_repeats_itself():
    assert all(torch.equal(a, b) for a, b in zip(sample(), sample()))
    assert torch.equal(render(sample(8)), render(sample(8)))
    assert not torch.equal(render(sample(8)), render(sample(8, seed=1)))


def test_scenes_are_what_they_promise():
    drawn = sample(2000)
    present = drawn.shape >= 0
    counts = present.sum(1)
    assert torch.equal(counts.unique(), torch.tensor([1, 2, 3]))
    assert abs((counts == 2).float().mean() - 0.45) < 0.04
    for i in range(3):
        for j in range(i):
            both = present[:, i] & present[:, j]
            assert (drawn.colour[both, i] != drawn.colour[both, j]).all()
            apart = (
                (drawn.centre[both, i] - drawn.centre[both, j]).norm(dim=-1)
                - drawn.radius[both, i]
                - drawn.radius[both, j]
            )
            assert (apart < 0).float().mean() < 0.01, "objects overlap"
    low, high = torch.tensor(list(scenes.STYLE.values())).T
    assert ((drawn.style >= low) & (drawn.style <= high)).all()


def test_captions_tell_objects_in_either_order_and_no_style():
    drawn = sample(1, seed=11, count=2)
    drawn.background[0] = list(scenes.BACKGROUNDS).index("brick")
    drawn.colour[0, :2] = torch.tensor([0, 5])
    drawn.texture[0, :2] = torch.tensor([1, 0])
    drawn.shape[0, :2] = torch.tensor([0, 2])
    told = scenes.caption(drawn, 0)
    assert told == "a red striped ball and an orange star by a brick wall"
    assert scenes.caption(drawn, 0, backwards=True) == "an orange star and a red striped ball by a brick wall"
    assert scenes.caption(drawn.with_style(hue=0.02, angle=0.3, tint=1.0), 0) == told
    assert scenes.caption(drawn, 0, name="sks") == "a sks ball and a sks star by a brick wall"


@pytest.mark.parametrize(
    "without, told",
    [
        (["colour"], "a striped ball and a star by a brick wall"),
        (["texture"], "a red ball and an orange star by a brick wall"),
        (["place"], "a red striped ball and an orange star"),
        (["colour", "texture", "place"], "a ball and a star"),
    ],
)
def test_a_caption_can_leave_words_out(without, told):
    drawn = sample(1, seed=11, count=2)
    drawn.background[0] = list(scenes.BACKGROUNDS).index("brick")
    drawn.colour[0, :2], drawn.texture[0, :2] = torch.tensor([0, 5]), torch.tensor([1, 0])
    drawn.shape[0, :2] = torch.tensor([0, 2])
    assert scenes.caption(drawn, 0, without=without) == told
    drawn.colour[0, 1], drawn.texture[0, 1] = len(scenes.COLOURS) + 1, len(scenes.TEXTURES)
    fancy = told.replace("an orange star", "a fancy star" if without == ["place"] else "a star")
    assert scenes.caption(drawn, 0, without=without) == fancy


def test_words_can_be_left_out_of_many_captions_at_once():
    n = 300
    generator = torch.Generator().manual_seed(5)
    drawn = scenes.sample(n, generator, fancy=0.2)
    without = torch.rand(n, 3, generator=generator) < 0.5
    whole = vocabulary.tokenise([scenes.caption(drawn, row) for row in range(n)])
    told = [
        scenes.caption(
            drawn, row, without=[part for part, left in zip(scenes.CAPTION_PARTS, without[row].tolist()) if left]
        )
        for row in range(n)
    ]
    assert torch.equal(vocabulary.leave_out(whole, without), vocabulary.tokenise(told))
    empty = vocabulary.tokenise(["", ""])
    assert torch.equal(vocabulary.leave_out(empty, torch.ones(2, 3, dtype=torch.bool)), empty)


@pytest.mark.parametrize(
    "name, inside, outside",
    [
        ("hue", True, False),
        ("brightness", True, False),
        ("angle", True, False),
        ("period", True, False),
        ("light", True, False),
        ("outline", True, False),
        ("tint", False, True),
    ],
)
def test_each_style_variable_changes_what_it_is_for(name, inside, outside):
    drawn = sample(1, seed=4, count=2)
    drawn.colour[0, :2], drawn.texture[0, :2], drawn.shape[0, :2] = (
        torch.tensor([0, 2]),
        torch.tensor([1, 1]),
        torch.tensor([0, 1]),
    )
    low, high = scenes.STYLE[name]
    a, b = (render(drawn.with_style(**{name: low + share * (high - low)})) for share in (0.2, 0.7))
    solid = scenes.masks(drawn)[0] > 0.999
    changed = (a - b).abs().amax(1)[0] > 1e-3
    for slot in range(2):
        assert changed[solid[slot]].any() == inside, "both objects share the style"
    assert changed[~(scenes.masks(drawn)[0] > 0).any(0)].any() == outside


def test_fancy_objects_have_a_look_of_their_own_and_no_words_for_it():
    drawn = sample(2000, fancy=0.25)
    fancy = drawn.colour >= len(scenes.COLOURS)
    assert abs(fancy.sum() / (drawn.shape >= 0).sum() - 0.25) < 0.03
    assert torch.equal(fancy, drawn.texture >= len(scenes.TEXTURES))
    assert not (drawn.colour == scenes.SUBJECT_COLOUR).any(), "the subject is not among them"
    row, slot = fancy.nonzero()[0].tolist()
    assert scenes.phrase(drawn, row, slot) == f"a fancy {scenes.SHAPES[drawn.shape[row, slot]]}"
    assert not (sample(2000).colour >= len(scenes.COLOURS)).any()


def test_a_bigger_picture_is_the_same_picture():
    drawn = sample(16, seed=2)
    drawn = drawn._replace(background=torch.full_like(drawn.background, list(scenes.BACKGROUNDS).index("snow")))
    small, large = render(drawn), torch.nn.functional.avg_pool2d(render(drawn, size=256), 2)
    assert (small - large).abs().mean() < 0.02


def test_a_cutout_pasted_back_is_the_scene():
    drawn = sample(24, seed=3, count=1)
    scene, cutout = render(drawn), scenes.cutouts(drawn)
    empty = drawn._replace(shape=torch.full_like(drawn.shape, -1))
    alpha = cutout[:, 3:]
    pasted = alpha * cutout[:, :3] + (1 - alpha) * render(empty)
    assert (pasted - scene).abs().max() < 1e-4
    assert ((alpha > 0.01) & (alpha < 0.99)).any(), "edges are soft"
    assert torch.equal(alpha[:, 0], scenes.masks(drawn)[:, 0])


def test_the_layout_is_outlines_alone():
    drawn = sample(16, seed=5)
    hint, solid = scenes.layout(drawn), scenes.masks(drawn).amax(1)
    assert hint.shape == (16, 3, 128, 128) and hint.min() >= 0 and hint.max() <= 1
    assert 0.005 < hint.mean() < 0.2
    deep = -torch.nn.functional.max_pool2d(-solid[:, None], 9, 1, 4) > 0.999
    shape = drawn.shape[:, 0]
    flat = (shape == scenes.SHAPES.index("ball")) & (drawn.shape[:, 1] < 0)
    assert (hint[flat][:, :1][deep[flat]] == 0).all()


def test_the_subject_looks_the_same_in_every_photo_and_like_nothing_with_a_name():
    drawn, pictures = subject.photos()
    assert pictures.shape == (scenes.PHOTOS, 3, 128, 128)
    assert (drawn.colour[:, 0] == scenes.SUBJECT_COLOUR).all() and scenes.SUBJECT_COLOUR not in range(
        len(scenes.COLOURS)
    )
    style = drawn.style[
        :, [scenes.STYLE_NAMES.index(name) for name in ("hue", "brightness", "angle", "period", "outline")]
    ]
    assert (style == style[0]).all()
    assert torch.equal(subject.photos()[1], pictures)
    assert subject.captions(drawn, "sks")[0].startswith("a sks ball ")


def test_input_pictures_are_the_same_every_time_and_cutouts_have_alpha(tmp_path):
    from PIL import Image

    first, second = inputs.write(tmp_path / "a"), inputs.write(tmp_path / "b")
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]
    for path in first:
        picture = Image.open(path)
        assert picture.size == (128, 128)
        assert picture.mode == ("RGBA" if path.name.startswith("cutout") else "RGB")
        if picture.mode == "RGBA":
            low, high = picture.getchannel("A").getextrema()
            assert (low, high) == (0, 255)
