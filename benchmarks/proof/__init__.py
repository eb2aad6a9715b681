"""Does the policy get better? See `python -m benchmarks.proof --help`; it uses modules of scripts/quickstart."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "quickstart"))
