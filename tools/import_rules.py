"""The rooms of the library and who may import whom: imports run one way, without circles.

Every room may import itself. A room is a folder of ptqlit/ or a module at its top. Whoever needs
something from a later room has put it in the wrong room.
"""
from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nbcells import ROOT, settings

LIB = "ptqlit"
MODEL_SIDE = "errors arithmetic model samples statistics calibrators backends storage"
ROOMS = f"config {MODEL_SIDE} reports quantizers"
MAY_IMPORT = {
    "errors": "",
    "arithmetic": "errors",
    "config": "errors",
    "model": "errors arithmetic",
    "samples": "errors config model",
    "statistics": "errors arithmetic model samples",
    "calibrators": "errors arithmetic statistics",
    "backends": "errors arithmetic model",
    "storage": "errors arithmetic model",
    "reports": MODEL_SIDE,
    "quantizers": f"config {MODEL_SIDE} reports",
    "pipeline": ROOMS,
    "tune": f"{ROOMS} pipeline",
    "cli": f"{ROOMS} pipeline tune",
}
IMPORT_NAMES = {"opencv-python-headless": "cv2", "cupy-cuda12x": "cupy", "protobuf": "google"}


class Import(NamedTuple):
    """One imported module: where the statement stands and what it names."""
    file: Path
    line: int
    module: str


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file of the library."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    """Map the names of the library's modules to their files; nbdev's index is none of them."""
    files = sorted((root / LIB).rglob("*.py"))
    return {module_name(p, root): p for p in files if p.name != "_modidx.py"}


def absolute(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    """Return the absolute name of the module that a `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    base = parts[:len(parts) - node.level + is_package]
    return ".".join(base + ([node.module] if node.module else []))


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """List every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name, path.name == "__init__.py")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                module = full if full in known or alias.name == "__version__" else base
                yield Import(path, node.lineno, module)


def room(module: str) -> str:
    """Return the room of a module of the library; the package itself is the room `ptqlit`."""
    return (module.split(".") + [LIB])[1] if "." in module else LIB


def importable() -> set[str]:
    """Return the names of third-party packages that settings.ini lists for users."""
    cfg = settings()
    words = " ".join(cfg[key] for key in
                     ("requirements", "gpu_requirements", "cluster_requirements")).split()
    names = (re.match(r"[\w.-]+", word)[0] for word in words)
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def room_problem(here: str, there: str) -> str | None:
    """Say why a room may not import another one, or None if it may."""
    if here not in MAY_IMPORT:
        return f"'{here}' is no room: add it to MAY_IMPORT in tools/import_rules.py"
    allowed = MAY_IMPORT[here].split()
    if there in (here, "__version__") or there in allowed:
        return None
    return f"{here} imports {there}; it may import: {' '.join(allowed) or 'nothing'}"


def problem(item: Import, here: str, third_party: set[str]) -> str | None:
    """Say what is wrong with one import, or None."""
    top = item.module.split(".")[0]
    if top == LIB:
        return None if here == LIB else room_problem(here, room(item.module))
    if top in third_party or top in sys.stdlib_module_names:
        return None
    return f"{here} imports {top}, which is not among the requirements in settings.ini"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of imports in a message, or no message."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["imports run in a circle: " + " <- ".join(error.args[1])]
    return []


def check(root: Path = ROOT) -> list[str]:
    """List the imports of the library that break a rule."""
    known, third_party, found = modules(root), importable(), []
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        items = list(imports(name, path, known))
        if name != LIB:
            graph[name] = {i.module for i in items if i.module in known} - {name, LIB}
        for item in items:
            text = problem(item, room(name), third_party)
            if text:
                found.append(f"{path.relative_to(root).as_posix()}:{item.line}: {text}")
    return sorted(set(found)) + circle(graph)
