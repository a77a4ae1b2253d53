"""Edits of ONNX models in place: what exporters and tools leave behind is cleaned, constants are folded and shared."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


class Constants:
    """Constants that are added to a graph, one for equal values (iterations share their weights)."""

    def __init__(self, graph: onnx.GraphProto, prefix: str):
        self.graph, self.prefix = graph, prefix
        self.names: dict[bytes, str] = {}

    def name(self, value: np.ndarray) -> str:
        key = value.tobytes() + str((value.shape, value.dtype)).encode()
        if key not in self.names:
            self.names[key] = f"{self.prefix}_constant_{len(self.names)}"
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), self.names[key]))
        return self.names[key]


def import_domains(model: onnx.ModelProto) -> None:
    """The domain of every node is imported; one that was not, in its first version."""
    known = {o.domain for o in model.opset_import}
    for domain in sorted({n.domain for n in nodes(model.graph)} - known):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def rewrite(model: onnx.ModelProto, made: Iterable[NodeProto]) -> None:
    """``made`` in place of a model's nodes; what nobody reads is left out, and new operators' domains are imported."""
    replace_nodes(model.graph, made)
    drop_dead(model.graph)
    import_domains(model)


def inferred_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of which they are known, 0 for a dimension that is not."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = (*inferred.value_info, *inferred.input, *inferred.output)
    typed = [v for v in known if v.type.tensor_type.HasField("shape")]
    found = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in typed}
    return found | {c.name: tuple(c.dims) for c in inferred.initializer}


def clean(model: onnx.ModelProto) -> None:
    """Quantized weights as integers, each constant once, no traces of the exporter."""
    fold_quantized_weights(model)
    share_initializers(model)
    for node in nodes(model.graph):
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]  # stale where lengths are dynamic
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for constant in model.graph.initializer:
        del constant.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def fold_quantized_weights(model: onnx.ModelProto) -> None:
    """Replace QuantizeLinear of a constant by the integer constant: a quarter of the size, the same numbers."""
    graph = model.graph
    constants = {c.name: c for c in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or any(name not in constants for name in node.input):
            kept.append(node)
            continue
        value, scale, *zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        zero_point = zero[0] if zero else np.zeros(scale.shape, np.uint8)
        along = [1] * value.ndim
        if scale.ndim:
            along[axis] = scale.size
        limits = np.iinfo(zero_point.dtype)
        steps = np.rint(value / scale.reshape(along)) + zero_point.reshape(along).astype(np.float32)
        integer = steps.clip(limits.min, limits.max).astype(zero_point.dtype)
        graph.initializer.append(numpy_helper.from_array(integer, node.output[0]))
    replace_nodes(graph, kept)


def share_initializers(model: onnx.ModelProto) -> None:
    """Keep one of equal constants (iterated blocks share their weights)."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    rename = {}
    for constant in model.graph.initializer:
        key = (constant.data_type, tuple(constant.dims), numpy_helper.to_array(constant).tobytes())
        rename[constant.name] = first.setdefault(key, constant.name)
    for node in nodes(model.graph):
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
    drop_unused_initializers(model.graph)


def unshare(graph: onnx.GraphProto, kinds: tuple[str, ...]) -> None:
    """Nodes of these kinds get constants of their own; ``share_initializers`` takes that back."""
    constants = {c.name: c for c in graph.initializer}
    taken: set[str] = set()
    for number, node in enumerate(n for n in graph.node if n.op_type in kinds):
        for i, name in enumerate(node.input):
            if name in taken:
                copy = onnx.TensorProto()
                copy.CopyFrom(constants[name])
                copy.name = node.input[i] = f"{name}_{number}"
                graph.initializer.append(copy)
        taken.update(name for name in node.input if name in constants)


