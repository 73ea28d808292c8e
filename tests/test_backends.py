"""Every target on small models: judged by its own rules, run by onnxruntime, written again from the Plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import (
    Net,
    batch_norm,
    both,
    chain,
    clip,
    conv,
    depthwise,
    gemm,
    ints,
    matmul,
    op,
    outputs_of,
    samples_for,
)

import ptqlit
from onnxruntime.quantization import QuantFormat, QuantType, quantize, quantize_static
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config
from ptqlit import Config, InputError, convert
from ptqlit.arithmetic.measure import sqnr
from ptqlit.arithmetic.saturation import can_saturate
from ptqlit.backends.check import judge
from ptqlit.cli import run as command
from ptqlit.model.graph import constant, layer_of, prepare
from ptqlit.model.plan import load_plan
from ptqlit.model.qdq import open_records, records_of
from ptqlit.model.runtime import open_session
from ptqlit.pipeline import BACKENDS, Flags

FIXED = (1, 3, 12, 12)
OTHERS = ("NVGPU", "DSP", "ASCEND")


def transpose(channels: int = 6, group: int = 1, bias: bool = True, **attributes):
    """A ConvTranspose that doubles the size."""

    def step(net: Net, x: str) -> str:
        inputs = net.shape(x)[1]
        weight = net.const(net.normal(inputs, channels // group, 2, 2, scale=inputs**-0.5))
        more = [net.const(net.normal(channels, scale=0.3))] if bias else []
        return net.op("ConvTranspose", x, weight, *more, strides=[2, 2], group=group, **attributes)

    return step


RELU, RELU6 = op("Relu"), clip(0, 6)
BLOCK = [conv(), RELU]
MODELS = {
    "residual": [*BLOCK, both("Add", [conv()], []), RELU, conv()],
    "two branches into an Add": [*BLOCK, both("Add", [conv(), RELU, conv()], [conv(kernel=1)]), RELU, conv(4)],
    "an Add of itself": [*BLOCK, lambda net, x: net.op("Add", x, x), conv()],
    "an Add of a constant": [conv(), op("Add", np.float32([[[[0.3]]]])), conv()],
    "depthwise, Relu6": [conv(), RELU6, depthwise(), RELU6, conv(kernel=1)],
    "ConvTranspose": [conv(), RELU, transpose(), RELU, conv()],
    "ConvTranspose in groups": [conv(8), transpose(8, group=2), RELU, conv()],
    "ConvTranspose without a bias": [transpose(bias=False), RELU, conv()],
    "Gemm": [*BLOCK, op("GlobalAveragePool"), op("Flatten"), gemm(8), RELU, gemm(4, trans_b=0)],
    "MatMul": [op("Reshape", ints(1, 36, 12)), matmul(16), op("Tanh"), matmul(8)],
    "MatMul of two": [op("Reshape", ints(1, 3, 12, 12)), both("MatMul", [conv(3)], [conv(3)]), op("Softmax", axis=-1)],
    "Concat": [*BLOCK, both("Concat", [conv(), RELU], [conv(4)], axis=1), conv()],
    "pools and movers": [*BLOCK, op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]), op("Transpose", perm=[0, 1, 3, 2]), conv()],
    "odd operators": [conv(), op("Tanh"), op("Mul", np.float32(1.7)), clip(-1, 1), op("Sigmoid"), conv()],
    "a batch norm alone": [RELU, batch_norm(), RELU, conv()],
    "split": [conv(8), lambda net, x: net.op("Concat", *net.op("Split", x, outputs=2, axis=1), axis=1), conv()],
}  # fmt: skip
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def text(target: str, more: str = "", skip: str = "") -> str:
    """A configuration for a caller with samples of their own."""
    skipped = f"skip_quant_node={skip}\n" if skip else ""
    head = f"[common_quant_param]\nquant_type=FULL_QUANT\n{skipped}"
    return f"{head}[full_quant_param]\ntarget_device={target}\n{more}"


def quantized(
    model: onnx.ModelProto, folder: Path, target: str, more: str = "", skip: str = "", **flags
):
    """A conversion of a model with samples of its own."""
    config, feeds = Config.from_text(text(target, more, skip)), samples_for(model)
    plan = folder / "plan.json"
    return convert(
        model, config, folder / "out.onnx", feeds, plan=plan, progress=False, flags=Flags(**flags)
    )


@pytest.mark.parametrize("correction", ["true", "false"])
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("name", MODELS)
def test_small_models(name, target, correction, tmp_path):
    model = chain(*MODELS[name], shape=FIXED)
    path, plan, table = quantized(
        model, tmp_path, target, f"bias_correction={correction}\n", infer=True
    )
    assert table.problems == [], str(table)
    layers = {node.name: node.decision for node in plan.nodes if node.operator in LAYERS}
    # the compiler of ASCEND takes a product with a constant matrix only
    alone = {n.name for n in prepare(model).nodes if target == "ASCEND" and layer_of(n) is None}
    assert {name for name, kind in layers.items() if kind != "integer"} == alone & set(layers)
    feeds = samples_for(model)
    before, after = outputs_of(model.SerializeToString(), feeds), outputs_of(path, feeds)
    assert sqnr(np.stack([f[0] for f in before]), np.stack([q[0] for q in after])) > 18
    again = ptqlit.apply(tmp_path / "plan.json", model, tmp_path / "again")
    assert again.path.read_bytes() == path.read_bytes()
    assert str(again.table) == str(table)


RESIDUAL = chain(*MODELS["residual"], op("GlobalAveragePool"), op("Flatten"), gemm(8), shape=FIXED)
BROKEN = {  # rules of a target that a CPU file of a residual network breaks
    "NVGPU": [
        "the codes of activations are int8", "every zero point is 0", "a bias is float, without codes",
        "each reader has a pair of its own", "codes stand before Conv", "a residual Add",
    ],
    "ASCEND": [
        "the codes of activations are int8", "scales per channel count", "a bias is float",
        "each reader has a pair of its own", "codes stand before Conv",
    ],
    "DSP": ["scales per channel count", "every float32 tensor has codes"],
}  # fmt: skip


@pytest.mark.parametrize("target", OTHERS)
def test_a_file_for_the_cpu_breaks_the_rules_of_others(target, tmp_path):
    path, _, _ = quantized(RESIDUAL, tmp_path, "CPU")
    assert judge(open_records(path), BACKENDS["CPU"]) == []
    broken = judge(open_records(path), BACKENDS[target])
    assert len(broken) == len(BROKEN[target]) and all(one.names for one in broken)
    for one, words in zip(broken, BROKEN[target]):
        assert one.rule.startswith(words)


@pytest.mark.parametrize("target", OTHERS)
def test_a_file_for_another_target_breaks_the_rules_of_the_cpu(target, tmp_path):
    path, _, _ = quantized(RESIDUAL, tmp_path, target)
    rules = {one.rule.split(" are ")[0] for one in judge(open_records(path), BACKENDS["CPU"])}
    assert rules == (set() if target == "DSP" else {"the codes of activations"})


def test_places_of_nvgpu(tmp_path):
    """Pairs in front of layers and on the skip branch, each reader with its own; float biases."""
    path, plan, _ = quantized(RESIDUAL, tmp_path, "NVGPU")
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    readers = [node for node in plan.nodes if node.decision == "integer"]
    assert {edge.consumer for edge in plan.edges} == {node.name for node in readers}
    assert all(edge.own and not edge.shielded for edge in plan.edges)
    add = next(node for node in nodes.values() if node.op_type == "Add")
    makers = {output: node.op_type for node in nodes.values() for output in node.output}
    assert sorted(makers[name] for name in add.input) == ["Conv", "DequantizeLinear"]
    assert all(
        makers.get(node.input[2]) is None for node in nodes.values() if node.op_type == "Conv"
    )
    assert not any(
        node.op_type in ("Relu", "Clip") and "Dequantize" in makers[node.input[0]]
        for node in nodes.values()
    )


def test_scales_of_a_transposed_convolution(tmp_path):
    """NVGPU: along dimension 1; one scale where the file stores the channels of one group only."""
    one = quantized(chain(*MODELS["ConvTranspose"], shape=FIXED), tmp_path, "NVGPU").plan
    weight = next(
        t for t in one.tensors if t.role == "weight" and t.node.startswith("ConvTranspose")
    )
    assert (weight.axis, weight.scale.shape) == (1, (6,))
    many = quantized(chain(*MODELS["ConvTranspose in groups"], shape=FIXED), tmp_path, "NVGPU").plan
    weight = next(
        t for t in many.tensors if t.role == "weight" and t.node.startswith("ConvTranspose")
    )
    assert (weight.axis, weight.scale.shape) == (None, ())
    assert any("one scale for the weight" in note for note in many.notes)


@pytest.mark.parametrize("target", ["DSP", "ASCEND"])
def test_matrices_have_one_scale_and_the_log_says_so(target, tmp_path, caplog):
    plan = quantized(RESIDUAL, tmp_path, target).plan
    weights = {t.node: t for t in plan.tensors if t.role == "weight"}
    names = {node.name: node.operator for node in plan.nodes}
    for node, weight in weights.items():
        assert (weight.axis is None) == (names[node] == "Gemm")
    assert f"{target} has scales per channel for Conv and ConvTranspose only" in caplog.text
    caplog.clear()
    plan = quantized(RESIDUAL, tmp_path, target, "per_channel=false\n").plan
    assert all(t.axis is None for t in plan.tensors if t.role == "weight")
    assert "scales per channel" not in caplog.text
    pair = chain(conv(), RELU, conv(), shape=FIXED)
    plan = quantized(pair, tmp_path, target, "per_channel=false\n").plan
    assert bool(plan.factors) == (target != "DSP")  # no equalization for DSP


def test_biases_of_ascend_are_rounded(tmp_path):
    path, plan, _ = quantized(RESIDUAL, tmp_path, "ASCEND")
    for tensor in (t for t in plan.tensors if t.role == "bias"):
        codes = tensor.values.astype(np.float64) / tensor.scale
        assert tensor.form == "float" and np.abs(codes - np.rint(codes)).max() < 1e-2
    stored = {
        t.name for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT32
    }
    assert not stored


# ---------------------------------------------------------------- files of other tools


class Reader:
    """Calibration samples as onnxruntime's tools take them."""

    def __init__(self):
        self.feeds = iter(samples_for(RESIDUAL))

    def get_next(self):
        return next(self.feeds, None)


