"""Stored weights: axes, filters and sharing, by the quantizer's own functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Net
from onnx import TensorProto

from ptqlit import Config, InputError, apply, convert
from ptqlit.model.graph import Graph, constant, prepare
from ptqlit.model.plan import Plan
from ptqlit.model.runtime import open_session
from ptqlit.quantizers.weight import WeightOptions, weight_plan, weights_of
from ptqlit.storage.apply import apply_plan
from ptqlit.storage.pairs import constant_codes
from ptqlit.storage.weights import restored, widened
from ptqlit.storage.write import serialize

ALL = WeightOptions(min_channels=0, correction=True)


def images(n: int = 2) -> np.ndarray:
    """Pictures of 16 channels."""
    return np.random.default_rng(1).normal(size=(n, 16, 6, 6)).astype(np.float32)


def layers(opset: int = 17) -> onnx.ModelProto:
    """A convolution and a Gemm with 16384 and 18432 weights."""
    net = Net(opset)
    x = net.input("x", ("n", 16, 6, 6))
    a = net.op("Conv", x, net.const(net.normal(64, 16, 4, 4, scale=0.1), "w1"), name="conv")
    b = net.op("Flatten", net.op("Relu", a))
    matrix = net.const(net.normal(32, 576, scale=0.1), "w2")
    return net.model(net.op("Gemm", b, matrix, transB=1, name="fc"))


def floats(graph: Graph, plan: Plan) -> ir.Model:
    """The float model with the dequantized weights put in, computed by NumPy."""
    model = graph.copy_model()
    for tensor in plan.tensors:
        value = model.graph.initializers[tensor.name]
        array = constant(value)
        codes = constant_codes(widened(array), tensor)
        value.const_value = ir.tensor(restored(codes, tensor).astype(array.dtype), name=value.name)
    return model


def both(
    model: onnx.ModelProto, options: WeightOptions, feed: dict
) -> tuple[Plan, onnx.ModelProto, list[np.ndarray], list[np.ndarray]]:
    """Plan and checked file, and the outputs of the file and of the float model with its weights."""
    graph = prepare(model)
    plan = weight_plan(graph, options)
    data = serialize(apply_plan(graph, plan))
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    found = open_session(data).run(None, feed)
    return plan, proto, found, open_session(floats(graph, plan)).run(None, feed)


def close(found: list[np.ndarray], expected: list[np.ndarray], share: float) -> None:
    """All outputs alike, to a share of the largest."""
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= share * np.abs(other).max()


# ---------------------------------------------------------------- every operator


def conv_net(dims: int, transposed: bool = False, group: int = 1, channels: int = 16):
    """One convolution, and its input."""
    net = Net()
    x = net.input("x", (2, 16, *[7] * dims))
    shape = (16, channels // group) if transposed else (channels, 16 // group)
    weight = net.const(net.normal(*shape, *[3] * dims, scale=0.2), "w")
    operator = "ConvTranspose" if transposed else "Conv"
    return net, net.op(operator, x, weight, group=group), (2, 16, *[7] * dims)


def product(left: bool, operator: str = "MatMul", **attributes):
    """A product with a constant operand on one side."""
    net = Net()
    x, w = net.input("x", (24, 24)), net.const(net.normal(24, 24), "w")
    return net, net.op(operator, *((w, x) if left else (x, w)), **attributes), (24, 24)


def stack():
    """A stack of matrices."""
    net = Net()
    x = net.input("x", (3, 5, 24))
    return net, net.op("MatMul", x, net.const(net.normal(3, 24, 16), "w")), (3, 5, 24)


def recurrent(operator: str):
    """An LSTM or GRU of two directions."""
    gates, net = {"LSTM": 4, "GRU": 3}[operator], Net()
    x = net.input("x", (5, 2, 12))
    w = net.const(net.normal(2, gates * 8, 12, scale=0.3), "w")
    r = net.const(net.normal(2, gates * 8, 8, scale=0.3), "r")
    bias = net.const(net.normal(2, 2 * gates * 8, scale=0.3))
    made = net.op(operator, x, w, r, bias, outputs=2, hidden_size=8, direction="bidirectional")
    return net, made[0], (5, 2, 12)


def table(axis: int):
    """A table of which rows or columns are picked by a rounded input."""
    net = Net()
    x = net.input("x", (3, 4))
    places = net.op("Cast", net.op("Abs", x), to=TensorProto.INT64)
    return net, net.op("Gather", net.const(net.normal(30, 20), "w"), places, axis=axis), (3, 4)


KINDS = {
    "Conv 1-D": (lambda: conv_net(1), [0]),
    "Conv 2-D": (lambda: conv_net(2), [0]),
    "Conv 3-D": (lambda: conv_net(3), [0]),
    "grouped": (lambda: conv_net(2, group=4), [0]),
    "depthwise": (lambda: conv_net(3, group=16), [0]),
    "ConvTranspose": (lambda: conv_net(2, True), [1]),
    "ConvTranspose grouped": (lambda: conv_net(2, True, 4), [1]),
    "ConvTranspose depthwise": (lambda: conv_net(3, True, 16), [0]),
    "MatMul right": (lambda: product(False), [1]),
    "MatMul left": (lambda: product(True), [0]),
    "MatMul stack": (stack, [2]),
    "Gemm right": (lambda: product(False, "Gemm"), [1]),
    "Gemm transB": (lambda: product(False, "Gemm", transB=1), [0]),
    "Gemm left transA": (lambda: product(True, "Gemm", transA=1), [1]),
    "LSTM": (lambda: recurrent("LSTM"), [0, 0]),
    "GRU": (lambda: recurrent("GRU"), [0, 0]),
    "Gather rows": (lambda: table(0), [0]),
    "Gather columns": (lambda: table(1), [1]),
}
WAYS = {
    "6 bits": replace(ALL, bits=6),
    "one scale": replace(ALL, bits=5, per_channel=False),
    "on the fly": replace(ALL, bits=4, on_the_fly=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_operators(kind, way):
    made, axes = KINDS[kind]
    net, y, shape = made()
    feed = {"x": np.random.default_rng(2).normal(size=shape).astype(np.float32)}
    options = WAYS[way]
    plan, _, found, expected = both(net.model(y), options, feed)
    wanted = [None] * len(axes) if not options.per_channel else axes
    assert [tensor.axis for tensor in plan.tensors] == wanted
    nbits = way == "on the fly" and kind in ("MatMul right", "Gemm right")
    close(found, expected, 0.02 if nbits else 1e-5)
    assert plan.count("stored") == 1


# ---------------------------------------------------------------- sharing and filters


def tied(first: str, second: str) -> onnx.ModelProto:
    """Two operators with one weight."""
    net = Net()
    w = net.const(net.normal(24, 24), "w")
    x = net.input("x", (24, 24))
    a = net.op(first, x, w, name="first")
    return net.model(net.op(second, a, w, name="second"))


def test_shared_weights():
    feed = {"x": np.random.default_rng(0).normal(size=(24, 24)).astype(np.float32)}
    for kinds, axis in ((("MatMul", "MatMul"), None), (("Gemm", "Gemm"), 1)):
        plan, proto, found, expected = both(tied(*kinds), replace(ALL, bits=6), feed)
        assert [tensor.axis for tensor in plan.tensors] == [axis]
        assert ("shares it" in plan.tensors[0].reason) == (axis is None)
        assert plan.count("stored") == 2
        close(found, expected, 1e-5)
    graph = prepare(tied("Gemm", "Gemm"))
    with pytest.raises(InputError, match="second, which skip_quant_node names, reads it too"):
        weight_plan(graph, ALL, {"second"})


def test_the_filters_are_strict():
    graph = prepare(layers())
    stored = {
        (16384, 0): ["w2"], (16383, 0): ["w1", "w2"], (0, 64): ["w2"], (0, 63): ["w1", "w2"],
        (18431, 64): ["w2"],
    }  # fmt: skip
    for (size, channels), names in stored.items():
        plan = weight_plan(graph, WeightOptions(min_size=size, min_channels=channels))
        assert [tensor.name for tensor in plan.tensors] == names
        assert plan.count("stored") == len(names)
    few = prepare(conv_net(2, group=16)[0].model("t0"))  # nine weights a channel
    assert weight_plan(few, replace(ALL, bits=2)).count("stored") == 1
    for options in (replace(ALL, correction=False), replace(ALL, per_channel=False)):
        assert weight_plan(few, options).count("stored") == 1
    with pytest.raises(InputError, match="9 weights a channel do not pay"):
        weight_plan(few, replace(ALL, bits=4))


def test_newer_models_use_their_types():
    graph = prepare(layers(21))
    plan = weight_plan(graph, replace(ALL, bits=4))
    assert {tensor.form for tensor in plan.tensors} == {"plain4"}
    assert open_session(serialize(apply_plan(graph, plan))).run(None, {"x": images()})


def test_weights_of_ignores_other_constants():
    net = Net()
    x = net.input("x", (24, 24))
    y = net.op("Add", net.op("MatMul", x, x), net.const(net.normal(24, 24)))
    assert weights_of(prepare(net.model(y))) == []


# ---------------------------------------------------------------- from a configuration


def config(*lines: str) -> Config:
    """A configuration of stored weights."""
    text = "[common_quant_param]\nquant_type=WEIGHT_QUANT\n" + "\n".join(lines)
    return Config.from_text(text, "my.cfg")


def test_the_plan_is_enough(tmp_path):
    model = tmp_path / "model.onnx"
    onnx.save(layers(), model)
    for number, lines in enumerate((
        ["bit_num=6"],
        ["bit_num=3", "[weight_quant_param]", "dequant_strategy=ON_THE_FLY", "per_channel=false"],
        ["bit_num=16", "enable_encode=false", "skip_quant_node=fc"],
    )):  # fmt: skip
        plan = tmp_path / f"{number}.json"
        made = convert(model, config(*lines), tmp_path / f"{number}", plan=plan)
        again = apply(plan, model, tmp_path / f"{number}_again")
        assert again.path.read_bytes() == made.path.read_bytes()
        assert str(again.table) == str(made.table)
        assert len(made.table.weights) == (1 if "skip_quant_node=fc" in lines else 2)
        assert bool(made.table.at_each_run) == (number > 0)