def products_of_gemms(model: onnx.ModelProto) -> None:
    """Gemm of a constant weight becomes MatMul and Add: with a bias in float none of it would be in INT8."""
    graph = model.graph
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        turned, rows_turned = given.pop("transB", 0), given.pop("transA", 0)
        scaled = any(v != 1 for v in given.values())
        if node.op_type != "Gemm" or node.input[1] not in constants or rows_turned or scaled:
            kept.append(node)
            continue
        x, weight, *bias = node.input
        if turned:
            weight = f"{weight}_turned"
            if weight not in constants:
                constants[weight] = np.ascontiguousarray(constants[node.input[1]].T)
                graph.initializer.append(numpy_helper.from_array(constants[weight], weight))
        made = f"{node.output[0]}_product" if bias else node.output[0]
        kept.append(helper.make_node("MatMul", [x, weight], [made], node.name))
        if bias:
            kept.append(helper.make_node("Add", [made, *bias], [node.output[0]], f"{node.name}_bias"))
    replace_nodes(graph, kept)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those in bodies of loops too: a body reads constants of the graph around it."""
    for node in graph.node:
        yield from _with_bodies(node)


def replace_nodes(graph: onnx.GraphProto, made: Iterable[onnx.NodeProto]) -> None:
    """The graph computes with these nodes, some of which may be its own; constants that none of them reads go."""
    copies = [NodeProto.FromString(n.SerializeToString()) for n in made]  # before the graph lets go of its own
    del graph.node[:]
    graph.node.extend(copies)
    drop_unused_initializers(graph)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in nodes(graph) for name in node.input} | {o.name for o in graph.output}
    kept = [c for c in graph.initializer if c.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def fold_rearranged(model: onnx.ModelProto) -> None:
    """Rearranged constants become constants: some runtimes want a convolution's weight to be one."""
    graph = model.graph
    constants: dict[str, onnx.TensorProto] = {c.name: c for c in graph.initializer}
    folded = []
    for node in graph.node:
        rearranges = node.op_type in ("Gather", "Unsqueeze", "Slice", "Concat") and all(
            name in constants for name in node.input
        )
        if rearranges or node.op_type == "Constant":
            given = [constants[name] for name in node.input]
            alone = helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=node.output[0])], given)
            (value,) = ReferenceEvaluator(helper.make_model(alone, opset_imports=model.opset_import)).run(None, {})
            constants[node.output[0]] = numpy_helper.from_array(np.asarray(value), node.output[0])
        if rearranges:
            graph.initializer.append(constants[node.output[0]])
            folded.append(node)
    used = {name for node in nodes(graph) if node not in folded for name in node.input}
    used |= {o.name for o in graph.output}
    kept = [n for n in graph.node if n not in folded and (n.op_type != "Constant" or n.output[0] in used)]
    replace_nodes(graph, kept)


def drop_dead(graph: onnx.GraphProto) -> None:
    """Nodes whose results nobody reads, and their constants."""
    used = {o.name for o in graph.output}
    live = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            used.update(name for inner in _with_bodies(node) for name in inner.input)
            live.append(node)
    replace_nodes(graph, reversed(live))


def _with_bodies(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    yield node
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from nodes(attribute.g)


def leaky(model: onnx.ModelProto) -> None:
    """PRelu of one slope becomes LeakyRelu, the same function: runtimes do not broadcast a slope then."""
    slopes = {c.name: c for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "PRelu" and node.input[1] in slopes:
            slope = numpy_helper.to_array(slopes[node.input[1]])
            if slope.size == 1:
                node.op_type = "LeakyRelu"
                del node.input[1]
                node.attribute.append(helper.make_attribute("alpha", float(slope.reshape(()))))
    drop_unused_initializers(model.graph)


def split_products(model: onnx.ModelProto) -> None:
    """A product whose columns are taken apart at once becomes one product for each part.

    Taking them apart copies every row of what was made; a further product reads every row of its factor again. Where
    the factor is the narrower one, that is less. Wants the exporter's value infos: ranks tell the last axis.
    """
    graph = model.graph
    constants = {c.name: c for c in graph.initializer}
    maker = {n.output[0]: n for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    readers = Counter(name for node in nodes(graph) for name in node.input)
    readers.update(o.name for o in graph.output)
    apart: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        product = maker.get(node.input[0]) if node.op_type == "Split" else None
        if product is None or readers[node.input[0]] > 1:
            continue
        weight = numpy_helper.to_array(constants[product.input[1]])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        parts, (rows, columns) = len(node.output), weight.shape[-2:]
        last = axis in (-1, ranks.get(node.input[0], 0) - 1)
        if len(node.input) > 1 or columns % parts or weight.ndim != 2 or not last or (parts - 1) * rows > 2 * columns:
            continue  # parts of different widths are the small ones: step sizes beside their mixing matrices
        made = []
        for i, (out, part) in enumerate(zip(node.output, np.split(weight, parts, 1), strict=True)):
            name = f"{product.input[1]}_{i}"
            if name not in constants:
                constants[name] = numpy_helper.from_array(np.ascontiguousarray(part), name)
                graph.initializer.append(constants[name])
            made.append(helper.make_node("MatMul", [product.input[0], name], [out], f"{product.name}_{i}"))
        apart[product.output[0]] = made
    kept = [n for n in graph.node if not (n.op_type == "Split" and n.input[0] in apart)]
    replace_nodes(graph, [made for node in kept for made in apart.get(node.output[0], [node])])


def shorten_names(model: onnx.ModelProto) -> None:
    """Names of one to three letters inside the graph: in a small separator they are half of an INT8 file.

    What the graph takes and gives keeps its names, and operators of a domain of their own say what they are.
    """
    kept = {v.name for v in (*model.graph.input, *model.graph.output)}
    known = {name: name for name in kept}
    letters = string.ascii_letters + string.digits
    every = (f"{''.join(c)}" for size in itertools.count(1) for c in itertools.product(letters, repeat=size))
    free = (name for name in every if name not in kept)

    def short(name: str) -> str:
        if name and name not in known:
            known[name] = next(free)
        return known.get(name, name)

    def walk(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = short(value.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [short(name) for name in names]
            node.name = f"{node.output[0]}/{node.op_type}" if node.domain else ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g)

    del model.graph.value_info[:]
    walk(model.graph)
