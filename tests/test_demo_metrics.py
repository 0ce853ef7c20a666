"""Every yardstick on a case with a known answer, and on one where it must fail."""

import math

import numpy as np
import pytest
import torch

from montage.demo import detector, metrics, scenes


@pytest.fixture(scope="module")
def judge():
    return detector.load()


@pytest.fixture(scope="module")
def held_out():
    """200 scenes that no training draws, and their pictures."""
    generator = torch.Generator().manual_seed(424_242)
    drawn = scenes.sample(200, generator)
    return drawn, scenes.render(drawn, 128, generator).movedim(1, -1)


def one(style=None, seed=5, **fields):
    """One scene with one object in the middle, and its picture; fields by index into the words."""
    drawn = scenes.sample(1, torch.Generator().manual_seed(seed), count=1)
    drawn.centre[:], drawn.radius[:, 0] = 0.5, 0.27
    for name, value in fields.items():
        getattr(drawn, name)[..., 0] = value
    drawn = drawn.with_style(**(style or {}))
    return drawn, scenes.render(drawn, 128, torch.Generator().manual_seed(seed))[0].movedim(0, -1)


HALF = torch.zeros(64, 64)
HALF[:, :32] = 1
GREY = torch.full((64, 64, 3), 0.5)


# ----------------------------------------------------------------------------------- picture to picture


def test_psnr_of_a_known_error():
    off = GREY.clone()
    off[:, :32] += 0.1
    off[:, 32:] += 0.01
    assert metrics.masked_psnr(off, GREY, HALF) == pytest.approx(20.0, abs=1e-4)
    assert metrics.background_psnr(off, GREY, HALF) == pytest.approx(40.0, abs=1e-4)
    assert metrics.masked_psnr(GREY, GREY, HALF) == math.inf


def test_psnr_agrees_with_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    a, b = np.random.default_rng(0).random((2, 64, 64, 3))
    assert metrics.masked_psnr(a, b, np.ones((64, 64))) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0))


def test_ssim_is_one_for_equal_and_near_zero_for_noise():
    a, b = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    mixed = torch.where(HALF[..., None] > 0, a, b)
    assert metrics.masked_ssim(a, a, HALF) == pytest.approx(1.0)
    assert metrics.masked_ssim(mixed, b, HALF) < 0.15
    assert metrics.masked_ssim(mixed, b, 1 - HALF) > 0.9


@pytest.mark.parametrize("measure", [metrics.masked_psnr, metrics.masked_ssim])
def test_an_empty_mask_is_refused(measure):
    with pytest.raises(ValueError, match="mask is empty"):
        measure(GREY, GREY, torch.zeros(64, 64))


def test_seam_gradient_of_a_step_of_known_height():
    """A step of height s between two columns: scikit-image's Sobel, a mean over both axes, gives s / sqrt 2."""
    dark, light = torch.full((64, 64, 3), 0.25), torch.full((64, 64, 3), 0.75)
    pasted = torch.where(HALF[..., None] > 0, dark, light)
    seam = metrics.seam_gradient(pasted, HALF.long(), [dark, light])
    assert seam.score == pytest.approx(0.5 / math.sqrt(2), rel=1e-6)
    assert (seam.low, seam.high) == (0.0, 0.0)
    assert not seam.in_range, "a hard paste of two flat pictures is a visible seam"
    ramp = torch.linspace(0.25, 0.75, 64)[None, :, None].expand(64, 64, 3)
    assert metrics.seam_gradient(ramp, HALF.long(), [dark, pasted]).in_range


def test_seam_gradient_needs_a_seam():
    with pytest.raises(ValueError, match="one label only"):
        metrics.seam_gradient(GREY, torch.zeros(64, 64, dtype=torch.long), [GREY])


# ------------------------------------------------------------------------------------- region to region


def test_colour_distance_of_a_known_shift():
    """Greys of lightness 50 and 60 are 10 apart; where the regions lie does not matter."""
    from skimage.color import lab2rgb

    light, dark = (np.broadcast_to(lab2rgb(np.array([[[v, 0.0, 0.0]]])), (64, 64, 3)) for v in (60.0, 50.0))
    assert metrics.colour_distance(light, HALF, dark, 1 - HALF) == pytest.approx(10.0, abs=0.05)
    assert metrics.colour_distance(light, HALF, light, 1 - HALF) == pytest.approx(0.0, abs=1e-6)


def test_colour_distance_tells_two_reds_from_red_and_blue():
    at = {"texture": 0, "shape": scenes.SHAPES.index("ball")}
    (drawn, red), (_, other), (_, blue) = (one(seed=seed, colour=c, **at) for seed, c in ((5, 0), (6, 0), (5, 2)))
    mask = scenes.masks(drawn)[0, 0]
    assert metrics.colour_distance(red, mask, other, mask) < 25 < 60 < metrics.colour_distance(red, mask, blue, mask)


def test_texture_similarity_follows_the_texture_not_the_colour():
    def box(texture, colour, angle=0.0):
        drawn, picture = one(
            {"angle": angle, "period": 0.12, "outline": 0.01, "light": 0.0, "brightness": 0.0},
            texture=texture,
            colour=colour,
            shape=scenes.SHAPES.index("box"),
        )
        return picture, scenes.masks(drawn)[0, 0]

    stripes, other_colour, turned = box(1, 0), box(1, 2), box(1, 0, angle=0.25)
    plain, dots, checks = box(0, 0), box(2, 0), box(3, 0)
    assert metrics.texture_similarity(*stripes, *stripes) == pytest.approx(1.0)
    assert metrics.texture_similarity(*stripes, *other_colour) > 0.95
    assert metrics.texture_similarity(*stripes, *turned) > 0.65
    for unlike in (plain, dots, checks):
        assert metrics.texture_similarity(*stripes, *unlike) < 0.5


