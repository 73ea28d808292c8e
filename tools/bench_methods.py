"""Compare the methods that choose the range of an activation, on a folder of real models.

    python tools/bench_methods.py --zoo FOLDER [--images N] [--only WORD]

Each model is observed once, over 100 calibration images; every registered method then decides from
the same statistics, with bias correction. Models, images and measures are those of bench.py.
"""
from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from bench import Case, all_logits, chosen, config_of, table_options, validation
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.max_min import CALIBRATORS
from ptqlit.model.graph import Graph, prepare
from ptqlit.pipeline import METHODS
from ptqlit.quantizers.bias_correction import correct
from ptqlit.quantizers.full import full_plan
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import Statistics, observe
from ptqlit.storage.apply import apply_plan
from ptqlit.storage.write import write_model

FIRST = "MAX_MIN"  # what the others are compared with
AGREEMENT = {"MSE": 1.0, "PERCENTILE": 1.0, "KL": 2.5}  # points below MAX_MIN that are allowed
BETTER = {"MSE"}  # its SQNR must be above that of MAX_MIN


def files_of(graph: Graph, statistics: Statistics, folder: Path) -> tuple[dict, dict]:
    """The file of every method, and the milliseconds a tensor that it took to choose."""
    files, spent = {}, {}
    for word, calibrator in CALIBRATORS.items():
        calibrator(next(iter(statistics.tensors.values())), CPU.activation)  # compiled and warm
        start = time.thread_time()
        for tensor in statistics.tensors.values():
            calibrator(tensor, CPU.activation)
        spent[word] = 1000 * (time.thread_time() - start) / len(statistics.tensors)
        plan = correct(full_plan(graph, statistics, CPU, word, calibrator), graph, statistics, CPU)
        files[word] = write_model(apply_plan(graph, plan), folder / f"{word}.onnx")
    return files, spent


def verdict(word: str, same: dict[str, float], noise: dict[str, float]) -> str:
    """Whether a method keeps what is promised for it."""
    if word not in AGREEMENT:
        return ""
    good = same[word] >= same[FIRST] - AGREEMENT[word]
    good &= word not in BETTER or noise[word] > noise[FIRST]
    return "ok" if good else "MISSED"


def method_rows(case: Case, zoo: Path, limit: int = 0) -> list[list[str]]:
    """One row of the table for each method; `limit` validation images, 0: all."""
    model, config = zoo / "models" / f"{case.model}.onnx", config_of(case, zoo)
    graph = prepare(model)
    statistics = observe(graph, image_samples(config, graph))
    files, labels = validation(case, zoo, limit)
    with tempfile.TemporaryDirectory() as folder:
        written, spent = files_of(graph, statistics, Path(folder))
        logits = all_logits(case, config, graph, files, {"float": model, **written})
    top1 = {word: 100 * float(np.mean(found.argmax(1) == labels)) for word, found in logits.items()}
    same = {word: 100 * agreement(logits["float"], logits[word]) for word in written}
    noise = {word: sqnr(logits["float"], logits[word]) for word in written}
    rows = [
        ["", word, f"{top1[word]:.2f}", f"{same[word]:.2f}", f"{noise[word]:.2f}",
         verdict(word, same, noise), f"{spent[word]:.2f}"]
        for word in written
    ]
    rows[0][0] = f"{case.model} (float top-1 {top1['float']:.2f})"
    return rows


def main() -> None:
    """Measure every model that the folder holds and print the table."""
    options, cases = chosen(table_options(__doc__))
    columns = ["model", "method", "top-1 %", "agreement %", "SQNR dB", "promise", "ms a tensor"]
    shown = Table(*columns, title=f"{len(METHODS)} methods, 100 calibration images, bias correction")
    for case in cases:
        for row in method_rows(case, options.zoo, options.images):
            shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
