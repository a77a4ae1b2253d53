"""``edgesep::SelectiveScan`` written in standard ONNX operators, for runtimes without the native kernel.

Shapes: as in ``selective_scan``; Q steps a chunk, M chunks. Two forms compute the same sums:

* a loop over steps (ONNX's Scan), the least work and memory;
* a loop over chunks of Q = 16 steps, each in four doubling passes: sixteen times fewer iterations of sixteen times
  more parallel work, for GPUs. Nothing is divided, so it is exact wherever the recurrence is (the common trick of two
  cumulative sums is not: it divides by products of decays that underflow).
"""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, TensorProto, helper

from edgesep.ops.selective_scan import NAME as NAME
from edgesep.ops.selective_scan_onnx import INPUTS

CHUNK = 16


def function(node: NodeProto, name: str, shapes: dict[str, tuple[int, ...]], chunked: bool) -> Any:
    """A function with the meaning of this very node: its attributes and which of the optional inputs it has."""
    del shapes
    flags = {a.name: a.i for a in node.attribute}
    given = {formal for formal, actual in zip(INPUTS, node.input, strict=False) if actual}
    reverse = bool(flags.get("reverse"))
    body = [
        _node("Add", "delta delta_bias", "raw") if "delta_bias" in given else _node("Identity", "delta", "raw"),
        _node("Softplus" if flags.get("delta_softplus") else "Identity", "raw", "dt"),
        _node("Mul", "dt u", "x"),
        *_start("initial_state" in given),
        *(_chunks(reverse) if chunked else _steps(reverse)),
        *([_node("Mul", "D u", "skipped"), _node("Add", "scanned skipped", "ungated")] if "D" in given else []),
    ]
    last = "ungated" if "D" in given else "scanned"
    if "z" in given:
        body += [_node("Sigmoid", "z", "open"), _node("Mul", "z open", "gate"), _node("Mul", f"{last} gate", "y")]
    else:
        body.append(_node("Identity", last, "y"))
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function("edgesep", name, list(INPUTS), ["y", "last_state"], body, opsets)


def _node(kind: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def _ints(name: str, *values: int) -> NodeProto:
    return _node("Constant", "", name, value_ints=list(values))


def _start(given: bool) -> list[NodeProto]:
    """The state before the first step, ``(b, D, N)``."""
    if given:
        return [_node("Identity", "initial_state", "start")]
    return [
        _node("Shape", "u", "batch", start=0, end=1),
        _node("Shape", "A", "state_size"),
        _node("Concat", "batch state_size", "start_size", axis=0),
        _node("ConstantOfShape", "start_size", "start"),
    ]


def _loop(step: Any, over: str, reverse: bool) -> NodeProto:
    """ONNX's Scan of ``step`` over the sequences of that name, from ``start`` to ``last_state``."""
    return _node(
        "Scan",
        f"start dt_{over} x_{over} B_{over} C_{over}",
        f"last_state y_{over}",
        body=step,
        num_scan_inputs=4,
        scan_input_directions=[int(reverse)] * 4,
        scan_output_directions=[int(reverse)],
    )


def _values(names: str) -> list[Any]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names.split()]


def _steps(reverse: bool) -> list[NodeProto]:
    """One iteration a step: ``h (b, D, N)``, ``d, s (b, D)``, ``p, q (b, N)``."""
    step = helper.make_graph(
        [
            _ints("last", -1),
            _ints("middle", 1),
            _node("Unsqueeze", "d last", "d_"),
            _node("Mul", "d_ A", "exponent"),
            _node("Exp", "exponent", "decay"),
            _node("Mul", "decay h", "kept"),
            _node("Unsqueeze", "s last", "s_"),
            _node("Unsqueeze", "p middle", "p_"),
            _node("Mul", "s_ p_", "added"),
            _node("Add", "kept added", "h_next"),
            _node("Unsqueeze", "q last", "q_"),
            _node("MatMul", "h_next q_", "o_"),
            _node("Squeeze", "o_ last", "o"),
        ],
        "step",
        _values("h d s p q"),
        _values("h_next o"),
    )
    return [
        *(_node("Transpose", name, f"{name}_steps", perm=[1, 0, 2]) for name in ("dt", "x", "B", "C")),
        _loop(step, "steps", reverse),
        _node("Transpose", "y_steps", "scanned", perm=[1, 0, 2]),
    ]


