"""Measure dynamic quantization on a small language model and on a stack of wide layers.

    python tools/bench_dynamic.py [--zoo FOLDER] [--seconds S]

FOLDER holds models/stories260k.onnx and text/val.npz; without it only the stack is measured. The
stack is built here: layers of 768 by 768 with bias and Relu. Latencies are ratios to the float
model on one thread, best of three rounds; in a round the fastest twentieth of each model's runs
counts, which other work on the machine disturbs least. The models take turns, each for a few runs
in a row of which the first does not count: a model that serves finds its weights where its last
run left them, and not where another model's weights have pushed them out of the caches. Figures
depend on the processor: compare within one run only.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.measure import cosine, sqnr
from ptqlit.config.file import Config
from ptqlit.model.runtime import Session, open_session
from ptqlit.pipeline import Conversion, convert

STRATEGIES = ("ALWC", "ACWL")
COSINE = 0.996  # of the logits, the least that is promised
SMALLER = 3.5  # the file of the stack, at least
LATENCY = {1: 0.55, 16: 0.45, 128: 0.45}  # rows -> time over time of float, at most
WIDTH, DEPTH = 768, 4
RUNS = 10  # of a model in a row, after one that does not count


def config_of(strategy: str) -> Config:
    """The whole configuration that dynamic quantization needs."""
    text = "[common_quant_param]\nquant_type=DYNAMIC_QUANT\n[dynamic_quant_param]\n"
    return Config.from_text(f"{text}quant_strategy={strategy}\n", "bench_dynamic")


def stack() -> onnx.ModelProto:
    """Layers of one width, each with a bias and a Relu, with random weights that keep the spread."""
    random, nodes, stored, x = np.random.default_rng(0), [], [], "x"
    for layer in range(DEPTH):
        weight = random.normal(size=(WIDTH, WIDTH)) * np.sqrt(2 / WIDTH)
        for name, array in ((f"w{layer}", weight), (f"b{layer}", 0.1 * random.normal(size=WIDTH))):
            stored.append(numpy_helper.from_array(array.astype(np.float32), name))
        nodes += [
            helper.make_node("MatMul", [x, f"w{layer}"], [f"m{layer}"], name=f"product{layer}"),
            helper.make_node("Add", [f"m{layer}", f"b{layer}"], [f"a{layer}"], name=f"bias{layer}"),
            helper.make_node("Relu", [f"a{layer}"], [f"y{layer}"], name=f"relu{layer}"),
        ]
        x = f"y{layer}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def one_round(sessions: dict[str, Session], feed: dict, seconds: float) -> dict[str, float]:
    """Time over time of float for each session: the fastest twentieth of runs, taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent["float"]) < 40:
        for name, session in sessions.items():
            session.run(None, feed)
            for _ in range(RUNS):
                start = time.perf_counter()
                session.run(None, feed)
                spent[name].append(time.perf_counter() - start)
    fast = {name: float(np.percentile(times, 5)) for name, times in spent.items()}
    return {name: time_ / fast["float"] for name, time_ in fast.items()}


def latencies(sessions: dict[str, Session], rows: int, seconds: float) -> dict[str, float]:
    """The best ratio of three rounds for as many rows."""
    feed = {"x": np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)}
    rounds = [one_round(sessions, feed, seconds / 3) for _ in range(3)]
    return {name: min(ratios[name] for ratios in rounds) for name in sessions}


def kernels(result: Conversion) -> tuple[str, bool]:
    """Found and planned integer products, and whether all were found."""
    rows = [row for row in result.table.rows if row.decision == "dynamic"]
    found = sum(row.as_planned for row in rows)
    return f"{found} of {len(rows)}", found == len(rows) > 0


def mark(good: bool) -> str:
    """How a promise is shown."""
    return "ok" if good else "MISSED"


def stack_rows(folder: Path, seconds: float) -> list[list[str]]:
    """A row for each strategy: size, kernels, latency at each number of rows."""
    model = stack()
    results = {s: convert(model, config_of(s), folder / f"stack_{s}") for s in STRATEGIES}
    sessions = {"float": open_session(model.SerializeToString())}
    sessions |= {s: open_session(result.path) for s, result in results.items()}
    times = {rows: latencies(sessions, rows, seconds) for rows in LATENCY}
    shown, size = [], len(model.SerializeToString())
    for strategy, result in results.items():
        smaller, (found, all_found) = size / result.path.stat().st_size, kernels(result)
        ratios = {rows: found_[strategy] for rows, found_ in times.items()}
        good = smaller >= SMALLER and all_found and all(ratios[r] <= LATENCY[r] for r in LATENCY)
        shown.append([strategy, f"{smaller:.2f}", found,
                      *(f"{ratio:.2f}" for ratio in ratios.values()), mark(good)])
    return shown


def text_rows(zoo: Path, folder: Path, texts: int = 100) -> list[list[str]]:
    """A row for each strategy: kernels, cosine and SQNR of the logits over texts of their own length."""
    model = zoo / "models" / "stories260k.onnx"
    data, floats, shown = np.load(zoo / "text" / "val.npz"), open_session(model), []
    feeds = [{"input_ids": ids[None, :length]}
             for ids, length in zip(data["input_ids"][:texts], data["lengths"][:texts])]
    expected = [floats.run(None, feed)[0] for feed in feeds]
    for strategy in STRATEGIES:
        result = convert(model, config_of(strategy), folder / f"text_{strategy}")
        session, (found, all_found) = open_session(result.path), kernels(result)
        got = [session.run(None, feed)[0] for feed in feeds]
        alike = [cosine(a, b) for a, b in zip(expected, got)]
        flat = [np.concatenate([logits.ravel() for logits in part]) for part in (expected, got)]
        smaller = model.stat().st_size / result.path.stat().st_size
        shown.append([strategy, f"{smaller:.2f}", found, f"{np.mean(alike):.5f}", f"{min(alike):.5f}",
                      f"{sqnr(*flat):.1f}", mark(np.mean(alike) >= COSINE and all_found)])
    return shown


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=None, help="folder with models/ and text/")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of rows")
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        if options.zoo and (options.zoo / "models" / "stories260k.onnx").exists():
            columns = ["strategy", "times smaller", "kernels", "cosine", "least", "SQNR dB", "promise"]
            text = Table(*columns, title="dynamic int8, stories260k, logits of 100 texts")
            for row in text_rows(options.zoo, Path(folder)):
                text.add_row(*row)
            console.print(text)
        columns = ["strategy", "times smaller", "kernels", *(f"{n} rows" for n in LATENCY), "promise"]
        wide = Table(*columns, title=f"dynamic int8, {DEPTH} layers of {WIDTH}: time / time of float")
        for row in stack_rows(Path(folder), options.seconds):
            wide.add_row(*row)
        console.print(wide)


if __name__ == "__main__":
    main()
