"""Stored weights of 1 to 16 bits: the file runs in an unmodified onnxruntime and means what the Plan says."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqlit
from ptqlit.arithmetic.affine import quantize
from ptqlit.cli import run
from ptqlit.model.runtime import kernels_of
from ptqlit.pipeline import apply, convert
from ptqlit.reports.inspect import inspect_model
from ptqlit.storage.weights import restored, widened

BITS = range(1, 17)
RNG = np.random.default_rng(0)


def noise(*shape: int, kind=np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(kind)


def model_of(nodes, inputs: dict, output: list, weights: dict, kind=TensorProto.FLOAT, opset=17):
    """A model with the nodes (operator, inputs, output, attributes)."""
    made = [
        helper.make_node(op, ins.split(), outs.split(), f"n{place}", **attributes)
        for place, (op, ins, outs, attributes) in enumerate(nodes)
    ]
    ends = [helper.make_tensor_value_info(n, k, s) for n, (k, s) in inputs.items()]
    y = helper.make_tensor_value_info("y", kind, output)
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(made, "g", ends, [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


F, I64 = TensorProto.FLOAT, TensorProto.INT64
MODELS = {
    "Conv": lambda: model_of(
        [("Conv", "x w", "y", {})], {"x": (F, [1, 8, 9, 9])}, [1, 32, 7, 7],
        {"w": noise(32, 8, 3, 3)},
    ),
    "Conv 1-D": lambda: model_of(
        [("Conv", "x w", "y", {})], {"x": (F, [1, 8, 9])}, [1, 32, 7], {"w": noise(32, 8, 3)}
    ),
    "Conv 3-D": lambda: model_of(
        [("Conv", "x w", "y", {})], {"x": (F, [1, 4, 5, 5, 5])}, [1, 32, 3, 3, 3],
        {"w": noise(32, 4, 3, 3, 3)},
    ),
    "depthwise 5x5": lambda: model_of(
        [("Conv", "x w", "y", {"group": 32})], {"x": (F, [1, 32, 9, 9])}, [1, 32, 5, 5],
        {"w": noise(32, 1, 5, 5)},
    ),
    "grouped": lambda: model_of(
        [("Conv", "x w", "y", {"group": 2})], {"x": (F, [1, 16, 9, 9])}, [1, 32, 7, 7],
        {"w": noise(32, 8, 3, 3)},
    ),
    "ConvTranspose": lambda: model_of(
        [("ConvTranspose", "x w", "y", {})], {"x": (F, [1, 8, 5, 5])}, [1, 32, 7, 7],
        {"w": noise(8, 32, 3, 3)},
    ),
    "Gemm": lambda: model_of(
        [("Gemm", "x w b", "y", {"transB": 1})], {"x": (F, [3, 40])}, [3, 24],
        {"w": noise(24, 40), "b": noise(24)},
    ),
    "MatMul right": lambda: model_of(
        [("MatMul", "x w", "y", {})], {"x": (F, [2, 3, 40])}, [2, 3, 24], {"w": noise(40, 24)}
    ),
    "MatMul left": lambda: model_of(
        [("MatMul", "w x", "y", {})], {"x": (F, [40, 3])}, [24, 3], {"w": noise(24, 40)}
    ),
    "Gather": lambda: model_of(
        [("Gather", "w i", "y", {})], {"i": (I64, [5])}, [5, 24], {"w": noise(40, 24)}
    ),
    "LSTM": lambda: model_of(
        [("LSTM", "x w r", "y", {"hidden_size": 12})], {"x": (F, [4, 1, 20])}, [4, 1, 1, 12],
        {"w": noise(1, 48, 20), "r": noise(1, 48, 12)},
    ),
    "GRU": lambda: model_of(
        [("GRU", "x w r", "y", {"hidden_size": 12})], {"x": (F, [4, 1, 20])}, [4, 1, 1, 12],
        {"w": noise(1, 36, 20), "r": noise(1, 36, 12)},
    ),
    "shared": lambda: model_of(
        [("MatMul", "x w", "h", {}), ("MatMul", "h w", "y", {})], {"x": (F, [3, 24])}, [3, 24],
        {"w": noise(24, 24)},
    ),
    "float16": lambda: model_of(
        [("MatMul", "x w", "y", {})], {"x": (TensorProto.FLOAT16, [3, 40])}, [3, 24],
        {"w": noise(40, 24, kind=np.float16)}, TensorProto.FLOAT16,
    ),
    "float64": lambda: model_of(
        [("MatMul", "x w", "y", {})], {"x": (TensorProto.DOUBLE, [3, 40])}, [3, 24],
        {"w": noise(40, 24, kind=np.float64)}, TensorProto.DOUBLE,
    ),
}  # fmt: skip


def config(bits: int, common: str = "", weight: str = "") -> ptqlit.Config:
    text = f"[common_quant_param]\nquant_type=WEIGHT_QUANT\nbit_num={bits}\n{common}"
    return ptqlit.Config.from_text(f"{text}[weight_quant_param]\n{weight}" if weight else text)


def feed_of(proto: onnx.ModelProto) -> dict:
    """Random numbers for each input."""
    feed, rng = {}, np.random.default_rng(1)
    for value in proto.graph.input:
        kind = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = [d.dim_value for d in kind.shape.dim]
        whole = np.issubdtype(dtype, np.integer)
        feed[value.name] = (rng.integers(0, 9, shape) if whole else rng.normal(size=shape)).astype(
            dtype
        )
    return feed


def with_restored(proto: onnx.ModelProto, plan: ptqlit.Plan) -> onnx.ModelProto:
    """The float model with the weights that a reader of the stored ones gets."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    plans = {t.name: t for t in plan.tensors}
    for tensor in copy.graph.initializer:
        if tensor.name in plans:
            array, one = numpy_helper.to_array(tensor), plans[tensor.name]
            codes = quantize(widened(array), one.affine, one.format, one.axis)
            new = restored(codes, one).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return copy


