"""Time and memory of calibration, against onnxruntime's own calibrators.

    python tools/bench_calibration.py --zoo FOLDER [--only WORD]

Every row is a process of its own that decodes the images, runs mobilenet_v2 over them with two
threads, and reports its seconds (without imports) and its peak memory. Figures are ratios within one
run; onnxruntime's histogram calibrators need several gigabytes of memory.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import CASES, Reader, config_of, validation

CASE = CASES[1]


def samples_of(zoo: Path, graph, every: bool):
    """The 100 calibration images, or all validation images."""
    from ptqlit.samples.image import image_samples, read_image
    from ptqlit.samples.stream import Recipes

    config = config_of(CASE, zoo)
    if not every:
        return image_samples(config, graph)
    files, _ = validation(CASE, zoo, 0)
    wanted = graph.inputs[0]
    return Recipes(files, lambda path: {wanted.name: read_image(path, wanted, config.data)})


def float_pass(zoo: Path, graph, once: bool = False) -> None:
    """The bare float model over the decoded images: two threads, a sample each."""
    from concurrent.futures import ThreadPoolExecutor

    from ptqlit.model.runtime import open_session
    from ptqlit.samples.stream import shared

    session = open_session(zoo / "models" / f"{CASE.model}.onnx", threads=1)
    take = shared(samples_of(zoo, graph, False))

    def work(_):
        while (sample := take()) is not None:
            session.run(None, sample)
            if once:
                return

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(1 if once else 2)))


def ours(zoo: Path, graph, method: str, every: bool = False) -> None:
    """Observe, and choose every range by a method."""
    from ptqlit.backends.cpu import CPU
    from ptqlit.calibrators.max_min import Options
    from ptqlit.pipeline import find_calibrator
    from ptqlit.statistics.observe import observe

    statistics = observe(graph, samples_of(zoo, graph, every), threads=2)
    for tensor in statistics.tensors.values():
        find_calibrator(method)(tensor, CPU.activation, Options())


def theirs(zoo: Path, graph, method: str) -> None:
    """onnxruntime's calibrator over the same images."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    extra = {} if method == "MinMax" else {"num_bins": 2048}
    if method == "Entropy":
        extra["num_quantized_bins"] = 128
    calibrator = make_theirs(create_calibrator, CalibrationMethod, zoo, method, extra)
    calibrator.collect_data(Reader(samples_of(zoo, graph, False)))
    calibrator.compute_data()


def make_theirs(create, methods, zoo: Path, method: str, extra: dict):
    """A calibrator whose augmented model lies in a temporary folder, with two threads."""
    import tempfile

    import onnxruntime

    folder = tempfile.mkdtemp()
    path = str(zoo / "models" / f"{CASE.model}.onnx")
    calibrator = create(
        path, augmented_model_path=f"{folder}/augmented.onnx",
        calibrate_method=getattr(methods, method), extra_options=extra,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    calibrator.infer_session = onnxruntime.InferenceSession(
        calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
    )
    return calibrator


ROWS = {
    "float model, one image": lambda zoo, graph: float_pass(zoo, graph, once=True),
    "float model, 100 images": lambda zoo, graph: float_pass(zoo, graph),
    "ptqlit MAX_MIN": lambda zoo, graph: ours(zoo, graph, "MAX_MIN"),
    "ptqlit KL": lambda zoo, graph: ours(zoo, graph, "KL"),
    "ptqlit MSE": lambda zoo, graph: ours(zoo, graph, "MSE"),
    "ptqlit KL, all validation images": lambda zoo, graph: ours(zoo, graph, "KL", every=True),
    "onnxruntime MinMax": lambda zoo, graph: theirs(zoo, graph, "MinMax"),
    "onnxruntime Percentile": lambda zoo, graph: theirs(zoo, graph, "Percentile"),
    "onnxruntime Entropy": lambda zoo, graph: theirs(zoo, graph, "Entropy"),
}


def child(name: str, zoo: Path) -> None:
    """Run one row and print its figures."""
    from ptqlit.model.graph import prepare
    from ptqlit.statistics.histogram import count_numba

    graph = prepare(zoo / "models" / f"{CASE.model}.onnx")
    count_numba(np.zeros(10, np.float32))  # compiled or loaded before the clock starts
    start = time.perf_counter()
    ROWS[name](zoo, graph)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    """Every row in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.zoo)
    found = {}
    for name in (n for n in ROWS if options.only in n):
        command = [sys.executable, __file__, "--zoo", str(options.zoo), "--child", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    show(found)


def show(found: dict[str, list[float]]) -> None:
    """The table: seconds, times the bare float pass, peak memory."""
    base = found.get("float model, 100 images", [1.0])[0]
    table = Table("row", "seconds", "x float pass", "peak MB", title=f"calibration of {CASE.model}")
    for name, (seconds, memory) in found.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / base:.2f}", f"{memory:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
