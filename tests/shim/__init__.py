"""Run CUDA source on a CPU: compile it with g++ behind shim.h and call the kernels through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

HEADER = Path(__file__).with_name("shim.h")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+(?:__launch_bounds__\([^)]*\)\s+)?void\s+(\w+)')
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC")
STUB = (
    'extern "C" int launch_{0}(unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z,'
    " void** p) {{ return shim::launch({0}, dim3(a, b, c), dim3(x, y, z), p); }}\n"
)


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


class CpuModule:
    """Like `cupy.RawModule`: kernels by name, each called as kernel(grid, block, arguments)."""

    lock = threading.Lock()  # the shim's globals serve one launch at a time

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        names = KERNEL.findall(code)
        source = HEADER.read_text() + code + "".join(STUB.format(name) for name in names)
        self.library = ctypes.CDLL(str(build(source, options)))

    def get_function(self, name: str):
        """A callable kernel."""
        entry = getattr(self.library, f"launch_{name}")

        def kernel(grid: tuple, block: tuple, arguments: tuple) -> None:
            sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
            values = [as_c(value) for value in arguments]
            pointers = [ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values]
            with CpuModule.lock:
                status = entry(*sizes, (ctypes.c_void_p * len(pointers))(*pointers))
            if status:
                raise RuntimeError(f"{name}: some threads of a block wait where others never come")

        return kernel


def as_c(value) -> ctypes._SimpleCData:
    """An argument as the kernel sees it: an address for an array, a number for a NumPy scalar."""
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise TypeError("a kernel takes contiguous arrays only")
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, np.generic):
        return np.ctypeslib.as_ctypes_type(value.dtype)(value.item())
    raise TypeError(f"a kernel takes arrays and NumPy scalars, not {type(value).__name__}")


def build(source: str, options: tuple[str, ...]) -> Path:
    """Compile once; the file's name is a hash of all that went in."""
    digest = hashlib.sha256("\n".join([source, *FLAGS, *options]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"ptqlit_shim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        beside = folder / f".{digest}.{os.getpid()}.so"
        command = ["g++", *FLAGS, *options, "-x", "c++", "-", "-o", str(beside)]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True)
        os.replace(beside, library)
    return library
