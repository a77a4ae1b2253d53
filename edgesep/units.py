"""The units that U-Conv separators are made of, found in an exported graph of flat maps.

Shapes: maps are ``(B, C, 1, L)``, B batch, C channels, L frames.

A unit is a depthwise Conv, or none; a gLN (as it is exported: InstanceNormalization between two reshapes, then Mul and
Add), or none; an activation; and a gate and a shift that are resampled by one index, or a residual. ``fusion`` writes
each as one operator. In a quantized graph, what lies between a QuantizeLinear and its DequantizeLinear is read in front
of the pair: the rounding would cost a pass over memory and buys nothing here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from edgesep.onnx_edit import nodes

MAX_TAPS = 7  # of the kernels


@dataclass
class Unit:
    """One unit; names are the graph's, ``out`` is the map that its last node makes."""

    x: str
    out: str
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    epsilon: float = 0.0
    slope: float = 1.0
    sigmoid: bool = False
    stride: int = 1
    gate: str = ""
    shift: str = ""
    index: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    deferred: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing follows the norm but an activation of one slope."""
        return self.gamma is not None and not (self.gate or self.shift or self.sigmoid)


class Graph:
    """What reads and makes what."""

    def __init__(self, graph: onnx.GraphProto):
        self.nodes = list(graph.node)
        self.outputs = {o.name for o in graph.output}
        self.constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        self.producer = {name: n for n in self.nodes for name in n.output}
        self.place = {n.output[0]: i for i, n in enumerate(self.nodes)}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        #: output of DequantizeLinear → the pair
        self.pairs: dict[str, tuple[NodeProto, NodeProto]] = {}
        for n in self.nodes:
            bodies = [a.g for a in n.attribute if a.HasField("g")]
            for name in (*n.input, *(name for body in bodies for inner in nodes(body) for name in inner.input)):
                self.readers[name].append(n)
            if n.op_type == "Constant":
                (value,) = n.attribute
                given = helper.get_attribute_value(value)
                self.constants[n.output[0]] = np.asarray(
                    numpy_helper.to_array(given) if value.name == "value" else given
                )
            before = self.producer.get(n.input[0]) if n.op_type == "DequantizeLinear" else None
            if before is not None and before.op_type == "QuantizeLinear":
                self.pairs[n.output[0]] = (before, n)

    def source(self, name: str) -> str:
        """The tensor before it was rounded, if it was."""
        return str(self.pairs[name][0].input[0]) if name in self.pairs else name

    def made_by(self, name: str, kind: str) -> NodeProto | None:
        """The node of that kind which makes a tensor, in front of its rounding."""
        node = self.producer.get(self.source(name))
        return node if node is not None and node.op_type == kind else None

    def pads_zeros(self, node: NodeProto) -> bool:
        """Whether a node puts zeros beside a tensor and does nothing else."""
        value = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        plain = node.op_type == "Pad" and flags(node).get("mode", b"constant") == b"constant"
        return plain and value is not None and not value.any()

    def float_readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a tensor, through Q/DQ pairs too."""
        found = []
        for node in self.readers[name]:
            behind = [n for n in self.readers[node.output[0]] if n.output[0] in self.pairs]
            if node.op_type == "QuantizeLinear" and behind:
                found += [reader for pair in behind for reader in self.float_readers(pair.output[0])]
            else:
                found.append(node)
        return found

    def only_reader(self, name: str) -> NodeProto | None:
        """The one node that reads a tensor, if it is one and nobody else wants the tensor."""
        found = self.float_readers(name)
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value, a dequantized one's too."""
        if name in self.constants:
            return self.constants[name]
        node = self.producer.get(name)
        if node is None or node.op_type != "DequantizeLinear" or any(i not in self.constants for i in node.input):
            return None
        value, scale, *zero = (self.constants[i] for i in node.input)
        along = [1] * value.ndim
        if scale.ndim:
            along[next((a.i for a in node.attribute if a.name == "axis"), 1)] = scale.size
        shift = zero[0].reshape(along if scale.ndim else ()).astype(np.float32) if zero else np.float32(0)
        return np.asarray((value.astype(np.float32) - shift) * scale.reshape(along if scale.ndim else ()), np.float32)

    def gathered(self, name: str) -> tuple[str, str] | None:
        """(source, index) of a Gather along frames that one node reads."""
        node = self.producer.get(self.source(name))
        if node is None or node.op_type != "Gather" or self.only_reader(node.output[0]) is None:
            return None
        axis = [a.i for a in node.attribute if a.name == "axis"]
        return (self.source(node.input[0]), node.input[1]) if axis == [-1] else None

    def windows(self, name: str) -> tuple[str, str, str] | None:
        """(source, index, weights) of the weighed windows of adaptive pooling whose sum is ``name``."""
        chain: list[NodeProto] = []
        for kind in ("ReduceSum", "Mul", "Reshape", "Gather"):
            node = self.producer.get(name)
            if node is None or node.op_type != kind or self.only_reader(name) is None:
                return None
            chain.append(node)
            name = node.input[0]
        axes = self.constants.get(chain[0].input[1]) if len(chain[0].input) > 1 else None
        if axes is None or axes.tolist() != [-1]:
            return None
        return self.source(chain[3].input[0]), chain[3].input[1], chain[1].input[1]

    def raised(self, node: NodeProto) -> tuple[str, str, str] | None:
        """(map, coarser map, index) of a sum of both, the coarser one resampled."""
        if node.op_type == "Add":
            for fine, taken in (tuple(node.input), tuple(node.input)[::-1]):
                if fine not in self.constants and (found := self.gathered(taken)):
                    return self.source(fine), *found
        return None

    def origin(self, name: str) -> str:
        """Where an index comes from, before it is flattened for one reader or another."""
        while (node := self.producer.get(name)) is not None and node.op_type == "Reshape":
            name = node.input[0]
        return name


