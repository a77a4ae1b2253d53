"""A few rows at a time: what a graph does to each row of a large batch alone becomes the body of one ONNX Scan.

Shapes: rows ``(R, n, C)``: the frames, or the bins, of a map; each is a sequence of its own.

A Mamba block widens each of a few hundred sequences eightfold and brings it back. All at once, every operator reads and
writes a hundred megabytes and waits for memory; a few sequences after others stay in the caches, and the block needs
the memory of those few. The sums are the same, in the same order. (Blocks over windows of 4 or 8 that overlap are one
operator, ``edgesep.mamba_fusion``; this is for the others.) Narrow blocks gain nothing: their sequences fit as
they are, and every operator costs some microseconds each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from edgesep import units
from edgesep.onnx_edit import replace_nodes

AROUND = "SelectiveScan"
TOGETHER = 4  # rows: threads meet at the end of every operator, and a single one is soon done
LEAST_WEIGHTS = 200_000  # of a region: some 0.1 ms a row
UNARY = ("Sqrt", "Reciprocal", "Sigmoid", "Relu", "LeakyRelu", "Tanh", "Exp", "Neg", "Erf", "Softplus")
BINARY = ("Add", "Mul", "Sub", "Div", "Pow")


def a_few_at_a_time(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the row-wise nodes around scans stand in bodies; the function it computes is the same."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = _Graph(made.graph)
    regions = [r for r in graph.regions() if graph.pays(r)]
    scans = {r[-1].output[0]: graph.scan(r, number) for number, r in enumerate(regions)}
    moved = {n.output[0] for r in regions for n in r}
    if regions:
        kept = (scans.get(n.output[0], [] if n.output[0] in moved else [n]) for n in made.graph.node)
        replace_nodes(made.graph, [n for some in kept for n in some])
        sizes = {"zero": [0], "together": [TOGETHER], "apart": [-1, TOGETHER], "joined": [-1]}
        made.graph.initializer.extend(numpy_helper.from_array(np.array(v), f"rows_{k}") for k, v in sizes.items())
    return made


class _Graph(units.Graph):
    """A graph, and which of its nodes act on each row alone."""

    def __init__(self, graph: onnx.GraphProto):
        super().__init__(graph)
        #: made of constants alone: the rounded weights of a quantized graph
        self.fixed = {o for n in self.nodes if all(i in self.constants for i in n.input) for o in n.output}

    def regions(self) -> Iterator[list[NodeProto]]:
        """Row-wise nodes that hang together, each region in the graph's order."""
        own = {n.output[0]: n for n in self.nodes if self._row_wise(n)}
        seen: set[str] = set()
        for start in own:
            if start in seen:
                continue
            found, open_ = {start}, [start]
            while open_:
                node = own[open_.pop()]
                beside = [self.producer[i].output[0] for i in node.input if i in self.producer]
                beside += [reader.output[0] for o in node.output for reader in self.readers[o]]
                new = {name for name in beside if name in own} - found
                found |= new
                open_ += new
            seen |= found
            yield [n for n in self.nodes if n.output[0] in found]

    def pays(self, region: list[NodeProto]) -> bool:
        """Whether it is a wide block of scans, from one tensor to one."""
        read = {i for n in region for i in n.input}
        read |= {i for name in read & self.fixed for i in self.producer[name].input}
        weights = sum(self.constants[i].size for i in read if i in self.constants)
        scans = any(n.op_type == AROUND for n in region)
        lone = len(self.inputs(region)) == len(self.results(region)) == 1
        return scans and lone and weights >= LEAST_WEIGHTS

    def inputs(self, region: list[NodeProto]) -> list[str]:
        """What a region reads that is neither its own nor constant."""
        own = {o for n in region for o in n.output}
        read = dict.fromkeys(i for n in region for i in n.input if i)
        return [name for name in read if name not in own | self.fixed and name not in self.constants]

    def results(self, region: list[NodeProto]) -> list[str]:
        """What others read of a region."""
        inside = {n.output[0] for n in region}
        made = [o for n in region for o in n.output]
        return [o for o in made if o in self.outputs or any(r.output[0] not in inside for r in self.readers[o])]

    def scan(self, region: list[NodeProto], number: int) -> list[NodeProto]:
        """The Scan over the rows of a region's input, ``TOGETHER`` at a time, and what fills up and cuts rows."""
        weights = [self.producer[i] for n in region for i in n.input if i in self.fixed]
        (source,), (result,) = self.inputs(region), self.results(region)
        made_here = {o for n in (*region, *weights) for o in n.output}
        own = f"rows{number}_"
        body = []
        for node in {n.output[0]: n for n in (*weights, *region)}.values():
            inner = NodeProto()
            inner.CopyFrom(node)
            inner.input[:] = [f"{own}{i}" if i == source or i in made_here else i for i in inner.input]
            inner.output[:] = [f"{own}{o}" if o else "" for o in inner.output]
            body.append(inner)

        def value(name: str) -> list[onnx.ValueInfoProto]:  # Scan wants to know the rank
            return [helper.make_tensor_value_info(f"{own}{name}", onnx.TensorProto.FLOAT, [None] * 3)]

        def make(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(kind, inputs, [output], f"{region[-1].name}_{output}", **attributes))
            return output

        nodes: list[NodeProto] = []
        rows = make("Shape", [source], f"{own}count", start=0, end=1)
        filling = make("Mod", [make("Neg", [rows], f"{own}negative"), "rows_together"], f"{own}filling")
        pads = make("Concat", ["rows_zero", filling], f"{own}pads", axis=0)
        filled = make("Pad", [source, pads, "", "rows_zero"], f"{own}filled")
        size = make("Concat", ["rows_apart", make("Shape", [source], f"{own}rest", start=1)], f"{own}size", axis=0)
        parts = make("Reshape", [filled, size], f"{own}parts")
        graph = helper.make_graph(body, f"{own}body", value(source), value(result))
        made = make("Scan", [parts], f"{own}made", body=graph, num_scan_inputs=1)
        whole = make("Concat", ["rows_joined", make("Shape", [made], f"{own}step", start=2)], f"{own}whole", axis=0)
        joined = make("Reshape", [made, whole], f"{own}joined_rows")
        make("Slice", [joined, "rows_zero", rows, "rows_zero"], result)
        return nodes

    def _row_wise(self, node: NodeProto) -> bool:
        """Whether a node treats each element of the first axis alone, of tensors of three axes."""
        given = units.flags(node)
        kind, first, others = node.op_type, node.input[0] if node.input else "", [*node.input[1:], ""]
        if node.output[0] in self.fixed or first in self.constants:
            return False
        fixed = all(not i or i in self.constants or i in self.fixed for i in others)
        if kind in UNARY:
            return True
        if kind in BINARY:
            return all(self._broadcast(i) for i in node.input)
        if kind in ("Split", "Concat"):
            return given["axis"] in (1, 2, -1, -2)
        if kind == "Transpose":
            return bool(given.get("perm", [-1])[0] == 0)  # without one, the axes are reversed
        if kind == "ReduceMean":
            axes = self.constants.get(others[0], np.array(0)).ravel().tolist()
            return bool(given.get("keepdims", 1)) and set(axes) <= {1, 2, -1, -2}
        if kind == "LayerNormalization":
            return given.get("axis", -1) == -1
        if kind == "MatMul":
            return fixed and self._rank(others[0]) == 2
        if kind == "Conv":
            return fixed and self._rank(others[0]) == 3
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return fixed and self._rank(others[0]) == 0
        return node.domain == "edgesep" and kind in ("CausalConv1dSilu", AROUND)

    def _broadcast(self, name: str) -> bool:
        """Whether an operand has no axis of rows, if it is constant."""
        if name not in self.constants:
            return name not in self.fixed
        shape = self.constants[name].shape
        return len(shape) < 3 or shape[0] == 1

    def _rank(self, name: str) -> int:
        """Of a constant, or of a dequantized one."""
        constant = name if name in self.constants else self.producer[name].input[0]
        return int(self.constants[constant].ndim)
