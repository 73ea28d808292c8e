"""Sensitivity names the damaged node and the cause: in built models, and in PTQLIT_ZOO's with a layer damaged."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import numpy_helper
from ptqlit import InputError
from ptqlit.arithmetic.saturation import can_saturate
from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.kl import kl
from ptqlit.calibrators.max_min import Options, max_min
from ptqlit.calibrators.percentile import percentile
from ptqlit.model.graph import layer_of, prepare
from ptqlit.model.runtime import open_session
from ptqlit.quantizers.full import full_plan
from ptqlit.reports.sensitivity import Switches, sensitivity
from ptqlit.statistics.observe import observe
from ptqlit.storage.pairs import constant_codes

ZOO = Path(os.environ.get("PTQLIT_ZOO", ""))
zoo = pytest.mark.skipif(
    "PTQLIT_ZOO" not in os.environ, reason="set PTQLIT_ZOO to a folder of models"
)


def look(graph, data, method="MAX_MIN", calibrator=max_min, **more):
    """The table of a model."""
    statistics = observe(graph, data)
    plan = full_plan(graph, statistics, CPU, method, calibrator)
    return sensitivity(graph, plan, statistics, data, CPU, **more), plan


def names(row) -> set[str]:
    """The causes of a row."""
    return {cause.name for cause in row.causes}


def noise(shape, count=3, draw="normal"):
    """Random pictures."""
    rng = np.random.default_rng(0)
    make = rng.normal if draw == "normal" else lambda size: rng.standard_t(2.2, size) * 0.3
    return [{"x": make(size=shape).astype(np.float32)} for _ in range(count)]


def layer(net: Net, x: str, channels: int, name: str, times: dict, relu: bool = True) -> str:
    """A convolution; `times` are factors on channels: {c: on output c, -c: on input c}."""
    inputs = net.shape(x)[1]
    weight = net.normal(channels, inputs, 3, 3, scale=(2 / (9 * inputs)) ** 0.5)
    for place, factor in times.items():
        weight[place if place >= 0 else (slice(None), -place)] *= factor
    y = net.op("Conv", x, net.const(weight), name=name, pads=[1, 1, 1, 1])
    return net.op("Relu", y, name=f"{name}_relu") if relu else y


@pytest.mark.parametrize("damaged", ["b", "c"])
def test_a_damaged_layer_comes_first(damaged):
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    following = {"b": "c", "c": "d"}[damaged]
    for name in "abcd":
        times = {5: 40} if name == damaged else {-5: 1 / 40} if name == following else {}
        x = layer(net, x, 32, name, times)
    table, _ = look(prepare(net.model(x)), noise((1, 3, 16, 16)))
    first = table.rows[0]
    assert first.node == damaged and first.share > 0.5
    assert {"one channel dominates", "weights with an outlier channel"} <= names(first)
    assert first.causes[0].line == f"skip_quant_node={damaged},{following}"
    assert "channel 5 " in first.causes[0].evidence


def test_a_healthy_model_has_no_such_cause():
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    for name in "abcd":
        x = layer(net, x, 32, name, {})
    table, _ = look(prepare(net.model(x)), noise((1, 3, 16, 16)))
    assert all(names(row) <= {"pair sums can saturate"} for row in table.rows)
    assert abs(sum(row.share for row in table.rows) - 1) < 1e-9
    assert [row.sqnr for row in table.rows] == sorted(row.sqnr for row in table.rows)


def test_an_add_with_uneven_inputs_comes_first():
    net = Net(seed=4)
    x = net.input("x", (1, 3, 16, 16))
    small = layer(net, x, 32, "small", {}, relu=False)
    large = layer(net, x, 32, "large", {1: 100}, relu=False)
    y = net.op("Add", small, large, name="add")
    y = layer(net, y, 8, "last", {-1: 1 / 100}, relu=False)
    table, _ = look(prepare(net.model(y)), noise((1, 3, 16, 16)))
    assert table.rows[0].node == "add" and "inputs far apart" in names(table.rows[0])


def test_a_deep_cut_of_kl_comes_first():
    net = Net(seed=5)
    x = net.input("x", (1, 3, 64, 64))
    y = net.op("Conv", x, net.const(net.normal(8, 3, 1, 1)), name="tail")
    y = layer(net, y, 8, "last", {}, relu=False)
    data = noise((1, 3, 64, 64), 4, "tail")
    table, _ = look(prepare(net.model(y)), data, "KL", kl)
    assert table.rows[0].node == "tail" and "KL cut too deep" in names(table.rows[0])
    cause = next(c for c in table.rows[0].causes if c.name == "KL cut too deep")
    assert cause.line == "activation_quant_method=MAX_MIN"
    assert "KL cut too deep" in table.text() and table.frame().node[0] == "tail"
    after, _ = look(prepare(net.model(y)), data)
    assert "KL cut too deep" not in set().union(*map(names, after.rows))


# ---------------------------------------------------------------- the other causes


def chain_of_two(**more):
    """Two layers behind each other, and the samples."""
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    for name in "ab":
        x = layer(net, x, 8, name, more.get(name, {}))
    return prepare(net.model(x)), noise((1, 3, 16, 16))


def cause_of(table, node: str, name: str):
    """One cause of one node."""
    row = next(row for row in table.rows if row.node == node)
    return next(cause for cause in row.causes if cause.name == name)


def test_clipped_share():
    net = Net(seed=5)
    x = net.input("x", (1, 3, 64, 64))
    y = net.op("Conv", x, net.const(net.normal(8, 3, 1, 1)), name="tail")
    y = layer(net, y, 8, "last", {}, relu=False)
    narrow = partial(percentile, options=Options(percentile=99.0))
    graph, data = prepare(net.model(y)), noise((1, 3, 64, 64), 4, "tail")
    table, plan = look(graph, data, "PERCENTILE", narrow)
    cause = cause_of(table, "tail", "clipped share high")
    assert table.rows[0].node == "tail"
    assert cause.ready == "[full_quant_param] activation_quant_method=MAX_MIN"
    session, numbers = only_output(graph, 0), plan.activation(graph.nodes[0].outputs[0].name)
    values = np.concatenate([session.run(None, s)[0].ravel() for s in data])
    shown = re.search(r"([\d.]+)% of the values are clipped", cause.evidence).group(1)
    low, high = ((end - numbers.zero_point) * numbers.scale for end in (0, 255))
    step = numbers.scale  # what is less than a step beyond the end is rounded, not clipped
    assert abs(100 * np.mean((values < low - step) | (values > high + step)) - float(shown)) < 0.02
    again, _ = look(graph, data)
    assert "clipped share high" not in set().union(*map(names, again.rows))


def test_inputs_of_a_concat_far_apart():
    net = Net(seed=4)
    x = net.input("x", (1, 3, 16, 16))
    parts = [layer(net, x, 8, name, {}, relu=False) for name in ("small", "large")]
    parts[1] = net.op("Mul", parts[1], net.const(np.float32(100)), name="more")
    y = layer(net, net.op("Concat", *parts, name="join", axis=1), 8, "last", {}, relu=False)
    table, _ = look(prepare(net.model(y)), noise((1, 3, 16, 16)))
    cause = cause_of(table, "join", "inputs far apart")
    assert cause.line == "skip_quant_node=join,last" and "117 times" in cause.evidence


def test_one_scale_a_layer_for_weights_with_an_outlier():
    graph, data = chain_of_two(a={5: 40}, b={-5: 1 / 40})
    statistics = observe(graph, data)
    plan = full_plan(graph, statistics, CPU, "MAX_MIN", max_min, per_channel=False)
    table = sensitivity(graph, plan, statistics, data, CPU)
    cause = cause_of(table, "a", "weights with an outlier channel")
    assert cause.ready == "[full_quant_param] per_channel=true"
    alone = replace(CPU, per_channel=())
    table = sensitivity(graph, plan, statistics, data, alone)
    cause = cause_of(table, "a", "weights with an outlier channel")
    assert cause.ready == "[common_quant_param] skip_quant_node=a"


def test_large_weights_do_no_harm_where_what_they_read_is_small():
    net = Net(seed=3)
    x = layer(net, net.input("x", (1, 3, 16, 16)), 8, "a", {5: 1 / 4000})
    weight = net.normal(8, 8, 3, 3, scale=(2 / 72) ** 0.5)
    weight[2, 5] *= 400  # the only large weights of its channel read next to nothing
    x = net.op("Conv", x, net.const(weight), name="b", pads=[1, 1, 1, 1])
    sizes = np.abs(weight).max(axis=(1, 2, 3))
    assert sizes.argmax() == 2 and sizes[2] > 10 * np.median(sizes)
    table, _ = look(prepare(net.model(x)), noise((1, 3, 16, 16)))
    assert all(names(row) <= {"pair sums can saturate"} for row in table.rows)


def test_biases_at_the_end_of_int32():
    graph, data = chain_of_two()
    biased = [t for t in look(graph, data)[1].tensors if t.role == "bias"]
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    weight, bias = net.normal(8, 3, 1, 1), np.full(8, 1e6, np.float32)
    weight[0] = 1e-12
    y = net.op("Conv", x, net.const(weight), net.const(bias), name="heavy")
    graph = prepare(net.model(layer(net, y, 4, "last", {}, relu=False)))
    statistics = observe(graph, data)
    plan = full_plan(graph, statistics, CPU, "MAX_MIN", max_min)
    table = sensitivity(graph, plan, statistics, data, CPU)
    raised = cause_of(table, "heavy", "scales raised for the bias")
    assert "channels raised" in raised.evidence and not biased
    assert raised.ready == "[common_quant_param] skip_quant_node=heavy"
    tensors = tuple(
        replace(t, values=np.full_like(t.values, 2**31 - 1))
        if (t.role, t.node) == ("bias", "heavy")
        else t
        for t in plan.tensors
    )
    table = sensitivity(graph, replace(plan, tensors=tensors), statistics, data, CPU)
    full = cause_of(table, "heavy", "bias saturated")
    assert full.evidence.startswith("8 biases") and full.line == "skip_quant_node=heavy"


def test_many_zeros_ask_for_more_samples():
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    rare = np.full(8, -6, np.float32)
    y = net.op("Conv", x, net.const(net.normal(8, 3, 1, 1)), net.const(rare), name="rare")
    y = net.op("Relu", y, name="rare_relu")
    graph, data = prepare(net.model(layer(net, y, 4, "last", {}))), noise((1, 3, 16, 16))
    table, plan = look(graph, data)
    cause = cause_of(table, "rare", "many zeros")
    zeros = np.mean([only_output(graph, 1).run(None, s)[0] == 0 for s in data])
    assert f"{zeros:.1%} of the values are 0" in cause.evidence
    assert cause.ready == "[data_preprocess_param] calibrate_size=6"  # twice the samples
    plan = replace(plan, config="[data_preprocess_param]\ncalibrate_size=100\n")
    table = sensitivity(graph, plan, observe(graph, data), data, CPU)
    assert cause_of(table, "rare", "many zeros").line == "calibrate_size=200"


def only_output(graph, place: int):
    """A session of the model with the output of one node as its only one."""
    model = graph.copy_model()
    model.graph.outputs[:] = [list(model.graph)[place].outputs[0]]
    return open_session(model)


def test_pairs_that_saturate_are_a_warning_for_other_machines():
    graph, data = chain_of_two()
    table, plan = look(graph, data)
    cause = cause_of(table, "a", "pair sums can saturate")
    assert cause.elsewhere and cause.ready == cause.line == "--portable"
    codes = constant_codes(layer_of(graph.nodes[0]).weight, plan.of_node("a", "weight"))
    count = int(can_saturate(codes, 0, 1).sum())
    assert count and cause.evidence.startswith(f"{count} of 8 channels")
    statistics, safe = observe(graph, data), replace(CPU, portable=True)
    plan = full_plan(graph, statistics, safe, "MAX_MIN", max_min)
    table = sensitivity(graph, plan, statistics, data, safe)
    assert not any(row.causes for row in table.rows)


# ---------------------------------------------------------------- the runs


def test_runs_can_be_limited_and_samples_are_needed():
    net = Net(seed=3)
    x = net.input("x", (1, 3, 16, 16))
    for name in "ab":
        x = layer(net, x, 8, name, {})
    graph, data = prepare(net.model(x)), noise((1, 3, 16, 16))
    table, plan = look(graph, data, runs=1)
    assert len(table.rows) == 1 and table.rows[0].share == 1
    with pytest.raises(InputError, match="at least one"):
        sensitivity(graph, plan, observe(graph, data), [], CPU)


def test_switches_off_is_the_float_model_and_a_softmax_is_left_out():
    net = Net(seed=3)
    x = net.input("x", (1, 3, 8, 8))
    y = net.op("Flatten", layer(net, x, 4, "a", {}), name="flat")
    logits = net.op("Gemm", y, net.const(net.normal(256, 5)), name="fc")
    graph, data = prepare(net.model(net.op("Softmax", logits, name="soft"))), noise((1, 3, 8, 8))
    plan = full_plan(graph, observe(graph, data), CPU, "MAX_MIN", max_min)
    switches = Switches(graph, plan)
    off, on = switches.run(data[0])[0], switches.run(data[0], ["a", "fc"])[0]
    assert off.shape == (1, 5) and abs(off.sum() - 1) > 1e-3  # logits
    assert 0 < np.abs(on - off).max() < 0.1 * np.abs(off).max()


# ---------------------------------------------------------------- real models


def wreck(graph, first: str, factor: float) -> onnx.ModelProto:
    """The prepared model with one output channel of a layer times `factor`, undone in the layers behind it."""
    import onnx_ir as ir

    model = graph.copy_model()
    nodes = {node.name: node for node in model.graph}
    proto = ir.to_proto(model)
    tensors = {t.name: t for t in proto.graph.initializer}
    node = nodes[first]
    reader = next(iter(node.outputs[0].uses())).node
    for damaged, axis in ((node, 0), (reader, 1 if layer_of(reader).group == 1 else 0)):
        times = factor if damaged is node else 1 / factor
        for place in (1, 2) if damaged is node else (1,):
            tensor = tensors[damaged.inputs[place].name]
            array = numpy_helper.to_array(tensor).copy()
            np.moveaxis(array, axis, 0)[7] *= times
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


@zoo
@pytest.mark.parametrize("first", ["conv_1", "conv_33"])
def test_a_real_model_with_a_damaged_layer(first):
    from test_zoo import config_of

    from ptqlit.samples.image import image_samples

    source = ZOO / "models" / "mobilenet_v2_1.0_224.onnx"
    config, graph = config_of("mobilenet_v2_1.0_224"), prepare(source)
    data = [s for s, _ in zip(image_samples(config, graph), range(4))]
    table, _ = look(prepare(wreck(graph, first, 40)), data, most=1)
    assert table.rows[0].node == first
    assert "one channel dominates" in names(table.rows[0])
