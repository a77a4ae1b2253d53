"""Fused form of a streaming graph: attention over the past and LSTMs (``lstm_fusion``) as one native operator each.

Shapes: N frames of a call, T past frames; the operator's own stand in ``ops.past_attention``.

A call brings a few frames, and runtimes spend it on everything but its sums: the past is copied into a matrix
product's own order before a few frames meet it. So both products with the past, both with the call's own frames and the
softmax between them → ``PastAttention``, which reads the past as it lies; in INT8 that is eight bits, and so has what
weighs values, a query 15; or both are in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep import lstm_fusion
from edgesep.onnx_edit import Constants, inferred_shapes, rewrite
from edgesep.ops import past_attention
from edgesep.units import Graph, flags

LAST = (-1, 3)  # axis of scores


def applies(model: onnx.ModelProto) -> bool:
    """Whether the graph holds attention over states, which ``fuse`` makes one operator."""
    return bool(_attentions(model))


def in_float(model: onnx.ModelProto) -> set[str]:
    """What those products make that ``fuse`` takes into attention: it rounds nothing but its past."""
    return {name for a in _attentions(model).values() for name in a.products}


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same, but that attention rounds nothing but its past (and
    for ``lstm_fusion``)."""
    made = lstm_fusion.lstms_apart(model)
    graph, constants, found = Graph(made.graph), Constants(made.graph, "attention"), _attentions(made)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        attention = found.get(node.output[0])
        nodes += [node] if attention is None else _attended(graph, attention, constants)
        lstm_fusion.in_bytes(graph, node, constants)
    rewrite(made, nodes)
    return made


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
    node = graph.made_by(name, "Transpose")
    return node.input[0] if node and flags(node).get("perm") == [0, 1, 3, 2] else ""


def _attention(graph: Graph, softmax: NodeProto, shapes: dict[str, tuple[int, ...]]) -> Attention | None:
    total = graph.made_by(softmax.input[0], "Add")
    scores = total and graph.made_by(total.input[0], "Concat")
    if not total or not scores or len(scores.input) != 2 or len(shapes.get(total.input[1], ())) != 2:
        return None
    with_past, with_own = (graph.made_by(name, "MatMul") for name in scores.input)
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
    attributes: dict[str, Any] = {}
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
    name, domain = f"{a.out}_attention", past_attention.DOMAIN
    nodes.append(helper.make_node(past_attention.NAME, inputs, [a.out], name, domain=domain, **attributes))
    return nodes


def _rounding(graph: Graph, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a tensor that is rounded to uint8, before it is transposed or then."""
    names = [name, *(n.output[0] for n in graph.readers[name] if n.op_type == "Transpose")]
    pair = next((p for made, p in graph.pairs.items() if made in names or p[0].input[0] in names), None)
    if pair is None or len(pair[0].input) < 3 or any(i not in graph.constants for i in pair[0].input[1:3]):
        return None
    scale, zero = (graph.constants[i] for i in pair[0].input[1:3])
    return (scale, zero) if scale.size == 1 and zero.dtype == np.uint8 else None
