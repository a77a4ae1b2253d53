"""Fused form of Mamba blocks over overlapping windows: one operator each, from rows to rows.

A block of SPMamba takes windows of 8 steps, widens each 64-fold and brings it back. As operators of a runtime, each
reads and writes a hundred megabytes; and its widest product, half of all sums, meets every step eight times over.
``BidirectionalMamba`` keeps a piece of a row in the caches, and needs 27 of 64 products there.

What is linear behind the scans (a direction's output, what passes it by, both directions side by side, and what makes
rows of windows) becomes one matrix a direction and one for what passes by, multiplied out in float64.

Of a block in INT8, the products stay so; but instead of one range for all windows, each window has its own. That holds
the tails of what the scans make, too, which other INT8 leaves in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.onnx_edit import Constants, rewrite
from edgesep.ops import bidirectional_mamba as mamba
from edgesep.ops import window_product
from edgesep.units import Graph, flags

SPREAD = ("Reshape", "Transpose", "Pad", "Reshape", "Slice", "Reshape", "ReduceSum", "Add")


class Other(Exception):
    """The nodes are not such a block."""


@dataclass
class Direction:
    """One way through the windows ``w``; matrices act from the right."""

    w: str
    reverse: bool
    rounded: bool  # the products in front of its scan are in INT8
    epsilon: float
    weights: dict[str, np.ndarray]  # by the operator's inputs; ``in (2, C·K, E)``, ``out (E, C·K)``


def fuse(model: onnx.ModelProto, bf16: bool = False) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same.

    Args:
        bf16: the large products may be in bfloat16.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, constants = _Graph(made.graph), Constants(made.graph, "mamba")
    found: dict[str, NodeProto] = {}
    for node in graph.nodes:
        if node.op_type == "Concat" and len(node.input) == 2:
            try:
                block = graph.block(node, constants, bf16)
            except Other:
                continue
            found[block.output[0]] = block
    rewrite(made, [found.get(n.output[0], n) for n in graph.nodes])
    return made


class _Graph(Graph):
    """A graph, of which every question that it has no answer to says that this is no block.

    Tensors are named in front of their rounding.
    """

    def made_by(self, name: str, kind: str) -> NodeProto:
        node = super().made_by(name, kind)
        if node is None:
            raise Other
        return node

    def constant(self, name: str) -> np.ndarray:
        value = self.value(name)
        if value is None:
            raise Other
        return value

    def split(self, node: NodeProto) -> tuple[str, np.ndarray]:
        """The tensor and the constant of a node of two inputs."""
        fixed = [i for i in node.input if self.value(i) is not None]
        if len(node.input) != 2 or len(fixed) != 1:
            raise Other
        return self.source(next(i for i in node.input if i != fixed[0])), self.constant(fixed[0])

    def product(self, name: str) -> tuple[str, np.ndarray]:
        """What is multiplied by which matrix."""
        node = self.made_by(name, "MatMul")
        return self.source(node.input[0]), self.constant(node.input[1])

    def rounds(self, name: str) -> bool:
        """Whether a product is in INT8."""
        node = self.made_by(name, "MatMul")
        return node.input[0] in self.pairs and node.input[1] not in self.constants

    def block(self, concat: NodeProto, constants: Constants, bf16: bool) -> NodeProto:
        """The operator in place of what ends in both directions side by side."""
        ways = [self.direction(name) for name in concat.input]
        reader, w = self.only_reader(concat.output[0]), ways[0].w
        if reader is None or flags(concat)["axis"] not in (-1, 2) or ways[1].w != w:
            raise Other
        if [way.reverse for way in ways] != [False, True]:
            raise Other
        x, taps = self.unfolded(w)
        spread = self.product(reader.output[0])[1].astype(np.float64)
        bias, y = self.rows(reader.output[0], taps)
        channels, size = bias.size, len(spread) // 2
        if size != taps * channels or spread.shape[1] != size or len({way.epsilon for way in ways}) > 1:
            raise Other
        halves = spread.reshape(2, size, size)
        tap_first = np.arange(size).reshape(channels, taps).T.ravel()  # as rows of windows lie in memory
        values: dict[str, Any] = dict.fromkeys(mamba.INPUTS[1:])  # in their order
        for name in (*mamba.CONVOLUTION, *mamba.SCAN):
            values[name] = np.stack([way.weights[name] for way in ways])
        matrices = {
            "in": np.stack([way.weights["in"][:, tap_first] for way in ways]),
            "states": values["states"],
            "out": np.stack([way.weights["out"] @ half for way, half in zip(ways, halves, strict=True)]),
        }
        values |= {"steps": mamba.grouped(values["steps"]), "bias": bias}
        values["through"] = mamba.unfolded(halves.sum(0)[tap_first], taps)
        inner = values["D"].shape[1]
        if rounded := all(way.rounded for way in ways) and inner % 4 == 0:
            for name, matrix in matrices.items():
                values[name], values[f"{name}_scale"] = mamba.in_bytes(matrix)
        else:
            values["in"] = mamba.unfolded(matrices["in"], taps)
            values |= {name: mamba.grouped(matrices[name]) for name in ("states", "out")}
        values = {name: v if v.dtype == np.int8 else v.astype(np.float32) for name, v in values.items()}
        if bf16 := bf16 and not rounded and channels % 2 == inner % 2 == 0:
            values |= {name: mamba.pairs(values[name]) for name in mamba.PAIRED}
        names = [constants.name(value) for value in values.values()]
        attributes: dict[str, Any] = {"epsilon": ways[0].epsilon, "bf16": int(bf16)}
        return helper.make_node(mamba.NAME, [x, *names], [y], f"{y}_mamba", domain=mamba.DOMAIN, **attributes)

    def direction(self, name: str) -> Direction:
        """From the windows to what a direction makes of them, the windows themselves added."""
        add = self.made_by(name, "Add")
        products = [i for i in add.input if Graph.made_by(self, i, "MatMul") is not None]
        if len(products) != 1:
            raise Other
        y, w = products[0], self.source(next(i for i in add.input if i != products[0]))
        scanned, out = self.product(y)
        scan = self.made_by(scanned, "SelectiveScan")
        given = flags(scan)
        if len(scan.input) != 8 or not given.get("delta_softplus") or scanned != scan.output[0]:
            raise Other
        if len(scan.output) > 1 and (self.readers[scan.output[1]] or scan.output[1] in self.outputs):
            raise Other
        v, delta, a, b, c, d, z, step_bias = map(self.source, scan.input)
        conv = self.made_by(v, "CausalConv1dSilu")
        reverse = bool(given.get("reverse"))
        if bool(flags(conv).get("reverse")) != reverse:
            raise Other
        t, steps = self.product(delta)
        split = self.made_by(t, "Split")
        if [t, b, c] != list(split.output) or self.product(split.input[0])[0] != v:
            raise Other
        made = [self.product(i) for i in (conv.input[0], z)]
        if made[0][0] != made[1][0]:
            raise Other
        gain, epsilon = self.normed(made[0][0], w)
        weights = {
            "in": np.stack([gain[:, None].astype(np.float64) * matrix for _, matrix in made]),
            "states": self.product(split.input[0])[1],
            "steps": steps,
            "out": out,
        }
        fixed = {"A": a, "D": d, "step_bias": step_bias, "conv_weight": conv.input[1], "conv_bias": conv.input[2]}
        rounded = all(self.rounds(i) for i in (split.input[0], conv.input[0], z))
        return Direction(w, reverse, rounded, epsilon, weights | {k: self.constant(i) for k, i in fixed.items()})

    def normed(self, name: str, w: str) -> tuple[np.ndarray, float]:
        """The gain and the epsilon of an RMS norm of ``w``."""
        scaled, gain = self.split(self.made_by(name, "Mul"))
        node = self.made_by(scaled, "Mul")
        factors = [i for i in node.input if self.source(i) != w]
        if len(factors) != 1:
            raise Other
        factor = factors[0]
        root = self.made_by(self.made_by(factor, "Reciprocal").input[0], "Sqrt")
        mean, epsilon = self.split(self.made_by(root.input[0], "Add"))
        squares, axes = self.split(self.made_by(mean, "ReduceMean"))
        power = self.made_by(squares, "Pow")
        if (
            self.source(power.input[0]) != w
            or self.constant(power.input[1]) != 2
            or list(axes) != [-1]
            or epsilon.size != 1
        ):
            raise Other
        return gain, float(epsilon.reshape(()))

    def unfolded(self, w: str) -> tuple[str, int]:
        """(source, taps) of ``(R, M, C·taps)`` windows of ``(R, C, n)``, a step apart."""
        turned = self.made_by(w, "Transpose")
        stacked = self.made_by(self.made_by(turned.input[0], "Reshape").input[0], "Concat")
        if flags(turned)["perm"] != [0, 2, 1] or flags(stacked)["axis"] != 2:
            raise Other
        slices = [self.made_by(self.made_by(i, "Unsqueeze").input[0], "Slice") for i in stacked.input]
        starts = [self.constant(s.input[1]).tolist() for s in slices]
        along = {tuple(int(self.constant(s.input[k])[0]) for k in (3, 4)) for s in slices}
        taps = len(slices)
        if starts != [[k] for k in range(taps)] or along != {(2, 1)} or len({s.input[0] for s in slices}) > 1:
            raise Other
        if taps not in window_product.TAPS:
            raise Other
        return slices[0].input[0], taps

    def rows(self, name: str, taps: int) -> tuple[np.ndarray, str]:
        """(bias, result) of the sum of overlapping windows: ``(R, M, taps·C)`` → ``(R, n, C)``."""
        chain = []
        for kind in SPREAD:
            node = self.only_reader(name)
            if node is None or node.op_type != kind:
                raise Other
            chain.append(node)
            name = node.output[0]
        _, turned, pad, *_, summed, add = chain
        if flags(turned)["perm"] != [0, 2, 1, 3] or self.constant(pad.input[1]).tolist() != [0] * 6 + [taps, 0]:
            raise Other
        if self.constant(summed.input[1]).tolist() != [1]:
            raise Other
        return self.split(add)[1], name
