"""`python scripts/gpu_real STEP`: see the package's own docstring."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from gpu_real.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
