"""``edgesep::CausalConv1dSilu`` version 1: Mamba's depthwise convolution over the past, with its activation.

Shapes: ``x, y (b, L, D)``, ``weight (D, taps)``, ``bias (D)``.

    y_t = silu(bias + sum_k weight_k ∘ x_{t - taps + 1 + k})      zeros before the start; from the end if ``reverse``

``reference`` is the meaning (numpy, float64); ``causal_conv_torch`` holds the torch form.
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "CausalConv1dSilu", 1
MAX_TAPS = 8  # of the native kernels


def reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, reverse: bool = False) -> np.ndarray:
    """The convolution in float64.

    Raises:
        ValueError: shapes that do not belong together; the message names the tensor.
    """
    check(x=x.shape, weight=weight.shape, bias=bias.shape)
    if reverse:
        return reference(x[:, ::-1], weight, bias)[:, ::-1]
    taps, length = weight.shape[1], x.shape[1]
    padded = np.pad(x.astype(np.float64), ((0, 0), (taps - 1, 0), (0, 0)))
    y = bias + sum(padded[:, k : k + length] * weight[:, k] for k in range(taps))
    return y / (1 + np.exp(-y))


def check(*, x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    """Refuse shapes that do not belong together."""
    if len(x) != 3 or 0 in x:
        raise ValueError(f"x has shape {tuple(x)}, expected (batch, length, channels), none of them 0")
    if len(weight) != 2 or weight[0] != x[2] or not 1 <= weight[1] <= MAX_TAPS:
        raise ValueError(f"weight has shape {tuple(weight)}, expected ({x[2]}, 1 to {MAX_TAPS}) beside x {tuple(x)}")
    if tuple(bias) != (x[2],):
        raise ValueError(f"bias has shape {tuple(bias)}, expected ({x[2]},) beside x {tuple(x)}")
