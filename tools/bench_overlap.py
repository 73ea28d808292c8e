"""Whether decoding and inference overlap: together they must take little longer than the longer one.

    python tools/bench_overlap.py --zoo FOLDER [--samples N] [--seconds N]

Pictures are made so large that decoding one takes about as long as the model's work on it, each alone
on one thread. Then both are done by two threads from one stream, as calibration does. Figures are
times the longer of the two, from the fastest of several rounds; they need two idle processors.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from bench import CASES, config_of
from rich.console import Console
from rich.table import Table

from ptqlit.config.file import Config
from ptqlit.model.graph import Graph, prepare
from ptqlit.model.runtime import open_session
from ptqlit.samples.image import image_samples
from ptqlit.samples.stream import shared
from ptqlit.statistics.histogram import count_numba
from ptqlit.statistics.observe import observe

CASE = CASES[1]
LIMIT = 1.25  # together may take this many times the longer of the two
Run = Callable[[object, int], None]  # samples, threads


def float_pass(graph: Graph, zoo: Path) -> Run:
    """The bare float model over a stream."""
    session = open_session(zoo / "models" / f"{CASE.model}.onnx", threads=1)

    def run(samples, threads: int) -> None:
        take = shared(samples)

        def work(_) -> None:
            while (sample := take()) is not None:
                session.run(None, sample)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))

    return run


def calibration(graph: Graph, zoo: Path) -> Run:
    """The whole pass of a calibration: inference of all activations, and counting."""
    return lambda samples, threads: observe(graph, samples, threads=threads)


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pictures(zoo: Path, folder: Path, count: int, side: int) -> Config:
    """The configuration of a folder of square JPEGs, enlarged from real ones."""
    folder.mkdir(parents=True)
    sources = sorted((zoo / CASE.images / "calib").iterdir())[:count]
    for place, source in enumerate(sources):
        image = cv2.resize(cv2.imread(str(source)), (side, side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{place:03d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    config = config_of(CASE, zoo)
    changes = {"calibrate_path": ((CASE.input, str(folder)),), "calibrate_size": len(sources)}
    return replace(config, data=config.data.model_copy(update=changes))


def fitting_side(run: Run, graph: Graph, zoo: Path, folder: Path) -> int:
    """The side in pixels at which decoding takes as long as the model; decoding grows with the area."""
    side = 1000
    for attempt in range(3):
        samples = image_samples(pictures(zoo, folder / f"try{attempt}", 6, side), graph)
        ready = list(samples)
        decode = min(seconds(lambda: list(samples)) for _ in range(5))
        model = min(seconds(lambda: run(ready, 1)) for _ in range(5))
        side = round(side * (model / decode) ** 0.5)
    return side


def measure(run: Run, graph: Graph, config: Config, limit: float) -> dict[str, float]:
    """Seconds of decoding alone, the model alone, and both; the fastest of at least five rounds."""
    samples = image_samples(config, graph)
    ready = list(samples)
    works = {
        "decode": lambda: list(samples),
        "model": lambda: run(ready, 1),
        "in turn": lambda: run(samples, 1),
        "together": lambda: run(samples, 2),
        "generator": lambda: run((sample for sample in samples), 2),  # decodes inside the lock
    }
    found = {name: [] for name in works}
    end = time.perf_counter() + limit
    while time.perf_counter() < end or len(found["decode"]) < 5:
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: min(times) for name, times in found.items()}


def sentence(name: str, ratios: dict[str, float], good: bool) -> str:
    """The result in words."""
    word = "overlap" if good else "DO NOT overlap as promised"
    return (
        f"{name}: decoding and inference {word}: two threads take {ratios['together']:.2f} times the"
        f" longer of the two (promised: at most {LIMIT}), one thread {ratios['in turn']:.2f} times."
    )


def main() -> None:
    """One row for the bare model, one for calibration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--samples", type=int, default=12, help="pictures")
    parser.add_argument("--seconds", type=float, default=60, help="measuring time of a row")
    options = parser.parse_args()
    cv2.setNumThreads(1)  # one thread each
    count_numba(np.zeros(10, np.float32))  # compiled or loaded before the clock starts
    graph = prepare(options.zoo / "models" / f"{CASE.model}.onnx")
    title = f"decoding and {CASE.model}, {options.samples} pictures"
    works = ("decode", "model", "in turn", "together", "generator")
    table, verdicts = Table("work", "pixels", *works, "promise", title=title), []
    for name, make in (("float model", float_pass), ("calibration", calibration)):
        run = make(graph, options.zoo)
        with tempfile.TemporaryDirectory() as folder:
            side = fitting_side(run, graph, options.zoo, Path(folder))
            config = pictures(options.zoo, Path(folder) / "all", options.samples, side)
            found = measure(run, graph, config, options.seconds)
        longer = max(found["decode"], found["model"])
        ratios = {work: found[work] / longer for work in works}
        good = ratios["together"] <= LIMIT
        figures = (f"{ratio:.2f}" for ratio in ratios.values())
        table.add_row(name, f"{side}x{side}", *figures, "ok" if good else "MISSED")
        verdicts.append(sentence(name, ratios, good))
    Console(width=100).print(table)
    if os.getloadavg()[0] > 3:
        print(f"Others use this machine too (load {os.getloadavg()[0]:.1f}): the figures are too high.")
    print(*verdicts, sep="\n")


if __name__ == "__main__":
    main()
