"""ONNX Runtime, CPU execution provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime

from edgesep import kernels
from edgesep.runtimes.base import Shapes
from edgesep.spec import UnsupportedError, VerificationError, refuse_shapes

PACKAGE = "onnxruntime"
PRECISIONS = ("fp32", "int8")


def version() -> str:
    return str(onnxruntime.__version__)


def build(model: Path, folder: Path, precision: str, shapes: Shapes, library: Path | None = None) -> list[str]:  # noqa: ARG001
    """The artifact is an ONNX file: ONNX Runtime compiles it at load for the CPU it meets."""
    from edgesep.onnx_edit import gathering_rows  # on the build host alone

    name = f"{precision}.onnx"
    (folder / name).write_bytes(gathering_rows(model.read_bytes()))
    return [name]


class Runner:
    """An ``InferenceSession``.

    Args:
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
        spin: whether idle threads spin, ONNX Runtime's default: fastest, and a busy core between calls.
    """

    def __init__(self, folder: Path, files: list[str], precision: str, threads: int | None = None, spin: bool = True):
        if precision not in PRECISIONS:
            raise UnsupportedError(f"onnxruntime runs {' and '.join(PRECISIONS)}, not {precision!r}")
        self.model, self.threads, self.spin = folder / files[0], threads, spin
        self.files = files

    def __enter__(self) -> Self:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads:
            options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        library = kernels.library_among(PACKAGE, self.model.parent, self.files)
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            self._session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the pybind layer has no common base class for its errors
            raise VerificationError(f"ONNX Runtime {version()} does not load {self.model}: {e}") from e
        self._outputs = [o.name for o in self._session.get_outputs()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as e:  # the pybind layer has no common base class for its errors
            refuse_shapes(feeds, {i.name: i.shape for i in self._session.get_inputs()})
            raise VerificationError(f"ONNX Runtime failed on {self.model}: {e}") from e
        return dict(zip(self._outputs, values, strict=True))

    def bound(self, feeds: Mapping[str, np.ndarray]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        refuse_shapes(feeds, {i.name: i.shape for i in self._session.get_inputs()})
        session, binding = self._session, self._session.io_binding()
        made = {o.name: np.empty(o.shape, np.float32) for o in session.get_outputs()}
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name, array in made.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._held = dict(feeds)  # the binding knows addresses alone

        def run(_: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            session.run_with_iobinding(binding)
            return made

        return run
