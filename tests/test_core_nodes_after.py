"""Every core node after ours, as docs/neighbours.md says (workshop/core_nodes.py makes it)."""

import pytest

from montage.workshop import core_nodes


@pytest.mark.slow
def test_every_core_node_keeps_the_laws_or_is_refused():
    found = list(core_nodes.rows(after=True))
    failed = [row for row in found if "FAILED" in row.found]
    assert not failed, "\n".join(map(str, failed))
    assert core_nodes.section(found, after=True) == core_nodes.written(after=True)
