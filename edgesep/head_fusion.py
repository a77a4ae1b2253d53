"""Fused form of a stream's norms over heads: slope, heads apart, norm and gain as one operator.

Shapes: N frames, F bins, h heads of d features (``ops.head_norm``).

A projection's channels are heads, and each is normalized over its features and all bins of a frame. Runtimes move the
heads apart in a pass over memory, go over them for a mean, for what is left without it, for its squares, and once more
for the gain: a dozen nodes for a map of a few thousand values. So a LayerNormalization of what was moved like that, or
of rows behind a slope, together with what stands around it → ``HeadNorm``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.onnx_edit import Constants, rewrite
from edgesep.ops import head_norm
from edgesep.units import Graph, flags

Shapes = dict[str, tuple[int, ...]]
HEADS_FIRST = [2, 0, 1, 3]


@dataclass
class Heads:
    """Heads of rows ``x (N·F, C)``; ``gain, bias (h, F, d)``; ``out`` is the tensor that the last node makes."""

    x: str
    first: int
    gain: np.ndarray
    bias: np.ndarray
    epsilon: float
    out: str
    slope: np.ndarray | None = None


def fuse(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same.

    Args:
        shapes: of its tensors, as far as they are known.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, constants = Graph(made.graph), Constants(made.graph, "head")
    norms = (_heads(graph, node, shapes) for node in graph.nodes if node.op_type == "LayerNormalization")
    found = {heads.out: heads for heads in norms if heads is not None}
    rewrite(made, [_written(found[n.output[0]], constants) if n.output[0] in found else n for n in graph.nodes])
    return made


def _written(heads: Heads, constants: Constants) -> NodeProto:
    values = [heads.gain, heads.bias, *([] if heads.slope is None else [heads.slope])]
    inputs = [heads.x, *(constants.name(v.astype(np.float32)) for v in values)]
    return helper.make_node(
        head_norm.NAME,
        inputs,
        [heads.out],
        f"{heads.out}_heads",
        domain=head_norm.DOMAIN,
        first=heads.first,
        epsilon=heads.epsilon,
    )


def _heads(graph: Graph, norm: NodeProto, shapes: Shapes) -> Heads | None:
    normed, given = shapes.get(norm.input[0], ()), flags(norm)
    if len(normed) != 4 or normed[0] != 1 or 0 in normed or given.get("axis", -1) not in (-1, 3):
        return None
    (_, heads, frames, size), bins, name = normed, 0, _reshaped(graph, norm.input[0])
    moved = graph.producer.get(name)
    if moved is not None and moved.op_type == "Transpose":
        apart = shapes.get(moved.input[0], ())
        if flags(moved).get("perm") != HEADS_FIRST or apart[:1] + apart[2:3] != (frames, heads):
            return None
        bins, name = apart[1], _reshaped(graph, moved.input[0])
    width = shapes.get(name, (0,))[-1]
    first, name = _first_channel(graph, name)
    slope, name = _slope(graph, name)
    rows = shapes.get(name, ())
    if len(rows) != 2 or 0 in (*rows, width) or (not bins and (heads > 1 or slope is None)):
        return None  # rows of one head without a slope: a norm that runtimes have
    bins = bins or size // width
    features = width // heads
    affine = _affine(graph, norm, (heads, size))
    if heads * features != width or bins * features != size or rows[0] != frames * bins or affine is None:
        return None
    if slope is not None:
        slope = np.broadcast_to(slope, rows[1:])[first : first + width]
    gain, bias, out = affine
    kept = (heads, bins, features)
    return Heads(name, first, gain.reshape(kept), bias.reshape(kept), given.get("epsilon", 1e-5), out, slope)


def _reshaped(graph: Graph, name: str) -> str:
    """What was only given other shapes since."""
    while (node := graph.producer.get(name)) is not None and node.op_type in ("Reshape", "Unsqueeze"):
        name = node.input[0]
    return name


def _first_channel(graph: Graph, name: str) -> tuple[int, str]:
    """Where channels were taken from, and of what; all of them if they were not."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "Slice":
        return 0, name
    bounds = [graph.constants.get(i, np.zeros(2)).ravel() for i in node.input[1:]]
    if len(bounds) < 3 or any(b.size != 1 for b in bounds) or bounds[2][0] != 1 or bounds[0][0] < 0:
        return 0, name
    return (0, name) if len(bounds) > 3 and bounds[3][0] != 1 else (int(bounds[0][0]), node.input[0])


def _slope(graph: Graph, name: str) -> tuple[np.ndarray | None, str]:
    """``max(x, slope x)``: the slope and x."""
    most = graph.producer.get(name)
    for x, other in zip(most.input, reversed(most.input), strict=True) if most and most.op_type == "Max" else ():
        scaled = graph.producer.get(other)
        if scaled is not None and scaled.op_type == "Mul" and x in scaled.input:
            slope = graph.constants.get(next((i for i in scaled.input if i != x), ""))
            if slope is not None and slope.ndim <= 1:
                return slope, x
    return None, name


def _affine(graph: Graph, norm: NodeProto, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, str] | None:
    """``(h, F·d)`` of what a norm and the nodes behind it multiply by and add, and the name of their result."""
    values = [graph.constants.get(name, np.zeros(0)) for name in norm.input[1:]]
    if any(v.shape != size[1:] for v in values):
        return None
    gain, bias = (np.broadcast_to(v, size) for v in (*values, np.zeros(1))[:2])
    name = norm.output[0]
    for kind in ("Mul", "Add"):
        behind = graph.readers[name]
        if [n.op_type for n in behind] != [kind] or name in graph.outputs:
            continue
        (node,) = behind
        value = graph.constants.get(next(i for i in node.input if i != name))
        if value is None or value.shape not in ((1, size[0], 1, size[1]), (size[1],), (1,), ()):
            break
        factor = np.broadcast_to(value.reshape(size) if value.ndim == 4 else value, size)
        gain, bias = (gain * factor, bias * factor) if kind == "Mul" else (gain, bias + factor)
        name = node.output[0]
    return gain, bias, name
