"""The graph cut of Generative Photomontage by itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from montage.kernels import graphcut


def random_problem(seed, shape=(12, 15), count=3, lam=100):
    rng = np.random.default_rng(seed)
    edges = rng.integers(1, lam, (shape[0], shape[1] - 1)), rng.integers(1, lam, (shape[0] - 1, shape[1]))
    strokes = np.full(shape, -1)
    for label in range(count):
        y, x = rng.integers(0, shape[0] - 2), rng.integers(0, shape[1] - 2)
        strokes[y : y + 2, x : x + 2] = label
    return graphcut.stroke_costs(strokes, count), edges, strokes


def keys(seed, grid=(8, 9), channels=24):
    return torch.randn(grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(seed)) * 4


def test_two_labels_reach_the_optimum_found_by_trying_all():
    rng = np.random.default_rng(3)
    for _ in range(20):
        costs = rng.integers(0, 40, (3, 3, 2))
        edges = rng.integers(0, 30, (3, 2)), rng.integers(0, 30, (2, 3))
        best = min(
            graphcut.energy(np.array(bits).reshape(3, 3), costs, edges) for bits in itertools.product((0, 1), repeat=9)
        )
        assert graphcut.energy(graphcut.alpha_expansion(costs, edges), costs, edges) == best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.tuples(st.integers(1, 14), st.integers(1, 14)))
def test_expansion_never_does_worse_than_a_constant_labelling(seed, count, shape):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 200, (*shape, count))
    edges = rng.integers(0, 100, (shape[0], shape[1] - 1)), rng.integers(0, 100, (shape[0] - 1, shape[1]))
    found = graphcut.energy(graphcut.alpha_expansion(costs, edges), costs, edges)
    assert found <= min(graphcut.energy(np.full(shape, label), costs, edges) for label in range(count))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3))
def test_a_move_is_the_best_of_all_moves(seed, count):
    """After other moves, whose flow it starts with."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 40, (3, 3, count))
    edges = rng.integers(0, 30, (3, 2)), rng.integers(0, 30, (2, 3))
    moves = graphcut.Expansions(costs, edges)
    for alpha in rng.integers(0, count, 4):
        labels = rng.integers(0, count, (3, 3))
        best = min(
            graphcut.energy(np.where(np.array(bits).reshape(3, 3), alpha, labels), costs, edges)
            for bits in itertools.product((False, True), repeat=9)
        )
        assert graphcut.energy(moves.expand(labels, alpha), costs, edges) == best


@pytest.mark.parametrize("seed", range(4))
def test_the_kept_flow_changes_no_label(seed, monkeypatch):
    costs, edges, _ = random_problem(seed, (40, 40), 5)
    kept = graphcut.alpha_expansion(costs, edges)
    expand = graphcut.Expansions.expand

    def forgetful(self, labels, alpha):
        self.last[:] = 0
        self.flows.clear()
        return expand(self, labels, alpha)

    monkeypatch.setattr(graphcut.Expansions, "expand", forgetful)
    assert (graphcut.alpha_expansion(costs, edges) == kept).all()


@pytest.mark.parametrize("solver", ["auto", "scipy", "gco"])
@pytest.mark.parametrize("shape, count", [((4, 5), 1), ((1, 1), 1), ((1, 1), 3), ((1, 2), 2), ((7, 1), 3), ((1, 9), 2)])
def test_one_label_and_grids_of_a_line(shape, count, solver):
    """gco ends the whole process where there is one label."""
    if solver == "gco":
        pytest.importorskip("gco")
    strokes = np.full(shape, -1)
    strokes[-1, -1] = count - 1
    edges = np.full((shape[0], shape[1] - 1), 9), np.full((shape[0] - 1, shape[1]), 9)
    for unmarked in (None, 0):
        labels = graphcut.cut(graphcut.stroke_costs(strokes, count, unmarked, edges), edges, solver)
        assert labels.shape == shape and labels[-1, -1] == count - 1
    assert graphcut.median_distance([edges]) == (0 if shape == (1, 1) else 9)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_scipy_and_gco_reach_the_same_energy(seed, count):
    pytest.importorskip("gco")
    costs, edges, _ = random_problem(seed, (24, 31), count)
    ours, theirs = graphcut.cut(costs, edges, "scipy"), graphcut.cut(costs, edges, "gco")
    assert graphcut.energy(ours, costs, edges) == graphcut.energy(theirs, costs, edges)


