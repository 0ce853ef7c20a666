"""Where a phrase stands among the tokens of a prompt: positions on the token axis of its CONDITIONING.

The prompt is tokenized by ComfyUI's own tokenizer, so chunks of 77, weights like (word:1.2) and embedding:name are what
they are when the prompt is encoded. An embedding of several vectors is several tokens.

CLIP cuts a text into words, and a phrase is found by its tokens. T5 and language models write one word in several ways,
with a space before it or without: there a phrase is found in the text that the prompt's tokens spell, and its tokens
are those that spell it. ENCODINGS says what else has to be known of such an encoder.
"""

import numbers
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from comfy.sd import CLIP

ENCODERS = {"l", "g", "h"}  # CLIP of SD1.x, SD2.x and SDXL
ALIKE = 0.8  # correlation of text features from which on they are of the same words, weighted or in another place


class Encoding(NamedTuple):
    """Where a text encoder that is no CLIP puts a prompt's tokens.

    name: of its tokens, and of their tokenizer. bytes: whether its vocabulary writes bytes as letters, as GPT-2's does;
    else it writes a space as a lower bar, as SentencePiece does. after_clip: whether CLIP's tokens are rows of the
    CONDITIONING too and stand before. cuts: whether ComfyUI cuts the first lines of its template off. features: the
    tokens that the CONDITIONING's rows are of, where the model makes those of the others of them ("": the same).
    """

    name: str
    bytes: bool = False
    after_clip: bool = False
    cuts: bool = False
    features: str = ""


_T5, _QWEN3_4B = Encoding("t5xxl"), Encoding("qwen3_4b", bytes=True)
_QWEN25 = Encoding("qwen25_7b", bytes=True, cuts=True)

# class of the tokenizer in comfy.text_encoders -> what is known; names, so that none of the classes has to be there
ENCODINGS = {
    "flux.FluxTokenizer": _T5,  # CLIP's tokens are pooled only
    "sd3_clip.SD3Tokenizer": _T5._replace(after_clip=True),
    "pixart_t5.PixArtTokenizer": _T5,  # Chroma too
    "anima.AnimaTokenizer": _T5._replace(features="qwen3_06b"),  # its adapter writes Qwen's features to T5's tokens
    "cosmos.CosmosT5Tokenizer": _T5,
    "wan.WanT5Tokenizer": Encoding("umt5xxl"),
    "lumina2.LuminaTokenizer": Encoding("gemma2_2b"),
    "qwen_image.QwenImageTokenizer": _QWEN25,
    "hunyuan_image.HunyuanImageTokenizer": _QWEN25,
    "z_image.ZImageTokenizer": _QWEN3_4B,
    "flux.KleinTokenizer": _QWEN3_4B,
    "flux.KleinTokenizer8B": Encoding("qwen3_8b", bytes=True),
    "flux.Flux2Tokenizer": Encoding("mistral3_24b", bytes=True),
}
IM_START, USER, NEW_LINE = 151644, 872, 198  # of Qwen's vocabulary
TARGET_IDS = "t5xxl_ids"  # in a CONDITIONING of Anima: the tokens that its adapter writes the features to
UNKNOWN = "\ufffd"  # what no letters spell: an embedding's vector, and letters that the vocabulary does not have
# of a longer word, if next to a phrase; Japanese and Chinese words follow one another without spaces
LETTER = r"[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"


class Token(NamedTuple):
    value: int | torch.Tensor  # of the vocabulary, or the vector of an embedding
    position: int
    starts_word: bool


