"""What the evidence page is made of: intervals, verdicts, and samples that survive a killed run."""

import re

import pytest
import torch
from PIL import Image

from montage.evidence import causes, measurements, page, peers, report
from montage.evidence.benchmarks import bench, other_packs
from montage.workshop import sampling
from montage.workshop.random_models import random_model


def test_intervals_and_verdicts():
    found = measurements.Interval.of([1.0, 2.0, 3.0, None, float("inf")])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(1.96 / 3**0.5)
    assert (
        measurements.verdict(measurements.Interval(1.0, 0.5, 9))
        == "reproduced"
        == measurements.verdict(measurements.Interval(-1.0, 0.5, 9), -1)
    )
    assert measurements.verdict(measurements.Interval(-1.0, 0.5, 9)) == "not reproduced"
    assert (
        measurements.verdict(measurements.Interval(1.0, 1.5, 9))
        == "not decided"
        == measurements.verdict(measurements.Interval(1.0, 0.0, 1))
    )


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    measured = []

    def measure(sample):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(sample)
        return {"a": {"x": sample}, "b": {"x": 2 * sample if sample else None}}

    with pytest.raises(KeyboardInterrupt):
        measurements.Study("study", tmp_path).run(range(3), measure)
    measured.clear()
    found = measurements.Study("study", tmp_path).run(range(3), measure)
    assert measured == [2] and found.of("a", "x") == [0, 1, 2]
    assert found.difference("b", "a", "x") == measurements.Interval.of([1, 2])  # the pairs that have both


def test_samples_belong_to_the_weights(tmp_path, monkeypatch):
    measurements.Study("study", tmp_path).run(range(1), lambda sample: {"a": {"x": 1}})
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(measurements, "WEIGHTS", tmp_path / "weights")
    assert not measurements.Study("study", tmp_path).samples


def test_the_sample_that_is_chosen(tmp_path):
    """Not of the first, which are shown anyway, unless there are no others."""
    figures = [9, 0, 9, 0, 3, None, 7, 1]
    found = measurements.Study("study", tmp_path).run(range(8), lambda sample: {"a": {"x": figures[sample]}})
    assert found.best("a", "x") == 6 and found.best("a", "x", -1) == 7
    few = measurements.Study("few", tmp_path).run(range(3), lambda sample: {"a": {"x": [3, None, 7][sample]}})
    assert few.best("a", "x") == 2
    both = {"a": [0, 0, 0, 0, 3, 9, 4], "b": [0, 0, 0, 0, 3, 8, None]}
    pairs = measurements.Study("pairs", tmp_path).run(
        range(7), lambda sample: {name: {"x": values[sample]} for name, values in both.items()}
    )
    assert pairs.best("a", "x", over="b") == 5 and pairs.best("a", "x", -1, over="b") == 4


def test_samples_outlive_the_other_models_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "WEIGHTS", tmp_path)
    for name in ("demo-model.safetensors", "demo-dit.safetensors"):
        (tmp_path / name).write_bytes(b"before")
    for model in measurements.MODELS:
        measurements.Study("study", tmp_path, model).run(range(1), lambda sample: {"a": {"x": 1}})
    (tmp_path / "demo-dit.safetensors").write_bytes(b"now")
    assert not measurements.Study("study", tmp_path, "dit").samples
    assert measurements.Study("study", tmp_path, "unet").samples


def section(title: str, *claims: list[str]) -> measurements.Section:
    return measurements.Section(title, f"Words.\n\n{measurements.markdown(measurements.CLAIMS, claims)}\n\nMore.")


FOUND = ["it is so", "1 / 2", "1.000 ± 0.500 (n 9)", "reproduced"]
OPEN = ["it is so", "1 / 2", "0.500 ± 1.000 (n 9)", "not decided"]
LOST = ["preserves regions better than blended latent diffusion (SSIM)", "", "-1.000 ± 0.500 (n 9)", "not reproduced"]


def test_the_first_table_is_made_of_the_sections():
    unet = section("Generative Photomontage, one prompt", FOUND, LOST)
    dit = section("Generative Photomontage, on the transformer, one prompt", OPEN)
    text = page.first_table([unet, section("A method: a part", FOUND), dit])
    assert "4 verdicts on 3 claims: 2 reproduced, 1 not decided, 1 not reproduced" in text
    both = "| it is so | 1 / 2 | 1.000 ± 0.500 (n 9) | 0.500 ± 1.000 (n 9) | UNet reproduced, DiT not decided |"
    assert both in text and "| it is so | 1 / 2 | 1.000 ± 0.500 (n 9) |  | reproduced |" in text
    # 9 samples with an interval twice the difference: 36 would do
    assert f"| Generative Photomontage, one prompt: it is so (DiT 36) | {causes.SMALL.why} |" in text
    assert f"| Generative Photomontage, one prompt: {LOST[0]} (UNet) | {causes.COPIES.why} |" in text


