"""States of a stream in eight bits, where whoever reads them rounds them to that."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import helper

from edgesep.onnx_edit import replace_nodes
from edgesep.units import Graph


def hold_in_integers(model: onnx.ModelProto) -> None:
    """A state that is only ever rounded to INT8 is held so: a quarter of the memory, and a call rounds its own frames,
    not all that is remembered.

    Bit for bit the same estimates. The file's description says of what type a state is and what it begins as.
    """
    described = next((p for p in model.metadata_props if p.key == "edgesep"), None)
    facts = json.loads(described.value) if described else {}
    if described is None or not facts.get("stream"):
        return
    graph = Graph(model.graph)
    values = {v.name: v for v in (*model.graph.input, *model.graph.output)}
    ends = {e["name"]: e for e in (*facts["inputs"], *facts["outputs"])}
    rounded: dict[str, str] = {}
    made: list[onnx.NodeProto] = []
    for state in facts["stream"]["states"]:
        name, new = state["name"], f"next_{state['name']}"
        first = graph.readers[name]
        taken = graph.readers[first[0].output[0]] if [n.op_type for n in first] == ["Transpose"] else first
        if [n.op_type for n in taken] != ["QuantizeLinear"] or len(taken[0].input) < 3:
            continue
        before, of_step, of_zero = taken[0].input
        scale, zero = graph.constants.get(of_step), graph.constants.get(of_zero)
        if scale is None or zero is None or scale.size > 1:
            continue
        rounded[taken[0].output[0]] = before
        # Its new frames leave rounded; what reads them in this call reads them as it did.
        maker, here = graph.producer[new], f"{new}_here"
        maker.output[:] = [here if o == new else o for o in maker.output]
        for node in graph.readers[new]:
            node.input[:] = [here if i == new else i for i in node.input]
        made.append(helper.make_node("QuantizeLinear", [here, of_step, of_zero], [new], f"{new}/QuantizeLinear"))
        for value in (values[name], values[new]):
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(zero.dtype)
        kind = np.iinfo(zero.dtype)
        begins = np.rint(np.asarray(state["initial"], np.float32) / scale) + zero.astype(np.float32)
        state["initial"] = begins.clip(kind.min, kind.max).tolist()
        state["dtype"] = ends[name]["dtype"] = ends[new]["dtype"] = str(zero.dtype)
    for node in model.graph.node:
        node.input[:] = [rounded.get(i, i) for i in node.input]
    replace_nodes(model.graph, [n for n in (*model.graph.node, *made) if n.output[0] not in rounded])
    described.value = json.dumps(facts)
