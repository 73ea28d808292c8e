"""Compare our int8 files with those of onnxruntime's quantize_static on a folder of real models.

    python tools/bench.py --zoo FOLDER [--out DIR] [--images N] [--only WORD]

FOLDER holds models/*.onnx and the images named below. Both tools see the same 100 calibration
images and are measured on all validation images, on the tensor before a final Softmax. Latencies are
ratios of paired runs on one thread, best of three. Figures depend on the processor and on the
versions of onnxruntime and OpenCV: compare within one run only.
"""
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.config.file import Config
from ptqlit.model.graph import Graph, prepare
from ptqlit.model.runtime import logits_model, open_session, paired_latency
from ptqlit.pipeline import convert
from ptqlit.samples.image import image_samples, read_image

IMAGENET = """
normalize_mean=[127.5, 127.5, 127.5]
normalize_std=[127.5, 127.5, 127.5]
resize_width=256
resize_height=256
resize_method=LINEAR
center_crop_width=224
center_crop_height=224
image_to_format=RGB
"""
CAFFE = """
normalize_mean=[104, 117, 123]
normalize_std=[1, 1, 1]
resize_width=227
resize_height=227
resize_method=LINEAR
image_to_format=BGR
"""
CIFAR = """
normalize_mean=[123.675, 116.28, 103.53]
normalize_std=[58.395, 57.12, 57.375]
image_to_format=RGB
"""


@dataclass(frozen=True)
class Case:
    """One model of the folder."""

    model: str
    input: str
    images: str
    preprocess: str
    agreement: float  # the least that we promise, per cent
    decibel: float
    first_class: int = 0  # outputs before it are no classes


CASES = (
    Case("mobilenet_v1_0.75_224", "input", "images", IMAGENET, 95.0, 23.0),
    Case("mobilenet_v2_1.0_224", "input", "images", IMAGENET, 96.5, 19.8, 1),
    Case("squeezenet1.1_227", "data", "images", CAFFE, 93.0, 32.0),
    Case("resnet20_cifar10", "input", "cifar10", CIFAR, 99.0, 31.0),
)


def config_of(case: Case, zoo: Path, correction: bool = True) -> Config:
    """The configuration of a case: MAX_MIN, per channel, 100 images."""
    text = f"""[common_quant_param]
quant_type=FULL_QUANT
[data_preprocess_param]
calibrate_path={case.input}:{case.images}/calib
calibrate_size=100
input_type=IMAGE
{case.preprocess}
[full_quant_param]
activation_quant_method=MAX_MIN
bias_correction={str(correction).lower()}
"""
    return Config.from_text(text, f"{case.model}.cfg", zoo)


class Reader:
    """Calibration samples in the form that quantize_static wants."""

    def __init__(self, samples):
        self.items = iter(samples)

    def get_next(self):
        return next(self.items, None)


