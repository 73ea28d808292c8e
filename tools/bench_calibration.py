"""Time and memory of calibration, against onnxruntime's own calibrators.

    python tools/bench_calibration.py --zoo FOLDER [--only WORD] [--rounds N]

Every row is a process of its own that runs mobilenet_v2 over 100 images with two threads and reports
its seconds, its processor seconds (both without imports and without compiling) and its peak memory.
Rows take turns, N rounds of them, and the smallest figures count, so that all meet the same weather;
the slow rows run once. "decoded" rows get arrays, the others files. onnxruntime's histogram
calibrators need several gigabytes of memory.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import CASES, Reader, config_of, validation
from rich.console import Console
from rich.table import Table

CASE = CASES[1]
THREADS = 2


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


# ---------------------------------------------------------------- what is measured

def float_pass(model: str, graph, samples, threads: int = THREADS) -> None:
    """The bare float model over the images, a sample for each thread; one thread stops after one."""
    from ptqlit.model.runtime import open_session
    from ptqlit.samples.stream import shared

    session, take = open_session(model, threads=1), shared(samples)

    def work(_):
        while (sample := take()) is not None:
            session.run(None, sample)
            if threads == 1:
                return

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def ours(graph, samples, method: str) -> None:
    """Observe, and choose every range by a method."""
    from ptqlit.backends.cpu import CPU
    from ptqlit.calibrators.max_min import choose_ranges, find_calibrator
    from ptqlit.statistics.observe import observe

    statistics = observe(graph, samples, threads=THREADS)
    choose_ranges(statistics.tensors, find_calibrator(method), CPU.activation)


def theirs(model: str, samples, method: str) -> None:
    """onnxruntime's calibrator over the same images, with two threads."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    extra = {} if method == "MinMax" else {"num_bins": 2048}
    if method == "Entropy":
        extra["num_quantized_bins"] = 128
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            model, augmented_model_path=f"{folder}/augmented.onnx",
            calibrate_method=getattr(CalibrationMethod, method), extra_options=extra,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        calibrator.infer_session = onnxruntime.InferenceSession(
            calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
        )
        calibrator.collect_data(Reader(samples))
        calibrator.compute_data()


def warm_up() -> None:
    """Import all, and compile or load every kernel, before the clock starts."""
    from ptqlit.backends.cpu import CPU
    from ptqlit.pipeline import METHODS
    from ptqlit.statistics.moments import ChannelMeans
    from ptqlit.statistics.observe import TensorStatistics

    some = TensorStatistics(means={1: ChannelMeans(1)})
    some.update(np.random.default_rng(0).normal(size=(1, 2, 10_000)).astype(np.float32))
    for method in METHODS:
        method(some, CPU.activation)


@dataclass(frozen=True)
class Row:
    """One line of the table: run(model, graph, samples) over `images`."""

    run: Callable
    images: str = "100"  # files, "decoded" arrays, or "all" validation images
    slow: bool = False  # runs once


FLOAT, FLOAT_DECODED = "float model", "float model, decoded images"
KL, KL_DECODED, KL_ALL = "ptqlit KL", "ptqlit KL, decoded images", "ptqlit KL, all validation images"
ROWS = {
    "float model, one image": Row(lambda m, g, s: float_pass(m, g, s, threads=1)),
    FLOAT: Row(float_pass),
    FLOAT_DECODED: Row(float_pass, "decoded"),
    "ptqlit MAX_MIN": Row(lambda m, g, s: ours(g, s, "MAX_MIN")),
    KL: Row(lambda m, g, s: ours(g, s, "KL")),
    KL_DECODED: Row(lambda m, g, s: ours(g, s, "KL"), "decoded"),
    "onnxruntime MinMax": Row(lambda m, g, s: theirs(m, s, "MinMax")),
    "onnxruntime Percentile": Row(lambda m, g, s: theirs(m, s, "Percentile"), slow=True),
    "onnxruntime Entropy, 2048 bins": Row(lambda m, g, s: theirs(m, s, "Entropy"), slow=True),
    KL_ALL: Row(lambda m, g, s: ours(g, s, "KL"), "all", slow=True),
}


