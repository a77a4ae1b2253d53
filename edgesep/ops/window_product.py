"""``edgesep::WindowProduct`` version 1: windows of rows meet a matrix, and what follows it.

Shapes: M windows of K taps, C inputs, N outputs; ``x``, anything that holds rows of C; ``index (M, K)`` int64, the rows
that a window is made of, -1 for one of zeros; without it K is 1 and the rows are the windows. ``weight (G, K, C, 64)``,
the matrix ``(K·C, N)`` for 64 outputs at a time, zeros behind the last one (``grouped``); ``bias, slope (N)``;
``residual``, anything that holds M·N; ``y (M, N)``. Only ``x``, ``weight`` and ``bias`` must be there.

In eight bits: with ``scale (N)``, ``x`` is rounded to integers q by the attributes ``x_scale`` and ``x_zero``, as
QuantizeLinear does to uint8, and ``weight`` holds integers, ``(G, K, C/4, 256)`` int8, four inputs side by side
(``in_bytes``). Then v = bias + scale · sum q W, and ``bias`` makes up for the zero point.

Where windows are one row behind the one before, as in a convolution, ``weight`` may be written for a fast algorithm:
``(G, 3^log2(K), C, 32)``, K 4 or 8 (``unfolded``). For K windows it needs 9 instead of 16 products, or 27 instead of
64. Where a window is not, a new round begins.

    v_m = bias + sum_k x_{index[m, k]} W_k
    y_m = max(v_m, slope v_m) + residual_m
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "WindowProduct", 1
GROUP = 64  # outputs of which the kernels hold the sums of a few windows at a time
UNFOLDED_GROUP = 32  # outputs of the fast algorithm
TAPS = (4, 8)  # that it takes


def grouped(weight: np.ndarray, taps: int = 1) -> np.ndarray:
    """``(K·C, N)`` as the kernels read it."""
    rows, outputs = weight.shape
    filled = np.pad(weight, [(0, 0), (0, -outputs % GROUP)])
    return np.ascontiguousarray(filled.reshape(taps, rows // taps, -1, GROUP).transpose(2, 0, 1, 3))


def in_bytes(weight: np.ndarray, taps: int = 1) -> np.ndarray:
    """``(K·C, N)`` int8 as the kernels read it; C a multiple of 4."""
    groups = grouped(weight, taps)
    quads = groups.reshape(*groups.shape[:2], -1, 4, GROUP).swapaxes(3, 4)
    return np.ascontiguousarray(quads.reshape(*quads.shape[:3], -1))


def from_bytes(weight: np.ndarray) -> np.ndarray:
    """``in_bytes`` taken back: as ``grouped``."""
    quads = weight.reshape(*weight.shape[:3], GROUP, 4).swapaxes(3, 4)
    return quads.reshape(*weight.shape[:2], -1, GROUP)


def sums(taps: int) -> np.ndarray:
    """``(3^log2(K), K)``: which taps the fast algorithm adds up.

    Both halves of the taps, the lower one and the upper one, and so again for each half.
    """
    halves = np.array([[1, 1], [1, 0], [0, 1]])
    return np.ones((1, 1)) if taps == 1 else np.kron(halves, sums(taps // 2))


def unfolded(weight: np.ndarray) -> np.ndarray:
    """``(K, C, N)``, one matrix a tap, as the fast algorithm reads it: ``(G, 3^log2(K), C, 32)``."""
    parts = np.tensordot(sums(len(weight)), weight.astype(np.float64), 1)
    filled = np.pad(parts, [(0, 0), (0, 0), (0, -parts.shape[2] % UNFOLDED_GROUP)])
    split = filled.reshape(*parts.shape[:2], -1, UNFOLDED_GROUP)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3), np.float32)


def single(parts: int) -> np.ndarray:
    """Which of the sums are one tap, in their order."""
    made = next(made for made in map(sums, TAPS) if len(made) == parts)
    return np.array([np.flatnonzero((made == row).all(1))[0] for row in np.eye(made.shape[1])])


def folded(parts: np.ndarray) -> np.ndarray:
    """``unfolded`` taken back: ``(K, C, 32·G)``."""
    taps = parts[:, single(parts.shape[1])]
    return np.asarray(taps.transpose(1, 2, 0, 3).reshape(*taps.shape[1:3], -1))


def rounds(index: np.ndarray) -> int:
    """How many times the fast algorithm begins with windows of those rows: each time it takes K or fewer.

    A window is one row behind another that stands as far before it as the first window before the first such one.
    """
    windows, taps = index.shape
    apart = next((d for d in range(1, windows) if (index[d, :-1] == index[0, 1:]).all()), 1)
    follows = np.zeros(windows + apart, bool)
    follows[apart:windows] = (index[apart:, :-1] == index[:-apart, 1:]).all(1)
    taken, found = np.zeros(windows, bool), 0
    for first in range(windows):
        if not taken[first]:
            found += 1
            for m in range(first, min(windows, first + taps * apart), apart):
                if taken[m] or (m > first and not follows[m]):
                    break
                taken[m] = True
    return found


def reference(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    index: np.ndarray | None = None,
    slope: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    *,
    x_scale: float = 1.0,
    x_zero: int = 0,
) -> np.ndarray:
    """The product in float64."""
    if scale is not None:
        weight, x = from_bytes(weight), np.clip(np.rint(x / np.float32(x_scale)) + x_zero, 0, 255)
    inputs = weight.shape[2]
    weight = weight.astype(np.float64)
    unwrapped = weight.transpose(1, 2, 0, 3) if weight.shape[3] == GROUP else folded(weight)
    matrix = unwrapped.reshape(unwrapped.shape[0] * inputs, -1)[:, : bias.size]
    nothing = np.full((1, inputs), x_zero)
    rows = np.concatenate([x.astype(np.float64).reshape(-1, inputs), nothing])  # -1 is the last one
    windows = rows[:-1] if index is None else rows[index].reshape(len(index), -1)
    y = windows @ matrix * (1 if scale is None else scale) + bias
    if slope is not None:
        y = np.maximum(y, slope * y)
    return np.asarray(y if residual is None else y + residual.reshape(y.shape))
