"""Compare one weight scale a layer, equalized and not, with one a channel, on a folder of real models.

    python tools/bench_per_layer.py --zoo FOLDER [--images N] [--only WORD]

MAX_MIN, bias correction, 100 calibration images; models, images and measures are those of bench.py.
Models with Relu6 cannot be equalized. They are shown a second time with Relu in its place, each
file compared with its own float model, and there also equalized without the guard against channels
of next to no weights.
"""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from bench import Case, all_logits, chosen, config_of, table_options, validation
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.max_min import max_min
from ptqlit.model.graph import Graph, prepare
from ptqlit.quantizers.bias_correction import correct
from ptqlit.quantizers.equalization import equalize
from ptqlit.quantizers.full import full_plan
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import observe
from ptqlit.storage.apply import apply_plan, scale_channels
from ptqlit.storage.write import write_model

CHANNEL, PLAIN, EQUALIZED, FREE = "one a channel", "one a layer", "equalized", "without the guard"
PROMISED = ("squeezenet1.1_227", "resnet20_cifar10")
AGREEMENT, DECIBEL = 3.0, 0.3  # the most that is given up against CHANNEL, and against PLAIN


def with_relu(path: Path) -> onnx.ModelProto | None:
    """The model with Relu in the place of every Clip; None where there is none."""
    model = onnx.load(path)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    for node in clips:
        node.op_type = "Relu"
        del node.input[1:]
    return model if clips else None


def graphs_of(graph: Graph, free: bool) -> Iterator[tuple[str, Graph, bool]]:
    """Every row's name, the graph to quantize, and whether each channel gets a scale."""
    yield CHANNEL, graph, True
    yield PLAIN, graph, False
    factors, notes = equalize(graph)
    print(f"{graph.name}: {notes[0]}")
    if factors:
        yield EQUALIZED, scale_channels(graph, factors), False
    if factors and free:
        yield FREE, scale_channels(graph, equalize(graph, float("inf"))[0]), False


def verdict(case: Case, same: dict[str, float], noise: dict[str, float]) -> str:
    """Whether one scale a layer keeps what is promised for it."""
    if case.model not in PROMISED:
        return ""
    last = EQUALIZED if EQUALIZED in same else PLAIN
    good = same[last] >= same[CHANNEL] - AGREEMENT and noise[last] >= noise[PLAIN] - DECIBEL
    return "ok" if good else "MISSED"


def rows_of(case: Case, title: str, model: Path, zoo: Path, limit: int, free: bool) -> list[list[str]]:
    """The rows of one float model."""
    config, graph = config_of(case, zoo), prepare(model)
    files, labels = validation(case, zoo, limit)
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for name, scaled, per_channel in graphs_of(graph, free):
            statistics = observe(scaled, image_samples(config, scaled))
            plan = full_plan(scaled, statistics, CPU, "MAX_MIN", max_min, per_channel=per_channel)
            quantized = apply_plan(scaled, correct(plan, scaled, statistics, CPU))
            written[name] = write_model(quantized, Path(folder) / f"{len(written)}.onnx")
        logits = all_logits(case, config, graph, files, {"float": model, **written})
    same = {name: 100 * agreement(logits["float"], logits[name]) for name in written}
    noise = {name: sqnr(logits["float"], logits[name]) for name in written}
    top1 = {name: 100 * float(np.mean(found.argmax(1) == labels)) for name, found in logits.items()}
    rows = [["", n, f"{top1[n]:.2f}", f"{same[n]:.2f}", f"{noise[n]:.2f}", ""] for n in written]
    rows[0][0] = f"{title} (float top-1 {top1['float']:.2f})"
    rows[-1][-1] = verdict(case, same, noise)
    return rows


def case_rows(case: Case, zoo: Path, limit: int) -> Iterator[list[str]]:
    """The rows of one case: the model, and its sister without Relu6 if it has any."""
    model = zoo / "models" / f"{case.model}.onnx"
    yield from rows_of(case, case.model, model, zoo, limit, False)
    sister = with_relu(model)
    if sister is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{case.model}_relu.onnx"
            onnx.save(sister, path)
            yield from rows_of(case, f"{case.model}, Relu", path, zoo, limit, True)


def main() -> None:
    """Measure every model that the folder holds and print the table."""
    options, cases = chosen(table_options(__doc__))
    columns = ["model", "weight scales", "top-1 %", "agreement %", "SQNR dB", "promise"]
    shown = Table(*columns, title="one weight scale a layer, 100 calibration images, bias correction")
    for case in cases:
        for row in case_rows(case, options.zoo, options.images):
            shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
