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
from edgesep.units import Graph


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
    made: list[NodeProto] = []
    rounded: dict[str, NodeProto] = {}
    for node in graph.nodes:
        readers = graph.readers[node.output[0]] if node.output else []
        rows = shapes.get(node.input[0], ()) if node.input else ()
        if (
            node.op_type == "LayerNormalization"
            and [n.op_type for n in readers] == ["QuantizeLinear"]
            and len(rows) == 2
        ):
            x, (behind,), width = node.input[0], readers, rows[1]
            if width and node.output[0] not in graph.outputs:
                apart, together = (constants.name(np.array(s)) for s in ([-1, 1, width], [-1, width]))
                made.append(helper.make_node("Reshape", [x, apart], [f"{x}_apart"], f"{x}_apart"))
                node.input[0] = f"{x}_apart"
                out = behind.output[0]
                behind.output[0] = f"{out}_apart"
                rounded[f"{out}_apart"] = helper.make_node("Reshape", [f"{out}_apart", together], [out], out)
        made.append(node)
        if node.output and node.output[0] in rounded:
            made.append(rounded[node.output[0]])
    replace_nodes(model.graph, made)
