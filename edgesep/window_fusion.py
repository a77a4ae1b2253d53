"""Fused form of a stream's float products: each with the windows it reads and with what follows it, as one operator.

Shapes: M windows of K taps, C inputs, N outputs (``ops.window_product``).

A call's maps are a few hundred rows. In front of a product over windows of them, runtimes gather up to K copies of each
row, one after another; behind it they go over its result for a slope and once more for a residual. So:

* Gather of rows, perhaps of a padded map, and the Gemm of what it gathers → ``WindowProduct``, which reads the map;
* a Gemm, the slope behind it and the sum with another map → ``WindowProduct``;
* products of windows that overlap, each a row behind the one before → fewer products (``window_product.unfolded``);
* a small convolution whose result is then taken as rows → ``WindowProduct``: its windows are rows of one value.

Products in INT8 are taken with their windows, which runtimes gather in eight bits; ``WindowProduct`` rounds the map.
Products of which the runtime makes bf16 stay what they are: it has them in fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from edgesep.onnx_edit import Constants, rewrite
from edgesep.ops import window_product
from edgesep.units import Graph, flags

Shapes = dict[str, tuple[int, ...]]
TO_ROWS = [0, 2, 3, 1]
WORTH = 0.7  # share of the products that the fast algorithm may need


@dataclass(frozen=True)
class Rounding:
    """How a product is rounded to eight bits: ``scale (N)`` is that of its sums; x is x_scale · (integer - zero)."""

    x_scale: float
    zero: int
    scale: np.ndarray


@dataclass
class Product:
    """One product: ``weight (K·C, N)``, integers if it is rounded; ``out`` is the tensor that its last node makes."""

    x: str
    weight: np.ndarray
    bias: np.ndarray
    out: str
    index: np.ndarray | None = None  # (M, K)
    slope: np.ndarray | None = None
    residual: str = ""
    rounding: Rounding | None = None

    @property
    def gains(self) -> bool:
        """Whether the runtime's own product would leave something to do; of one in eight bits, to gather."""
        return self.index is not None or (self.rounding is None and (self.slope is not None or bool(self.residual)))

    @property
    def fills(self) -> bool:
        """Whether the kernels' groups of outputs are not mostly zeros."""
        return 2 * self.bias.size > window_product.GROUP

    @property
    def overlaps(self) -> bool:
        """Whether the windows overlap so that the fast algorithm makes up for what it has to do beside its products."""
        if self.rounding or self.index is None or self.index.shape[1] not in window_product.TAPS:
            return False
        windows, taps = self.index.shape
        products = window_product.rounds(self.index) * len(window_product.sums(taps))
        return products <= WORTH * windows * taps


