"""``edgesep::LstmSteps`` for ONNX: its schema with shape inference.

Shapes: as in ``lstm_steps``.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgesep.ops import lstm_steps as contract

INPUTS = ("gates", "recurrent", "initial_h", "initial_c")


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
    state = context.get_input_type(2)
    for i in range(1, context.get_num_outputs()):
        context.set_output_type(i, state)
    y = onnx.TypeProto()
    y.tensor_type.elem_type = onnx.TensorProto.FLOAT
    if state.tensor_type.HasField("shape"):
        steps = y.tensor_type.shape.dim.add()
        if context.get_num_inputs() > len(INPUTS) and (given := context.get_input_type(len(INPUTS))):
            order = given.tensor_type
            if order.HasField("shape"):
                steps.CopyFrom(order.shape.dim[0])
        y.tensor_type.shape.dim.extend(state.tensor_type.shape.dim)
    context.set_output_type(0, y)
