"""``edgesep::HeadNorm`` version 1: heads of a projection apart, each normalized over its features and all bins.

Shapes: N frames, F bins, h heads of d features; ``x (…, C)``, anything that holds N·F rows of C channels, of which
those from ``first`` on are the heads, one behind another; ``gain, bias (h, F, d)``; ``slope (h·d)``, perhaps; ``y (1,
h, N, F·d)``.

    v = max(x, slope x)
    y = gain (v - mean(v)) / sqrt(var(v) + epsilon) + bias          mean and variance over (F, d)
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "HeadNorm", 1


def reference(
    x: np.ndarray,
    gain: np.ndarray,
    bias: np.ndarray,
    slope: np.ndarray | None = None,
    *,
    first: int = 0,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """The norm in float64."""
    heads, bins, features = gain.shape
    v = x.astype(np.float64)[..., first : first + heads * features]
    if slope is not None:
        v = np.maximum(v, slope * v)
    v = v.reshape(-1, bins, heads, features).transpose(2, 0, 1, 3)
    mean, variance = v.mean((2, 3), keepdims=True), v.var((2, 3), keepdims=True)
    y = gain[:, None] * (v - mean) / np.sqrt(variance + epsilon) + bias[:, None]
    return np.asarray(y.reshape(1, heads, -1, bins * features))
