"""Constants that take less room in a file and are what they were when a runtime has loaded it: it folds the operators.

Half of a small time-frequency separator is the kernels of its STFT, which a table of one cosine says as well. And in an
INT8 file, most bytes are what stays in float: weights whose products do, gains, biases.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesep.onnx_edit import nodes, replace_nodes, share_initializers, shorten_names

LEAST = 256  # elements that are worth an operator, whose entry takes some dozens of bytes
#: Their scales say what an integer means; and these must be constants before anything is folded.
EXACT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLSTM", "MatMulIntegerToFloat")


def compacted(serialized: bytes, *, halves: bool = False, in_bodies: bool = True) -> bytes:
    """``compact`` of a file."""
    model = onnx.load_from_string(serialized)
    compact(model, halves=halves, in_bodies=in_bodies)
    return bytes(model.SerializeToString())


def compact(model: onnx.ModelProto, *, halves: bool = False, in_bodies: bool = True) -> None:
    """Constants and names are shortened.

    Args:
        halves: store what is in float as float16.
        in_bodies: what bodies of loops read, too.
    """
    tabulate_stft(model)
    if halves:
        halve_constants(model, in_bodies)
    share_initializers(model)
    shorten_names(model)


def tabulate_stft(model: onnx.ModelProto) -> None:
    """Windowed Fourier kernels ``(2·F, 1, n)`` are written as a window times entries of a cosine table.

    Row k of the first F is ``cos(2·pi·k·t/N)``, of the second ``-sin``, N = 2·(F-1); t ends with N-1; in front of it
    may stand a factor of the row. The same to the last bit or two of float32.
    """
    graph = model.graph
    made: list[onnx.NodeProto] = []
    for constant in list(graph.initializer):
        if len(constant.dims) != 3 or constant.dims[1] != 1 or constant.data_type != TensorProto.FLOAT:
            continue
        kernel = numpy_helper.to_array(constant)[:, 0]
        rows, samples = kernel.shape
        size = rows - 2
        if rows < 6 or size % 4 or not size // 4 < samples <= size:
            continue
        bins = np.arange(rows, dtype=np.int32) % (rows // 2)
        times = np.arange(size - samples, size, dtype=np.int32)
        turned = np.where(np.arange(rows) < rows // 2, 0, size // 4).astype(np.int32)  # -sin(a) = cos(a + pi/2)
        table = np.cos(2 * np.pi / size * np.arange(size)).astype(np.float32)
        waves = table[(bins[:, None] * times + turned[:, None]) % size]
        window = kernel[0]
        power = np.square(waves * window).sum(1)
        factor = np.divide((kernel * waves * window).sum(1), power, out=np.ones(rows), where=power > 1e-9 * power.max())
        factor = factor.astype(np.float32)
        if np.abs(waves * window * factor[:, None] - kernel).max() > 1e-6 * np.abs(kernel).max():
            continue
        name = constant.name
        parts = {
            "bins": bins[:, None, None],
            "times": times[None, None],
            "turned": turned[:, None, None],
            "size": np.int32(size),
            "table": table,
            "window": window[None, None],
            "factor": factor[:, None, None],
        }
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


def halve_constants(model: onnx.ModelProto, in_bodies: bool = True) -> None:
    """Float constants are stored as float16, unless that changes one by more than a part in a thousand."""
    graph = model.graph
    exact = {name for node in nodes(graph) if node.op_type in EXACT for name in node.input}
    if not in_bodies:
        bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        exact |= {name for body in bodies for node in nodes(body) for name in node.input}
    made: list[onnx.NodeProto] = []
    for constant in graph.initializer:
        if constant.data_type != TensorProto.FLOAT or constant.name in exact:
            continue
        value = numpy_helper.to_array(constant)
        if value.size < LEAST or np.abs(value).max() > np.finfo(np.float16).max:
            continue
        halved = value.astype(np.float16)
        if np.linalg.norm(halved.astype(np.float32) - value) > 1e-3 * np.linalg.norm(value):
            continue
        name = constant.name
        constant.CopyFrom(numpy_helper.from_array(halved, f"{name}_half"))
        made.append(helper.make_node("Cast", [constant.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    replace_nodes(graph, [*made, *graph.node])
