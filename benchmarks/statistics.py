"""False positive rates and power of the old and the new rule for bold cells, side by side: see `error_rates`.

python benchmarks/statistics.py
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):
    # Every benchmark that runs as a script has this folder first on its path. There, this file would hide Python's
    # module `statistics`, and analysis.py our package `analysis`.
    sys.path[0] = str(Path(__file__).parents[1])
if __name__ == "statistics":
    del sys.modules[__name__]
    importlib.import_module(__name__)
if __name__ == "__main__":
    importlib.import_module("benchmarks.error_rates").main()
