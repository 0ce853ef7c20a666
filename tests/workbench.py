"""dev.py, which lies outside of every package, as a module."""
import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("montage_dev", Path(__file__).resolve().parent.parent / "dev.py")
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)
