"""Measures everything on a GPU: evidence/benchmarks/gpu.py on a bare machine, which needs a ComfyUI named by
COMFYUI_PATH (or around this pack, or made once by dev.py) and its Python.

    python tests/benchmarks/gpu.py [--small] [--minutes 7.5] [--out figures.json]
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dev  # noqa: E402

if __name__ == "__main__":
    env = dev.environment()
    command = [env.python, ROOT / "workshop" / "bootstrap.py", "montage.evidence.benchmarks.gpu", *sys.argv[1:]]
    sys.exit(subprocess.call([str(part) for part in command], env={**dev.child_variables(env), **os.environ}))
