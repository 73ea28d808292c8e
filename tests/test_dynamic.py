"""Dynamic quantization of every form of product: against NumPy's own computation, and against float."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import TensorProto

from ptqlit import Config, InputError, apply, convert
from ptqlit.arithmetic.measure import sqnr
from ptqlit.model.graph import prepare
from ptqlit.model.plan import load_plan, plan_text
from ptqlit.model.runtime import open_session
from ptqlit.quantizers.dynamic import LONGEST, dynamic_plan
from ptqlit.storage.apply import apply_plan
from ptqlit.storage.write import serialize

STRATEGIES = ("ALWC", "ACWL")
PAIR = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
TEXT = "[common_quant_param]\nquant_type=DYNAMIC_QUANT\n[dynamic_quant_param]\nquant_strategy="


# ---------------------------------------------------------------- NumPy's own computation


def measured(x: np.ndarray, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes without zero point (int64) and their factor; under ACWL, 127 times the scale of a row."""
    x = x.astype(np.float32)
    if strategy == "ACWL":
        peak = np.abs(x).max(-1, keepdims=True)
        return np.rint((x / peak) / np.float32(1 / 127)).astype(np.int64), peak
    lo, hi = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((hi - lo) / np.float32(255)) if hi > lo else np.float32(1)
    zero_point = np.rint(np.clip(-lo / scale, 0, 255))
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point).astype(np.int64), scale


