"""Finding a phrase in a prompt for T5 and language models. ComfyUI's own classes tokenize and encode, with encoders that
write each token's number into its row: the rows at the positions that were found must decode to the phrase."""

import base64
import io
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from comfy.sd import CLIP
from comfy.text_encoders import anima, cosmos, flux, hidream, hunyuan_image, lumina2, pixart_t5, qwen_image, sd3_clip
from comfy.text_encoders import wan, z_image

from montage.patching.tokens import token_runs

PROMPTS = {  # prompt: phrase -> occurrences
    "a red cat and a blue cat": {"cat": 2, "a red cat": 1, "a blue cat": 1, "red": 1, "and": 1},
    "red cats, a cat-like dog (cat): \"cat\".": {"cat": 3, "red cats": 1, "dog": 1},
    "checkerboardly unfathomable  balls on the grass": {"checkerboardly": 1, "unfathomable balls": 1},
    "cat cat cat": {"cat cat": 2, "cat": 3},
    "the user sees an image of an object": {"user": 1, "image": 1, "object": 1},
}


AS_GEMMA = {"add_dummy_prefix": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


class Numbered(torch.nn.Module):
    """An encoder whose features are the tokens' numbers, `width` times, of as many layers; with a mask or without."""

    def __init__(self, width=1, layers=0, masks=False):
        super().__init__()
        self.width, self.layers, self.masks = width, layers, masks

    def encode_token_weights(self, pairs):
        ids = torch.tensor([[float(pair[0]) for row in pairs for pair in row]])
        rows = ids[..., None].expand(-1, -1, self.width)
        if self.layers:
            rows = rows[:, None].expand(-1, self.layers, -1, -1)
        mask = [{"attention_mask": torch.ones_like(ids)}] if self.masks else []
        return rows.clone(), torch.zeros(1, 1), *mask


def encoder(kind, **parts):
    """One of ComfyUI's text encoders without its weights."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def single(kind, name, attribute=None, **settings):
    return encoder(kind, clip_name=name, clip=attribute or name, **{attribute or name: Numbered(masks=True, **settings)})


def text_encoder(tokenizer, model):
    clip = CLIP(no_init=True)
    clip.tokenizer, clip.cond_stage_model, clip.tokenizer_options = tokenizer, model, {}
    return clip


def pieces(**settings):
    """A SentencePiece vocabulary of a few words, as ComfyUI reads it out of a file of weights."""
    model, words = io.BytesIO(), [prompt for prompt in PROMPTS for _ in range(9)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=320, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, **settings
    )  # fmt: skip
    return {"spiece_model": torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)}


def tekken():
    """A vocabulary as Mistral writes it: bytes, and a few words."""
    words = [bytes([n]) for n in range(256)] + [b" c", b" ca", b" cat", b"ca", b"cat", b" r", b"ed", b" red", b"us", b"er"]
    vocabulary = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    names += [f"<SPECIAL_{n}>" for n in range(len(names), 20)]
    special = [{"rank": len(words) + n, "token_str": name} for n, name in enumerate(names)]
    import json

    written = {
        "config": {"default_vocab_size": len(words) + len(special)},
        "vocab": vocabulary,
        "special_tokens": special,
    }
    return {"tekken_model": torch.frombuffer(bytearray(json.dumps(written).encode()), dtype=torch.uint8)}


def flux1():
    model = encoder(flux.FluxClipModel, clip_l=Numbered(), t5xxl=Numbered())
    return text_encoder(flux.FluxTokenizer(), model)


def sd3(clip_l=True, clip_g=True, t5=True):
    parts = {"clip_l": clip_l and Numbered(768), "clip_g": clip_g and Numbered(1280), "t5xxl": t5 and Numbered(4096)}
    model = encoder(sd3_clip.SD3ClipModel, **{name: part or None for name, part in parts.items()})
    model.t5_attention_mask = False
    return text_encoder(sd3_clip.SD3Tokenizer(), model)


def qwen(kind=qwen_image.QwenImageTokenizer, model=qwen_image.QwenImageTEModel, **parts):
    made = single(model, "qwen25_7b")
    for name, part in parts.items():
        setattr(made, name, part)
    return text_encoder(kind(), made)


ENCODERS = {
    "Flux.1": (flux1, "t5xxl"),
    "Chroma": (lambda: text_encoder(pixart_t5.PixArtTokenizer(), single(pixart_t5.PixArtT5XXL, "t5xxl", "clip_t5xxl")), ""),
    "Cosmos": (lambda: text_encoder(cosmos.CosmosT5Tokenizer(), single(cosmos.CosmosT5XXL, "t5xxl", "clip_t5xxl")), ""),
    "Wan": (lambda: text_encoder(wan.WanT5Tokenizer(tokenizer_data=pieces()), single(wan.WanT5Model, "umt5xxl")), ""),
    "Lumina 2": (
        lambda: text_encoder(
            lumina2.LuminaTokenizer(tokenizer_data=pieces(**AS_GEMMA)),
            single(lumina2.LuminaModel, "gemma2_2b"),
        ),
        "",
    ),
    "Qwen-Image": (qwen, ""),
    "Hunyuan-Image": (
        lambda: qwen(hunyuan_image.HunyuanImageTokenizer, hunyuan_image.HunyuanImageTEModel, byt5_small=None),
        "",
    ),
    "Z-Image": (lambda: text_encoder(z_image.ZImageTokenizer(), single(z_image.ZImageTEModel, "qwen3_4b")), ""),
    "klein": (lambda: text_encoder(flux.KleinTokenizer(), single(flux.Flux2TEModel, "qwen3_4b", layers=3)), ""),
    "klein 8B": (lambda: text_encoder(flux.KleinTokenizer8B(), single(flux.Flux2TEModel, "qwen3_8b", layers=3)), ""),
    "Flux.2": (
        lambda: text_encoder(
            flux.Flux2Tokenizer(tokenizer_data=tekken()), single(flux.Flux2TEModel, "mistral3_24b", layers=3)
        ),
        "",
    ),
}


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    return ENCODERS[request.param][0]()


def features(clip, prompt):
    """The CONDITIONING of a prompt: the number of the token in each row."""
    return clip.cond_stage_model.encode_token_weights(clip.tokenize(prompt))[0][0, :, 0]


def decoded(clip, ids):
    """What tokens say, by the tokenizer's own decoder."""
    tokenizer = clip.tokenizer
    name = next(n for n in vars(tokenizer) if n.removeprefix("clip_") not in ("l", "g", "byt5", "qwen3_06b") and hasattr(vars(tokenizer)[n], "decode"))
    return getattr(tokenizer, name).decode([int(n) for n in ids], skip_special_tokens=False)


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_rows_say_the_phrase(clip, prompt):
    rows = features(clip, prompt)
    for phrase, times in PROMPTS[prompt].items():
        runs = token_runs(clip, prompt, phrase)
        assert len(runs) == times, phrase
        for run in runs:
            assert list(run) == list(range(run[0], run[-1] + 1))
            said = words(decoded(clip, rows[list(run)]))
            assert said == phrase or phrase in said and not said.replace(phrase, "").strip("(): ").isalnum()


def test_absent_and_empty(clip):
    for phrase in ("dog", "ca", "at", "Cat", "assistant", "Describe", "a red", "system"):
        with pytest.raises(ValueError, match=f'"{phrase}" is not in the prompt "the red cat"'):
            token_runs(clip, "the red cat", phrase)
    with pytest.raises(ValueError, match="the phrase is empty"):
        token_runs(clip, "the red cat", " ")


def test_weights():
    """T5 reads weights, a language model reads parentheses."""
    assert token_runs(flux1(), "a (red:1.4) cat", "red cat") == [(2, 3)]
    z = ENCODERS["Z-Image"][0]()
    with pytest.raises(ValueError, match="is not in the prompt"):
        token_runs(z, "a (red:1.4) cat", "red cat")
    (run,) = token_runs(z, "a (red:1.4) cat", "red")
    assert decoded(z, features(z, "a (red:1.4) cat")[list(run)]) == "red"


@pytest.mark.parametrize("prompt", ["一只红猫坐在草地上", "一只cat坐在草地上", "écoute la fête, 日本"])
def test_letters_of_several_bytes(prompt):
    clip = qwen()
    rows = features(clip, prompt)
    phrases = {"一只红猫坐在草地上": ("红猫", "草地"), "一只cat坐在草地上": ("cat",), "écoute la fête, 日本": ("écoute", "la fête", "日本")}
    for phrase in phrases[prompt]:
        (run,) = token_runs(clip, prompt, phrase)
        assert phrase in decoded(clip, rows[list(run)])
    with pytest.raises(ValueError, match="has no letters for a part of"):
        token_runs(flux1(), prompt, "草地")


@pytest.mark.parametrize("there", [(True, True, True), (True, False, True), (False, False, True), (True, True, False)])
def test_sd3_has_the_words_twice(there):
    """CLIP's rows of 77 a chunk stand first, then T5's."""
    clip = sd3(*there)
    for before in ("", "word, " * 45):
        prompt = f"{before}a red cat"
        whole = clip.cond_stage_model.encode_token_weights(clip.tokenize(prompt))[0][0]
        rows = whole.max(-1).values
        runs = token_runs(clip, prompt, "red cat")
        clip_rows = (154 if before else 77) if there[0] else 0
        said = [
            words((clip.tokenizer.clip_l if run[0] < clip_rows else clip.tokenizer.t5xxl).decode([int(n) for n in rows[list(run)]]))
            for run in runs
        ]
        assert said == ["red cat"] * (bool(there[0]) + there[2])
        assert [run[0] < clip_rows for run in runs] == [True] * bool(there[0]) + [False] * there[2]


def test_anima_has_t5s_tokens():
    model = single(anima.AnimaTEModel, "qwen3_06b")
    clip = text_encoder(anima.AnimaTokenizer(), model)
    prompt = "an unfathomable red cat"
    ids = model.encode_token_weights(clip.tokenize(prompt))[2]["t5xxl_ids"]
    (run,) = token_runs(clip, prompt, "red cat")
    assert words(clip.tokenizer.t5xxl.decode(ids[list(run)].tolist())) == "red cat"


def test_embeddings_take_rows():
    clip = flux1()
    vector = torch.zeros(4096)
    inner = clip.tokenizer.t5xxl
    inner.embedding_directory = "somewhere"
    inner._try_get_embedding = lambda name: (torch.stack([vector] * 3), name.split()[0], " ".join(name.split()[1:]))
    assert token_runs(clip, "a embedding:three cat", "cat") == [(5,)]
    with pytest.raises(ValueError, match="has no letters for a part of"):
        token_runs(clip, "a embedding:three cat", "embedding:three cat")


def test_an_encoder_that_nobody_has_listed():
    class HiDreamTEModel_:
        pass

    tokenizer = SimpleNamespace(tokenize_with_weights=lambda *_, **__: {"l": [], "g": [], "t5xxl": [], "llama": []})
    assert hidream.HiDreamTokenizer
    with pytest.raises(ValueError, match="the text encoder HiDreamTEModel_ is not the CLIP of .* Wan: where it puts"):
        token_runs(text_encoder(tokenizer, HiDreamTEModel_()), "a cat", "cat")
