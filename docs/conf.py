"""Sphinx settings of the site; docs/build.py stages the pages that it reads."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "tools")]

from nbcells import settings  # noqa: E402

CFG = settings()
project = CFG["title"]
author = copyright = CFG["author"]
version = release = CFG["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["jupyter_execute"]
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]  # CUDA in strings

nb_execution_mode = "off"  # stored outputs are shown, the tests have checked them
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = CFG["title"]
html_theme_options = {"repository_url": CFG["git_url"], "use_repository_button": True,
                      "show_navbar_depth": 1}
