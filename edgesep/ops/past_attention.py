"""``edgesep::PastAttention`` version 1: the frames of a call attend to a ring of past ones and to each other.

Shapes: B batch, h heads, N frames, T past frames; ``q, k (B, h, N, d)``, ``v, y (B, h, N, e)``; ``past_k (B, h, T,
d)``, ``past_v (B, h, T, e)``; ``hidden (N, T + N)``: 0, or minus infinity for what a frame must not see.

    s = q [past_k; k]' + hidden,  y = softmax(s) [past_v; v]

The past may be uint8: with an attribute ``k_scale`` (``v_scale``) other than 0 it is scale · (integer - zero). Then a
query may be rounded to 15 bits, and what a frame's past weighs to eight, where the processor sums products of integers.
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "PastAttention", 1


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    past_k: np.ndarray,
    past_v: np.ndarray,
    hidden: np.ndarray,
    *,
    k_scale: float = 0.0,
    k_zero: float = 0.0,
    v_scale: float = 0.0,
    v_zero: float = 0.0,
) -> np.ndarray:
    """The attention in float64."""
    keys = np.concatenate([_value(past_k, k_scale, k_zero), k.astype(np.float64)], 2)
    values = np.concatenate([_value(past_v, v_scale, v_zero), v.astype(np.float64)], 2)
    scores = q.astype(np.float64) @ keys.swapaxes(2, 3) + hidden
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ values)


def _value(past: np.ndarray, scale: float, zero: float) -> np.ndarray:
    return past.astype(np.float64) if scale == 0 else scale * (past.astype(np.float64) - zero)
