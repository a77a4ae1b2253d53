"""``edgesep::SelectiveScan`` version 1: the recurrence of Mamba-1 (arXiv 2312.00752), for any runtime.

Shapes: b batch, L length, D channels, N state. ``u, delta, z (b, L, D)``, ``A (D, N)``, ``B, C (b, L, N)``,
``D (D)``, ``delta_bias (D)``, states ``(b, D, N)``.

    dt  = softplus(delta + delta_bias)                     (softplus if ``delta_softplus``)
    h_t = exp(dt_t · A) ∘ h_{t-1} + (dt_t ∘ u_t) B_t       (from the end if ``reverse``)
    y_t = h_t · C_t + D ∘ u_t,   then  y ∘ silu(z)

``reference`` is the meaning (numpy, float64); ``selective_scan_torch`` holds the torch form.
"""

from __future__ import annotations

import numpy as np

DOMAIN, NAME, VERSION = "edgesep", "SelectiveScan", 1
MAX_STATE = 64  # of the native kernels


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
    given = {"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    shapes = {k: v.shape for k, v in given.items() if v is not None}
    check(u=u.shape, delta=delta.shape, A=A.shape, B=B.shape, C=C.shape, **shapes)
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


def check(*, u: tuple[int, ...], A: tuple[int, ...], **others: tuple[int, ...]) -> None:
    """Refuse shapes that do not belong together."""
    if len(u) != 3 or 0 in u:
        raise ValueError(f"u has shape {tuple(u)}, expected (batch, length, channels), none of them 0")
    if len(A) != 2 or A[0] != u[2] or not A[1]:
        raise ValueError(f"A has shape {tuple(A)}, expected ({u[2]}, state) beside u {tuple(u)}")
    batch, length, channels = u
    state = A[1]
    wanted = {
        "delta": (batch, length, channels),
        "z": (batch, length, channels),
        "B": (batch, length, state),
        "C": (batch, length, state),
        "D": (channels,),
        "delta_bias": (channels,),
        "initial_state": (batch, channels, state),
    }
    for name, shape in others.items():
        if tuple(shape) != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {wanted[name]} beside u {tuple(u)}")
