"""What writing all reports costs, in times of running both models with every needed tensor as output.

    python tools/bench_reports.py --zoo FOLDER [--samples N] [--rounds N]

Both run over the same samples of mobilenet_v2, in memory; processor time of the fastest round on one
processor, which other work on the machine disturbs little: threads on two halves of a core slow each
other and would count twice. Peak memory is that of processes of their own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import CASES, config_of
from rich.console import Console
from rich.table import Table

from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.max_min import max_min
from ptqlit.model.graph import prepare
from ptqlit.model.plan import load_plan, save_plan
from ptqlit.quantizers.full import full_plan
from ptqlit.reports.distribution import SideBySide, watching
from ptqlit.reports.folder import write_reports
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import observe
from ptqlit.storage.apply import apply_plan

CASE = next(case for case in CASES if "v2" in case.model)
TIMES, MORE = 2.5, 300  # promised: at most so many times the time, and MB above the larger run


def bare(both: SideBySide, samples: list[dict]) -> None:
    """Both models in turn with every needed tensor as a float output."""
    sides = (both.graph.model, [a for a, _ in both.pairs]), (both.model, [b for _, b in both.pairs])
    for model, names in sides:
        made = {value.name for node in model.graph for value in node.outputs}
        session = watching(model, [n for n in dict.fromkeys(names) if n in made])
        for sample in samples:
            session.run(None, sample)


def one(kind: str, options) -> None:
    """Do one thing in this process; prints its seconds of processor time and peak megabytes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    graph = prepare(options.zoo / "models" / f"{CASE.model}.onnx")
    samples = [
        s
        for s, _ in zip(image_samples(config_of(CASE, options.zoo), graph), range(options.samples))
    ]
    plan = load_plan(options.plan)
    model, times = apply_plan(graph, plan), []
    if kind == "warm":  # what is compiled once is compiled before the clock starts
        samples = samples[:1]
    for _ in range(options.rounds):
        start = time.process_time()
        if kind == "bare":
            bare(SideBySide(graph, plan, model), samples)
        else:
            backend = None if kind == "csv" else CPU
            with tempfile.TemporaryDirectory() as folder:
                write_reports(folder, graph, plan, model, samples, backend=backend)
        times.append(time.process_time() - start)
    print(min(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(kind: str, options, plan: Path) -> tuple[float, float]:
    """Seconds and megabytes of a process of its own."""
    numbers = ("--samples", str(options.samples), "--rounds", str(options.rounds))
    command = [
        sys.executable,
        __file__,
        "--zoo",
        options.zoo,
        "--plan",
        plan,
        "--one",
        kind,
        *numbers,
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(found[-2]), float(found[-1])


def main() -> None:
    """One row for the bare runs, one for the reports without and with the sensitivity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one, options)
    graph = prepare(options.zoo / "models" / f"{CASE.model}.onnx")
    few = [s for s, _ in zip(image_samples(config_of(CASE, options.zoo), graph), range(8))]
    with tempfile.TemporaryDirectory() as folder:
        plan = save_plan(
            full_plan(graph, observe(graph, few), CPU, "MAX_MIN", max_min), Path(folder) / "p.json"
        )
        measure("warm", options, plan)
        found = {kind: measure(kind, options, plan) for kind in ("bare", "csv", "all")}
    table = Table(
        "work", "processor time", "peak MB", title=f"{CASE.model}, {options.samples} samples"
    )
    words = {"bare": "both models", "csv": "reports, no sensitivity", "all": "all reports"}
    for kind, (seconds, memory) in found.items():
        table.add_row(words[kind], f"{seconds / found['bare'][0]:.2f}", f"{memory:.0f}")
    Console(width=100).print(table)
    times, more = found["all"][0] / found["bare"][0], found["all"][1] - found["bare"][1]
    word = "as promised" if times <= TIMES and more <= MORE else "MISSED"
    print(
        f"all reports: {times:.2f} times (promised: {TIMES}), {more:.0f} MB more (promised: {MORE}): {word}"
    )


if __name__ == "__main__":
    main()
