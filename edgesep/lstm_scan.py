"""LSTMs as ONNX's Scan, for runtimes that have loops but stumble over their own LSTM.

Shapes: steps T, rows R, inputs C, hidden H: sequences ``(T, R, C)``, states ``(1, R, H)``, ONNX's order of gates
(input, output, forget, cell).
"""

from __future__ import annotations

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
        written, constants = _scan(node, f"lstm{k}_")
        nodes += written
        proto.graph.initializer.extend(constants)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString())


def unusual(node: Any) -> dict[str, Any]:
    """What of an LSTM is not as torch exports it, by attribute."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "hidden_size"}
    plain = {"direction": b"forward", "input_forget": 0, "layout": 0}
    return {name: value for name, value in given.items() if value != plain.get(name)}


def make(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node; names stand with a space between them."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def step_nodes(recurrent: str) -> list[Any]:
    """One step: ``xw`` (..., 4H), the projected input, with ``h`` and ``c`` → ``h_next`` and ``c_next`` (..., H)."""
    return [
        make("MatMul", f"h {recurrent}", "hr"),
        make("Add", "xw hr", "all"),
        make("Split", "all", "i_ o_ f_ g_", axis=-1, num_outputs=4),
        *(make("Sigmoid", f"{gate}_", gate) for gate in "iof"),
        make("Tanh", "g_", "g"),
        make("Mul", "f c", "kept"),
        make("Mul", "i g", "added"),
        make("Add", "kept added", "c_next"),
        make("Tanh", "c_next", "bounded"),
        make("Mul", "o bounded", "h_next"),
    ]


def _scan(node: Any, own: str) -> tuple[list[Any], list[Any]]:
    """Nodes and constants in place of one LSTM; the names of what is new begin with ``own``."""
    hidden = next(a.i for a in node.attribute if a.name == "hidden_size")
    if other := unusual(node):
        raise UnsupportedError(f"{node.name}: an LSTM with {other} has no Scan form here")
    x, w, r, b, lengths, h0, c0 = (list(node.input) + [""] * 7)[:7]
    if not (b and h0 and c0) or lengths:
        raise UnsupportedError(f"{node.name}: needs a bias and initial states, and sequences of one length")

    def values(names: str) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names.split()]

    step = helper.make_graph(
        [*step_nodes(f"{own}rt"), make("Identity", "h_next", "y")],
        f"{own}step",
        values("h c xw"),
        values("h_next c_next y"),
    )
    constants = [
        helper.make_tensor(f"{own}{name}", TensorProto.INT64, [len(numbers)], numbers)
        for name, numbers in (("zero", [0]), ("one", [1]), ("halves", [4 * hidden, 4 * hidden]))
    ]
    written = [
        *(make("Squeeze", f"{a} {own}zero", own + name) for a, name in zip((w, r, b, h0, c0), "wrbhc", strict=True)),
        make("Transpose", f"{own}w", f"{own}wt"),
        make("Transpose", f"{own}r", f"{own}rt"),
        make("Split", f"{own}b {own}halves", f"{own}bw {own}br"),  # one bias for each of the two products
        make("Add", f"{own}bw {own}br", f"{own}bias"),
        make("MatMul", f"{x} {own}wt", f"{own}product"),
        make("Add", f"{own}product {own}bias", f"{own}xw"),
        make("Scan", f"{own}h {own}c {own}xw", f"{own}h_last {own}c_last {own}y", body=step, num_scan_inputs=1),
    ]
    made = (("y", "one"), ("h_last", "zero"), ("c_last", "zero"))  # in the order of the LSTM's outputs
    for wanted, (name, axis) in zip(node.output, made, strict=False):
        if wanted:
            written.append(make("Unsqueeze", f"{own}{name} {own}{axis}", wanted))
    return written, constants
