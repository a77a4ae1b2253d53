"""``edgesep::BidirectionalMamba`` version 1: windows of rows through a Mamba block each way, and back to rows.

Shapes: R rows of n steps and C channels, M = n - K + 1 windows of K steps; E inner channels, N states, r the rank of
the step sizes. ``x (R, C, n)`` → ``y (R, n, C)``. Of each direction d, forwards and backwards:

    w_m = (x_m, ..., x_{m+K-1})
    u, z = In_d w_m / sqrt(mean(w_m²) + epsilon)                       ``in (2, 2, G, 3^log2(K), C, 32)``
    v = silu(conv(u))                                                  ``conv_weight (2, E, T)``, ``conv_bias (2, E)``
    t, B, C = States_d v                                               ``states (2, G, 1, E, 64)``, r + 2N outputs
    s = scan(v, Steps_d t + step_bias, A_d, B, C, D_d, z)              ``steps (2, G, 1, r, 64)``; ``A (2, E, N)``
    p_m = sum over d of Out_d s_m, + Through w_m                       ``out (2, G, 1, E, 64)``, K·C outputs
    y_n = bias + sum_k p_{n-k, k}                                      ``through (G, 3^log2(K), C, 32)``, ``bias (C)``

``conv`` and ``scan`` are ``CausalConv1dSilu`` and ``SelectiveScan`` with a softplus, from the last window for the way
back. ``in`` and ``through`` are written for a fast algorithm (``unfolded``), which needs 27 instead of 64 products for
8 taps, the other matrices as ``window_product.grouped`` has them. K is 4 or 8.

With ``bf16``, the inputs named ``PAIRED`` are rounded, and what they meet may be: they hold two rows in each int32, the
first of them in its lower half (``pairs``), and C and E are even. The scan is a rough one then.

In eight bits: with ``in_scale (2, 2, E)``, ``states_scale (2, r + 2N)`` and ``out_scale (2, K·C)``, the inputs named
``BYTES`` hold integers as ``window_product.in_bytes`` has them, of which those are the scales; E is a multiple of 4.
What they meet is rounded to eight bits, each window for itself; ``in (2, 2, G, 1, K·C/4, 256)`` meets floats where a
processor does not sum products of bytes. The scan is a rough one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgesep.ops import causal_conv, selective_scan, window_product
from edgesep.ops.window_product import GROUP, folded, from_bytes

DOMAIN, NAME, VERSION = "edgesep", "BidirectionalMamba", 1
CONVOLUTION, SCAN = ("conv_weight", "conv_bias"), ("states", "steps", "step_bias", "A", "D")
INPUTS = ("x", "in", *CONVOLUTION, *SCAN, "out", "through", "bias")
PAIRED = ("in", "states", "out", "through")
BYTES = ("in", "states", "out")
SCALES = tuple(f"{name}_scale" for name in BYTES)  # inputs behind the others, if they are there


def pairs(matrix: np.ndarray) -> np.ndarray:
    """``(..., rows, outputs)`` in bfloat16, two rows in an int32: ``(..., rows / 2, outputs)``."""
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
    return np.asarray(rounded[..., ::2, :] | rounded[..., 1::2, :] << 16, np.uint32).view(np.int32)


def unpaired(packed: np.ndarray) -> np.ndarray:
    """``pairs`` taken back, as float32."""
    bits = packed.view(np.uint32)
    halves = np.stack([bits << 16, bits & np.uint32(0xFFFF0000)], -2).view(np.float32)
    return halves.reshape(*packed.shape[:-2], -1, packed.shape[-1])


def grouped(matrices: np.ndarray) -> np.ndarray:
    """``window_product.grouped`` of each of some matrices ``(..., rows, outputs)``."""
    return _each(window_product.grouped, matrices)


def unfolded(matrices: np.ndarray, taps: int) -> np.ndarray:
    """``window_product.unfolded`` of each of some matrices ``(..., K·C, outputs)``, taps before channels."""
    return _each(lambda m: window_product.unfolded(m.reshape(taps, -1, m.shape[1])), matrices)


def in_bytes(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices ``(..., rows, outputs)`` as integers (``window_product.in_bytes``), and the scales of their columns."""
    largest = np.abs(matrices).max(-2)
    scales = np.where(largest > 0, largest, 1) / 127
    integers = np.rint(matrices / scales[..., None, :]).astype(np.int8)
    return _each(window_product.in_bytes, integers), scales.astype(np.float32)


def _each(make: Callable[[np.ndarray], np.ndarray], matrices: np.ndarray) -> np.ndarray:
    made = np.stack([make(m) for m in matrices.reshape(-1, *matrices.shape[-2:])])
    return made.reshape(*matrices.shape[:-2], *made.shape[1:])


def reference(*, epsilon: float, **given: np.ndarray) -> np.ndarray:
    """The operator in float64; of ``bf16`` and of eight bits, only the matrices are rounded."""
    g = {n: (unpaired(v) if v.dtype == np.int32 else v).astype(np.float64) for n, v in given.items()}
    rounded = "in_scale" in given
    if rounded:
        g |= {name: _of_bytes(g[name], g[f"{name}_scale"]) for name in BYTES}
    x, inner = g["x"].transpose(0, 2, 1), g["D"].shape[1]
    rows, steps, channels = x.shape
    through = folded(g["through"])
    taps = len(through)
    outputs = taps * channels
    windows = np.stack([x[:, m : m + taps].reshape(rows, outputs) for m in range(steps - taps + 1)], 1)
    normed = windows / np.sqrt(np.square(windows).mean(-1, keepdims=True) + epsilon)
    made = windows @ through.reshape(outputs, -1)[:, :outputs]
    for d, reverse in enumerate((False, True)):
        matrices = (_matrix(half) if rounded else folded(half).reshape(outputs, -1) for half in g["in"][d])
        u, z = (normed @ matrix[:, :inner] for matrix in matrices)
        v = causal_conv.reference(u, g["conv_weight"][d], g["conv_bias"][d], reverse=reverse)
        states, rank = g["A"].shape[2], g["steps"].shape[3]
        mixed = v @ _matrix(g["states"][d])[:, : rank + 2 * states]
        t, b, c = np.split(mixed, [rank, rank + states], -1)
        delta = t @ _matrix(g["steps"][d])[:, :inner]
        of = {"D": g["D"][d], "z": z, "delta_bias": g["step_bias"][d], "delta_softplus": True, "reverse": reverse}
        y, _ = selective_scan.reference(v, delta, g["A"][d], b, c, **of)
        made += y @ _matrix(g["out"][d])[:, :outputs]
    y = np.tile(g["bias"], (rows, steps, 1))
    for k in range(taps):
        y[:, k : k + windows.shape[1]] += made[..., k * channels : (k + 1) * channels]
    return np.asarray(y)


def _of_bytes(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``(..., G, 1, rows / 4, 256)`` and ``(..., outputs)`` as ``window_product.grouped`` has floats."""
    groups = integers.shape[-4]
    filled = np.zeros((*scale.shape[:-1], groups * GROUP))
    filled[..., : scale.shape[-1]] = scale
    taken = from_bytes(integers.reshape(-1, *integers.shape[-3:]))
    return taken.reshape(*integers.shape[:-2], -1, GROUP) * filled.reshape(*integers.shape[:-3], 1, 1, GROUP)


def _matrix(grouped: np.ndarray) -> np.ndarray:
    """One tap of ``window_product.grouped`` taken back, with the zeros behind the last output."""
    return grouped[:, 0].transpose(1, 0, 2).reshape(grouped.shape[2], -1)
