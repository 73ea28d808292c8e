"""Package definition: every fact comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_settings():
    """Return the one section of settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def long_description():
    """Return the README, or nothing before the first one was made."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CFG = read_settings()
LIB = CFG["lib_name"]
EXTRAS = ("dev", "docs", "gpu", "cluster")

setup(
    name=LIB,
    version=CFG["version"],
    description=CFG["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=CFG["author"],
    author_email=CFG["author_email"],
    url=CFG["git_url"],
    license="Apache-2.0",
    python_requires=f">={CFG['min_python']}",
    install_requires=CFG["requirements"].split(),
    extras_require={name: CFG[f"{name}_requirements"].split() for name in EXTRAS},
    packages=find_packages(include=[LIB, f"{LIB}.*"]),
    package_data={LIB: ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    entry_points={
        "console_scripts": CFG["console_scripts"].split(),
        "nbdev": [f"{LIB}={LIB}._modidx:d"],
    },
)
