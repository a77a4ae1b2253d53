"""``edgesep::CausalConv1dSilu`` for ONNX: its schema with shape inference, and an implementation for ONNX's evaluator.

Shapes: as in ``causal_conv``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from edgesep.ops import causal_conv as contract
from edgesep.ops import schemas

INPUTS: dict[str, tuple[str, ...]] = {
    "x": ("batch", "length", "channels"),
    "weight": ("channels", "taps"),
    "bias": ("channels",),
}
ATTRIBUTES = {"reverse": (0, "1: over the future")}
TORCH = "causal_conv1d_silu"  # the operator's name in torch.ops.edgesep


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32 alone."""
    axes = INPUTS | {"y": INPUTS["x"]}
    return schemas.schema(contract, [*INPUTS], ["y"], infer, required=3, axes=axes, attributes=ATTRIBUTES)


def infer(context: Any) -> None:
    """The output is shaped as the first input."""
    context.set_output_type(0, context.get_input_type(0))


class CausalConv1dSilu(OpRun):
    """The operator in ``onnx.reference.ReferenceEvaluator``."""

    op_domain = contract.DOMAIN

    def _run(
        self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, reverse: int | None = None
    ) -> tuple[np.ndarray]:
        return (contract.reference(x, weight, bias, reverse=bool(reverse)).astype(np.float32),)


def translate(opset: Any, x: Any, weight: Any, bias: Any, reverse: bool = False) -> Any:
    """The node that stands for the torch operator in an export."""
    return opset.CausalConv1dSilu(x, weight, bias, reverse=int(reverse))
