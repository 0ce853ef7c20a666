"""BERT's vocabulary: the one thing that Grounding DINO needs and its checkpoint does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# bert-base-uncased's own ids. Another BERT's vocabulary would load as well and give plausible nonsense.
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
SEPARATORS = ("[CLS]", "[SEP]", ".", "?")
MAX_TOKENS = 256


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """Token -> id from a vocab.txt (one token a line) or a tokenizer.json."""
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".json"):
        return json.loads(text)["model"]["vocab"]
    return {token: row for row, token in enumerate(text.split("\n")) if token}


def vocabulary_fault(vocabulary: dict[str, int], rows: int) -> str | None:
    """What is wrong with the vocabulary for a text encoder of `rows` embeddings, or None."""
    if len(vocabulary) != rows:
        return f"it has {len(vocabulary)} tokens where the checkpoint has {rows}"
    wrong = [token for token, row in SPECIAL.items() if vocabulary.get(token) != row]
    return f"{', '.join(wrong)} stand at other ids than in bert-base-uncased" if wrong else None


class WordPieces:
    """The tokenizer in the form in which Grounding DINO's forward calls it.

    Built on `tokenizers`, because transformers' BertTokenizer(vocab_file=...) silently ignores the
    file in the versions 5.0 to 5.23.
    """

    def __init__(self, vocabulary: dict[str, int]):
        from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

        self.tokenizer = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
        self.separators = {vocabulary[token] for token in SEPARATORS}

    def ids(self, caption: str) -> list[int]:
        return self.tokenizer.encode(caption).ids

    def spans(self, caption: str) -> list[range]:
        """The token positions of each phrase: what stands between two separators."""
        marks = [at for at, token in enumerate(self.ids(caption)) if token in self.separators]
        # The last separator is [SEP], the one before it the caption's full stop: between them is no phrase.
        return [range(start + 1, end) for start, end in zip(marks[:-2], marks[1:-1], strict=True)]

    def __call__(self, captions: list[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = torch.tensor([self.ids(caption) for caption in captions])
        return BatchEncoding(
            {
                "input_ids": ids,
                "token_type_ids": torch.zeros_like(ids),
                "attention_mask": torch.ones_like(ids),
            }
        )


def split_phrases(text: str) -> list[str]:
    """The phrases of a prompt: one a line, or separated by full stops or question marks."""
    for mark in ".?":
        text = text.replace(mark, "\n")
    return [phrase for phrase in (line.strip() for line in text.split("\n")) if phrase]


def caption_of(phrases: list[str]) -> str:
    """Grounding DINO's caption: lower case, every phrase closed by a full stop."""
    return " ".join(f"{phrase.lower()} ." for phrase in phrases)
