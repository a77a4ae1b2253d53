"""LSTMs of a graph as their input projection and an operator for what is left.

Shapes: N frames of a call, R rows, S sets of rows, C inputs, H hidden; the operator's own stand in ``ops.lstm_steps``.

Every step of an LSTM is a product of a few rows, which runtimes start, spread over threads and wait for. Its input
projection is one product over all steps, in INT8 on every runtime, and what follows it then, too. Sets of rows that
read the same frames (``separators.segments``) share it, and a set that is held at a step costs nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.lstm_scan import unusual
from edgesep.onnx_edit import Constants, fold_rearranged, inferred_shapes, rewrite
from edgesep.ops import lstm_steps
from edgesep.units import Graph, flags

HELD = -1  # in an order: the set stays as it is


def lstms_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every LSTM as its input projection and ``LstmSteps``; the function it computes is the same, but for
    what a set puts out at steps at which it is held, which nobody should read."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    fold_rearranged(made)  # their weights are put together from pieces
    graph = Graph(made.graph)
    steps = _Steps(graph, Constants(made.graph, "lstm"), inferred_shapes(made))
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        lstm = _lstm(graph, node)
        nodes += [node] if lstm is None else steps.of(lstm)
        if lstm is not None:
            _without_transposition(graph, node.output[0])
    rewrite(made, nodes)
    return made


def in_bytes(graph: Graph, node: NodeProto, constants: Constants) -> None:
    """Where an LSTM's projection multiplies what was rounded, its own matrix is rounded too, in place."""
    if node.op_type != lstm_steps.NAME or not _in_integers(graph, node.input[0]):
        return
    recurrent, scale = lstm_steps.in_bytes(graph.constants[node.input[1]])
    given = [node.input[0], constants.name(recurrent), *node.input[2:], ""][:5]
    node.input[:] = [*given, constants.name(scale)]


def _in_integers(graph: Graph, gates: str) -> bool:
    """Whether a projection multiplies what was rounded."""
    made = graph.producer.get(gates)
    if made is not None and made.op_type == "Add":  # of the bias
        made = next((n for n in map(graph.producer.get, made.input) if n and n.op_type == "MatMul"), None)
    factors = [graph.producer.get(name) for name in made.input[:2]] if made is not None else [None]
    return all(n is not None and n.op_type == "DequantizeLinear" for n in factors)


@dataclass(frozen=True)
class Lstm:
    """An LSTM's constants: ``weight (C, 4H)``, ``recurrent (H, 4H)``, ``bias (4H)``."""

    node: NodeProto
    weight: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Sets:
    """Sets of rows of one LSTM: the frames that all of them read; for each set which, by an index, or empty for one
    after another; and a tensor ``(N, S)`` of when it is held."""

    x: str
    taken: tuple[str, ...]
    holds: str


def _lstm(graph: Graph, node: NodeProto) -> Lstm | None:
    if node.op_type != "LSTM":
        return None
    x, _, _, _, lengths, h, c, peepholes = [*node.input, *[""] * 8][:8]
    values = [graph.value(name) for name in node.input[1:4]]
    if unusual(node) or not (x and h and c) or lengths or peepholes or any(v is None for v in values):
        return None
    weight, recurrent, bias = (np.asarray(v)[0] for v in values)
    return Lstm(node, weight.T, recurrent.T, bias.reshape(2, -1).sum(0))


def _sets(graph: Graph, lstm: Lstm) -> Sets | None:
    """How sets of rows are put together, if the LSTM's input is frames for each of them and inputs that hold."""
    joined = graph.made_by(lstm.node.input[0], "Concat")
    frames = joined and graph.made_by(joined.input[0], "Concat")
    if not joined or not frames or [flags(n)["axis"] for n in (joined, frames)] != [2, 1]:
        return None
    gathers = [graph.made_by(name, "Gather") for name in frames.input]
    last_h = lstm.node.output[1] if len(lstm.node.output) > 1 else ""
    if any(g is not None and flags(g).get("axis", 0) for g in gathers) or (last_h and graph.readers[last_h]):
        return None  # a set that is held would still put out a new h
    x = next((name for name, gather in zip(frames.input, gathers, strict=True) if gather is None), "")
    taken = tuple("" if g is None else g.input[1] for g in gathers)
    bases = {name if g is None else g.input[0] for name, g in zip(frames.input, gathers, strict=True)}
    holding = graph.producer.get(joined.input[1])
    while holding is not None and holding.op_type in ("Expand", "Reshape", "Unsqueeze", "Mul"):
        holding = graph.producer.get(holding.input[0])
    if bases != {x} or holding is None or holding.op_type != "Cast":
        return None
    return Sets(x, taken, holding.input[0])


