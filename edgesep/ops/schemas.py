"""What operators' schemas share; in shape inference a dimension that is not known is 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import onnx

FLOAT = ("tensor(float)",)


def schema(
    contract: ModuleType,
    inputs: Sequence[str],
    outputs: Sequence[str],
    infer: Callable[[Any], None],
    *,
    required: int,
    axes: Mapping[str, tuple[str, ...]] | None = None,
    others: Mapping[str, tuple[str, ...]] | None = None,
    attributes: Mapping[str, tuple[Any, str]] | None = None,
) -> onnx.defs.OpSchema:
    """A schema of tensors of float32.

    Args:
        contract: the module that names the operator.
        infer: its shape inference.
        required: inputs that must be there; of outputs the first one must.
        axes: name of an input or output → names of its axes.
        others: name of an input → its types, if it is not float32 alone.
        attributes: name → default and meaning.
    """
    kind, others, axes = onnx.defs.OpSchema, others or {}, axes or {}
    option = kind.FormalParameterOption

    def parameters(names: Sequence[str], must: int) -> list[Any]:
        return [
            kind.FormalParameter(
                name,
                f"T_{name}" if name in others else "T",
                f"({', '.join(axes[name])})" if name in axes else "",
                param_option=option.Single if i < must else option.Optional,
            )
            for i, name in enumerate(names)
        ]

    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=parameters(inputs, required),
        outputs=parameters(outputs, 1),
        type_constraints=[
            ("T", list(FLOAT), "float32"),
            *((f"T_{name}", list(types), f"of {name}") for name, types in others.items()),
        ],
        attributes=[
            kind.Attribute(name, onnx.helper.make_attribute(name, default), meaning)
            for name, (default, meaning) in (attributes or {}).items()
        ],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def dims_of(context: Any, place: int) -> list[int]:
    """Of an input; none where nothing is known of it or it is not there."""
    kind = context.get_input_type(place) if place < context.get_num_inputs() else None
    found = kind.tensor_type if kind is not None else None
    return [d.dim_value for d in found.shape.dim] if found is not None and found.HasField("shape") else []


def put_dims(context: Any, dims: Sequence[int]) -> None:
    """Say what shape the first output has, of float32; without dimensions nothing but its type."""
    made = onnx.TypeProto()
    made.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for size in dims:
        dim = made.tensor_type.shape.dim.add()
        if size:
            dim.dim_value = size
    context.set_output_type(0, made)
