"""``edgesep::causal_conv1d_silu`` in torch: the same contract as ``edgesep.ops.causal_conv``, on native kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgesep import kernels
from edgesep.ops.causal_conv import check
from edgesep.ops.selective_scan_torch import pointers

_FLOATS, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIZES = ("batch", "length", "channels", "taps")


class _Conv(ctypes.Structure):
    """EdgesepConv of core/causal_conv.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("x", "w", "bias", "y")),
        *((name, _SIZE) for name in _SIZES),
        ("reverse", ctypes.c_int32),
    )


class _Backward(ctypes.Structure):
    """EdgesepConvBackward of core/causal_conv.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("x", "w", "bias", "dy", "dx", "dw", "dbias")),
        *((name, _SIZE) for name in _SIZES),
    )


@torch.library.custom_op("edgesep::causal_conv1d_silu", mutates_args=(), device_types="cpu")
def conv_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(b, L, D)``, ``(D, taps)``, ``(D)`` float32 → ``(b, L, D)``."""
    check(x=tuple(x.shape), weight=tuple(weight.shape), bias=tuple(bias.shape))
    library = kernels.core_if_possible()
    if library is None:
        return plain(x, weight, bias).contiguous()
    dense = {
        "x": x.contiguous(),
        "w": weight.contiguous(),
        "bias": bias.contiguous(),
        "y": torch.empty_like(x.contiguous()),
    }
    call = _Conv(**pointers(dense), **dict(zip(_SIZES, (*x.shape, weight.shape[1]), strict=True)))
    rows = library.edgesep_conv_rows(ctypes.byref(call))
    kernels.split(library.edgesep_conv, call, rows, torch.get_num_threads())
    return dense["y"]


@conv_op.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, weight, bias = (v.contiguous() for v in ctx.saved_tensors)
    library = kernels.core_if_possible()
    if library is None:
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
            return torch.autograd.grad(plain(*leaves), leaves, dy)
    grads = {"dx": torch.empty_like(x), "dw": torch.zeros_like(weight), "dbias": torch.zeros_like(bias)}
    given = {"x": x, "w": weight, "bias": bias, "dy": dy.contiguous()}
    call = _Backward(**pointers({**given, **grads}), **dict(zip(_SIZES, (*x.shape, weight.shape[1]), strict=True)))
    library.edgesep_conv_backward(ctypes.byref(call), _SIZE(0), _SIZE(x.shape[0]))
    return tuple(grads.values())


conv_op.register_autograd(_gradients, setup_context=_remember)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(b, L, D)`` → the same; standard operators while exporting."""
    return plain(x, weight, bias) if torch.compiler.is_exporting() else conv_op(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = weight.shape[1]
    padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)
