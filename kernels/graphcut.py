"""The multi-label graph cut of Generative Photomontage (arXiv 2408.07116), on the grid of the first self-attention.

    E(L) = sum_p U(p, L_p) + sum_{p,q neighbours} w(p, q) [L_p != L_q]

U is C wherever another label than the stroke's is chosen; w is small where all images have an edge between p and q,
so that seams run along edges. Minimised by alpha-expansion.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

STROKE_COST = 1_000_000  # C: above any sum of pairwise terms; gco refuses terms above 1e7
CYCLES = 100  # at most; it converges after two or three
CHUNK = 1024  # tokens that are summed in float32

Pair = tuple[np.ndarray, np.ndarray]  # of the grid's edges: right [h, w-1], down [h-1, w]


def principal_components(keys: torch.Tensor, components: int) -> torch.Tensor:
    """The leading principal components of K.

    keys: [tokens, channels], K of one image and one CFG half. Returns [tokens, components], float64 on the CPU; padded
    with zeros where there are fewer. Eigenvectors of the covariance, which is summed in float64 over chunks in float32
    (distances differ from an all-float64 computation by less than 1e-5 of themselves): an L1 distance on components is
    blind to their signs but not to a rotation, which randomised methods leave open.
    """
    rows = keys.float().cpu().numpy()
    chunks = [slice(first, first + CHUNK) for first in range(0, len(rows), CHUNK)]
    ones = np.ones(CHUNK, np.float32)
    sums = [ones[: len(rows[chunk])] @ rows[chunk] for chunk in chunks]
    centred = rows - (np.sum(sums, 0, dtype=np.float64) / len(rows)).astype(np.float32)
    channels = centred.shape[1]
    covariance = np.zeros((channels, channels))
    for chunk in chunks:
        covariance += centred[chunk].T @ centred[chunk]  # numpy computes one triangle of such a product, torch both
    _, vectors = eigh(covariance, subset_by_index=[max(0, channels - components), channels - 1])  # ascending
    projected = torch.from_numpy(centred @ vectors[:, ::-1].astype(np.float32)).double()
    return torch.nn.functional.pad(projected, (0, components - projected.shape[1]))


def neighbour_distances(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 distances between horizontal and vertical neighbours of one image's features.

    features: [h, w, dims] -> right [h, w-1], down [h-1, w].
    """
    features = features.permute(2, 0, 1).contiguous()  # a sum over the first axis is a sum of whole grids
    right, down = features.diff(dim=2), features.diff(dim=1)
    return right.abs_().sum(0), down.abs_().sum(0)


def image_distances(halves: Sequence[torch.Tensor], grid: tuple[int, int], components: int) -> Pair:
    """Neighbour distances of one image from its K in each CFG half.

    halves: one or two [tokens, channels]. With one half (CFG 1) the distances are doubled, so that sigma keeps its
    meaning. Returns (right [h, w-1], down [h-1, w]), numpy float64.
    """
    scale = 2 / len(halves)
    features = torch.cat([principal_components(keys, components) for keys in halves], -1).reshape(*grid, -1)
    right, down = neighbour_distances(features)
    return (scale * right).numpy(), (scale * down).numpy()


def edge_weights(distances: Sequence[Pair], lam: float, sigma: float) -> Pair:
    """w(p, q) = int(sum over all images of lam * exp(-d_i(p, q) / (2 sigma))), right [h, w-1] and down [h-1, w], int64.

    distances: (right, down) of every image. All images count, those not at a seam too; the sum is truncated once.
    """
    right, down = (
        np.asarray(sum(lam * np.exp(-d / (2 * sigma)) for d in direction)).astype(np.int64)
        for direction in zip(*distances, strict=True)
    )
    return right, down


def median_distance(distances: Sequence[Pair]) -> float:
    """The median neighbour distance over all images: a sigma of the size of the features at hand. 0 on a grid of one
    cell, which has no neighbours.
    """
    every = np.concatenate([d.ravel() for pair in distances for d in pair])
    return float(np.median(every)) if every.size else 0.0


def stroke_costs(strokes: np.ndarray, count: int, unmarked: int | None = None, edges: Pair | None = None) -> np.ndarray:
    """U [h, w, count], int64, from strokes [h, w] (label, or -1 where nothing was painted).

    unmarked: a label that unpainted cells prefer, or None; the preference needs the edges' weights. It is 4 / max(h, w)
    of the mean weight in each cell: too weak to cross a stroke and strong enough that a region reaches a few cells for
    its edge.
    """
    labels = np.arange(count)
    painted = (strokes >= 0)[..., None]
    costs = STROKE_COST * (painted & (labels != strokes[..., None])).astype(np.int64)
    if unmarked is not None and edges is not None:
        costs += preference(edges, max(strokes.shape)) * (~painted & (labels != unmarked))
    return costs


def preference(edges: Pair, side: int) -> int:
    """What an unpainted cell pays for another label than the unmarked one; side: the longer of the grid, in cells."""
    weights = np.concatenate([w.ravel() for w in edges])
    return max(1, int(4 * (weights.mean() if weights.size else 0) / side))


def energy(labels: np.ndarray, costs: np.ndarray, edges: Pair) -> int:
    """E(L), exact. labels: [h, w]."""
    right, down = edges
    seams = right[labels[:, 1:] != labels[:, :-1]].sum() + down[labels[1:] != labels[:-1]].sum()
    return int(np.take_along_axis(costs, labels[..., None], -1).sum() + seams)