UINT, INT = QuantType.QUInt8, QuantType.QInt8
KINDS = ["Conv", "Gemm"]
GPU = {  # what onnxruntime's own example for TensorRT sets
    "ActivationSymmetric": True, "DedicatedQDQPair": True, "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": KINDS,
}  # fmt: skip
HELD = "operators are float ones with codes around them"
OWN, SCALES = "each reader has a pair of its own", "scales per channel count the output channels of "


def other_file(kind: str, folder: Path) -> Path:
    """The residual network, quantized by onnxruntime."""
    source, path = folder / "float.onnx", folder / f"{kind}.onnx"
    onnx.save(RESIDUAL, source)
    words = dict(activation_type=UINT, weight_type=INT, per_channel=True)
    if kind == "DSP":
        quantize(source, path, get_qnn_qdq_config(source, Reader(), **words))
        return path
    if kind == "NVGPU":
        words |= dict(activation_type=INT, op_types_to_quantize=KINDS, extra_options=GPU)
    if kind == "operators":
        words |= dict(quant_format=QuantFormat.QOperator, per_channel=False)
    quantize_static(source, path, Reader(), **words)
    return path


@pytest.mark.parametrize(
    "kind, target, rules",
    [
        ("CPU", "CPU", []),
        ("NVGPU", "NVGPU", [OWN]),  # the Add reads the pair of the convolution beside it
        ("DSP", "DSP", [SCALES + "Conv, ConvTranspose"]),  # of the Gemm
        ("operators", "CPU", []),
        ("operators", "DSP", [HELD]),
    ],
)
def test_files_of_other_tools(kind, target, rules, tmp_path, capsys):
    path = other_file(kind, tmp_path)
    assert [one.rule for one in judge(open_records(path), BACKENDS[target])] == rules
    assert command(["check", str(path), f"--target={target}"]) == (1 if rules else 0)
    said = capsys.readouterr().out
    assert all(rule in said for rule in rules) and ("rules of CPU hold" in said) == (not rules)
    assert ("not looked at" in said) == (kind == "operators" and target == "CPU")


