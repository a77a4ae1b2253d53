"""``edgesep::LstmSteps`` for ONNX: its schema with shape inference.

Shapes: as in ``lstm_steps``.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgesep.ops import lstm_steps as contract
from edgesep.ops import schemas

INPUTS = ("gates", "recurrent", "initial_h", "initial_c", "order", "scale")
STATE, ORDER = 2, 4


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, int64 for the order, and perhaps int8 for the matrix."""
    others = {"recurrent": (*schemas.FLOAT, "tensor(int8)"), "order": ("tensor(int64)",)}
    return schemas.schema(contract, INPUTS, ["y", "last_h", "last_c"], infer, required=4, others=others)


def infer(context: Any) -> None:
    """States are shaped as they came; before the rows of ``y`` stand its steps and an axis of one."""
    for i in range(1, context.get_num_outputs()):
        context.set_output_type(i, context.get_input_type(STATE))
    state, order = schemas.dims_of(context, STATE), schemas.dims_of(context, ORDER)
    schemas.put_dims(context, [order[0] if order else 0, *state] if state else [])
