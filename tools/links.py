"""Find and rewrite the link targets of markdown text, outside code and formulas."""
from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator

CODE = re.compile(r"```.*?```|~~~.*?~~~|``.*?``|`[^`\n]*`|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$",
                  re.DOTALL)
INLINE = re.compile(r'(\]\()([^)\s]+)((?:\s+"[^"]*")?\))')
TAG = re.compile(r'((?:src|href)=")([^"]+)(")')
DEFINITION = re.compile(r"(^ {0,3}\[[^\]^]+\]:[ \t]+)(\S+)()", re.MULTILINE)
EXTERNAL = re.compile(r"^[a-zA-Z][a-zA-Z+.-]*:|^//")


def rewrite(markdown: str, change: Callable[[str], str]) -> str:
    """Return the text with every link target replaced by `change(target)`."""
    def one(match):
        return match[1] + change(match[2]) + match[3]

    def plain(text):
        for pattern in (INLINE, TAG, DEFINITION):
            text = pattern.sub(one, text)
        return text

    parts, position = [], 0
    for code in CODE.finditer(markdown):
        parts += [plain(markdown[position:code.start()]), code[0]]
        position = code.end()
    return "".join(parts) + plain(markdown[position:])


def targets(markdown: str) -> Iterator[str]:
    """List the link targets of a text in reading order."""
    found: list[str] = []
    rewrite(markdown, lambda target: found.append(target) or target)
    return iter(found)


def is_relative(target: str) -> bool:
    """Tell whether a target names a file of the repository."""
    return not EXTERNAL.match(target) and not target.startswith(("#", "/"))


def split_fragment(target: str) -> tuple[str, str]:
    """Split `file#section` into its two parts."""
    name, _, fragment = target.partition("#")
    return name, fragment


def moved(target: str, old_folder: str, new_folder: str) -> str:
    """Translate a relative target for a text that moves from one folder to another."""
    if not is_relative(target):
        return target
    name, fragment = split_fragment(target)
    path = posixpath.relpath(posixpath.join(old_folder, name) or ".", new_folder or ".")
    path += "/" if name.endswith("/") else ""
    return f"{path}#{fragment}" if fragment else path


def slugs(markdown: str) -> set[str]:
    """Return the anchors that the headings of a text get on a code host and on the site."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    titles = re.findall(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}
