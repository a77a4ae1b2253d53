"""OpenVINO, CPU device. The inference precision is always pinned: its own default on CPUs with bf16 is bf16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import openvino

from edgesep import kernels
from edgesep.runtimes.base import IN_FLOAT, Executed, Int8Form, Shapes, started
from edgesep.spec import BuildError, UnsupportedError, VerificationError, refuse_shapes

PACKAGE = "openvino"
INT8 = Int8Form(narrow=True)
#: precision of an artifact → inference precision hint; what is not quantized in an int8 graph stays f32.
PRECISIONS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}
FUSES = True  # its adapter has the kernels of fused units
FIXES_LENGTH = True  # a model compiled for one length computes no shapes in a call
PROFILED = 5  # queries
#: setting → what may be tried instead of the default: where threads run, and whether on both halves of a core.
SETTINGS = {"pinning": (False,), "hyper_threading": (False,)}
DESCRIBED = ["framework", "edgesep"]  # where it puts what an ONNX file says of itself
PROPERTIES = {"pinning": "ENABLE_CPU_PINNING", "hyper_threading": "ENABLE_HYPER_THREADING"}


def version() -> str:
    return str(openvino.__version__).split("-")[0]


def _core(library: Path | None) -> openvino.Core:
    """A core that knows the project's operators, if there is a library."""
    core = openvino.Core()
    if library is not None:
        core.add_extension(str(library))
    return core


def build(model: Path, folder: Path, precision: str, shapes: Shapes, library: Path | None = None) -> list[str]:  # noqa: ARG001
    """The artifact is an ONNX file, which OpenVINO reads as fast as its own IR and compiles to the very same: that is
    text, up to fifteen times the size for a small separator, and not backward-compatible."""
    from edgesep.openvino_form import for_openvino  # on the build host alone

    if precision not in PRECISIONS:
        raise UnsupportedError(f"openvino runs {', '.join(PRECISIONS)}, not {precision!r}")
    name = f"{precision}.onnx"
    (folder / name).write_bytes(for_openvino(model.read_bytes(), narrow=precision == "int8"))
    try:
        _core(library).read_model(folder / name)
    except RuntimeError as e:
        raise BuildError(f"OpenVINO {version()} does not read {model.name}: {e}") from e
    return [name]


def executed(
    folder: Path, files: list[str], precision: str, threads: int | None, feeds: Mapping[str, np.ndarray]
) -> list[Executed]:
    """The kernels of one query, from OpenVINO's performance counters."""
    times: dict[tuple[str, str], float] = defaultdict(float)
    with Runner(folder, files, precision, threads, profile=True) as runner:
        given, narrow = {**feeds, **started(runner.described)}, set[str]()
        for turn in range(PROFILED + 1):
            runner.run(given)
            if not turn:
                narrow = runner.with_weights_in_bytes()
                continue  # the first query prepares memory
            for done in runner.profiling_info():
                ran = done.exec_type.rpartition("_")[2].lower()
                low = {"i8": "int8", "u8": "int8", "bf16": "bf16", "fp16": "fp16"}.get(ran, "fp32")
                name = "conversion" if done.node_type in ("FakeQuantize", "Convert") else low
                # an operator of our own is "Reference" to OpenVINO; its name ends in what it is
                kind = done.node_name.rpartition("/")[2] if done.node_type == "Reference" else done.node_type
                if done.node_type == "Reference" and done.node_name in narrow and kind not in IN_FLOAT:
                    name = "int8"
                times[kind, name] += done.real_time.total_seconds() * 1e3 / PROFILED
    return [Executed(*key, ms=ms) for key, ms in times.items() if ms]


class Runner:
    """A compiled model with one inference request.

    Args:
        threads: inference threads; None leaves the choice to OpenVINO.
        settings: values for some of ``SETTINGS``; ``fixed_length``: compile for the shapes of a query, and again when
            another has other shapes.
        profile: count each kernel's time.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str],
        precision: str,
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        profile: bool = False,
    ):
        if precision not in PRECISIONS:
            raise UnsupportedError(f"openvino runs {', '.join(PRECISIONS)}, not {precision!r}")
        self.model, self.precision, self.threads = folder / files[0], precision, threads
        self.files, self.profile, self.settings = files, profile, settings or {}

    def __enter__(self) -> Self:
        library = kernels.library_among(PACKAGE, self.model.parent, self.files)
        try:
            self._core = _core(library)  # the extension holds the code of the compiled nodes
            read = self._core.read_model(self.model)
        except RuntimeError as e:
            raise VerificationError(f"OpenVINO {version()} does not load {self.model}: {e}") from e
        self._shapes = {
            i.any_name: [n.get_length() if n.is_static else None for n in i.partial_shape] for i in read.inputs
        }
        self.described = str(read.get_rt_info(DESCRIBED).astype(str)) if read.has_rt_info(DESCRIBED) else ""
        self._request: Any = None
        self._fitted: dict[str, tuple[int, ...]] | None = None  # shapes that it was compiled for
        if not self.settings.get("fixed_length"):
            self._compile(read)
        return self

    def _compile(self, read: openvino.Model) -> None:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
            **{PROPERTIES[name]: value for name, value in self.settings.items() if name in PROPERTIES},
        }
        if self.threads:
            options["INFERENCE_NUM_THREADS"] = self.threads
        if self.profile:
            options["PERF_COUNT"] = True
        try:
            compiled = self._core.compile_model(read, "CPU", options)
        except RuntimeError as e:
            raise VerificationError(f"OpenVINO {version()} does not load {self.model}: {e}") from e
        self._request = compiled.create_infer_request()
        self._outputs = [(name, o) for o in compiled.outputs for name in o.names]  # one tensor may have several names

    def _fit(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Compile for the shapes of these, if it is not."""
        shapes = {name: array.shape for name, array in feeds.items()}
        if not self.settings.get("fixed_length") or shapes == self._fitted:
            return
        refuse_shapes(feeds, self._shapes)
        read = self._core.read_model(self.model)
        read.reshape({name: list(shape) for name, shape in shapes.items()})
        self._compile(read)
        self._fitted = shapes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._request, self._core

    def profiling_info(self) -> list[Any]:
        """Each kernel's time in the last query."""
        return list(self._request.profiling_info)

    def with_weights_in_bytes(self) -> set[str]:
        """Names of the kernels that read signed bytes."""
        compiled = self._request.get_compiled_model().get_runtime_model()
        reading = ((op.friendly_name, {i.get_element_type() for i in op.inputs()}) for op in compiled.get_ordered_ops())
        return {name for name, types in reading if openvino.Type.i8 in types}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._fit(feeds)
        try:
            result = self._request.infer(dict(feeds))
        except RuntimeError as e:
            refuse_shapes(feeds, self._shapes)
            raise VerificationError(f"OpenVINO failed on {self.model}: {e}") from e
        return {name: np.array(result[port]) for name, port in self._outputs}

    def bound(self, feeds: dict[str, np.ndarray]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        refuse_shapes(feeds, self._shapes)
        self._fit(feeds)
        request = self._request
        feeds.update(started(self.described))
        arrays = {port.any_name: np.empty(tuple(port.shape), port.element_type.to_dtype()) for _, port in self._outputs}
        made = {name: arrays[port.any_name] for name, port in self._outputs}
        for name, array in (*feeds.items(), *arrays.items()):
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def run(_: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            request.start_async()
            request.wait()
            return made

        return run