def alpha_expansion(costs: np.ndarray, edges: Pair, cycles: int = CYCLES) -> np.ndarray:
    """Minimise E by alpha-expansion (Boykov, Veksler, Zabih 2001) from the labelling of all zeros.

    costs: [h, w, labels] int64, edges: (right [h, w-1], down [h-1, w]) int64. Returns labels [h, w], int64.
    """
    count = costs.shape[2]
    moves = Expansions(costs, edges)
    labels = np.zeros(costs.shape[:2], np.int64)
    best = energy(labels, costs, edges)
    unchanged = 0
    for alpha in list(range(count)) * cycles:
        expanded = moves.expand(labels, alpha)
        value = energy(expanded, costs, edges)
        unchanged = 0 if value < best else unchanged + 1
        if value < best:
            labels, best = expanded, value
        if unchanged == count:
            break
    return labels


class Expansions:
    """Expansion moves on one grid, each a minimum cut.

    The flow along the grid's edges is kept: a move begins with that of the same label's last move, where little has
    changed since, and a label's first move with that of the move before, since most of a seam's flow is needed again,
    whichever label expands. A minimum cut of what the kept flow leaves over is one of the whole (Kohli and Torr 2005).
    """

    def __init__(self, costs: np.ndarray, edges: Pair):
        """costs: [h, w, labels] int64, edges: right [h, w-1] and down [h-1, w] int64."""
        h, w, count = costs.shape
        cell = np.arange(h * w).reshape(h, w)
        self.costs = costs.reshape(-1, count)
        self.tails = np.concatenate([cell[:, :-1].ravel(), cell[:-1].ravel()])
        self.heads = np.concatenate([cell[:, 1:].ravel(), cell[1:].ravel()])
        self.weights = np.concatenate([edge.ravel() for edge in edges])
        self.last = np.zeros_like(self.weights)  # flow of the last move, from tail to head
        self.flows: dict[int, np.ndarray] = {}  # of the last move of each label

    def expand(self, grid: np.ndarray, alpha: int) -> np.ndarray:
        """The best labelling [h, w] in which every cell keeps its label in `grid` or takes alpha.

        Cells on the source's side keep, cells on the sink's side take alpha (Kolmogorov and Zabih 2004, with the two
        cases that Potts weights leave). Cells that have alpha already only pull at their neighbours.
        """
        labels, p, q, weights = grid.ravel(), self.tails, self.heads, self.weights
        free = labels != alpha
        both = free[p] & free[q]
        same = both & (labels[p] == labels[q])
        forward = np.where(both, weights, 0)  # cut if p keeps and q takes alpha
        backward = np.where(same, weights, 0)  # and the other way; the seam that is there already costs nothing more
        flow = np.clip(self.flows.get(alpha, self.last), -backward, forward)

        pull = np.where(free, self.costs[:, alpha] - self.costs[np.arange(len(labels)), labels], 0)  # cost of alpha
        ends_at_q = (both & ~same) | (free[q] & ~free[p])  # a seam that ends there if q takes alpha
        ends_at_p = free[p] & ~free[q]
        pull += self.added(q, flow - weights * ends_at_q) - self.added(p, flow + weights * ends_at_p)

        cut, used = minimum_cut(p, q, forward - flow, backward + flow, pull)
        self.last = self.flows[alpha] = flow + used
        return np.where(cut & free, alpha, labels).reshape(grid.shape)

    def added(self, cells: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The sum of the edges' values at each cell, int64."""
        return np.bincount(cells, values, len(self.costs)).astype(np.int64)


def minimum_cut(
    tails: np.ndarray, heads: np.ndarray, forward: np.ndarray, backward: np.ndarray, pull: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum cut between a source, which every node with pull > 0 hangs on, and a sink, for pull < 0.

    tails, heads, forward, backward: nodes and capacities of each edge [edges]. pull: [nodes]. All integers. Returns
    which nodes are on the sink's side [nodes] bool (of several minimum cuts the one with most of them), and the flow
    from tail to head along each edge [edges].
    """
    nodes = len(pull)
    source, sink = nodes, nodes + 1
    supply, demand = (pull > 0).nonzero()[0], (pull < 0).nonzero()[0]
    start = np.concatenate([tails, heads, np.full(len(supply), source), demand])
    end = np.concatenate([heads, tails, supply, np.full(len(demand), sink)])
    values = np.concatenate([forward, backward, pull[supply], -pull[demand]]).astype(np.int32)
    # All arcs turned round: the search then begins at the few seams, not at every stroke, and takes less time.
    capacity = coo_array((values, (end, start)), (nodes + 2, nodes + 2)).tocsr()
    flow = maximum_flow(capacity, sink, source).flow
    residual = (capacity - flow).T.tocsr()
    residual.eliminate_zeros()
    reached = np.zeros(nodes + 2, bool)
    reached[breadth_first_order(residual, source, return_predecessors=False)] = True
    along = np.asarray(flow[heads, tails], np.int64).ravel() if len(tails) else np.zeros(0, np.int64)
    return ~reached[:nodes], along


def gco_expansion(costs: np.ndarray, edges: Pair, cycles: int = CYCLES) -> np.ndarray:
    """The same minimisation by gco (the optional package gco-wrapper), for two labels and two cells or more: with fewer
    it ends the process. Raises ImportError without it.
    """
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


def cut(costs: np.ndarray, edges: Pair, solver: str = "auto") -> np.ndarray:
    """Minimise E. costs: [h, w, labels] int64, edges: right [h, w-1] and down [h-1, w] int64. Returns labels [h, w].

    solver: "gco", "scipy", or "auto" (gco when it is installed). Both reach the same energy; without a seam to lay, on
    one cell or with one label, neither is called. Raises ImportError where "gco" is asked for and not installed.
    """
    if costs.shape[2] < 2 or costs.shape[0] * costs.shape[1] < 2:
        return costs.argmin(-1)
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
