"""Every operator of the CPU table, and what stands around it: converted, loaded, compared with float."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from builders import (
    IMAGE,
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
    quantize,
)

from ptqlit.model.graph import prepare

KINDS = {"i": "integer", "a": "absorbed", "p": "pass-through", "f": "float"}
HEAVY = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FusedMatMulActivation"}
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


@dataclass
class Row:
    """One model and what shall become of it."""

    name: str
    model: onnx.ModelProto
    expected: str  # Operator:letter for every node in computing order, a letter of KINDS; empty: not compared
    db: float = 25.0  # at least this SQNR

    @property
    def decisions(self) -> str:
        """The expectation as `Result.decisions` writes it."""
        return " ".join(
            f"{o}={KINDS[k]}" for o, k in (word.split(":") for word in self.expected.split())
        )


def row(name: str, steps: list, expected: str, db: float = 25.0, **options) -> Row:
    """A row of steps one after the other."""
    return Row(name, chain(*steps, **options), expected, db)


LINE, CUBE = ("n", 3, 16), ("n", 2, 6, 6, 6)
TWO = "Conv:i Conv:i"
CONVS = [
    row("conv 1-D", [conv(), conv()], TWO, shape=LINE),
    row("conv 2-D", [conv(), conv()], TWO),
    row("conv 3-D", [conv(4), conv(4)], TWO, shape=CUBE),
    row("conv alone", [conv()], "Conv:i"),
    row("fixed batch", [conv(), conv()], TWO, shape=(1, 3, 12, 12)),
    row("conv 1x1", [conv(kernel=1), conv(kernel=1, bias=False)], TWO),
    row("no bias", [conv(bias=False), conv(bias=False)], TWO),
    row("depthwise", [conv(), depthwise(), depthwise(bias=False)], "Conv:i Conv:i Conv:i"),
    row("depthwise multiplier", [conv(4), conv(8, group=4)], TWO),
    row("depthwise 1-D", [conv(), depthwise()], TWO, shape=LINE),
    row("grouped", [conv(), conv(group=2), conv(group=4)], "Conv:i Conv:i Conv:i"),
    row("strided", [conv(strides=[2, 2]), conv(strides=[2, 1])], TWO),
    row("dilated", [conv(dilations=[2, 2], pads=[2, 2, 2, 2]), conv()], TWO),
    row(
        "auto_pad upper",
        [conv(auto_pad="SAME_UPPER", strides=[2, 2]), conv(auto_pad="SAME_LOWER")],
        TWO,
    ),
    row("auto_pad valid", [conv(auto_pad="VALID"), conv(auto_pad="NOTSET")], TWO),
    row("asymmetric pads", [conv(pads=[0, 0, 1, 1], strides=[2, 2]), conv(pads=[2, 1, 0, 1])], TWO),
    row("batch norm", [conv(), batch_norm(), conv(bias=False), batch_norm()], TWO),
    row(
        "batch norm behind Gemm",
        [op("Flatten"), gemm(), batch_norm(), gemm()],
        "Flatten:p Gemm:i Gemm:i",
    ),
    row(
        "batch norm alone",
        [batch_norm(), conv(), op("Relu"), batch_norm(), conv()],
        "BatchNormalization:f Conv:i Relu:a BatchNormalization:f Conv:i",
    ),
    row(
        "batch norm and Relu",
        [conv(), batch_norm(), op("Relu"), conv(), batch_norm(), op("Relu")],
        "Conv:i Relu:a Conv:i Relu:a",
    ),
]
ACTIVATIONS = [
    row("Relu", [conv(), op("Relu"), conv(), op("Relu")], "Conv:i Relu:a Conv:i Relu:a"),
    row("Clip(0, 6)", [conv(), clip(0, 6), conv()], "Conv:i Clip:a Conv:i"),
    row("Clip(0, 6) never reached", [conv(), clip(0, 600), conv()], "Conv:i Clip:a Conv:i"),
    row("Clip(0, 1)", [conv(), clip(0, 1), conv()], "Conv:i Clip:a Conv:i"),
    row("Clip(-1, 1)", [conv(), clip(-1, 1), conv()], "Conv:i Clip:f Conv:i"),
    row("Clip(1, 2)", [conv(), clip(1, 2), conv()], "Conv:i Clip:f Conv:i"),
    row("Clip without bounds", [conv(), op("Clip"), conv()], "Conv:i Clip:f Conv:i"),
    row(
        "Clip without upper bound",
        [conv(), op("Clip", np.float32(0)), conv()],
        "Conv:i Clip:a Conv:i",
    ),
    row(
        "Clip without lower bound",
        [conv(), op("Clip", None, np.float32(1)), conv()],
        "Conv:i Clip:f Conv:i",
    ),
    row("Relu twice", [conv(), op("Relu"), op("Relu"), conv()], "Conv:i Relu:a Relu:f Conv:i"),
    row("Sigmoid", [conv(), op("Sigmoid"), conv()], "Conv:i Sigmoid:i Conv:i"),
    row("Sigmoid at the end", [conv(), op("Sigmoid")], "Conv:i Sigmoid:f"),
    row("LeakyRelu", [conv(), op("LeakyRelu", alpha=0.1), conv()], "Conv:i LeakyRelu:i Conv:i"),
    row(
        "SiLU", [conv(), both("Mul", [], [op("Sigmoid")]), conv()], "Conv:i Sigmoid:i Mul:i Conv:i"
    ),
    row("Softmax inside", [conv(), op("Softmax", axis=-1), conv()], "Conv:i Softmax:i Conv:i", 20),
    row(
        "Softmax over channels",
        [conv(), op("Softmax", axis=1), conv()],
        "Conv:i Softmax:i Conv:i",
        20,
    ),
    row("Softmax inside, opset 11", [conv(), op("Softmax", axis=1), conv()], "", 20, opset=11),
    row(
        "Softmax at the end",
        [op("Flatten"), gemm(), op("Softmax", axis=-1)],
        "Flatten:p Gemm:i Softmax:f",
    ),
    row("Tanh", [conv(), op("Tanh"), conv()], "Conv:i Tanh:f Conv:i"),
    row("HardSwish", [conv(), op("HardSwish"), conv()], "Conv:i HardSwish:f Conv:i"),
    row(
        "HardSigmoid gate",
        [conv(), both("Mul", [], [op("HardSigmoid")]), conv()],
        "Conv:i HardSigmoid:f Mul:i Conv:i",
    ),
    row(
        "PRelu",
        [conv(), op("PRelu", np.full((8, 1, 1), 0.2, np.float32)), conv()],
        "Conv:i PRelu:f Conv:i",
    ),
    row("Pad", [conv(), op("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1)), conv()], "Conv:i Pad:f Conv:i"),
    row("float inside float", [op("Tanh"), conv(), op("Tanh")], "Tanh:f Conv:i Tanh:f"),
    row("only float", [op("Tanh"), op("Exp")], "Tanh:f Exp:f", np.inf),
]
FLAT = [op("Flatten")]
DENSE = [
    row("Gemm transB", [*FLAT, gemm(), gemm()], "Flatten:p Gemm:i Gemm:i"),
    row(
        "Gemm",
        [gemm(trans_b=0), op("Relu"), gemm(trans_b=0)],
        "Gemm:i Relu:a Gemm:i",
        shape=("n", 16),
    ),
    row("Gemm transA", [gemm(trans_a=1), gemm()], "Gemm:i Gemm:i", shape=(16, 4)),
    row(
        "Gemm transA transB",
        [gemm(trans_a=1, trans_b=0), gemm(trans_a=1)],
        "Gemm:i Gemm:i",
        shape=(16, 4),
    ),
    row(
        "Gemm without bias",
        [gemm(bias=None), gemm(bias=None, trans_b=0)],
        "Gemm:i Gemm:i",
        shape=("n", 16),
    ),
    row(
        "Gemm alpha",
        [gemm(alpha=0.5), gemm(alpha=2.0, bias=None)],
        "Gemm:i Gemm:i",
        shape=("n", 16),
    ),
    row(
        "Gemm beta", [gemm(beta=0.5), gemm(alpha=2.0, beta=-1.0)], "Gemm:i Gemm:i", shape=("n", 16)
    ),
    row("Gemm scalar bias", [gemm(bias=(1,)), gemm()], "Gemm:i Gemm:i", shape=("n", 16)),
    row("Gemm bias of one row", [gemm(bias=(1, 8)), gemm()], "Gemm:i Gemm:i", shape=("n", 16)),
    row("Gemm at the start and end", [gemm()], "Gemm:i", shape=("n", 16)),
    row("Gemm and Relu at the end", [gemm(), op("Relu")], "Gemm:i Relu:a", shape=("n", 16)),
    row("MatMul 2-D", [matmul(), matmul()], "MatMul:i MatMul:i", shape=("n", 16)),
    row("MatMul 3-D", [matmul(), matmul()], "MatMul:i MatMul:i", shape=("n", 5, 16)),
    row(
        "MatMul and bias, 2-D",
        [matmul(), op("Add", np.ones(8, np.float32)), matmul(4), op("Add", np.ones(4, np.float32))],
        "Gemm:i Gemm:i",
        shape=("n", 16),
    ),
    row(
        "MatMul and bias, 3-D",
        [matmul(), op("Add", np.ones(8, np.float32)), matmul(4)],
        "MatMul:i Add:i MatMul:i",
        shape=("n", 5, 16),
    ),
    row(
        "MatMul and bias at the end, 3-D",
        [matmul(), matmul(), op("Add", np.ones(8, np.float32))],
        "MatMul:i MatMul:i Add:f",
        shape=("n", 5, 16),
    ),
    row(
        "MatMul and Relu",
        [matmul(), op("Relu"), matmul()],
        "MatMul:i Relu:a MatMul:i",
        shape=("n", 16),
    ),
    row(
        "MatMul of activations",
        [both("MatMul", [matmul(16)], [matmul(16), op("Transpose", perm=[0, 2, 1])]), matmul()],
        "MatMul:i MatMul:i Transpose:p MatMul:i MatMul:i",
        shape=("n", 5, 16),
    ),
    row(
        "attention",
        [
            both(
                "MatMul",
                [
                    both("MatMul", [matmul(16)], [matmul(16), op("Transpose", perm=[0, 2, 1])]),
                    op("Softmax", axis=-1),
                ],
                [matmul(16)],
            ),
            matmul(),
        ],
        "MatMul:i MatMul:i Transpose:p MatMul:i Softmax:i MatMul:i MatMul:i MatMul:i",
        20,
        shape=("n", 5, 16),
    ),
]
JOINS = [
    row(
        "residual",
        [conv(), both("Add", [conv(), op("Relu"), conv()], []), conv()],
        "Conv:i Conv:i Relu:a Conv:i Add:i Conv:i",
    ),
    row(
        "residual and Relu",
        [conv(), op("Relu"), both("Add", [conv()], []), op("Relu"), conv()],
        "Conv:i Relu:a Conv:i Add:i Relu:a Conv:i",
    ),
    row("residual at the end", [conv(), both("Add", [conv()], [])], "Conv:i Conv:i Add:f"),
    row(
        "residual over two",
        [conv(), both("Add", [conv()], []), both("Add", [], [conv()]), conv()],
        "Conv:i Conv:i Add:i Conv:i Add:i Conv:i",
    ),
    row("Add to the input", [both("Add", [conv(3)], []), conv()], "Conv:i Add:i Conv:i"),
    row("Add to itself", [conv(), both("Add", [], []), conv()], "Conv:i Add:i Conv:i"),
    row("square", [conv(), both("Mul", [], []), conv()], "Conv:i Mul:i Conv:i"),
    row(
        "Add of a constant",
        [conv(), op("Add", np.linspace(-1, 1, 8, dtype=np.float32).reshape(8, 1, 1)), conv()],
        "Conv:i Add:i Conv:i",
    ),
    row("Add of a number", [conv(), op("Add", np.float32(0.7)), conv()], "Conv:i Add:i Conv:i"),
    row("Mul by a number", [conv(), op("Mul", np.float32(-0.7)), conv()], "Conv:i Mul:i Conv:i"),
    row(
        "Mul by zero",
        [
            conv(),
            op("Mul", np.zeros((1, 8, 1, 1), np.float32)),
            op("Add", np.ones(1, np.float32)),
            conv(),
        ],
        "Conv:i Mul:i Add:i Conv:i",
    ),
    row(
        "Sub and Div",
        [conv(), op("Sub", np.float32(0.7)), op("Div", np.float32(3)), conv()],
        "Conv:i Sub:f Div:f Conv:i",
    ),
    row(
        "squeeze and excite",
        [
            conv(),
            both(
                "Mul",
                [],
                [op("GlobalAveragePool"), conv(4, 1), op("Relu"), conv(8, 1), op("Sigmoid")],
            ),
            conv(),
        ],
        "Conv:i GlobalAveragePool:i Conv:i Relu:a Conv:i Sigmoid:i Mul:i Conv:i",
    ),
    row(
        "Concat",
        [conv(), both("Concat", [conv()], [conv(4)], axis=1), conv()],
        "Conv:i Conv:i Conv:i Concat:i Conv:i",
    ),
    row(
        "Concat and Relu",
        [conv(), both("Concat", [conv()], [conv(4)], axis=1), op("Relu"), conv()],
        "Conv:i Conv:i Conv:i Concat:i Relu:a Conv:i",
    ),
    row(
        "Concat with a float branch",
        [conv(), both("Concat", [op("Tanh")], [conv(4)], axis=1), conv()],
        "Conv:i Tanh:f Conv:i Concat:i Conv:i",
    ),
    row(
        "Concat with itself",
        [conv(), both("Concat", [], [], axis=1), conv()],
        "Conv:i Concat:i Conv:i",
    ),
    row(
        "Concat with a constant",
        [conv(), op("Concat", np.ones((1, 2, 12, 12), np.float32), axis=1), conv()],
        "Conv:i Concat:i Conv:i",
        shape=(1, 3, 12, 12),
    ),
    row(
        "Concat of batches",
        [conv(), both("Concat", [conv()], [conv()], axis=0), conv()],
        "Conv:i Conv:i Conv:i Concat:i Conv:i",
    ),
    row(
        "Concat at the end",
        [conv(), both("Concat", [conv()], [conv()], axis=1)],
        "Conv:i Conv:i Conv:i Concat:f",
    ),
    row(
        "dense block",
        [
            conv(),
            both("Concat", [], [conv(4)], axis=1),
            op("Relu"),
            both("Concat", [], [conv(4)], axis=1),
            conv(),
        ],
        "Conv:i Conv:i Concat:i Relu:a Conv:i Concat:i Conv:i",
    ),
]
POOLS = [
    row(
        "MaxPool",
        [conv(), op("Relu"), op("MaxPool", **POOL), conv()],
        "Conv:i Relu:a MaxPool:p Conv:i",
    ),
    row("MaxPool of the input", [op("MaxPool", **POOL), conv()], "MaxPool:p Conv:i"),
    row(
        "MaxPool, padded",
        [conv(), op("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1), conv()],
        "Conv:i MaxPool:p Conv:i",
    ),
    row(
        "MaxPool 1-D",
        [conv(), op("MaxPool", kernel_shape=[2], strides=[2]), conv()],
        "Conv:i MaxPool:p Conv:i",
        shape=LINE,
    ),
    row(
        "MaxPool 3-D",
        [conv(4), op("MaxPool", kernel_shape=[2, 2, 2]), conv(4)],
        "Conv:i MaxPool:p Conv:i",
        shape=CUBE,
    ),
    row("MaxPool, opset 11", [conv(), op("MaxPool", **POOL), conv()], "", opset=11),
    row("MaxPool at the end", [conv(), op("MaxPool", **POOL)], "Conv:i MaxPool:f"),
    row("AveragePool", [conv(), op("AveragePool", **POOL), conv()], "Conv:i AveragePool:i Conv:i"),
    row(
        "AveragePool, padded",
        [
            conv(),
            op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
            conv(),
        ],
        "Conv:i AveragePool:i Conv:i",
    ),
    row(
        "AveragePool, ceil",
        [conv(), op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), conv()],
        "Conv:i AveragePool:i Conv:i",
    ),
    row(
        "AveragePool 1-D",
        [conv(), op("AveragePool", kernel_shape=[2]), conv()],
        "Conv:i AveragePool:i Conv:i",
        shape=LINE,
    ),
    row(
        "AveragePool 3-D",
        [conv(4), op("AveragePool", kernel_shape=[2, 2, 2]), conv(4)],
        "Conv:i AveragePool:i Conv:i",
        shape=CUBE,
    ),
    row(
        "AveragePool, opset 21",
        [conv(), op("AveragePool", **POOL), conv()],
        "Conv:i AveragePool:i Conv:i",
        opset=21,
    ),
    row(
        "AveragePool, dilated",
        [conv(), op("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), conv()],
        "Conv:i AveragePool:f Conv:i",
        opset=21,
    ),
    row("AveragePool of the input", [op("AveragePool", **POOL), conv()], "AveragePool:f Conv:i"),
    row(
        "GlobalAveragePool",
        [conv(), op("GlobalAveragePool"), *FLAT, gemm()],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i",
    ),
    row(
        "GlobalAveragePool and Relu",
        [conv(), op("GlobalAveragePool"), op("Relu"), conv(kernel=1)],
        "Conv:i GlobalAveragePool:i Relu:a Flatten:p Gemm:i Unsqueeze:f",
    ),
    row(
        "GlobalAveragePool 1-D",
        [conv(), op("GlobalAveragePool"), *FLAT, gemm()],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i",
        shape=LINE,
    ),
    row(
        "GlobalAveragePool 3-D",
        [conv(4), op("GlobalAveragePool"), *FLAT, gemm()],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i",
        shape=CUBE,
    ),
    row(
        "GlobalAveragePool at the end",
        [conv(), op("GlobalAveragePool")],
        "Conv:i GlobalAveragePool:f",
    ),
    row(
        "ReduceMean",
        [conv(), op("ReduceMean", axes=[2, 3], keepdims=0), gemm()],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i",
    ),
    row(
        "ReduceMean, kept",
        [conv(), op("ReduceMean", axes=[-1, -2]), conv(kernel=1)],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i Unsqueeze:f",
    ),
    row(
        "ReduceMean, opset 21",
        [conv(), op("ReduceMean", ints(2, 3), keepdims=0), gemm()],
        "Conv:i GlobalAveragePool:i Flatten:p Gemm:i",
        opset=21,
    ),
    row(
        "ReduceMean over channels",
        [conv(), op("ReduceMean", axes=[1]), conv()],
        "Conv:i ReduceMean:f Conv:i",
    ),
]


def moved(name: str, step, shape: tuple = IMAGE, opset: int = 17) -> Row:
    """A pass-through operator, the first word of the row's name, between two convolutions."""
    return row(
        f"{name}, opset {opset}",
        [conv(), step, conv()],
        f"Conv:i {name.split()[0].strip(',')}:p Conv:i",
        shape=shape,
        opset=opset,
    )


