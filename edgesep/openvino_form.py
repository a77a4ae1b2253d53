"""A graph as OpenVINO runs it: on the build host alone, which has the onnx package."""

from __future__ import annotations

import onnx

from edgesep.compact import compact
from edgesep.early_rounding import round_first
from edgesep.integer_states import hold_in_integers


def for_openvino(serialized: bytes, *, narrow: bool = False) -> bytes:
    """A portable or native file; its constants and names are shortened (``compact``).

    Args:
        narrow: store what is in float as float16, or in eight bits where it has no more.
    """
    model = onnx.load_from_string(serialized)
    hold_in_integers(model)
    round_first(model.graph)
    # It finds constants of the graph around a body, but nothing that is made there.
    compact(model, narrow=narrow, in_bodies=False)
    return bytes(model.SerializeToString())
