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
from edgesep.ops.selective_scan import MAX_STATE, check

_FLOATS, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
_SIZES = ("batch", "length", "channels", "state")


class _Scan(ctypes.Structure):
    """EdgesepScan of core/selective_scan.h."""

    _fields_ = (
        *((name, _FLOATS) for name in (*_INPUTS, "initial_state", "y", "last_state")),
        *((name, _SIZE) for name in _SIZES),
        *((name, _FLAG) for name in ("delta_softplus", "reverse")),
    )


class _Backward(ctypes.Structure):
    """EdgesepScanBackward of core/selective_scan.h."""

    _fields_ = (
        *((name, _FLOATS) for name in (*_INPUTS, "dy")),
        *((name, _FLOATS) for name in ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "workspace")),
        *((name, _SIZE) for name in _SIZES),
        ("delta_softplus", _FLAG),
    )


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

    Differentiable in everything but ``initial_state``, forwards in time.
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
    call = _Scan(
        **pointers({**dense, "y": y, "last_state": last}), **dict(zip(_SIZES, (*u.shape, A.shape[1]), strict=True))
    )
    call.delta_softplus, call.reverse = delta_softplus, reverse
    rows = library.edgesep_scan_rows(ctypes.byref(call))
    kernels.split(library.edgesep_scan, call, rows, torch.get_num_threads())
    return y, last


@scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    del delta
    return torch.empty_like(u), u.new_empty(u.shape[0], u.shape[2], A.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    *tensors, initial_state, ctx.softplus, reverse = inputs
    if initial_state is not None or reverse:
        raise NotImplementedError("selective_scan has no gradients with an initial state or in reverse")
    ctx.given = [v is not None for v in tensors]
    ctx.save_for_backward(*(v for v in tensors if v is not None))


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    given = {k: next(saved).contiguous() if there else None for k, there in zip(_INPUTS, ctx.given, strict=True)}
    library = kernels.core_if_possible()
    u, A = given["u"], given["A"]
    assert u is not None, "not optional"
    assert A is not None, "not optional"
    if library is None or A.shape[1] > MAX_STATE:
        with torch.enable_grad():
            leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in given.items()}
            found = iter(
                torch.autograd.grad(doubling(leaves, ctx.softplus), [v for v in leaves.values() if v is not None], dy)
            )
        return (*(next(found) if there else None for there in ctx.given), None, None, None)
    dy = dy.contiguous()
    grads = {f"d{k}": None if v is None else torch.zeros_like(v) for k, v in given.items()}
    call = _Backward(**pointers({**given, **grads, "dy": dy}), **dict(zip(_SIZES, (*u.shape, A.shape[1]), strict=True)))
    call.delta_softplus = ctx.softplus
    workspace = u.new_empty(library.edgesep_scan_backward_workspace(ctypes.byref(call)) + 16)
    call.workspace = workspace.data_ptr() + -workspace.data_ptr() % 64
    library.edgesep_scan_backward(ctypes.byref(call), _SIZE(0), _SIZE(u.shape[0]))
    return (*grads.values(), None, None, None)


scan_op.register_autograd(_gradients, setup_context=_remember)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan with softplus and gate, ``y (b, L, D)``; while exporting one ``scan`` that becomes ONNX's Scan, so
    that the length stays dynamic."""
    if torch.compiler.is_exporting():
        dt = F.softplus(delta + delta_bias)
        return (exported(dt, dt * u, A, B, C) + D * u) * F.silu(z)
    return scan_op(u, delta, A, B, C, D, z, delta_bias, None, True, False)[0]


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


def doubling(given: Mapping[str, Tensor | None], softplus: bool) -> Tensor:
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
        h = h + decay * F.pad(h[:, :-step], (0, 0, 0, 0, step, 0))
        decay = decay * F.pad(decay[:, :-step], (0, 0, 0, 0, step, 0), value=1.0)
        step *= 2
    y = (h * C[:, :, None, :]).sum(-1)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z)


def exported(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence in standard operators with a dynamic length."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d, xs, b, c = now
        h = (d[..., None] * A).exp() * h + xs[..., None] * b[:, None, :]
        return h, (h * c[:, None, :]).sum(-1)

    start = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    _, y = scan(step, start, tuple(v.transpose(0, 1) for v in (dt, x, B, C)))
    return y.transpose(0, 1)