@pytest.mark.parametrize("target", BACKENDS)
def test_constants_in_nodes_and_nodes_without_names(target, tmp_path):
    """As PyTorch writes them: nothing is found that is not in the same file of our form."""
    model = onnx.load(quantized(RESIDUAL, tmp_path, "CPU").path)
    before = judge(records_of(model), BACKENDS[target])
    stored = list(model.graph.initializer)
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in stored]
    for node in model.graph.node:
        node.name = ""
    nodes += list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    after = judge(records_of(model), BACKENDS[target])
    assert [(b.rule, len(b.names)) for b in before] == [(a.rule, len(a.names)) for a in after]
    assert all(name.strip() and name[0] != " " for one in after for name in one.names)


def test_odd_numbers_are_named_and_stop_nobody(tmp_path):
    """Scales of any shape and value, at any place: the judge answers."""
    random, found = np.random.default_rng(0), set()
    path = quantized(RESIDUAL, tmp_path, "CPU").path
    for _ in range(60):
        model = onnx.load(path)
        linear = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        node = linear[random.integers(len(linear))]
        shape = [(), (1,), (2,), (8,), (3, 2), (0,)][random.integers(6)]
        values = np.full(shape, random.choice([0, -1, np.nan, np.inf, 1e-30, 0.5]), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "odd"))
        node.input[int(random.integers(1, len(node.input)))] = "odd"
        for backend in BACKENDS.values():
            found |= {one.rule for one in judge(records_of(model), backend)}
    assert {"scales are constant, finite and above 0", "an activation has one constant scale"} <= found


