"""Convert a model of more than 2 GB for real: load, calibrate and write it through paths.

    python tools/bench_large.py [--folder FOLDER]

Nine layers of 8192 x 8192 float32 weights are 2.4 GB. The first conversion quantizes all of them
into one file; the second leaves all but one in float, so that the written model is over 2 GB too.
Needs 6 GB of disk and 10 GB of memory.
"""
from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import ptqlit
from ptqlit.cli import size_of
from ptqlit.model.runtime import open_session
from ptqlit.pipeline import Flags, convert

WIDTH, LAYERS = 8192, 9


def build(path: Path) -> None:
    """A stack of Gemm and Relu with weights that keep the size of what passes."""
    rng, nodes, weights, source = np.random.default_rng(0), [], [], "x"
    for place in range(LAYERS):
        weight = rng.standard_normal((WIDTH, WIDTH), np.float32) * np.float32((2 / WIDTH) ** 0.5)
        weights.append(numpy_helper.from_array(weight, f"w{place}"))
        nodes.append(helper.make_node("Gemm", [source, f"w{place}"], [f"g{place}"], f"gemm{place}"))
        nodes.append(helper.make_node("Relu", [f"g{place}"], [f"r{place}"], f"relu{place}"))
        source = f"r{place}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in ("x", source)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def one(model: Path, target: Path, skip: str, samples: list[dict]) -> None:
    """Convert once and compare the result with the float model."""
    config = ptqlit.Config.from_text(
        f"[common_quant_param]\nquant_type=FULL_QUANT\nskip_quant_node={skip}\n"
        f"workspace={target.parent}\n" if skip else
        f"[common_quant_param]\nquant_type=FULL_QUANT\nworkspace={target.parent}\n")
    start = time.perf_counter()
    done = convert(model, config, target, samples=samples, progress=False, flags=Flags(infer=True))
    seconds = time.perf_counter() - start
    wanted, got = (open_session(p).run(None, samples[0])[0] for p in (model, done.path))
    noise = 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum())
    print(f"{size_of(model) / 1e9:.2f} GB -> {size_of(done.path) / 1e9:.2f} GB in {seconds:.0f} s; "
          f"{done.table.found} of {done.table.planned} kernels; SQNR {noise:.1f} dB", flush=True)


def main() -> None:
    """Build the model and convert it twice."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="where the files go; a temporary folder by default")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_normal((1, WIDTH), np.float32)} for _ in range(4)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = Path(folder) / "large.onnx"
        build(model)
        one(model, Path(folder) / "int8.onnx", "", samples)
        one(model, Path(folder) / "mixed.onnx", ",".join(f"gemm{p}" for p in range(1, LAYERS)),
            samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