def token_runs(clip: CLIP, prompt: str, phrase: str) -> list[tuple[int, ...]]:
    """Every occurrence of a phrase in a prompt, as runs of token positions.

    A run is a tuple of positions: ascending, and consecutive unless it goes on in the next chunk. Weights count for
    nothing, nor does the number of spaces; whole words only. Upper case counts where the tokenizer keeps it: T5 and
    language models do, CLIP does not. With SDXL an occurrence may stand at two places, if one of its encoders leaves an
    embedding out that the other has; then each is a run. With SD3 it stands among CLIP's tokens and among T5's.
    clip: CLIP. prompt, phrase: str. Returns [(int, ...)], in the order of the CONDITIONING.
    Raises ValueError, naming the phrase, if it is empty or absent, and for text encoders that are not in ENCODINGS.
    """
    encoding = encoding_of(clip)
    if encoding is None:
        check_clip(clip)
        found = clip_runs(clip, prompt, phrase)
    else:
        found = spelled_runs(clip, encoding, prompt, phrase)
    if not found:
        raise ValueError(f'"{phrase}" is not in the prompt "{prompt}". Write it exactly as it occurs there.')
    return sorted(found)


def encoding_of(clip: CLIP) -> Encoding | None:
    """What is known of a text encoder that is no CLIP."""
    kind = type(clip.tokenizer)
    return ENCODINGS.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix("comfy.text_encoders."))


def rows_of(clip: CLIP, prompt: str) -> int:
    """How many rows the CONDITIONING of a prompt has, as its tokenizer and its encoder's template say."""
    tokens, encoding = clip.tokenize(prompt), encoding_of(clip)
    counts = {name: sum(map(len, rows)) for name, rows in tokens.items()}
    if encoding is None:
        return max(counts.values())
    if encoding.after_clip:
        own = 0 if clip.cond_stage_model.t5xxl is None else counts[encoding.name]
        return clip_rows(clip, prompt) + own
    name = encoding.features or encoding.name
    cut = cut_off([value for row in tokens[name] for value, *_ in row]) if encoding.cuts else 0
    return counts[name] - cut


def is_clip(clip: CLIP) -> bool:
    """Whether a text encoder is CLIP alone."""
    return clip.tokenize("").keys() <= ENCODERS


def check_clip(clip: CLIP) -> None:
    """Refuse an encoder that is neither CLIP nor in ENCODINGS."""
    if not is_clip(clip):
        raise ValueError(
            f"the text encoder {type(clip.cond_stage_model).__name__} is not the CLIP of SD1.x, SD2.x or SDXL, nor that"
            " of Flux.1, Flux.2, SD3, Chroma, Qwen-Image, Z-Image, Lumina 2, Hunyuan-Image, Cosmos-Predict2, Anima or"
            " Wan: where it puts the words of a prompt is not known."
        )


def clip_runs(clip: CLIP, prompt: str, phrase: str) -> set[tuple[int, ...]]:
    """The runs of a phrase among the tokens of CLIP."""
    text, sought = content(clip, prompt), content(clip, phrase)
    found = set()
    for name, tokens in text.items():
        found.update(occurrences(tokens, sought[name]))
    if not any(sought.values()):
        raise empty()
    return found


def empty() -> ValueError:
    return ValueError("the phrase is empty: write words of the prompt.")


def content(clip: CLIP, text: str) -> dict[str, list[Token]]:
    """The tokens of a text without those that begin, end and pad its chunks: {encoder: [Token]}, of CLIP's."""
    chunks = clip.tokenize(text, return_word_ids=True)
    found = {}
    for name in chunks.keys() & ENCODERS:
        tokenizer = getattr(clip.tokenizer, f"clip_{name}")
        found[name], starts_word = [], True
        for value, position, word in positioned(chunks[name], tokenizer.embedding_size):
            if word:
                found[name].append(Token(value, position, starts_word))
                starts_word = not is_id(value) or tokenizer.untokenize([(value, 1.0)])[0][1].endswith("</w>")
    return found


def positioned(rows: list[list[tuple]], size: int) -> Iterator[tuple[Any, int, int]]:
    """(value, position, number of the word) of each token in the chunks of a text."""
    start = 0
    for row in rows:
        used = [
            (value, word) for value, _, word in row if is_id(value) or value.shape[-1] == size
        ]  # ComfyUI leaves others out
        yield from ((value, position, word) for position, (value, word) in enumerate(used, start))
        start += len(row)


