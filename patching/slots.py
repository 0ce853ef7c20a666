"""Who stands in which slot: ComfyUI gives one attention of one block to one function, and the last writer owns it.

This pack takes a slot last and inside a single evaluation, and hands whoever stood there before to its own function,
which goes on calling it.
"""

from collections.abc import Callable
from typing import Any


def occupy(
    transformer: dict[str, Any], kind: str, site: tuple, make: Callable[[Any, Callable | None], Callable]
) -> None:
    """Take the slot of a site in (a copy of) transformer options.

    kind: "attn1" or "attn2". make: (site, the function that stands there or None) -> the function to put there. A slot
    may be held for a site, or for its whole block.
    """
    replacements = transformer.setdefault("patches_replace", {})
    slot = dict(replacements.get(kind, {}))
    slot[tuple(site)] = make(site, slot.get(tuple(site), slot.get(tuple(site)[:2])))
    replacements[kind] = slot