def test_horizontal_and_vertical_weights_are_not_swapped():
    """A column of cheap edges in a 4x5 grid is where the cut runs; transposed, transposed."""
    right, down = np.full((4, 4), 50), np.full((3, 5), 50)
    right[:, 2] = 1
    strokes = np.full((4, 5), -1)
    strokes[0, 0], strokes[3, 4] = 0, 1
    labels = graphcut.alpha_expansion(graphcut.stroke_costs(strokes, 2), (right, down))
    assert (labels == (np.arange(5) >= 3)).all()
    transposed = graphcut.alpha_expansion(graphcut.stroke_costs(strokes.T, 2), (down.T, right.T))
    assert (transposed == labels.T).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_stroke_keeps_its_label_at_an_energy_below_C(seed):
    costs, edges, strokes = random_problem(seed, (64, 64), 4)
    labels = graphcut.alpha_expansion(costs, edges)
    painted = strokes >= 0
    assert (labels[painted] == strokes[painted]).all()
    assert graphcut.energy(labels, costs, edges) < graphcut.STROKE_COST


def test_strokes_everywhere_do_not_overflow():
    """64x64 cells against C each sum to 4e9, beyond 32 bits."""
    strokes = np.zeros((64, 64), int)
    costs = graphcut.stroke_costs(strokes, 2)
    edges = np.full((64, 63), 400), np.full((63, 64), 400)
    assert graphcut.energy(np.ones((64, 64), int), costs, edges) == 64 * 64 * 1_000_000
    assert (graphcut.alpha_expansion(costs, edges) == 0).all()


def test_weights_ignore_offset_and_sign_of_the_keys():
    grid, k = (8, 9), keys(0)
    same = [k, k + 3.7, -k, k * torch.tensor([1.0, -1.0]).repeat(12)]
    reference, *others = (graphcut.image_distances([variant], grid, 10) for variant in same)
    for other in others:
        for a, b in zip(reference, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)  # float32 keys; the components are exact


def test_identical_images_add_up():
    """N equal images give N times the weight of one, truncated once after the sum."""
    distances = graphcut.image_distances([keys(1)], (8, 9), 10)
    for direction in range(2):
        five = graphcut.edge_weights([distances] * 5, 100, 10)[direction]
        exact = 5 * 100 * np.exp(-distances[direction] / 20)
        assert (five == exact.astype(int)).all()


def test_all_images_count_in_a_weight():
    one, other = (graphcut.image_distances([keys(seed)], (8, 9), 10) for seed in (1, 2))
    both = graphcut.edge_weights([one, other], 100, 10)[0]
    parts = [100 * np.exp(-d[0] / 20) for d in (one, other)]
    assert (both == (parts[0] + parts[1]).astype(int)).all()


def test_one_half_alone_is_counted_twice():
    k = keys(4)
    one, two = (graphcut.image_distances(halves, (8, 9), 10) for halves in ([k], [k, k]))
    for single, double in zip(one, two, strict=True):
        np.testing.assert_allclose(single, double)


def test_components_are_the_directions_of_most_variance():
    k = keys(2, channels=12) * torch.linspace(1, 6, 12)
    projected = graphcut.principal_components(k, 4)
    centred = (k - k.mean(0)).double()
    reference = torch.linalg.svd(centred, full_matrices=False).S[:4]
    torch.testing.assert_close(projected.norm(dim=0), reference)
    assert graphcut.principal_components(k, 20).shape == (72, 20)  # padded where there are only 12


def test_unmarked_cells_lean_to_the_base_without_swallowing_strokes():
    flat = np.full((16, 15), 80), np.full((15, 16), 80)
    strokes = np.full((16, 16), -1)
    strokes[6:9, 6:9] = 1
    free = graphcut.alpha_expansion(graphcut.stroke_costs(strokes, 2), flat)
    assert (free == 1).all()  # nothing pins label 0
    leaning = graphcut.alpha_expansion(graphcut.stroke_costs(strokes, 2, unmarked=0, edges=flat), flat)
    assert (leaning == (strokes == 1)).all()


def test_a_missing_gco_is_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gco", None)
    costs, edges, _ = random_problem(0)
    assert graphcut.cut(costs, edges, "auto").shape == (12, 15)
    with pytest.raises(ImportError, match="install it, or choose scipy"):
        graphcut.cut(costs, edges, "gco")
