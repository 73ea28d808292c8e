"""What writing all reports costs, in times of running both models with every needed tensor as output.

    python tools/bench_reports.py --zoo FOLDER [--samples N] [--rounds N]

Both run over the same samples of mobilenet_v2, in memory, in processes of their own that take turns;
processor time of the fastest round on one processor, which other work on the machine disturbs little:
threads on two halves of a core slow each other and would count twice.
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
KINDS = {"bare": "both models", "csv": "reports, no sensitivity", "all": "all reports"}
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
    model = apply_plan(graph, plan)

    def work(samples: list[dict]) -> None:
        if kind == "bare":
            return bare(SideBySide(graph, plan, model), samples)
        with tempfile.TemporaryDirectory() as folder:
            backend = CPU if kind == "all" else None
            write_reports(folder, graph, plan, model, samples, backend=backend)

    work(samples[:1])  # all that is imported, compiled or loaded once
    start = time.process_time()
    work(samples)
    spent = time.process_time() - start
    print(spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(kind: str, options, plan: Path) -> tuple[float, float]:
    """Seconds and megabytes of a process of its own."""
    numbers = ("--samples", str(options.samples))
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
    parser.add_argument("--rounds", type=int, default=3)
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
        rounds = [
            {kind: measure(kind, options, plan) for kind in KINDS} for _ in range(options.rounds)
        ]
    found = {kind: tuple(map(min, zip(*(one[kind] for one in rounds)))) for kind in KINDS}
    table = Table(
        "work",
        "processor time",
        "times",
        "peak MB",
        title=f"{CASE.model}, {options.samples} samples",
    )
    for kind, (seconds, memory) in found.items():
        ratio = seconds / found["bare"][0]
        table.add_row(KINDS[kind], f"{seconds:.1f} s", f"{ratio:.2f}", f"{memory:.0f}")
    Console(width=100).print(table)
    times, more = found["all"][0] / found["bare"][0], found["all"][1] - found["bare"][1]
    word = "as promised" if times <= TIMES and more <= MORE else "MISSED"
    print(
        f"all reports: {times:.2f} times (promised: {TIMES}), {more:.0f} MB more (promised: {MORE}): {word}"
    )


if __name__ == "__main__":
    main()
