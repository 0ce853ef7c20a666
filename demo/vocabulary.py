"""The words of the captions and their numbers in SD1.x's tokenizer, so that training needs no tokenizer."""

import torch
from torch import Tensor

from .scenes import COLOURS, SHAPES, TEXTURES

START, END, TOKENS = 49406, 49407, 77
CLIP_IDS = {
    "a": [320],
    "an": [550],
    "and": [537],
    "at": [536],
    "ball": [1069],
    "black": [1449],
    "blue": [1746],
    "box": [2063],
    "brick": [9518],
    "by": [638],
    "checkered": [1113, 26690],
    "dotted": [47950],
    "fancy": [6733],
    "grass": [5922],
    "green": [1901],
    "house": [1212],
    "in": [530],
    "night": [930],
    "on": [525],
    "orange": [4287],
    "purple": [5496],
    "red": [736],
    "ring": [2540],
    "sand": [5094],
    "sky": [2390],
    "snow": [2583],
    "star": [1565],
    "striped": [22192],
    "the": [518],
    "tree": [2677],
    "wall": [2569],
    "white": [1579],
    "yellow": [4481],
}
# Row i of the stored embedding is token TOKEN_IDS[i]; one more row after them stands for every other word.
TOKEN_IDS = sorted({START, END, *(token for tokens in CLIP_IDS.values() for token in tokens)})
UNKNOWN = len(TOKEN_IDS)
_ROW = {token: row for row, token in enumerate(TOKEN_IDS)}


def tokenise(captions: list[str]) -> Tensor:
    """(n, 77) rows of the embedding; a word that no caption uses becomes one UNKNOWN."""
    rows = torch.full((len(captions), TOKENS), _ROW[END])
    for i, words in enumerate(captions):
        tokens = [row for word in words.split() for row in map(_ROW.get, CLIP_IDS.get(word, [None]))]
        tokens = [UNKNOWN if row is None else row for row in tokens]
        rows[i, : len(tokens) + 1] = torch.tensor([_ROW[START], *tokens])
    return rows


_OTHER, _COLOUR, _TEXTURE, _FANCY, _SHAPE = range(5)
_KINDS = torch.full((len(TOKEN_IDS) + 1,), _OTHER)
for _kind, _words in ((_COLOUR, COLOURS), (_TEXTURE, TEXTURES[1:]), (_FANCY, ["fancy"]), (_SHAPE, SHAPES)):
    _KINDS[[_ROW[token] for word in _words for token in CLIP_IDS[word]]] = _kind


def leave_out(rows: Tensor, without: Tensor) -> Tensor:
    """Whole captions (n, 77) as `tokenise` gives them, without the parts that (n, 3) booleans name in the order of
    scenes.CAPTION_PARTS: what `tokenise` gives for `scenes.caption(..., without=...)`."""
    kind = _KINDS.to(rows.device)[rows]
    colour, texture, place = without[:, :, None].unbind(1)
    behind = (kind == _SHAPE).flip(1).cumsum(1).flip(1) == 0  # the last object
    gone = (
        (colour & (kind == _COLOUR))
        | (texture & (kind == _TEXTURE))
        | ((colour | texture) & (kind == _FANCY))
        | (place & behind & (rows != _ROW[START]) & (rows != _ROW[END]))
    )
    rows = torch.where(colour & (rows == _ROW[CLIP_IDS["an"][0]]), _ROW[CLIP_IDS["a"][0]], rows)
    order = gone.byte().argsort(dim=1, stable=True)
    return rows.gather(1, order).masked_fill(gone.gather(1, order), _ROW[END])
