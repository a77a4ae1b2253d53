"""``edgesep::PastAttention`` for ONNX: its schema with shape inference.

Shapes: as in ``past_attention``.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgesep.ops import past_attention as contract

INPUTS = ("q", "k", "v", "past_k", "past_v", "hidden")


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, and perhaps uint8 for keys and values of the past."""
    kind = onnx.defs.OpSchema
    names = [f"{of}_{what}" for of in "kv" for what in ("scale", "zero")]
    made = kind(
        contract.NAME,
        contract.DOMAIN,
        contract.VERSION,
        contract.__doc__ or "",
        inputs=[kind.FormalParameter(name, {"past_k": "K", "past_v": "V"}.get(name, "T")) for name in INPUTS],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)"], "float32"),
            *((of, ["tensor(float)", "tensor(uint8)"], "float32, or uint8 with a scale") for of in "KV"),
        ],
        attributes=[
            kind.Attribute(name, onnx.helper.make_attribute(name, 0.0), "of the past's integers") for name in names
        ],
    )
    made.set_type_and_shape_inference_function(infer)
    return made


def infer(context: Any) -> None:
    """What is made is shaped as the values are."""
    context.set_output_type(0, context.get_input_type(INPUTS.index("v")))
