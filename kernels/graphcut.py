"""The multi-label graph cut of Generative Photomontage (arXiv 2408.07116), on the grid of the first self-attention.

    E(L) = sum_p U(p, L_p) + sum_{p,q neighbours} w(p, q) [L_p != L_q]

U is C wherever another label than the stroke's is chosen; w is small where all images have an edge between p and q,
so that seams run along edges. Minimised by alpha-expansion.
"""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

STROKE_COST = 1_000_000  # C: above any sum of pairwise terms; gco refuses terms above 1e7
CYCLES = 100  # at most; it converges after two or three


def principal_components(keys, components):
    """The leading principal components of K.

    keys: [tokens, channels], K of one image and one CFG half. Returns [tokens, components], float64; padded with
    zeros where there are fewer. Exact (eigenvectors of the covariance): an L1 distance on components is blind to
    their signs but not to a rotation, which randomised methods leave open.
    """
    centred = keys.to(torch.float64) - keys.to(torch.float64).mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending eigenvalues
    projected = centred @ vectors.flip(1)[:, :components]
    return torch.nn.functional.pad(projected, (0, components - projected.shape[1]))


def neighbour_distances(features):
    """L1 distances between horizontal and vertical neighbours of one image's features.

    features: [h, w, dims] -> right [h, w-1], down [h-1, w].
    """
    return (features[:, 1:] - features[:, :-1]).abs().sum(-1), (features[1:] - features[:-1]).abs().sum(-1)


def image_distances(halves, grid, components):
    """Neighbour distances of one image from its K in each CFG half.

    halves: one or two [tokens, channels]. With one half (CFG 1) the distances are doubled, so that sigma keeps its
    meaning. Returns (right [h, w-1], down [h-1, w]), numpy float64.
    """
    scale = 2 / len(halves)
    features = torch.cat([principal_components(keys, components) for keys in halves], -1).reshape(*grid, -1)
    return tuple((scale * d).numpy() for d in neighbour_distances(features))


def edge_weights(distances, lam, sigma):
    """w(p, q) = int(sum over all images of lam * exp(-d_i(p, q) / (2 sigma))), right [h, w-1] and down [h-1, w], int64.

    distances: (right, down) of every image. All images count, those not beside a seam too; the sum is truncated once.
    """
    return tuple(
        sum(lam * np.exp(-d / (2 * sigma)) for d in direction).astype(np.int64) for direction in zip(*distances)
    )


def median_distance(distances):
    """The median neighbour distance over all images: a sigma of the size of the features at hand."""
    return float(np.median(np.concatenate([d.ravel() for pair in distances for d in pair])))


def stroke_costs(strokes, count, unmarked=None, edges=None):
    """U [h, w, count], int64, from strokes [h, w] (label, or -1 where nothing was painted).

    unmarked: a label that unpainted cells prefer, or None. The preference, 4 / max(h, w) of the mean edge weight in
    each cell, is too weak to cross a stroke and strong enough that a region reaches a few cells for its edge.
    """
    labels = np.arange(count)
    painted = (strokes >= 0)[..., None]
    costs = STROKE_COST * (painted & (labels != strokes[..., None])).astype(np.int64)
    if unmarked is not None:
        costs += preference(edges, max(strokes.shape)) * (~painted & (labels != unmarked))
    return costs


def preference(edges: tuple[np.ndarray, np.ndarray], side: int) -> int:
    """What an unpainted cell pays for another label than the unmarked one; side: the longer of the grid, in cells."""
    return max(1, int(4 * np.concatenate([w.ravel() for w in edges]).mean() / side))


def energy(labels, costs, edges):
    """E(L) as an exact Python int."""
    right, down = edges
    seams = right[labels[:, 1:] != labels[:, :-1]].sum() + down[labels[1:] != labels[:-1]].sum()
    return int(np.take_along_axis(costs, labels[..., None], -1).sum() + seams)