def _chunks(reverse: bool) -> list[NodeProto]:
    """One iteration a chunk: ``h (b, D, N)``, ``d, s (b, Q, D)``, ``p, q (b, Q, N)``.

    After pass k every step holds the product of decays and the input of the 2**k steps that end there. Steps added to
    fill the last chunk have dt = 0: a decay of 1 and no input, so they change no state.
    """
    body = [
        _ints("last", -1),
        _ints("axis", 1),
        _ints("begin", 0),
        _ints("size", CHUNK),
        _ints("two", 2),
        _node("Unsqueeze", "d last", "d_"),
        _node("Mul", "d_ A", "exponent"),
        _node("Exp", "exponent", "decay0"),
        _node("Unsqueeze", "s last", "s_"),
        _node("Unsqueeze", "p two", "p_"),
        _node("Mul", "s_ p_", "state0"),
    ]
    distance, k = 1, 0
    while distance < CHUNK:
        # `early` steps have nothing that far before them; `late` ones take in what ended `distance` before.
        near = CHUNK - distance if reverse else distance
        body += [_ints(f"near{k}", near), _ints(f"edge{k}", CHUNK - near)]
        first, second = (f"begin near{k}", f"near{k} size") if not reverse else (f"near{k} size", f"begin near{k}")
        before = f"edge{k} size" if reverse else f"begin edge{k}"
        for what in ("decay", "state"):
            body += [
                _node("Slice", f"{what}{k} {first} axis", f"{what}{k}_early"),
                _node("Slice", f"{what}{k} {second} axis", f"{what}{k}_late"),
                _node("Slice", f"{what}{k} {before} axis", f"{what}{k}_before"),
            ]
        parts = ("early", "new") if not reverse else ("new", "early")
        body += [
            _node("Mul", f"decay{k}_late state{k}_before", f"carried{k}"),
            _node("Add", f"state{k}_late carried{k}", f"state{k}_new"),
            _node("Mul", f"decay{k}_late decay{k}_before", f"decay{k}_new"),
            *(
                _node("Concat", " ".join(f"{what}{k}_{p}" for p in parts), f"{what}{k + 1}", axis=1)
                for what in ("decay", "state")
            ),
        ]
        distance, k = 2 * distance, k + 1
    end = ("last", "size") if not reverse else ("begin", "axis")
    body += [
        _node("Unsqueeze", "h axis", "h_"),
        _node("Mul", f"decay{k} h_", "remembered"),
        _node("Add", f"state{k} remembered", "states"),
        _node("Unsqueeze", "q two", "q_"),
        _node("Mul", "states q_", "weighed"),
        _node("ReduceSum", "weighed last", "o", keepdims=0),
        _node("Slice", f"states {end[0]} {end[1]} axis", "end"),
        _node("Squeeze", "end axis", "h_next"),
    ]
    step = helper.make_graph(body, "chunk", _values("h d s p q"), _values("h_next o"))
    fill = [
        _node("Shape", "u", "length", start=1, end=2),
        _ints("chunk", CHUNK),
        _ints("rest", CHUNK - 1),
        _ints("sequence", 1),
        _ints("zero", 0),
        _node("Add", "length rest", "rounded"),
        _node("Div", "rounded chunk", "chunks"),
        _node("Mul", "chunks chunk", "filled"),
        _ints("padding", 0, 0, 0, 0, CHUNK - 1, 0),  # always the same, then cut: no length is ever subtracted
        _node("Shape", "u", "batch_now", start=0, end=1),
    ]
    split = []
    for name in ("dt", "x", "B", "C"):
        split += [
            _node("Pad", f"{name} padding", f"{name}_padded"),
            _node("Slice", f"{name}_padded zero filled sequence", f"{name}_filled"),
            _node("Shape", name, f"{name}_width", start=2, end=3),
            _node("Concat", f"batch_now chunks chunk {name}_width", f"{name}_size", axis=0),
            _node("Reshape", f"{name}_filled {name}_size", f"{name}_split"),
            _node("Transpose", f"{name}_split", f"{name}_chunks", perm=[1, 0, 2, 3]),
        ]
    return [
        *fill,
        *split,
        _loop(step, "chunks", reverse),
        _node("Transpose", "y_chunks", "y_split", perm=[1, 0, 2, 3]),
        _node("Concat", "batch_now filled dt_width", "y_size", axis=0),
        _node("Reshape", "y_split y_size", "y_filled"),
        _node("Slice", "y_filled zero length sequence", "scanned"),
    ]
