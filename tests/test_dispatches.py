"""What a step dispatches beyond plain sampling: counted, so that no machine changes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from montage.evidence.benchmarks.dispatches import counted
from montage.patching import transfers

ROOT = Path(__file__).resolve().parent.parent

MOST = {  # operations of a step, as ratios to plain sampling: of SD1.5's structure, of SDXL's
    "record": (1.005, 1.005),
    "record and cache": (1.02, 1.03),
    "compose 2, cache": (1.035, 1.06),
    "compose 4, cache": (1.035, 1.06),
    "compose 2, replay": (2.01, 2.01),
    "compose 4, replay": (2.01, 2.01),
    "collage of 2 layers": (1.08, 1.12),
    "collage of 20 layers": (1.08, 1.12),
    "token map": (1.04, 1.07),
    "retouch with a mask": (1.5, 1.5),
    "SAGI": (2.2, 2.35),
    "SAGI, own prompts": (2.2, 2.35),
    "SALQ": (2.1, 2.1),
}
STRUCTURES = "sd15-small", "sdxl-small"


@pytest.fixture(scope="module")
def plain():
    """(operations, waits) of a step of each structure."""
    with torch.inference_mode():
        return [counted(name, "plain") for name in STRUCTURES]


@pytest.mark.slow
@pytest.mark.parametrize("structure", range(len(STRUCTURES)), ids=STRUCTURES)
@pytest.mark.parametrize("case", MOST)
def test_a_step_dispatches_no_more_than_this(case, structure, plain):
    found, waits = counted(STRUCTURES[structure], case)
    operations, plain_waits = plain[structure]
    assert found / operations <= MOST[case][structure]
    assert waits == plain_waits


def test_what_is_put_away_or_sent_is_nobody_elses():
    rows = torch.arange(6.0).view(2, 3)
    kept, sent = transfers.put_away(rows), transfers.send([rows], rows.half()).wait()[0]
    again = transfers.send([rows], rows).wait()[0]
    rows.zero_()
    transfers.finish(rows.device)
    assert kept.tolist() == again.tolist() == sent.tolist() == [[0, 1, 2], [3, 4, 5]] and sent.dtype == torch.float16


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_runs_anywhere(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "gpu.py", "--small", "--minutes", "5", "--out", out]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
    assert '"case": "compose 4, cache"' in out.read_text() and '"difference": 0.0' in out.read_text()
