"""What the other tools know about notebook cells: reading files, directives, skipping."""
from __future__ import annotations

import json
import os
import re
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", re.MULTILINE)
NBVAL_LINE = re.compile(r"^\s*#\s*NBVAL_\w+\s*$", re.MULTILINE)
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}


def settings(root: Path = ROOT):
    """Return the one section of settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(folder: Path = NBS) -> list[Path]:
    """List the notebooks below a folder by path; names starting with `_` or `.` are not ours."""
    found = sorted(folder.rglob("*.ipynb"))
    return [p for p in found if not any(s[0] in "_." for s in p.relative_to(folder).parts)]


def load(path: Path) -> dict:
    """Read a notebook as plain JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(value: str | list[str]) -> str:
    """Join a multi-line notebook field, which may be stored as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> dict[str, str]:
    """Map each `#| word: value` line of a cell to its value."""
    return {m[1]: m[2] for m in DIRECTIVE.finditer(source)}


def visible_code(source: str) -> str:
    """Return a code cell's source without directive and NBVAL lines, as a reader sees it."""
    return NBVAL_LINE.sub("", DIRECTIVE.sub("", source)).strip("\n")


def skip_flags(root: Path = ROOT) -> set[str]:
    """Return the flags of settings.ini whose cells are skipped, less those in env NB_FLAGS."""
    return set(settings(root)["tst_flags"].split()) - set(os.environ.get("NB_FLAGS", "").split())


def is_skipped(source: str, flags: set[str]) -> bool:
    """Tell whether a test run leaves this code cell out."""
    found = directives(source)
    skipped = bool(flags & found.keys()) or found.get("eval", "").lower() == "false"
    return skipped or "NBVAL_SKIP" in source


def kernel_environment(root: Path = ROOT) -> None:
    """Set what kernels shall find: this checkout's modules, one thread, no files in the tree."""
    os.environ["OMP_NUM_THREADS"] = "1"  # sums have one order
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY",
                          str(Path(tempfile.gettempdir()) / "ptqlit-hypothesis"))
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
