"""The model files where people keep them, read without running code, and what to do when one is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch

from . import Problem, grounding_dino, segment_anything
from .managed import ManagedModel, full_load_device
from .vocabulary import read_vocabulary, vocabulary_fault

DETECTORS, SEGMENTERS, BERT = "grounding-dino", "sams", "bert-base-uncased"
FOLDERS = {DETECTORS: (DETECTORS,), SEGMENTERS: (SEGMENTERS, "sam", "SAM"), BERT: (BERT,)}
NONE = "none"
# The published files. They are always on offer, so that a missing one is answered with where to put it.
PUBLISHED = {
    DETECTORS: {
        "groundingdino_swint_ogc.pth": "694 MB, github.com/IDEA-Research/GroundingDINO/releases",
        "groundingdino_swinb_cogcoor.pth": "938 MB, github.com/IDEA-Research/GroundingDINO/releases",
    },
    SEGMENTERS: {
        "sam_vit_b_01ec64.pth": "375 MB, github.com/facebookresearch/segment-anything#model-checkpoints",
        "sam_vit_l_0b3195.pth": "1.2 GB, github.com/facebookresearch/segment-anything#model-checkpoints",
        "sam_vit_h_4b8939.pth": "2.6 GB, github.com/facebookresearch/segment-anything#model-checkpoints",
    },
}
_VOCABULARY = (
    "Grounding DINO needs BERT's vocabulary; put vocab.txt (232 KB, huggingface.co/google-bert/bert-base-uncased) into"
    " {folder}"
)
# Peak memory beyond the weights in fp32. Measured: the detector at 800x1333 1.5 GB, and it grows with the pixels, of
# which there are 1333x1333 at most; the segmenter 3.5 GB, for its attention over 64x64 places.
DETECTOR_MEMORY, SEGMENTER_MEMORY = int(2.5e9), int(3.6e9)


def register_folders() -> None:
    """Makes these folders known to ComfyUI. Other packs and extra_model_paths.yaml use the same keys: what they
    have set, the accepted extensions included, stays as it is."""
    for key, names in FOLDERS.items():
        for name in names:
            folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, name))


def offered(key: str) -> list[str]:
    """What a combo shows: the files that are there, then the published ones, then none."""
    there = [name for name in folder_paths.get_filename_list(key) if name.endswith((".pth", ".pt", ".safetensors"))]
    return list(dict.fromkeys([*there, *PUBLISHED[key], NONE]))


def load_detector(name: str) -> ManagedModel:
    weights = read_weights(DETECTORS, name)
    if not grounding_dino.is_grounding_dino(weights):
        raise Problem(
            f"{name} in models/{DETECTORS} is not a Grounding DINO checkpoint; take"
            f" {' or '.join(PUBLISHED[DETECTORS])}."
        )
    vocabulary = find_vocabulary(weights["bert.embeddings.word_embeddings.weight"].shape[0])
    return _managed(
        name, "rf_groundingdino", DETECTOR_MEMORY, lambda: grounding_dino.build_detector(weights, vocabulary)
    )


def load_segmenter(name: str, precision: str) -> ManagedModel:
    """precision: fp32, fp16, or auto: fp16 on a GPU that is good at it."""
    weights = read_weights(SEGMENTERS, name)
    if fault := segment_anything.segmenter_fault(weights):
        raise Problem(f"{name} in models/{SEGMENTERS} is {fault}; take {' or '.join(PUBLISHED[SEGMENTERS])}.")
    half = precision == "fp16" or (precision == "auto" and mm.should_use_fp16(full_load_device()))
    memory = SEGMENTER_MEMORY // 2 if half else SEGMENTER_MEMORY
    return _managed(name, "segment-anything", memory, lambda: segment_anything.build_segmenter(weights, half))


def _managed(name: str, package: str, memory: int, make: Callable) -> ManagedModel:
    try:
        return ManagedModel(make(), memory)
    except ImportError as error:
        raise Problem(
            f"a Python package is missing ({error}); run `pip install {package}` in ComfyUI's environment and restart."
        ) from error
    except (ValueError, KeyError, IndexError, RuntimeError) as error:  # of tensors that are not there or do not fit
        raise Problem(
            f"{name} does not fit ({str(error).splitlines()[-1].strip()}); it is damaged or another variant: download"
            " it again."
        ) from error


def read_weights(key: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a model file, and nothing but tensors: no pickled code runs."""
    path = folder_paths.get_full_path(key, name)
    if path is None:
        raise Problem(f"there is no {name}; {_where(key, name)}.")
    try:
        weights = cast("dict[str, Any]", comfy.utils.load_torch_file(path, safe_load=True))
        weights = weights.get("model", weights)
        return {k.removeprefix("module."): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    except Exception as error:  # every format's reader has exceptions of its own for a torn file or a pickle with code
        raise Problem(
            f"{name} in models/{key} cannot be read as plain weights ({_first_line(error)}); download it again."
        ) from error


def check_present(detector: str, segmenter: str) -> None:
    """Names every file that is not there at once, so that nobody downloads one after the other. Raises Problem.

    detector, segmenter: file names, or NONE; a detector needs BERT's vocabulary too.
    """
    chosen = [(key, name) for key, name in ((DETECTORS, detector), (SEGMENTERS, segmenter)) if name != NONE]
    absent = [(key, name) for key, name in chosen if folder_paths.get_full_path(key, name) is None]
    puts = [f"there is no {name}; {_where(key, name)}" for key, name in absent]
    if puts and detector != NONE and not _vocabulary_files():
        puts.append(_VOCABULARY.format(folder=folder_paths.get_folder_paths(BERT)[0]))
    if puts:
        raise Problem(f"{'. Also, '.join(puts)}.")


def _where(key: str, name: str) -> str:
    """What to do about a file that is not there."""
    source = f" ({PUBLISHED[key][name]})" if name in PUBLISHED[key] else ""
    return f"put it{source} into {folder_paths.get_folder_paths(key)[0]}"


def find_vocabulary(rows: int) -> dict[str, int]:
    """BERT's vocabulary for a text encoder of so many rows, from models/bert-base-uncased."""
    faults = []
    for path in _vocabulary_files():
        try:
            vocabulary = read_vocabulary(path)
            fault = vocabulary_fault(vocabulary, rows)
        except (ValueError, KeyError, TypeError, OSError) as error:
            fault = f"it cannot be read ({_first_line(error)})"
        if fault is None:
            return vocabulary
        faults.append(f" {path} is not it: {fault}.")
    raise Problem(f"{_VOCABULARY.format(folder=folder_paths.get_folder_paths(BERT)[0])}.{''.join(faults)}")


def _vocabulary_files() -> Any:
    candidates = [
        os.path.join(folder, name)
        for folder in folder_paths.get_folder_paths(BERT)
        for name in ("vocab.txt", "tokenizer.json")
    ]
    return [path for path in candidates if os.path.isfile(path)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
