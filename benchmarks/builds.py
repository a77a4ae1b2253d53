"""What the benchmarks compare: this toolkit's builds of an exported graph, and other tools' INT8 of the same graph.

Other tools' quantizers run in processes of their own with bounded memory: some keep every activation.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from candidate import first_line
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from edgesep import kernels
from edgesep.ops import onnx_forms
from edgesep.runtimes import runtime

#: what of a graph ONNX Runtime's quantizer takes: all that it can, or products alone
STATIC = {"all": None, "products": ["Conv", "MatMul", "Gemm"]}


def built(source: Path, kind: str, precision: str, folder: Path, native: bool) -> list[str]:
    """Build an exported graph for a runtime; the artifact's files, with the kernels if it is native."""
    folder.mkdir()
    module, library = runtime(kind), kernels.library(kind) if native else None
    onnx_forms.write_form(source, folder / "model.onnx", module, native=native, precision=precision)
    files = list(module.build(folder / "model.onnx", folder, precision, {}, library))
    if library:
        files.append(Path(shutil.copy(library, folder / kernels.file_name(kind))).name)
    return files


class Reader(CalibrationDataReader):
    """Hands a quantizer one set of inputs after another."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self.left = iter(feeds)

    def get_next(self) -> Any:
        return next(self.left, None)


def statically_quantized(
    plain: Path, feeds: Sequence[dict[str, np.ndarray]], folder: Path
) -> Iterator[tuple[str, Path | str]]:
    """ONNX Runtime's static quantizer with default options, by choice of ``STATIC``: a file, or why none."""
    for what, only in STATIC.items():
        file = folder / f"static-{what}.onnx"
        yield what, _apart(_static, plain, file, feeds, only) or file


def nncf_quantized(
    plain: Path, feeds: Sequence[dict[str, np.ndarray]], shapes: dict[str, tuple[int, ...]], folder: Path
) -> Path | str:
    """NNCF with default options, which takes static shapes alone: OpenVINO's file, or why there is none."""
    file = folder / "nncf.xml"
    return _apart(_nncf, plain, file, feeds, shapes) or file


def _static(plain: Path, file: Path, feeds: Sequence[dict[str, np.ndarray]], only: list[str] | None) -> None:
    quantize_static(plain, file, Reader(feeds), op_types_to_quantize=only)


def _nncf(plain: Path, file: Path, feeds: Sequence[dict[str, np.ndarray]], shapes: dict[str, tuple[int, ...]]) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(plain)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    fitting = [{name: np.resize(v, shapes[name]) for name, v in feed.items()} for feed in feeds]
    quantized = nncf.quantize(model, nncf.Dataset(fitting), subset_size=len(fitting))
    openvino.save_model(quantized, file, compress_to_fp16=False)


def _apart(make: Callable[..., None], *given: Any) -> str:
    """Run in a fresh process; why it failed, or nothing. Whatever a peer's tool raises is its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _bounded) as pool:
        try:
            pool.submit(make, *given).result()
        except MemoryError:
            return f"takes more than {_most_memory() / 2**30:.0f} GB of memory"
        except Exception as e:
            return first_line(e)
    return ""


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_most_memory(), _most_memory()))


def _most_memory() -> int:
    """Three quarters of the machine's, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