def test_check_says_what_is_wrong_with_its_arguments(tmp_path, capsys):
    path = str(quantized(RESIDUAL, tmp_path, "CPU").path)
    wrong = [
        ([path, "--target=TPU"], 168, "--target=TPU: expected one of CPU, NVGPU, DSP, ASCEND"),
        ([path], 168, "--target"),
        ([], 168, "MODEL"),
        ([str(tmp_path / "no.onnx"), "--target=CPU"], 56, "no.onnx: cannot read the model"),
        ([str(tmp_path), "--target=CPU"], 56, "a folder; expected an ONNX file"),
    ]
    for arguments, status, said in wrong:
        assert command(["check", *arguments]) == status
        assert said in capsys.readouterr().err
    onnx.save(RESIDUAL, tmp_path / "float.onnx")
    assert command(["check", str(tmp_path / "float.onnx"), "--target=NVGPU"]) == 1
    assert "it has no QuantizeLinear" in capsys.readouterr().out
    assert command(["check", path, "--target=NVGPU"]) == 1
    assert sum("broken" in line for line in capsys.readouterr().out.splitlines()[1:]) == 6


# ---------------------------------------------------------------- shapes


OPEN = chain(*MODELS["residual"])


def test_dsp_wants_fixed_sizes(tmp_path):
    with pytest.raises(InputError, match='DSP needs fixed sizes, and the input "x" has n,3,12,12'):
        quantized(OPEN, tmp_path, "DSP")
    with pytest.raises(InputError, match='no input "z"'):
        quantized(OPEN, tmp_path, "DSP", input_shape="z:1,3,12,12")
    path, plan, table = quantized(OPEN, tmp_path, "DSP", input_shape="x:2,3,12,12", infer=True)
    assert table.problems == [] and plan.shapes == (("x", (2, 3, 12, 12)),)
    model = onnx.load(path)
    infos = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    dims = [d for info in infos for d in info.type.tensor_type.shape.dim]
    assert dims and all(d.HasField("dim_value") for d in dims)
    assert (
        open_session(path).run(None, {"x": np.zeros((2, 3, 12, 12), np.float32)})[0].shape[0] == 2
    )
    assert ptqlit.apply(plan, OPEN, tmp_path / "again").path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("target", ["NVGPU", "ASCEND"])
def test_others_keep_open_sizes(target, tmp_path):
    path, plan, _ = quantized(OPEN, tmp_path, target)
    assert plan.shapes == () and plan.metadata == ()
    for count in (1, 3):
        feed = {"x": np.zeros((count, 3, 12, 12), np.float32)}
        assert open_session(path).run(None, feed)[0].shape[0] == count


def ascend(shape: str, dims: str = "") -> str:
    """The section of Ascend."""
    return f"[ascend_context]\ninput_shape={shape}\n" + (f"dynamic_dims={dims}\n" if dims else "")


def test_shapes_of_ascend_are_carried_in_the_file(tmp_path):
    path, plan, table = quantized(OPEN, tmp_path, "ASCEND", ascend("x:[-1,3,12,12]", "[1~4],[8]"))
    words = {"ascend.input_shape": "x:-1,3,12,12", "ascend.dynamic_batch_size": "1,2,3,4,8"}
    assert {p.key: p.value for p in onnx.load(path).metadata_props}.items() >= words.items()
    assert dict(load_plan(tmp_path / "plan.json").metadata) == words and table.problems == []
    again = ptqlit.apply(tmp_path / "plan.json", OPEN, tmp_path / "again")
    assert again.path.read_bytes() == path.read_bytes()
    images = chain(*MODELS["residual"], shape=(1, 3, "h", "w"))
    feeds = [{"x": f["x"].repeat(16, 2).repeat(20, 3)} for f in samples_for(images)]
    config = Config.from_text(text("ASCEND", ascend("x:[1,3,-1,-1]", "[16~17,20]")))
    plan = convert(images, config, tmp_path / "images", feeds, progress=False).plan
    assert dict(plan.metadata)["ascend.dynamic_image_size"] == "16,20;17,20"
    closed = quantized(OPEN, tmp_path, "ASCEND", ascend("x:[2,3,12,12]")).plan
    assert closed.shapes == (("x", (2, 3, 12, 12)),)