def test_a_claim_of_the_transformer_stands_with_the_same_of_its_method():
    found = page.rows([section("A: part", FOUND, FOUND), section("A, on the transformer", OPEN, LOST)])
    claims = page.merged(found)
    assert [list(by_model) for by_model in claims.values()] == [["UNet", "DiT"], ["UNet"], ["DiT"]]
    assert page.verdict_of(claims["A: part", "it is so"]) == "UNet reproduced, DiT not decided"


def test_new_sections_take_the_place_of_old_ones():
    old = [section("A: one", FOUND), section("B", FOUND), section("Cost", FOUND)]
    new = [section("B", OPEN), section("A: two", OPEN), section("C", OPEN)]
    done = page.replaced(old, new)
    assert [each.title for each in done] == ["A: one", "A: two", "B", "Cost", "C"] and done[2] == new[0]
    assert page.sections(page.written(done)) == done


def test_the_page_that_ships_is_made_of_its_sections():
    text = report.PAGE.read_text(encoding="utf-8")
    assert page.written(page.sections(text)) == text, "run: python dev.py evidence --head"


def test_causes_are_of_claims_that_the_page_has():
    claims = page.merged(page.rows(page.sections(report.PAGE.read_text(encoding="utf-8"))))
    for method, pattern in (*causes.CAUSES, *causes.CAUSES_ON_DIT, *causes.DIFFERENCES):
        assert any(page.method_of(setting) == method and re.search(pattern, text) for setting, text in claims), pattern


def test_the_chosen_row_stands_below_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "PICTURES", tmp_path)
    dark, light = torch.zeros(8, 8, 3), torch.ones(8, 8, 3)
    text = measurements.grid("strip", [[dark, dark]] * 4, ["a", "b"], side=40, chosen=([light, dark], "the lightest"))
    assert "the row below was chosen: the lightest" in text
    with Image.open(tmp_path / "strip.jpg") as picture:
        assert picture.size == (80, 18 + 4 * 40 + 18 + 40)
        assert picture.convert("L").getpixel((20, 216)) > 250 and picture.convert("L").getpixel((20, 150)) < 5


def test_what_is_shared_has_the_references_statistics():
    generator = torch.Generator().manual_seed(0)
    own, given = torch.randn(2, 30, 4, generator=generator), 3 + 2 * torch.randn(2, 20, 4, generator=generator)
    done = peers.adain(own, given)
    torch.testing.assert_close(done.mean(1), given.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(done.std(1, correction=0), given.std(1, correction=0), atol=1e-3, rtol=1e-3)


def test_sharing_with_itself_changes_nothing():
    """Its own statistics, and every key twice: the same attention. From another image something comes."""
    base, other = sampling.two()
    for reference, changes in ((0, False), (1, True)):
        masks = sampling.masks_of(torch.full(sampling.SIZE, reference), 2)
        model, latent = peers.share([base, other], masks, 0, random_model("sd15-small"))
        found = sampling.sample(model, latent, seed=1, positive=sampling.words(1))["samples"]
        assert torch.allclose(found, base["samples"], rtol=1e-3, atol=1e-2) != changes


def test_attention_couple_of_one_prompt_everywhere_is_that_prompt():
    model, left = random_model("sd15-small"), torch.zeros(8, 8)
    left[:, :4] = 1
    words, other = sampling.words(1), sampling.words(2)[0][0]

    def sampled(model):
        return sampling.sample(model, sampling.empty(), positive=words, steps=1)["samples"]

    plain = sampled(model)
    sampling.close(sampled(peers.attention_couple(model, [(left, words[0][0])], words[0][0], (8, 8))), plain)
    moved = (sampled(peers.attention_couple(model, [(left, other)], words[0][0], (8, 8))) - plain).abs()
    assert moved[..., :4].mean() > moved[..., 4:].mean()


STYLE_ALIGNED = """
class StyleAlignedBatchAlign:
    def patch(self, model, share_norm, share_attn, scale):
        for module in model.model.modules():
            module.orig_forward = module.forward
            module.forward = module.forward
        return (model,)

NODE_CLASS_MAPPINGS = {"StyleAlignedBatchAlign": StyleAlignedBatchAlign}
"""


def test_other_packs_are_measured_where_they_are_and_leave_nothing_behind(tmp_path):
    on = bench.Bench("sd15-small", 8, 1)
    without = other_packs.cases(on, tmp_path)
    (tmp_path / other_packs.STYLE_ALIGNED).mkdir()
    (tmp_path / other_packs.STYLE_ALIGNED / "__init__.py").write_text(STYLE_ALIGNED)
    (added,) = other_packs.cases(on, tmp_path).keys() - without.keys()
    assert added == "style aligned, batch of 3"
    assert len(other_packs.cases(on, tmp_path)[added]()["samples"]) == 3
    assert not any("forward" in vars(module) for module in on.model.model.modules())
