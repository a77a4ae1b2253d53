"""``edgesep::WindowProduct`` for ONNX: its schema with shape inference.

Shapes: as in ``window_product``.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from edgesep.ops import window_product as contract
from edgesep.ops.schemas import dims_of, put_dims

INDEX = 3


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, and int64 for the index."""
    kind = onnx.defs.OpSchema
    optional = kind.FormalParameterOption.Optional
    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=[
            *(kind.FormalParameter(name, "T") for name in ("x", "weight", "bias")),
            kind.FormalParameter("index", "I", param_option=optional),
            *(kind.FormalParameter(name, "T", param_option=optional) for name in ("slope", "residual")),
        ],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "float32"), ("I", ["tensor(int64)"], "int64")],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def infer(context: Any) -> None:
    """Windows, which an index has or the rows are, and outputs."""
    x, weight, bias, index = (dims_of(context, i) for i in range(INDEX + 1))
    inputs = weight[2] if len(weight) == 4 else 0
    windows = index[0] if index else math.prod(x) // inputs if x and inputs else 0
    put_dims(context, [windows, bias[0] if bias else 0])
