"""Where a phrase stands among the tokens of a prompt: positions on the token axis of its CONDITIONING.

The prompt is tokenized by ComfyUI's own tokenizer, so chunks of 77, weights like (word:1.2) and embedding:name are what
they are when the prompt is encoded. An embedding of several vectors is several tokens.
"""

import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from comfy.sd import CLIP

ENCODERS = {"l", "g", "h"}  # CLIP of SD1.x, SD2.x and SDXL
ALIKE = 0.8  # correlation of text features from which on they are of the same words, weighted or in another place


class Token(NamedTuple):
    value: int | torch.Tensor  # of the vocabulary, or the vector of an embedding
    position: int
    starts_word: bool


def token_runs(clip: CLIP, prompt: str, phrase: str) -> list[tuple[int, ...]]:
    """Every occurrence of a phrase in a prompt, as runs of token positions.

    A run is a tuple of positions: ascending, and consecutive unless it goes on in the next chunk. Weights count for
    nothing, nor do upper case and spaces; whole words only. With SDXL an occurrence may stand at two places, if one
    of its encoders leaves an embedding out that the other has; then each is a run.
    clip: CLIP. prompt, phrase: str. Returns [(int, ...)], in the order of the prompt.
    Raises ValueError, naming the phrase, if it is empty or absent, and for text encoders other than CLIP.
    """
    text, sought = content(clip, prompt), content(clip, phrase)
    found = set()
    for name, tokens in text.items():
        found.update(occurrences(tokens, sought[name]))
    if not any(sought.values()):
        raise ValueError("the phrase is empty: write words of the prompt.")
    if not found:
        raise ValueError(f'"{phrase}" is not in the prompt "{prompt}". Write it exactly as it occurs there.')
    return sorted(found)


def content(clip: CLIP, text: str) -> dict[str, list[Token]]:
    """The tokens of a text without those that begin, end and pad its chunks: {encoder: [Token]}."""
    chunks = clip.tokenize(text, return_word_ids=True)
    if not chunks.keys() <= ENCODERS:
        raise ValueError(
            f"the text encoder {type(clip.cond_stage_model).__name__} is not the CLIP of SD1.x, SD2.x or SDXL."
        )
    found = {}
    for name, rows in chunks.items():
        size = getattr(clip.tokenizer, f"clip_{name}").embedding_size
        found[name], start, starts_word = [], 0, True
        for row in rows:
            used = [
                (value, word) for value, _, word in row if is_id(value) or value.shape[-1] == size
            ]  # ComfyUI leaves others out
            for position, (value, word) in enumerate(used, start):
                if word:
                    found[name].append(Token(value, position, starts_word))
                    starts_word = not is_id(value) or clip.tokenizer.untokenize([(value, 1.0)])[0][1].endswith("</w>")
            start += len(row)
    return found


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


def offset_of_words(own: torch.Tensor, given: torch.Tensor, positions: list[int]) -> int | None:
    """How many tokens further back than in a prompt its words stand in other text features: 0 where those are the
    prompt's own, more where they were joined behind others (ConditioningConcat); None where the words are not there.

    own: features of the prompt [1, tokens, C]. given: [B, other tokens, C]. positions: of the words in the prompt.
    Compared are the features at those places, as a correlation: prompt weights scale them, and change little in it.
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
