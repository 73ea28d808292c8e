"""Tiny models, random samples, and one call that quantizes a model and looks at everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptqlit import Config, Plan, convert
from ptqlit.arithmetic.measure import sqnr
from ptqlit.model.runtime import Kernel, Level, kernels_of, open_session
from ptqlit.reports.verify import VerifyTable

IMAGE = ("n", 3, 12, 12)
Step = Callable[["Net", str], str]


class Net:
    """A graph that grows node by node and knows the shape of every tensor."""

    def __init__(self, opset: int = 17, seed: int = 0):
        self.opset, self.random = opset, np.random.default_rng(seed)
        self.nodes, self.inputs, self.constants, self.infos = [], [], {}, {}

    def input(self, name: str, shape: tuple, dtype: int = TensorProto.FLOAT) -> str:
        """A graph input."""
        self.infos[name] = helper.make_tensor_value_info(name, dtype, shape)
        self.inputs.append(name)
        return name

    def const(self, array, name: str = "") -> str:
        """An initializer."""
        name = name or f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Random float32 values."""
        return (self.random.normal(size=shape) * scale).astype(np.float32)

    def op(
        self, operator: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes
    ):
        """A node; gives the name of its output, or the names of its outputs."""
        made = [f"t{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        label = f"{operator}{len(self.nodes)}" if name is None else name
        node = helper.make_node(operator, inputs, made, name=label, **attributes)
        self.nodes.append(node)
        self.infer(node)
        return made[0] if outputs == 1 else tuple(made)

    def infer(self, node: onnx.NodeProto) -> None:
        """Learn the types of a node's outputs."""
        known = [self.infos[i] for i in node.input if i in self.infos]
        made = [helper.make_empty_tensor_value_info(o) for o in node.output]
        graph = helper.make_graph(
            [node], "g", known, made, [self.constants[i] for i in node.input if i in self.constants]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        for info in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
            self.infos[info.name] = info

    def shape(self, name: str) -> list[int | str]:
        """The dimensions of a tensor: numbers, or symbols."""
        return [d.dim_value or d.dim_param for d in self.infos[name].type.tensor_type.shape.dim]

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            [self.infos[i] for i in self.inputs],
            [self.infos[o] for o in outputs],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets)
        )


# ---------------------------------------------------------------- steps: functions of a net and a tensor


