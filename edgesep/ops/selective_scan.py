"""``edgesep::SelectiveScan`` version 1: the recurrence of Mamba-1 (arXiv 2312.00752), for any runtime.

Shapes: b batch, L length, D channels, N state. ``u, delta, z (b, L, D)``, ``A (D, N)``, ``B, C (b, L, N)``,
``D (D)``, ``delta_bias (D)``, states ``(b, D, N)``.

    dt  = softplus(delta + delta_bias)                     (softplus if ``delta_softplus``)
    h_t = exp(dt_t · A) ∘ h_{t-1} + (dt_t ∘ u_t) B_t       (from the end if ``reverse``)
    y_t = h_t · C_t + D ∘ u_t,   then  y ∘ silu(z)

``reference`` is the meaning (numpy, float64); ``selective_scan`` is the torch form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN, NAME, VERSION = "edgesep", "SelectiveScan", 1


def reference(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    *,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence, one time step after the other, in float64.

    Returns:
        ``y (b, L, D)`` and the last state ``(b, D, N)``.

    Raises:
        ValueError: shapes that do not belong together; the message names the tensor.
    """
    check(u.shape, delta=delta.shape, A=A.shape, B=B.shape, C=C.shape)
    u, dt = u.astype(np.float64), delta.astype(np.float64)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = np.logaddexp(0, dt)
    batch, length, channels = u.shape
    h = np.zeros((batch, channels, A.shape[1])) if initial_state is None else initial_state.astype(np.float64)
    y = np.empty_like(u)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * (z / (1 + np.exp(-z.astype(np.float64))))
    return y, h


def check(u: tuple[int, ...], **others: tuple[int, ...]) -> None:
    """Refuse shapes that do not belong together."""
    if len(u) != 3 or 0 in u:
        raise ValueError(f"u has shape {u}, expected (batch, length, channels), none of them 0")
    batch, length, channels = u
    state = others["A"][-1]
    wanted = {
        "delta": (batch, length, channels),
        "A": (channels, state),
        "B": (batch, length, state),
        "C": (batch, length, state),
    }
    for name, shape in others.items():
        if tuple(shape) != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {wanted[name]} beside u {u}")


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The torch form with softplus and gate: ``y (b, L, D)``.

    In eager mode a loop over time in place; while exporting, one ``scan`` that becomes ONNX's Scan, so that the
    length stays dynamic.
    """
    import torch
    from torch.nn import functional as F

    dt = F.softplus(delta + delta_bias)
    x = dt * u
    if torch.compiler.is_exporting():
        y = _exported(dt, x, A, B, C)
    elif torch.is_grad_enabled():
        y = _doubling(dt, x, A, B, C)
    else:
        y = _loop(dt, x, A, B, C)
    return (y + D * u) * F.silu(z)


def _loop(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, rows: int = 16) -> Tensor:
    """A few batch rows at a time, so that the state stays in the cache."""
    import torch

    y = torch.empty_like(x)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        d, xs, b, c = dt[part], x[part], B[part], C[part]
        h = x.new_zeros(d.shape[0], d.shape[2], A.shape[1])
        for t in range(x.shape[1]):
            h.mul_(torch.exp(d[:, t, :, None] * A)).addcmul_(xs[:, t, :, None], b[:, t, None, :])
            y[part, t] = torch.bmm(h, c[:, t, :, None])[..., 0]
    return y


def _doubling(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Differentiable, log2(L) passes without a division: exact wherever the recurrence is.

    After pass k every position holds the combined decay and input of the 2**k steps that end there.
    """
    from torch.nn import functional as F

    decay = (dt[..., None] * A).exp()
    h = x[..., None] * B[:, :, None, :]
    step = 1
    while step < x.shape[1]:
        h = h + decay * F.pad(h[:, :-step], (0, 0, 0, 0, step, 0))
        decay = decay * F.pad(decay[:, :-step], (0, 0, 0, 0, step, 0), value=1.0)
        step *= 2
    return (h * C[:, :, None, :]).sum(-1)


def _exported(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d, xs, b, c = now
        h = (d[..., None] * A).exp() * h + xs[..., None] * b[:, None, :]
        return h, (h * c[:, None, :]).sum(-1)

    start = (dt[:, 0, :, None] * A).mul(0.0)
    _, y = scan(step, start, tuple(v.transpose(0, 1) for v in (dt, x, B, C)))
    return y.transpose(0, 1)