def outputs(model, feed: dict) -> np.ndarray:
    """What an onnxruntime session without any option of ours computes."""
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0].astype(np.float64)


def distance(proto: onnx.ModelProto, done) -> float:
    """Largest difference of the file and the model with restored weights, relative to its largest output."""
    onnx.checker.check_model(str(done.path))
    feed = feed_of(proto)
    wanted, got = outputs(with_restored(proto, done.plan), feed), outputs(done.path, feed)
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


@pytest.mark.parametrize("per_channel", ["true", "false"])
@pytest.mark.parametrize("bits", BITS)
def test_every_width(bits, per_channel, tmp_path):
    """Conv, Gemm and MatMul of every width mean what the Plan says, and take the bits they should."""
    for name in ("Conv", "Gemm", "MatMul right"):
        proto = MODELS[name]()
        done = convert(proto, config(bits, weight=f"per_channel={per_channel}"), tmp_path / "w")
        assert [t.format.bits for t in done.plan.tensors] == [bits]
        channels = done.plan.tensors[0].scale.shape
        assert channels == ({"Conv": (32,)}.get(name, (24,)) if per_channel == "true" else ())
        assert distance(proto, done) < 1e-5
        kinds = {kernel.op_type for kernel in kernels_of(done.path)}
        assert kinds.isdisjoint({"DequantizeLinear", "BitShift", "BitwiseAnd", "Cast", "Mul"})


