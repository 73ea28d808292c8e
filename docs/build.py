"""Build the site: stage notebooks and API pages in _proc/, then run Sphinx into _docs/.

Sphinx knows no nbdev directive, so the staged notebooks are what a reader shall see: hidden cells
are gone, directives are taken out, links that leave nbs/ point to the repository's web page. The
contents of the site are the course map of nbs/index.ipynb.
"""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from posixpath import join, normpath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import course_map  # noqa: E402
import import_rules  # noqa: E402
from links import is_relative, rewrite, split_fragment  # noqa: E402
from nbcells import (NBS, directives, load, notebooks, settings,  # noqa: E402
                     text_of, visible_code)

PROC, OUT = ROOT / "_proc", ROOT / "_docs"
CFG = settings()
TOCTREE = "```{{toctree}}\n:caption: {caption}\n:hidden:\n:maxdepth: 1\n\n{pages}\n```"
API_PAGE = """{title}
{line}

.. automodule:: {title}
   :members:
   :undoc-members:
   :show-inheritance:
"""
API_INDEX = """Modules
=======

.. toctree::
   :maxdepth: 1

{pages}
"""


# ---------------------------------------------------------------- notebooks

def site_link(target: str, folder: str) -> str:
    """Return a link of a page in nbs/<folder> as the site needs it."""
    if not is_relative(target):
        return target
    name, fragment = split_fragment(target)
    path = normpath(join("nbs", folder, name))
    if path.startswith("nbs/"):
        return target
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    url = f"{CFG['git_url']}/{kind}/{CFG['branch']}/{path}"
    return f"{url}#{fragment}" if fragment else url


def clean_markdown(text: str) -> str:
    """Take out of a shown markdown result what Sphinx cannot read."""
    return re.sub(r"\{target=[^}]*\}", "", re.sub(r"\A\s*---\n", "", text))


def stage_code(cell: dict) -> dict | None:
    """Return a code cell as a reader sees it, or None if it is hidden."""
    source = text_of(cell["source"])
    found, code = directives(source), visible_code(source)
    if "hide" in found or "default_exp" in found or not (code or cell["outputs"]):
        return None
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = clean_markdown(text_of(data["text/markdown"]))
    tags = ["remove-input"] if found.get("echo", "").lower() == "false" else []
    return {**cell, "source": code, "metadata": {"tags": tags}}


def stage_cell(cell: dict, folder: str) -> dict | None:
    """Return a cell as the site shows it, or None."""
    if cell["cell_type"] == "code":
        return stage_code(cell)
    if cell["cell_type"] == "markdown":
        text = rewrite(text_of(cell["source"]), lambda target: site_link(target, folder))
        return {**cell, "source": text}
    return None


def stage_notebook(path: Path, extra: str = "") -> None:
    """Write the staged form of a notebook, with an extra markdown cell at its end."""
    nb, place = load(path), path.relative_to(NBS)
    cells = [stage_cell(cell, place.parent.as_posix()) for cell in nb["cells"]]
    nb["cells"] = [cell for cell in cells if cell]
    if extra:
        nb["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {},
                            "source": extra})
    goal = PROC / place
    goal.parent.mkdir(parents=True, exist_ok=True)
    goal.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


def contents() -> str:
    """Return the site's contents: one list per part of the course map, and the modules."""
    lists = [TOCTREE.format(caption=part.title, pages="\n".join(
        lesson.path.removesuffix(".ipynb") for lesson in part.lessons))
        for part in course_map.read()]
    return "\n\n".join(lists + [TOCTREE.format(caption="Reference", pages="api/index")])


def stage_notebooks() -> None:
    """Stage all notebooks and the pictures that stand beside them."""
    for path in notebooks():
        stage_notebook(path, contents() if path == NBS / "index.ipynb" else "")
    for path in sorted(NBS.rglob("*")):
        if path.suffix in (".png", ".svg", ".jpg", ".gif"):
            goal = PROC / path.relative_to(NBS)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, goal)


# ---------------------------------------------------------------- modules

def stage_modules() -> None:
    """Write one API page per module, and their index."""
    known = import_rules.modules(ROOT)
    names = [name for name, path in known.items() if path.name != "__init__.py"]
    folder = PROC / "api"
    folder.mkdir(parents=True)
    for name in names:
        page = API_PAGE.format(title=name, line="=" * len(name))
        (folder / f"{name}.rst").write_text(page, encoding="utf-8")
    pages = "\n".join(f"   {name}" for name in names)
    (folder / "index.rst").write_text(API_INDEX.format(pages=pages), encoding="utf-8")


def main() -> int:
    """Stage and build; warnings are errors."""
    if not course_map.read():
        print("build.py: nbs/index.ipynb has no course map to make the contents from",
              file=sys.stderr)
        return 1
    for folder in (PROC, OUT):
        shutil.rmtree(folder, ignore_errors=True)
    stage_notebooks()
    stage_modules()
    code = subprocess.call([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going",
                            "-c", str(ROOT / "docs"), "-b", "html", str(PROC), str(OUT)])
    if code == 0:
        print(f"The site is in {OUT.name}/index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
