"""``edgesep::selective_scan`` in torch: the same contract as ``edgesep.ops.selective_scan``, on native kernels.

Importing this file registers ``torch.ops.edgesep.selective_scan`` for CPU tensors. Without a C++ compiler the same
arithmetic runs as a loop of torch operators.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgesep import kernels
from edgesep.ops import native
from edgesep.ops.selective_scan import MAX_STATE, check
from edgesep.spec import UnsupportedError


def pointers(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    """Addresses by name; the tensors must be contiguous and outlive the call."""
    return {k: None if v is None else v.data_ptr() for k, v in tensors.items()}


@torch.library.custom_op("edgesep::selective_scan", mutates_args=(), device_types="cpu")
def scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y (b, L, D)`` and the last state ``(b, D, N)``, float32; shapes as in ``edgesep.ops.selective_scan``.

    Differentiable in everything but ``initial_state``.
    """
    given = {"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    tensors: dict[str, Tensor | None] = {"u": u, "delta": delta, "A": A, "B": B, "C": C, **given}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.float32")
    check(**{k: tuple(v.shape) for k, v in tensors.items() if v is not None})
    y, last = u.new_empty(u.shape), u.new_empty(u.shape[0], u.shape[2], A.shape[1])
    library = kernels.core_if_possible()
    if library is None or A.shape[1] > MAX_STATE:
        _loop(tensors, delta_softplus, reverse, y, last)
        return y, last
    dense = {k: None if v is None else v.contiguous() for k, v in tensors.items()}
    call = native.Scan(
        **pointers({**dense, "y": y, "last_state": last}),
        **dict(zip(native.SCAN_SIZES, (*u.shape, A.shape[1]), strict=True)),
    )
    call.delta_softplus, call.reverse = delta_softplus, reverse
    rows = library.edgesep_scan_rows(ctypes.byref(call))
    kernels.split(library.edgesep_scan, call, rows, torch.get_num_threads())
    return y, last


@scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    del delta
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape[0], u.shape[2], A.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    *tensors, initial_state, ctx.softplus, ctx.reverse = inputs
    if initial_state is not None:
        raise UnsupportedError("selective_scan has no gradients with an initial state; start from zero to train")
    ctx.given = [v is not None for v in tensors]
    ctx.save_for_backward(*(v for v in tensors if v is not None))


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    given = {
        k: next(saved).contiguous() if there else None for k, there in zip(native.SCAN_INPUTS, ctx.given, strict=True)
    }
    library = kernels.core_if_possible()
    u, A = given["u"], given["A"]
    assert u is not None, "not optional"
    assert A is not None, "not optional"
    if library is None or A.shape[1] > MAX_STATE:
        with torch.enable_grad():
            leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in given.items()}
            found = iter(
                torch.autograd.grad(
                    doubling(leaves, ctx.softplus, ctx.reverse), [v for v in leaves.values() if v is not None], dy
                )
            )
        return (*(next(found) if there else None for there in ctx.given), None, None, None)
    dy = dy.contiguous()
    grads = {f"d{k}": None if v is None else torch.zeros_like(v) for k, v in given.items()}
    call = native.ScanBackward(
        **pointers({**given, **grads, "dy": dy}), **dict(zip(native.SCAN_SIZES, (*u.shape, A.shape[1]), strict=True))
    )
    call.delta_softplus, call.reverse = ctx.softplus, ctx.reverse
    workspace = u.new_empty(library.edgesep_scan_backward_workspace(ctypes.byref(call)) + 16)
    call.workspace = workspace.data_ptr() + -workspace.data_ptr() % 64
    library.edgesep_scan_backward(ctypes.byref(call), native.SIZE(0), native.SIZE(u.shape[0]))
    return (*grads.values(), None, None, None)


scan_op.register_autograd(_gradients, setup_context=_remember)


def _loop(given: dict[str, Tensor | None], softplus: bool, reverse: bool, y: Tensor, last: Tensor) -> None:
    """A few batch rows at a time, so that the state stays in the cache."""
    u, delta, A, B, C = (v for v in (given[k] for k in ("u", "delta", "A", "B", "C")) if v is not None)
    D, z, bias, initial = (given[k] for k in ("D", "z", "delta_bias", "initial_state"))
    dt = delta if bias is None else delta + bias
    dt = F.softplus(dt) if softplus else dt
    x = dt * u
    steps = range(x.shape[1])
    for start in range(0, x.shape[0], 16):
        part = slice(start, start + 16)
        h = last[part].zero_() if initial is None else last[part].copy_(initial[part])
        for t in reversed(steps) if reverse else steps:
            h.mul_(torch.exp(dt[part, t, :, None] * A)).addcmul_(x[part, t, :, None], B[part, t, None, :])
            y[part, t] = torch.bmm(h, C[part, t, :, None])[..., 0]
    if D is not None:
        y += D * u
    if z is not None:
        y *= F.silu(z)


def doubling(given: Mapping[str, Tensor | None], softplus: bool, reverse: bool = False) -> Tensor:
    """``y`` in log2(L) passes without a division: exact wherever the recurrence is, and differentiable.

    After pass k every position holds the combined decay and input of the 2**k steps that end there.
    """
    u, delta, A, B, C = (v for v in (given[k] for k in ("u", "delta", "A", "B", "C")) if v is not None)
    D, z, bias = (given[k] for k in ("D", "z", "delta_bias"))
    dt = delta if bias is None else delta + bias
    dt = F.softplus(dt) if softplus else dt
    decay = (dt[..., None] * A).exp()
    h = (dt * u)[..., None] * B[:, :, None, :]
    step = 1
    while step < u.shape[1]:
        before, pad = (slice(step, None), (0, step)) if reverse else (slice(None, -step), (step, 0))
        h = h + decay * F.pad(h[:, before], (0, 0, 0, 0, *pad))
        decay = decay * F.pad(decay[:, before], (0, 0, 0, 0, *pad), value=1.0)
        step *= 2
    y = (h * C[:, :, None, :]).sum(-1)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z)
