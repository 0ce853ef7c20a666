"""Core nodes after ours, as docs/neighbours.md says (workshop/core_nodes.py makes it): one of sixteen, since all of
them take minutes. MONTAGE_CORE_NODES=1 goes through every one and holds the whole table to what happens.
"""

import os

import pytest

from montage.workshop import core_nodes

EVERY = int(os.environ.get("MONTAGE_CORE_NODES", 16))


@pytest.mark.slow
def test_core_nodes_keep_the_laws_or_are_refused():
    found = list(core_nodes.rows(after=True, every=EVERY))
    failed = [row for row in found if "FAILED" in row.found]
    assert not failed, "\n".join(map(str, failed))
    if EVERY == 1:
        assert core_nodes.section(found, after=True) == core_nodes.written(after=True)


def test_every_core_node_is_in_the_table():
    table = core_nodes.written(after=True)
    missing = [name for _, name in core_nodes.names() if f"| {name} |" not in table]
    assert not missing
