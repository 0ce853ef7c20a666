"""Finding a phrase in a prompt for T5 and language models. ComfyUI's own classes tokenize and encode, with encoders
that write each token's number into its row: the rows at the positions that were found must decode to the phrase.
"""

import functools
import inspect
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
import torch
from comfy.sd import CLIP
from comfy.text_encoders import (
    anima,
    cosmos,
    flux,
    hidream,
    hunyuan_image,
    lumina2,
    pixart_t5,
    qwen_image,
    sd3_clip,
    wan,
    z_image,
)

from montage.nodes.collage import CollageCrossAttn
from montage.nodes.demo_model import MontageDemoModel
from montage.nodes.inputs import encoded
from montage.nodes.layout_retouch import TokenAttentionMap
from montage.nodes.textual_inversion import LearnLayerToken
from montage.patching.tokens import token_runs
from montage.workshop.collages import RED, canvas, layer, plain
from montage.workshop.random_transformers import WIDTH, empty_latent, random_transformer
from montage.workshop.random_transformers import prompt as transformer_prompt
from montage.workshop.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {  # prompt: phrase -> occurrences
    "a red cat and a blue cat": {"cat": 2, "a red cat": 1, "a blue cat": 1, "red": 1, "and": 1},
    'red cats, a cat-like dog (cat): "cat".': {"cat": 3, "red cats": 1, "dog": 1},
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
    return encoder(
        kind, clip_name=name, clip=attribute or name, **{attribute or name: Numbered(masks=True, **settings)}
    )


def text_encoder(tokenizer, model):
    clip = CLIP(no_init=True)
    clip.tokenizer, clip.cond_stage_model, clip.tokenizer_options = tokenizer, model, {}
    clip.encode_from_tokens_scheduled = functools.partial(conditioning_of, model)
    return clip


def conditioning_of(model, tokens):
    """ComfyUI's way from an encoder to a CONDITIONING, without loading weights."""
    features, pooled, *more = model.encode_token_weights(tokens)
    return [[features, {"pooled_output": pooled, **(more[0] if more else {})}]]


def pieces(**settings):
    """A SentencePiece vocabulary of a few words, as ComfyUI reads it out of a file of weights."""
    model, words = io.BytesIO(), [prompt for prompt in PROMPTS for _ in range(9)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=320, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, **settings
    )  # fmt: skip
    return {"spiece_model": torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)}