# --------------------------------------------------------------------------------------- what it shows


def test_the_reader_reads_held_out_scenes(judge, held_out):
    drawn, pictures = held_out
    verdicts = [
        metrics.judge(metrics.look(judge, picture), drawn.background[i].item(), metrics.wanted(drawn, i))
        for i, picture in enumerate(pictures)
    ]

    def share(field):
        return np.mean(np.concatenate([np.atleast_1d(getattr(verdict, field)) for verdict in verdicts]))

    assert share("background") >= 0.99
    assert share("colour") >= 0.97
    assert share("shape") >= 0.95
    assert share("texture") >= 0.95
    assert share("present") >= 0.95


def test_the_reader_fails_the_wrong_prompt(judge, held_out):
    """Judged against the next scene's prompt, the same pictures are wrong as often as chance has it."""
    drawn, pictures = held_out
    other = drawn.take(torch.arange(len(pictures)).roll(1))
    verdicts = [
        metrics.judge(metrics.look(judge, picture), other.background[i].item(), metrics.wanted(other, i))
        for i, picture in enumerate(pictures)
    ]
    assert np.mean([verdict.background for verdict in verdicts]) < 0.3
    assert np.mean([verdict.present for verdict in verdicts]) < 0.2


def test_an_object_is_found_where_it_stands_and_nowhere_else(judge):
    drawn, picture = one()
    _, _, (found,) = metrics.look(judge, picture)
    assert metrics.placed(found, scenes.masks(scenes_with_ball(drawn))[0, 0])
    corner = torch.zeros(128, 128)
    corner[:32, :32] = 1
    assert not metrics.placed(found, corner)
    assert not metrics.placed(None, 1 - corner)


def scenes_with_ball(drawn):
    drawn.shape[:, 0] = scenes.SHAPES.index("ball")
    return drawn


def test_judge_gives_every_wanted_object_its_own():
    """One red ball cannot stand for two."""
    ball = detector.Found(0.9, (0.5, 0.5), shape=0, colour=0, texture=0, style={})
    box = detector.Found(0.8, (0.2, 0.2), shape=1, colour=2, texture=0, style={})
    red_ball, blue_box = metrics.Wanted(0, 0, 0), metrics.Wanted(2, 0, 1)
    both = metrics.judge((3, 0.0, [ball, box]), 3, [blue_box, red_ball])
    assert both.present and both.objects == [box, ball] and both.background and both.spare == 0
    twice = metrics.judge((3, 0.0, [ball]), 2, [red_ball, red_ball])
    assert twice.colour == [True, False] and not twice.present and not twice.background
    nothing = metrics.judge((3, 0.0, []), 3, [red_ball])
    assert nothing.objects == [None] and not nothing.present
    assert metrics.judge((3, 0.0, [ball, box]), 3, [red_ball]).spare == 1


def test_style_code_comes_back_as_it_went_in():
    style = scenes.sample(50, torch.Generator().manual_seed(1)).style
    for row, code in zip(style, detector.encode_style(style)):
        for value, (name, back) in zip(row.tolist(), detector.decode_style(code).items()):
            assert detector.style_error(name, value, back) < 1e-4


def test_style_error_of_angles_wraps_round():
    assert detector.style_error("angle", 0.01, 0.49) == pytest.approx(0.08)  # half a turn is the same line
    assert detector.style_error("light", 0.95, 0.05) == pytest.approx(0.2)
    assert detector.style_error("light", 0.0, 0.5) == 1.0
    assert detector.style_error("brightness", -1.0, 1.0) == 1.0


# Hue and outline are not here: the reader of these weights reads both coarsely.
@pytest.mark.parametrize(
    "name, a, b", [("brightness", -0.8, 0.8), ("angle", 0.06, 0.31), ("period", 0.09, 0.15), ("light", 0.1, 0.6)]
)
def test_style_errors_see_one_changed_variable(judge, name, a, b):
    """A striped blue ball twice: the variable that changed is seen to change more than when nothing did."""
    base = {"hue": 0.0, "brightness": 0.0, "angle": 0.1, "period": 0.11, "tint": 0.0, "light": 0.3, "outline": 0.02}

    def found(value, seed):
        _, picture = one(base | {name: value}, seed=seed, colour=2, texture=1, shape=0)
        return metrics.look(judge, picture)[2][0]

    changed, same = metrics.style_errors(found(a, 5), found(b, 5)), metrics.style_errors(found(a, 5), found(a, 5))
    assert set(changed) == set(scenes.STYLE) - {"tint"}
    assert changed[name] > 0.5  # the truth is 0.8 to 1: a reader trained this little plays changes down
    assert set(same.values()) == {0.0}


def test_style_errors_leave_out_what_does_not_show():
    style = dict(zip(scenes.STYLE, [0.0, 0.0, 0.1, 0.1, 0.0, 0.3, 0.02]))
    plain = detector.Found(1.0, (0.5, 0.5), 0, colour=0, texture=0, style=style)
    black = plain._replace(colour=7, texture=1)
    assert set(metrics.style_errors(plain, black)) == {"brightness", "light", "outline"}
    assert len(metrics.style_agreement([plain, plain, black])) == 3
