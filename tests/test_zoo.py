"""Real models: PTQLIT_ZOO=folder runs four image models over all their pictures (minutes); without it nothing runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from ptqlit import Config, convert
from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import kernels_of, logits_model, open_session
from ptqlit.quantizers.equalization import equalize
from ptqlit.samples.image import image_samples, read_image
from ptqlit.storage.apply import scale_channels

ZOO = Path(os.environ.get("PTQLIT_ZOO", ""))
pytestmark = pytest.mark.skipif(
    "PTQLIT_ZOO" not in os.environ, reason="set PTQLIT_ZOO to a folder of models"
)

GOALS = {  # model: agreement with float, SQNR of the logits in dB, both at least
    "mobilenet_v1_0.75_224": (0.950, 23.0),
    "mobilenet_v2_1.0_224": (0.965, 19.8),
    "squeezenet1.1_227": (0.930, 32.0),
    "resnet20_cifar10": (0.990, 31.0),
}
LINKED = {  # layers with factors, after Relu6 has become Relu
    "mobilenet_v1_0.75_224": 27,
    "mobilenet_v2_1.0_224": 52,
    "squeezenet1.1_227": 0,
    "resnet20_cifar10": 18,
}


def config_of(name: str, full: str = "") -> Config:
    """The configuration that the folder's README gives for a model, with 100 pictures."""
    section = (ZOO / "README.md").read_text().split(f"### models/{name}.onnx")[1]
    data = re.search(r"```ini\n(.*?)```", section, re.S).group(1)
    data = re.sub(r"calibrate_size=\d+", "calibrate_size=100", data)
    return Config.from_text(
        f"[common_quant_param]\nquant_type=FULL_QUANT\n{data}[full_quant_param]\n{full}",
        "README.md",
        ZOO,
    )


def pictures(config: Config) -> list[Path]:
    """The pictures to evaluate on: the folder `val` beside the one of the calibration."""
    return sorted((ZOO / config.data.calibrate_path[0][1]).parent.joinpath("val").iterdir())


def logits(models: list[bytes], config: Config, graph) -> list[np.ndarray]:
    """What each model gives for every picture."""
    sessions, wanted = [open_session(model, threads=2) for model in models], graph.inputs[0]
    rows = []
    for path in pictures(config):
        feed = {wanted.name: read_image(path, wanted, config.data)}
        rows.append([session.run(None, feed)[0].reshape(-1) for session in sessions])
    return [np.stack(column) for column in zip(*rows)]


@pytest.mark.parametrize("name", GOALS)
def test_models(name, tmp_path):
    source, config = ZOO / "models" / f"{name}.onnx", config_of(name)
    path, plan, table = convert(source, config, tmp_path / "q", progress=False)
    assert table.problems == []
    layers = [n for n in plan.nodes if n.operator in ("Conv", "Gemm")]
    assert layers and all(n.decision == "integer" for n in layers)
    assert not [
        k for k in kernels_of(path) if k.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm")
    ]
    before, after = logits([logits_model(source), logits_model(path)], config, prepare(source))
    found = agreement(before, after), sqnr(before, after)
    print(f"{name}: agreement {found[0]:.2%}, {found[1]:.1f} dB over {len(before)} pictures")
    assert found[0] >= GOALS[name][0] and found[1] >= GOALS[name][1], found


def without_caps(source: Path) -> onnx.ModelProto:
    """The model with Relu in the place of Relu6."""
    model = onnx.load(source)
    for node in (node for node in model.graph.node if node.op_type == "Clip"):
        node.op_type = "Relu"
        del node.input[1:]
    return model


@pytest.mark.parametrize("name", GOALS)
def test_equalized_floats_are_the_same(name):
    graph, config = prepare(without_caps(ZOO / "models" / f"{name}.onnx")), config_of(name)
    factors, _ = equalize(graph)
    assert len(factors) == LINKED[name]
    pair = [open_session(g.model) for g in (graph, scale_channels(graph, factors))]
    for sample in list(image_samples(config, graph))[:5]:
        for one, other in zip(*(session.run(None, sample) for session in pair)):
            assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


@pytest.mark.parametrize("name", ["squeezenet1.1_227", "resnet20_cifar10"])
def test_one_scale_a_layer(name, tmp_path, monkeypatch):
    source, layer = ZOO / "models" / f"{name}.onnx", config_of(name, "per_channel=false\n")
    files = [convert(source, config_of(name), tmp_path / "channel", progress=False).path]
    files.append(convert(source, layer, tmp_path / "layer", progress=False).path)
    monkeypatch.setattr("ptqlit.pipeline.equalize", lambda graph: ((), ()))
    files.append(convert(source, layer, tmp_path / "plain", progress=False).path)
    models = [logits_model(path) for path in (source, *files)]
    before, *after = logits(models, layer, prepare(source))
    same, noise = [agreement(before, a) for a in after], [sqnr(before, a) for a in after]
    print(f"{name}: channel, equalized, not: {same}, {noise}")
    assert same[1] >= same[0] - 0.03 and noise[1] >= noise[2] - 0.3


def test_relu6_cannot_be_equalized(tmp_path):
    name = "mobilenet_v1_0.75_224"
    source, config = ZOO / "models" / f"{name}.onnx", config_of(name, "per_channel=false\n")
    path, plan, table = convert(source, config, tmp_path / "q", progress=False)
    assert table.problems == [] and plan.factors == ()
    assert any("0 of 27" in note and "a Clip with an upper bound (27: " in note for note in plan.notes)
