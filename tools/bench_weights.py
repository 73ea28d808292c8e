"""Weights of 1 to 16 bits on a folder of real models: sizes, load and run times, and what they cost.

    python tools/bench_weights.py --zoo FOLDER [--bits 8,6] [--images N] [--only WORD]

FOLDER is that of tools/bench.py. For each width the table shows the file's size and the time to load
and to run it as shares of the float model's (run: paired, one thread, best of three), top-1, agreement
with float, and the SQNR of the logits with and without the correction of mean and spread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import CASES, Case, all_logits, config_of, validation
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.config.file import Config
from ptqlit.model.graph import Graph, prepare
from ptqlit.model.runtime import open_session, paired_latency
from ptqlit.pipeline import convert
from ptqlit.samples.image import image_samples

AT_LEAST = {  # dB of the logits at 8 bits
    "mobilenet_v1_0.75_224": 23.0,
    "mobilenet_v2_1.0_224": 22.5,
    "squeezenet1.1_227": 43.0,
}
COMPARED = (8, 6)  # widths at which the correction has to pay
COLUMNS = (
    "model",
    "bits",
    "size",
    "load ms",
    "time/float",
    "top-1 %",
    "agreement %",
    "SQNR dB",
    "plain dB",
    "",
)


def weight_config(bits: int, correction: bool, left: tuple[str, ...] = ()) -> Config:
    """Weights in a width, as the reference chooses them; the nodes `left` keep theirs."""
    text = f"[common_quant_param]\nquant_type=WEIGHT_QUANT\nbit_num={bits}\n"
    text += f"skip_quant_node={','.join(left)}\n" if left else ""
    return Config.from_text(
        f"{text}[weight_quant_param]\nbias_correction={str(correction).lower()}\n"
    )


def load_time(path: Path) -> float:
    """Milliseconds to open a session, the best of five."""
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        open_session(path)
        spent.append(time.perf_counter() - start)
    return 1000 * min(spent)


def written(case: Case, model: Path, widths: list[int], folder: Path) -> dict[str, Path]:
    """The float model, and files of all widths with and without correction, of the same weights."""
    files = {"float": model}
    for bits in widths:
        target = folder / f"{case.model}_{bits}"
        made = convert(model, weight_config(bits, True), target)
        left = tuple(node.name for node in made.table.left)
        plain = convert(model, weight_config(bits, False, left), f"{target}_plain")
        files |= {str(bits): made.path, f"{bits} plain": plain.path}
    return files


def verdict(case: Case, bits: int, lost: float, decibel: float, plain: float) -> str:
    """Whether a row keeps what is promised; empty where nothing is."""
    promises = []
    if bits == 8 and case.model in AT_LEAST:
        promises += [decibel >= AT_LEAST[case.model], lost <= 0.5]
    if bits in COMPARED:
        promises.append(decibel > plain)
    return "" if not promises else "ok" if all(promises) else "MISSED"


def row_of(
    case: Case, bits: int, files: dict, logits: dict, labels: np.ndarray, feed: dict
) -> list[str]:
    """The table's row for one width."""
    truth, ours, path = logits["float"], logits[str(bits)], files[str(bits)]
    tops = [100 * float((found.argmax(1) == labels).mean()) for found in (truth, ours)]
    decibel, plain = sqnr(truth, ours), sqnr(truth, logits[f"{bits} plain"])
    size = path.stat().st_size / files["float"].stat().st_size
    ratio = paired_latency(open_session(path), open_session(files["float"]), feed, 3)
    word = verdict(case, bits, tops[0] - tops[1], decibel, plain)
    numbers = [f"{size:.3f}", f"{load_time(path):.0f}", f"{ratio:.3f}", f"{tops[1]:.2f}"]
    return [
        str(bits),
        *numbers,
        f"{100 * agreement(truth, ours):.2f}",
        f"{decibel:.2f}",
        f"{plain:.2f}",
        word,
    ]


def measure(case: Case, zoo: Path, folder: Path, widths: list[int], limit: int) -> list[list[str]]:
    """The rows of one model."""
    model, config = zoo / "models" / f"{case.model}.onnx", config_of(case, zoo)
    graph: Graph = prepare(model)
    files = written(case, model, widths, folder)
    pictures, labels = validation(case, zoo, limit)
    logits = all_logits(case, config, graph, pictures, files)
    feed = next(iter(image_samples(config, graph)))
    rows = [["", *row_of(case, bits, files, logits, labels, feed)] for bits in widths]
    top1 = 100 * float((logits["float"].argmax(1) == labels).mean())
    rows[0][0] = f"{case.model} (float top-1 {top1:.2f}, load {load_time(model):.0f} ms)"
    return rows


def main() -> None:
    """Measure every model that the folder holds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--bits", default=",".join(map(str, range(1, 17))), help="widths, as 8,6,4")
    parser.add_argument("--images", type=int, default=0, help="validation images; 0: all")
    parser.add_argument("--only", default="", help="models whose name contains this")
    options = parser.parse_args()
    widths = [int(word) for word in options.bits.split(",")]
    cases = [
        c
        for c in CASES
        if options.only in c.model and (options.zoo / "models" / f"{c.model}.onnx").exists()
    ]
    if not cases:
        parser.exit(2, f"bench: {options.zoo} holds none of the benchmark models\n")
    shown = Table(*COLUMNS, title="weights in few bits, at load, per channel, the rest float")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(case, options.zoo, Path(folder), widths, options.images):
                shown.add_row(*row)
    Console(width=160).print(shown)


if __name__ == "__main__":
    main()