def stored(w: np.ndarray, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (int64) and scale of a weight whose columns lie along the last axis."""
    over = tuple(range(w.ndim - 1)) if strategy == "ALWC" else None
    scale = (np.abs(w.astype(np.float64)).max(over) / 127).astype(np.float32)
    return np.clip(np.rint(w / scale), -127, 127).astype(np.int64), scale


def product(x: np.ndarray, w: np.ndarray, strategy: str, constant: bool = True) -> np.ndarray:
    """x @ w in integers, scaled back."""
    x_codes, x_scale = measured(x, strategy)
    w_codes, w_scale = stored(w, strategy) if constant else measured(w, strategy)
    w_scale = w_scale / np.float32(127) if strategy == "ACWL" else w_scale
    return (x_codes @ w_codes).astype(np.float32) * (x_scale * w_scale)


def turned(x: np.ndarray) -> np.ndarray:
    """The last two dimensions in each other's place."""
    return np.swapaxes(x, -1, -2)


# ---------------------------------------------------------------- the models


@dataclass
class Case:
    """A model, how NumPy computes it, and what the Plan should say of it."""

    name: str
    model: onnx.ModelProto
    feed: dict[str, np.ndarray]
    emulate: object  # (feed, strategy) -> the first output
    dynamic: tuple[int, int] = (1, 1)  # products that become integer under ALWC, ACWL
    db: float = 30.0


RANDOM = np.random.default_rng(7)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Random float32 values."""
    return (RANDOM.normal(size=shape) * scale).astype(np.float32)


def matmul(
    name: str, x_shape: tuple, w_shape: tuple, left: bool = False, bias: bool = False
) -> Case:
    """One MatMul with a constant on one side."""
    net, w, b = Net(), normal(*w_shape), normal(1 if left else w_shape[-1])
    x = net.input("x", ("rows", *x_shape[1:]) if len(x_shape) > 1 and not left else x_shape)
    y = net.op("MatMul", *((net.const(w), x) if left else (x, net.const(w))))
    y = net.op("Add", y, net.const(b)) if bias else y

    def emulate(feed, strategy):
        """The same in NumPy."""
        x = feed["x"]
        y = turned(product(turned(x), turned(w), strategy)) if left else product(x, w, strategy)
        return y + b if bias else y

    return Case(name, net.model(y), {"x": normal(*x_shape)}, emulate)


def gemm(name: str, bias: str = "constant", **options) -> Case:
    """One Gemm: bias none, constant, computed or (rows, columns)."""
    net, w = Net(), normal(*((24, 40) if options.get("transB") else (40, 24)))
    shape = (40, 6) if options.get("transA") else ("rows", 40)
    operands, feed = [net.input("x", shape), net.const(w)], {"x": normal(40, 6)}
    feed = feed if options.get("transA") else {"x": normal(6, 40)}
    b = normal(6, 24) if bias == "matrix" else normal(24, scale=20)
    if bias == "computed":
        operands, feed = [*operands, net.input("b", (24,))], feed | {"b": b}
    elif bias != "none":
        operands.append(net.const(b))
    y = net.op("Gemm", *operands, **options)

    def emulate(feed, strategy):
        """The same in NumPy, alpha and beta behind the product."""
        x = feed["x"].T if options.get("transA") else feed["x"]
        weight = w.T if options.get("transB") else w
        y = np.float32(options.get("alpha", 1)) * product(x, weight, strategy)
        return y if bias == "none" else y + np.float32(options.get("beta", 1)) * b

    return Case(name, net.model(y), feed, emulate)


def mixer() -> Case:
    """A product along another dimension, with a Transpose before and behind, as in an MLP mixer."""
    net, w, b = Net(), normal(24, 24), normal(24)
    x = net.input("x", ("n", 24, 10))
    y = net.op(
        "Add", net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 1]), net.const(w)), net.const(b)
    )
    y = net.op("Add", net.op("Transpose", net.op("Relu", y), perm=[0, 2, 1]), x)

    def emulate(feed, strategy):
        """The same in NumPy."""
        hidden = product(turned(feed["x"]), w, strategy) + b
        return turned(np.maximum(hidden, 0)) + feed["x"]

    return Case("mixer", net.model(y), {"x": normal(2, 24, 10)}, emulate)


def two_activations() -> Case:
    """A product of two computed operands behind one with a weight; float under ACWL."""
    net, w = Net(), normal(16, 16)
    a, b = net.input("a", (2, 5, 16)), net.input("b", (2, 16, 7))
    y = net.op("MatMul", net.op("MatMul", a, net.const(w)), b)

    def emulate(feed, strategy):
        """The same in NumPy."""
        hidden = product(feed["a"], w, strategy)
        if strategy == "ACWL":
            return hidden @ feed["b"]
        return product(hidden, feed["b"], strategy, constant=False)

    feed = {"a": normal(2, 5, 16), "b": normal(2, 16, 7)}
    return Case("two activations", net.model(y), feed, emulate, (2, 1))


def shared_input(equal: bool) -> Case:
    """Three products of one tensor; with `equal`, their largest weights are the same."""
    net = Net()
    x, weights = net.input("x", (2, "t", 32)), [normal(32, 32) for _ in range(3)]
    if equal:
        weights = [np.clip(w, -1, 1) for w in weights]
    parts = [net.op("MatMul", x, net.const(w)) for w in weights]
    biases = [normal(32) for _ in parts]
    sums = [net.op("Add", part, net.const(b)) for part, b in zip(parts, biases)]
    y = net.op("Add", net.op("Add", sums[0], sums[1]), sums[2])

    def emulate(feed, strategy):
        """The same in NumPy."""
        made = [product(feed["x"], w, strategy) + b for w, b in zip(weights, biases)]
        return made[0] + made[1] + made[2]

    name = "shared input, equal scales" if equal else "shared input"
    return Case(name, net.model(y), {"x": normal(2, 9, 32)}, emulate, (3, 3))


def shared_weight() -> Case:
    """One square weight, read as it stands and transposed, behind each other."""
    net, w = Net(), normal(32, 32, scale=0.3)
    weight = net.const(w)
    y = net.op("Gemm", net.input("x", ("rows", 32)), weight)
    y = net.op("Gemm", net.op("Relu", y), weight, transB=1)

    def emulate(feed, strategy):
        """The same in NumPy."""
        hidden = np.maximum(product(feed["x"], w, strategy), 0)
        return product(hidden, w.T, strategy)

    return Case("shared weight", net.model(y), {"x": normal(6, 32)}, emulate, (2, 2))


def table(axis: int, indices: np.ndarray) -> Case:
    """A Gather from a constant table, and a product behind it."""
    net, data, w = Net(), normal(50, 40) * np.exp(normal(50, 1)), normal(40, 8)
    data = data if axis == 0 else np.ascontiguousarray(data.T)
    rows = net.op(
        "Gather", net.const(data), net.input("i", indices.shape, TensorProto.INT64), axis=axis
    )
    rows = rows if axis == 0 else net.op("Transpose", rows, perm=[1, 0])
    y = net.op("MatMul", rows, net.const(w))

    def emulate(feed, strategy):
        """The same in NumPy: a scale and a zero point for each row, zero in the range."""
        plain = data if axis == 0 else data.T
        lo, hi = (np.float64(f(plain, 1, keepdims=True)) for f in (np.min, np.max))
        lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        scale = ((hi - lo) / 255).astype(np.float32)
        zero = np.clip(np.rint(-128 - lo / scale), -128, 127)
        codes = np.clip(np.rint(plain / scale) + zero, -128, 127)
        whole = (codes - zero).astype(np.float32) * scale
        return product(whole[feed["i"]], w, strategy)

    return Case(f"table, axis {axis}", net.model(y), {"i": indices}, emulate)


CASES = [
    matmul("2-D", (6, 40), (40, 24)),
    matmul("2-D, bias", (6, 40), (40, 24), bias=True),
    matmul("3-D", (3, 6, 40), (40, 24)),
    matmul("3-D, bias", (3, 6, 40), (40, 24), bias=True),
    matmul("one row", (1, 40), (40, 24), bias=True),
    matmul("many rows", (200, 40), (40, 24)),
    matmul("one column", (6, 40), (40, 1)),
    matmul("a vector", (40,), (40, 24), bias=True),
    matmul("weight left", (40, 6), (24, 40), left=True),
    matmul("weight left, 3-D", (3, 40, 6), (24, 40), left=True, bias=True),
    matmul("a stack of weights", (3, 6, 40), (3, 40, 24)),
    gemm("Gemm"),
    gemm("Gemm without bias", "none"),
    gemm("Gemm, transB", transB=1),
    gemm("Gemm, transA", transA=1),
    gemm("Gemm, transA and transB", "none", transA=1, transB=1),
    gemm("Gemm, alpha and beta", alpha=0.5, beta=2.0),
    gemm("Gemm, matrix as bias", "matrix"),
    gemm("Gemm, computed bias", "computed", alpha=-0.5, beta=2.0),
    mixer(),
    two_activations(),
    shared_input(False),
    shared_input(True),
    shared_weight(),
    table(0, np.int64([[3, 0, 49], [7, 7, 1]])),
    table(1, np.int64([5, 49, 0])),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_products(case, strategy, tmp_path):
    """Every form: near float, equal to NumPy, in the planned kernel, and the same from its Plan."""
    config = Config.from_text(TEXT + strategy, "c.cfg")
    result = convert(case.model, config, tmp_path / "q", plan=tmp_path / "plan.json")
    onnx.checker.check_model(str(result.path), full_check=True)
    got = open_session(result.path).run(None, case.feed)[0]
    by_hand = case.emulate(case.feed, strategy)
    assert got.shape == by_hand.shape
    assert np.abs(got - by_hand).max() <= 2e-6 * np.abs(by_hand).max()
    expected = open_session(case.model.SerializeToString()).run(None, case.feed)[0]
    assert sqnr(expected, got) > case.db
    rows = [row for row in result.table.rows if row.decision == "dynamic"]
    assert len(rows) == case.dynamic[STRATEGIES.index(strategy)]
    assert all(row.found in PAIR and row.as_planned for row in rows) and not result.table.problems
    again = apply(tmp_path / "plan.json", case.model, tmp_path / "again")
    assert again.path.read_bytes() == result.path.read_bytes()
    assert plan_text(load_plan(tmp_path / "plan.json")) == plan_text(result.plan)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("opset", (13, 17, 18, 21))
def test_opsets(opset, strategy):
    """ReduceMax takes its axes in two ways; both are written."""
    net = Net(opset)
    model = net.model(net.op("MatMul", net.input("x", ("rows", 40)), net.const(normal(40, 24))))
    graph, x = prepare(model), normal(5, 40)
    data = serialize(apply_plan(graph, dynamic_plan(graph, strategy)))
    floats = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    assert sqnr(floats, open_session(data).run(None, {"x": x})[0]) > 30


def test_shared_input_is_measured_once():
    """Three products of one tensor, one measurement; a shared weight in one orientation is stored once."""
    graph = prepare(shared_input(False).model)
    for strategy, operator in (("ALWC", "DynamicQuantizeLinear"), ("ACWL", "QuantizeLinear")):
        model = apply_plan(graph, dynamic_plan(graph, strategy))
        assert Counter(node.op_type for node in model.graph)[operator] == 1
    net = Net()
    weight, x = net.const(normal(32, 32)), net.input("x", ("rows", 32))
    twice = prepare(
        net.model(net.op("MatMul", net.op("Relu", net.op("MatMul", x, weight)), weight))
    )
    model = apply_plan(twice, dynamic_plan(twice, "ALWC"))
    assert sum(v.dtype.name == "INT8" for v in model.graph.initializers.values()) == 1


@pytest.mark.parametrize("value", (0.0, 5.0, -5.0))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_constant_rows(value, strategy):
    """Rows of one value, zero included, come out right."""
    case = CASES[0]
    graph, x = prepare(case.model), np.full((6, 40), value, np.float32)
    got = open_session(apply_plan(graph, dynamic_plan(graph, strategy))).run(None, {"x": x})[0]
    floats = open_session(case.model.SerializeToString()).run(None, {"x": x})[0]
    assert np.isfinite(got).all() and (value or not got.any())
    assert not value or sqnr(floats, got) > 30


def test_specification():
    """Check values of the specification sheet, A.3, for the row [0.5, 1, 2].

    ACWL has the reference's scale and codes. ALWC has not: the reference leaves zero out of the
    range (scale 1.5 / 255, zero point -213), onnxruntime's operator forces it in.
    """
    row = np.float32([[0.5, 1, 2]])
    codes, peak = measured(row, "ACWL")
    assert codes.tolist() == [[32, 64, 127]] and abs(peak.item() / 127 - 0.0157480315) < 1e-9
    codes, scale = measured(row, "ALWC")
    assert codes.tolist() == [[64, 127, 255]] and abs(float(scale) - 2 / 255) < 1e-9
    net = Net()
    identity = net.model(
        net.op("MatMul", net.input("x", (1, 3)), net.const(np.eye(3, dtype=np.float32)))
    )
    graph = prepare(identity)
    for strategy in STRATEGIES:
        codes, factor = measured(row, strategy)
        scale = factor / 127 if strategy == "ACWL" else factor
        got = open_session(apply_plan(graph, dynamic_plan(graph, strategy))).run(None, {"x": row})[
            0
        ]
        assert np.allclose(got, codes * scale, rtol=1e-6)


# ---------------------------------------------------------------- what stays float, and what is refused


def reasons(
    model: onnx.ModelProto, strategy: str = "ALWC", skipped: set[str] = frozenset()
) -> dict:
    """Operator -> reason of every node that stays float."""
    return {
        n.operator: n.reason
        for n in dynamic_plan(prepare(model), strategy, skipped).nodes
        if n.decision == "float"
    }


def with_another(build) -> onnx.ModelProto:
    """A model of one sound MatMul, and what `build` puts behind it."""
    net = Net()
    y = net.op("MatMul", net.input("x", (6, 40)), net.const(normal(40, 24)), name="sound")
    return net.model(build(net, y))


def test_reasons():
    """Each node that stays float has its reason."""
    thin = with_another(
        lambda net, y: net.op(
            "Add",
            y,
            net.op("Gather", net.const(normal(9, 1)), net.input("i", (), TensorProto.INT64)),
        )
    )
    assert reasons(thin)["Gather"] == "its table would not become smaller"
    vector = with_another(lambda net, y: net.op("MatMul", y, net.const(normal(24))))
    assert reasons(vector)["MatMul"] == "its weight is no matrix"
    computed = with_another(lambda net, y: net.op("MatMul", y, net.op("Transpose", y, perm=[1, 0])))
    assert "ACWL needs a constant weight" in reasons(computed, "ACWL")["MatMul"]
    assert reasons(computed) == {"Transpose": "no matrix product, and no table of rows"}
    relu = with_another(
        lambda net, y: net.op("MatMul", net.op("Relu", y), net.const(normal(24, 8)), name="last")
    )
    assert reasons(relu, "ALWC", {"last"})["MatMul"] == "named in skip_quant_node"
    double = with_another(
        lambda net, y: net.op("MatMul", net.op("Cast", y, to=11), net.const(np.ones((24, 8))))
    )
    assert reasons(double)["MatMul"] == "its operands are not float32"
    net = Net()
    y = net.op(
        "MatMul", net.input("x", (1, LONGEST + 1)), net.const(np.ones((LONGEST + 1, 2), np.float32))
    )
    longest = net.model(net.op("MatMul", y, net.const(normal(2, 2))))
    assert str(LONGEST) in reasons(longest)["MatMul"]


def test_skipped_nodes_stay_float(tmp_path):
    """A node of skip_quant_node keeps its weight, and its result to the bit."""
    config = Config.from_text(TEXT.replace("[dyn", "skip_quant_node=sound\n[dyn") + "ALWC", "c.cfg")
    model = with_another(
        lambda net, y: net.op("MatMul", net.op("Relu", y), net.const(normal(24, 8)), name="last")
    )
    result = convert(model, config, tmp_path / "q")
    assert [row.name for row in result.table.rows if row.decision == "dynamic"] == ["last"]
    assert result.table.rows[0].found == "MatMul"


def broken_weight() -> onnx.ModelProto:
    """A weight with one NaN."""
    w = normal(40, 24)
    w[3, 4] = np.nan
    net = Net()
    return net.model(net.op("MatMul", net.input("x", (6, 40)), net.const(w, "bad"), name="fc"))


def only_relu() -> onnx.ModelProto:
    """Nothing to quantize."""
    net = Net()
    return net.model(net.op("Relu", net.input("x", (6, 40))))


BAD = [
    (broken_weight(), TEXT + "ALWC", ["fc", "bad", "NaN"], -200),
    (only_relu(), TEXT + "ALWC", ["nothing to quantize", "MatMul"], -300),
    (CASES[0].model, TEXT + "ACLW", ["c.cfg:4", "quant_strategy=ACLW", "ACWL"], -600),
    (
        CASES[0].model,
        TEXT.replace("T\n", "T\nbit_num=4\n", 1) + "ALWC",
        ["c.cfg:3", "bit_num=4", "expected 8"],
        -600,
    ),
    (
        CASES[0].model,
        TEXT.replace("T\n", "T\nskip_quant_node=x\n", 1) + "ALWC",
        ["c.cfg:3", '"x"'],
        -600,
    ),
]


@pytest.mark.parametrize("model, text, words, status", BAD)
def test_refused_in_one_line(model, text, words, status, tmp_path):
    """One clear line, the reference's status, no file."""
    with pytest.raises(InputError) as error:
        convert(model, Config.from_text(text, "c.cfg"), tmp_path / "q")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert error.value.status == status and not list(tmp_path.iterdir())


def test_command(tmp_path):
    """The command needs a model and a configuration, no samples."""
    onnx.save(CASES[1].model, tmp_path / "m.onnx")
    (tmp_path / "c.cfg").write_text(TEXT + "ACWL\n")
    flags = ["--fmk=ONNX", "--modelFile=m.onnx", "--configFile=c.cfg", "--outputFile=q"]
    run = [sys.executable, "-c", "from ptqlit.cli import main; main()", "convert", *flags]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 planned integer kernels" in done.stdout and (tmp_path / "q.onnx").exists()
