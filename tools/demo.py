"""Convert the digits model and compare int8 with float, in ten seconds.

    python tools/demo.py [--out DIR]

Writes digits_int8.onnx and digits.png (float against int8, layer by layer), and prints one table.
All measures are taken on pictures that neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import ptqlit
from ptqlit.arithmetic.measure import agreement, paired_top1, sqnr
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import open_session, paired_latency, run_batches
from ptqlit.reports.distribution import Codes, SideBySide
from ptqlit.samples.image import read_image
from ptqlit.storage.apply import apply_plan

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "data" / "digits"
MODEL, CONFIG = DIGITS / "model.onnx", DIGITS / "full_quant.cfg"
LAYER_IMAGES = 100  # inner tensors are large: compare them on the first test pictures
CLOUD_POINTS = 2000  # points in one cloud of the picture


class Layer(NamedTuple):
    """The same tensor in both models."""

    name: str
    reference: np.ndarray
    other: np.ndarray

    @property
    def sqnr(self) -> float:
        return sqnr(self.reference, self.other)


# ---------------------------------------------------------------- both models


def test_set() -> tuple[np.ndarray, np.ndarray]:
    """Read the test pictures, prepared as the configuration says, and their classes."""
    wanted, data = prepare(MODEL).inputs[0], ptqlit.Config.from_file(CONFIG).data
    rows = np.loadtxt(DIGITS / "test" / "labels.csv", dtype=str, delimiter=",", skiprows=1)
    images = [read_image(DIGITS / "test" / name, wanted, data) for name in rows[:, 0]]
    return np.concatenate(images), rows[:, 1].astype(int)


def logits_of(path: Path, images: np.ndarray) -> np.ndarray:
    """Run a model."""
    return run_batches(open_session(path), [{"input": images}])


def compare_layers(plan: ptqlit.Plan, images: np.ndarray) -> list[Layer]:
    """Pair every tensor that int8 stores as codes with its float twin, and the logits."""
    graph = prepare(MODEL)
    names = [t.name for t in plan.tensors if t.role == "activation" and t.method != "shared"]
    both = SideBySide(graph, plan, apply_plan(graph, plan))
    pairs = both.tensors({"input": images}, [*names[1:], "logits"])
    floats = {n: (f, q.floats if isinstance(q, Codes) else q) for n, (f, q) in pairs.items()}
    labels = (name.removesuffix("_out").removesuffix("_relu").removesuffix("_bn") for name in floats)
    return [Layer(label, *values) for label, values in zip(labels, floats.values())]


# ---------------------------------------------------------------- what is shown


def rows_of(conversion, logits: Layer, labels: np.ndarray, ratio: float) -> list[tuple]:
    """List what is measured, in float, in int8, and what that means."""
    top1, verified = paired_top1(logits.reference, logits.other, labels), conversion.table
    before, after = MODEL.stat().st_size / 1e6, conversion.path.stat().st_size / 1e6
    same, moved = (
        agreement(logits.reference, logits.other),
        f"{top1.lost} lost, {top1.gained} gained",
    )
    planned = f"of {verified.planned} planned, in the loaded file"
    return [
        ("top-1", f"{top1.reference:.1%}", f"{top1.other:.1%}", moved),
        ("same answer", "", f"{same:.1%}", "agreement with float"),
        ("SQNR of the logits", "", f"{logits.sqnr:.1f} dB", "40 dB: an error of a hundredth"),
        ("file", f"{before:.2f} MB", f"{after:.2f} MB", f"{before / after:.1f} times smaller"),
        ("time for a picture", "1.00", f"{ratio:.2f}", f"{1 / ratio:.2f} times faster (1 thread)"),
        ("integer kernels", "", f"{verified.found}", planned),
    ]


def show(rows: list[tuple], title: str) -> None:
    """Print the one table."""
    table = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("float", "right"), ("int8", "right"), ("", "left")):
        table.add_column(name, justify=justify)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def cloud(ax, layer: Layer, color: str) -> None:
    """Draw the values of one layer, float to the right, int8 upwards."""
    step = max(1, layer.reference.size // CLOUD_POINTS)
    x, y = (values.ravel()[::step] for values in (layer.reference, layer.other))
    ax.axline((0, 0), slope=1, color="0.8", lw=1, zorder=0)
    ax.plot(x, y, ".", ms=2.5, alpha=0.5, color=color)
    ax.set_title(f"{layer.name}: {layer.sqnr:.1f} dB", fontsize=9)
    ax.set(xlabel="float", ylabel="int8")


def bars(ax, layers: list[Layer], colors: dict[str, str]) -> None:
    """Draw the SQNR of every layer, in computing order from top to bottom."""
    names, decibels = [layer.name for layer in layers], [layer.sqnr for layer in layers]
    ax.barh(names, decibels, color=[colors.get(name, "tab:blue") for name in names])
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_title(f"float against int8, layer by layer ({LAYER_IMAGES} pictures)")
    ax.set_xlabel("SQNR in dB (more is better)")


def draw(layers: list[Layer], path: Path) -> None:
    """Write the picture: SQNR of every layer, and the values of the worst one and of the last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worst, last = min(layers, key=lambda layer: layer.sqnr), layers[-1]
    places, widths = [["bars", "worst"], ["bars", "last"]], [2, 1]
    shape = {"figsize": (9, 5.6), "width_ratios": widths, "layout": "constrained"}
    fig, axes = plt.subplot_mosaic(places, **shape)
    bars(axes["bars"], layers, {worst.name: "tab:red", last.name: "tab:green"})
    cloud(axes["worst"], worst, "tab:red")
    cloud(axes["last"], last, "tab:green")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> int:
    """Convert, measure, print and draw."""
    parser = argparse.ArgumentParser(description="Convert the shipped model and compare.")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the results")
    folder = parser.parse_args().out
    conversion = ptqlit.convert(MODEL, CONFIG, folder / "digits_int8")
    images, labels = test_set()
    logits = Layer("logits", *(logits_of(p, images) for p in (MODEL, conversion.path)))
    sessions = open_session(conversion.path), open_session(MODEL)
    ratio = paired_latency(*sessions, {"input": images[:1]}, seconds=1.5)
    rows = rows_of(conversion, logits, labels, ratio)
    show(rows, f"digits: {len(labels)} test pictures")
    layers = compare_layers(conversion.plan, images[:LAYER_IMAGES])
    draw(layers, folder / "digits.png")
    for path in (conversion.path, folder / "digits.png"):
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ptqlit.InputError as error:
        sys.exit(f"demo.py: {error}")
