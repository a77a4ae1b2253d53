"""A graph as OpenVINO runs it: on the build host alone, which has the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.compact import compact
from edgesep.early_rounding import round_first
from edgesep.integer_states import hold_in_integers
from edgesep.onnx_edit import Constants, inferred_shapes, replace_nodes
from edgesep.ops import onnx_forms
from edgesep.units import Graph, flags


def for_openvino(serialized: bytes, *, narrow: bool = False) -> bytes:
    """A portable or native file; its constants and names are shortened (``compact``).

    Args:
        narrow: store what is in float as float16, or in eight bits where it has no more.
    """
    model = onnx.load_from_string(serialized)
    hold_in_integers(model)
    round_first(model.graph)
    _round_in_norms(model)
    # It finds constants of the graph around a body, but nothing that is made there.
    compact(model, narrow=narrow, in_bodies=False)
    return bytes(model.SerializeToString())


def _round_in_norms(model: onnx.ModelProto) -> None:
    """Rows that are normalized and then rounded get an axis of one between: with three axes OpenVINO's norm rounds what
    it makes, with two another node does so, which takes longer than the norm."""
    onnx_forms.register()
    graph, constants, shapes = Graph(model.graph), Constants(model.graph, "rounded"), inferred_shapes(model)
    before: dict[int, NodeProto] = {}
    behind: dict[int, NodeProto] = {}
    for norm in graph.nodes:
        rounding = _rounding_of(graph, norm, shapes)
        if rounding is None:
            continue
        width = shapes[norm.input[0]][1]
        x, apart, out = norm.input[0], f"{norm.output[0]}_apart", rounding.output[0]
        norm.input[0], rounding.output[0] = apart, f"{out}_apart"
        three, two = (constants.name(np.array(shape)) for shape in ([-1, 1, width], [-1, width]))
        before[id(norm)] = helper.make_node("Reshape", [x, three], [apart], apart)
        behind[id(rounding)] = helper.make_node("Reshape", [f"{out}_apart", two], [out], out)
    put = ((before.get(id(n)), n, behind.get(id(n))) for n in graph.nodes)
    replace_nodes(model.graph, [n for some in put for n in some if n is not None])


def _rounding_of(graph: Graph, norm: NodeProto, shapes: dict[str, tuple[int, ...]]) -> NodeProto | None:
    """What rounds all values of a norm of rows in one step, if nobody else reads them."""
    if norm.op_type != "LayerNormalization" or len(norm.output) > 1 or norm.output[0] in graph.outputs:
        return None
    rows, readers = shapes.get(norm.input[0], ()), graph.readers[norm.output[0]]
    if len(rows) != 2 or not rows[1] or flags(norm).get("axis", -1) not in (-1, 1):
        return None
    if [n.op_type for n in readers] != ["QuantizeLinear"]:
        return None
    plain = all(not graph.constants.get(name, np.zeros(2)).ndim for name in readers[0].input[1:])
    return readers[0] if plain else None
