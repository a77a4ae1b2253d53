"""Fused form of a streaming graph: attention over the past and LSTMs as one native operator each.

Shapes: N frames of a call, T past frames, R rows, S sets of rows, C inputs, H hidden; the operators' own stand in
``ops.past_attention`` and ``ops.lstm_steps``.

A call brings a few frames, and runtimes spend it on everything but its sums: the past is copied into a matrix
product's own order before a few frames meet it, and every step of an LSTM is a product of a few rows. So:

* both products with the past, both with the call's own frames and the softmax between them → ``PastAttention``, which
  reads the past as it lies; in INT8 that is eight bits, and the sums are in float;
* LSTM → its input projection, one product over all steps, and ``LstmSteps``. The product can be in INT8 on every
  runtime. Sets of rows that read the same frames (``separators.segments``) share it, and a set that is held at a step
  costs nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from edgesep.onnx_edit import drop_dead, fold_rearranged, replace_nodes
from edgesep.ops.lstm_steps import grouped
from edgesep.units import Graph

DOMAIN = "edgesep"
HELD = -1  # in an order: the set stays as it is


def applies(model: onnx.ModelProto) -> bool:
    """Whether the graph holds attention over states, which ``fuse`` makes one operator."""
    graph = Graph(model.graph)
    return any(_attention(graph, node) for node in graph.nodes)


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same, but attention rounds nothing but its past."""
    made = lstms_apart(model)
    graph, constants = Graph(made.graph), _Constants(made.graph)
    found = {a.out: a for node in graph.nodes if (a := _attention(graph, node))}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        attention = found.get(node.output[0])
        nodes += [node] if attention is None else _attended(graph, attention, constants)
    return _written(made, nodes)


def lstms_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every LSTM as its input projection and ``LstmSteps``; the function it computes is the same."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    fold_rearranged(made)  # their weights are put together from pieces
    inferred = onnx.shape_inference.infer_shapes(made).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in (*inferred.value_info, *inferred.input)
    }
    graph, steps = Graph(made.graph), _Steps(Graph(made.graph), _Constants(made.graph), shapes)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        lstm = _lstm(graph, node)
        nodes += [node] if lstm is None else steps.of(lstm)
        if lstm is not None:
            _without_transposition(graph, node.output[0])
    return _written(made, nodes)


def _written(model: onnx.ModelProto, nodes: list[NodeProto]) -> onnx.ModelProto:
    replace_nodes(model.graph, nodes)
    drop_dead(model.graph)
    if any(n.domain == DOMAIN for n in model.graph.node) and all(o.domain != DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


class _Constants:
    """Constants that are added to a graph, one for equal values."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = graph
        self.names: dict[bytes, str] = {}

    def name(self, value: np.ndarray) -> str:
        key = value.tobytes() + str((value.shape, value.dtype)).encode()
        if key not in self.names:
            self.names[key] = f"{self.graph.node[0].name}_constant_{len(self.names)}"
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), self.names[key]))
        return self.names[key]


def _made_by(graph: Graph, name: str, kind: str) -> NodeProto | None:
    """The node of that kind which makes a tensor, in front of its rounding."""
    node = graph.producer.get(graph.source(name))
    return node if node is not None and node.op_type == kind else None


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Names of what attention reads; the past as products take it, perhaps rounded, keys before they are transposed."""

    q: str
    k: str
    v: str
    past_k: str
    past_v: str
    hidden: str
    out: str


def _turned(graph: Graph, name: str) -> str:
    """What a product takes with its last two axes swapped, as it was before; rounded first or then. Empty if not so."""
    node = _made_by(graph, name, "Transpose")
    return node.input[0] if node and list(node.attribute[0].ints) == [0, 1, 3, 2] else ""


def _attention(graph: Graph, softmax: NodeProto) -> Attention | None:
    if softmax.op_type != "Softmax":
        return None
    total = _made_by(graph, softmax.input[0], "Add")
    scores = total and _made_by(graph, total.input[0], "Concat")
    if not total or not scores or len(scores.input) != 2:
        return None
    with_past, with_own = (_made_by(graph, name, "MatMul") for name in scores.input)
    parts = [graph.only_reader(n.output[0]) for n in graph.readers[softmax.output[0]] if n.op_type == "Slice"]
    if not with_past or not with_own or len(parts) != 2:
        return None
    past, own = parts
    behind = past and graph.only_reader(past.output[0])
    if not past or not own or not behind or behind.op_type != "Add" or graph.only_reader(own.output[0]) != behind:
        return None
    past_k, k = _turned(graph, with_past.input[1]), _turned(graph, with_own.input[1])
    q, other = (graph.source(n.input[0]) for n in (with_past, with_own))
    pasts = [graph.source(past_k), graph.source(past.input[1])]
    if not k or q != other or any(graph.producer.get(p) for p in pasts) or not all(pasts):
        return None  # the past is what the caller hands over
    return Attention(
        q, graph.source(k), graph.source(own.input[1]), past_k, past.input[1], total.input[1], behind.output[0]
    )


def _attended(graph: Graph, a: Attention, constants: _Constants) -> list[NodeProto]:
    nodes, pasts = [], []
    attributes: dict[str, float] = {}
    for what, name in (("k", a.past_k), ("v", a.past_v)):
        past, rounding = graph.source(name), _rounding(graph, name)
        if rounding is not None:
            scale, zero = rounding
            rounded = f"{a.out}_past_{what}"
            inputs = [past, constants.name(scale), constants.name(zero)]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [rounded], rounded))
            attributes |= {f"{what}_scale": float(scale), f"{what}_zero": float(zero)}
            past = rounded
        pasts.append(past)
    nodes.append(_own("PastAttention", [a.q, a.k, a.v, *pasts, a.hidden], [a.out], f"{a.out}_attention", **attributes))
    return nodes


