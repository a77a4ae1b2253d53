"""What shape inference of the operators shares: dimensions of what a node reads and makes, 0 for what is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx


def dims_of(context: Any, place: int) -> list[int]:
    """Of an input; none where nothing is known of it or it is not there."""
    kind = context.get_input_type(place) if place < context.get_num_inputs() else None
    found = kind.tensor_type if kind is not None else None
    return [d.dim_value for d in found.shape.dim] if found is not None and found.HasField("shape") else []


def put_dims(context: Any, dims: Sequence[int], place: int = 0) -> None:
    """Say what shape an output of float32 has; without dimensions nothing but its type."""
    made = onnx.TypeProto()
    made.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for size in dims:
        dim = made.tensor_type.shape.dim.add()
        if size:
            dim.dim_value = size
    context.set_output_type(place, made)
