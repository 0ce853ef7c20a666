"""What Graph Cut Montage tells its editor and Composite Attention Inject: the base, the unpainted, the live cut."""

import json
import zlib

import numpy as np
import pytest
import torch

from montage.kernels import graphcut, labels
from montage.kernels.strokes import draw, parse_document
from montage.nodes import previews
from montage.nodes.photomontage import CompositeAttentionInject, GraphCutMontage
from montage.workshop.browser import run_node
from montage.workshop.random_models import random_model
from montage.workshop.sampling import MIXED, SIZE, STROKES, pictures, same, stack, two

ONE_STROKE = '{"v":1,"base":0,"strokes":[{"k":1,"r":500,"p":[9000,1000,9000,9000]}]}'


def cut(strokes="", base=0, unmarked_is_base=False, **more):
    images = {f"image{number}": image for number, image in enumerate(pictures(1, 2))}
    return GraphCutMontage.execute(
        stack(*two()), images, base, 100.0, 10.0, 10, "scipy", unmarked_is_base, strokes, **more
    )


# ---------------------------------------------------------------- one base


def inject(base, **cut_base):
    model, latent = CompositeAttentionInject.execute(
        random_model("sd15-small"), stack(*two()), MIXED, base, 0.0, 1.0, "all", "model", "composite", **cut_base
    ).args
    return latent["samples"]


def test_the_cut_hands_on_its_base_and_the_composite_follows_it():
    assert cut(base=1).args[3] == 1
    schema = GraphCutMontage.define_schema(), CompositeAttentionInject.define_schema()
    assert [output.id for output in schema[0].outputs] == ["masks", "labels", "paste", "base"]
    assert [one.id for one in schema[1].inputs][-3:] == ["kv", "cut_base", "exact"]
    assert same(inject(0, cut_base=1), inject(1)) and same(inject(1, cut_base=1), inject(1))


def test_two_bases_that_differ_are_an_error():
    with pytest.raises(ValueError, match="own base is image 1, but Graph Cut Montage has base 0. Set base of"):
        inject(1, cut_base=0)
    with pytest.raises(ValueError, match="Composite Attention Inject: base is image 2, and there are 2 images"):
        inject(0, cut_base=2)


# ---------------------------------------------------------------- what nobody painted


def test_a_stroke_on_one_image_keeps_the_rest_from_the_base():
    lone = cut(ONE_STROKE).args[0]
    assert (lone[1] == 1).all()  # what it meant before `unmarked`, and still does without it
    masks = cut(ONE_STROKE, unmarked="auto").args[0]
    assert (masks[1, 8:56, 58] == 1).all() and masks[0].mean() > 0.5
    assert same(masks, cut(ONE_STROKE, unmarked_is_base=True).args[0])
    assert same(cut(ONE_STROKE, unmarked="as unmarked_is_base").args[0], lone)


def test_strokes_on_the_base_decide_alone():
    assert same(cut(STROKES, unmarked="auto").args[0], cut(STROKES).args[0])
    assert same(
        cut(STROKES, unmarked_is_base=True, unmarked="auto").args[0], cut(STROKES, unmarked_is_base=True).args[0]
    )


def test_new_nodes_measure_sigma_and_decide_about_the_unpainted():
    inputs = {one.id: one for one in GraphCutMontage.define_schema().inputs}
    assert inputs["sigma"].default == 0 and inputs["unmarked"].default == "auto" and inputs["unmarked"].optional


# ---------------------------------------------------------------- the editor's own cut


def test_the_editor_gets_the_weights_that_were_cut_with(tmp_path, monkeypatch):
    monkeypatch.setattr(previews.folder_paths, "get_temp_directory", lambda: str(tmp_path))
    made = cut(ONE_STROKE, unmarked="auto")
    [sent] = made.ui["montage_cut"]
    assert made.ui["montage_strokes"] == [zlib.crc32(ONE_STROKE.encode())]
    weights = np.fromfile(tmp_path / "montage" / f"{sent['weights']}.bin", "<u4").astype(np.int64)
    h, w = sent["grid"]
    assert (h, w) == SIZE and len(weights) == h * (w - 1) + (h - 1) * w
    edges = weights[: h * (w - 1)].reshape(h, w - 1), weights[h * (w - 1) :].reshape(h - 1, w)
    assert sent["preference"] == graphcut.preference(edges, max(h, w))
    _, strokes = parse_document(ONE_STROKE, 2)
    cells = labels.pool(draw(strokes, 2, 64, 64), (h, w)).numpy()
    owner = torch.from_numpy(graphcut.cut(graphcut.stroke_costs(cells, 2, 0, edges), edges, "scipy"))
    assert same(labels.to_masks(labels.at_grid(owner, (64, 64)), 2), made.args[0])


def test_masks_and_pictures_of_strokes_cannot_be_cut_in_the_editor():
    assert "montage_cut" not in cut(stroke_masks=torch.zeros(2, 64, 64)).ui


def problem(name, seed, grid, count, painted, base=0, from_base=False, scale=1.0):
    """Random smooth weights and dots of strokes, and what this pack's cut makes of them."""
    random = np.random.default_rng(seed)
    distances = []
    for _ in range(count):
        features = np.cumsum(random.normal(size=(*grid, 3)), 1) + np.cumsum(random.normal(size=(*grid, 3)), 0)
        distances.append(tuple(d.numpy() for d in graphcut.neighbour_distances(torch.from_numpy(scale * features))))
    edges = graphcut.edge_weights(distances, 100.0, graphcut.median_distance(distances) or 1.0)
    cells = np.full(grid, -1)
    for image in painted:
        y, x = random.integers(0, grid[0] - 3), random.integers(0, grid[1] - 6)
        cells[y : y + 3, x : x + 6] = image
    preference = graphcut.preference(edges, max(grid)) if from_base else 0
    owner = graphcut.cut(graphcut.stroke_costs(cells, count, base if from_base else None, edges), edges, "scipy")
    return {
        "name": name,
        "grid": grid,
        "count": count,
        "base": base,
        "preference": preference,
        "weights": np.concatenate([w.ravel() for w in edges]).tolist(),
        "cells": cells.ravel().tolist(),
        "expected": owner.ravel().tolist(),
    }


def problems():
    yield problem("nothing painted", 0, (8, 9), 3, (), base=2) | {"expected": [2] * 72}
    for seed in range(12):
        grid = [(8, 9), (12, 7), (16, 16), (1, 20)][seed % 4] if seed % 4 != 3 else (9, 20)
        yield problem(f"small {seed}", seed, grid, 2 + seed % 4, range(1 + seed % 4), seed % 2, seed % 3 == 0)
    yield problem("flat weights, where many cuts tie", 5, (16, 16), 4, range(4), scale=0.0)
    for seed in range(3):
        yield problem(f"64x64, nine images, {seed}", seed, (64, 64), 9, [*range(9), *range(9)])
        yield problem(f"64x64, nine images, from the base, {seed}", seed, (64, 64), 9, range(1, 9), 0, True)


def test_the_editor_cuts_as_python_does(tmp_path):
    file = tmp_path / "cuts.json"
    file.write_text(json.dumps(list(problems())))
    run_node("cut.test.js", {"MONTAGE_CUTS": str(file)})
