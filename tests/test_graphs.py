"""Graphs of every shape: shared tensors, odd names, several inputs and outputs, skip lists, old opsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import (
    IMAGE,
    Net,
    Result,
    batch_norm,
    both,
    chain,
    clip,
    config_text,
    conv,
    gemm,
    ints,
    matmul,
    op,
    outputs_of,
    quantize,
    run,
    samples_for,
)
from onnx import TensorProto, helper, numpy_helper
from test_operators import check

from ptqlit import Config, InputError, convert
from ptqlit.arithmetic.measure import sqnr
from ptqlit.model.runtime import open_session

BIAS = op("Add", np.linspace(-1, 1, 8, dtype=np.float32))


def good(result: Result, db: float = 25.0, decisions: str = "") -> Result:
    """Everything that the operator table checks too."""
    check(result, decisions, db)
    return result


# ---------------------------------------------------------------- inputs and outputs


def test_an_output_that_is_also_read_inside(tmp_path):
    net = Net()
    first = run(net, net.input("x", IMAGE), conv(), op("Relu"))
    result = good(quantize(net.model(run(net, first, conv()), first), tmp_path))
    assert result.decisions == "Conv=integer Relu=absorbed Conv=integer"


def test_an_output_in_front_of_a_relu_keeps_the_relu(tmp_path):
    net = Net()
    first = run(net, net.input("x", IMAGE), conv())
    result = good(quantize(net.model(first, run(net, first, op("Relu"), conv())), tmp_path))
    assert result.decisions == "Conv=integer Relu=float Conv=integer"
    assert min(output[0].min() for output in result.after) < 0


def test_two_readers_keep_the_relu(tmp_path):
    net = Net()
    first = run(net, net.input("x", IMAGE), conv())
    joined = net.op("Concat", run(net, first, op("Relu")), run(net, first, op("Sigmoid")), axis=1)
    good(
        quantize(net.model(run(net, joined, conv())), tmp_path),
        decisions="Conv=integer Relu=float Sigmoid=integer Concat=integer Conv=integer",
    )


def test_an_input_with_several_readers(tmp_path):
    net = Net()
    x = net.input("x", IMAGE)
    joined = net.op("Add", run(net, x, conv()), run(net, x, op("Tanh"), conv()))
    result = good(quantize(net.model(net.op("Mul", run(net, joined, conv(3)), x)), tmp_path))
    assert (
        result.decisions
        == "Conv=integer Tanh=float Conv=integer Add=integer Conv=integer Mul=float"
    )


@pytest.mark.parametrize("operator", ["Add", "Concat", "Mul"])
def test_two_inputs(operator, tmp_path):
    net = Net()
    x, y = net.input("x", IMAGE), net.input("y", IMAGE)
    joined = net.op(
        operator,
        run(net, x, conv()),
        run(net, y, conv()),
        **({"axis": 1} if operator == "Concat" else {}),
    )
    good(
        quantize(net.model(run(net, joined, conv())), tmp_path),
        decisions=f"Conv=integer Conv=integer {operator}=integer Conv=integer",
    )


def test_an_integer_input_stays_what_it_is(tmp_path):
    net = Net()
    table = net.const(net.normal(10, 16), "table")
    ids = net.input("ids", (1, 5), TensorProto.INT64)
    result = good(
        quantize(
            net.model(run(net, net.op("Gather", table, ids), matmul(), op("Relu"), matmul())),
            tmp_path,
        )
    )
    assert result.decisions == "Gather=float MatMul=integer Relu=absorbed MatMul=integer"


def test_several_outputs(tmp_path):
    net = Net()
    body = run(net, net.input("x", IMAGE), conv(), op("Relu"))
    heads = [
        run(net, body, conv(4)),
        run(net, body, conv(4), op("Sigmoid")),
        run(net, body, op("GlobalAveragePool"), op("Flatten"), gemm()),
    ]
    good(quantize(net.model(*heads), tmp_path))


@pytest.mark.parametrize(
    "opset, sizes", [(11, None), (13, ints(3, 5)), (17, None), (21, ints(3, 5))]
)
def test_split(opset, sizes, tmp_path):
    net = Net(opset)
    first = run(net, net.input("x", IMAGE), conv())
    more = [] if sizes is None else [net.const(sizes)]
    options = {"split": [3, 5]} if opset == 11 else {}
    parts = net.op("Split", first, *more, outputs=2, axis=1, **options)
    joined = net.op(
        "Concat", run(net, parts[1], conv(3)), run(net, parts[0], op("Relu"), conv(3)), axis=1
    )
    result = good(quantize(net.model(run(net, joined, conv())), tmp_path))
    assert "Split=pass-through" in result.decisions


def test_split_with_an_output_that_nobody_reads(tmp_path):
    net = Net()
    parts = net.op("Split", run(net, net.input("x", IMAGE), conv()), outputs=2, axis=1)
    good(quantize(net.model(run(net, parts[0], conv())), tmp_path))


@pytest.mark.parametrize("operator", ["Identity", "Dropout"])
def test_one_tensor_under_two_output_names(operator, tmp_path):
    net = Net()
    first = run(net, net.input("x", IMAGE), conv())
    second = run(net, first, op(operator))
    result = good(quantize(net.model(second, first), tmp_path))
    assert [o.name for o in onnx.load(result.path).graph.output] == [second, first]
    assert np.array_equal(result.after[0][0], result.after[0][1])


def test_initializers_that_are_also_inputs(tmp_path):
    model = chain(conv(), op("Relu"), conv())
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    good(quantize(model, tmp_path), decisions="Conv=integer Relu=absorbed Conv=integer")


# ---------------------------------------------------------------- sharing, names, leftovers


def test_shared_weights_and_biases(tmp_path):
    net = Net()
    x = net.input("x", ("n", 8, 12, 12))
    weight, bias = net.const(net.normal(8, 8, 3, 3, scale=0.1)), net.const(net.normal(8))
    for _ in range(3):
        x = run(net, net.op("Conv", x, weight, bias, pads=[1, 1, 1, 1]), op("Relu"))
    result = good(quantize(net.model(run(net, x, batch_norm(), conv())), tmp_path))
    assert result.decisions.count("Conv=integer") == 4


def test_one_constant_as_weight_and_as_operand(tmp_path):
    net = Net()
    weight = net.const(net.normal(8, 8, scale=0.3))
    x = run(net, net.input("x", (8, 8)), gemm(trans_b=0))
    x = net.op("MatMul", net.op("Add", x, weight), weight)
    good(quantize(net.model(run(net, x, gemm())), tmp_path))


def test_identity_dropout_and_constant_nodes(tmp_path):
    net = Net()
    x = run(
        net,
        net.input("x", IMAGE),
        op("Identity"),
        conv(),
        op("Dropout"),
        op("Identity"),
        op("Relu"),
        op("Dropout"),
    )
    value = net.op("Constant", value=numpy_helper.from_array(np.float32([0.5])))
    x = run(net, net.op("Add", x, value), conv(), op("Identity"))
    good(
        quantize(net.model(x), tmp_path),
        decisions="Conv=integer Relu=absorbed Add=integer Conv=integer",
    )


@pytest.mark.parametrize("name", ["", "same", "Conv1", "a,b", "x", "a/b:c[0]"])
def test_names_of_nodes(name, tmp_path):
    steps = [
        conv(name=name),
        op("Relu", name=name),
        conv(name=name),
        op("Tanh", name=name),
        conv(name=name),
    ]
    result = good(
        quantize(chain(*steps), tmp_path),
        decisions="Conv=integer Relu=absorbed Conv=integer Tanh=float Conv=integer",
    )
    assert len({n.name for n in result.plan.nodes}) == len(result.plan.nodes)


@pytest.mark.parametrize(
    "name",
    [
        "x_scale",
        "x_zero_point",
        "x_QuantizeLinear_Output",
        "Conv0_bias",
        "Conv0_bias_scale",
        "npz",
        "c0_quantized",
    ],
)
def test_tensors_named_as_ours(name, tmp_path):
    model = chain(conv(), op("Relu"), conv())
    for node in model.graph.node:
        node.input[:] = [name if i == "t1" else i for i in node.input]
        node.output[:] = [name if o == "t1" else o for o in node.output]
    result = good(quantize(model, tmp_path))
    assert [o.name for o in onnx.load(result.path).graph.output] == ["t2"]


def test_names_of_inputs_and_outputs_are_kept(tmp_path):
    net = Net()
    y = run(net, net.input("x", IMAGE), conv(), op("Relu"))
    result = good(quantize(net.model(y, run(net, y, op("GlobalAveragePool"))), tmp_path))
    for model in (onnx.load(result.path), result.model):
        assert [v.name for v in model.graph.input] == ["x"]
        assert [v.name for v in model.graph.output] == ["t1", "t2"]


def test_functions_are_inlined(tmp_path):
    model = chain(conv(), op("Tanh"), conv())
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    model.functions.append(
        helper.make_function("mine", "Odd", ["a"], ["c"], body, [helper.make_opsetid("", 17)])
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].domain, model.graph.node[1].op_type = "mine", "Odd"
    good(quantize(model, tmp_path), decisions="Conv=integer Relu=absorbed Neg=float Conv=integer")


@pytest.mark.parametrize("operator", ["Relu", "Tanh"])
def test_a_branch_that_reads_from_outside(operator, tmp_path):
    net = Net()
    flag = net.input("flag", (), TensorProto.BOOL)
    body = run(net, net.input("x", IMAGE), conv())
    branches = [
        helper.make_graph(
            [helper.make_node(o, [body], [f"b{o}"])],
            o,
            [],
            [helper.make_tensor_value_info(f"b{o}", 1, ("n", 8, 12, 12))],
        )
        for o in (operator, "Neg")
    ]
    net.nodes.append(
        helper.make_node(
            "If",
            [flag],
            ["chosen"],
            name="choice",
            then_branch=branches[0],
            else_branch=branches[1],
        )
    )
    net.infos["chosen"] = helper.make_tensor_value_info("chosen", 1, ("n", 8, 12, 12))
    good(
        quantize(net.model(run(net, "chosen", conv())), tmp_path),
        decisions="Conv=integer If=float Conv=integer",
    )


# ---------------------------------------------------------------- opsets


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 15, 17, 19, 21, 23])
def test_opsets(opset, tmp_path):
    six = op("Clip", min=0.0, max=6.0) if opset < 11 else clip(0, 6)
    steps = [
        conv(),
        batch_norm(),
        six,
        both("Add", [conv()], []),
        op("Relu"),
        op("GlobalAveragePool"),
        op("Flatten"),
        gemm(),
    ]
    result = good(quantize(chain(*steps, opset=opset), tmp_path))
    assert (
        result.decisions
        == "Conv=integer Clip=absorbed Conv=integer Add=integer Relu=absorbed GlobalAveragePool=integer Flatten=pass-through Gemm=integer"
    )
    written = onnx.load(result.path)
    assert written.opset_import[0].version == max(opset, 13)


@pytest.mark.parametrize("opset", [11, 12])
def test_old_models_that_end_on_one_pixel(opset, tmp_path):
    good(
        quantize(
            chain(
                conv(),
                op("Relu"),
                op("GlobalAveragePool"),
                conv(kernel=1),
                op("Flatten"),
                opset=opset,
            ),
            tmp_path,
        )
    )


# ---------------------------------------------------------------- layers that look like others


@pytest.mark.parametrize("shape", [(4, 8), (4, 1), (1, 1)])
def test_gemm_bias_of_any_shape(shape, tmp_path):
    good(quantize(chain(gemm(), gemm(bias=shape), gemm(), shape=(4, 16)), tmp_path))


@pytest.mark.parametrize("rows", [4, 8])
def test_gemm_bias_of_one_value_a_row(rows, tmp_path):
    good(quantize(chain(gemm(), gemm(bias=(rows, 1)), gemm(), shape=(rows, 16)), tmp_path))


def test_gemm_with_a_computed_bias(tmp_path):
    net = Net()
    x = run(net, net.input("x", (4, 16)), gemm())
    weight = net.const(net.normal(8, 8, scale=0.3))
    good(
        quantize(
            net.model(run(net, net.op("Gemm", x, weight, run(net, x, gemm()), beta=0.5), gemm())),
            tmp_path,
        )
    )


@pytest.mark.parametrize("shape", [(5, 8, 6), (8,)])
def test_matmul_of_a_matrix_with_another_rank(shape, tmp_path):
    net = Net()
    x = net.op("MatMul", run(net, net.input("x", (6, 16)), gemm()), net.const(net.normal(*shape)))
    width = net.shape(x)[-1]
    good(
        quantize(
            net.model(run(net, net.op("Add", x, net.const(net.normal(width))), op("Tanh"))),
            tmp_path,
        )
    )


def test_matmul_with_a_stack_of_weights(tmp_path):
    net = Net()
    x = net.op(
        "MatMul", run(net, net.input("x", (2, 5, 16)), matmul()), net.const(net.normal(2, 8, 6))
    )
    good(quantize(net.model(run(net, x, matmul())), tmp_path))


def test_matmul_with_the_constant_in_front(tmp_path):
    net = Net()
    x = net.op("MatMul", net.const(net.normal(6, 16)), run(net, net.input("x", (16, 4)), gemm()))
    good(quantize(net.model(run(net, x, gemm())), tmp_path))


def test_resize_by_factors_that_are_an_input(tmp_path):
    net = Net()
    x, factors = net.input("x", IMAGE), net.input("factors", (4,))
    y = net.op("Resize", run(net, x, conv()), "", factors, mode="nearest")
    net.infos[y] = helper.make_tensor_value_info(y, 1, ("n", 8, "h", "w"))
    feeds = [
        feed | {"factors": np.array([1, 1, 3, 2], np.float32)} for feed in samples_for(net.model(y))
    ]
    result = good(quantize(net.model(run(net, y, conv())), tmp_path, feeds=feeds))
    assert result.after[0][0].shape == (1, 8, 36, 24)


def test_a_convolution_with_a_computed_weight_or_bias(tmp_path):
    net = Net()
    x, weight = run(net, net.input("x", IMAGE), conv()), net.input("w", (4, 8, 3, 3))
    x = net.op(
        "Conv",
        x,
        net.op("Tanh", weight),
        run(net, weight, op("ReduceMean", axes=[1, 2, 3], keepdims=0)),
    )
    good(quantize(net.model(run(net, x, conv())), tmp_path))


def test_half_precision_stays(tmp_path):
    net = Net()
    x = run(net, net.input("x", IMAGE), conv(), op("Cast", to=TensorProto.FLOAT16))
    x = net.op("Conv", x, net.const(net.normal(4, 8, 3, 3, scale=0.1).astype(np.float16)))
    result = quantize(net.model(run(net, x, op("Cast", to=TensorProto.FLOAT), conv())), tmp_path)
    good(result, decisions="Conv=integer Cast=float Conv=float Cast=float Conv=integer")


# ---------------------------------------------------------------- numbers at the edge


def scaled(factor: float):
    """Multiply the weight of the last convolution."""

    def step(net: Net, x: str) -> str:
        name = net.nodes[-1].input[1]
        net.const((numpy_helper.to_array(net.constants[name]) * np.float32(factor)), name)
        return x

    return step


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-12, 1e-6, 1e6, 1e12])
def test_weights_of_any_size(factor, tmp_path):
    result = quantize(chain(conv(), scaled(factor), op("Relu"), conv()), tmp_path)
    assert result.table.problems == [] and result.quality >= 20


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-6, 1e6, 1e12])
def test_inputs_of_any_size(factor, tmp_path):
    model = chain(conv(bias=False), op("Relu"), conv(bias=False))
    feeds = [{"x": feed["x"] * np.float32(factor)} for feed in samples_for(model)]
    result = quantize(model, tmp_path, feeds=feeds)
    assert result.table.problems == [] and all(np.isfinite(a[0]).all() for a in result.after)
    assert result.quality >= 20 or factor in (0, 1e-30)


def test_a_dead_channel_with_a_bias(tmp_path):
    net = Net()
    weight = net.normal(8, 3, 3, 3)
    weight[2], weight[5] = 0, 1e-12
    x = net.op(
        "Conv",
        net.input("x", IMAGE),
        net.const(weight),
        net.const(np.linspace(-3, 3, 8, dtype=np.float32)),
    )
    result = good(quantize(net.model(run(net, x, conv())), tmp_path))
    assert "raised" in result.plan.of_node("Conv0", "weight").reason


def test_samples_with_nan_and_infinity_are_named_and_survived(tmp_path, caplog):
    model = chain(conv(), op("Relu"), conv())
    feeds = samples_for(model)
    feeds[1]["x"][0, 0, 0, 0], feeds[2]["x"][0, 1, 3, 3] = np.nan, np.inf
    path, plan, table = convert(
        model, Config.from_text(config_text()), tmp_path / "a.onnx", samples=feeds
    )
    assert (
        table.problems == [] and "x: 1 NaN and 1 infinite values in 2 of 6 samples" in caplog.text
    )
    clean = outputs_of(path, feeds[3:])
    assert (
        sqnr(
            np.stack([c[0] for c in clean]),
            np.stack([o[0] for o in outputs_of(model.SerializeToString(), feeds[3:])]),
        )
        > 20
    )


# ---------------------------------------------------------------- skip lists

SKIPS = {  # name: steps, the node to skip, letters expected for all nodes
    "between": (
        [conv(), op("Relu"), conv(), conv()],
        "Conv2",
        "Conv=integer Relu=absorbed Conv=float Conv=integer",
    ),
    "without bias": (
        [conv(), conv(bias=False), conv()],
        "Conv1",
        "Conv=integer Conv=float Conv=integer",
    ),
    "with Relu": (
        [conv(), conv(), op("Relu"), conv()],
        "Conv1",
        "Conv=integer Conv=float Relu=float Conv=integer",
    ),
    "depthwise": (
        [conv(), conv(8, group=8), conv()],
        "Conv1",
        "Conv=integer Conv=float Conv=integer",
    ),
    "behind a pool": (
        [conv(), op("MaxPool", kernel_shape=[2, 2]), conv(), conv()],
        "Conv2",
        "Conv=integer MaxPool=float Conv=float Conv=integer",
    ),
    "behind a Transpose": (
        [conv(), op("Transpose", perm=[0, 1, 3, 2]), conv(), conv()],
        "Conv2",
        "Conv=integer Transpose=float Conv=float Conv=integer",
    ),
    "Gemm": (
        [op("Flatten"), gemm(), gemm(), gemm()],
        "Gemm2",
        "Flatten=pass-through Gemm=integer Gemm=float Gemm=integer",
    ),
    "Gemm without bias": (
        [op("Flatten"), gemm(), gemm(bias=None), gemm()],
        "Gemm2",
        "Flatten=pass-through Gemm=integer Gemm=float Gemm=integer",
    ),
    "Gemm behind Flatten": (
        [conv(), op("Flatten"), gemm(), gemm()],
        "Gemm2",
        "Conv=integer Flatten=float Gemm=float Gemm=integer",
    ),
    "MatMul": (
        [op("Flatten"), gemm(), matmul(), matmul()],
        "MatMul2",
        "Flatten=pass-through Gemm=integer MatMul=float MatMul=integer",
    ),
    "MatMul and Add": (
        [op("Flatten"), gemm(), matmul(), BIAS, matmul()],
        "MatMul2",
        "Flatten=pass-through Gemm=integer Gemm=float MatMul=integer",
    ),
    "the Add of a MatMul": (
        [op("Flatten"), gemm(), matmul(), BIAS, matmul()],
        "Add3",
        "Flatten=pass-through Gemm=integer Gemm=float MatMul=integer",
    ),
    "batch norm": (
        [conv(), conv(), batch_norm(), conv()],
        "BatchNormalization2",
        "Conv=integer Conv=float Conv=integer",
    ),
    "the first": ([conv(), op("Relu"), conv()], "Conv0", "Conv=float Relu=float Conv=integer"),
    "the last": ([conv(), op("Relu"), conv()], "Conv2", "Conv=integer Relu=absorbed Conv=float"),
    "two in a row": (
        [conv(), conv(), conv(), conv()],
        "Conv1,Conv2",
        "Conv=integer Conv=float Conv=float Conv=integer",
    ),
    "all": ([conv(), op("Relu"), conv()], "Conv0,Conv2", "Conv=float Relu=float Conv=float"),
    "an Add": (
        [conv(), both("Add", [conv()], []), op("Relu"), conv()],
        "Add2",
        "Conv=integer Conv=integer Add=float Relu=float Conv=integer",
    ),
    "a pass-through": (
        [conv(), op("MaxPool", kernel_shape=[2, 2]), conv()],
        "MaxPool1",
        "Conv=integer MaxPool=float Conv=integer",
    ),
}


def stored_floats(path: Path) -> list[np.ndarray]:
    """The float constants of two or more dimensions that a file holds."""
    return [
        numpy_helper.to_array(t)
        for t in onnx.load(path).graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) > 1
    ]


def running_floats(result: Result, folder: Path) -> list[np.ndarray]:
    """The same for the graph that really runs; nothing when the runtime made codes of them."""
    optimized = folder / "optimized.onnx"
    open_session(result.path, optimized=optimized)
    return stored_floats(optimized)


@pytest.mark.parametrize("case", SKIPS)
def test_skipped_nodes_stay_float(case, tmp_path):
    steps, names, expected = SKIPS[case]
    result = good(quantize(chain(*steps), tmp_path, skip=names), decisions=expected)
    floats = [
        k
        for k in result.kernels
        if k.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
    ]
    layers = sum(
        n.decision == "float" and n.operator in ("Conv", "Gemm", "MatMul")
        for n in result.plan.nodes
    )
    assert len(floats) == layers == len(stored_floats(result.path))
    assert len(running_floats(result, tmp_path)) == layers, (
        "the runtime quantized a skipped layer by itself"
    )


def test_a_skipped_relu_says_which_node_to_name(tmp_path):
    result = good(quantize(chain(conv(), op("Relu"), conv()), tmp_path, skip="Relu1"))
    assert "Relu1" in result.plan.notes[0]


def test_skipping_everything_changes_nothing(tmp_path):
    result = quantize(chain(conv(), op("Relu"), conv()), tmp_path, skip="Conv0,Conv2")
    assert result.quality > 100 and not any(
        n.op_type == "QuantizeLinear" for n in onnx.load(result.path).graph.node
    )


# ---------------------------------------------------------------- models outside one message


def test_external_data(tmp_path):
    model = chain(conv(), op("Relu"), conv(), conv())
    (tmp_path / "model").mkdir()
    source = tmp_path / "model" / "m.onnx"
    onnx.save_model(
        model, str(source), save_as_external_data=True, location="m.data", size_threshold=0
    )
    feeds = samples_for(chain(conv()))
    config = Config.from_text(config_text("Conv2"))
    path, plan, table = convert(str(source), config, tmp_path / "other" / "out.onnx", samples=feeds)
    assert table.problems == []
    after = outputs_of(path, feeds)
    before = outputs_of(chain(conv(), op("Relu"), conv(), conv()).SerializeToString(), feeds)
    assert sqnr(np.stack([b[0] for b in before]), np.stack([a[0] for a in after])) > 25


@pytest.mark.parametrize("place", ["../m.data", "sub/../../m.data"])
def test_external_data_outside_the_folder_is_refused(place, tmp_path):
    (tmp_path / "model").mkdir()
    source = tmp_path / "model" / "m.onnx"
    onnx.save_model(
        chain(conv()), str(source), save_as_external_data=True, location="m.data", size_threshold=0
    )
    (tmp_path / "model" / "m.data").rename(tmp_path / "m.data")
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in (e for e in tensor.external_data if e.key == "location"):
            entry.value = place
    source.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="m.onnx") as caught:
        convert(
            str(source),
            Config.from_text(config_text()),
            tmp_path / "out.onnx",
            samples=samples_for(chain(conv())),
        )
    assert caught.value.status == -200 and not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- what cannot work is said in one line


def test_a_model_that_fails_on_the_samples_is_an_input_error(tmp_path):
    net = Net()
    x = net.op("Flatten", net.input("x", ("n", 1, "h", "w")))
    net.infos[x] = helper.make_tensor_value_info(x, 1, ("n", 16))
    feeds = [{"x": np.ones((1, 1, 5, 5), np.float32)}]
    with pytest.raises(InputError):
        quantize(net.model(run(net, x, gemm())), tmp_path, feeds=feeds)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [1, 2], ids=["weight", "bias"])
def test_weights_that_are_no_numbers(value, place, tmp_path):
    model = chain(conv(), op("Relu"), conv())
    tensor = next(t for t in model.graph.initializer if t.name == model.graph.node[2].input[place])
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(InputError, match=tensor.name) as caught:
        quantize(model, tmp_path)
    assert caught.value.status == -200 and not list(tmp_path.iterdir())
