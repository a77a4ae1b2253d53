"""``edgesep::LstmSteps`` for ONNX: its schema with shape inference.

Shapes: as in ``lstm_steps``.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgesep.ops import lstm_steps as contract
from edgesep.ops.schemas import dims_of, put_dims

INPUTS = ("gates", "recurrent", "initial_h", "initial_c")
STATE = 2


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, int64 for the order, and perhaps int8 for the matrix."""
    kind = onnx.defs.OpSchema
    option = kind.FormalParameterOption
    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=[
            *(kind.FormalParameter(name, "M" if name == "recurrent" else "T") for name in INPUTS),
            kind.FormalParameter("order", "I", param_option=option.Optional),
            kind.FormalParameter("scale", "T", param_option=option.Optional),
        ],
        outputs=[
            kind.FormalParameter("y", "T"),
            *(kind.FormalParameter(name, "T", param_option=option.Optional) for name in ("last_h", "last_c")),
        ],
        type_constraints=[
            ("T", ["tensor(float)"], "float32"),
            ("M", ["tensor(float)", "tensor(int8)"], "float32, or int8 with a scale"),
            ("I", ["tensor(int64)"], "int64"),
        ],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def infer(context: Any) -> None:
    """States are shaped as they came; before the rows of ``y`` stand its steps and an axis of one."""
    for i in range(1, context.get_num_outputs()):
        context.set_output_type(i, context.get_input_type(STATE))
    state, order = dims_of(context, STATE), dims_of(context, len(INPUTS))
    put_dims(context, [order[0] if order else 0, *state] if state else [])