def find(graph: Graph) -> dict[str, Unit]:
    """The units of a graph by what they make; those whose norm their readers can take over are marked ``deferred``."""
    found: dict[str, Unit] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        if node.output[0] in taken:
            continue
        unit = _depthwise(graph, node) or _norm_alone(graph, node)
        if unit is not None:
            _activation(graph, unit)
            _gated(graph, unit)
            taken |= {name for n in unit.nodes for name in n.output}
            found[unit.out] = unit
    for unit in found.values():
        reads_lazily = unit.weight is None and (unit.x in found or graph.raised(graph.producer[unit.x]) is not None)
        unit.deferred = unit.plain and not reads_lazily and all(_takes_over(graph, found, unit.out))
    return found


def lazily_raised(graph: Graph, found: dict[str, Unit], name: str) -> tuple[str, str, str] | None:
    """``Graph.raised`` of a map that only units read, which make it themselves then."""
    node = graph.producer.get(name)
    if node is None or name in found or name in graph.outputs or not (parts := graph.raised(node)):
        return None
    return parts if all(_begins(found, reader, name) for reader in graph.float_readers(name)) else None


def _takes_over(graph: Graph, found: dict[str, Unit], name: str) -> Iterator[bool]:
    """For each reader of a map, whether it can make the map's norm itself."""
    if name in graph.outputs:
        yield False
    for node in graph.float_readers(name):
        if node.op_type == "Gather":
            summed = graph.only_reader(node.output[0])
            for kind in ("Mul", "ReduceSum"):
                summed = graph.only_reader(summed.output[0]) if summed is not None else None
                if summed is None or summed.op_type != kind:
                    break
            yield summed is not None and graph.windows(summed.output[0]) is not None
        elif node.op_type == "Add":
            parts = lazily_raised(graph, found, node.output[0])
            yield parts is not None and parts[0] == name
        else:
            yield _begins(found, node, name)


def _begins(found: dict[str, Unit], node: NodeProto, name: str) -> bool:
    """Whether a node is where a unit reads its map."""
    return any(unit.x == name and node in unit.nodes[:3] for unit in found.values())


