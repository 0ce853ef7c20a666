"""The demo model inside ComfyUI: it loads, it is the network that was trained, and it draws what it is told."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from montage.demo import detector, diffusion, metrics, sampling, scenes, supported_model, vocabulary


@pytest.fixture(scope="module")
def models():
    return sampling.load()


@pytest.fixture(scope="module")
def weights():
    return load_file(supported_model.WEIGHTS)


def under(state, prefix):
    return {key[len(prefix) :]: value.float() for key, value in state.items() if key.startswith(prefix)}


def test_registering_twice_is_registering_once():
    import comfy.supported_models

    supported_model.register()
    before = list(comfy.supported_models.models)
    supported_model.register()
    assert comfy.supported_models.models == before
    assert [f.__name__ for f in before].count("MontageDemo") == 1


def test_the_checkpoint_loads_through_comfyui(models):
    import comfy.model_base

    model, clip, vae = models
    assert isinstance(model.model.model_config, supported_model.MontageDemo)
    assert model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    assert len(sampling.attention_sites(model)) == 16
    assert vae.decode(torch.zeros(1, 4, 24, 16)).shape == (1, 192, 128, 3)


def test_a_stock_sd15_is_still_sd15(weights):
    """The family must claim its own files only."""
    import comfy.model_detection
    import comfy.supported_models

    config = dict(comfy.supported_models.SD15.unet_config)
    supported_model.register()
    assert comfy.model_detection.model_config_from_unet_config(config).__class__ is comfy.supported_models.SD15


def test_weights_are_small_and_say_where_they_come_from():
    files = sorted(supported_model.WEIGHTS.parent.glob("*"))
    assert {file.suffix for file in files} == {".safetensors"}
    assert sum(file.stat().st_size for file in files) < 40e6
    for file in files:
        with safe_open(file, "pt") as opened:
            told = opened.metadata() or {}
        assert told.get("license") == "Apache-2.0", file.name
        assert {"command", "seed", "figures"} <= set(told), file.name


def test_the_trained_network_is_the_one_comfyui_runs(models, weights):
    model, _, _ = models
    unet = diffusion.UNet()
    unet.load_state_dict(under(weights, "model.diffusion_model."))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 12, generator=generator), torch.randn(2, 77, 64, generator=generator)
    t = torch.tensor([20.0, 700.0])
    theirs = model.model.diffusion_model.float()(x, t, context, transformer_options={})
    assert (unet(x, t, context) - theirs).abs().max() < 1e-4


def test_the_trained_words_are_the_ones_comfyui_reads(models, weights):
    _, clip, _ = models
    drawn = scenes.sample(40, torch.Generator().manual_seed(3))
    captions = [*(scenes.caption(drawn, i) for i in range(40)), "", "a sks ball on grass"]
    stored = [*weights["cond_stage_model.token_ids"].tolist(), None]
    rows = vocabulary.tokenise(captions)
    for caption, row in zip(captions, rows.tolist()):
        theirs = [token for token, _ in clip.tokenize(caption)["l"][0]]
        assert [token for token in theirs if token in stored] == [stored[r] for r in row if stored[r] is not None]
        assert len(theirs) == len(row)
    text = diffusion.TextEncoder(len(stored))
    text.load_state_dict(under(weights, "cond_stage_model.transformer."))
    theirs = clip.encode_from_tokens(clip.tokenize(captions[0]))
    assert (text(rows[:1]) - theirs).abs().max() < 1e-4


@pytest.fixture(scope="module")
def pictures(models):
    """Twelve single objects, and the scenes their captions come from."""
    with torch.inference_mode():
        drawn = scenes.sample(12, torch.Generator().manual_seed(900_100), count=1)
        captions = [scenes.caption(drawn, i) for i in range(12)]
        return drawn, sampling.draw(models, captions, range(12), batch=12, steps=10)


def right(drawn, pictures, field):
    judge = detector.load()
    verdicts = [
        metrics.judge(metrics.look(judge, picture), drawn.background[i].item(), metrics.wanted(drawn, i))
        for i, picture in enumerate(pictures)
    ]
    return sum(torch.tensor(getattr(verdict, field)).all().item() for verdict in verdicts)


def test_it_draws_background_and_colour_as_told(pictures):
    assert right(*pictures, "background") >= 11
    assert right(*pictures, "colour") >= 10


def test_another_prompt_would_not_be_satisfied(pictures):
    drawn, drawings = pictures
    assert right(drawn, drawings.roll(1, 0), "background") <= 6
    assert right(drawn, drawings.roll(1, 0), "colour") <= 6


def test_a_cutout_shows_its_words():
    from montage.nodes.demo_model import MontageDemoCutout

    picture = MontageDemoCutout.execute("a Blue striped ball", 3).args[0]
    assert picture.shape == (1, 128, 128, 4) and picture[0, :4, :, 3].max() == 0 and picture[0, 64, 64, 3] == 1
    red, _, blue = picture[0, picture[0, ..., 3] > 0.5, :3].mean(0)
    assert blue > red + 0.1
    again, other = (MontageDemoCutout.execute("blue ball striped", look).args[0] for look in (3, 4))
    assert torch.equal(picture, again) and not torch.equal(picture, other)
    for words in ("a ball", "a red blue ball", "a red ball box", "a red striped dotted ball", "a red cat"):
        with pytest.raises(ValueError, match=f'Montage Demo Cutout: "{words}" has [02] of the words'):
            MontageDemoCutout.execute(words, 0)
