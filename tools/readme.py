"""Make README.md and its pictures in docs/img/ from nbs/index.ipynb.

Cells marked `#| hide` are left out, `#| echo: false` hides the code and keeps the output. Pictures
are named after the cell's id, so they keep their names when other cells come or go.
"""
from __future__ import annotations

import base64
import sys
from pathlib import Path

from links import moved, rewrite
from nbcells import ROOT, directives, load, text_of, visible_code

HEAD = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"


def fence(language: str, text: str) -> str:
    """Wrap a text in a code fence."""
    return f"```{language}\n{text.rstrip()}\n```"


def shown(markdown: str) -> str:
    """Translate the links of a text that moves from nbs/ to the root."""
    return rewrite(markdown.strip("\n"), lambda target: moved(target, "nbs", ""))


def render_output(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    """Return one output as markdown and collect its picture under the given name."""
    if output["output_type"] == "stream":
        return fence("text", text_of(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        pictures[f"{name}.png"] = base64.b64decode(text_of(data["image/png"]))
        return f"![{name}](docs/img/{name}.png)"
    if "text/markdown" in data:
        return shown(text_of(data["text/markdown"]))
    return fence("text", text_of(data["text/plain"])) if "text/plain" in data else ""


def render_code(cell: dict, pictures: dict[str, bytes]) -> list[str]:
    """Return a code cell and its outputs as markdown blocks."""
    source = text_of(cell["source"])
    found, code = directives(source), visible_code(source)
    if "hide" in found or "default_exp" in found:
        return []
    blocks = []
    if code and found.get("echo", "").lower() != "false":
        blocks.append(fence("python", code))
    for number, output in enumerate(cell["outputs"]):
        blocks.append(render_output(output, f"{cell['id']}-{number}", pictures))
    return blocks


def render(nb: dict) -> tuple[str, dict[str, bytes]]:
    """Return the README's text and its pictures by file name."""
    blocks, pictures = [HEAD], {}
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            blocks.append(shown(text_of(cell["source"])))
        elif cell["cell_type"] == "code":
            blocks += render_code(cell, pictures)
    return "\n\n".join(b for b in blocks if b) + "\n", pictures


def write(path: Path, data: bytes) -> None:
    """Write a file if its bytes change."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def main(root: Path = ROOT) -> int:
    """Write README.md and docs/img/, and remove pictures that nothing shows any more."""
    index = root / "nbs" / "index.ipynb"
    if not index.exists():
        print("readme.py: there is no nbs/index.ipynb", file=sys.stderr)
        return 1
    text, pictures = render(load(index))
    write(root / "README.md", text.encode("utf-8"))
    folder = root / "docs" / "img"
    for name, data in pictures.items():
        write(folder / name, data)
    for old in folder.glob("*.png"):
        if old.name not in pictures:
            old.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
