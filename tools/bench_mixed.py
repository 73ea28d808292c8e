"""Mixed bits on a folder of real models: stored bits against the entropy, and what the outputs lose.

    python tools/bench_mixed.py --zoo FOLDER [--init-scale 0.02] [--only WORD] [--no-tune]

FOLDER is that of tools/bench.py. Stored bits are those of the arrays in the file; `arrays` chooses the
forms by the arrays alone, without a price for the operators that unpack them. The cosine is the mean
over 100 validation images, of the tensor before a final Softmax. The last lines are those of auto_tune.
"""
from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import CASES, Case, all_logits, config_of, validation
from rich.console import Console
from rich.table import Table

from ptqlit.arithmetic.forms import PACKED_OPSET, choose_form
from ptqlit.arithmetic.measure import cosine
from ptqlit.config.file import Config
from ptqlit.model.graph import Graph, constant, prepare
from ptqlit.model.plan import Plan
from ptqlit.pipeline import convert
from ptqlit.reports.inspect import inspect_model
from ptqlit.samples.image import image_samples
from ptqlit.storage.pairs import constant_codes
from ptqlit.storage.weights import widened

IMAGES = 100


@dataclass(frozen=True)
class Limit:
    """What is promised at a relative error of 0.02."""

    above: float  # stored bits over the entropy, per cent, at most
    cosine: float  # of the outputs, at least


LIMITS = {
    "mobilenet_v1_0.75_224": Limit(9, 0.96),
    "mobilenet_v2_1.0_224": Limit(9, 0.95),
    "squeezenet1.1_227": Limit(9, 0.999),
    "resnet20_cifar10": Limit(13, 0.999),
}
COLUMNS = ("model", "stored bits", "arrays", "entropy", "above %", "file/float", "cosine", "bits", "outputs")


def mixed_config(keys: str) -> Config:
    """All weights in mixed bits."""
    common = "quant_type=WEIGHT_QUANT\nbit_num=0\nmin_quant_weight_channel=0"
    return Config.from_text(f"[common_quant_param]\n{common}\n[mixed_bit_weight_quant_param]\n{keys}\n")


def bits_by_arrays(graph: Graph, plan: Plan) -> float:
    """Stored bits a weight with forms that are the smallest by their arrays alone."""
    opset = max(PACKED_OPSET, graph.model.graph.opset_imports[""])
    stored = count = 0
    for tensor in plan.tensors:
        array = constant(graph.model.graph.initializers[tensor.name])
        codes = constant_codes(widened(array), tensor)
        stored += choose_form(codes, opset, 0).stored
        count += codes.size
    return 8 * stored / count


def mean_cosine_of(case: Case, zoo: Path, graph: Graph, files: dict[str, Path]) -> float:
    """The mean cosine of the outputs over some validation images."""
    pictures, _ = validation(case, zoo, IMAGES)
    logits = all_logits(case, config_of(case, zoo), graph, pictures, files)
    return float(np.mean([cosine(a, b) for a, b in zip(logits["float"], logits["mixed"])]))


def measure(case: Case, zoo: Path, scale: float, folder: Path) -> list[str]:
    """The row of one model."""
    model = zoo / "models" / f"{case.model}.onnx"
    graph = prepare(model)
    config = mixed_config(f"init_scale={scale}")
    path, plan, _ = convert(model, config, folder / case.model, progress=False)
    found = inspect_model(path)
    bits, bound = found.mean("each"), found.mean("entropy")
    above, limit = 100 * (bits / bound - 1), LIMITS[case.model]
    alike = mean_cosine_of(case, zoo, graph, {"float": model, "mixed": path})
    words = ["-", "-"]
    if scale == 0.02:
        words = ["ok" if kept else "MISSED" for kept in (above <= limit.above, alike >= limit.cosine)]
    size = path.stat().st_size / model.stat().st_size
    numbers = [f"{bits:.2f}", f"{bits_by_arrays(graph, plan):.2f}", f"{bound:.2f}", f"{above:.1f}"]
    return [case.model, *numbers, f"{size:.3f}", f"{alike:.5f}", *words]


def tuned(case: Case, zoo: Path, folder: Path) -> str:
    """The line of auto_tune on calibration images."""
    model = zoo / "models" / f"{case.model}.onnx"
    samples = image_samples(config_of(case, zoo), prepare(model))
    config, target = mixed_config("auto_tune=true"), folder / f"{case.model}_tuned"
    return convert(model, config, target, samples=samples, progress=False).plan.notes[0]


def main() -> None:
    """Measure every model that the folder holds, print the table and the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models/ and images")
    parser.add_argument("--init-scale", type=float, default=0.02, help="relative error of each weight")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--no-tune", action="store_true", help="leave auto_tune out")
    options = parser.parse_args()
    cases = [c for c in CASES if options.only in c.model and (options.zoo / "models" / f"{c.model}.onnx").exists()]
    if not cases:
        parser.exit(2, f"bench: {options.zoo} holds none of the benchmark models\n")
    shown, lines = Table(*COLUMNS, title=f"mixed bits, relative error {options.init_scale:g}"), []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            shown.add_row(*measure(case, options.zoo, options.init_scale, Path(folder)))
            if not options.no_tune:
                lines.append(f"{case.model}: {tuned(case, options.zoo, Path(folder))}")
    Console(width=160).print(shown)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
