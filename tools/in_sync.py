"""Tell whether generated files are as git's index has them; list those that are not."""
from __future__ import annotations

import subprocess
import sys

from nbcells import ROOT

PLACES = ["nbs", "ptqlit", "README.md", "docs/img"]
ADVICE = """
These files differ from what is staged or committed, after export, clean and readme:
{files}
Look at them with `git diff`, then `git add` them (or undo the change that made them).
In ptqlit/ edit the notebook instead of the module."""


def git(*words: str) -> list[str]:
    """Run git in the repository and return the lines it prints."""
    result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def differences() -> list[str]:
    """List changed, deleted and unknown files among the generated ones."""
    changed = [line.replace("\t", "  ") for line in git("diff", "--name-status", "--", *PLACES)]
    unknown = git("ls-files", "--others", "--exclude-standard", "--", *PLACES)
    return changed + [f"?  {name}" for name in unknown]


def main() -> int:
    """Print the differences; return 1 if there are any."""
    if not (ROOT / ".git").exists():
        print("in_sync.py: not a git checkout, nothing to compare with")
        return 0
    found = differences()
    if found:
        print(ADVICE.format(files="\n".join(f"    {line}" for line in found)), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
