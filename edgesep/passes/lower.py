"""Lowering: the same function in fewer and friendlier operators, the same weights.

Quantizers and runtimes know convolutions and matrix products. So batch norms are folded into the convolution before
them, linear steps in a row become one, and transposed convolutions become convolutions or products. What is exported is
lowered, after pruning and fine-tuning, which keep the checkpoint's structure.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgesep import verify
from edgesep.passes.base import Context, PassResult
from edgesep.separators.base import Separator, sharing_copy
from edgesep.spec import BuildError

LEAST_DB = 100.0  # output SNR of the lowered separator
ODD_S = 0.43717


@dataclass(frozen=True)
class Lower:
    """Rewrite what is exported; exact up to rounding, which is checked."""

    stage: ClassVar[str] = "lower"

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Lower a copy.

        Raises:
            BuildError: the lowered separator's output differs from the given one's.
        """
        del context
        module = sharing_copy(separator.module)
        done: dict[str, int] = {}
        for rule in (_fold_batch_norms, _own_rules, _merge_products, _turn_transposed):
            for _ in rule(module):
                done[rule.__name__.lstrip("_")] = done.get(rule.__name__.lstrip("_"), 0) + 1
        lowered = replace(separator, module=module.eval())
        if not done:
            return PassResult(separator, False, {})
        snr_db = output_snr_db(lowered, separator)
        if snr_db < LEAST_DB:
            raise BuildError(f"lowering changed {separator.name}: output SNR {snr_db:.1f} dB, required {LEAST_DB:g} dB")
        return PassResult(lowered, True, {"rewritten": done, "output_snr_db": round(min(snr_db, 999.0), 1)})


def output_snr_db(changed: Separator, separator: Separator) -> float:
    """SNR of the changed separator's output against the other's, on noise of an odd length, batch 2."""
    inputs = separator.example_inputs(int(ODD_S * separator.sample_rate_hz), 1 if separator.stream else 2)
    with torch.inference_mode():
        made = [s.module(*inputs) for s in (changed, separator)]
    after, before = ((m[0] if isinstance(m, tuple) else m).numpy() for m in made)
    return verify.output_snr_db(after, before)


def _fold_batch_norms(module: nn.Module) -> Iterator[None]:
    """A batch norm that stands right behind a convolution."""
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(parent, name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
                setattr(parent, norm_name, nn.Identity())
                yield


def _merge_products(module: nn.Module) -> Iterator[None]:
    """1x1 convolutions in a row, dense or depthwise, within a ``Sequential``."""
    for parent in list(module.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        kept: list[nn.Module] = []
        merged = False
        for part in parent:
            convs = _pointwise(part)
            if convs and kept and isinstance(first := kept[-1], nn.Conv2d) and _pointwise(first):
                kept[-1] = functools.reduce(_after, convs, first)
                merged = True
            elif len(convs) == 1 and not isinstance(part, nn.Conv2d):
                kept.append(convs[0])  # what surrounds it does nothing for a kernel of one
            else:
                kept.append(part)
        if merged:
            for name in list(parent._modules):
                delattr(parent, name)
            for i, part in enumerate(kept):
                parent.add_module(str(i), part)
            yield


def _pointwise(part: nn.Module) -> list[nn.Conv2d]:
    """The 1x1 convolutions that a module is made of, in order; none where it holds or does anything else."""
    leaves = [m for m in part.modules() if not list(m.children())]
    linear = getattr(part, "only_linear", isinstance(part, nn.Conv2d))
    convs = [m for m in leaves if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (1, 1)]
    return convs if linear and len(convs) == len(leaves) else []


def _after(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Both as one, multiplied out in float64."""
    a, b = (_matrix(c) for c in (first, second))
    made = nn.Conv2d(first.in_channels, second.out_channels, 1)
    shift = torch.zeros(first.out_channels, dtype=torch.float64) if first.bias is None else first.bias.double()
    with torch.no_grad():
        made.weight.copy_((b @ a)[:, :, None, None])
        cast(Tensor, made.bias).copy_(b @ shift + (0 if second.bias is None else second.bias.double()))
    return made


def _matrix(conv: nn.Conv2d) -> Tensor:
    flat = conv.weight.detach().double().flatten(1)
    return torch.diag(flat[:, 0]) if conv.groups > 1 else flat


def _turn_transposed(module: nn.Module) -> Iterator[None]:
    """Transposed convolutions over one axis of stride one, or of a stride as long as the kernel."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if not isinstance(part, nn.ConvTranspose1d) or part.groups != 1 or part.padding != (0,):
                continue
            if part.stride in ((1,), part.kernel_size):
                setattr(parent, name, Spread(part))
                yield


class Spread(nn.Module):
    """A transposed convolution as one product: ``(R, H, n)`` → ``(R, C, (n-1)·stride + k)``.

    Its windows of k frames lie side by side, or each a frame behind the last one. Those are summed without being moved:
    of k rows of frames, each one frame longer than the result, all but the last k values are read as rows of the
    result's length, and so each row is a frame later than the one before it. A convolution, which would add the same
    up, has few channels to make of many and is several times slower.
    """

    def __init__(self, conv: nn.ConvTranspose1d):
        super().__init__()
        self.channels, self.taps = conv.out_channels, conv.kernel_size[0]
        self.overlap = conv.stride == (1,) and self.taps > 1
        self.product = nn.Linear(conv.in_channels, self.taps * self.channels, bias=not self.overlap)
        self.bias = conv.bias if self.overlap else None
        with torch.no_grad():
            self.product.weight.copy_(conv.weight.permute(2, 1, 0).flatten(0, 1))
            if not self.overlap:
                self.product.bias.copy_(cast(Tensor, conv.bias).repeat(self.taps))

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.transpose(1, 2)).unflatten(2, (-1, self.channels))
        if not self.overlap:
            return y.flatten(1, 2).transpose(1, 2)
        frames = x.shape[2] + self.taps - 1
        y = F.pad(y.transpose(1, 2), (0, 0, 0, self.taps)).flatten(1, 2)[:, : self.taps * frames]
        return (y.unflatten(1, (self.taps, -1)).sum(1) + self.bias).transpose(1, 2)


def _own_rules(module: nn.Module) -> Iterator[None]:
    """What modules know of themselves: ``lower()`` rewrites in place and says whether it did."""
    for part in list(module.modules()):
        rewrite: Callable[[], bool] | None = getattr(part, "lower", None)
        if callable(rewrite) and rewrite():
            yield