def is_id(value: Any) -> bool:
    return isinstance(value, numbers.Integral)


def occurrences(tokens: list[Token], sought: list[Token]) -> Iterator[tuple[int, ...]]:
    """The runs of positions at which `sought` stands in `tokens`."""
    for first in range(len(tokens) - len(sought) + 1 if sought else 0):
        run = tokens[first : first + len(sought)]
        if run[0].starts_word and all(same(a.value, b.value) for a, b in zip(run, sought)):
            yield tuple(token.position for token in run)


def same(a: Any, b: Any) -> bool:
    if is_id(a) or is_id(b):
        return is_id(a) and is_id(b) and a == b
    return torch.equal(a, b)


# ------------------------------------------------------------ T5 and language models


def spelled_runs(clip: CLIP, encoding: Encoding, prompt: str, phrase: str) -> set[tuple[int, ...]]:
    """The runs of a phrase among the tokens of T5 or a language model, after those among CLIP's where both are rows."""
    found, first = set(), 0
    if encoding.after_clip:
        first = clip_rows(clip, prompt)
        found = {run for run in clip_runs(clip, prompt, phrase) if run[-1] < first} if first else set()
        if clip.cond_stage_model.t5xxl is None:
            return found
    sought = " ".join("".join(letter for letter, _ in spelled(clip, encoding, phrase)).split())
    if not sought:
        raise empty()
    if UNKNOWN in sought:
        raise ValueError(
            f'the text encoder {type(clip.cond_stage_model).__name__} has no letters for a part of "{phrase}" (an'
            " embedding, or letters of another script). Choose words next to it."
        )
    text = spelled(clip, encoding, prompt)
    joined = "".join(letter for letter, _ in text)
    for match in re.finditer(f"(?={whole_words(sought)})", joined):
        letters = text[match.start(1) : match.end(1)]
        found.add(tuple(sorted({position + first for _, positions in letters for position in positions})))
    return found


def clip_rows(clip: CLIP, prompt: str) -> int:
    """How many rows CLIP's tokens take before T5's: SD3 may be loaded without one of its encoders."""
    chunks, model = clip.tokenize(prompt), clip.cond_stage_model
    there = [chunks[name] for name in ("l", "g") if getattr(model, f"clip_{name}") is not None]
    return min((sum(len(row) for row in rows) for rows in there), default=0)


def whole_words(sought: str) -> str:
    """A pattern whose first group is a phrase, with any spaces between its words, that is no part of longer words."""
    before = f"(?<!{LETTER})" if re.match(LETTER, sought) else ""
    after = f"(?!{LETTER})" if re.match(LETTER, sought[-1]) else ""
    return before + "(" + r"\s+".join(re.escape(word) for word in sought.split()) + ")" + after


def spelled(clip: CLIP, encoding: Encoding, text: str) -> list[tuple[str, set[int]]]:
    """The letters that a text's tokens spell, without the template around it, each with the positions of its tokens."""
    tokens, template = (template_of(clip, encoding, t) for t in (text, ""))
    before = shared(tokens, template)
    after = shared(tokens[::-1], template[before:][::-1])
    cut = cut_off([value for value, _ in tokens]) if encoding.cuts else 0
    own = [(value, position - cut) for value, position in tokens[before : len(tokens) - after] if position >= cut]
    tokenizer = inner(clip, encoding)
    written = [(byte, position) for value, position in own for byte in bytes_of(tokenizer, encoding, value)]
    letters = bytes(byte for byte, _ in written).decode(errors="surrogateescape")
    found, at = [], 0
    for letter in letters:
        end = at + len(letter.encode(errors="surrogateescape"))
        found.append((letter, {position for _, position in written[at:end]}))
        at = end
    return found


