"""Constants that take less room in a file: a runtime folds the operators that make them when it loads it.

Half of a small time-frequency separator is the kernels of its STFT, which a table of one cosine says as well. Weights
for a fast algorithm are sums of others. And in an INT8 file, most bytes are what stays in float (weights whose products
do, gains, biases), where eight bits or float16 are enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesep.onnx_edit import nodes, replace_nodes, share_initializers, shorten_names
from edgesep.ops import window_product

LEAST = 128  # elements that are worth an operator, whose entry takes some dozens of bytes
#: Their scales say what an integer means; and these must be constants before anything is folded.
EXACT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLSTM", "MatMulIntegerToFloat")
#: Which inputs are weights, and along which of their axes each channel gets a scale.
WEIGHTS = {
    "Conv": ((1,), (0,)),
    "ConvTranspose": ((1,), (0,)),
    "MatMul": ((1,), (-1,)),
    "LSTM": ((1, 2), (0, 1)),
    "LstmSteps": ((1,), (0, 2, 3)),
    "WindowProduct": ((1,), (0, 3)),
}
#: Inputs that may be written for the fast algorithm (``window_product.unfolded``).
UNFOLDED = {"WindowProduct": (1,), "BidirectionalMamba": (1, 10)}


def compact(model: onnx.ModelProto, *, narrow: bool = False, in_bodies: bool = True) -> None:
    """Constants and names are shortened.

    Args:
        narrow: store what is in float as float16, or in eight bits where it has no more.
        in_bodies: what bodies of loops read, too.
    """
    tabulate_stft(model)
    keep_taps(model)
    if narrow:
        narrow_constants(model, in_bodies)
    share_initializers(model)
    shorten_names(model)


def tabulate_stft(model: onnx.ModelProto) -> None:
    """Windowed Fourier kernels ``(2·F, 1, n)``, ``(2·F, n)`` or ``(n, 2·F)`` are written as a window times entries of a
    cosine table.

    Row k of the first F is ``cos(2·pi·k·t/N)``, of the second ``-sin``, N = 2·(F-1); t ends with N-1; in front of it
    may stand a factor of the row. The same to the last bit or two of float32.
    """
    graph = model.graph
    made: list[onnx.NodeProto] = []
    for constant in list(graph.initializer):
        if constant.data_type != TensorProto.FLOAT:
            continue
        parts = _cosines(numpy_helper.to_array(constant))
        if parts is None:
            continue
        name = constant.name
        graph.initializer.remove(constant)
        graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{name}_{k}") for k, v in parts.items())
        steps = (
            ("Mul", "bins", "times", "angles"),
            ("Add", "angles", "turned", "moved"),
            ("Mod", "moved", "size", "entries"),
            ("Gather", "table", "entries", "waves"),
            ("Mul", "waves", "window", "windowed"),
        )
        made += [
            helper.make_node(kind, [f"{name}_{a}", f"{name}_{b}"], [f"{name}_{out}"], f"{name}/{kind}_{out}")
            for kind, a, b, out in steps
        ]
        made.append(helper.make_node("Mul", [f"{name}_windowed", f"{name}_factor"], [name], f"{name}/Mul"))
    replace_nodes(graph, [*made, *graph.node])


def _cosines(value: np.ndarray) -> dict[str, np.ndarray] | None:
    """What a kernel of ``tabulate_stft`` is made of; None where it is another."""
    if value.ndim == 3 and value.shape[1] == 1:
        return _table(value[:, 0], (0, 2))
    if value.ndim != 2:
        return None
    return _table(value, (0, 1)) or _table(value.T, (1, 0))


def _table(kernel: np.ndarray, axes: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """The same for ``(2·F, n)``, its parts along two axes of the constant."""
    rows, samples = kernel.shape
    size = rows - 2
    if rows < 6 or rows % 2 or not 2 < samples <= size:
        return None
    times = np.arange(size - samples, size, dtype=np.int32)
    bins = np.arange(rows, dtype=np.int32) % (rows // 2)
    if size % 4:  # a quarter of a turn lies between two entries: a table of twice the size
        size, bins = 2 * size, 2 * bins
    turned = np.where(np.arange(rows) < rows // 2, 0, size // 4).astype(np.int32)  # -sin(a) = cos(a + pi/2)
    table = np.cos(2 * np.pi / size * np.arange(size)).astype(np.float32)
    waves = table[(bins[:, None] * times + turned[:, None]) % size]
    window = kernel[0]
    power = np.square(waves * window).sum(1)
    factor = np.divide((kernel * waves * window).sum(1), power, out=np.ones(rows), where=power > 1e-9 * power.max())
    factor = factor.astype(np.float32)
    if np.abs(waves * window * factor[:, None] - kernel).max() > 1e-6 * np.abs(kernel).max():
        return None
    along_rows, along_times = (tuple(d for d in range(max(axes) + 1) if d != axis) for axis in axes)
    return {
        "bins": np.expand_dims(bins, along_rows),
        "times": np.expand_dims(times, along_times),
        "turned": np.expand_dims(turned, along_rows),
        "size": np.asarray(size, np.int32),
        "table": table,
        "window": np.expand_dims(window, along_times),
        "factor": np.expand_dims(factor, along_rows),
    }


def keep_taps(model: onnx.ModelProto) -> None:
    """Of weights for the fast algorithm the file keeps the taps; their sums, 3.4 times as much, are made at load."""
    graph = model.graph
    constants = {c.name: c for c in graph.initializer if c.data_type == TensorProto.FLOAT}
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        for name in (node.input[i] for i in UNFOLDED.get(node.op_type, ()) if node.input[i] in constants):
            value = numpy_helper.to_array(constants[name])
            if value.shape[-1] != window_product.UNFOLDED_GROUP:
                continue
            graph.initializer.remove(constants.pop(name))
            *groups, parts, channels, outputs = value.shape
            taps = value[..., window_product.single(parts), :, :].reshape(*groups, -1, channels * outputs)
            sums = window_product.sums(taps.shape[-2]).astype(np.float32)
            for part, of in (("sums", sums), ("taps", taps), ("shape", np.array(value.shape))):
                graph.initializer.append(numpy_helper.from_array(of, f"{name}_{part}"))
            made.append(
                helper.make_node("MatMul", [f"{name}_sums", f"{name}_taps"], [f"{name}_flat"], f"{name}/MatMul")
            )
            made.append(helper.make_node("Reshape", [f"{name}_flat", f"{name}_shape"], [name], f"{name}/Reshape"))
    replace_nodes(graph, [*made, *graph.node])


def round_weights(model: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool] = lambda _: False) -> None:
    """Weights of products in float get eight bits and a scale for each channel: ``narrow_constants`` finds them.

    Not the kernels of an STFT, which take less room as they are, nor small ones (depthwise), which gain little.

    Args:
        exempt: nodes whose weights stay as they are.
    """
    constants = {c.name: c for c in model.graph.initializer if c.data_type == TensorProto.FLOAT}
    every = list(nodes(model.graph))
    for name in {name for node in every if exempt(node) for name in node.input}:
        constants.pop(name, None)
    for node in every:
        places, axes = WEIGHTS.get(node.op_type, ((), ()))
        for name in (node.input[i] for i in places if node.input[i] in constants):
            constant = constants.pop(name)
            value = numpy_helper.to_array(constant)
            integers, steps = _eight_bits(value, tuple(a % value.ndim for a in axes))
            if value.ndim > 1 and value.size >= 8 * steps.size and _cosines(value) is None:
                constant.CopyFrom(numpy_helper.from_array(integers / steps, name))


def narrow_constants(model: onnx.ModelProto, in_bodies: bool = True) -> None:
    """Float constants are stored as integers times a scale where they are that, else as float16.

    As float16 only what that changes by less than a part in a thousand.
    """
    graph = model.graph
    exact = {name for node in nodes(graph) if node.op_type in EXACT for name in node.input}
    if not in_bodies:
        bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        exact |= {name for body in bodies for node in nodes(body) for name in node.input}
    made: list[onnx.NodeProto] = []
    for constant in list(graph.initializer):
        name = constant.name
        if constant.data_type != TensorProto.FLOAT or name in exact:
            continue
        value = numpy_helper.to_array(constant)
        if value.size < LEAST or np.abs(value).max() > np.finfo(np.float16).max:
            continue
        if (found := _integers_of(value)) is not None:
            for part, of in zip(("integers", "steps"), found, strict=True):
                graph.initializer.append(numpy_helper.from_array(of, f"{name}_{part}"))
            graph.initializer.remove(constant)
            made.append(
                helper.make_node("Cast", [f"{name}_integers"], [f"{name}_wide"], f"{name}/Cast", to=TensorProto.FLOAT)
            )
            made.append(helper.make_node("Div", [f"{name}_wide", f"{name}_steps"], [name], f"{name}/Div"))
            continue
        halved = value.astype(np.float16)
        counts = np.array_equal(value, np.rint(value)) and not np.array_equal(halved, value)  # indices, say
        if counts or np.linalg.norm(halved.astype(np.float32) - value) > 1e-3 * np.linalg.norm(value):
            continue
        constant.CopyFrom(numpy_helper.from_array(halved, f"{name}_half"))
        made.append(helper.make_node("Cast", [constant.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    replace_nodes(graph, [*made, *graph.node])


def _integers_of(value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """``_eight_bits`` of a value that is no more than that, along any axes, and smaller so than as float16."""
    every = {tuple(a % value.ndim for a in axes) for _, axes in WEIGHTS.values() if max(axes) < value.ndim > 1}
    for axes in sorted(every):
        integers, steps = _eight_bits(value, axes)
        smaller = value.nbytes // 2 - integers.nbytes - steps.nbytes > LEAST
        if smaller and np.all(np.abs(integers - value * steps) <= 2e-4):  # of 127: the last bits of float32
            return integers, steps
    return None


def _eight_bits(value: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Integers and steps to one, an entry along ``axes``, whose quotient is nearest to ``value``.

    A quotient: of a product with the weight of a MatMul OpenVINO makes one in every query, not when it loads.
    """
    others = tuple(d for d in range(value.ndim) if d not in axes)
    largest = np.abs(value).max(others, keepdims=True)
    steps = np.float32(127) / np.where(largest > 1e-30, largest, 1)
    return np.rint(value * steps).astype(np.int8), steps