def fuse(model: onnx.ModelProto, shapes: Shapes, *, unfold: bool = True) -> onnx.ModelProto:
    """A copy in fused form; the function it computes is the same.

    Args:
        shapes: of its tensors, as far as they are known.
        unfold: windows that overlap may meet a matrix for the fast algorithm, which is up to 3.4 times as large.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, constants = Graph(made.graph), Constants(made.graph, "product")
    found = {p.out: p for p in (_product(graph, node, shapes) for node in graph.nodes) if p and p.gains and p.fills}
    rewrite(made, [_written(found[n.output[0]], constants, unfold) if n.output[0] in found else n for n in graph.nodes])
    return made


def _written(p: Product, constants: Constants, unfold: bool) -> NodeProto:
    taps = 1 if p.index is None else p.index.shape[1]
    bias, scale = p.bias, ""
    attributes: dict[str, Any] = {}
    if p.rounding:
        weight = window_product.in_bytes(p.weight, taps)
        apart = p.rounding.zero * p.weight.sum(0, dtype=np.int64) * p.rounding.scale.astype(np.float64)
        bias, scale = (bias - apart).astype(np.float32), constants.name(p.rounding.scale)
        attributes = {"x_scale": p.rounding.x_scale, "x_zero": p.rounding.zero}
    elif unfold and p.overlaps:
        weight = window_product.unfolded(p.weight.reshape(taps, -1, p.bias.size))
    else:
        weight = window_product.grouped(p.weight, taps)
    optional = ["" if v is None else constants.name(v) for v in (p.index, p.slope)]
    inputs = [p.x, constants.name(weight), constants.name(bias), *optional, p.residual, scale]
    while not inputs[-1]:
        inputs.pop()
    name, domain = f"{p.out}_product", window_product.DOMAIN
    return helper.make_node(window_product.NAME, inputs, [p.out], name, domain=domain, **attributes)


def _product(graph: Graph, node: NodeProto, shapes: Shapes) -> Product | None:
    found = _gemm(graph, node, shapes) or _rounded(graph, node, shapes) or _convolution(graph, node, shapes)
    if found is not None:
        _slope(graph, found)
        _residual(graph, found, shapes)
    return found


def _gemm(graph: Graph, node: NodeProto, shapes: Shapes) -> Product | None:
    if node.op_type != "Gemm" or len(node.input) < 3 or any(i not in graph.constants for i in node.input[1:]):
        return None
    given = flags(node)
    weight, bias = (graph.constants[i] for i in node.input[1:])
    weight = weight.T if given.get("transB") else weight
    if given.get("transA") or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1 or bias.shape != weight.shape[1:]:
        return None
    found = Product(node.input[0], weight, bias, node.output[0])
    _windows(graph, found, shapes)
    return found


def _rounded(graph: Graph, node: NodeProto, shapes: Shapes) -> Product | None:
    """A product in eight bits and the sum with its bias, which one node makes of what was in float."""
    if node.op_type != "MatMul" or node.input[0] not in graph.pairs:
        return None
    first, weight = graph.pairs[node.input[0]][0], graph.producer.get(node.input[1])
    behind = graph.only_reader(node.output[0])
    if len(first.input) < 3 or weight is None or weight.op_type != "DequantizeLinear" or not behind:
        return None
    if behind.op_type != "Add" or any(name not in graph.constants for name in (*first.input[1:], *weight.input)):
        return None
    integers, steps, *zeros = (graph.constants[name] for name in weight.input)
    x_scale, zero = (graph.constants[name] for name in first.input[1:])
    bias = graph.constants.get(next(i for i in behind.input if i != node.output[0]))
    fits = integers.dtype == np.int8 and integers.ndim == 2 and not any(z.any() for z in zeros)
    if not fits or x_scale.size > 1 or zero.dtype != np.uint8 or bias is None or bias.shape != integers.shape[1:]:
        return None
    if steps.size > 1 and flags(weight).get("axis", 1) not in (1, -1):
        return None
    scale = np.broadcast_to(x_scale * steps, bias.shape).astype(np.float32)
    rounding = Rounding(x_scale.item(), zero.item(), scale)
    found = Product(first.input[0], integers, bias, behind.output[0], rounding=rounding)
    _windows(graph, found, shapes)
    taps = 1 if found.index is None else found.index.shape[1]
    return found if integers.shape[0] // taps % 4 == 0 else None


def _windows(graph: Graph, p: Product, shapes: Shapes) -> None:
    """Take in the Gather of rows in front of the product, and the zeros around what it gathers from."""
    gather = _behind_shapes(graph, p.x)
    if gather is None or gather.op_type != "Gather" or flags(gather).get("axis", 0) != 0:
        return
    source, index = gather.input[0], graph.constants.get(gather.input[1])
    _, width = shape if len(shape := shapes.get(source, ())) == 2 else (0, 0)
    if index is None or index.ndim != 1 or not width or p.weight.shape[0] % width:
        return
    taps = p.weight.shape[0] // width
    if index.size % taps or index.min() < 0:
        return
    p.x, p.index = _unpadded(graph, source, index.reshape(-1, taps).astype(np.int64), width, shapes)


def _unpadded(graph: Graph, x: str, index: np.ndarray, width: int, shapes: Shapes) -> tuple[str, np.ndarray]:
    """Windows of a map with rows of zeros in front and behind become windows of the map without them."""
    pad = _behind_shapes(graph, x)
    if pad is None or len(pad.input) > 3 or not graph.pads_zeros(pad):
        return x, index
    before, pads = shapes.get(pad.input[0], ()), graph.constants.get(pad.input[1])
    if pads is None or before[-1:] != (width,) or 0 in before:
        return x, index
    if pads[1 : len(before)].any() or pads[len(before) + 1 :].any() or pads.min() < 0:
        return x, index  # not only in front of all rows and behind them
    rows = int(np.prod(before[:-1]))
    moved = index - int(pads[0]) * (rows // before[0])
    return pad.input[0], np.where((moved < 0) | (moved >= rows), -1, moved)


def _behind_shapes(graph: Graph, name: str) -> NodeProto | None:
    """What makes a tensor that was only given other shapes since, and that nobody else reads."""
    while (node := graph.producer.get(name)) is not None and graph.only_reader(name) is not None:
        if node.op_type != "Reshape":
            return node
        name = node.input[0]
    return None


def _convolution(graph: Graph, node: NodeProto, shapes: Shapes) -> Product | None:
    if node.op_type != "Conv" or len(node.input) < 3 or any(i not in graph.constants for i in node.input[1:]):
        return None
    given, shape = flags(node), shapes.get(node.input[0], ())
    (weight, bias), turned = (graph.constants[i] for i in node.input[1:]), graph.only_reader(node.output[0])
    rows = turned and graph.only_reader(turned.output[0])
    plain = given.get("group", 1) == 1 and all(set(given.get(k, [1])) == {1} for k in ("strides", "dilations"))
    if not plain or len(shape) != 4 or shape[0] != 1 or 0 in shape or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    if not turned or turned.op_type != "Transpose" or flags(turned).get("perm") != TO_ROWS:
        return None
    if not rows or rows.op_type != "Reshape" or len(shapes.get(rows.output[0], ())) != 2:
        return None
    pads = given.get("pads", [0] * 4)
    places = np.pad(
        np.arange(int(np.prod(shape))).reshape(shape[1:]), [(0, 0), pads[::2], pads[1::2]], constant_values=-1
    )
    windows = np.lib.stride_tricks.sliding_window_view(places, weight.shape[2:], (1, 2))  # (C, H, W, taps, taps)
    index = windows.transpose(1, 2, 0, 3, 4).reshape(-1, weight[0].size)
    if shapes[rows.output[0]] != (len(index), bias.size):
        return None
    return Product(node.input[0], weight.reshape(bias.size, -1).T, bias, rows.output[0], index)


def _slope(graph: Graph, p: Product) -> None:
    """``max(v, slope v)`` behind the product: a PReLU."""
    readers = sorted(graph.readers[p.out], key=lambda n: n.op_type)
    if p.out in graph.outputs or [n.op_type for n in readers] != ["Max", "Mul"]:
        return
    most, scaled = readers
    other = next((i for i in scaled.input if i != p.out), "")
    slope = graph.constants.get(other)
    if (
        slope is None
        or slope.size not in (1, p.bias.size)
        or slope.ndim > 1
        or graph.only_reader(scaled.output[0]) != most
    ):
        return
    if sorted(most.input) == sorted([p.out, scaled.output[0]]):
        p.slope, p.out = np.broadcast_to(slope, p.bias.shape).astype(np.float32), most.output[0]


def _residual(graph: Graph, p: Product, shapes: Shapes) -> None:
    """The sum of the product and another map of its shape."""
    reader = graph.only_reader(p.out)
    if reader is None or reader.op_type != "Add" or reader.input[0] == reader.input[1]:
        return
    other = next(i for i in reader.input if i != p.out)
    shape = shapes.get(p.out, ())
    if len(shape) == 2 and 0 not in shape and shapes.get(other) == shape:
        p.residual, p.out = other, reader.output[0]
