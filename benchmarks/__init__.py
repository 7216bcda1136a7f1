"""The benchmarks. They use helpers of the examples: the package ``pipeline``."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))  # before what is installed
