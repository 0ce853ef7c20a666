"""The methods whose claims and costs are measured: a new one is a line here."""

from types import ModuleType
from typing import NamedTuple

from . import collage, layout_retouch, mca_ctrl, photomontage
from .benchmarks import collage as collage_benchmark
from .benchmarks import layout_retouch as layout_retouch_benchmark
from .benchmarks import mca_ctrl as mca_ctrl_benchmark
from .benchmarks import photomontage as photomontage_benchmark


class Method(NamedTuple):
    """A method's title, its studies (`sections(options)` yields Sections) and what its cost is measured on
    (`cases(bench)` returns {case: function}).
    """

    title: str
    studies: ModuleType
    benchmark: ModuleType


METHODS = {
    "photomontage": Method("Generative Photomontage", photomontage, photomontage_benchmark),
    "collage": Method("Collage Diffusion", collage, collage_benchmark),
    "mca_ctrl": Method("MCA-Ctrl", mca_ctrl, mca_ctrl_benchmark),
    "layout_retouch": Method("Layout-and-Retouch", layout_retouch, layout_retouch_benchmark),
}
