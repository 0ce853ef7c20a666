"""Finding a phrase in a prompt: the positions must be those of the CONDITIONING's token axis."""

import pytest
import torch
from safetensors.torch import save_file

from montage.patching.tokens import token_runs
from montage.workshop.random_models import demo_model, text_encoder

NAMES = ["sd15-small", "sd2-small", "sdxl-small"]


@pytest.fixture(scope="module")
def clips():
    return {name: text_encoder(name) for name in NAMES}


def features(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0][0]


def first_difference(a, b):
    length = min(len(a), len(b))
    return (a[:length] != b[:length]).any(-1).nonzero()[0].item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "before", ["", "a ", "(very:1.3) ", "word, " * 45, "word " * 74, "word " * 80, "(one:0.8) " * 78]
)
def test_a_run_begins_where_the_features_change(clips, name, before):
    """CLIP reads from left to right: the first row that another word changes is the position of that word."""
    clip = clips[name]
    (run,) = token_runs(clip, f"{before}red cat", "red cat")
    assert run[0] == first_difference(features(clip, f"{before}red cat"), features(clip, f"{before}blue cat"))
    assert run[1] == first_difference(features(clip, f"{before}red cat"), features(clip, f"{before}red dog"))


@pytest.mark.parametrize("name", NAMES)
def test_positions(clips, name):
    clip = clips[name]
    assert token_runs(clip, "a red cat and a blue cat", "cat") == [(3,), (7,)]
    assert token_runs(clip, "a red cat and a red cat", "a red cat") == [(1, 2, 3), (5, 6, 7)]  # several, and no hang
    assert token_runs(clip, "A (red:1.4)  ((cat)), a Dog", " a RED cat ") == [(1, 2, 3)]
    assert token_runs(clip, "a red cat, a dog", "(red cat:0.5),") == [(2, 3, 4)]
    assert token_runs(clip, r"a cat \(grey\) sits", r"cat \(grey\)") == [(2, 3, 4, 5)]
    assert token_runs(clip, "checkered ball", "checkered ball") == [(1, 2, 3)]  # a word of two tokens
    assert token_runs(clip, "cat cat cat", "cat cat") == [(1, 2), (2, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_go_on_in_the_next_chunk(clips, name):
    """A part of 8 tokens and more is broken where the chunk ends; a shorter one moves to the next as a whole."""
    clip = clips[name]
    broken = "word " * 74 + "red cat"
    assert token_runs(clip, broken, "red cat") == [(75, 78)]
    whole = "word " * 74 + "(red cat:1.1)"
    assert token_runs(clip, whole, "red cat") == [(78, 79)]
    assert features(clip, broken).shape[0] == features(clip, whole).shape[0] == 154


@pytest.mark.parametrize("name", NAMES)
def test_whole_words_only(clips, name):
    """CLIP writes unknown words in pieces, and the last may be a word of its own."""
    clip = clips[name]
    pieces = [clip.tokenizer.untokenize([pair])[0][1] for pair in list(clip.tokenize("zqxcat").values())[0][0][1:-1]]
    assert "cat</w>" in pieces
    with pytest.raises(ValueError, match='"cat" is not in the prompt "a zqxcat"'):
        token_runs(clip, "a zqxcat", "cat")
    assert token_runs(clip, "a zqxcat cat", "cat") == [(pieces.index("cat</w>") + 3,)]


def test_absent_and_empty_phrases(clips):
    clip = clips["sd15-small"]
    with pytest.raises(ValueError, match='"a green dog" is not in the prompt "a red cat"'):
        token_runs(clip, "a red cat", "a green dog")
    with pytest.raises(ValueError, match='"a red cat" is not in the prompt ""'):
        token_runs(clip, "", "a red cat")
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="the phrase is empty"):
            token_runs(clip, "a red cat", nothing)


def test_embeddings_are_tokens(tmp_path):
    save_file({"emb_params": torch.randn(3, 16)}, tmp_path / "three.safetensors")
    clip = text_encoder("sd15-small", embeddings=str(tmp_path))
    prompt = "a embedding:three cat, a dog"
    assert token_runs(clip, prompt, "embedding:three cat") == [(2, 3, 4, 5)]
    assert token_runs(clip, prompt, "cat") == [(5,)]
    assert token_runs(clip, prompt, "embedding:three") == [(2, 3, 4)]
    assert token_runs(clip, "a embedding:unknown cat", "cat") == [(2,)]  # ComfyUI warns and leaves it out
    with pytest.raises(ValueError, match="embedding:three"):
        token_runs(clip, "a cat", "embedding:three")


def test_embeddings_of_sdxl_and_of_another_size(tmp_path):
    """An encoder that cannot use an embedding leaves it out, and what follows moves up in its features."""
    save_file({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 8)}, tmp_path / "both.safetensors")
    save_file({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 5)}, tmp_path / "one.safetensors")
    clip = text_encoder("sdxl-small", embeddings=str(tmp_path))
    assert token_runs(clip, "a embedding:both cat", "embedding:both cat") == [(2, 3, 4)]
    assert token_runs(clip, "a embedding:one cat", "cat") == [(2,), (4,)]
    assert token_runs(clip, "a embedding:one cat", "embedding:one") == [(2, 3)]
    a, b = features(clip, "a embedding:one cat"), features(clip, "a embedding:one dog")
    assert first_difference(a[:, 8:], b[:, 8:]) == 2 and first_difference(a[:, :8], b[:, :8]) == 4


def test_the_demo_model():
    _, clip, _ = demo_model()
    assert token_runs(clip, "a red checkered ball and a blue star on grass", "a blue star") == [(7, 8, 9)]


def test_other_text_encoders_are_refused():
    class Tokenizer:
        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            return {"t5xxl": [[(1, 1.0, 0)]]}

    clip = text_encoder("sd15-small").clone()
    clip.tokenizer = Tokenizer()
    with pytest.raises(ValueError, match="is not the CLIP of SD1.x, SD2.x or SDXL"):
        token_runs(clip, "a cat", "cat")
