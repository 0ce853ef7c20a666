"""The demo model inside ComfyUI: it loads, it is the network that was trained, and it draws what it is told."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from montage.demo import detector, diffusion, dit, metrics, sampling, scenes, supported_model, vocabulary


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
    for family in ("MontageDemo", "MontageDemoDiT"):
        assert [f.__name__ for f in before].count(family) == 1


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


def test_a_stock_schnell_is_still_schnell():
    import comfy.model_detection
    import comfy.supported_models

    config = {"image_model": "flux", "guidance_embed": False, "hidden_size": 3072, "context_in_dim": 4096}
    supported_model.register()
    found = comfy.model_detection.model_config_from_unet_config(config)
    assert found.__class__ is comfy.supported_models.FluxSchnell


def test_weights_are_small_and_say_where_they_come_from():
    files = sorted(supported_model.WEIGHTS.parent.glob("*"))
    assert {file.suffix for file in files} == {".safetensors"}
    assert supported_model.DIT_WEIGHTS.stat().st_size < 20e6
    assert sum(file.stat().st_size for file in files) < 60e6
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
def transformer():
    return sampling.load(supported_model.DIT_WEIGHTS)


def test_the_transformer_loads_through_comfyui(transformer):
    import comfy.model_base

    model, _, vae = transformer
    assert isinstance(model.model.model_config, supported_model.MontageDemoDiT)
    assert model.model.model_type == comfy.model_base.ModelType.FLOW
    assert supported_model.architecture(model) == "dit"
    assert (supported_model.DIT_WIDTH, supported_model.DIT_HEADS) == (dit.HIDDEN, dit.HEADS)
    assert (list(dit.AXES), dit.WORDS) == (supported_model.DIT_AXES, supported_model.DIT_WORDS)
    assert vae.decode(torch.zeros(1, 4, 24, 16)).shape == (1, 192, 128, 3)


def test_the_trained_transformer_is_the_one_comfyui_runs(transformer):
    network = dit.DiT()
    network.load_state_dict(under(load_file(supported_model.DIT_WEIGHTS), "model.diffusion_model."))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 12, generator=generator), torch.randn(2, dit.WORDS, 64, generator=generator)
    sigma = torch.tensor([0.02, 0.7])
    theirs = transformer[0].model.diffusion_model.float()(x, sigma, context, None)
    assert (network(x, sigma, context)[0] - theirs).abs().max() < 1e-4


def test_the_transformer_reads_the_words_of_the_longest_caption(transformer):
    """It is shown the first text tokens only: they hold the caption, and what stands after them changes nothing."""
    model, clip, _ = transformer
    drawn = scenes.sample(1, torch.Generator().manual_seed(0), count=3)
    drawn.texture[0], drawn.background[0] = 3, list(scenes.BACKGROUNDS).index("brick")
    caption = scenes.caption(drawn, 0)
    tokens = [token for token, _ in clip.tokenize(caption)["l"][0]]
    assert tokens.index(vocabulary.END) < dit.WORDS
    start = sampling.noise([0])
    told, more, other = (
        sampling.sample(model, clip, [words], start, steps=2)
        for words in (caption, f"{caption} in the sky at night", "a ball")
    )
    assert not torch.equal(told, other)
    assert (told - more).abs().mean() < 0.5 * (told - other).abs().mean()


def test_the_transformer_and_its_text_encoder_take_the_unets_words(models, transformer):
    told = [
        clip.encode_from_tokens(clip.tokenize("a red striped ball on grass")) for _, clip, _ in (models, transformer)
    ]
    assert torch.equal(*told)


def test_the_node_offers_both_and_no_controlnet_for_the_transformer():
    from montage.nodes.demo_model import MontageDemoModel

    model, clip, vae, control = MontageDemoModel.execute("dit").args
    assert supported_model.architecture(model) == "dit" and clip and vae
    assert control.message.startswith('Montage Demo Model: there is no ControlNet for architecture "dit".')
    assert supported_model.architecture(MontageDemoModel.execute().args[0]) == "unet"


@pytest.fixture(scope="module", params=["unet", "dit"])
def pictures(request, models, transformer):
    """Twelve single objects, and the scenes their captions come from."""
    with torch.inference_mode():
        drawn = scenes.sample(12, torch.Generator().manual_seed(900_100), count=1)
        captions = [scenes.caption(drawn, i) for i in range(12)]
        chosen = {"unet": models, "dit": transformer}[request.param]
        return drawn, sampling.draw(chosen, captions, range(12), batch=12, steps=10)


@pytest.fixture
def least_shapes(request):
    """Of the twelve: the transformer has learned shapes by half only, by chance there are two."""
    return {"unet": 9, "dit": 3}[request.node.callspec.params["pictures"]]


def right(drawn, pictures, field):
    judge = detector.load()
    verdicts = [
        metrics.judge(metrics.look(judge, picture), drawn.background[i].item(), metrics.wanted(drawn, i))
        for i, picture in enumerate(pictures)
    ]
    return sum(torch.tensor(getattr(verdict, field)).all().item() for verdict in verdicts)


def test_it_draws_what_it_is_told(pictures, least_shapes):
    assert right(*pictures, "background") >= 11
    assert right(*pictures, "colour") >= 10
    assert right(*pictures, "shape") >= least_shapes


def test_what_a_prompt_leaves_open_differs(transformer):
    judge = detector.load()
    pictures = sampling.draw(transformer, ["a ball on grass"] * 8, range(8), batch=8, steps=10)
    seen = [metrics.look(judge, picture) for picture in pictures]
    assert [place for place, _, _ in seen].count(list(scenes.BACKGROUNDS).index("grass")) >= 7
    assert len({found[0].colour for _, _, found in seen if found}) >= 3


def test_self_attention_can_be_fed_from_another_run(models, transformer):
    """Of a batch of two, the second draws with the first's keys and values (and queries), the first as ever."""
    for model, clip, _ in (models, transformer):
        start, words = sampling.noise([0, 1]), ["a red striped ball on grass"] * 2
        alone = sampling.sample(model, clip, words, start, steps=4)
        for parts in ("kv", "qkv"):
            fed = sampling.sample(sampling.swap_self_attention(model, parts), clip, words, start, steps=4)
            assert (fed[0] - alone[0]).abs().max() < 1e-4
            assert (fed[1] - alone[1]).abs().max() > 0.01


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
