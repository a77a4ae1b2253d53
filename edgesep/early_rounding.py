"""Values are rounded to INT8 before they are gathered into windows, not as often as they are read.

Windows that overlap hold each value as often as there are taps. Calibration puts the rounding in front of the product
that reads them; in front of the Gather it rounds each value once, and what is gathered is a quarter of the bytes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.onnx_edit import replace_nodes
from edgesep.units import Graph


def round_first(written: onnx.GraphProto) -> None:
    """In place, and bit for bit the same: zeros that are padded become the zero point."""
    graph = Graph(written)
    early: dict[int, list[NodeProto]] = {}  # what stands in front of a node
    late: set[int] = set()
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3:
            continue
        if any(graph.constants.get(name, np.zeros(2)).ndim for name in node.input[1:]):
            continue  # a step of its own for each channel, or one that is made in the graph
        name, *step = node.input
        moves: list[NodeProto] = []
        while len(graph.readers[name]) == 1 and name not in graph.outputs and _moves(graph, graph.producer.get(name)):
            moves.insert(0, graph.producer[name])
            name = moves[0].input[0]
        if not any(n.op_type == "Gather" for n in moves):
            continue
        late.add(id(node))
        rounded = f"{node.output[0]}_early"
        early[id(moves[0])] = [helper.make_node("QuantizeLinear", [name, *step], [rounded], rounded)]
        moves[0].input[0], moves[-1].output[0] = rounded, node.output[0]
        for move in moves:
            if move.op_type == "Pad":
                move.input[2:] = [step[1], *move.input[3:]]
    made = [n for node in graph.nodes for n in (*early.get(id(node), ()), node) if id(n) not in late]
    replace_nodes(written, made)


def _moves(graph: Graph, node: NodeProto | None) -> bool:
    """Whether a node only moves values, or puts zeros beside them."""
    return node is not None and (node.op_type in ("Gather", "Reshape") or graph.pads_zeros(node))
