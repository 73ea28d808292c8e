"""Make, print, rebuild and run notebooks without a graphical editor.

    python tools/nb.py new nbs/folder/00_name.ipynb "Title" "Promise." folder.name
    python tools/nb.py text nbs/folder/00_name.ipynb > name.txt
    python tools/nb.py put nbs/folder/00_name.ipynb < name.txt
    python tools/nb.py run nbs/folder/00_name.ipynb ...

In the text form each cell starts with `# %% [code] id=xxxxxxxx` or `# %% [markdown] id=...`, its
source follows verbatim. `put` keeps a cell with a known id (and its outputs, if the source is the
same), makes a new cell where no id stands, deletes cells that are absent, and takes the order of
the text. A source line that looks like such a header is written with a backslash before it.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbcells import (KERNELSPEC, ROOT, directives, is_skipped, kernel_environment, notebooks,
                     settings, skip_flags)

HEADER = re.compile(r"^# %% \[(code|markdown|raw)\](?: id=([\w-]+))?[ \t]*$", re.MULTILINE)
ADDRESS = re.compile(r"(<.*?) at 0x[0-9a-fA-F]+(>)")
TIMEOUT = 600


# ---------------------------------------------------------------- files

def read(path: Path):
    """Read a notebook; one that does not exist yet is an empty one."""
    if path.exists():
        return nbformat.read(path, as_version=4)
    nb = new_notebook(metadata={"kernelspec": dict(KERNELSPEC)})
    nb.nbformat_minor = 5
    return nb


def write(path: Path, nb) -> bool:
    """Write a notebook if its bytes differ from those in the file; tell whether they did."""
    data = (nbformat.writes(nb).rstrip("\n") + "\n").encode("utf-8")
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return True


def new_id(path: Path, position: int, source: str, taken: set[str]) -> str:
    """Make an 8-digit cell id from path, position and source: the same input, the same id."""
    full = path.resolve()
    name = full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else full.name
    for turn in range(10_000):
        seed = f"{name}\n{position}\n{turn}\n{source}".encode("utf-8")
        cell_id = hashlib.sha256(seed).hexdigest()[:8]
        if cell_id not in taken:
            taken.add(cell_id)
            return cell_id
    raise RuntimeError("no free cell id found")


# ---------------------------------------------------------------- text form

def to_text(nb) -> str:
    """Print a notebook as text."""
    parts = []
    for cell in nb.cells:
        source = re.sub(r"(?m)^(\\*# %% \[)", r"\\\1", cell.source)
        parts.append(f"# %% [{cell.cell_type}] id={cell.id}\n{source}\n")
    return "\n".join(parts)


def split_text(text: str) -> list[tuple[str, str | None, str]]:
    """Split the text form into (type, id or None, source) per cell."""
    text = text.replace("\r\n", "\n")
    heads = list(HEADER.finditer(text))
    if text[:heads[0].start() if heads else None].strip():
        raise SystemExit("nb.py: the text must start with a cell header such as '# %% [code]'")
    ends = [h.start() for h in heads[1:]] + [len(text)]
    cells = []
    for head, end in zip(heads, ends):
        source = text[head.end():end].strip("\n")
        cells.append((head[1], head[2], re.sub(r"(?m)^\\(\\*# %% \[)", r"\1", source)))
    return cells


def check_ids(path: Path, wanted: list[str], known: dict) -> None:
    """Stop if the text names a cell twice or one that the notebook does not hold."""
    for cell_id in wanted:
        if wanted.count(cell_id) > 1:
            raise SystemExit(f"nb.py: id={cell_id} stands twice in the text")
        if cell_id not in known:
            raise SystemExit(f"nb.py: {path} has no cell with id={cell_id}; "
                             "leave the id out to make a new cell")


def make_cell(kind: str, source: str, cell_id: str):
    """Make a fresh cell without outputs."""
    makers = {"code": new_code_cell, "markdown": new_markdown_cell,
              "raw": nbformat.v4.new_raw_cell}
    cell = makers[kind](source)
    cell.id = cell_id
    return cell


def update_cell(old, kind: str, source: str):
    """Return the cell with its new source; outputs stay only if the source is unchanged."""
    if old.cell_type != kind:
        return make_cell(kind, source, old.id)
    if old.source.strip("\n") == source:
        return old
    old.source = source
    if kind == "code":
        old.outputs, old.execution_count = [], None
    return old


def from_text(path: Path, text: str):
    """Rebuild the notebook at `path` from its text form."""
    nb = read(path)
    known = {cell.id: cell for cell in nb.cells}
    parsed = split_text(text)
    check_ids(path, [cell_id for _, cell_id, _ in parsed if cell_id], known)
    taken, cells = set(known), []
    for position, (kind, cell_id, source) in enumerate(parsed):
        if cell_id:
            cells.append(update_cell(known[cell_id], kind, source))
        else:
            cells.append(make_cell(kind, source, new_id(path, position, source, taken)))
    nb.cells = cells
    return nb


# ---------------------------------------------------------------- running

def image_array(data: str):
    """Decode a base64 PNG to an array."""
    import matplotlib.image
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")


def same_picture(old: str, new: str) -> bool:
    """Tell whether two base64 PNGs show the same; their bytes may differ."""
    a, b = image_array(old), image_array(new)
    return a.shape == b.shape and float(abs(a - b).max()) < 0.02


def keep_pictures(old_outputs: list, new_outputs: list) -> None:
    """Put the stored bytes back for each figure whose pixels did not change."""
    for old, new in zip(old_outputs, new_outputs):
        before = old.get("data", {}).get("image/png")
        after = new.get("data", {}).get("image/png")
        if before and after and before != after and same_picture(before, after):
            new["data"]["image/png"] = before


def clean_output(output) -> None:
    """Remove from an output what differs from run to run."""
    if "execution_count" in output:
        output["execution_count"] = None
    output.pop("transient", None)
    if "text" in output:
        output["text"] = ADDRESS.sub(r"\1\2", output["text"])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text") and isinstance(value, str):
            output["data"][kind] = ADDRESS.sub(r"\1\2", value)
        elif kind.startswith("image") and "svg" not in kind:
            output["data"][kind] = value.rstrip()


def clean(nb) -> None:
    """Clean a notebook as nbdev_clean does, so that running it twice leaves no difference."""
    allowed = settings()["allowed_cell_metadata_keys"].split()
    nb.metadata = {"kernelspec": dict(KERNELSPEC)}
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in allowed}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                clean_output(output)


def client(nb, folder: Path):
    """Make a notebook client that leaves skipped cells and their stored outputs alone."""
    from nbclient import NotebookClient
    flags = skip_flags()

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            if cell.cell_type == "code" and is_skipped(cell.source, flags):
                return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    return Client(nb, kernel_name="python3", timeout=TIMEOUT, record_timing=False,
                  store_widget_state=False, coalesce_streams=True,
                  extra_arguments=["--log-level=40"],
                  resources={"metadata": {"path": str(folder)}})


def execute(path: Path):
    """Run a notebook in a fresh kernel in its own folder and return it cleaned."""
    nb, old = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    client(nb, path.parent).execute()
    clean(nb)
    for before, after in zip(old.cells, nb.cells):
        if after.cell_type != "code":
            continue
        if "volatile" in directives(after.source) and before.outputs:
            after.outputs = before.outputs
        keep_pictures(before.outputs, after.outputs)
    clean(nb)
    return nb


def run(paths: list[Path]) -> int:
    """Run notebooks (all, if none is named) and save the changed ones; return 1 on a failure."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    kernel_environment()
    failed = 0
    for path in paths or [Path(os.path.relpath(p)) for p in notebooks()]:
        try:
            changed = write(path, execute(path))
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:
            print(f"{path}: FAILED, not saved\n{error}", file=sys.stderr, flush=True)
            failed = 1
        else:
            print(f"{path}: {'saved' if changed else 'unchanged'}", flush=True)
    return failed


