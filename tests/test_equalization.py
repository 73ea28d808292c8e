"""One scale a weight tensor: the float function stays, what is forbidden stays away, files follow from their Plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import (
    IMAGE,
    Net,
    batch_norm,
    both,
    chain,
    clip,
    config_text,
    conv,
    depthwise,
    gemm,
    op,
    quantize,
    run,
    samples_for,
)

from ptqlit import Config, apply, convert
from ptqlit.backends.cpu import CPU
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import open_session
from ptqlit.pipeline import Flags, factors_of, key_of
from ptqlit.quantizers.equalization import equalize
from ptqlit.storage.apply import scale_channels

RELU, PER_LAYER = op("Relu"), "per_channel=false\n"


def uneven(net: Net, x: str) -> str:
    """A BatchNormalization whose channels differ by a factor of up to a thousand."""
    channels = net.shape(x)[1]
    gain = 10 ** net.random.uniform(-1.5, 1.5, channels)
    numbers = [gain, net.normal(channels), net.normal(channels), np.ones(channels)]
    return net.op("BatchNormalization", x, *[net.const(np.float32(n)) for n in numbers])


NARROW, WIDE = [conv(4), uneven, RELU], [conv(8), uneven, RELU]
CASES = {  # steps, what has factors, the shape of the input
    "two": ([*WIDE, conv(4)], 2, IMAGE),
    "without a Relu": ([conv(8), uneven, conv(4)], 2, IMAGE),
    "two Relus": ([*WIDE, RELU, conv(4)], 2, IMAGE),
    "without biases": ([conv(8, bias=False), RELU, conv(4, bias=False)], 2, IMAGE),
    "a chain": ([*WIDE, *NARROW, *WIDE, conv(2)], 4, IMAGE),
    "depthwise": ([*WIDE, depthwise(), uneven, RELU, conv(4)], 3, IMAGE),
    "two depthwise": ([*WIDE, depthwise(), RELU, depthwise(), uneven, conv(4)], 4, IMAGE),
    "depthwise first": ([depthwise(), uneven, RELU, conv(4)], 2, IMAGE),
    "depthwise last": ([conv(4), uneven, RELU, depthwise()], 2, IMAGE),
    "depthwise with more outputs": ([*NARROW, conv(8, group=4), uneven, RELU, conv(4)], 3, IMAGE),
    "groups": ([conv(8, group=1), uneven, RELU, conv(6, group=2), uneven, conv(4)], 3, IMAGE),
    "one dimension": ([*WIDE, conv(4)], 2, ("n", 3, 12)),
    "three dimensions": ([*WIDE, conv(4)], 2, ("n", 3, 5, 5, 5)),
    "Gemm": ([gemm(32), uneven, RELU, gemm(24, trans_b=0), uneven, RELU, gemm(5)], 3, ("n", 16)),
    "Gemm without bias": ([gemm(12), RELU, gemm(9, trans_b=0), RELU, gemm(5, bias=None)], 3, ("n", 16)),
    "Clip without an upper end": ([*WIDE[:2], op("Clip", np.float32(0)), conv(4)], 2, IMAGE),
    "Relu6": ([*WIDE[:2], clip(0, 6), conv(4)], 0, IMAGE),
    "Clip not from 0": ([*WIDE[:2], op("Clip", np.float32(-1)), conv(4)], 0, IMAGE),
    "Sigmoid": ([*WIDE[:2], op("Sigmoid"), conv(4)], 0, IMAGE),
    "two readers": ([*WIDE, both("Add", [conv(4)], [conv(4)])], 0, IMAGE),
    "a residual Add": ([*WIDE, both("Add", [conv(8)], []), conv(4)], 0, IMAGE),
    "ConvTranspose": ([op("ConvTranspose", np.ones((3, 8, 2, 2), np.float32)), RELU, conv(4)], 0, IMAGE),
}  # fmt: skip


def largest_difference(graph, other) -> float:
    """Of all outputs for a few samples, relative to the largest output."""
    sessions = [open_session(g.model) for g in (graph, other)]
    worst = 0.0
    for feed in samples_for(onnx.load_from_string(serialized(graph)), 3):
        for one, two in zip(*(session.run(None, feed) for session in sessions)):
            worst = max(worst, float(np.abs(one - two).max() / np.abs(one).max()))
    return worst


def serialized(graph) -> bytes:
    """The float model of a graph."""
    import onnx_ir as ir

    return ir.to_proto(graph.copy_model()).SerializeToString()


@pytest.mark.parametrize("name", CASES)
def test_the_float_function_stays(name):
    steps, count, shape = CASES[name]
    graph = prepare(chain(*steps, shape=shape))
    factors, notes = equalize(graph)
    assert len(factors) == len({f.node for f in factors}) == count
    assert count or name == "ConvTranspose" or notes[0].startswith("per_channel=false: 0 of ")
    before = serialized(graph)
    assert largest_difference(graph, scale_channels(graph, factors)) < 1e-4
    assert serialized(graph) == before


def test_an_output_between_two_layers_is_left_alone():
    net = Net()
    first = run(net, net.input("x", IMAGE), *WIDE)
    graph = prepare(net.model(run(net, first, conv(4)), first))
    assert equalize(graph)[0] == ()
    assert "a model output (1: " in equalize(graph)[1][0]


def test_a_weight_that_two_layers_share():
    net = Net()
    x, shared = net.input("x", IMAGE), net.const(net.normal(3, 3, 1, 1))
    for _ in range(3):
        x = net.op("Relu", net.op("Conv", x, shared))
    graph = prepare(net.model(net.op("Conv", x, shared)))
    factors, _ = equalize(graph)
    assert len(factors) == 4
    assert largest_difference(graph, scale_channels(graph, factors)) < 1e-4


@pytest.mark.parametrize("size", [0, 1e-45, 1e-30, 1e30, 3e38, np.inf, np.nan])
def test_factors_are_finite_whatever_the_weights(size):
    net = Net()
    weight = net.normal(8, 3, 1, 1)
    with np.errstate(over="ignore"):
        weight[:3] *= np.float32(size)
    x = net.op("Relu", net.op("Conv", net.input("x", IMAGE), net.const(weight)))
    for plan in equalize(prepare(net.model(conv(4)(net, x))))[0]:
        for side in (plan.outputs, plan.inputs):
            assert side is None or (np.isfinite(side).all() and (side > 0).all())
            assert side is None or side.max() <= side.min() * 64**2 * 1.001


@pytest.mark.parametrize("name", ["a chain", "depthwise", "groups", "Gemm", "one dimension"])
def test_equalized_is_better_than_not(name, tmp_path, monkeypatch):
    steps, count, shape = CASES[name]
    model = chain(*steps, shape=shape)
    result = quantize(model, tmp_path, more=PER_LAYER)
    assert result.table.problems == [] and len(result.plan.factors) == count
    scales = {t.scale.shape for t in result.plan.tensors if t.role in ("weight", "bias")}
    assert scales == {()}
    monkeypatch.setattr("ptqlit.pipeline.equalize", lambda graph: ((), ()))
    plain = quantize(model, tmp_path, more=PER_LAYER)
    assert result.quality > plain.quality + 2, (result.quality, plain.quality)


def test_a_file_from_its_plan_alone(tmp_path):
    model = chain(*CASES["depthwise"][0])
    config = Config.from_text(config_text(more=PER_LAYER))
    made = convert(
        model, config, tmp_path / "a", samples=samples_for(model), plan=tmp_path / "p.json"
    )
    again = apply(tmp_path / "p.json", model, tmp_path / "b")
    assert made.plan.factors and again.path.read_bytes() == made.path.read_bytes()


def test_a_backend_that_does_without(tmp_path):
    model, config = chain(*WIDE, conv(4)), Config.from_text(config_text(more=PER_LAYER))
    other = replace(CPU, name="DSP", equalize=False)
    plan = convert(model, config, tmp_path / "a", samples=samples_for(model), backend=other).plan
    assert plan.factors == () and not [n for n in plan.notes if "per_channel" in n]
    assert convert(model, config, tmp_path / "b", samples=samples_for(model)).plan.factors


def test_bias_overflow_and_skipped_layers_with_one_scale(tmp_path):
    net = Net()
    weight, bias = net.const(net.normal(4, 3, 1, 1, scale=1e-9)), net.const(np.float32([50] * 4))
    x = net.op("Relu", net.op("Conv", net.input("x", IMAGE), weight, bias, name="first"))
    result = quantize(net.model(conv(4)(net, x)), tmp_path, more=PER_LAYER)
    assert result.table.problems == [] and result.quality > 20
    kept = quantize(chain(*WIDE, conv(4)), tmp_path, skip="Conv0", more=PER_LAYER)
    assert kept.plan.node("Conv0").decision == "float" and kept.plan.factors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in a file, and raw samples for it."""
    place = tmp_path_factory.mktemp("data")
    onnx.save(chain(*WIDE, conv(4), batch_norm(), shape=(1, 3, 12, 12)), place / "m.onnx")
    (place / "calib").mkdir()
    for number in range(6):
        values = np.random.default_rng(number).normal(size=(1, 3, 12, 12)).astype(np.float32)
        (place / "calib" / f"{number}.bin").write_bytes(values.tobytes())
    return place


