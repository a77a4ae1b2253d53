"""Fused form of a graph of flat maps: whole units as one native operator each, on rows of channels.

Shapes: an exported map is ``(B, C, 1, L)``; here it becomes rows ``(B, 1, L, C)``, B batch, C channels, L frames.

Runtimes spend most of a U-Conv separator's time between its products: a depthwise convolution, a norm over channels and
frames, its affine, an activation, a gate from a coarser rate, each a pass over memory, and transpositions around them.
In rows every one of these is a loop over neighbouring floats, a pointwise convolution is a plain matrix product, and a
layer norm over channels needs no transposition. So:

* pointwise Conv → MatMul (INT8 stays INT8: the Q/DQ pairs move along, weights are transposed as they are);
* units (``units``) → ``ConvNorm``. Where all readers of a norm's output are such units too, the norm is left to them:
  the map is written once, as the convolution made it, and read with its statistics (``deferred``, ``GlobalStats``);
* gathered and weighed windows of adaptive pooling → ``PooledSum``;
* what computes element by element stays in rows; all else gets maps, by a transposition where they are needed.

Depthwise kernels of a quantized graph keep their rounded weights and lose the rounding of their activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.onnx_edit import Constants, rewrite
from edgesep.units import Graph, Unit, find, flags, lazily_raised

DOMAIN = "edgesep"
TO_ROWS, TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]
ELEMENTWISE = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Sqrt", "Erf", "Gelu", "Neg", "Add", "Mul", "Sub", "Div")


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    rewrite(made, _Fusing(made.graph).run())
    return made


class _Fusing:
    """One graph, written anew: ``rows`` and ``maps`` say in which layouts a tensor is there already."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = Graph(graph)
        self.units = find(self.graph)
        self.absorbed = {n.output[0] for unit in self.units.values() for n in unit.nodes}
        self.rows: dict[str, str] = {}
        self.maps: set[str] = {i.name for i in graph.input} | set(self.graph.constants)
        #: deferred map → what its readers need: rows, statistics, bias
        self.raw: dict[str, tuple[str, str, str]] = {}
        self.made: list[NodeProto] = []
        self.constants = Constants(graph, "fused")

    def run(self) -> list[NodeProto]:
        """The new nodes, with chains that then became part of an operator."""
        for node in self.graph.nodes:
            self._emit(node)
        for name in self.graph.outputs:
            self._map(name)
        return self.made

    def _emit(self, node: NodeProto) -> None:
        out, pairs = node.output[0], self.graph.pairs
        if out in self.units:
            self._unit(self.units[out])
        elif out in self.absorbed or out in pairs:
            return
        elif node.op_type == "QuantizeLinear" and all(n.output[0] in pairs for n in self.graph.readers[out]):
            return  # written with its DequantizeLinear, in the layout that is asked for
        elif lazily_raised(self.graph, self.units, out):
            return
        elif not any(
            rule(node) for rule in (self._product, self._pooled, self._raised, self._elementwise, self._moved)
        ):
            for name in node.input:
                if name:
                    self._map(name)
            self.made.append(node)
            self.maps.update(node.output)

    # -- tensors in either layout --------------------------------------------------------------------------------------

    def _row(self, name: str) -> str:
        """The tensor as rows, before it was rounded."""
        name = self.graph.source(name)
        if name not in self.rows:
            self.rows[name] = self._node("Transpose", [self._map(name)], f"{name}_rows", perm=TO_ROWS)
        return self.rows[name]

    def _has_rows(self, name: str) -> bool:
        return self.graph.source(name) in self.rows

    def _map(self, name: str) -> str:
        """The tensor as the graph had it."""
        if name not in self.maps:
            self.maps.add(name)
            if pair := self.graph.pairs.get(name):
                self._pair(pair, self._map(pair[0].input[0]), "")
            elif name in self.rows:
                self._node("Transpose", [self.rows[name]], name, perm=TO_MAPS)
        return name

    def _rounded_row(self, name: str) -> str:
        """The tensor as rows, rounded if it is, for a product in INT8."""
        pair = self.graph.pairs.get(name)
        if pair is None:
            return self._row(name)
        if name not in self.rows:
            self.rows[name] = self._pair(pair, self._row(name), "_rows")
        return self.rows[name]

    def _pair(self, pair: tuple[NodeProto, NodeProto], source: str, suffix: str) -> str:
        for node in pair:
            made = NodeProto()
            made.CopyFrom(node)
            made.name += suffix
            made.input[0], made.output[0] = source, f"{node.output[0]}{suffix}"
            source = made.output[0]
            if source not in self.maps or not suffix:
                self.maps.add(source)
                self.made.append(made)
        return source

    def _node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        domain = DOMAIN if kind in ("ConvNorm", "GlobalStats", "PooledSum") else ""
        while not inputs[-1]:
            inputs.pop()
        name = f"{outputs[0]}/{kind}"
        self.made.append(helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def _constant(self, value: np.ndarray | None) -> str:
        """The name of a constant; empty for none."""
        return "" if value is None else self.constants.name(value)

    # -- operators -----------------------------------------------------------------------------------------------------

    def _unit(self, unit: Unit) -> None:
        if unit.deferred and unit.weight is None:
            x, bias = self._row(unit.x), self._constant(unit.bias)
            stats = self._node("GlobalStats", [x, bias], f"{unit.out}_stats", epsilon=unit.epsilon)
            self.raw[unit.out] = x, stats, bias
            return
        read, attributes = self._read(unit.x)
        vectors = (unit.bias, *((None, None) if unit.deferred else (unit.gamma, unit.beta)))
        inputs = [read[0], *(self._constant(v) for v in (unit.weight, *vectors))]
        inputs += [self._row(name) if name else "" for name in (unit.gate, unit.shift)]
        inputs += [self._map(unit.index) if unit.index else "", *read[1:]]
        if unit.stride > 1:
            attributes["stride"] = unit.stride
        if unit.gamma is not None:
            attributes["epsilon"] = unit.epsilon
        if unit.deferred:
            names = f"{unit.out}_raw", f"{unit.out}_stats"
            self._node("ConvNorm", inputs, *names, deferred=1, **attributes)
            self.raw[unit.out] = (*names, "")
            return
        if unit.slope != 1:
            attributes["slope"] = unit.slope
        if unit.sigmoid:
            attributes["sigmoid"] = 1
        self.rows[unit.out] = self._node("ConvNorm", inputs, f"{unit.out}_rows", **attributes)

    def _read(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """How a map is read: rows, statistics, bias, gamma, beta, shift, index; attributes."""
        shift = index = ""
        if parts := lazily_raised(self.graph, self.units, name):
            name, shift, index = parts[0], self._row(parts[1]), self._map(parts[2])
        if name not in self.raw:
            return [self._row(name), "", "", "", "", shift, index], {}
        unit, (x, stats, bias) = self.units[name], self.raw[name]
        attributes = {"x_slope": unit.slope} if unit.slope != 1 else {}
        return [x, stats, bias, self._constant(unit.gamma), self._constant(unit.beta), shift, index], attributes

    def _product(self, node: NodeProto) -> bool:
        """A 1x1 Conv as MatMul; its bias goes into the norm behind it, or is added together with a residual."""
        weight = self.graph.value(node.input[1]) if node.op_type == "Conv" else None
        if (
            weight is None
            or weight.shape[2:] != (1, 1)
            or flags(node)["strides"] != [1, 1]
            or flags(node)["group"] != 1
        ):
            return False
        out, graph = node.output[0], self.graph
        made = self._node("MatMul", [self._rounded_row(node.input[0]), self._factor(node.input[1])], f"{out}_product")
        bias = graph.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        self.rows[out] = made
        if bias is None:
            return True
        readers = graph.float_readers(out)
        unit = next((u for u in self.units.values() if u.x == out and len(readers) == 2), None)
        reader = graph.only_reader(out)
        if unit is not None and unit.weight is None and unit.gamma is not None:
            unit.bias = bias
            return True
        if reader is not None and reader.op_type == "Add" and reader.output[0] not in self.absorbed:
            first, second = (graph.source(i) for i in reader.input)
            residual = second if first == out else first
            if residual in self.rows and residual != out:
                inputs = [made, "", self._constant(bias), "", "", "", self.rows[residual]]
                self.rows[reader.output[0]] = self._node("ConvNorm", inputs, f"{out}_sum")
                self.absorbed.add(reader.output[0])
                return True
        self.rows[out] = self._node("Add", [made, self._constant(bias)], f"{out}_rows")
        return True

    def _factor(self, name: str) -> str:
        """The weight of a pointwise convolution as the second factor: ``(inputs, outputs)``, in INT8 if it is."""
        constants = self.graph.constants
        if name in constants:
            return self._constant(constants[name][:, :, 0, 0].T)
        turned = f"{name}_turned"
        if turned not in self.maps:
            self.maps.add(turned)
            value, *others = (constants[i] for i in self.graph.producer[name].input)
            inputs = [self._constant(value[:, :, 0, 0].T), *(self._constant(o) for o in others)]
            self._node("DequantizeLinear", inputs, turned, axis=1)
        return turned

    def _pooled(self, node: NodeProto) -> bool:
        """total + sum over the span of (gathered windows x weights)."""
        if node.op_type != "Add":
            return False
        for total, summed in (tuple(node.input), tuple(node.input)[::-1]):
            found = self.graph.windows(summed)
            if found and self._has_rows(total):
                x, index, weight = found
                read, attributes = self._read(x)
                inputs = [self._row(total), read[0], self._map(index), self._map(weight), *read[1:5]]
                self.rows[node.output[0]] = self._node("PooledSum", inputs, f"{node.output[0]}_rows", **attributes)
                return True
        return False

    def _raised(self, node: NodeProto) -> bool:
        """A map and a coarser one, resampled to it."""
        parts = self.graph.raised(node)
        if parts is None or not all(name in self.rows or name in self.raw for name in parts[:2]):
            return False
        read, attributes = self._read(parts[0])
        inputs = [read[0], "", "", "", "", "", self._row(parts[1]), self._map(parts[2]), *read[1:]]
        self.rows[node.output[0]] = self._node("ConvNorm", inputs, f"{node.output[0]}_rows", **attributes)
        return True

    def _elementwise(self, node: NodeProto) -> bool:
        """Element by element: in rows if its maps are there in rows."""
        if node.op_type not in ELEMENTWISE or not any(map(self._has_rows, node.input)):
            return False
        inputs = []
        for name in node.input:
            value = self.graph.constants.get(name)
            if value is None:
                if not self._has_rows(name):
                    return False
                inputs.append(self._row(name))
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
        if node.op_type == "Gather" and axis == [-1] and self._has_rows(source):
            inputs = [self._row(source), self._map(node.input[1])]
            self.rows[out] = self._node("Gather", inputs, f"{out}_rows", axis=2)
        elif node.op_type == "Transpose" and order == [TO_ROWS] and self._has_rows(source):
            self._node("Identity", [self._row(source)], out)
            self.maps.add(out)
        elif node.op_type == "Transpose" and order == [TO_MAPS]:
            self.rows[out] = self._map(source)
        else:
            return False
        return True