def conv(
    channels: int = 8, kernel: int = 3, bias: bool = True, same: bool = True, **attributes
) -> Step:
    """A convolution of as many dimensions as its input; `same` pads it to keep the size."""

    def step(net: Net, x: str) -> str:
        shape, group = net.shape(x), attributes.get("group", 1)
        dims = len(shape) - 2
        fan = shape[1] // group * kernel**dims
        weight = net.const(
            net.normal(channels, shape[1] // group, *[kernel] * dims, scale=(2 / fan) ** 0.5)
        )
        more = [net.const(net.normal(channels, scale=0.3))] if bias else []
        pads = {} if "auto_pad" in attributes or not same else {"pads": [kernel // 2] * 2 * dims}
        return net.op("Conv", x, weight, *more, **{**pads, **attributes})

    return step


def depthwise(**attributes) -> Step:
    """A convolution with as many groups as channels."""

    def step(net: Net, x: str) -> str:
        channels = net.shape(x)[1]
        return conv(channels, group=channels, **attributes)(net, x)

    return step


def batch_norm() -> Step:
    """A BatchNormalization with random numbers."""

    def step(net: Net, x: str) -> str:
        channels = net.shape(x)[1]
        numbers = [
            1 + net.normal(channels, scale=0.2),
            net.normal(channels, scale=0.2),
            net.normal(channels, scale=0.2),
            0.5 + np.abs(net.normal(channels)),
        ]
        return net.op("BatchNormalization", x, *[net.const(n.astype(np.float32)) for n in numbers])

    return step


def clip(low: float, high: float) -> Step:
    """A Clip whose bounds are constants."""
    return lambda net, x: net.op("Clip", x, net.const(np.float32(low)), net.const(np.float32(high)))


def gemm(
    columns: int = 8, bias: tuple | None = (), trans_a: int = 0, trans_b: int = 1, **attributes
) -> Step:
    """A Gemm; `bias` is a shape, () for one value a column, None for none."""

    def step(net: Net, x: str) -> str:
        rows = net.shape(x)[0 if trans_a else 1]
        weight = net.const(
            net.normal(*((columns, rows) if trans_b else (rows, columns)), scale=rows**-0.5)
        )
        more = [] if bias is None else [net.const(net.normal(*(bias or (columns,)), scale=0.3))]
        return net.op("Gemm", x, weight, *more, transA=trans_a, transB=trans_b, **attributes)

    return step


def matmul(columns: int = 8) -> Step:
    """A MatMul with a constant."""

    def step(net: Net, x: str) -> str:
        rows = net.shape(x)[-1]
        return net.op("MatMul", x, net.const(net.normal(rows, columns, scale=rows**-0.5)))

    return step


def op(operator: str, *constants, outputs: int = 1, **attributes) -> Step:
    """Any operator; further inputs are constants, None for an absent one."""

    def step(net: Net, x: str) -> str:
        more = ["" if c is None else net.const(c) for c in constants]
        return net.op(operator, x, *more, outputs=outputs, **attributes)

    return step


def ints(*values: int) -> np.ndarray:
    """A constant of axes, shapes and so on."""
    return np.array(values, np.int64)


def both(operator: str, first: list[Step], second: list[Step], **attributes) -> Step:
    """Two branches from one tensor, joined by an operator of two inputs; an empty branch is the tensor itself."""
    return lambda net, x: net.op(operator, run(net, x, *first), run(net, x, *second), **attributes)


def run(net: Net, x: str, *steps: Step) -> str:
    """Steps in a row."""
    for step in steps:
        x = step(net, x)
    return x


def chain(*steps: Step, shape: tuple = IMAGE, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """A model of steps in a row, from the input `x` on."""
    net = Net(opset, seed)
    return net.model(run(net, net.input("x", shape), *steps))


# ---------------------------------------------------------------- quantize and look


def samples_for(
    model: onnx.ModelProto, count: int = 6, seed: int = 1
) -> list[dict[str, np.ndarray]]:
    """Random feeds; symbols count 1, numbers that are whole are drawn from 0..2."""
    random, kept = np.random.default_rng(seed), {t.name for t in model.graph.initializer}
    feeds = []
    for _ in range(count):
        feed = {}
        for info in (i for i in model.graph.input if i.name not in kept):
            shape = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            values = (
                random.normal(size=shape)
                if np.issubdtype(dtype, np.floating)
                else random.integers(0, 3, shape)
            )
            feed[info.name] = np.asarray(values, dtype)
        feeds.append(feed)
    return feeds


def config_text(skip: str = "", more: str = "") -> str:
    """A configuration for a caller with samples of their own."""
    skipped = f"skip_quant_node={skip}\n" if skip else ""
    return f"[common_quant_param]\nquant_type=FULL_QUANT\n{skipped}[full_quant_param]\n{more}"


@dataclass
class Result:
    """A float model, what became of it, and both of their outputs."""

    model: onnx.ModelProto
    path: Path
    plan: Plan
    table: VerifyTable
    kernels: list[Kernel]
    before: list[list[np.ndarray]]  # sample, output
    after: list[list[np.ndarray]]

    @property
    def decisions(self) -> str:
        """Operator=decision of every node, in computing order."""
        return " ".join(f"{n.operator}={n.decision}" for n in self.plan.nodes)

    @property
    def quality(self) -> float:
        """The SQNR of the worst output, in dB."""
        return min(
            sqnr(np.stack(f), np.stack(q)) for f, q in zip(zip(*self.before), zip(*self.after))
        )

    def count(self, operator: str) -> int:
        """How many kernels of a name run."""
        return sum(k.op_type == operator for k in self.kernels)


def outputs_of(
    model: str | Path | bytes, feeds: list[dict[str, np.ndarray]]
) -> list[list[np.ndarray]]:
    """What a model gives, without any rewriting for float models in memory."""
    level = Level.ORT_DISABLE_ALL if isinstance(model, bytes) else Level.ORT_ENABLE_ALL
    session = open_session(model, level=level)
    return [session.run(None, feed) for feed in feeds]


def unnamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without names of nodes: the runtime refuses a name that stands twice."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        node.name = ""
    return copy


def quantize(
    model: onnx.ModelProto, folder: Path, skip: str = "", feeds: list | None = None, more: str = ""
) -> Result:
    """Convert a model with samples of its own, load the file, run both."""
    feeds = samples_for(model) if feeds is None else feeds
    path, plan, table = convert(
        model,
        Config.from_text(config_text(skip, more)),
        folder / "out.onnx",
        samples=feeds,
        progress=False,
    )
    before, after = outputs_of(unnamed(model).SerializeToString(), feeds), outputs_of(path, feeds)
    return Result(model, path, plan, table, kernels_of(path), before, after)
