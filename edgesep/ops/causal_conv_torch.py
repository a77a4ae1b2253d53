"""``edgesep::causal_conv1d_silu`` in torch: the same contract as ``edgesep.ops.causal_conv``, on native kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgesep import kernels
from edgesep.ops import native
from edgesep.ops.causal_conv import check
from edgesep.ops.selective_scan_torch import pointers


@torch.library.custom_op("edgesep::causal_conv1d_silu", mutates_args=(), device_types="cpu")
def conv_op(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """``(b, L, D)``, ``(D, taps)``, ``(D)`` float32 → ``(b, L, D)``; over the future instead if ``reverse``."""
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.float32")
    check(x=tuple(x.shape), weight=tuple(weight.shape), bias=tuple(bias.shape))
    library = kernels.core_if_possible()
    if library is None:
        return plain(x, weight, bias, reverse).contiguous()
    dense = {
        "x": x.contiguous(),
        "w": weight.contiguous(),
        "bias": bias.contiguous(),
        "y": torch.empty_like(x.contiguous()),
    }
    call = native.Conv(**pointers(dense), **dict(zip(native.CONV_SIZES, (*x.shape, weight.shape[1]), strict=True)))
    call.reverse = reverse
    rows = library.edgesep_conv_rows(ctypes.byref(call))
    kernels.split(library.edgesep_conv, call, rows, torch.get_num_threads())
    return dense["y"]


@conv_op.register_fake
def _(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = (v.contiguous() for v in ctx.saved_tensors)
    library = kernels.core_if_possible()
    if library is None:
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
            made = plain(leaves[0], leaves[1], leaves[2], ctx.reverse)
            return (*torch.autograd.grad(made, leaves, dy), None)
    grads = {"dx": torch.empty_like(x), "dw": torch.zeros_like(weight), "dbias": torch.zeros_like(bias)}
    given = {"x": x, "w": weight, "bias": bias, "dy": dy.contiguous()}
    call = native.ConvBackward(
        **pointers({**given, **grads}), **dict(zip(native.CONV_SIZES, (*x.shape, weight.shape[1]), strict=True))
    )
    call.reverse = ctx.reverse
    library.edgesep_conv_backward(ctypes.byref(call), native.SIZE(0), native.SIZE(x.shape[0]))
    return (*grads.values(), None)


conv_op.register_autograd(_gradients, setup_context=_remember)


def plain(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """The same in torch's own operators."""
    taps = weight.shape[1]
    kernel = weight.flip(1) if reverse else weight  # the other way round is the mirrored kernel over the future
    padded = F.pad(x.transpose(1, 2), (0, taps - 1) if reverse else (taps - 1, 0))
    return F.silu(F.conv1d(padded, kernel[:, None], bias, groups=weight.shape[0])).transpose(1, 2)
