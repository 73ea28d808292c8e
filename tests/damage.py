"""Real models with one fault each; in float all of them compute what the healthy model computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from ptqlit.model.graph import Graph, layer_of


def proto_of(graph: Graph) -> onnx.ModelProto:
    """The prepared model, to be changed."""
    return ir.to_proto(graph.copy_model())


def named(graph: Graph, name: str) -> ir.Node:
    """A node by its name."""
    return next(node for node in graph.nodes if node.name == name)


def scale(proto: onnx.ModelProto, value: ir.Value, axis: int, factor: float, channel: int) -> None:
    """Multiply a channel of a constant."""
    tensor = next(t for t in proto.graph.initializer if t.name == value.name)
    array = numpy_helper.to_array(tensor).copy()
    np.moveaxis(array, axis, 0)[channel] *= np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def input_axis(node: ir.Node) -> int:
    """The axis of a weight that runs over the channels it reads."""
    return 1 if layer_of(node).group == 1 else 0


def lift(graph: Graph, first: str, factor: float, channel: int = 7) -> tuple[onnx.ModelProto, str]:
    """One output channel of a layer times a factor, undone in the layer behind, whose name is given too.

    A Clip between them becomes a Relu, which hands factors on.
    """
    proto, node = proto_of(graph), named(graph, first)
    reader = next(iter(node.outputs[0].uses())).node
    if reader.op_type == "Clip":
        relu = next(n for n in proto.graph.node if n.name == reader.name)
        relu.op_type = "Relu"
        del relu.input[1:]
        reader = next(iter(reader.outputs[0].uses())).node
    for value in node.inputs[1:]:
        scale(proto, value, 0, factor, channel)
    scale(proto, reader.inputs[1], input_axis(reader), 1 / factor, channel)
    return proto, reader.name


def uneven_add(graph: Graph, reader: str, factor: float, channel: int = 7) -> onnx.ModelProto:
    """An Add before a layer: one channel of what the layer reads comes on top, times a factor."""
    proto, node = proto_of(graph), named(graph, reader)
    source, channels = node.inputs[0].name, int(node.inputs[0].shape[1])
    weight = np.zeros((channels, channels, 1, 1), np.float32)
    weight[channel, channel] = factor
    proto.graph.initializer.append(numpy_helper.from_array(weight, "boost_weight"))
    place = next(p for p, n in enumerate(proto.graph.node) if n.name == reader)
    proto.graph.node[place].input[0] = "uneven"
    boost = helper.make_node("Conv", [source, "boost_weight"], ["boosted"], name="boost")
    add = helper.make_node("Add", [source, "boosted"], ["uneven"], name="uneven_add")
    proto.graph.node.insert(place, add)
    proto.graph.node.insert(place, boost)
    scale(proto, node.inputs[1], input_axis(node), 1 / (1 + factor), channel)
    del proto.graph.value_info[:]
    return proto
