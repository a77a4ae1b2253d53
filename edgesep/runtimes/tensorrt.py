"""TensorRT where it is installed, else TensorRT-RTX, whose builder works without a GPU.

Building proves that NVIDIA's parser and builder take the graph. Engines run only on the GPU family (TensorRT-RTX) or
the very device (TensorRT) they were built for, so this module builds and says what it built; it has no runner yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgesep.runtimes.base import Shapes
from edgesep.spec import BuildError, UnsupportedError

try:
    import tensorrt as trt

    PACKAGE = "tensorrt"
except ImportError:
    import tensorrt_rtx as trt

    PACKAGE = "tensorrt-rtx"

PRECISIONS = ("fp32",)


def version() -> str:
    return f"{PACKAGE} {trt.__version__}"


def build(model: Path, folder: Path, precision: str, shapes: Shapes) -> list[str]:
    """Build an engine for the range of input shapes.

    Raises:
        BuildError: the parser or the builder refused; its own words are in the message.
    """
    if precision not in PRECISIONS:
        raise UnsupportedError(f"tensorrt builds {', '.join(PRECISIONS)} here, not {precision!r}")
    log = _Log()
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(scans_for_lstms(model.read_bytes())):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(f"{version()} does not parse {model.name}: {said}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *shapes[tensor.name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{version()} does not build {model.name}: {'; '.join(log.errors[-3:]) or 'no reason given'}")
    name = f"{precision}.engine"
    (folder / name).write_bytes(bytes(engine))
    return [name]


def scans_for_lstms(model: bytes) -> bytes:
    """Write each LSTM out as a Scan: TensorRT-RTX 1.7 fails on its own loop for a second one of dynamic length.

    The Scan's sums are the LSTM's; TensorRT makes a loop of either. Raises ``ImportError`` without the onnx package.
    """
    from onnx import TensorProto, helper, load_from_string

    proto = load_from_string(model)
    nodes: list[Any] = []
    for k, node in enumerate(proto.graph.node):
        if node.op_type != "LSTM":
            nodes.append(node)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        hidden = given.pop("hidden_size")
        plain = {"direction": b"forward", "input_forget": 0, "layout": 0}
        if other := {name: value for name, value in given.items() if value != plain.get(name)}:
            raise UnsupportedError(f"{node.name}: an LSTM with {other} has no Scan form here")
        x, w, r, b, lengths, h0, c0 = (list(node.input) + [""] * 7)[:7]
        if not (b and h0 and c0) or lengths:
            raise UnsupportedError(f"{node.name}: needs a bias and initial states, and sequences of one length")
        own = [f"lstm{k}_{what}" for what in ("0", "1", "gates", "w", "r", "wt", "rt", "b", "half", "other", "sum")]
        zero, one, gates, w0, r0, wt, rt, b0, bw, br, bias = own
        xw, xwb, h, c, hn, cn, y = (f"lstm{k}_{what}" for what in ("xw", "xwb", "h", "c", "hn", "cn", "y"))
        for name, values in ((zero, [0]), (one, [1]), (gates, [4 * hidden, 4 * hidden])):
            proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        make: Callable[..., Any] = helper.make_node
        step = helper.make_graph(
            [
                make("MatMul", ["h", rt], ["hr"]),
                make("Add", ["xw", "hr"], ["all"]),
                make("Split", ["all"], ["i_", "o_", "f_", "g_"], axis=1, num_outputs=4),  # ONNX's order of gates
                *(make("Sigmoid", [f"{gate}_"], [gate]) for gate in "iof"),
                make("Tanh", ["g_"], ["g"]),
                make("Mul", ["f", "c"], ["kept"]),
                make("Mul", ["i", "g"], ["added"]),
                make("Add", ["kept", "added"], ["c_next"]),
                make("Tanh", ["c_next"], ["bounded"]),
                make("Mul", ["o", "bounded"], ["h_next"]),
                make("Identity", ["h_next"], ["y"]),
            ],
            f"lstm{k}_step",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h", "c", "xw")],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h_next", "c_next", "y")],
        )
        nodes += [
            *(make("Squeeze", [a, zero], [q]) for a, q in ((w, w0), (r, r0), (b, b0), (h0, h), (c0, c))),
            make("Transpose", [w0], [wt]),
            make("Transpose", [r0], [rt]),
            make("Split", [b0, gates], [bw, br]),
            make("Add", [bw, br], [bias]),
            make("MatMul", [x, wt], [xw]),
            make("Add", [xw, bias], [xwb]),
            make("Scan", [h, c, xwb], [hn, cn, y], body=step, num_scan_inputs=1),
        ]
        wanted = zip(node.output, ((y, one), (hn, zero), (cn, zero)), strict=False)
        nodes += [make("Unsqueeze", [value, axis], [name]) for name, (value, axis) in wanted if name]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString())


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors for the exception's message and drops the chatter."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


class Runner:
    def __init__(self, folder: Path, files: list[str], precision: str, threads: int | None = None):
        del precision, threads
        self.engine = folder / files[0]

    def __enter__(self) -> Self:
        raise UnsupportedError(f"{self.engine.name} was built with {version()} and needs its NVIDIA GPU to run")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise UnsupportedError(f"{self.engine.name} needs its NVIDIA GPU to run, cannot take {', '.join(feeds)} here")
