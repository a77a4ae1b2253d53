"""``edgesep::PastAttention`` for ONNX: its schema with shape inference.

Shapes: as in ``past_attention``.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgesep.ops import past_attention as contract
from edgesep.ops import schemas

INPUTS = ("q", "k", "v", "past_k", "past_v", "hidden")


ATTRIBUTES = {f"{of}_{what}": (0.0, "of the past's integers") for of in "kv" for what in ("scale", "zero")}


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; float32, and perhaps uint8 for keys and values of the past."""
    others = dict.fromkeys(("past_k", "past_v"), (*schemas.FLOAT, "tensor(uint8)"))
    return schemas.schema(contract, INPUTS, ["y"], infer, required=len(INPUTS), others=others, attributes=ATTRIBUTES)


def infer(context: Any) -> None:
    """What is made is shaped as the values are."""
    context.set_output_type(0, context.get_input_type(INPUTS.index("v")))
