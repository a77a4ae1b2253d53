"""Fused form of a streaming graph: attention over the past and LSTMs as one native operator each.

Shapes: N frames of a call, T past frames, R rows, S sets of rows, C inputs, H hidden; the operators' own stand in
``ops.past_attention`` and ``ops.lstm_steps``.

A call brings a few frames, and runtimes spend it on everything but its sums: the past is copied into a matrix
product's own order before a few frames meet it, and every step of an LSTM is a product of a few rows. So:

* both products with the past, both with the call's own frames and the softmax between them → ``PastAttention``, which
  reads the past as it lies; in INT8 that is eight bits, and the sums are in float;
* LSTM → its input projection, one product over all steps, and ``LstmSteps``. The product can be in INT8 on every
  runtime, and what follows it then, too. Sets of rows that read the same frames (``separators.segments``) share it,
  and a set that is held at a step costs nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.lstm_scan import unusual
from edgesep.onnx_edit import Constants, fold_rearranged, inferred_shapes, rewrite
from edgesep.ops import lstm_steps, past_attention
from edgesep.units import Graph, flags

HELD = -1  # in an order: the set stays as it is
LAST = (-1, 3)  # axis of scores


def applies(model: onnx.ModelProto) -> bool:
    """Whether the graph holds attention over states, which ``fuse`` makes one operator."""
    return bool(_attentions(model))


def in_float(model: onnx.ModelProto) -> set[str]:
    """What those products make that ``fuse`` takes into attention: it sums in float even what is rounded here."""
    return {name for a in _attentions(model).values() for name in a.products}


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same, but that attention rounds nothing but its past (and
    for ``lstms_apart``)."""
    made = lstms_apart(model)
    graph, constants, found = Graph(made.graph), Constants(made.graph, "attention"), _attentions(made)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        attention = found.get(node.output[0])
        nodes += [node] if attention is None else _attended(graph, attention, constants)
        if node.op_type == lstm_steps.NAME and _in_integers(graph, node.input[0]):
            recurrent, scale = lstm_steps.in_bytes(graph.constants[node.input[1]])
            given = [*node.input[:1], constants.name(recurrent), *node.input[2:], ""][:5]
            node.input[:] = [*given, constants.name(scale)]
    rewrite(made, nodes)
    return made


def _in_integers(graph: Graph, gates: str) -> bool:
    """Whether a projection multiplies what was rounded; then its LSTM may do so, too."""
    made = graph.producer.get(gates)
    if made is not None and made.op_type == "Add":  # of the bias
        made = next((n for n in map(graph.producer.get, made.input) if n and n.op_type == "MatMul"), None)
    factors = [graph.producer.get(name) for name in made.input[:2]] if made is not None else [None]
    return all(n is not None and n.op_type == "DequantizeLinear" for n in factors)


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


