"""TensorRT where it is installed, else TensorRT-RTX, whose builder works without a GPU.

Building proves that NVIDIA's parser and builder take the graph. Engines run only on the GPU family (TensorRT-RTX) or
the very device (TensorRT) they were built for, so this module builds and says what it built; it has no runner yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgesep.runtimes.base import Int8Form, Shapes
from edgesep.spec import BuildError, UnsupportedError

try:
    import tensorrt as trt

    PACKAGE = "tensorrt"
except ImportError:
    import tensorrt_rtx as trt

    PACKAGE = "tensorrt-rtx"

PRECISIONS = ("fp32", "fp16", "int8")
INT8 = Int8Form(symmetric=True)  # its INT8 has no zero points
TAKES_KERNELS = PACKAGE == "tensorrt"  # TensorRT-RTX has no plug-ins
CHUNKED_SCAN = True  # a GPU does sixteen steps in one iteration faster than one


def version() -> str:
    return f"{PACKAGE} {trt.__version__}"


def build(model: Path, folder: Path, precision: str, shapes: Shapes, library: Path | None = None) -> list[str]:
    """Build an engine for the range of input shapes.

    Raises:
        BuildError: the parser or the builder refused; its own words are in the message.
    """
    if precision not in PRECISIONS:
        raise UnsupportedError(f"tensorrt builds {', '.join(PRECISIONS)} here, not {precision!r}")
    if library is not None and not TAKES_KERNELS:
        raise UnsupportedError(f'{PACKAGE} takes no native kernels; leave ops = "portable" for this target')
    log = _Log()
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    text = model.read_bytes()
    if b"LSTM" in text:  # TensorRT-RTX 1.7 fails on its own form of a second one of dynamic length
        from edgesep.lstm_scan import scans_for_lstms  # needs the onnx package; graphs without LSTMs do not

        text = scans_for_lstms(text)
    if library is not None:
        from edgesep.ops.onnx_forms import for_plugins  # needs the onnx package too

        trt.get_plugin_registry().load_library(str(library))
        if trt.get_plugin_registry().get_creator("SelectiveScan", "1", "edgesep") is None:
            raise BuildError(f"{version()} does not load {library}: {'; '.join(log.errors[-3:]) or 'no reason given'}")
        text = for_plugins(text)
    if not parser.parse(text):
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


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors for the exception's message and drops the chatter."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


class Runner:
    def __init__(
        self,
        folder: Path,
        files: list[str],
        precision: str,
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        del precision, threads, settings
        self.engine = folder / files[0]

    def __enter__(self) -> Self:
        raise UnsupportedError(f"{self.engine.name} was built with {version()} and needs its NVIDIA GPU to run")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise UnsupportedError(f"{self.engine.name} needs its NVIDIA GPU to run, cannot take {', '.join(feeds)} here")
