"""``edgesep::SelectiveScan`` for ONNX: its schema with shape inference, and an implementation for ONNX's evaluator.

    onnx_forms.register()                                         # onnx.checker and shape inference know it from now on
    ReferenceEvaluator(model, new_ops=[selective_scan_onnx.SelectiveScan])     # runs it in numpy, float64

Shapes: as in ``selective_scan``. The inputs stand in this order; those left out have an empty name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from edgesep.ops import schemas
from edgesep.ops import selective_scan as contract

#: name → axes by name; from ``D`` on optional
INPUTS: dict[str, tuple[str, ...]] = {
    "u": ("batch", "length", "channels"),
    "delta": ("batch", "length", "channels"),
    "A": ("channels", "state"),
    "B": ("batch", "length", "state"),
    "C": ("batch", "length", "state"),
    "D": ("channels",),
    "z": ("batch", "length", "channels"),
    "delta_bias": ("channels",),
    "initial_state": ("batch", "channels", "state"),
}
OUTPUTS: dict[str, tuple[str, ...]] = {"y": INPUTS["u"], "last_state": INPUTS["initial_state"]}
REQUIRED = 5
ATTRIBUTES = {
    "delta_softplus": (0, "1: dt = softplus(delta + delta_bias)"),
    "reverse": (0, "1: from the last step to the first"),
}
TORCH = "selective_scan"  # the operator's name in torch.ops.edgesep


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32 alone."""
    axes = INPUTS | OUTPUTS
    return schemas.schema(contract, [*INPUTS], [*OUTPUTS], infer, required=REQUIRED, axes=axes, attributes=ATTRIBUTES)


def infer(context: Any) -> None:
    """Outputs' shapes from whatever the inputs know of each axis.

    Raises:
        onnx.shape_inference.InferenceError: an input of another rank, or two that contradict each other.
    """
    axes: dict[str, onnx.TensorShapeProto.Dimension] = {}
    for i, (name, named) in enumerate(INPUTS.items()):
        given = context.get_input_type(i) if i < context.get_num_inputs() else None
        if given is None or not given.tensor_type.HasField("shape"):
            continue
        dims = given.tensor_type.shape.dim
        if len(dims) != len(named):
            raise onnx.shape_inference.InferenceError(
                f"{name} has rank {len(dims)}, expected {len(named)}: ({', '.join(named)})"
            )
        for axis, dim in zip(named, dims, strict=True):
            before = axes.setdefault(axis, dim)
            if before.HasField("dim_value") and dim.HasField("dim_value") and before.dim_value != dim.dim_value:
                raise onnx.shape_inference.InferenceError(
                    f"{name} has {axis} = {dim.dim_value}, an input before it {before.dim_value}"
                )
            if dim.HasField("dim_value") or (not before.HasField("dim_value") and not before.dim_param):
                axes[axis] = dim
    for i, named in enumerate(OUTPUTS.values()):
        if i >= context.get_num_outputs():
            break
        made = onnx.TypeProto()
        made.tensor_type.elem_type = onnx.TensorProto.FLOAT
        made.tensor_type.shape.dim.extend(axes.get(a, onnx.TensorShapeProto.Dimension()) for a in named)
        context.set_output_type(i, made)


class SelectiveScan(OpRun):
    """The operator in ``onnx.reference.ReferenceEvaluator``."""

    op_domain = contract.DOMAIN

    def _run(
        self, *inputs: np.ndarray | None, delta_softplus: int | None = None, reverse: int | None = None
    ) -> Sequence[np.ndarray]:
        given: dict[str, Any] = dict(zip(INPUTS, inputs, strict=False))
        y, last = contract.reference(**given, delta_softplus=bool(delta_softplus), reverse=bool(reverse))
        return (y.astype(np.float32), last.astype(np.float32))[: len(self.onnx_node.output)]


def translate(
    opset: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    initial_state: Any = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Any:
    """The node that stands for the torch operator in an export."""
    inputs = [u, delta, A, B, C, D, z, delta_bias, initial_state]
    while inputs[-1] is None:  # trailing inputs are left out, those between have no name
        inputs.pop()
    return opset.SelectiveScan(*inputs, delta_softplus=int(delta_softplus), reverse=int(reverse), _outputs=2)