def mistral():
    """Flux.2's tokenizer over a small vocabulary of Mistral's kind: bytes, a few words, and its special tokens.

    Mistral's own comes with the weights, and ComfyUI reads it with a converter that transformers changed in release 5.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += [f"<SPECIAL_{n}>" for n in range(len(special), 20)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    inner.train_from_iterator(PROMPTS, trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "load_mistral_tokenizer", lambda _: {"tokenizer_object": inner, "legacy": False})
        return flux.Flux2Tokenizer()


def flux1():
    model = encoder(flux.FluxClipModel, clip_l=Numbered(), t5xxl=Numbered())
    return text_encoder(flux.FluxTokenizer(), model)


def sd3(clip_l=True, clip_g=True, t5=True):
    parts = {"clip_l": clip_l and Numbered(768), "clip_g": clip_g and Numbered(1280), "t5xxl": t5 and Numbered(4096)}
    model = encoder(sd3_clip.SD3ClipModel, **{name: part or None for name, part in parts.items()})
    model.t5_attention_mask = False
    return text_encoder(sd3_clip.SD3Tokenizer(), model)


def t5(kind):
    return single(kind, "t5xxl", "clip_t5xxl")


def qwen():
    return text_encoder(qwen_image.QwenImageTokenizer(), single(qwen_image.QwenImageTEModel, "qwen25_7b"))


def hunyuan():
    model = single(hunyuan_image.HunyuanImageTEModel, "qwen25_7b")
    model.byt5_small = None  # it reads what stands in quotes, behind Qwen's rows
    return text_encoder(hunyuan_image.HunyuanImageTokenizer(), model)


ENCODERS = {
    "Flux.1": flux1,
    "Chroma": lambda: text_encoder(pixart_t5.PixArtTokenizer(), t5(pixart_t5.PixArtT5XXL)),
    "Cosmos": lambda: text_encoder(cosmos.CosmosT5Tokenizer(), t5(cosmos.CosmosT5XXL)),
    "Wan": lambda: text_encoder(wan.WanT5Tokenizer(tokenizer_data=pieces()), single(wan.WanT5Model, "umt5xxl")),
    "Lumina 2": lambda: text_encoder(
        lumina2.LuminaTokenizer(tokenizer_data=pieces(**AS_GEMMA)), single(lumina2.LuminaModel, "gemma2_2b")
    ),
    "Qwen-Image": qwen,
    "Hunyuan-Image": hunyuan,
    "Z-Image": lambda: text_encoder(z_image.ZImageTokenizer(), single(z_image.ZImageTEModel, "qwen3_4b")),
    "klein": lambda: text_encoder(flux.KleinTokenizer(), single(flux.Flux2TEModel, "qwen3_4b", layers=3)),
    "klein 8B": lambda: text_encoder(flux.KleinTokenizer8B(), single(flux.Flux2TEModel, "qwen3_8b", layers=3)),
    "Flux.2": lambda: text_encoder(mistral(), single(flux.Flux2TEModel, "mistral3_24b", layers=3)),
}


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    return ENCODERS[request.param]()


def features(clip, prompt):
    """The CONDITIONING of a prompt: the number of the token in each row."""
    return clip.cond_stage_model.encode_token_weights(clip.tokenize(prompt))[0][0, :, 0]


def decoded(clip, ids):
    """What tokens say, by the tokenizer's own decoder."""
    tokenizer = clip.tokenizer
    inner = getattr(tokenizer, "t5xxl", None) or getattr(tokenizer, tokenizer.clip)
    return inner.decode([int(n) for n in ids], skip_special_tokens=False)


def encode(clip, prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


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


@pytest.mark.parametrize("prompt", ["", "a red cat", "word, " * 300])
def test_no_encoder_is_taken_for_a_changed_one(clip, prompt):
    """The rows of the prompt are as many as the nodes expect of an encoder that no other node has changed."""
    assert encoded("test", clip, prompt)[0][0].shape[1] > 0


@pytest.mark.parametrize("there", [(True, True, True), (False, False, True), (True, True, False)])
def test_nor_are_those_of_sd3_and_anima(there):
    for prompt in ("", "a red cat", "word, " * 300):
        encoded("test", sd3(*there), prompt)
        encoded("test", text_encoder(anima.AnimaTokenizer(), single(anima.AnimaTEModel, "qwen3_06b")), prompt)


def test_a_changed_encoder_is_noticed():
    """NegPip gives twice as many rows."""
    clip = qwen()
    plain_encoder = clip.encode_from_tokens_scheduled
    clip.encode_from_tokens_scheduled = lambda tokens: [[f.repeat(1, 2, 1), s] for f, s in plain_encoder(tokens)]
    with pytest.raises(ValueError, match="test: this CLIP encodes the prompt's 8 tokens to 16"):
        encoded("test", clip, "a red cat")


def test_weights():
    """T5 reads weights, a language model reads parentheses."""
    assert token_runs(flux1(), "a (red:1.4) cat", "red cat") == [(2, 3)]
    z = ENCODERS["Z-Image"]()
    with pytest.raises(ValueError, match="is not in the prompt"):
        token_runs(z, "a (red:1.4) cat", "red cat")
    (run,) = token_runs(z, "a (red:1.4) cat", "red")
    assert decoded(z, features(z, "a (red:1.4) cat")[list(run)]) == "red"


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("一只红猫坐在草地上", ("红猫", "草地")),
        ("一只cat坐在草地上", ("cat", "坐")),
        ("écoute la fête, 日本", ("écoute", "la fête", "日本")),
        ("a 🦩🪿 fox", ("🦩🪿", "🦩", "fox")),
    ],
)
def test_letters_of_several_bytes(prompt, phrases):
    """Chinese and Japanese words follow one another without spaces; a token may hold more than the phrase."""
    clip = qwen()
    rows = features(clip, prompt)
    for phrase in phrases:
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
        said = []
        for run in runs:
            inner = clip.tokenizer.clip_l if run[0] < clip_rows else clip.tokenizer.t5xxl
            said.append(words(inner.decode(rows[list(run)].int().tolist())))
        assert said == ["red cat"] * (bool(there[0]) + there[2])
        assert [run[0] < clip_rows for run in runs] == [True] * bool(there[0]) + [False] * there[2]


