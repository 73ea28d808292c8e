"""The GPU's path on a machine without one: CuPy's place is taken by NumPy and the g++ stand-in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import shim

from ptqlit import Config, convert
from ptqlit.errors import InputError
from ptqlit.pipeline import Flags
from ptqlit.statistics.gpu import SOURCE_CU, counter, gpu
from ptqlit.statistics.histogram import Counts, count_numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench_gpu  # noqa: E402

DIGITS = ROOT / "data" / "digits"
needs_compiler = pytest.mark.skipif(not shim.available(), reason="no g++")


class FakeArray(np.ndarray):
    """An array that tells its address as CuPy's do, and that NumPy's functions do not get for free."""

    @property
    def data(self):
        """CuPy's pointer object."""
        return types.SimpleNamespace(ptr=self.ctypes.data)


def make(function):
    """One of NumPy's functions, giving a FakeArray."""
    return lambda *args, **named: np.asarray(function(*args, **named)).view(FakeArray)


class Event:
    """A moment."""

    def record(self):
        """Now."""
        self.moment = time.perf_counter()

    def synchronize(self):
        """Nothing to wait for."""


def fake_cupy(device) -> types.ModuleType:
    """As much of CuPy as we use; `device` is what asking for the GPU does."""
    cupy = types.ModuleType("cupy")
    for name in ("asarray", "zeros", "full", "empty_like"):
        setattr(cupy, name, make(getattr(np, name)))
    cupy.ndarray, cupy.copyto, cupy.asnumpy = FakeArray, np.copyto, np.asarray
    cupy.RawModule = lambda code, options: shim.CpuModule(code)
    elapsed = lambda a, b: max(1e-3, 1000 * (b.moment - a.moment))  # noqa: E731
    cupy.cuda = types.SimpleNamespace(Device=device, Event=Event, get_elapsed_time=elapsed)
    return cupy


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with a GPU of one multiprocessor."""
    attributes = types.SimpleNamespace(attributes={"MultiProcessorCount": 1})
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: attributes))


@pytest.fixture
def without_driver(monkeypatch):
    """A machine with CuPy, and without a driver."""

    def device():
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(device))


@pytest.fixture
def without_cupy(monkeypatch):
    """A machine without CuPy."""
    monkeypatch.setitem(sys.modules, "cupy", None)


# ---------------------------------------------------------------- who counts


def test_without_cupy_the_error_says_how_to_get_it(without_cupy):
    with pytest.raises(InputError, match=r"install ptqlit\[gpu\]"):
        counter("gpu")
    assert counter("auto") is None


def test_without_a_gpu_the_error_says_so(without_driver):
    with pytest.raises(InputError, match="no GPU that CuPy can use: cudaErrorInsufficientDriver"):
        counter("gpu")
    assert counter("auto") is None


@needs_compiler
@pytest.mark.parametrize("word", ["gpu", "auto"])
def test_with_a_gpu_it_counts(word, with_gpu):
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    assert bench_gpu.same_counts(counter(word)([x])[0], count_numpy(x))
    assert gpu().name == "gpu"


@needs_compiler
def test_arrays_of_the_device_are_not_copied(with_gpu):
    device = gpu()
    x = device.arrays.asarray(np.arange(5, dtype=np.float32))
    assert device.address(device.take(x)) == x.ctypes.data
    host = np.arange(5, dtype=np.float64)
    assert isinstance(device.take(host), FakeArray) and device.take(host).dtype == np.float32


@needs_compiler
def test_conversion_with_the_gpu_gives_the_same_bytes(with_gpu, tmp_path):
    text = (DIGITS / "full_quant.cfg").read_text().replace("size=100", "size=2")
    config, written = Config.from_text(text, "digits.cfg", DIGITS), []
    for word in ("cpu", "gpu"):
        flags = Flags(calibrate_device=word, statistics_file=str(tmp_path / f"{word}.npz"))
        path, _, _ = convert(
            DIGITS / "model.onnx", config, tmp_path / word, progress=False, flags=flags
        )
        written.append((path.read_bytes(), Path(flags.statistics_file).read_bytes()))
    assert written[0] == written[1]


# ---------------------------------------------------------------- the source


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_a_cuda_compiler_takes_the_source(architecture, tmp_path):
    (tmp_path / "k.cu").write_text(SOURCE_CU)
    command = ["nvcc", "-std=c++17", "--fmad=false", f"-arch={architecture}", "-cubin",
               "-Xptxas", "-v", "-o", "k.cubin", "k.cu"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    assert len(spilled) == 6 and not any(map(int, spilled)), done.stderr  # two for each kernel


# ---------------------------------------------------------------- the benchmark


def test_benchmark_without_a_gpu_says_so(without_cupy, capsys):
    assert bench_gpu.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "nothing was measured: no CuPy" in printed and "ptqlit[gpu]" in printed


@needs_compiler
def test_benchmark_with_a_gpu(with_gpu, capsys):
    assert bench_gpu.main(["--megabytes=0.05", "--tensors=3"]) == 0
    printed = capsys.readouterr().out
    for name in ("device copy", "min and max", "histogram", "error measures"):
        assert name in printed
    assert printed.count("equal to the CPU's") == 3 and "DIFFERENT" not in printed


@needs_compiler
def test_benchmark_notices_other_bits(with_gpu, monkeypatch, capsys):
    wrong = SOURCE_CU.replace("place = -1", "place = 1").replace("v == 0 ||", "v < 0.5f ||")
    assert wrong.count("v < 0.5f") == 1
    monkeypatch.setattr("ptqlit.statistics.gpu.SOURCE_CU", wrong)
    assert bench_gpu.main(["--megabytes=0.05", "--tensors=2"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_counts_that_differ_in_one_bin_are_not_the_same():
    a, b = (count_numpy(np.array([1, 2], np.float32)) for _ in range(2))
    assert bench_gpu.same_counts(a, b)
    b.bins[0] += 1
    assert not bench_gpu.same_counts(a, b) and not bench_gpu.same_counts(a, Counts())
