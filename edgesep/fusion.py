"""Fused form of a graph of flat maps: whole units as one native operator each, on rows of channels.

Shapes: an exported map is ``(B, C, 1, L)``; here it becomes rows ``(B, 1, L, C)``, B batch, C channels, L frames.

Runtimes spend most of a U-Conv separator's time between its products: a depthwise convolution, a norm over channels and
frames, its affine, an activation, a gate from a coarser rate, each a pass over memory, and transpositions around them.
In rows every one of these is a loop over neighbouring floats, a pointwise convolution is a plain matrix product, and a
layer norm over channels needs no transposition. So:

* pointwise Conv → MatMul (INT8 stays INT8: the Q/DQ pairs move along, weights are transposed as they are);
* depthwise Conv, InstanceNormalization with its reshapes, affine, activation, gate, shift, residual → ``ConvNorm``;
* gathered and weighed windows of adaptive pooling → ``PooledSum``;
* what computes element by element stays in rows; all else gets maps, by a transposition where they are needed.

Depthwise kernels of a quantized graph keep their rounded weights and lose the rounding of their activations: they are
bound by memory, which the fused unit saves more of than INT8 would.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

DOMAIN = "edgesep"
TO_ROWS, TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]
UNARY = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Sqrt", "Erf", "Gelu", "Neg")
BINARY = ("Add", "Mul", "Sub", "Div")


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _Fusing(made).run()
    return made


@dataclass
class _Unit:
    """A ``ConvNorm`` in the making: names of the graph given, ``out`` the map that it stands for so far."""

    x: str
    out: str
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    gate: str = ""
    shift: str = ""
    index: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)


class _Fusing:
    """One graph: ``rows`` and ``maps`` say in which layouts a tensor is there already."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.graph = model, model.graph
        self.constants = {c.name: numpy_helper.to_array(c) for c in self.graph.initializer}
        self.producer = {name: n for n in self.graph.node for name in n.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for n in self.graph.node:
            for name in n.input:
                self.readers[name].append(n)
            if n.op_type == "Constant":
                (value,) = n.attribute
                given = helper.get_attribute_value(value)
                self.constants[n.output[0]] = np.asarray(
                    numpy_helper.to_array(given) if value.name == "value" else given
                )
        self.outputs = {o.name for o in self.graph.output}
        self.rows: dict[str, str] = {}
        self.maps: set[str] = {i.name for i in self.graph.input} | set(self.constants)
        self.units: dict[str, _Unit] = {}  # by the output of their last node
        self.absorbed: set[str] = set()  # first outputs of nodes that became part of a unit
        self.pairs: dict[str, tuple[NodeProto, NodeProto]] = {}  # output of DequantizeLinear → the pair
        self.made: list[NodeProto] = []
        self.added: dict[bytes, str] = {}

    def run(self) -> None:
        for node in self.graph.node:
            self._find(node)
        for node in self.graph.node:
            self._emit(node)
        for name in self.outputs:
            self._map(name)
        used = set(self.outputs)
        live = []  # what was written for a chain that then became part of a unit is not
        for node in reversed(self.made):
            if used.intersection(node.output):
                used.update(node.input)
                live.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(live))
        kept = [c for c in self.graph.initializer if c.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        if all(o.domain != DOMAIN for o in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))

    # -- reading the graph ---------------------------------------------------------------------------------------------

    def _only_reader(self, name: str) -> NodeProto | None:
        """The one node that reads a tensor, if it is one and nobody else wants the tensor."""
        found = self.readers[name]
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def _dequantized(self, name: str) -> tuple[NodeProto, NodeProto] | None:
        """The QuantizeLinear and DequantizeLinear that make a tensor."""
        back = self.producer.get(name)
        if back is None or back.op_type != "DequantizeLinear":
            return None
        there = self.producer.get(back.input[0])
        return (there, back) if there is not None and there.op_type == "QuantizeLinear" else None

    def _value(self, name: str) -> np.ndarray | None:
        """A constant's value, a dequantized one's too."""
        if name in self.constants:
            return self.constants[name]
        node = self.producer.get(name)
        if node is None or node.op_type != "DequantizeLinear" or any(i not in self.constants for i in node.input):
            return None
        value, scale, *zero = (self.constants[i] for i in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        along = [1] * value.ndim
        if scale.ndim:
            along[axis] = scale.size
        shifted = value.astype(np.float32) - (
            zero[0].reshape(along if scale.ndim else ()).astype(np.float32) if zero else 0
        )
        return (shifted * scale.reshape(along if scale.ndim else ())).astype(np.float32)

    def _past_pair(self, name: str, unit_nodes: list[NodeProto]) -> str:
        """The tensor behind a Q/DQ pair that is all there is behind ``name``; float again is as good."""
        there = self._only_reader(name)
        if there is None or there.op_type != "QuantizeLinear":
            return name
        back = self._only_reader(there.output[0])
        if back is None or back.op_type != "DequantizeLinear":
            return name
        unit_nodes += [there, back]
        return str(back.output[0])

    # -- finding units -------------------------------------------------------------------------------------------------

    def _find(self, node: NodeProto) -> None:
        if node.output[0] in self.absorbed:
            return
        if node.op_type == "DequantizeLinear" and (pair := self._dequantized(node.output[0])):
            self.pairs[node.output[0]] = pair
            return
        unit = self._depthwise(node) or self._norm_alone(node)
        if unit is None:
            return
        self._activation(unit)
        self._gated(unit)
        self.absorbed |= {name for n in unit.nodes for name in n.output[:1]}
        self.units[unit.out] = unit

    def _depthwise(self, node: NodeProto) -> _Unit | None:
        if node.op_type != "Conv" or (weight := self._value(node.input[1])) is None:
            return None
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        channels, taps, stride = weight.shape[0], weight.shape[-1], flags["strides"][-1]
        same = flags["pads"] == [0, taps // 2, 0, taps // 2] and flags.get("dilations", [1, 1]) == [1, 1]
        if flags["group"] != channels or weight.shape[1:3] != (1, 1) or not taps % 2 or taps > 7 or not same:
            return None
        # What it reads is float again: the rounding would cost a pass over memory and buys nothing here.
        pair = self._dequantized(node.input[0])
        x = pair[0].input[0] if pair else node.input[0]
        bias = self.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        nodes = [node]
        out = self._past_pair(node.output[0], nodes)
        unit = _Unit(x, out, weight[:, 0, 0].T, bias, nodes=nodes)
        if stride > 1:
            unit.attributes["stride"] = stride
        if normed := self._norm(out):
            unit.gamma, unit.beta, unit.attributes["epsilon"], more, unit.out = normed
            unit.nodes += more
        return unit

    def _norm_alone(self, node: NodeProto) -> _Unit | None:
        """A norm behind something else; the bias of a pointwise convolution before it is taken in with it."""
        if node.op_type != "Reshape" or not (normed := self._norm(node.input[0])):
            return None
        gamma, beta, epsilon, nodes, out = normed
        if nodes[0] is not node:
            return None
        return _Unit(node.input[0], out, gamma=gamma, beta=beta, attributes={"epsilon": epsilon}, nodes=nodes)

    def _norm(self, name: str) -> tuple[np.ndarray, np.ndarray, float, list[NodeProto], str] | None:
        """gLN as it is exported, behind ``name``: two reshapes, InstanceNormalization, the affine."""
        if name in self.outputs or {n.op_type for n in self.readers[name]} != {"Reshape", "Shape"}:
            return None
        if len(self.readers[name]) != 2:
            return None
        flat, shape = sorted(self.readers[name], key=lambda n: n.op_type)
        norm = self._only_reader(flat.output[0])
        if norm is None or norm.op_type != "InstanceNormalization":
            return None
        ones, zeros = (self.constants.get(i) for i in norm.input[1:])
        if ones is None or zeros is None or ones.shape != (1,) or ones[0] != 1 or zeros[0] != 0:
            return None
        back = self._only_reader(norm.output[0])
        scaled = self._only_reader(back.output[0]) if back else None
        shifted = self._only_reader(scaled.output[0]) if scaled else None
        if back is None or scaled is None or shifted is None or back.input[1] != shape.output[0]:
            return None
        if (back.op_type, scaled.op_type, shifted.op_type) != ("Reshape", "Mul", "Add"):
            return None
        gamma, beta = (self.constants.get(n.input[1]) for n in (scaled, shifted))
        if gamma is None or beta is None:
            return None
        (epsilon,) = (a.f for a in norm.attribute if a.name == "epsilon")
        nodes = [flat, norm, shape, back, scaled, shifted]
        return gamma.ravel(), beta.ravel(), epsilon, nodes, str(shifted.output[0])

    def _activation(self, unit: _Unit) -> None:
        node = self._only_reader(unit.out)
        if node is None:
            return
        if node.op_type == "Sigmoid":
            unit.attributes["sigmoid"] = 1
        elif node.op_type in ("Relu", "LeakyRelu"):
            unit.attributes["slope"] = next((a.f for a in node.attribute if a.name == "alpha"), 0.0)
        else:
            return
        unit.nodes.append(node)
        unit.out = node.output[0]

    def _gated(self, unit: _Unit) -> None:
        """A gate and a shift that are resampled by the same index, or a residual."""
        node = self._only_reader(unit.out)
        if node is not None and node.op_type == "Mul" and (gate := self._gathered(_other(node, unit.out))):
            add = self._only_reader(node.output[0])
            shift = self._gathered(_other(add, node.output[0])) if add is not None and add.op_type == "Add" else None
            if add is not None and shift and self._root(shift[1]) == self._root(gate[1]):
                (unit.gate, unit.index), unit.shift = gate, shift[0]
                unit.nodes += [node, add]
                unit.out = add.output[0]
        elif node is not None and node.op_type == "Add" and "stride" not in unit.attributes:
            other = _other(node, unit.out)
            # A residual is a map that was there before the unit began, of the same shape.
            if other != unit.out and other not in self.constants and other in self._before(unit):
                unit.shift = other
                unit.nodes.append(node)
                unit.out = node.output[0]

    def _before(self, unit: _Unit) -> set[str]:
        """Maps made before the unit's first node: those that the walk has seen."""
        first = unit.nodes[0].output[0]
        seen: set[str] = set()
        for n in self.graph.node:
            if n.output[0] == first:
                break
            seen.update(n.output)
        return seen

    def _gathered(self, name: str) -> tuple[str, str] | None:
        """(source, index) of a Gather along frames that one node reads."""
        node = self.producer.get(name)
        if node is None or node.op_type != "Gather" or self._only_reader(name) is None:
            return None
        return (node.input[0], node.input[1]) if [a.i for a in node.attribute if a.name == "axis"] == [-1] else None

    def _root(self, name: str) -> str:
        """Where an index comes from, before it is flattened for one reader or another."""
        while (node := self.producer.get(name)) is not None and node.op_type == "Reshape":
            name = node.input[0]
        return name

    # -- writing the fused graph ---------------------------------------------------------------------------------------

    def _emit(self, node: NodeProto) -> None:
        out = node.output[0]
        if out in self.units:
            self._emit_unit(self.units[out])
        elif out in self.absorbed or out in self.pairs or self._feeds_pair_alone(node):
            return
        elif not (
            self._pointwise(node)
            or self._pooled(node)
            or self._raised(node)
            or self._elementwise(node)
            or self._moved(node)
        ):
            for name in node.input:
                if name:
                    self._map(name)
            self.made.append(node)
            self.maps.update(node.output)

    def _feeds_pair_alone(self, node: NodeProto) -> bool:
        """QuantizeLinear nodes are written with their DequantizeLinear, in the layout that is asked for."""
        return node.op_type == "QuantizeLinear" and all(
            n.op_type == "DequantizeLinear" and n.output[0] in self.pairs for n in self.readers[node.output[0]]
        )

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        domain = DOMAIN if kind in ("ConvNorm", "PooledSum") else ""
        while inputs and not inputs[-1]:
            inputs.pop()
        self.made.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", domain=domain, **attributes))
        return output

    def _constant(self, value: np.ndarray) -> str:
        """The name of a constant, one for equal values (iterations share their weights)."""
        key = value.tobytes() + str((value.shape, value.dtype)).encode()
        if key not in self.added:
            self.added[key] = f"fused_{len(self.added)}"
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), self.added[key]))
        return self.added[key]

    def _row(self, name: str) -> str:
        """The tensor as rows."""
        if name not in self.rows:
            if pair := self.pairs.get(name):
                self.rows[name] = self._pair(pair, self._row(pair[0].input[0]), "_rows")
            else:
                self.rows[name] = self._node("Transpose", [name], f"{name}_rows", perm=TO_ROWS)
        return self.rows[name]

    def _map(self, name: str) -> str:
        """The tensor as the graph had it."""
        if name not in self.maps:
            self.maps.add(name)
            if pair := self.pairs.get(name):
                self._pair(pair, self._map(pair[0].input[0]), "")
            elif name in self.rows:
                self._node("Transpose", [self.rows[name]], name, perm=TO_MAPS)
        return name

    def _pair(self, pair: tuple[NodeProto, NodeProto], source: str, suffix: str) -> str:
        for node in pair:
            made = NodeProto()
            made.CopyFrom(node)
            made.input[0], made.output[0] = source, f"{node.output[0]}{suffix}"
            made.name = f"{node.name}{suffix}"
            if not any(made.output[0] in n.output for n in self.made[-64:]):
                self.made.append(made)
            source = made.output[0]
        return source

    def _emit_unit(self, unit: _Unit) -> None:
        inputs = [self._row(unit.x)]
        values = (unit.weight, unit.bias, unit.gamma, unit.beta)
        inputs += ["" if v is None else self._constant(v.astype(np.float32)) for v in values]
        inputs += [self._row(name) if name else "" for name in (unit.gate, unit.shift)]
        inputs.append(self._map(unit.index) if unit.index else "")
        self.rows[unit.out] = self._node("ConvNorm", inputs, f"{unit.out}_rows", **unit.attributes)

    def _pointwise(self, node: NodeProto) -> bool:
        """A 1x1 Conv as MatMul; its bias and a residual are added in one pass."""
        if node.op_type != "Conv":
            return False
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = self._value(node.input[1])
        if weight is None or weight.shape[2:] != (1, 1) or flags["group"] != 1 or flags["strides"] != [1, 1]:
            return False
        out = node.output[0]
        nodes: list[NodeProto] = []
        behind = self._past_pair(out, nodes)
        made = self._node("MatMul", [self._row(node.input[0]), self._product(node.input[1])], f"{out}_product")
        bias = self.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        reader = self._only_reader(behind)
        unit = next((u for u in self.units.values() if u.x == behind), None) if len(self.readers[behind]) == 2 else None
        if bias is not None and unit is not None and unit.weight is None and unit.gamma is not None:
            unit.bias = bias
        elif bias is not None and reader is not None and reader.op_type == "Add" and behind not in self.units:
            residual = _other(reader, behind)
            if residual in self.rows and residual != behind:
                made = self._node(
                    "ConvNorm", [made, "", self._constant(bias), "", "", "", self.rows[residual]], f"{behind}_sum"
                )
                self.absorbed.add(reader.output[0])
                self.rows[reader.output[0]] = made
            else:
                made = self._node("Add", [made, self._constant(bias)], f"{out}_rows")
        elif bias is not None:
            made = self._node("Add", [made, self._constant(bias)], f"{out}_rows")
        self.absorbed |= {n.output[0] for n in nodes}
        for n in nodes:
            self.pairs.pop(n.output[0], None)
        self.rows[behind] = made
        return True

    def _product(self, name: str) -> str:
        """The weight of a pointwise convolution as the second factor: ``(inputs, outputs)``, in INT8 if it is."""
        if name in self.constants:
            return self._constant(self.constants[name][:, :, 0, 0].T)
        node = self.producer[name]
        value, *others = (self.constants[i] for i in node.input)
        turned = f"{name}_turned"
        if turned not in self.maps:
            self.maps.add(turned)
            inputs = [self._constant(value[:, :, 0, 0].T), *(self._constant(o) for o in others)]
            self._node("DequantizeLinear", inputs, turned, axis=1)
        return turned

    def _pooled(self, node: NodeProto) -> bool:
        """total + sum over the span of (gathered windows x weights)."""
        if node.op_type != "Add":
            return False
        for total, summed in (tuple(node.input), tuple(node.input)[::-1]):
            found = self._windows(summed)
            if found and total in self.rows:
                x, index, weight = found
                inputs = [self.rows[total], self._row(x), self._map(index), self._map(weight)]
                self.rows[node.output[0]] = self._node("PooledSum", inputs, f"{node.output[0]}_rows")
                return True
        return False

    def _windows(self, name: str) -> tuple[str, str, str] | None:
        chain = []
        for kind in ("ReduceSum", "Mul", "Reshape", "Gather"):
            node = self.producer.get(name)
            if node is None or node.op_type != kind or self._only_reader(name) is None:
                return None
            chain.append(node)
            name = node.input[0]
        axes = self.constants.get(chain[0].input[1]) if len(chain[0].input) > 1 else None
        if axes is None or axes.tolist() != [-1]:
            return None
        return chain[3].input[0], chain[3].input[1], chain[1].input[1]

    def _raised(self, node: NodeProto) -> bool:
        """A map and another one, resampled to it."""
        if node.op_type != "Add":
            return False
        for fine, taken in (tuple(node.input), tuple(node.input)[::-1]):
            found = self._gathered(taken)
            if found and fine in self.rows and found[0] in self.rows:
                inputs = [self.rows[fine], "", "", "", "", "", self.rows[found[0]], self._map(found[1])]
                self.rows[node.output[0]] = self._node("ConvNorm", inputs, f"{node.output[0]}_rows")
                return True
        return False

    def _elementwise(self, node: NodeProto) -> bool:
        """Element by element: in rows if its maps are there in rows."""
        inputs = []
        if node.op_type not in (*UNARY, *BINARY) or not any(name in self.rows for name in node.input):
            return False
        for name in node.input:
            value = self.constants.get(name)
            if value is None:
                if name not in self.rows:
                    return False
                inputs.append(self.rows[name])
            elif value.ndim == 4 and value.shape[0] == value.shape[2] == value.shape[3] == 1:
                inputs.append(self._constant(value.reshape(1, 1, 1, -1)))
            elif value.size == 1:
                inputs.append(name)
            else:
                return False
        made = NodeProto()
        made.CopyFrom(node)
        made.input[:], made.output[0] = inputs, f"{node.output[0]}_rows"
        self.made.append(made)
        self.rows[node.output[0]] = made.output[0]
        return True

    def _moved(self, node: NodeProto) -> bool:
        """Gather of frames, and transpositions between the two layouts, which need none here."""
        out, source = node.output[0], node.input[0] if node.input else ""
        axis = [a.i for a in node.attribute if a.name == "axis"]
        order = [list(a.ints) for a in node.attribute if a.name == "perm"]
        if node.op_type == "Gather" and axis == [-1] and source in self.rows:
            made = self._node("Gather", [self.rows[source], self._map(node.input[1])], f"{out}_rows", axis=2)
            self.rows[out] = made
        elif node.op_type == "Transpose" and order == [TO_ROWS] and source in self.rows:
            self._node("Identity", [self.rows[source]], out)
            self.maps.add(out)
        elif node.op_type == "Transpose" and order == [TO_MAPS]:
            self.rows[out] = self._map(source)
        else:
            return False
        return True


def _other(node: NodeProto | None, name: str) -> str:
    """The other input of a node of two."""
    if node is None:
        return ""
    return str(node.input[1] if node.input[0] == name else node.input[0])