def test_anima_has_t5s_tokens():
    model = single(anima.AnimaTEModel, "qwen3_06b")
    clip = text_encoder(anima.AnimaTokenizer(), model)
    prompt = "an unfathomable red cat"
    ids = model.encode_token_weights(clip.tokenize(prompt))[2]["t5xxl_ids"]
    (run,) = token_runs(clip, prompt, "red cat")
    assert words(clip.tokenizer.t5xxl.decode(ids[list(run)].tolist())) == "red cat"


def test_animas_words_are_found_in_a_given_conditioning():
    """T5's tokens are more than Qwen's features are: what they are is compared, not the features."""
    clip = text_encoder(anima.AnimaTokenizer(), single(anima.AnimaTEModel, "qwen3_06b"))
    prompt, words_of = "an unfathomable red cat", "red cat"
    own = encoded("test", clip, prompt)
    (run,) = token_runs(clip, prompt, words_of)
    assert max(run) >= own[0][0].shape[1]  # behind the last of the features
    longer = encoded("test", clip, f"fog, {prompt}")
    moved = len(longer[0][1]["t5xxl_ids"]) - len(own[0][1]["t5xxl_ids"])
    other = encoded("test", clip, "a blue dog")
    assert CollageCrossAttn.offsets(own, [*own, *longer, *other], list(run)) == [0, moved, None]
    with pytest.raises(ValueError, match="the canvas's words are not in the conditioning"):
        CollageCrossAttn.offsets(own, other, list(run))


def test_the_bias_acts_on_anima_through_a_given_conditioning():
    clip = text_encoder(anima.AnimaTokenizer(), single(anima.AnimaTEModel, "qwen3_06b"))
    prompt, model = "an unfathomable red cat", random_transformer("Anima")
    features = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    settings = encoded("test", clip, prompt)[0][1]
    given, negative = [[features, settings]], transformer_prompt("Anima", 99)
    collage = a_collage(prompt, "red cat")
    made = {}
    for strength in (0.0, 3.0):
        node = CollageCrossAttn.execute(model, clip, collage, strength, "constant", 0.0, 1.0, "all", given)
        made[strength] = sample(
            *(node.args[0], empty_latent("Anima", size=(16, 16))), 1, node.args[1], negative, steps=2
        )
    difference = (made[3.0]["samples"] - made[0.0]["samples"]).abs()
    assert difference.max() > 1e-3 and made[3.0]["samples"].isfinite().all()


def test_embeddings_take_rows():
    clip = flux1()
    vector = torch.zeros(4096)
    inner = clip.tokenizer.t5xxl
    inner.embedding_directory = "somewhere"
    inner._try_get_embedding = lambda name: (torch.stack([vector] * 3), name.split()[0], " ".join(name.split()[1:]))
    assert token_runs(clip, "a embedding:three cat", "cat") == [(5,)]
    with pytest.raises(ValueError, match="has no letters for a part of"):
        token_runs(clip, "a embedding:three cat", "embedding:three cat")


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "Z-Image", "Flux.2"])
def test_no_word_is_learned_of_t5_or_a_language_model(name):
    """By the name of the encoder, before that of the model."""
    clip, arguments = ENCODERS[name](), inspect.signature(LearnLayerToken.execute.__func__).parameters
    settings = dict.fromkeys(list(arguments)[1:], 1) | {"model": None, "clip": clip, "learning_rate": 0.1}
    kind = type(clip.cond_stage_model).__name__
    with pytest.raises(
        ValueError, match=f"Learn Layer Token: it trains an embedding of CLIP, and the text encoder {kind} is"
    ):
        LearnLayerToken.execute(**settings)


