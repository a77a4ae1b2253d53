"""``edgesep::WindowProduct`` for ONNX: its schema with shape inference.

Shapes: as in ``window_product``.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from edgesep.ops import schemas
from edgesep.ops import window_product as contract

INPUTS = ("x", "weight", "bias", "index", "slope", "residual", "scale")
ATTRIBUTES = {"x_scale": (1.0, "a step of the integers"), "x_zero": (0, "the integer that stands for 0")}


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, int64 for the index, and perhaps int8 for the matrix."""
    others = {"weight": (*schemas.FLOAT, "tensor(int8)"), "index": ("tensor(int64)",)}
    return schemas.schema(contract, INPUTS, ["y"], infer, required=3, others=others, attributes=ATTRIBUTES)


def infer(context: Any) -> None:
    """Windows, which an index has or the rows are, and outputs."""
    x, weight, bias, index = (schemas.dims_of(context, i) for i in range(4))
    inputs = weight[2] * (4 if weight[3] > contract.GROUP else 1) if len(weight) == 4 else 0
    windows = index[0] if index else math.prod(x) // inputs if x and inputs else 0
    schemas.put_dims(context, [windows, bias[0] if bias else 0])
