"""Post-training quantization of ONNX models, written as a book of notebooks."""

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

_PUBLIC = {
    "convert": "pipeline",
    "apply": "pipeline",
    "Config": "config.file",
    "Plan": "model.plan",
    "Backend": "backends.rules",
    "InputError": "errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    "Import a public name when it is first used, so that `import ptqlit` stays light."
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ptqlit' has no attribute '{name}'")
    return getattr(import_module(f"ptqlit.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
