"""Real models: PTQLIT_ZOO=folder runs four image models over all their pictures (minutes); without it nothing runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from ptqlit import Config, convert
from ptqlit.arithmetic.measure import agreement, sqnr
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import kernels_of, logits_model, open_session
from ptqlit.samples.image import read_image

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


def config_of(name: str) -> Config:
    """The configuration that the folder's README gives for a model, with 100 pictures."""
    section = (ZOO / "README.md").read_text().split(f"### models/{name}.onnx")[1]
    data = re.search(r"```ini\n(.*?)```", section, re.S).group(1)
    data = re.sub(r"calibrate_size=\d+", "calibrate_size=100", data)
    return Config.from_text(
        f"[common_quant_param]\nquant_type=FULL_QUANT\n{data}", "README.md", ZOO
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