def test_hidream_is_refused():
    """Its transformer reads T5's rows and those of Llama in one axis."""
    clip = text_encoder(hidream.HiDreamTokenizer.__new__(hidream.HiDreamTokenizer), encoder(hidream.HiDreamTEModel))
    for name in ("clip_l", "clip_g", "t5xxl", "llama"):
        setattr(clip.tokenizer, name, SimpleNamespace(tokenize_with_weights=lambda *_, **__: [[(1, 1.0)]]))
    with pytest.raises(ValueError, match="the text encoder HiDreamTEModel is not the CLIP of .* Wan: where it puts"):
        token_runs(clip, "a cat", "cat")


@pytest.fixture(scope="module")
def demo():
    model, clip, *_ = MontageDemoModel.execute(architecture="dit").args
    return model, clip


def a_collage(prompt, phrase):
    return canvas(layer(plain(RED), phrase, x=0.25, scale=0.5), 128, 128, prompt)[0]


def test_the_last_words_that_the_demo_transformer_reads(demo):
    """It reads 24 of CLIP's 77 tokens, and the first begins the text."""
    model, clip = demo
    prompt, latent = "a " * 22 + "red", {"samples": torch.zeros(1, 4, 16, 16)}
    measured, started, positive = TokenAttentionMap.execute(model, latent, clip, prompt, "red", "all").args
    settings = {"positive": positive, "negative": encode(clip, ""), "steps": 2}
    plain = sample(model, latent, **settings)
    assert torch.equal(sample(measured, started, **settings)["samples"], plain["samples"])
    biased, positive = CollageCrossAttn.execute(model, clip, a_collage(prompt, "red"), 3.0, "log", 0.0, 1.0, "all").args
    assert not torch.equal(sample(biased, latent, **(settings | {"positive": positive}))["samples"], plain["samples"])


def test_words_that_the_demo_transformer_does_not_read(demo):
    model, clip = demo
    prompt = "a " * 23 + "red"
    with pytest.raises(ValueError, match="Token Attention Map: the words stand at token 25 .* reads the first 24"):
        TokenAttentionMap.execute(model, {"samples": torch.zeros(1, 4, 16, 16)}, clip, prompt, "red", "all")
    with pytest.raises(ValueError, match="Collage Cross Attention: the words stand at token 25 .* reads the first 24"):
        CollageCrossAttn.execute(model, clip, a_collage(prompt, "red"), 1.0, "log", 0.0, 1.0, "all")


@pytest.mark.parametrize(
    "workflow, tokenizer",
    [
        ("21 Photomontage with Qwen-Image", qwen_image.QwenImageTokenizer),
        ("22 Photomontage with Z-Image", z_image.ZImageTokenizer),
    ],
)
def test_the_prompts_of_a_template_can_share_a_batch(workflow, tokenizer):
    """ComfyUI does not pad these to one length, and its note says that they go in lockstep."""
    path = ROOT / "example_workflows" / "api" / f"{workflow}.json"
    nodes = json.loads(path.read_text(encoding="utf-8")).values()
    prompts = {node["inputs"]["text"] for node in nodes if node["class_type"] == "CLIPTextEncode"} - {""}
    lengths = {len(row) for prompt in prompts for (row,) in tokenizer().tokenize_with_weights(prompt).values()}
    assert len(prompts) == 2 and len(lengths) == 1
