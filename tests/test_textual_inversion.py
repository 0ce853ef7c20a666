"""Textual inversion of a layer: what it learns and what it leaves, cancelling and going on, and the embedding that
comes of it.
"""

import functools

import comfy.model_management
import comfy.text_encoders.pixart_t5
import comfy.utils
import pytest
import torch
from comfy_api.latest import io

from montage.kernels.masked_mean import masked_mean
from montage.nodes.collage import CollageCrossAttn, owned_tokens
from montage.nodes.textual_inversion import TEMPLATES, LearnLayerToken
from montage.patching import textual_inversion
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.random_models import build, demo_model, random_model, text_encoder
from montage.workshop.sampling import same, sample

TEXT = "embedding:new cat"


def task(texts=(TEXT,), size=(8, 8), seed=1):
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, *size)
    mask[..., : size[1] // 2] = 1
    return textual_inversion.Task(latent, mask, list(texts), seed)


def begun(clip, vectors=1):
    return textual_inversion.Token.new(clip, "a", vectors, "these")


def learned(token, folder, clip, steps, name="sd15-small", done=lambda: None, model=None, **settings):
    textual_inversion.learn(
        token, folder / "new.safetensors", model or random_model(name), clip, task(**settings), steps, 1e-3, 1, done
    )
    return token


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(same(value, before[name]) for name, value in module.state_dict().items())


# ---------------------------------------------------------------- the mathematics


def test_what_is_outside_of_the_mask_has_no_gradient():
    """The mean is over the mask: a small layer counts as much as a large one."""
    with torch.inference_mode(False):
        errors = torch.ones(2, 4, 6, 6, requires_grad=True)
        mask = torch.zeros(2, 1, 6, 6)
        mask[0, :, :2], mask[1, :, 0, 0] = 1, 0.5
        means = masked_mean(errors, mask)
        means.sum().backward()
        assert same(means.detach(), torch.ones(2))
        assert (errors.grad[(mask == 0).expand_as(errors)] == 0).all() and (
            errors.grad[(mask > 0).expand_as(errors)] > 0
        ).all()


@pytest.mark.parametrize("name", ["sd15-small", "sd2-small", "sdxl-small"])
def test_the_gradient_is_that_of_the_models_own_error(tmp_path, name):
    """Against finite differences, through text encoder and UNet; with SD2.x the target is the velocity."""
    clip, model = text_encoder(name, embeddings=str(tmp_path)), random_model(name)
    token = begun(clip)
    token.save(tmp_path / "new.safetensors")
    marked = token.tokenize(clip, TEXT)
    one, noise, t = task(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([400.0])
    comfy.model_management.load_models_gpu([model, clip.patcher])

    def error():
        return textual_inversion.error(
            model.model,
            one.latent.clone(),
            noise.clone(),
            t.clone(),
            one.mask.clone(),
            *textual_inversion.encode(clip, token.living(marked)),
        ).mean()

    unet = model.model.diffusion_model
    with (
        textual_inversion.differentiable(unet),
        textual_inversion.differentiable(clip.cond_stage_model),
        textual_inversion.checkpointed(unet),
    ):
        error().backward()
        for rows in token.rows.values():
            way = rows.grad / rows.grad.norm()
            with torch.no_grad():
                rows += 0.002 * way
                up = error()
                rows -= 0.004 * way
                down = error()
                rows += 0.002 * way
            assert (up - down).item() / 0.004 == pytest.approx(rows.grad.norm().item(), rel=0.05)


def test_the_error_is_that_of_the_noise():
    """Of a model that is trained to tell it: what image-to-image training of SD1.x minimises."""
    model = random_model("sd15-small").model
    one, noise, t = task(), torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    features = torch.randn(1, 77, 16)
    found = textual_inversion.error(model, one.latent, noise, t, one.mask, features, None)
    sigma = model.model_sampling.sigma(t)
    noised = one.latent + sigma * noise
    told = model.diffusion_model(noised / (sigma**2 + 1) ** 0.5, t, context=features)
    assert torch.allclose(found, ((told - noise) ** 2 * one.mask).sum() / (4 * one.mask.sum()), rtol=1e-3)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("name", ["sd15-small", "sdxl-small"])
def test_only_the_new_rows_change(tmp_path, name):
    """UNet, text encoder and all other words stay bit for bit, hold no gradients, and compute as before."""
    clip, model = text_encoder(name, embeddings=str(tmp_path)), build(name)
    before = state(model.model), state(clip.cond_stage_model)
    token = begun(clip, vectors=2)
    start = {key: rows.detach().clone() for key, rows in token.rows.items()}
    learned(token, tmp_path, clip, 2, model=model)
    assert unchanged(model.model, before[0]) and unchanged(clip.cond_stage_model, before[1])
    assert all((rows - start[key]).abs().amax(1).min() > 1e-5 for key, rows in token.rows.items())
    for module in (model.model, clip.cond_stage_model):
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not any(
            getattr(part, "weight_function", ()) or part._forward_pre_hooks or "forward" in vars(part)
            for part in module.modules()
        )
    assert torch.is_inference_mode_enabled()


def test_a_cancelled_run_keeps_what_it_learned_and_goes_on_as_if_it_had_not_been(tmp_path):
    clip = text_encoder("sd15-small", embeddings=str(tmp_path))
    whole = learned(begun(clip), tmp_path, clip, 5)
    token = begun(clip)

    def cancel():
        if len(token.losses) == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        learned(token, tmp_path, clip, 5, done=cancel)
    again = textual_inversion.Token.load(tmp_path / "new.safetensors")
    assert len(again.losses) == 2 and same(again.rows["l"], token.rows["l"])
    learned(again, tmp_path, clip, 5)
    assert same(again.rows["l"], whole.rows["l"]) and again.losses == whole.losses
    assert same(textual_inversion.Token.load(tmp_path / "new.safetensors").rows["l"], whole.rows["l"])


def test_the_rows_are_told_from_other_embeddings(tmp_path):
    clip = text_encoder("sd15-small", embeddings=str(tmp_path))
    comfy.utils.save_torch_file({"clip_l": torch.ones(1, 16)}, str(tmp_path / "other.safetensors"))
    token = begun(clip, vectors=2)
    token.save(tmp_path / "new.safetensors")
    tokens = list(token.tokenize(clip, "(embedding:other:1.3) and embedding:new, (cat)")["l"][0])
    assert [value.number for value in tokens if isinstance(value, textual_inversion.Row)] == [0, 1]
    assert sum(torch.is_tensor(value) for value in tokens) == 1
    assert all(weight == 1 for _, weight in token.living({"l": [tokens]})["l"][0])


def test_a_block_at_a_time_is_kept_for_the_backward_pass():
    model = random_model("sd15-small")
    unet = model.model.diffusion_model

    def kept():
        """Bytes that one evaluation keeps, and the most that is alive while it is computed."""
        sizes = []
        x, features = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            unet(x, torch.tensor([300.0]), context=features).sum()
        return sum(sizes)

    comfy.model_management.load_models_gpu([model])
    with textual_inversion.differentiable(unet):
        plainly = kept()
        with textual_inversion.checkpointed(unet):
            assert kept() < 0.3 * plainly


def test_half_precision_learns(tmp_path):
    """Small gradients are not lost: the rows move as they do in single precision."""
    clip, moved = text_encoder("sd15-small", embeddings=str(tmp_path)), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("sd15-small")
        model.set_model_compute_dtype(dtype)
        token = learned(begun(clip), tmp_path, clip, 1, model=model)
        moved[dtype] = token.optimizer.state[token.rows["l"]]["exp_avg"]
    assert torch.nn.functional.cosine_similarity(*moved.values()).item() > 0.95


# ---------------------------------------------------------------- the node


def test_a_model_that_gives_no_numbers_is_an_error(tmp_path):
    clip, model = text_encoder("sd15-small", embeddings=str(tmp_path)), build("sd15-small")
    model.model.diffusion_model.out[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="^Learn Layer Token: every gradient .*--force-fp32"):
        learned(begun(clip), tmp_path, clip, 20, model=model)


def test_another_packs_own_forward_stays():
    unet = build("sd15-small").model.diffusion_model
    block = next(part for part in unet.modules() if isinstance(part, textual_inversion.ResBlock))
    block.forward = own = functools.partial(type(block).forward, block)
    with textual_inversion.checkpointed(unet):
        assert block.forward is not own
    assert block.forward is own


@pytest.fixture
def clip(tmp_path):
    """The demo model's, with a folder of embeddings of the test's own."""
    one = demo_model()[1].clone()
    one.tokenizer = type(one.tokenizer)(embedding_directory=str(tmp_path))
    return one


def collage(texts=("a red ball", "a blue box"), prompt="a red ball and a blue box on grass", **settings):
    behind = layer(plain(RED), texts[0], x=0.3, scale=0.4)
    return canvas(layer(plain(BLUE), texts[1], x=0.7, scale=0.4, behind=behind, node="2"), prompt=prompt, **settings)[0]


def learn(
    clip,
    one=None,
    layer=0,
    name="red",
    steps=2,
    seed=0,
    preview_every=0,
    vectors=1,
    init="a",
    templates=TEMPLATES,
    resume=True,
    model=None,
):
    made = LearnLayerToken.PREPARE_CLASS_CLONE(
        {"hidden_inputs": {io.Hidden.prompt: None, io.Hidden.extra_pnginfo: None}}
    )
    model_, _, vae = demo_model()
    return made.execute(
        model or model_,
        clip,
        vae,
        one or collage(),
        layer,
        name,
        steps,
        1e-3,
        seed,
        preview_every,
        1,
        vectors,
        init,
        templates,
        resume,
    ).args


def steps_done(tmp_path, name="red"):
    return len(textual_inversion.Token.load(tmp_path / f"{name}.safetensors").losses)


def test_what_was_learned_is_an_embedding_at_once(clip, tmp_path):
    found, embedding, loss, pictures = learn(clip, preview_every=1, vectors=2)
    assert embedding == "embedding:red" and found.prompt == "embedding:red a red ball and a blue box on grass"
    assert [one.text for one in found.layers] == ["embedding:red a red ball", "a blue box"]
    assert owned_tokens("", clip, found) == {**dict.fromkeys((1, 2, 3, 4, 5), (0,)), **dict.fromkeys((7, 8, 9), (1,))}
    rows = [value for value, _ in clip.tokenize(found.prompt)["l"][0] if torch.is_tensor(value)]
    assert same(torch.stack(rows), textual_inversion.Token.load(tmp_path / "red.safetensors").rows["l"])
    assert loss.shape == (1, 320, 640, 3) and pictures.shape == (3, 64, 64, 3)
    model, positive = CollageCrossAttn.execute(demo_model()[0], clip, found, 1.0, "log log", 0.0, 1.0, "all").args
    assert torch.isfinite(
        sample(model, {"samples": torch.zeros(1, 4, 8, 8)}, positive=positive, negative=positive, steps=1)["samples"]
    ).all()
    second = learn(clip, found, layer=1, name="blue")[0]
    assert second.prompt == "embedding:red a red ball and embedding:blue a blue box on grass"
    assert list(map(str, sorted(path.name for path in tmp_path.iterdir()))) == ["blue.safetensors", "red.safetensors"]


def test_it_goes_on_where_it_was_and_not_with_another_picture(clip, tmp_path):
    learn(clip, steps=2)
    learn(clip, steps=3)
    assert steps_done(tmp_path) == 3
    moved = collage()
    moved = moved._replace(layers=(moved.layers[0]._replace(x=0.4), moved.layers[1]))
    first = textual_inversion.Token.load(tmp_path / "red.safetensors").rows["l"]
    learn(clip, moved, steps=1)  # another place is no other layer, and it has its step already
    assert steps_done(tmp_path) == 3 and same(
        textual_inversion.Token.load(tmp_path / "red.safetensors").rows["l"], first
    )
    other = moved._replace(layers=(moved.layers[0]._replace(picture=moved.layers[1].picture), moved.layers[1]))
    for change in ({"one": other}, {"seed": 7}, {"resume": False}):
        learn(clip, steps=3)
        learn(clip, **{"steps": 1, **change})
        assert steps_done(tmp_path) == 1
        learn(clip, steps=1, resume=False)


def test_a_cancel_in_the_node_is_a_cancel_of_the_queue(clip, tmp_path):
    shown = []

    def hook(value, total, preview, node_id=None):
        shown.append((value, total, preview))
        if value == 1:  # ComfyUI leaves out later ones that follow too fast
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            learn(clip, steps=4)
        assert steps_done(tmp_path) == 1
        learn(clip, steps=3, preview_every=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    kind, picture, size = shown[-1][2]
    assert shown[-1][:2] == (3, 3) and kind == "JPEG" and picture.size[1] == 320 and size == 1024


@pytest.mark.parametrize(
    "prompt, text, expected",
    [
        ("(a red ball:1.2) and a blue box", "a red ball", "( embedding:red a red ball:1.2) and a blue box"),
        ("A Red  ball, a blue box", "a red ball", "embedding:red A Red  ball, a blue box"),
        ("a box of blue, a blue box", "a box", "embedding:red a box of blue, a blue box"),
        ("a blue box, embedding:red a red ball", "embedding:red a red ball", "a blue box, embedding:red a red ball"),
    ],
)
def test_the_embedding_stands_before_the_layers_words(clip, prompt, text, expected):
    assert LearnLayerToken.with_token(clip, collage((text, "a blue box"), prompt), 0, "red").prompt == expected


def test_layers_of_the_same_words_have_one_each(clip):
    one = collage(("a ball", "a ball"), "a ball and a ball")
    assert LearnLayerToken.with_token(clip, one, 1, "red").prompt == "a ball and embedding:red a ball"
    shared = collage(("a ball", "a ball"), "a ball")
    assert LearnLayerToken.with_token(clip, shared, 1, "red").prompt == "embedding:red a ball"


def test_the_layer_lies_on_top_of_what_is_behind_it():
    picture, mask = LearnLayerToken.target(collage(), 0)
    assert torch.allclose(picture[:, 32, 20], torch.tensor(RED), atol=1e-6) and torch.allclose(
        picture[:, 32, 44], torch.tensor([150 / 255] * 3), atol=1e-6
    )
    assert mask[32, 20] == pytest.approx(1) and mask[32, 44] == 0
    assert torch.allclose(LearnLayerToken.target(collage(), 1)[0][:, 32, 20], torch.tensor(RED), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer": 2}, "layer 2 is not there: the collage has 2"),
        ({"name": "../red"}, '"../red" cannot be the name of an embedding'),
        ({"templates": "a photo"}, 'the template "a photo" has no {}'),
        ({"templates": ""}, "has no {}"),
        ({"init": " "}, "init is empty"),
        ({"one": collage(("", "a blue box"))}, "layer 0 .node 1. has no text"),
        ({"one": collage(("a tree", "a blue box"))}, '"a tree" is not in the prompt'),
        ({"one": collage(prompt="a (red:1.3) ball, a blue box")}, "with weights or other characters in between"),
    ],
)
def test_what_does_not_fit_is_refused(clip, change, message):
    with pytest.raises(ValueError, match=f"Learn Layer Token: .*{message}"):
        learn(clip, **change)


def test_other_peoples_embeddings_and_clips_are_left_alone(clip, tmp_path):
    comfy.utils.save_torch_file({"emb_params": torch.ones(1, 64)}, str(tmp_path / "red.safetensors"))
    before = (tmp_path / "red.safetensors").read_bytes()
    with pytest.raises(
        ValueError,
        match="Learn Layer Token: an embedding red.safetensors exists already that this node did not make",
    ):
        learn(clip)
    assert (tmp_path / "red.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="Learn Layer Token: this CLIP was loaded without a folder of embeddings"):
        learn(text_encoder("sd15-small"))
    outside = collage()
    with pytest.raises(ValueError, match="Learn Layer Token: layer 0 .node 1. lies outside the canvas"):
        learn(clip, outside._replace(layers=(outside.layers[0]._replace(x=3.0), outside.layers[1])), name="blue")


def test_a_word_of_t5_is_not_learned():
    clip = text_encoder("sd15-small").clone()
    clip.tokenizer = comfy.text_encoders.pixart_t5.PixArtTokenizer()
    with pytest.raises(
        ValueError, match="Learn Layer Token: it trains an embedding of CLIP, and the text encoder .* another"
    ):
        learn(clip)