def inner(clip: CLIP, encoding: Encoding) -> Any:
    """ComfyUI's SDTokenizer of an encoder."""
    return getattr(clip.tokenizer, encoding.name, None) or getattr(clip.tokenizer, f"clip_{encoding.name}")


def template_of(clip: CLIP, encoding: Encoding, text: str) -> list[tuple[Any, int]]:
    """(value, position) of the tokens of a text in its template, without those that begin, end and pad it."""
    rows = clip.tokenize(text, return_word_ids=True)[encoding.name]
    size = inner(clip, encoding).embedding_size
    return [(value, position) for value, position, word in positioned(rows, size) if word]


def shared(tokens: list[tuple[Any, int]], others: list[tuple[Any, int]]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(tokens, others))
    return next((n for n, (a, b) in pairs if not same(a[0], b[0])), min(len(tokens), len(others)))


def cut_off(values: list[Any]) -> int:
    """How many tokens ComfyUI's encoders of Qwen2.5-VL leave out: all before the second turn, which is the user's, and
    the three that say so.
    """
    ids = [value if is_id(value) else None for value in values]
    turns = [position for position, value in enumerate(ids) if value == IM_START][:2]
    end = turns[-1] if turns else len(ids) - 1  # ComfyUI keeps the last token of a text without turns
    return end + 3 if ids[end + 1 : end + 3] == [USER, NEW_LINE] and len(ids) > end + 3 else end


def bytes_of(tokenizer: Any, encoding: Encoding, value: Any) -> bytes:
    """What a token spells, in UTF-8."""
    piece = tokenizer.untokenize([(value, 1.0)])[0][1] if is_id(value) else "<unk>"
    if piece == "<unk>":
        return UNKNOWN.encode()
    if encoding.bytes:
        return bytes(BYTES[letter] for letter in piece) if all(letter in BYTES for letter in piece) else piece.encode()
    match = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


def letters_of_bytes() -> dict[str, int]:
    """The letter for each byte in vocabularies such as GPT-2's: its own where it has one, else one from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = letters_of_bytes()


# ------------------------------------------------------------ a prompt in a CONDITIONING


def offset_of_words(own: list, given: list, positions: list[int]) -> int | None:
    """How many tokens further back than in a prompt its words stand in another part of a CONDITIONING: 0 where that is
    the prompt's own, more where its words were joined behind others (ConditioningConcat); None where they are not
    there.

    own: the prompt's [features [1, tokens, C], settings]. given: another such part, features [B, other tokens, C].
    positions: of the words in the prompt.
    """
    ids = own[1].get(TARGET_IDS), given[1].get(TARGET_IDS)
    if ids[0] is not None and ids[1] is not None:  # Anima: the features are of other tokens
        return offset_of_ids(*ids, positions)
    return offset_of_features(own[0], given[0], positions)


def offset_of_ids(own: torch.Tensor, given: torch.Tensor, positions: list[int]) -> int | None:
    """The first place further back at which ids [tokens] are those of the words."""
    sought = own[positions]
    last, places = max(positions), torch.tensor(positions)
    fitting = (n for n in range(len(given) - last) if torch.equal(given[places + n], sought))
    return next(fitting, None)


def offset_of_features(own: torch.Tensor, given: torch.Tensor, positions: list[int]) -> int | None:
    """The place at which features are most like those of the words, as a correlation: prompt weights scale them, and
    change little in it.
    """
    if given.shape[-1] != own.shape[-1] or given.shape[1] <= max(positions):
        return None
    own, given = (features[0].float().cpu() - features[0].float().cpu().mean(0) for features in (own, given))
    sought = own[positions].flatten()
    places = torch.tensor(positions)
    likeness = [
        float(torch.cosine_similarity(sought, given[places + offset].flatten(), dim=0))
        for offset in range(len(given) - max(positions))
    ]
    best = max(likeness)
    return likeness.index(best) if best >= ALIKE else None
