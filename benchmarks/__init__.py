"""Measurements of RESULTS.md; some use modules of scripts/quickstart."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "quickstart"))