def of_files(folder, per_channel: str = "false") -> Config:
    """A configuration for the files."""
    data = "[data_preprocess_param]\ncalibrate_path=x:calib\ncalibrate_size=6\ninput_type=BIN\n"
    return Config.from_text(config_text(more=f"per_channel={per_channel}\n{data}"), "c.cfg", folder)


def test_kept_statistics_are_those_of_the_factors(folder, tmp_path):
    flags, files = Flags(statistics_file=str(tmp_path / "s.npz")), []
    for place, word in enumerate(["true", "false", "false"]):
        made = convert(folder / "m.onnx", of_files(folder, word), tmp_path / str(place), flags=flags)
        files.append(made.path.read_bytes())
    alone = convert(folder / "m.onnx", of_files(folder), tmp_path / "alone").path.read_bytes()
    assert files[1] == files[2] == alone != files[0]
    graph, config = prepare(folder / "m.onnx"), of_files(folder)
    factors, _ = factors_of(graph, config, CPU)
    fewer = (replace(factors[0], outputs=factors[0].outputs * 2), *factors[1:])
    keys = {key_of(graph, config, flags, some) for some in (factors, fewer, ())}
    assert len(keys) == 3


def test_workers_scale_the_channels_too(folder, tmp_path):
    pytest.importorskip("dask.distributed")
    here = convert(folder / "m.onnx", of_files(folder), tmp_path / "here")
    flags = Flags(cluster="local:2")
    there = convert(folder / "m.onnx", of_files(folder), tmp_path / "there", flags=flags)
    assert here.plan.factors and there.path.read_bytes() == here.path.read_bytes()
