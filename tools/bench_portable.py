"""What a processor without VNNI makes of a plain file and of a portable one, on a real model.

    python tools/bench_portable.py --zoo FOLDER [--images N] [--only WORD]

Both files come from the same 100 calibration images. Their answers on a processor that adds products
in 16 bits are emulated, which takes a second or more an image, so N is small. The portable file must
give the same bits there as on a newer processor, and may agree with the float model on at most half a
point fewer of all validation images than the plain file does where nothing saturates.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench import CASES, Case, all_logits, batches, config_of, validation
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.arithmetic.saturation import exact_product, saturating_product
from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.max_min import max_min
from ptqlit.model.emulate import adds_exactly, emulator
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import logits_model
from ptqlit.quantizers.bias_correction import correct
from ptqlit.quantizers.full import full_plan
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import observe
from ptqlit.storage.apply import apply_plan
from ptqlit.storage.write import write_model

ALLOWED = 0.5  # points of agreement


def files_of(case: Case, zoo: Path, folder: Path) -> dict[str, Path]:
    """The plain file and the portable one."""
    graph, config = prepare(zoo / "models" / f"{case.model}.onnx"), config_of(case, zoo)
    statistics, files = observe(graph, image_samples(config, graph)), {}
    for name, backend in (("plain", CPU), ("portable", replace(CPU, portable=True))):
        plan = full_plan(graph, statistics, backend, "MAX_MIN", max_min)
        plan = correct(plan, graph, statistics, backend)
        files[name] = write_model(apply_plan(graph, plan), folder / f"{name}.onnx")
    return files


def emulated(files: dict[str, Path], feeds: list[dict], rule) -> dict[str, np.ndarray]:
    """Logits of the files over some feeds with a rule for adding products."""
    machines = {name: emulator(logits_model(path), rule) for name, path in files.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in files}
    for feed in tqdm(feeds, desc="emulating", disable=None, leave=False):
        for name, machine in machines.items():
            found[name].append(machine.run(feed)[0])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def portable_rows(case: Case, zoo: Path, limit: int) -> tuple[list[list[str]], bool]:
    """A row for each file on each kind of processor, and whether the promise is kept."""
    model, config = zoo / "models" / f"{case.model}.onnx", config_of(case, zoo)
    graph, (paths, _) = prepare(model), validation(case, zoo, 0)
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(case, zoo, Path(folder))
        feeds = list(batches(case, config, graph, paths[:limit]))
        older = emulated(files, feeds, saturating_product)
        every = all_logits(case, config, graph, paths if adds_exactly() else paths[:limit], {"float": model, **files})
        newer = {n: every[n] for n in files} if adds_exactly() else emulated(files, feeds, exact_product)
    floats, rows = every["float"], []
    for name in files:
        for cpu, found in (("newer", newer[name]), ("older, emulated", older[name])):
            wanted = floats[: len(found)]
            row = [name, cpu, str(len(found)), f"{100 * agreement(wanted, found):.2f}", f"{sqnr(wanted, found):.2f}"]
            rows.append([case.model if not rows else "", *row])
    same_bits = np.array_equal(newer["portable"][: len(older["portable"])], older["portable"])
    lost = 100 * (agreement(floats, newer["plain"]) - agreement(floats, newer["portable"]))
    rows[-1].append("ok" if same_bits and lost <= ALLOWED else "MISSED")
    return rows, same_bits and lost <= ALLOWED


def main() -> None:
    """Measure the models that the folder holds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--images", type=int, default=100, help="images to emulate")
    parser.add_argument("--only", default="mobilenet_v1", help="models whose name contains this")
    options = parser.parse_args()
    cases = [c for c in CASES if options.only in c.model and (options.zoo / "models" / f"{c.model}.onnx").exists()]
    if not cases:
        parser.exit(2, f"bench_portable: {options.zoo} holds none of the models asked for\n")
    columns = ["model", "file", "processor", "images", "agreement %", "SQNR dB", "promise"]
    shown, start = Table(*columns, title="processors with VNNI, and older ones"), time.perf_counter()
    for case in cases:
        for row in portable_rows(case, options.zoo, options.images)[0]:
            shown.add_row(*row)
    Console(width=120).print(shown, f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
