"""``edgesep::ConvNorm``, ``GlobalStats`` and ``PooledSum`` version 1: what ``edgesep.fusion`` writes units as.

Shapes: rows ``x (batch, frames_in, C)``, perhaps with an axis of one behind the batch; ``weight (taps, C)``, taps 1, 3,
5 or 7; vectors ``bias, gamma, beta, x_bias, x_gamma, x_beta (C)``; ``gate, shift (batch, coarse, C)``;
``x_shift (batch, x_coarse, C)``; ``index (frames)``, ``x_index (frames_in)``; statistics ``(batch, 2)``: mean and
1 / deviation over channels and frames. frames = (frames_in - 1) // stride + 1.

    u_i   = act(x_gamma (x_i + x_bias - mean) rstd + x_beta) + x_shift_{x_index[i]}      mean, rstd from x_stats
    y_t   = bias + sum_k weight_k u_{t stride - taps // 2 + k}                           zeros beyond the ends
    out_t = act(gamma (y_t - mean) rstd + beta) gate_{index[t]} + shift_{index[t]}       mean, rstd of y

Every input but ``x`` may be missing, and its step with it. ``act`` is the identity, a leaky ReLU of ``slope`` (of
``x_slope`` where ``x`` is read), or a sigmoid. ``ConvNorm`` with ``deferred`` leaves the norm to its readers: it gives
``y`` and its statistics. ``GlobalStats`` gives those of ``x + bias``. ``PooledSum`` is total_j + sum_k weight_jk
u_{index[j span + k]}, with ``total (batch, coarse, C)``, ``index (coarse span)``, ``weight (coarse, span)``.

The functions here are their meaning, in numpy and float64.
"""

from __future__ import annotations

import numpy as np

_READ = ("x_stats", "x_bias", "x_gamma", "x_beta")
CONV_NORM = ("x", "weight", "bias", "gamma", "beta", "gate", "shift", "index", *_READ, "x_shift", "x_index")
GLOBAL_STATS = ("x", "bias")
POOLED_SUM = ("total", "x", "index", "weight", *_READ)


def conv_norm(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    gate: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    stride: int = 1,
    epsilon: float = 1e-5,
    slope: float = 1.0,
    sigmoid: bool = False,
    x_slope: float = 1.0,
    deferred: bool = False,
    **read: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """The unit; with ``deferred`` its map and statistics. ``read`` holds the inputs named ``x_*``."""
    u = _read(x, x_slope, **read)
    y = u
    if weight is not None:
        half, frames = weight.shape[0] // 2, (x.shape[-2] - 1) // stride + 1
        padded = np.pad(u, [*[(0, 0)] * (x.ndim - 2), (half, half), (0, 0)])
        at = np.arange(frames) * stride
        y = sum(padded[..., at + k, :] * w for k, w in enumerate(weight.astype(np.float64)))
    if bias is not None:
        y = y + bias
    if deferred:
        return y, global_stats(y, epsilon=epsilon)
    if gamma is not None:
        y = _normed(y, global_stats(y, epsilon=epsilon), gamma, beta)
    y = 1 / (1 + np.exp(-y)) if sigmoid else _leaky(y, slope)
    if gate is not None:
        y = y * (gate if index is None else gate[..., index, :])
    if shift is not None:
        y = y + (shift if index is None else shift[..., index, :])
    return (y,)


def global_stats(x: np.ndarray, bias: np.ndarray | None = None, *, epsilon: float = 1e-5) -> np.ndarray:
    """Mean and 1 / deviation of each item, ``(batch, 2)``."""
    flat = (x.astype(np.float64) + (0 if bias is None else bias)).reshape(len(x), -1)
    return np.stack([flat.mean(1), 1 / np.sqrt(flat.var(1) + epsilon)], 1)


def pooled_sum(
    total: np.ndarray,
    x: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    *,
    x_slope: float = 1.0,
    **read: np.ndarray,
) -> np.ndarray:
    """A map and weighed windows of a finer one."""
    taken = _read(x, x_slope, **read)[..., index, :]
    windows = taken.reshape(*x.shape[:-2], *weight.shape, x.shape[-1])
    return np.asarray(total + (windows * weight[..., None]).sum(-2))


def _read(
    x: np.ndarray,
    slope: float,
    x_stats: np.ndarray | None = None,
    x_bias: np.ndarray | None = None,
    x_gamma: np.ndarray | None = None,
    x_beta: np.ndarray | None = None,
    x_shift: np.ndarray | None = None,
    x_index: np.ndarray | None = None,
) -> np.ndarray:
    u = x.astype(np.float64)
    if x_stats is not None:
        u = _leaky(_normed(u + (0 if x_bias is None else x_bias), x_stats, x_gamma, x_beta), slope)
    if x_shift is not None:
        u = u + (x_shift if x_index is None else x_shift[..., x_index, :])
    return u


def _normed(y: np.ndarray, stats: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None) -> np.ndarray:
    mean, rstd = (s.reshape(-1, *[1] * (y.ndim - 1)) for s in stats.astype(np.float64).T)
    return np.asarray((y - mean) * rstd * gamma + beta)


def _leaky(y: np.ndarray, slope: float) -> np.ndarray:
    return np.where(y > 0, y, slope * y)
