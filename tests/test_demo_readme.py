"""The demo's page: its measured blocks come from the evaluation, and everything it names is there."""

import re
from pathlib import Path

import pytest

from montage.demo import evaluate

PAGE = Path(evaluate.__file__).with_name("README.md")


def test_every_experiment_has_its_block():
    marked = re.findall(r"<!-- measured: (\w+) -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S)
    assert [name for name, _ in marked] == list(evaluate.SECTIONS)
    assert all("|" in block for _, block in marked), "run python demo/evaluate.py --readme"


def test_every_picture_is_there_and_small():
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", PAGE.read_text())
    assert len(pictures) == 7
    for picture in pictures:
        assert 1_000 < PAGE.with_name("pictures").joinpath(Path(picture).name).stat().st_size < 300_000


def test_writing_a_block_leaves_the_rest_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- measured: controlnet -->\nold\n<!-- end -->\nbetween\n<!-- measured: swap -->\nkept\n<!-- end"
        " -->\n"
    )
    for share in (0.5, 0.75):
        evaluate.write_readme({"controlnet": {"with the hint": share, "without": 0.25}}, page)
    text = page.read_text()
    assert "75.0 %" in text and "25.0 %" in text and "50.0 %" not in text and "old" not in text
    assert text.startswith("before\n") and "\nbetween\n<!-- measured: swap -->\nkept\n<!-- end -->\n" in text


def test_style_means_are_means_over_pairs():
    pairs = [{"hue": 0.1, "light": 0.5}, {"hue": 0.3, "light": 0.7}, {"light": 0.6}]
    means = evaluate._means(pairs)
    assert means["pairs"] == 3
    assert means["hue"][0] == pytest.approx(0.2)
    assert means["light"][0] == pytest.approx(0.6)
    assert means["all"][0] == pytest.approx((0.3 + 0.5 + 0.6) / 3)