def _made_by(graph: Graph, name: str, kind: str) -> NodeProto | None:
    """The node of that kind which makes a tensor, in front of its rounding."""
    node = graph.producer.get(graph.source(name))
    return node if node is not None and node.op_type == kind else None


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Names of what attention reads; the past as products take it, perhaps rounded, keys before they are transposed.
    ``products`` are what its four products make."""

    q: str
    k: str
    v: str
    past_k: str
    past_v: str
    hidden: str
    out: str
    products: tuple[str, ...]


def _attentions(model: onnx.ModelProto) -> dict[str, Attention]:
    """By the tensor that each makes."""
    graph, shapes = Graph(model.graph), inferred_shapes(model)
    found = (_attention(graph, node, shapes) for node in graph.nodes if node.op_type == "Softmax")
    return {a.out: a for a in found if a is not None}


def _turned(graph: Graph, name: str) -> str:
    """What a product takes with its last two axes swapped, as it was before; rounded first or then. Empty if not so."""
    node = _made_by(graph, name, "Transpose")
    return node.input[0] if node and flags(node).get("perm") == [0, 1, 3, 2] else ""


def _attention(graph: Graph, softmax: NodeProto, shapes: dict[str, tuple[int, ...]]) -> Attention | None:
    total = _made_by(graph, softmax.input[0], "Add")
    scores = total and _made_by(graph, total.input[0], "Concat")
    if not total or not scores or len(scores.input) != 2 or len(shapes.get(total.input[1], ())) != 2:
        return None
    with_past, with_own = (_made_by(graph, name, "MatMul") for name in scores.input)
    slices = [n for n in graph.readers[softmax.output[0]] if n.op_type == "Slice"]
    past, own = (graph.only_reader(n.output[0]) for n in slices) if _in_two(graph, slices) else (None, None)
    behind = past and graph.only_reader(past.output[0])
    along = [flags(n).get("axis", -1) in LAST for n in (softmax, scores)]
    products = [n for n in (with_past, with_own, past, own) if n is not None and n.op_type == "MatMul"]
    if not all(along) or len(products) < 4 or not behind or behind.op_type != "Add":
        return None
    if graph.only_reader(products[3].output[0]) != behind:
        return None
    past_k, k, past_v = *(_turned(graph, n.input[1]) for n in products[:2]), products[2].input[1]
    q, other = (graph.source(n.input[0]) for n in products[:2])
    pasts = [graph.source(past_k), graph.source(past_v)]
    if not k or q != other or any(graph.producer.get(p) for p in pasts) or not all(pasts):
        return None  # the past is what the caller hands over
    own_k, own_v, made = graph.source(k), graph.source(products[3].input[1]), tuple(n.output[0] for n in products)
    return Attention(q, own_k, own_v, past_k, past_v, total.input[1], behind.output[0], made)


def _in_two(graph: Graph, slices: list[NodeProto]) -> bool:
    """Whether two slices are all of the last axis, one behind the other."""
    bounds = [[graph.constants.get(name, np.zeros(2)).ravel() for name in n.input[1:]] for n in slices]
    if len(bounds) != 2 or any(len(b) < 3 or any(v.size > 1 for v in b) or b[2][0] not in LAST for b in bounds):
        return False
    (start, end, *_), (next_start, last, *_) = ([int(v[0]) for v in b] for b in bounds)
    return start == 0 < end == next_start < last and all(len(b) < 4 or b[3][0] == 1 for b in bounds)


def _attended(graph: Graph, a: Attention, constants: Constants) -> list[NodeProto]:
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
    inputs = [a.q, a.k, a.v, *pasts, a.hidden]
    nodes.append(_own(past_attention.NAME, inputs, [a.out], f"{a.out}_attention", **attributes))
    return nodes


def _rounding(graph: Graph, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a tensor that is rounded to uint8, before it is transposed or then."""
    names = [name, *(n.output[0] for n in graph.readers[name] if n.op_type == "Transpose")]
    pair = next((p for made, p in graph.pairs.items() if made in names or p[0].input[0] in names), None)
    if pair is None or len(pair[0].input) < 3 or any(i not in graph.constants for i in pair[0].input[1:3]):
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
    values = [graph.value(name) for name in node.input[1:4]]
    if unusual(node) or not (x and h and c) or lengths or peepholes or any(v is None for v in values):
        return None
    weight, recurrent, bias = (np.asarray(v)[0] for v in values)
    return Lstm(node, weight.T, recurrent.T, bias.reshape(2, -1).sum(0))


def _sets(graph: Graph, lstm: Lstm) -> Sets | None:
    """How sets of rows are put together, if the LSTM's input is frames for each of them and inputs that hold."""
    joined = _made_by(graph, lstm.node.input[0], "Concat")
    frames = joined and _made_by(graph, joined.input[0], "Concat")
    if not joined or not frames or [flags(n)["axis"] for n in (joined, frames)] != [2, 1]:
        return None
    gathers = [_made_by(graph, name, "Gather") for name in frames.input]
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
        flat = _made_by(self.graph, x, "Reshape")  # rows, perhaps, that were given another shape for the LSTM
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
        nodes.append(_own(lstm_steps.NAME, given, outputs, f"{node.name}_steps"))
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


def _own(kind: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, outputs, name, domain=lstm_steps.DOMAIN, **attributes)
