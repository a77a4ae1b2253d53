"""``edgesep::LstmSteps`` written in standard ONNX operators: a Scan over the steps."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, TensorProto, helper

from edgesep.lstm_scan import make, step_nodes
from edgesep.ops.lstm_steps import NAME as NAME


def function(node: NodeProto, name: str, shapes: dict[str, tuple[int, ...]], chunked: bool) -> Any:
    """A function with the meaning of this very node; its recurrent weight must be a constant in float."""
    del chunked
    groups, hidden, gates, size = shapes[node.input[1]]
    ordered = len(node.input) > 4
    names = ["gates", "recurrent", "initial_h", "initial_c", *(["order"] if ordered else [])]
    made = helper.make_node
    body = [
        made("Constant", [], ["one"], value_ints=[1]),
        made("Constant", [], ["two"], value_ints=[2]),
        made("Constant", [], ["first"], value_int=0),
        made("Constant", [], ["any"], value_ints=[-1]),
        made("Constant", [], ["wide"], value_ints=[4 * hidden]),
        made("Constant", [], ["narrow"], value_ints=[hidden]),
        made("Constant", [], ["zeros"], value_ints=[0]),
        made("Constant", [], ["channels"], value_ints=[2]),
        made("Constant", [], ["apart"], value_ints=[hidden, gates, groups * size]),
        made("Constant", [], ["matrix_shape"], value_ints=[hidden, gates * hidden]),
        made("Transpose", ["recurrent"], ["turned"], perm=[1, 2, 0, 3]),
        made("Reshape", ["turned", "apart"], ["filled"]),
        made("Slice", ["filled", "zeros", "narrow", "channels"], ["cut"]),
        made("Reshape", ["cut", "matrix_shape"], ["matrix"]),
        made("Shape", ["initial_h"], ["state_shape"]),
        made("Slice", ["state_shape", "one", "two"], ["all_rows"]),
    ]
    if ordered:
        body += [
            made("Shape", ["order"], ["order_shape"]),
            made("Slice", ["order_shape", "one", "two"], ["sets"]),
            made("Identity", ["order"], ["reads"]),
        ]
    else:
        body.append(made("Identity", ["one"], ["sets"]))
    body += [
        made("Div", ["all_rows", "sets"], ["rows"]),
        made("Concat", ["any", "rows", "wide"], ["frame_shape"], axis=0),
        made("Reshape", ["gates", "frame_shape"], ["frames"]),
        made("Concat", ["sets", "rows", "narrow"], ["set_shape"], axis=0),
        made("Reshape", ["initial_h", "set_shape"], ["h_first"]),
        made("Reshape", ["initial_c", "set_shape"], ["c_first"]),
    ]
    if not ordered:
        body += [
            made("Constant", [], ["step"], value_int=1),
            made("Shape", ["frames"], ["counted"]),
            made("Gather", ["counted", "first"], ["count"]),
            made("Range", ["first", "count", "step"], ["each"]),
            made("Unsqueeze", ["each", "one"], ["reads"]),
        ]
    body += [
        made("Scan", ["h_first", "c_first", "reads"], ["h_last", "c_last", "h_each"], body=_step(), num_scan_inputs=1),
        made("Concat", ["any", "one", "all_rows", "narrow"], ["y_shape"], axis=0),
        made("Reshape", ["h_each", "y_shape"], ["y"]),
        made("Reshape", ["h_last", "state_shape"], ["last_h"]),
        made("Reshape", ["c_last", "state_shape"], ["last_c"]),
    ]
    outputs = ["y", "last_h", "last_c"][: len(node.output)]
    return helper.make_function("edgesep", name, names, outputs, body, [helper.make_opsetid("", 20)])


def _step() -> Any:
    """One step of all sets: states ``h, c (S, R, H)`` and which frames are read ``(S)``."""
    nodes = [
        helper.make_node("Constant", [], ["nothing"], value_int=0),
        helper.make_node("Constant", [], ["axes"], value_ints=[1, 2]),
        make("Max", "read nothing", "there"),
        make("Gather", "frames there", "xw"),
        *step_nodes("matrix"),
        make("GreaterOrEqual", "read nothing", "reads_any"),
        make("Unsqueeze", "reads_any axes", "moves"),
        make("Where", "moves h_next h", "h_out"),
        make("Where", "moves c_next c", "c_out"),
        make("Identity", "h_out", "h_shown"),
    ]
    info = helper.make_tensor_value_info
    given = [
        info("h", TensorProto.FLOAT, None),
        info("c", TensorProto.FLOAT, None),
        info("read", TensorProto.INT64, None),
    ]
    outputs = [info(name, TensorProto.FLOAT, None) for name in ("h_out", "c_out", "h_shown")]
    return helper.make_graph(nodes, "step", given, outputs)
