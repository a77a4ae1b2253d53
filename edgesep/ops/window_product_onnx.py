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
    """The operator's schema; float32, int64 for the index, and perhaps int8 for the matrix."""
    kind = onnx.defs.OpSchema
    optional = kind.FormalParameterOption.Optional
    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=[
            *(kind.FormalParameter(name, "M" if name == "weight" else "T") for name in ("x", "weight", "bias")),
            kind.FormalParameter("index", "I", param_option=optional),
            *(kind.FormalParameter(name, "T", param_option=optional) for name in ("slope", "residual", "scale")),
        ],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)"], "float32"),
            ("M", ["tensor(float)", "tensor(int8)"], "float32, or int8 with a scale"),
            ("I", ["tensor(int64)"], "int64"),
        ],
        attributes=[
            kind.Attribute("x_scale", onnx.helper.make_attribute("x_scale", 1.0), "a step of the integers"),
            kind.Attribute("x_zero", onnx.helper.make_attribute("x_zero", 0), "the integer that stands for 0"),
        ],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def infer(context: Any) -> None:
    """Windows, which an index has or the rows are, and outputs."""
    x, weight, bias, index = (dims_of(context, i) for i in range(INDEX + 1))
    inputs = weight[2] * (4 if weight[3] > contract.GROUP else 1) if len(weight) == 4 else 0
    windows = index[0] if index else math.prod(x) // inputs if x and inputs else 0
    put_dims(context, [windows, bias[0] if bias else 0])
