"""Fast training on a CPU: the U-Conv unit and its gated sum, forwards and backwards, on native kernels.

Shapes: maps are ``(B, C, 1, L)`` in channels-last memory. The arithmetic is that of ``separators.uconv``, which is also
the reference. torch spends most of a training step of these nets in depthwise convolutions, normalisations and
resampling; one kernel for each unit makes a step about four times as fast on one core.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from edgesep import kernels
from edgesep.ops.selective_scan_torch import pointers

_FLOATS, _SIZE = ctypes.c_void_p, ctypes.c_int64
_MAX_PARTS = 16  # EDGESEP_NORM_MAX_PARTS
_SIZES = ("batch", "frames_in", "frames", "channels", "taps", "stride")


class _ConvNorm(ctypes.Structure):
    """EdgesepConvNorm of core/conv_norm.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("x", "x_stats", "x_bias", "x_gamma", "x_beta", "x_slope", "x_shift", "x_index")),
        *((name, _FLOATS) for name in ("w", "bias", "gamma", "beta", "slope", "gate", "shift", "index")),
        *((name, _FLOATS) for name in ("y", "stats", "out", "sums")),
        *((name, _SIZE) for name in (*_SIZES, "coarse", "x_coarse")),
        ("eps", ctypes.c_float),
        ("sigmoid", ctypes.c_int32),
    )


class _ConvNormBackward(ctypes.Structure):
    """EdgesepConvNormBackward of core/conv_norm.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("x", "w", "gamma", "beta", "slope", "y", "stats", "dout")),
        *((name, _FLOATS) for name in ("dx", "dw", "dbias", "dgamma", "dbeta", "dslope", "workspace")),
        *((name, _SIZE) for name in _SIZES),
    )


class _Gated(ctypes.Structure):
    """EdgesepGated of core/conv_norm.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("local", "gate", "shift", "index", "out")),
        *((name, _SIZE) for name in ("batch", "frames", "coarse", "channels")),
    )


class _GatedBackward(ctypes.Structure):
    """EdgesepGatedBackward of core/conv_norm.h."""

    _fields_ = (
        *((name, _FLOATS) for name in ("local", "gate", "dout", "index", "dlocal", "dgate", "dshift")),
        *((name, _SIZE) for name in ("batch", "frames", "coarse", "channels")),
    )


def wanted(module: nn.Module, x: Tensor) -> bool:
    """Whether this call is a training step that the kernels can take."""
    return (
        module.training
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and kernels.core_if_possible() is not None
        and not any(map(parametrize.is_parametrized, module.modules()))  # hooks of its layers would be passed by
    )


