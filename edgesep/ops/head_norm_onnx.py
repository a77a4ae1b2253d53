"""``edgesep::HeadNorm`` for ONNX: its schema with shape inference.

Shapes: as in ``head_norm``.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from edgesep.ops import head_norm as contract
from edgesep.ops import schemas

INPUTS = ("x", "gain", "bias", "slope")
ATTRIBUTES = {"first": (0, "the first channel of the heads"), "epsilon": (1e-5, "added to the variance")}


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32."""
    return schemas.schema(contract, INPUTS, ["y"], infer, required=3, attributes=ATTRIBUTES)


def infer(context: Any) -> None:
    """Heads, frames, and all bins' features."""
    x, gain = (schemas.dims_of(context, i) for i in range(2))
    rows = math.prod(x[:-1]) if x else 0
    heads, bins, features = gain or (0, 0, 0)
    schemas.put_dims(context, [1, heads, rows // bins if bins else 0, bins * features])
