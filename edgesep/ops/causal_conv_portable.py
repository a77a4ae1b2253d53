"""``edgesep::CausalConv1dSilu`` written in standard ONNX operators: a depthwise Conv over the past, x · sigmoid(x)."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from edgesep.ops.causal_conv import NAME as NAME
from edgesep.spec import UnsupportedError


def function(node: NodeProto, name: str, shapes: dict[str, tuple[int, ...]], chunked: bool) -> Any:
    """A function with the meaning of this very node; its weight must be a constant, because Conv's group is."""
    del chunked
    if node.input[1] not in shapes:
        raise UnsupportedError(f"{node.name}: the weight {node.input[1]} is computed in the graph, expected a constant")
    channels, taps = shapes[node.input[1]]
    swap, past = [0, 2, 1], taps - 1
    reverse = any(a.name == "reverse" and a.i for a in node.attribute)
    body = [
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Constant", [], ["order"], value_ints=list(range(taps))[:: -1 if reverse else 1]),
        helper.make_node("Gather", ["weight", "order"], ["ordered"], axis=1),
        helper.make_node("Unsqueeze", ["ordered", "one"], ["kernel"]),
        helper.make_node("Transpose", ["x"], ["rows"], perm=swap),
        helper.make_node(
            "Conv", ["rows", "kernel", "bias"], ["made"], group=channels, pads=[0, past] if reverse else [past, 0]
        ),
        helper.make_node("Sigmoid", ["made"], ["open"]),
        helper.make_node("Mul", ["made", "open"], ["active"]),
        helper.make_node("Transpose", ["active"], ["y"], perm=swap),
    ]
    return helper.make_function("edgesep", name, ["x", "weight", "bias"], ["y"], body, [helper.make_opsetid("", 20)])