def _depthwise(graph: Graph, node: NodeProto) -> Unit | None:
    if node.op_type != "Conv" or (weight := graph.value(node.input[1])) is None:
        return None
    given, channels, taps = flags(node), weight.shape[0], weight.shape[-1]
    same = given["pads"] == [0, taps // 2, 0, taps // 2] and given.get("dilations", [1, 1]) == [1, 1]
    if given["group"] != channels or weight.shape[1:3] != (1, 1) or not taps % 2 or taps > MAX_TAPS or not same:
        return None
    bias = graph.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    unit = Unit(graph.source(node.input[0]), node.output[0], weight[:, 0, 0].T, bias, nodes=[node])
    unit.stride = given["strides"][-1]
    _norm(graph, unit)
    return unit


def _norm_alone(graph: Graph, node: NodeProto) -> Unit | None:
    """A norm behind something else than a depthwise convolution."""
    if node.op_type != "Reshape":
        return None
    unit = Unit(graph.source(node.input[0]), graph.source(node.input[0]))
    return unit if _norm(graph, unit) and unit.nodes[0] is node else None


def _norm(graph: Graph, unit: Unit) -> bool:
    """Take in the gLN behind the unit, if there is one."""
    readers = sorted(graph.float_readers(unit.out), key=lambda n: n.op_type)
    if unit.out in graph.outputs or [n.op_type for n in readers] != ["Reshape", "Shape"]:
        return False
    flat, shape = readers
    chain = [flat]
    for kind in ("InstanceNormalization", "Reshape", "Mul", "Add"):
        following = graph.only_reader(chain[-1].output[0])
        if following is None or following.op_type != kind:
            return False
        chain.append(following)
    _, norm, back, scaled, shifted = chain
    ones, zeros, gamma, beta = (graph.constants.get(n) for n in (*norm.input[1:], scaled.input[1], shifted.input[1]))
    if ones is None or zeros is None or gamma is None or beta is None or back.input[1] != shape.output[0]:
        return False
    if ones.tolist() != [1] or zeros.tolist() != [0]:
        return False
    unit.gamma, unit.beta = gamma.ravel(), beta.ravel()
    (unit.epsilon,) = (a.f for a in norm.attribute if a.name == "epsilon")
    unit.nodes += [flat, shape, *chain[1:]]
    unit.out = shifted.output[0]
    return True


def _activation(graph: Graph, unit: Unit) -> None:
    node = graph.only_reader(unit.out)
    if node is None or node.op_type not in ("Sigmoid", "Relu", "LeakyRelu"):
        return
    if node.op_type == "Sigmoid":
        unit.sigmoid = True
    else:
        unit.slope = next((a.f for a in node.attribute if a.name == "alpha"), 0.0)
    unit.nodes.append(node)
    unit.out = node.output[0]


def _gated(graph: Graph, unit: Unit) -> None:
    """A gate and a shift that are resampled by the same index, or a residual."""
    node = graph.only_reader(unit.out)
    if node is None or unit.stride > 1:
        return
    if node.op_type == "Mul" and (gate := graph.gathered(_other(graph, node, unit.out))):
        add = graph.only_reader(node.output[0])
        shift = graph.gathered(_other(graph, add, node.output[0])) if add is not None and add.op_type == "Add" else None
        if add is not None and shift and graph.origin(shift[1]) == graph.origin(gate[1]):
            (unit.gate, unit.index), unit.shift = gate, shift[0]
            unit.nodes += [node, add]
            unit.out = add.output[0]
    elif node.op_type == "Add" and not graph.raised(node):
        other = _other(graph, node, unit.out)
        # A residual is a map that was there before the unit began, of the same shape.
        if (
            other not in graph.constants
            and graph.place.get(other, len(graph.nodes)) < graph.place[unit.nodes[0].output[0]]
        ):
            unit.shift = other
            unit.nodes.append(node)
            unit.out = node.output[0]


def _other(graph: Graph, node: NodeProto, name: str) -> str:
    """What a node of two inputs reads beside ``name``."""
    first, second = (graph.source(i) for i in node.input)
    return second if first == name else first


def flags(node: NodeProto) -> dict[str, Any]:
    """A node's attributes."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
