"""What a user meets first: the import, the public names, the two commands."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptqlit

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
HEAVY = [
    "cupy",
    "matplotlib",
    "pandas",
    "onnxruntime",
    "onnx",
    "onnx_ir",
    "cv2",
    "numba",
    "pydantic",
    "torch",
    "dask",
]


def python(code: str) -> str:
    """What a fresh process prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def settings() -> configparser.SectionProxy:
    """The facts of the package."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_import_takes_less_than_a_second():
    code = "import time; start = time.perf_counter(); import ptqlit; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(2)) < 1


def test_import_loads_nothing_heavy():
    code = f"import sys, ptqlit; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == "[]"


def test_a_conversion_loads_neither_pictures_nor_the_gpu():
    code = "import sys, ptqlit; ptqlit.convert; print([n for n in ('cupy', 'matplotlib', 'pandas', 'torch', 'dask') if n in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("name", ["convert", "apply", "Config", "Plan", "Backend", "InputError"])
def test_public_names(name):
    assert name in ptqlit.__all__ and name in dir(ptqlit)
    assert getattr(ptqlit, name).__name__ == name and getattr(ptqlit, name).__doc__


def test_there_are_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        ptqlit.convrt
    assert set(ptqlit.__all__) == {
        "__version__",
        "convert",
        "apply",
        "Config",
        "Plan",
        "Backend",
        "InputError",
    }


def test_version_agrees():
    assert ptqlit.__version__ == settings()["version"]
    shown = subprocess.run(
        [SCRIPTS / "ptqlit", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == f"ptqlit {ptqlit.__version__}"


@pytest.mark.parametrize(
    "command, words",
    [
        (["ptqlit", "--help"], ["convert", "apply", "nodes"]),
        (
            ["ptqlit", "convert", "--help"],
            ["--fmk", "--modelFile", "--outputFile", "--configFile", "--plan"],
        ),
        (["ptqlit", "apply", "--help"], ["PLAN", "--modelFile", "--outputFile"]),
        (["converter_lite", "--help"], ["--fmk", "--modelFile", "--outputFile", "--configFile"]),
        (["ptqlit", "nodes", "data/digits/model.onnx"], ["Conv", "part of"]),
    ],
)
def test_commands(command, words):
    done = subprocess.run(
        [SCRIPTS / command[0], *command[1:]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert [word for word in words if word not in plain] == []


def test_both_commands_are_declared():
    assert settings()["console_scripts"].split() == [
        "ptqlit=ptqlit.cli:main",
        "converter_lite=ptqlit.cli:converter_lite",
    ]


def test_nothing_is_unpickled():
    sources = {path: path.read_text() for path in ROOT.glob("ptqlit/**/*.py")}
    assert len(sources) > 20
    assert [
        str(p)
        for p, text in sources.items()
        if re.search(r"pickle(?!=False)|\beval\(|\bexec\(|\byaml\.load|joblib|shelve|marshal", text)
    ] == []
    loads = [
        line.strip()
        for text in sources.values()
        for line in text.splitlines()
        if "np.load(" in line
    ]
    assert loads and all("allow_pickle=False" in line for line in loads)