@pytest.mark.parametrize(
    "shape, dims, given, said",
    [
        ("y:[-1,3,12,12]", "[1]", "", 'the model has no input "y"'),
        ("x:[-1,4,12,12]", "[1]", "", "expected 3 instead of 4"),
        ("x:[3,12,12]", "", "", "expected 4 dimensions"),
        ("x:[1,3,-1,-1]", "[12,12]", "", "expected 12 instead of -1"),
        ("x:[-1,3,12,12]", "[1~4],[8]", "x:5,3,12,12", "expected one of the shapes of"),
    ],
)
def test_shapes_of_ascend_that_do_not_fit(shape, dims, given, said, tmp_path):
    with pytest.raises(InputError, match="input_shape|--inputShape") as caught:
        quantized(OPEN, tmp_path, "ASCEND", ascend(shape, dims), input_shape=given)
    assert said in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- what stays float, and what is portable


@pytest.mark.parametrize("target", OTHERS)
def test_a_skipped_layer_has_no_guard(target, tmp_path):
    """Guards and shields are for onnxruntime's own kernels."""
    name = next(n.name for n in prepare(OPEN).nodes[1:] if layer_of(n))
    path, plan, table = quantized(OPEN, tmp_path, target, skip=name, input_shape="x:1,3,12,12")
    assert plan.node(name).decision == "float" and plan.of_node(name, "bias") is None
    assert not any(edge.shielded for edge in plan.edges)
    broken = [("a layer has codes at its input and its weight, or at neither", (name,))]
    assert [(b.rule, b.names) for b in table.problems] == (broken if target == "DSP" else [])
    assert open_session(path)


def test_skipping_the_add_of_a_block_breaks_a_rule_of_nvgpu(tmp_path):
    add = next(n.name for n in prepare(OPEN).nodes if n.op_type == "Add")
    table = quantized(OPEN, tmp_path, "NVGPU", skip=add).table
    assert [one.names for one in table.problems] == [(f"{add} (no codes at the skip branch)",)]


def test_portable(tmp_path):
    model = chain(*MODELS["Gemm"])
    plain, careful = (quantized(model, tmp_path, "CPU", portable=p) for p in (False, True))
    graph = prepare(model)
    for node in filter(layer_of, graph.nodes):
        layer, tensor = layer_of(node), careful.plan.of_node(node.name, "weight")
        stored = {t.name: t for t in onnx.load(careful.path).graph.initializer}
        codes = onnx.numpy_helper.to_array(stored[f"{tensor.name}_quantized"])
        assert not can_saturate(codes, layer.axis, layer.group).any()
        wider = tensor.scale / plain.plan.of_node(node.name, "weight").scale
        assert (wider >= 1).all() and (wider <= 2.01).all()
        assert constant(node.inputs[1]).shape == codes.shape
    assert careful.table.found == careful.table.planned
    with pytest.raises(InputError, match="portable: expected target_device=CPU"):
        quantized(model, tmp_path, "NVGPU", portable=True)
    with pytest.raises(InputError, match="portable: no meaning with quant_type=WEIGHT_QUANT"):
        weights = Config.from_text("[common_quant_param]\nquant_type=WEIGHT_QUANT\n")
        convert(model, weights, tmp_path / "w", flags=Flags(portable=True))


def test_a_backend_of_ones_own(tmp_path):
    """A table that only quantizes convolutions, for another machine, with one check."""
    mine = replace(BACKENDS["ASCEND"], name="MINE", rules=BACKENDS["ASCEND"].rules[:1])
    config, feeds = Config.from_text(text("CPU")), samples_for(RESIDUAL)
    path, plan, table = convert(RESIDUAL, config, tmp_path / "mine", feeds, mine, progress=False)
    assert table.problems == [] and "have codes for MINE" in str(table)
    assert {n.operator for n in plan.nodes if n.decision == "integer"} == {"Conv"}
    again = ptqlit.apply(plan, RESIDUAL, tmp_path / "again", backend=mine)
    assert again.path.read_bytes() == path.read_bytes() and str(again.table) == str(table)