def quantize_static_file(model: Path, samples, folder: Path) -> Path:
    """The file that onnxruntime's own tool makes from the same images."""
    import logging

    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    prepared, written = folder / "prepared.onnx", folder / "static.onnx"
    quant_pre_process(str(model), str(prepared))
    quantize_static(
        str(prepared), str(written), Reader(samples), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    logging.disable(logging.NOTSET)
    return written


def validation(case: Case, zoo: Path, limit: int) -> tuple[list[Path], np.ndarray]:
    """Validation images and their classes."""
    rows = (zoo / case.images / "labels.csv").read_text().splitlines()[1:]
    pairs = [row.split(",")[:2] for row in rows if row.startswith("val/")]
    pairs = pairs[: limit or len(pairs)]
    labels = np.array([int(label) + case.first_class for _, label in pairs])
    return [zoo / case.images / name for name, _ in pairs], labels


def batches(case: Case, config: Config, graph: Graph, files: list[Path]) -> Iterator[dict]:
    """Preprocessed validation images, ten at a time."""
    wanted = graph.inputs[0]
    for start in range(0, len(files), 10):
        arrays = [read_image(path, wanted, config.data) for path in files[start : start + 10]]
        yield {case.input: np.concatenate(arrays)}


def all_logits(case: Case, config: Config, graph: Graph, files: list[Path], models: dict) -> dict:
    """Logits of several models over the same images, decoded once."""
    sessions = {name: open_session(logits_model(path), threads=2) for name, path in models.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in models}
    total = -(-len(files) // 10)
    stream = batches(case, config, graph, files)
    for feed in tqdm(stream, total=total, desc=case.model, disable=None, leave=False):
        for name, session in sessions.items():
            found[name].append(session.run(None, feed)[0])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def measure(case: Case, zoo: Path, folder: Path, limit: int) -> list[str]:
    """One row of the table for each file."""
    model, config = zoo / "models" / f"{case.model}.onnx", config_of(case, zoo)
    graph = prepare(model)
    ours, _, table = convert(model, config, folder / f"{case.model}_int8")
    plain = convert(model, config_of(case, zoo, False), folder / f"{case.model}_plain").path
    static = quantize_static_file(model, image_samples(config, graph), folder)
    files, labels = validation(case, zoo, limit)
    models = {"float": model, "ptqlit": ours, "without correction": plain, "quantize_static": static}
    logits = all_logits(case, config, graph, files, models)
    feed = next(iter(image_samples(config, graph)))
    sessions = {name: open_session(path) for name, path in models.items()}
    fast = sessions["ptqlit"]
    ratios = [paired_latency(fast, sessions[name], feed, 6) for name in ("float", "quantize_static")]
    return rows_of(case, logits, labels, table, ratios)


def rows_of(case: Case, logits: dict, labels: np.ndarray, table, ratios: list[float]) -> list[list[str]]:
    """Text for the table."""
    rows = []
    for name in ("ptqlit", "without correction", "quantize_static"):
        same, noise = 100 * agreement(logits["float"], logits[name]), sqnr(logits["float"], logits[name])
        top1 = 100 * float((logits[name].argmax(1) == labels).mean())
        row = [case.model if name == "ptqlit" else "", name, f"{top1:.2f}", f"{same:.2f}", f"{noise:.2f}"]
        if name == "ptqlit":
            good = same >= case.agreement and noise >= case.decibel
            row += [f"{case.agreement:.1f} / {case.decibel:.1f} {'ok' if good else 'MISSED'}"]
            row += [f"{table.found}/{table.planned}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}"]
        rows.append(row)
    top1 = 100 * float((logits["float"].argmax(1) == labels).mean())
    rows[0][0] += f" (float top-1 {top1:.2f})"
    return rows


def table_options(document: str) -> argparse.ArgumentParser:
    """The arguments of every table over the models of a folder."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--images", type=int, default=0, help="validation images; 0: all")
    parser.add_argument("--only", default="", help="models whose name contains this")
    return parser


def chosen(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[Case]]:
    """The arguments, and the models asked for that the folder holds; ends the program without any."""
    options = parser.parse_args()
    cases = [c for c in CASES if options.only in c.model and (options.zoo / "models" / f"{c.model}.onnx").exists()]
    if not cases:
        parser.exit(2, f"{Path(parser.prog).stem}: {options.zoo} holds none of the benchmark models\n")
    return options, cases


def main() -> None:
    """Measure every model that the folder holds and print the table."""
    parser = table_options(__doc__)
    parser.add_argument("--out", type=Path, help="keep the files here")
    options, cases = chosen(parser)
    columns = ["model", "file", "top-1 %", "agreement %", "SQNR dB", "at least", "kernels", "time/float", "time/static"]
    shown = Table(*columns, title="full int8, MAX_MIN, per channel, 100 calibration images")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            for row in measure(case, options.zoo, options.out or Path(folder), options.images):
                shown.add_row(*row)
    Console(width=150).print(shown)


if __name__ == "__main__":
    main()