def rows_of(x: Tensor) -> Tensor:
    """``(B, C, 1, L)`` → ``(B, L, C)``, without a copy from channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous().squeeze(1)


def maps_of(rows: Tensor) -> Tensor:
    return rows[:, None].permute(0, 3, 1, 2)


class _ConvNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        slope: Tensor | None,
        stride: int,
        eps: float,
    ) -> Tensor:
        batch, frames_in, channels = x.shape
        taps = 1 if w is None else w.shape[0]
        frames = (frames_in - 1) // stride + 1
        out, stats = x.new_empty(batch, frames, channels), x.new_empty(batch, 2)
        y = x if w is None and bias is None else torch.empty_like(out)
        sizes = dict(zip(_SIZES, (batch, frames_in, frames, channels, taps, stride), strict=True))
        given = {"x": x, "w": w, "bias": bias, "gamma": gamma, "beta": beta, "slope": slope, "y": y, "stats": stats}
        sums = x.new_empty(batch, _MAX_PARTS, 2, dtype=torch.float64)
        call = _ConvNorm(**pointers({**given, "out": out, "sums": sums}), **sizes, eps=eps)
        library = kernels.core()
        rows = library.edgesep_conv_norm_rows(ctypes.byref(call))
        for step in (library.edgesep_conv_norm_sums, library.edgesep_conv_norm_apply):
            step(ctypes.byref(call), _SIZE(0), _SIZE(rows))
        ctx.sizes, ctx.has_bias = sizes, bias is not None
        ctx.save_for_backward(x, w, gamma, beta, slope, y, stats)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        names = ("x", "w", "gamma", "beta", "slope", "y", "stats")
        given = dict(zip(names, ctx.saved_tensors, strict=True)) | {"dout": dout.contiguous()}
        w, gamma = given["w"], given["gamma"]
        grads: dict[str, Tensor | None] = {
            "dx": torch.empty_like(given["x"]),
            "dw": None if w is None else torch.zeros_like(w),
            "dbias": torch.zeros_like(gamma) if ctx.has_bias else None,
            "dgamma": torch.zeros_like(gamma),
            "dbeta": torch.zeros_like(gamma),
            "dslope": None if given["slope"] is None else torch.zeros_like(given["slope"]),
        }
        workspace = gamma.new_empty(0 if w is None else ctx.sizes["frames"] * ctx.sizes["channels"])
        call = _ConvNormBackward(**pointers({**given, **grads, "workspace": workspace}), **ctx.sizes)
        kernels.core().edgesep_conv_norm_backward(ctypes.byref(call), _SIZE(0), _SIZE(ctx.sizes["batch"]))
        return (*grads.values(), None, None)


class _GatedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gate: Tensor, shift: Tensor, index: Tensor) -> Tensor:
        batch, frames, channels = local.shape
        ctx.sizes = {"batch": batch, "frames": frames, "coarse": gate.shape[1], "channels": channels}
        out = torch.empty_like(local)
        given = {"local": local, "gate": gate, "shift": shift, "index": index, "out": out}
        call = _Gated(**pointers(given), **ctx.sizes)
        kernels.core().edgesep_gated(ctypes.byref(call), _SIZE(0), _SIZE(batch))
        ctx.save_for_backward(local, gate, index)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        local, gate, index = ctx.saved_tensors
        dout = dout.contiguous()
        grads = {"dlocal": torch.empty_like(local), "dgate": torch.empty_like(gate), "dshift": torch.empty_like(gate)}
        given = {"local": local, "gate": gate, "index": index, "dout": dout}
        call = _GatedBackward(**pointers({**given, **grads}), **ctx.sizes)
        kernels.core().edgesep_gated_backward(ctypes.byref(call), _SIZE(0), _SIZE(ctx.sizes["batch"]))
        return (*grads.values(), None)


_conv_norm: Any = _ConvNormFunction.apply
_gated: Any = _GatedFunction.apply


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm, act: nn.Module) -> Tensor:
    """``act(norm(conv(x)))`` for a depthwise or a pointwise convolution; other activations follow in torch."""
    rows, weight, bias, stride = rows_of(x), conv.weight, conv.bias, conv.stride[1]
    if conv.groups == 1:
        rows, bias = F.linear(rows, weight[:, :, 0, 0], bias), None
    depthwise = None if conv.groups == 1 else weight[:, 0, 0].t().contiguous()
    slope = act.weight if isinstance(act, nn.PReLU) else None
    made = _conv_norm(rows, depthwise, bias, norm.weight, norm.bias, slope, stride, norm.eps)
    y = maps_of(made)
    return y if slope is not None else act(y)


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution, dense or depthwise, as one product."""
    if conv.groups == 1:
        return maps_of(F.linear(rows_of(x), conv.weight[:, :, 0, 0], conv.bias))
    return maps_of(rows_of(x) * conv.weight[:, 0, 0, 0] + (0 if conv.bias is None else conv.bias))


def gated(local: Tensor, gate: Tensor, shift: Tensor) -> Tensor:
    """``local · sigmoid(gate) + shift`` with gate and shift resampled (nearest) to local's frames."""
    frames, coarse = local.shape[-1], gate.shape[-1]
    index = nearest_rows(coarse, frames)
    return maps_of(_gated(rows_of(local), rows_of(gate), rows_of(shift), index))


@functools.cache
def nearest_rows(coarse: int, frames: int) -> Tensor:
    """Which coarse frame ``F.interpolate`` takes for each frame."""
    at = torch.arange(coarse, dtype=torch.float32)[None, None]
    return F.interpolate(at, size=frames, mode="nearest")[0, 0].long()