# ---------------------------------------------------------------- command line

def new(path: Path, title: str, promise: str, module: str) -> None:
    """Start a lesson: title and promise, then the module it exports to."""
    if path.exists():
        raise SystemExit(f"nb.py: {path} exists already")
    text = f"# %% [markdown]\n# {title}\n\n> {promise}\n\n# %% [code]\n#| default_exp {module}\n"
    write(path, from_text(path, text))


def read_existing(path: Path):
    """Read a notebook that must exist."""
    if not path.exists():
        raise SystemExit(f"nb.py: no such notebook: {path}")
    return read(path)


def put(path: Path, text: str) -> bool:
    """Rebuild the notebook from its text; tell whether the file changed."""
    return write(path, from_text(path, text))


def parse(argv: list[str] | None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("new", help="start a notebook")
    for name in ("path", "title", "promise", "module"):
        add.add_argument(name, type=Path if name == "path" else str)
    verbs.add_parser("text", help="print as text").add_argument("path", type=Path)
    verbs.add_parser("put", help="rebuild from text on stdin").add_argument("path", type=Path)
    verbs.add_parser("run", help="run and save").add_argument("paths", type=Path, nargs="*")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    args = parse(argv)
    if args.verb == "new":
        new(args.path, args.title, args.promise, args.module)
    elif args.verb == "text":
        sys.stdout.buffer.write(to_text(read_existing(args.path)).encode("utf-8"))
    elif args.verb == "put":
        text = sys.stdin.buffer.read().decode("utf-8")
        print(f"{args.path}: {'saved' if put(args.path, text) else 'unchanged'}")
    else:
        return run(args.paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
