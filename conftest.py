"""Strict nbval on cleaned notebooks: stored outputs are the expected values of the suite.

nbdev_clean removes execution counts, which nbval takes for "never run", and nbval does not know
nbdev's directives. The hooks below reconcile them: each cell counts as run, `#| eval: false` and
the flags of settings.ini (`tst_flags`, less the words of env NB_FLAGS) skip a cell, and
`#| volatile` runs one without comparing its output.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from nbcells import directives, is_skipped, kernel_environment, skip_flags  # noqa: E402

CELL_TIMEOUT = 300


def pytest_configure(config):
    """Use this Python as kernel, the repository's sanitize file and a shorter timeout."""
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    kernel_environment(ROOT)
    option.nbval_current_env = True
    option.nbval_sanitize_with = option.nbval_sanitize_with or str(
        ROOT / "tests" / "nbval_sanitize.cfg")
    if option.nbval_cell_timeout == 2000:
        option.nbval_cell_timeout = CELL_TIMEOUT


def pytest_collection_modifyitems(items):
    """Apply directives to notebook cells and let cleaned cells count as run."""
    flags = skip_flags(ROOT)
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or "source" not in cell:
            continue
        if is_skipped(cell.source, flags):
            item.options["skip"] = True
        if "volatile" in directives(cell.source):
            item.options["check"] = False
        if cell.get("execution_count") is None:
            cell.execution_count = 1
