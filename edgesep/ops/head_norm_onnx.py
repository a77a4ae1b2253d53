"""``edgesep::HeadNorm`` for ONNX: its schema with shape inference.

Shapes: as in ``head_norm``.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from edgesep.ops import head_norm as contract
from edgesep.ops.schemas import dims_of, put_dims


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32."""
    kind = onnx.defs.OpSchema
    optional = kind.FormalParameterOption.Optional
    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=[
            *(kind.FormalParameter(name, "T") for name in ("x", "gain", "bias")),
            kind.FormalParameter("slope", "T", param_option=optional),
        ],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "float32")],
        attributes=[
            kind.Attribute("first", onnx.helper.make_attribute("first", 0), "the first channel of the heads"),
            kind.Attribute("epsilon", onnx.helper.make_attribute("epsilon", 1e-5), "added to the variance"),
        ],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def infer(context: Any) -> None:
    """Heads, frames, and all bins' features."""
    x, gain = (dims_of(context, i) for i in range(2))
    rows = math.prod(x[:-1]) if x else 0
    heads, bins, features = gain or (0, 0, 0)
    put_dims(context, [1, heads, rows // bins if bins else 0, bins * features])
