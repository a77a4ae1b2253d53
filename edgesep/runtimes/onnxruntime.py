"""ONNX Runtime, CPU execution provider."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime

from edgesep import kernels
from edgesep.runtimes.base import IN_FLOAT, Executed, Int8Form, Shapes, started
from edgesep.spec import UnsupportedError, VerificationError, refuse_shapes

PACKAGE = "onnxruntime"
PRECISIONS = ("fp32", "fp16", "int8")
# A convolution between DequantizeLinear and anything else would be computed in float.
INT8 = Int8Form(outputs=True, recurrent=True, narrow=True)
FUSES = True  # its adapter has the kernels of fused units
ROWS = True  # its Scan copies nothing
PROFILED = 5  # queries
#: setting → what may be tried instead of the default. Idle threads that do not spin leave the core to others between
#: calls; without an arena every tensor is asked of the system; blocks share uneven work among threads. A memory pattern
#: plans one block for all tensors of a query of known shapes: some microseconds faster, but each length gets a block
#: of its own, half as large again as what the tensors need in turn.
SETTINGS = {"spin": (False,), "arena": (False,), "dynamic_blocks": (4,), "pattern": (True,)}
STREAM_SETTINGS = {"pattern": True}  # of one shape for ever, and in a hurry
LOW = {"int8": {"int8", "uint8"}, "fp16": {"float16"}}
BODIES = ("Scan", "Loop", "If")  # their nodes have entries of their own
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")


def version() -> str:
    return str(onnxruntime.__version__)


def build(model: Path, folder: Path, precision: str, shapes: Shapes, library: Path | None = None) -> list[str]:  # noqa: ARG001
    """The artifact is an ONNX file: ONNX Runtime compiles it at load for the CPU it meets."""
    from edgesep.onnxruntime_form import for_onnxruntime  # on the build host alone

    if precision == "fp16" and library is not None:
        raise UnsupportedError('the native kernels compute in float32; leave ops = "portable" for this target')
    name = f"{precision}.onnx"
    (folder / name).write_bytes(for_onnxruntime(model.read_bytes(), narrow=precision == "int8"))
    return [name]


def executed(
    folder: Path, files: list[str], precision: str, threads: int | None, feeds: Mapping[str, np.ndarray]
) -> list[Executed]:
    """The kernels of one query, from ONNX Runtime's own profile (the mean of several queries)."""
    times: dict[tuple[str, str], float] = defaultdict(float)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Runner(folder, files, precision, threads, profile=Path(scratch)) as runner,
    ):
        given = {**feeds, **started(runner.described)}
        for _ in range(PROFILED):
            runner.run(given)
        events = json.loads(Path(runner.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            args = event["args"]
            kinds = [kind for given in args.get("input_type_shape", []) for kind in given]
            low = next((p for p, types in LOW.items() if types.intersection(kinds)), "fp32")
            operator = args["op_name"]
            if operator in BODIES:
                continue
            kind = "conversion" if operator in CONVERSIONS else "fp32" if operator in IN_FLOAT else low
            times[operator, kind] += event["dur"] / 1e3 / PROFILED
    return [Executed(*key, ms=ms) for key, ms in times.items()]


class Runner:
    """An ``InferenceSession``.

    Args:
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
        settings: values for some of ``SETTINGS``.
        profile: folder for a profile of every query.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str],
        precision: str,
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        profile: Path | None = None,
    ):
        if precision not in PRECISIONS:
            raise UnsupportedError(f"onnxruntime runs {', '.join(PRECISIONS)}, not {precision!r}")
        self.model, self.threads, self.settings = folder / files[0], threads, settings or {}
        self.files, self.profile = files, profile

    def __enter__(self) -> Self:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads:
            options.intra_op_num_threads = self.threads
        spin = self.settings.get("spin", True)
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        if blocks := self.settings.get("dynamic_blocks"):
            options.add_session_config_entry("session.dynamic_block_base", str(blocks))
        options.enable_cpu_mem_arena = self.settings.get("arena", True)
        options.enable_mem_pattern = self.settings.get("pattern", False)
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / "profile")
        library = kernels.library_among(PACKAGE, self.model.parent, self.files)
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            self._session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the pybind layer has no common base class for its errors
            raise VerificationError(f"ONNX Runtime {version()} does not load {self.model}: {e}") from e
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.described = self._session.get_modelmeta().custom_metadata_map.get("edgesep", "")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    def end_profiling(self) -> str:
        """The profile's file."""
        return str(self._session.end_profiling())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as e:  # the pybind layer has no common base class for its errors
            refuse_shapes(feeds, {i.name: i.shape for i in self._session.get_inputs()})
            raise VerificationError(f"ONNX Runtime failed on {self.model}: {e}") from e
        return dict(zip(self._outputs, values, strict=True))

    def bound(self, feeds: dict[str, np.ndarray]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        refuse_shapes(feeds, {i.name: i.shape for i in self._session.get_inputs()})
        session, binding = self._session, self._session.io_binding()
        narrow = started(self.described)
        feeds.update(narrow)
        types = {f"next_{name}": state.dtype for name, state in narrow.items()}
        made = {o.name: np.empty(o.shape, types.get(o.name, np.float32)) for o in session.get_outputs()}
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in made.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._held = dict(feeds)  # the binding knows addresses alone

        def run(_: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            session.run_with_iobinding(binding)
            return made

        return run
