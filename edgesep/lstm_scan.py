"""LSTMs as ONNX's Scan, for runtimes that have loops but stumble over their own LSTM.

Shapes: steps T, rows R, inputs C, hidden H: sequences ``(T, R, C)``, states ``(1, R, H)``, ONNX's order of gates
(input, output, forget, cell).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import TensorProto, helper, load_from_string

from edgesep.spec import UnsupportedError


def scans_for_lstms(model: bytes) -> bytes:
    """Write each LSTM of a serialized model out as a Scan with the same sums.

    Raises:
        UnsupportedError: an LSTM of another kind than torch exports.
    """
    proto = load_from_string(model)
    nodes: list[Any] = []
    for k, node in enumerate(proto.graph.node):
        if node.op_type != "LSTM":
            nodes.append(node)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        hidden = given.pop("hidden_size")
        plain = {"direction": b"forward", "input_forget": 0, "layout": 0}
        if other := {name: value for name, value in given.items() if value != plain.get(name)}:
            raise UnsupportedError(f"{node.name}: an LSTM with {other} has no Scan form here")
        x, w, r, b, lengths, h0, c0 = (list(node.input) + [""] * 7)[:7]
        if not (b and h0 and c0) or lengths:
            raise UnsupportedError(f"{node.name}: needs a bias and initial states, and sequences of one length")
        own = [f"lstm{k}_{what}" for what in ("0", "1", "gates", "w", "r", "wt", "rt", "b", "half", "other", "sum")]
        zero, one, gates, w0, r0, wt, rt, b0, bw, br, bias = own
        xw, xwb, h, c, hn, cn, y = (f"lstm{k}_{what}" for what in ("xw", "xwb", "h", "c", "hn", "cn", "y"))
        for name, values in ((zero, [0]), (one, [1]), (gates, [4 * hidden, 4 * hidden])):
            proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        make: Callable[..., Any] = helper.make_node
        step = helper.make_graph(
            [
                make("MatMul", ["h", rt], ["hr"]),
                make("Add", ["xw", "hr"], ["all"]),
                make("Split", ["all"], ["i_", "o_", "f_", "g_"], axis=1, num_outputs=4),  # ONNX's order of gates
                *(make("Sigmoid", [f"{gate}_"], [gate]) for gate in "iof"),
                make("Tanh", ["g_"], ["g"]),
                make("Mul", ["f", "c"], ["kept"]),
                make("Mul", ["i", "g"], ["added"]),
                make("Add", ["kept", "added"], ["c_next"]),
                make("Tanh", ["c_next"], ["bounded"]),
                make("Mul", ["o", "bounded"], ["h_next"]),
                make("Identity", ["h_next"], ["y"]),
            ],
            f"lstm{k}_step",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h", "c", "xw")],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h_next", "c_next", "y")],
        )
        nodes += [
            *(make("Squeeze", [a, zero], [q]) for a, q in ((w, w0), (r, r0), (b, b0), (h0, h), (c0, c))),
            make("Transpose", [w0], [wt]),
            make("Transpose", [r0], [rt]),
            make("Split", [b0, gates], [bw, br]),
            make("Add", [bw, br], [bias]),
            make("MatMul", [x, wt], [xw]),
            make("Add", [xw, bias], [xwb]),
            make("Scan", [h, c, xwb], [hn, cn, y], body=step, num_scan_inputs=1),
        ]
        wanted = zip(node.output, ((y, one), (hn, zero), (cn, zero)), strict=False)
        nodes += [make("Unsqueeze", [value, axis], [name]) for name, (value, axis) in wanted if name]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString())