def weight_in(path) -> np.ndarray:
    """The weight of a file with one MatMul on its right, as the runtime sees it: a product with ones and zeros."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = np.eye(40, dtype=np.float32)[:, None, None, :]
    return np.concatenate(
        [session.run(None, {"x": np.tile(row, (2, 3, 1))})[0][0, :1] for row in rows]
    )


@pytest.mark.parametrize("per_channel", ["true", "false"])
@pytest.mark.parametrize("bits", BITS)
def test_file_means_the_formula(bits, per_channel, tmp_path):
    """Every weight is (q - z) s v + m in exact arithmetic, to the fraction of a step that a float32 leaves."""
    proto = MODELS["MatMul right"]()
    done = convert(proto, config(bits, weight=f"per_channel={per_channel}"), tmp_path / "w")
    (one,) = done.plan.tensors
    array = numpy_helper.to_array(proto.graph.initializer[0])
    codes = quantize(array, one.affine, one.format, one.axis).astype(np.float64)
    step = one.scale.astype(np.float64) * one.var_corr.astype(np.float64)
    expected = (codes - one.zero_point) * step + one.mean_corr.astype(np.float64)
    off = np.abs(weight_in(done.path) - expected)
    assert (off <= 2.0 ** (bits - 24) * step + 3e-7 * np.abs(array).max()).all()
    assert np.abs(one.mean_corr).max() > 0


@pytest.mark.parametrize("per_channel", ["true", "false"])
@pytest.mark.parametrize("bits", [8, 16])
def test_without_encode(bits, per_channel, tmp_path):
    """Plain int8 and int16 behind DequantizeLinear; the runtime computes MatMul in its own way."""
    for name in MODELS:
        if name in ("float16", "float64"):
            continue
        proto = MODELS[name]()
        keys = config(bits, "enable_encode=false\n", f"per_channel={per_channel}")
        done = convert(proto, keys, tmp_path / "w")
        graph = onnx.load(done.path).graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("DequantizeLinear") == len(done.plan.tensors)
        assert not {"BitShift", "BitwiseAnd"} & set(kinds)
        codes = {t.data_type for t in graph.initializer if t.name.endswith("_quantized")}
        assert codes == {TensorProto.INT8 if bits == 8 else TensorProto.INT16}
        limit = 1e-2 if {"MatMul", "Gemm"} & set(name.split()) or name == "shared" else 1e-5
        assert distance(proto, done) < limit, name


@pytest.mark.parametrize("name", MODELS)
def test_every_operator(name, tmp_path):
    """Each operator's weight at 5 bits, and again from its Plan."""
    proto = MODELS[name]()
    done = convert(proto, config(5), tmp_path / "w", plan=tmp_path / "p.json")
    assert done.plan.count("stored") >= 1
    assert distance(proto, done) < (2e-3 if name == "float16" else 1e-5)
    again = apply(tmp_path / "p.json", proto, tmp_path / "again")
    assert again.path.read_bytes() == done.path.read_bytes()


@pytest.mark.parametrize("bits", [3, 8, 11, 16])
def test_on_the_fly(bits, tmp_path):
    """Integers that stay in memory: a DequantizeLinear is left in the running graph."""
    proto = MODELS["Conv"]()
    done = convert(proto, config(bits, weight="dequant_strategy=ON_THE_FLY"), tmp_path / "w")
    assert done.plan.dequant_strategy == "ON_THE_FLY"
    assert distance(proto, done) < 1e-5
    kinds = [kernel.op_type for kernel in kernels_of(done.path)]
    assert kinds.count("DequantizeLinear") == 1


@pytest.mark.parametrize("bits", BITS)
def test_size(bits, tmp_path):
    """A large weight takes its bits and little more."""
    weight = noise(512, 1024)
    proto = model_of([("MatMul", "x w", "y", {})], {"x": (F, [1, 512])}, [1, 1024], {"w": weight})
    done = convert(proto, config(bits, weight="per_channel=false"), tmp_path / "w")
    assert 8 * done.path.stat().st_size / weight.size < bits + 0.1
    row = next(row for row in inspect_model(done.path).coded if row.name == "w")
    assert row.bits == bits and row.each <= bits + 0.1


def with_value(value: float) -> onnx.ModelProto:
    """A convolution of which one weight is something else."""
    weight = noise(32, 8, 3, 3)
    weight[1, 2, 0, 0] = value
    return model_of(
        [("Conv", "x w", "y", {})], {"x": (F, [1, 8, 9, 9])}, [1, 32, 7, 7], {"w": weight}
    )


