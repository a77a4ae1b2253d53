"""The kernels' C structures, and their calls over numpy arrays: what a device without torch can test and time.

Shapes as in ``selective_scan`` and ``causal_conv``; ``core/*.h`` holds the structures' meaning.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgesep import kernels
from edgesep.ops import selective_scan
from edgesep.spec import UnsupportedError

FLOATS, SIZE, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SCAN_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SCAN_SIZES = ("batch", "length", "channels", "state")
CONV_SIZES = ("batch", "length", "channels", "taps")


def _fields(pointers: Iterable[str], sizes: Iterable[str], flags: Iterable[str]) -> list[tuple[str, Any]]:
    return [(n, FLOATS) for n in pointers] + [(n, SIZE) for n in sizes] + [(n, FLAG) for n in flags]


class Scan(ctypes.Structure):
    """EdgesepScan."""

    _fields_ = _fields(
        (*SCAN_INPUTS, "initial_state", "low", "steps", "y", "last_state"),
        (*SCAN_SIZES, "rank"),
        ("delta_softplus", "reverse", "rough", "grouped"),
    )


class ScanBackward(ctypes.Structure):
    """EdgesepScanBackward."""

    _fields_ = _fields(
        (*SCAN_INPUTS, "dy", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "workspace"),
        SCAN_SIZES,
        ("delta_softplus", "reverse"),
    )


class Conv(ctypes.Structure):
    """EdgesepConv."""

    _fields_ = _fields(("x", "w", "bias", "y"), CONV_SIZES, ("reverse", "rough"))


class ConvBackward(ctypes.Structure):
    """EdgesepConvBackward."""

    _fields_ = _fields(("x", "w", "bias", "dy", "dx", "dw", "dbias"), CONV_SIZES, ("reverse",))


def scan(
    inputs: Mapping[str, np.ndarray], y: np.ndarray | None = None, *, threads: int = 1, **flags: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The native scan: float32 arrays by the contract's names → ``y`` (written to the array given) and the last state.

    Raises:
        ValueError: shapes that do not belong together.
        UnsupportedError, BuildError: more states than the kernels take, or no kernels and none can be built here.
    """
    if absent := [k for k in SCAN_INPUTS[:5] if k not in inputs]:
        raise ValueError(f"{absent[0]} is missing")
    selective_scan.check(**{k: v.shape for k, v in inputs.items()})
    if inputs["A"].shape[1] > selective_scan.MAX_STATE:
        raise UnsupportedError(f"A has {inputs['A'].shape[1]} states, the kernels take {selective_scan.MAX_STATE}")
    if y is not None and (y.dtype != np.float32 or y.shape != inputs["u"].shape or not y.flags.c_contiguous):
        raise ValueError(f"y is {y.dtype} {y.shape}, expected contiguous float32 {inputs['u'].shape}")
    dense = {k: np.ascontiguousarray(v, np.float32) for k, v in inputs.items()}
    sizes = (*dense["u"].shape, dense["A"].shape[1])
    dense["y"] = np.empty_like(dense["u"]) if y is None else y
    dense["last_state"] = np.empty((sizes[0], sizes[2], sizes[3]), np.float32)
    call = Scan(**{k: v.ctypes.data for k, v in dense.items()}, **dict(zip(SCAN_SIZES, sizes, strict=True)), **flags)
    library = kernels.core()
    kernels.split(library.edgesep_scan, call, library.edgesep_scan_rows(ctypes.byref(call)), threads)
    return dense["y"], dense["last_state"]
