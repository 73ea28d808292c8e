"""Write the files of every target for a folder of real models, judge them, and compare their answers.

    python tools/bench_targets.py --zoo FOLDER [--images N] [--only WORD]

Each model is observed once, over 100 calibration images; every target's table then decides from the
same statistics, with bias correction and MAX_MIN. For NVGPU, whose codes are symmetric, KL is tried
beside it, and the file that keeps the higher SQNR over the calibration images is the one that is
promised: the validation images have no part in the choice. The files are judged by the rules of their
target, and run by onnxruntime over the validation images: the share of images on which a file agrees
with the float model may lie below the share of the CPU's file by one point, for NVGPU by three. Models,
images and measures are those of bench.py.
"""
from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench import Case, all_logits, chosen, config_of, table_options, validation
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.backends.check import judge
from ptqlit.backends.rules import Backend
from ptqlit.calibrators.max_min import find_calibrator
from ptqlit.model.graph import Graph, prepare
from ptqlit.model.plan import Plan
from ptqlit.model.qdq import open_records
from ptqlit.model.runtime import logits_model, open_session
from ptqlit.pipeline import BACKENDS
from ptqlit.quantizers.bias_correction import correct
from ptqlit.quantizers.full import full_plan
from ptqlit.samples.image import image_samples
from ptqlit.samples.stream import Recipes
from ptqlit.statistics.observe import Statistics, observe
from ptqlit.storage.apply import apply_plan
from ptqlit.storage.write import write_model

BATCH = 10  # images at a time, as bench.py has them
ALLOWED = {"NVGPU": 3.0, "DSP": 1.0, "ASCEND": 1.0}  # points of agreement below the CPU's file
FILES = (("CPU", "MAX_MIN"), ("NVGPU", "KL"), ("NVGPU", "MAX_MIN"), ("DSP", "MAX_MIN"), ("ASCEND", "MAX_MIN"))


def plan_of(graph: Graph, statistics: Statistics, backend: Backend, method: str) -> Plan:
    """The Plan for a target, with sizes where it needs them."""
    plan = full_plan(graph, statistics, backend, method, find_calibrator(method))
    plan = correct(plan, graph, statistics, backend)
    put = graph.inputs[0]
    return replace(plan, shapes=((put.name, (BATCH, *put.shape[1:])),)) if backend.static else plan


def best_files(model: Path, samples: Recipes, written: dict[tuple[str, str], Path]) -> set[tuple[str, str]]:
    """For each target its only file, or the one with the highest SQNR over the samples."""
    def logits(path: Path) -> np.ndarray:
        session = open_session(logits_model(path))
        return np.concatenate([session.run(None, sample)[0] for sample in samples])

    wanted, best = logits(model), {}
    for key in (key for key in written if key[0] == "NVGPU"):
        best[key] = sqnr(wanted, logits(written[key]))
    return {key for key in written if key not in best} | {max(best, key=best.get)}


def target_rows(case: Case, zoo: Path, limit: int = 0) -> list[list[str]]:
    """One row of the table for each file; `limit` validation images, 0: all."""
    model, config = zoo / "models" / f"{case.model}.onnx", config_of(case, zoo)
    graph = prepare(model)
    statistics = observe(graph, image_samples(config, graph))
    files, labels = validation(case, zoo, limit)
    files, labels = (part[: len(part) // BATCH * BATCH] for part in (files, labels))
    with tempfile.TemporaryDirectory() as folder:
        plans = {key: plan_of(graph, statistics, BACKENDS[key[0]], key[1]) for key in FILES}
        written = {
            key: write_model(apply_plan(graph, plan), Path(folder) / f"{'_'.join(key)}.onnx")
            for key, plan in plans.items()
        }
        promised = best_files(model, image_samples(config, graph), written)
        broken = {key: judge(open_records(path), BACKENDS[key[0]]) for key, path in written.items()}
        logits = all_logits(case, config, graph, files, {"float": model, **written})
    same = {key: 100 * agreement(logits["float"], logits[key]) for key in written}
    rows = []
    for key, plan in plans.items():
        (name, method), checks = key, len(BACKENDS[key[0]].checks)
        codes = sum(node.decision != "float" for node in plan.nodes)
        top1 = 100 * float(np.mean(logits[key].argmax(1) == labels))
        good = not broken[key] and same[key] >= same[FILES[0]] - ALLOWED.get(name, 0)
        promise = ("ok" if good else "MISSED") if key in promised else ""
        rows.append(["", name, method, f"{codes} of {len(plan.nodes)}", f"{checks - len(broken[key])} of {checks}",
                     f"{top1:.2f}", f"{same[key]:.2f}", f"{sqnr(logits['float'], logits[key]):.2f}", promise])  # fmt: skip
    rows[0][0] = f"{case.model}, {len(files)} images"
    return rows


def main() -> None:
    """Measure every model that the folder holds and print the table."""
    options, cases = chosen(table_options(__doc__))
    columns = ["model", "target", "method", "with codes", "rules hold", "top-1 %", "agreement %", "SQNR dB", "promise"]
    shown = Table(*columns, title="files for other machines, run by onnxruntime")
    for case in cases:
        for row in target_rows(case, options.zoo, options.images):
            shown.add_row(*row)
    Console(width=130).print(shown)


if __name__ == "__main__":
    main()
