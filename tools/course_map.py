"""Read the course map, which stands once, in nbs/index.ipynb.

Under one heading `## Course map` come parts (`### Part title`), each with a table whose first
column is a link to a notebook; the other columns say what the lesson teaches, how many minutes it
takes and what to read before.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from nbcells import NBS, load, text_of

SECTION = re.compile(r"^##[ \t]+Course map[ \t]*$(.*?)(?=^##?[ \t]|\Z)", re.MULTILINE | re.DOTALL)
PART = re.compile(r"^###[ \t]+(.+?)[ \t]*$", re.MULTILINE)
ROW = re.compile(r"^\|[ \t]*\[(.+?)\]\(([^)\s]+\.ipynb)\)[ \t]*\|(.*)\|[ \t]*$", re.MULTILINE)


class Lesson(NamedTuple):
    """One row of the map: `path` is relative to nbs/, `columns` are the other cells."""
    title: str
    path: str
    columns: list[str]


class Part(NamedTuple):
    """One part of the book, in reading order."""
    title: str
    lessons: list[Lesson]


def parse(markdown: str) -> list[Part]:
    """Return the parts of the map in a markdown text; none if it has no map."""
    section = SECTION.search(markdown)
    if not section:
        return []
    pieces = PART.split(section[1])[1:]
    return [Part(title, lessons(body)) for title, body in zip(pieces[::2], pieces[1::2])]


def lessons(body: str) -> list[Lesson]:
    """Return the rows of one part's table."""
    return [Lesson(m[1], m[2], [cell.strip() for cell in m[3].split("|")])
            for m in ROW.finditer(body)]


def read(nbs: Path = NBS) -> list[Part]:
    """Return the parts of the map in nbs/index.ipynb."""
    index = nbs / "index.ipynb"
    if not index.exists():
        return []
    cells = load(index)["cells"]
    return parse("\n\n".join(text_of(c["source"]) for c in cells if c["cell_type"] == "markdown"))
