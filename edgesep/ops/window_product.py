"""``edgesep::WindowProduct`` version 1: windows of rows meet a matrix, and what follows it.

Shapes: M windows of K taps, C inputs, N outputs; ``x``, anything that holds rows of C; ``index (M, K)`` int64, the rows
that a window is made of, -1 for one of zeros; without it K is 1 and the rows are the windows. ``weight (G, K, C, 64)``,
the matrix ``(K·C, N)`` for 64 outputs at a time, zeros behind the last one (``grouped``); ``bias, slope (N)``;
``residual``, anything that holds M·N; ``y (M, N)``. Only ``x``, ``weight`` and ``bias`` must be there.

    v_m = bias + sum_k x_{index[m, k]} W_k
    y_m = max(v_m, slope v_m) + residual_m
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "WindowProduct", 1
GROUP = 64  # outputs of which the kernels hold the sums of a few windows at a time


def grouped(weight: np.ndarray, taps: int = 1) -> np.ndarray:
    """``(K·C, N)`` as the kernels read it."""
    rows, outputs = weight.shape
    filled = np.pad(weight, [(0, 0), (0, -outputs % GROUP)])
    return np.ascontiguousarray(filled.reshape(taps, rows // taps, -1, GROUP).transpose(2, 0, 1, 3))


def reference(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    index: np.ndarray | None = None,
    slope: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """The product in float64."""
    taps, inputs = weight.shape[1:3]
    matrix = weight.astype(np.float64).transpose(1, 2, 0, 3).reshape(taps * inputs, -1)[:, : bias.size]
    rows = np.concatenate([x.astype(np.float64).reshape(-1, inputs), np.zeros((1, inputs))])  # -1 is the last one
    windows = rows[:-1] if index is None else rows[index].reshape(len(index), -1)
    y = windows @ matrix + bias
    if slope is not None:
        y = np.maximum(y, slope * y)
    return np.asarray(y if residual is None else y + residual.reshape(y.shape))