def no_weight() -> onnx.ModelProto:
    """A Relu."""
    return model_of([("Relu", "x", "y", {})], {"x": (F, [1, 8, 9, 9])}, [1, 8, 9, 9], {})


MIX = "quant_type=WEIGHT_QUANT\nbit_num=0\n[mixed_bit_weight_quant_param]\n"
DYNAMIC = "quant_type=DYNAMIC_QUANT\n"
WEIGHT = "quant_type=WEIGHT_QUANT\n"
BAD = {
    "17 bits": (None, WEIGHT + "bit_num=17", ["c.cfg:3", "bit_num=17", "0 to 16"]),
    "-1 bits": (None, WEIGHT + "bit_num=-1", ["c.cfg:3", "bit_num=-1"]),
    "5 bits plain": (None, WEIGHT + "bit_num=5\nenable_encode=false", ["c.cfg:4", "8 or 16"]),
    "mixed plain": (None, WEIGHT + "bit_num=0\nenable_encode=false", ["c.cfg:4", "8 or 16"]),
    "error 0": (None, MIX + "init_scale=0", ["c.cfg:5", "init_scale=0"]),
    "error 1": (None, MIX + "init_scale=1", ["c.cfg:5", "init_scale=1"]),
    "dynamic 4 bits": (None, DYNAMIC + "bit_num=4", ["c.cfg:3", "bit_num=4", "8"]),
    "GPTQ": (None, WEIGHT + "[weight_quant_param]\nquant_strategy=GPTQ", ["c.cfg:4", "GPTQ"]),
    "unknown node": (None, WEIGHT + "skip_quant_node=n1", ["c.cfg:3", '"n1"']),
    "too small": (None, WEIGHT + "min_quant_weight_size=65535", ["none of 1 is left", "w: 2304"]),
    "no weight": (no_weight, WEIGHT, ["expected a weight", "it has none"]),
    "no weight, mixed": (no_weight, MIX, ["expected a weight", "it has none"]),
    "no weight, dynamic": (no_weight, DYNAMIC, ["m.onnx"]),
    "NaN": (lambda: with_value(np.nan), WEIGHT, ["n0", "w", "NaN"]),
    "NaN, mixed": (lambda: with_value(np.nan), MIX, ["n0", "w", "NaN"]),
    "infinite": (lambda: with_value(np.inf), WEIGHT, ["n0", "w", "infinite"]),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(name, tmp_path, capfd):
    """What cannot be, by the command line: one line, an exit code, no file."""
    model, text, words = BAD[name]
    onnx.save((model or MODELS["Conv"])(), tmp_path / "m.onnx")
    (tmp_path / "c.cfg").write_text(f"[common_quant_param]\n{text}\n")
    code = run(["convert", f"--modelFile={tmp_path}/m.onnx", f"--configFile={tmp_path}/c.cfg",
                f"--outputFile={tmp_path}/out/w", f"--plan={tmp_path}/p.json"])  # fmt: skip
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("ERROR")]
    assert code != 0 and len(errors) == 1 and "Traceback" not in out + err
    assert "CONVERT RESULT FAILED" in out and "CONVERT RESULT SUCCESS" not in out
    assert all(word in errors[0] for word in words), errors[0]
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "p.json").exists()


def test_inspect(tmp_path, capfd):
    """The table of a file, on the screen and as CSV."""
    proto = MODELS["Conv"]()
    path = convert(proto, config(5), tmp_path / "w").path
    assert run(["inspect", str(path), f"--csv={tmp_path}/t.csv"]) == 0
    shown, rows = capfd.readouterr().out, (tmp_path / "t.csv").read_text().splitlines()
    assert rows[0] == "tensor,numbers,bits,form,bytes,bits each,entropy"
    row = next(row.split(",") for row in rows if row.startswith("w,"))
    assert row[1:3] == [str(32 * 8 * 9), "5"] and "entropy" in shown
    assert json.loads(dict((p.key, p.value) for p in onnx.load(path).metadata_props)[
        "ptqlit.weights"])["w"]["bits"] == 5  # fmt: skip