DOUBLE = np.array([1, 1, 2, 2], np.float32)
MOVES = [
    moved("Reshape", op("Reshape", ints(0, 4, 24, 12))),
    moved("Transpose", op("Transpose", perm=[0, 1, 3, 2])),
    moved("Slice", op("Slice", ints(1, 0), ints(12, 8), ints(2, 1), ints(2, 1))),
    moved("Slice, steps", op("Slice", ints(0), ints(100), ints(-1), ints(3))),
    moved("Slice, backwards", op("Slice", ints(-1), ints(-100), ints(2), ints(-1)), opset=11),
    moved("Gather", op("Gather", ints(3, 1, 1), axis=1)),
    moved("Resize nearest", op("Resize", None, DOUBLE, mode="nearest")),
    moved("Resize nearest", op("Resize", np.zeros(0, np.float32), DOUBLE), opset=11),
    moved("Resize nearest", op("Resize", None, DOUBLE), opset=21),
    moved(
        "Resize asymmetric",
        op(
            "Resize",
            None,
            None,
            ints(1, 8, 5, 7),
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        shape=(1, 3, 12, 12),
    ),
    moved("DepthToSpace", op("DepthToSpace", blocksize=2)),
    moved("DepthToSpace, CRD", op("DepthToSpace", blocksize=2, mode="CRD"), opset=13),
    moved("Expand", op("Expand", ints(1, 8, 12, 12)), shape=(1, 3, 12, 12)),
    moved("Tile", op("Tile", ints(1, 2, 1, 1))),
    row("Flatten", [conv(), *FLAT, gemm()], "Conv:i Flatten:p Gemm:i"),
    row(
        "Squeeze",
        [conv(kernel=12, same=False), op("Squeeze", ints(2, 3)), gemm()],
        "Conv:i Squeeze:p Gemm:i",
    ),
    row(
        "Squeeze, opset 11",
        [conv(kernel=12, same=False), op("Squeeze", axes=[2, 3]), gemm()],
        "Conv:i Squeeze:p Gemm:i",
        opset=11,
    ),
    row(
        "Unsqueeze",
        [gemm(), op("Unsqueeze", ints(2)), conv()],
        "Gemm:i Unsqueeze:p Conv:i",
        shape=("n", 16),
    ),
    row(
        "Unsqueeze, opset 11",
        [gemm(), op("Unsqueeze", axes=[2]), conv()],
        "Gemm:i Unsqueeze:p Conv:i",
        shape=("n", 16),
        opset=11,
    ),
    row(
        "Resize linear",
        [conv(), op("Resize", None, DOUBLE, mode="linear"), conv()],
        "Conv:i Resize:f Conv:i",
    ),
    row(
        "Reshape of the input",
        [op("Reshape", ints(-1, 3, 12, 12)), conv()],
        "Reshape:p Conv:i",
        shape=("n", 432),
    ),
    row(
        "NHWC input",
        [op("Transpose", perm=[0, 3, 1, 2]), conv(), op("Relu"), conv()],
        "Transpose:p Conv:i Relu:a Conv:i",
        shape=("n", 12, 12, 3),
    ),
    row(
        "channel shuffle",
        [
            conv(),
            op("Reshape", ints(0, 2, 4, 12, 12)),
            op("Transpose", perm=[0, 2, 1, 3, 4]),
            op("Reshape", ints(0, 8, 12, 12)),
            depthwise(),
        ],
        "Conv:i Reshape:p Transpose:p Reshape:p Conv:i",
    ),
    row(
        "moves at the end",
        [conv(), op("Relu"), op("Transpose", perm=[0, 2, 3, 1]), *FLAT],
        "Conv:i Relu:a Transpose:f Flatten:f",
    ),
    row("moves between floats", [op("Tanh"), *FLAT, op("Exp")], "Tanh:f Flatten:f Exp:f", np.inf),
    row("moves of floats, then integers", [op("Tanh"), *FLAT, gemm()], "Tanh:f Flatten:f Gemm:i"),
    row(
        "pool, then Relu",
        [conv(), op("MaxPool", **POOL), op("Relu"), conv()],
        "Conv:i MaxPool:f Relu:f Conv:i",
    ),
]
TABLE = [*CONVS, *ACTIVATIONS, *DENSE, *JOINS, *POOLS, *MOVES]


def integer_kernels(result) -> list[str]:
    """What runs on integers, counted without the help of the verify table."""
    return [
        k.op_type
        for k in result.kernels
        if k.op_type.startswith(("QLinear", "QGemm", "MatMulInteger"))
    ]


def boundaries(result) -> tuple[int, int]:
    """How many times values may be turned into codes, and codes into floats, as the Plan says."""
    graph, decisions = prepare(result.model), {n.name: n.decision for n in result.plan.nodes}
    into = outof = 0
    for name in {e.tensor for e in result.plan.edges}:
        value = graph.values[name]
        maker = value.producer()
        if maker is None or decisions[maker.name] == "float":
            into += 1
        else:
            outof += value.is_graph_output() + sum(
                decisions.get(u.node.name, "float") == "float" for u in value.uses()
            )
    return into, outof


def check(result, expected: str, db: float) -> None:
    """The Plan, the kernels that run, and the numbers that come out."""
    assert expected in ("", result.decisions)
    assert result.table.problems == [], str(result.table)
    assert result.plan.count("integer") == len(integer_kernels(result))
    assert not [
        k.name
        for k in result.kernels
        if k.weight_dequantized and not k.name.endswith("_bias_DequantizeLinear")
    ]
    planned = {n.name: n.decision for n in result.plan.nodes}
    assert all(
        planned.get(k.name, "float") == "float" for k in result.kernels if k.op_type in HEAVY
    )
    assert result.quality >= db, result.quality


@pytest.mark.parametrize("case", TABLE, ids=lambda r: r.name)
def test_operator(case, tmp_path):
    result = quantize(case.model, tmp_path)
    check(result, case.decisions, case.db)
    into, outof = boundaries(result)
    assert result.count("QuantizeLinear") <= into and result.count("DequantizeLinear") <= outof