def _rounding(graph: Graph, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a tensor that is rounded to uint8, before it is transposed or then."""
    names = [name, *(n.output[0] for n in graph.readers[name] if n.op_type == "Transpose")]
    pair = next((p for made, p in graph.pairs.items() if made in names or p[0].input[0] in names), None)
    if pair is None:
        return None
    scale, zero = (graph.constants[i] for i in pair[0].input[1:3])
    return (scale, zero) if scale.size == 1 and zero.dtype == np.uint8 else None


# -- LSTMs -------------------------------------------------------------------------------------------------------------


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
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = given.get("direction", b"forward") == b"forward" and not given.get("layout", 0) and "clip" not in given
    values = [graph.value(name) for name in node.input[1:4]]
    if not (plain and x and h and c) or lengths or peepholes or any(v is None for v in values):
        return None
    weight, recurrent, bias = (np.asarray(v)[0] for v in values)
    return Lstm(node, weight.T, recurrent.T, bias.reshape(2, -1).sum(0))


def _sets(graph: Graph, lstm: Lstm) -> Sets | None:
    """How sets of rows are put together, if the LSTM's input is frames for each of them and inputs that hold."""
    joined = _made_by(graph, lstm.node.input[0], "Concat")
    frames = joined and _made_by(graph, joined.input[0], "Concat")
    if not joined or not frames or [a.i for n in (joined, frames) for a in n.attribute] != [2, 1]:
        return None
    gathers = [_made_by(graph, name, "Gather") for name in frames.input]
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

    def __init__(self, graph: Graph, constants: _Constants, shapes: dict[str, tuple[int, ...]]):
        self.graph, self.constants, self.shapes = graph, constants, shapes
        self.orders: dict[Sets, str] = {}

    def of(self, lstm: Lstm) -> list[NodeProto]:
        node, x, weight = lstm.node, lstm.node.input[0], lstm.weight
        sets = _sets(self.graph, lstm)
        nodes: list[NodeProto] = []
        order: list[str] = []
        if sets is not None and (kept := _without_holding(weight)):
            x, weight = sets.x, weight[:kept]
            if sets not in self.orders:
                self.orders[sets] = f"{node.name}_order"
                nodes += self._order(sets, self.orders[sets])
            order = [self.orders[sets]]
        flat = _made_by(self.graph, x, "Reshape")  # rows, perhaps, that were given another shape for the LSTM
        if flat is not None and self.shapes.get(flat.input[0], ())[1:] == weight.shape[:1]:
            rows = flat.input[0]
        else:
            rows = f"{node.name}_rows"
            shape = self.constants.name(np.array([-1, weight.shape[0]]))
            nodes.append(helper.make_node("Reshape", [x, shape], [rows], rows))
        gates, names = (
            f"{node.name}_gates",
            [self.constants.name(v) for v in (weight, lstm.bias, grouped(lstm.recurrent))],
        )
        nodes.append(helper.make_node("Gemm", [rows, *names[:2]], [gates], gates))
        outputs = [node.output[0] or f"{node.name}_y", *node.output[1:]]
        nodes.append(_own("LstmSteps", [gates, names[2], *node.input[5:7], *order], outputs, f"{node.name}_steps"))
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
        moves = node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 1, 3]
        if moves and all(n.op_type == "Reshape" and 0 not in graph.constants.get(n.input[1], (0,)) for n in behind):
            for reader in behind:
                reader.input[0] = y


def _without_holding(weight: np.ndarray) -> int:
    """How many inputs stand before those that hold: they close input gates, open forget gates and do nothing else."""
    closed, out, opened, cell = np.split(weight, 4, 1)
    holds = (closed < 0).all(1) & (opened > 0).all(1) & (out == 0).all(1) & (cell == 0).all(1)
    first = int(np.argmax(holds))
    return first if holds[first:].all() else 0


def _own(kind: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, outputs, name, domain=DOMAIN, **attributes)