def alpha_expansion(costs, edges, cycles=CYCLES):
    """Minimise E by alpha-expansion (Boykov, Veksler, Zabih 2001) from the labelling of all zeros.

    costs: [h, w, labels] int64, edges: (right [h, w-1], down [h-1, w]) int64. Returns labels [h, w], int64.
    """
    labels = np.zeros(costs.shape[:2], np.int64)
    best = energy(labels, costs, edges)
    unchanged = 0
    for alpha in list(range(costs.shape[2])) * cycles:
        expanded = expand(labels, alpha, costs, edges)
        value = energy(expanded, costs, edges)
        unchanged = 0 if value < best else unchanged + 1
        if value < best:
            labels, best = expanded, value
        if unchanged == costs.shape[2]:
            break
    return labels


def expand(labels, alpha, costs, edges):
    """The best labelling in which every cell keeps its label or takes alpha: one minimum cut.

    Cells on the source's side keep, cells on the sink's side take alpha (Kolmogorov and Zabih 2004, with the two
    cases that Potts weights leave). Cells that have alpha already are no nodes: they only pull at their neighbours.
    """
    h, w = labels.shape
    free = labels != alpha
    node = np.full((h, w), -1)
    node[free] = np.arange(free.sum())
    source, sink = free.sum(), free.sum() + 1
    current = np.take_along_axis(costs, labels[..., None], -1)[..., 0]
    pull = (costs[..., alpha] - current).astype(np.int64)  # cost of taking alpha over keeping
    tails, heads, capacities = [], [], []

    def add(tail, head, capacity):
        tails.append(tail), heads.append(head), capacities.append(capacity)

    cells = (np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])
    for weight, (p, q) in zip(edges, cells):
        both = free[p] & free[q]
        same = both & (labels[p] == labels[q])
        add(node[p][both], node[q][both], weight[both])  # p keeps, q takes alpha
        add(node[q][same], node[p][same], weight[same])  # and the other way
        pull[q] -= np.where(both & ~same, weight, 0)  # if q takes alpha as well, the seam that is there now ends
        pull[p] -= np.where(free[p] & ~free[q], weight, 0)
        pull[q] -= np.where(free[q] & ~free[p], weight, 0)
    pull = pull[free]
    nodes = np.arange(len(pull))
    add(np.full((pull > 0).sum(), source), nodes[pull > 0], pull[pull > 0])
    add(nodes[pull < 0], np.full((pull < 0).sum(), sink), -pull[pull < 0])

    shape = (sink + 1, sink + 1)
    capacity = coo_array((np.concatenate(capacities), (np.concatenate(tails), np.concatenate(heads))), shape)
    capacity = capacity.astype(np.int32).tocsr()
    residual = capacity - maximum_flow(capacity, source, sink).flow
    residual.eliminate_zeros()
    keeps = np.zeros(sink + 1, bool)
    keeps[breadth_first_order(residual, source, return_predecessors=False)] = True
    expanded = labels.copy()
    expanded[free] = np.where(keeps[:-2], labels[free], alpha)
    return expanded


def gco_expansion(costs, edges, cycles=CYCLES):
    """The same minimisation by gco (the optional package gco-wrapper). Raises ImportError without it."""
    from gco import GCO

    h, w, count = costs.shape
    cell = np.arange(h * w).reshape(h, w)
    right, down = edges
    graph = GCO()
    graph.create_general_graph(h * w, count, energy_is_float=False)
    graph.set_data_cost(costs.reshape(-1, count).astype(np.intc))
    graph.set_all_neighbors(
        np.concatenate([cell[:, :-1].ravel(), cell[:-1].ravel()]),
        np.concatenate([cell[:, 1:].ravel(), cell[1:].ravel()]),
        np.concatenate([right.ravel(), down.ravel()]).astype(np.intc),
    )
    graph.set_smooth_cost((1 - np.eye(count)).astype(np.intc))
    for site in range(h * w):
        graph.init_label_at_site(site, 0)
    graph.expansion(cycles)
    labels = graph.get_labels().astype(np.int64).reshape(h, w)
    graph.destroy_graph()
    return labels


def cut(costs, edges, solver="auto"):
    """Minimise E. solver: "gco", "scipy", or "auto" (gco when it is installed). Both reach the same energy."""
    if solver != "scipy":
        try:
            return gco_expansion(costs, edges)
        except ImportError:
            if solver == "gco":
                raise ImportError(
                    "the gco solver needs the package gco-wrapper (its core is licensed for research only): "
                    "install it, or choose scipy"
                ) from None
    return alpha_expansion(costs, edges)
