"""ONNX Runtime, CPU execution provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime

from edgesep import kernels
from edgesep.runtimes.base import Shapes
from edgesep.spec import UnsupportedError, VerificationError

PACKAGE = "onnxruntime"
PRECISIONS = ("fp32", "int8")


def version() -> str:
    return str(onnxruntime.__version__)


def build(model: Path, folder: Path, precision: str, shapes: Shapes, library: Path | None = None) -> list[str]:  # noqa: ARG001
    """The artifact is an ONNX file: ONNX Runtime compiles it at load for the CPU it meets."""
    import onnx  # on the build host alone

    from edgesep import onnx_edit

    name = f"{precision}.onnx"
    made = onnx.load(model)
    onnx_edit.gather_rows(made)
    onnx.save(made, folder / name)
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
        values = self._session.run(self._outputs, dict(feeds))
        return dict(zip(self._outputs, values, strict=True))