class _Steps:
    """Writes LSTMs; orders of the same sets are written once."""

    def __init__(self, graph: Graph, constants: Constants, shapes: dict[str, tuple[int, ...]]):
        self.graph, self.constants, self.shapes = graph, constants, shapes
        self.orders: dict[tuple[tuple[str, ...], str], str] = {}

    def of(self, lstm: Lstm) -> list[NodeProto]:
        node, x, weight = lstm.node, lstm.node.input[0], lstm.weight
        sets = _sets(self.graph, lstm)
        nodes: list[NodeProto] = []
        order: list[str] = []
        if sets is not None and (kept := _without_holding(weight)):
            x, weight = sets.x, weight[:kept]
            key = sets.taken, sets.holds
            if key not in self.orders:
                self.orders[key] = f"{node.name}_order"
                nodes += self._order(sets, self.orders[key])
            order = [self.orders[key]]
        flat = self.graph.made_by(x, "Reshape")  # rows, perhaps, that were given another shape for the LSTM
        if flat is not None and self.shapes.get(flat.input[0], ())[1:] == weight.shape[:1]:
            rows = flat.input[0]
        else:
            rows = f"{node.name}_rows"
            shape = self.constants.name(np.array([-1, weight.shape[0]]))
            nodes.append(helper.make_node("Reshape", [x, shape], [rows], rows))
        gates, recurrent = f"{node.name}_gates", self.constants.name(lstm_steps.grouped(lstm.recurrent))
        projection = [rows, self.constants.name(weight), self.constants.name(lstm.bias)]
        nodes.append(helper.make_node("Gemm", projection, [gates], gates))
        given, outputs = (
            [gates, recurrent, *node.input[5:7], *order],
            [node.output[0] or f"{node.name}_y", *node.output[1:]],
        )
        steps = helper.make_node(lstm_steps.NAME, given, outputs, f"{node.name}_steps", domain=lstm_steps.DOMAIN)
        nodes.append(steps)
        return nodes

    def _order(self, sets: Sets, out: str) -> list[NodeProto]:
        nodes, columns = [], []
        each = self.constants.name(np.arange(self.shapes[sets.holds][0], dtype=np.int64)[:, None])
        for i, taken in enumerate(sets.taken):
            columns.append(f"{out}_{i}" if taken else each)
            if taken:
                axis = self.constants.name(np.array([1]))
                nodes.append(helper.make_node("Unsqueeze", [taken, axis], [columns[-1]], columns[-1]))
        nodes.append(helper.make_node("Concat", columns, [f"{out}_reads"], f"{out}_reads", axis=1))
        held = self.constants.name(np.array(HELD))
        nodes.append(helper.make_node("Where", [sets.holds, held, f"{out}_reads"], [out], out))
        return nodes


def _without_transposition(graph: Graph, y: str) -> None:
    """What an LSTM made, ``(L, 1, rows, H)``, needs none in front of a Reshape: an axis of one moves nothing."""
    for node in graph.readers[y]:
        behind = graph.readers[node.output[0]]
        moves = node.op_type == "Transpose" and flags(node).get("perm") == [0, 2, 1, 3]
        if moves and all(n.op_type == "Reshape" and 0 not in graph.constants.get(n.input[1], (0,)) for n in behind):
            for reader in behind:
                reader.input[0] = y


def _without_holding(weight: np.ndarray) -> int:
    """How many inputs stand before those that hold: they close input gates, open forget gates and do nothing else."""
    closed, out, opened, cell = np.split(weight, 4, 1)
    holds = (closed < 0).all(1) & (opened > 0).all(1) & (out == 0).all(1) & (cell == 0).all(1)
    first = int(np.argmax(holds))
    return first if holds[first:].all() else 0
