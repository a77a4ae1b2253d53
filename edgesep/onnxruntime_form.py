"""ONNX Runtime's own operators in a graph that only it will read, and what its kernels are slow at said otherwise."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from edgesep import integer_states
from edgesep.compact import compact
from edgesep.early_rounding import round_first
from edgesep.onnx_edit import drop_dead, import_domains, inferred_shapes, replace_nodes
from edgesep.units import Graph

OWN = "com.microsoft"  # the domain of its operators


def for_onnxruntime(serialized: bytes, *, narrow: bool = False) -> bytes:
    """A portable or native file as ONNX Runtime runs it fastest; its constants and names are shortened (``compact``).

    Args:
        narrow: store what is in float as float16, or in eight bits where it has no more.
    """
    model = onnx.load_from_string(serialized)
    ranks = {name: len(shape) for name, shape in inferred_shapes(model).items()}
    _row_gathers(model.graph, ranks)  # first: types of ONNX Runtime's own operators cannot be inferred
    _rms_norms(model.graph, {c.name: c for c in model.graph.initializer})
    integer_states.hold_in_integers(model)
    round_first(model.graph)
    _integer_products(model)
    compact(model, narrow=narrow)
    return bytes(model.SerializeToString())


def _row_gathers(graph: onnx.GraphProto, ranks: dict[str, int]) -> None:
    """Gather of single values along the last axis becomes Gather of whole rows between two transpositions.

    ONNX Runtime copies each value by itself: ten times slower at 64 channels. The values are the same.
    """
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        rank = ranks.get(node.input[0], 0) if node.input else 0
        axis = [a.i for a in node.attribute if a.name == "axis"]
        if node.op_type != "Gather" or rank < 3 or axis not in ([-1], [rank - 1]) or ranks.get(node.input[1]) != 1:
            made.append(node)
            continue
        to_rows = [0, rank - 1, *range(1, rank - 1)]
        back = [to_rows.index(d) for d in range(rank)]
        rows, taken = f"{node.output[0]}_rows", f"{node.output[0]}_taken"
        made += [
            helper.make_node("Transpose", [node.input[0]], [rows], f"{node.name}_rows", perm=to_rows),
            helper.make_node("Gather", [rows, node.input[1]], [taken], node.name, axis=1),
            helper.make_node("Transpose", [taken], [node.output[0]], f"{node.name}_back", perm=back),
        ]
    replace_nodes(graph, made)


def _rms_norms(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> None:
    """``x · 1 / sqrt(mean(x²) + eps) · gain`` over the last axis as one node, which only ONNX Runtime knows."""
    maker = {n.output[0]: n for n in graph.node}

    def made_of(name: str, kind: str) -> tuple[str, str]:
        """The first two inputs of the node that makes ``name``, if it is of that kind."""
        node = maker.get(name)
        found = list(node.input) if node is not None and node.op_type == kind else []
        first, second, *_ = [*found, "", ""]
        return first, second

    def value(name: str) -> list[float]:
        return numpy_helper.to_array(constants[name]).ravel().tolist() if name in constants else []

    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rms_norms(attribute.g, constants)
        if node.op_type != "Mul" or node.input[1] not in constants or len(constants[node.input[1]].dims) != 1:
            continue
        x, inverse = made_of(node.input[0], "Mul")
        root, _ = made_of(inverse, "Reciprocal")
        mean, epsilon = made_of(made_of(root, "Sqrt")[0], "Add")
        square, axes = made_of(mean, "ReduceMean")
        if made_of(square, "Pow")[0] != x or value(made_of(square, "Pow")[1]) != [2.0] or value(axes) != [-1]:
            continue
        attributes = {"axis": -1, "epsilon": value(epsilon)[0]}
        node.op_type, node.input[0] = "SimplifiedLayerNormalization", x
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    drop_dead(graph)


def _integer_products(model: onnx.ModelProto) -> None:
    """A product of a dequantized factor and weight, and the sum with its bias, as one node.

    ONNX Runtime would do so itself, but for a bias: it makes a Gemm of product and sum before it looks for INT8, and
    that one computes in float.
    """
    graph = Graph(model.graph)
    for node in graph.nodes:
        factors = [graph.producer.get(name) for name in node.input[:2]] if node.op_type == "MatMul" else []
        if len(factors) < 2 or any(f is None or f.op_type != "DequantizeLinear" for f in factors):
            continue
        x, weight = (list(f.input) for f in factors if f is not None)
        following = graph.readers[node.output[0]]
        if weight[0] not in graph.constants or graph.constants[weight[0]].ndim != 2 or len(x) < 3:
            continue
        if [n.op_type for n in following] == ["QuantizeLinear"]:
            continue  # that makes one of INT8 with the product
        given = [x[0], weight[0], x[1], weight[1], x[2], *weight[2:3]]
        if [n.op_type for n in following] == ["Add"] and node.output[0] not in graph.outputs:
            bias = next(name for name in following[0].input if name != node.output[0])
            if bias in graph.constants and graph.constants[bias].shape == graph.constants[weight[0]].shape[1:]:
                given += [*[""] * (6 - len(given)), bias]
                total = following[0].output[0]
                node.output[0], following[0].output[0] = total, f"{total}_before"  # which nobody reads
        node.op_type, node.domain = "MatMulIntegerToFloat", OWN
        node.input[:] = given
    import_domains(model)
    drop_dead(model.graph)
