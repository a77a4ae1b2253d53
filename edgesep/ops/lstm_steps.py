"""``edgesep::LstmSteps`` version 1: an LSTM behind its input projection; sets of rows may read the same frames.

Shapes: L steps, N frames, S sets, R rows of a set, H hidden; ``gates (N, R, 4H)`` or ``(N·R, 4H)``, the projected
inputs with both biases; the gates in ONNX's order: input, output, forget, cell; ``recurrent (G, H, 4, 16)``, the
matrix ``(H, 4H)`` for 16 hidden channels at a time, zeros behind the last one (``grouped``); ``initial_h,
initial_c (1, S·R, H)``; ``order (L, S)`` int64, the frame that a set reads at a step, negative where its state stays as
it is; without it one set reads one frame after another.

    g = gates_{order_ls} + h recurrent
    c = sigmoid(g_f) c + sigmoid(g_i) tanh(g_c)
    h = sigmoid(g_o) tanh(c)

The matrix may be in eight bits (``in_bytes``): ``recurrent (G, ceil(H/4), 4, 64)`` int8, four of its rows side by side
for each of 16 channels, and ``scale (G, 4, 16)``. Then h may be rounded to steps of 1/127 in its product, where the
processor sums products of integers.

Gives ``y (L, 1, S·R, H)``, h after every step, and the last h and c, as ONNX's LSTM does.
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "LstmSteps", 1
GROUP = 16  # a cache line of floats


def grouped(recurrent: np.ndarray) -> np.ndarray:
    """``(H, 4H)`` as the kernels read it."""
    hidden = recurrent.shape[0]
    filled = np.pad(recurrent.reshape(hidden, 4, hidden), [(0, 0), (0, 0), (0, -hidden % GROUP)])
    return np.ascontiguousarray(filled.reshape(hidden, 4, -1, GROUP).transpose(2, 0, 1, 3))


def in_bytes(recurrent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grouped matrix in eight bits, and its scale: one for each channel of each gate."""
    groups, hidden, gates, size = recurrent.shape
    largest = np.abs(recurrent).max(1)
    scale = (np.where(largest > 1e-30, largest, 1) / 127).astype(np.float32)
    integers = np.rint(recurrent / scale[:, None]).astype(np.int8)
    filled = np.pad(integers, [(0, 0), (0, -hidden % 4), (0, 0), (0, 0)])
    quads = filled.reshape(groups, -1, 4, gates, size).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(quads.reshape(groups, -1, gates, 4 * size)), scale


def from_bytes(integers: np.ndarray, scale: np.ndarray, hidden: int) -> np.ndarray:
    """``in_bytes`` taken back, but for its rounding."""
    groups, quads, gates, wide = integers.shape
    apart = integers.reshape(groups, quads, gates, wide // 4, 4).transpose(0, 1, 4, 2, 3)
    return np.asarray(apart.reshape(groups, 4 * quads, gates, wide // 4)[:, :hidden] * scale[:, None])


def reference(
    gates: np.ndarray,
    recurrent: np.ndarray,
    initial_h: np.ndarray,
    initial_c: np.ndarray,
    order: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps in float64; h is not rounded."""
    hidden = initial_h.shape[-1]
    recurrent = recurrent if scale is None else from_bytes(recurrent, scale, hidden)
    matrix = recurrent.transpose(1, 2, 0, 3).reshape(hidden, 4, -1)[..., :hidden].reshape(hidden, -1).astype(np.float64)
    sets = 1 if order is None else order.shape[1]
    h, c = (v.astype(np.float64).reshape(sets, -1, hidden) for v in (initial_h, initial_c))
    frames = gates.astype(np.float64).reshape(-1, h.shape[1], 4 * hidden)
    made = []
    for read in np.arange(len(frames))[:, None] if order is None else order:
        g = frames[np.maximum(read, 0)] + h @ matrix
        opened, out, kept = (1 / (1 + np.exp(-part)) for part in np.split(g, 4, -1)[:3])
        moves = (read >= 0)[:, None, None]
        c = np.where(moves, kept * c + opened * np.tanh(g[..., 3 * hidden :]), c)
        h = np.where(moves, out * np.tanh(c), h)
        made.append(h)
    shape = initial_h.shape
    return np.stack(made).reshape(-1, *shape), h.reshape(shape), c.reshape(shape)