# ---------------------------------------------------------------- processes

def child(name: str, zoo: Path) -> None:
    """Run one row and print its seconds, processor seconds and peak memory in MB."""
    from ptqlit.model.graph import prepare

    row, model = ROWS[name], str(zoo / "models" / f"{CASE.model}.onnx")
    graph = prepare(model)
    samples = samples_of(zoo, graph, row.images == "all")
    samples = list(samples) if row.images == "decoded" else samples
    warm_up()
    start, used = time.perf_counter(), time.process_time()
    row.run(model, graph, samples)
    spent = time.perf_counter() - start, time.process_time() - used
    print(json.dumps([*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(zoo: Path, only: str, rounds: int) -> dict[str, np.ndarray]:
    """(rounds, 3) figures of every row; the rows take turns."""
    found: dict[str, list] = {name: [] for name in ROWS if only in name}
    for turn in range(rounds):
        for name in found:
            if turn and ROWS[name].slow:
                continue
            command = [sys.executable, __file__, "--zoo", str(zoo), "--child", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    return {name: np.array(rows) for name, rows in found.items()}


# ---------------------------------------------------------------- tables

def promises(best: dict[str, np.ndarray]) -> list[tuple[str, float, float, str, float]]:
    """What is promised: text, ratio of seconds, of processor seconds, comparison, limit."""
    def ratio(first: str, second: str) -> tuple[float, float]:
        return tuple(best[first][:2] / best[second][:2])

    rows = [
        (f"{other} / ptqlit {method}", *ratio(other, f"ptqlit {method}"), ">=", least)
        for other, least in (("onnxruntime MinMax", 1), ("onnxruntime Percentile", 8),
                              ("onnxruntime Entropy, 2048 bins", 8))
        for method in ("MAX_MIN", "KL")
    ]
    rows += [(f"{a} / {b}", *ratio(a, b), "<=", 3.5) for a, b in ((KL, FLOAT), (KL_DECODED, FLOAT_DECODED))]
    return rows


def show(found: dict[str, np.ndarray]) -> None:
    """The figures of every row, and whether the promises are kept."""
    best, console = {name: rows.min(0) for name, rows in found.items()}, Console(width=110)
    base = best.get(FLOAT, np.array([np.nan, np.nan, np.nan]))
    columns = "row", "seconds", "processor s", "x float model", "peak MB"
    table = Table(*columns, title=f"calibration of {CASE.model}, two threads, best of each")
    for name, (seconds, used, memory) in best.items():
        table.add_row(name, f"{seconds:.2f}", f"{used:.2f}", f"{seconds / base[0]:.2f}", f"{memory:.0f}")
    console.print(table)
    if len(found) < len(ROWS):
        return
    table = Table("promise", "found", "by processor time", "limit", "")
    for text, seconds, used, sign, limit in promises(best):
        kept = seconds >= limit if sign == ">=" else seconds <= limit
        table.add_row(text, f"{seconds:.2f}", f"{used:.2f}", f"{sign} {limit:g}", "ok" if kept else "MISSED")
    above, more = best[KL][2] - best["float model, one image"][2], best[KL_ALL][2] / best[KL][2]
    table.add_row("MB above the float model, 100 images", f"{above:.0f}", "", "<= 350", "ok" if above <= 350 else "MISSED")
    table.add_row("memory for all images / for 100", f"{more:.3f}", "", "<= 1.05", "ok" if more <= 1.05 else "MISSED")
    console.print(table)


def main() -> None:
    """Every row in a process of its own, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=3, help="how often the fast rows run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.zoo)
    if not (options.zoo / "models" / f"{CASE.model}.onnx").exists():
        parser.exit(2, f"bench_calibration: {options.zoo} holds no models/{CASE.model}.onnx\n")
    show(measure(options.zoo, options.only, options.rounds))


if __name__ == "__main__":
    main()
