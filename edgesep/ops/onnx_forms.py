"""The custom operators in ONNX graphs: known to onnx, exported from torch, and written out in standard operators.

An exported graph holds one node an operator. A runtime with the native kernels runs it as it is; ``portable`` writes
the nodes out for all others; ``callable_anywhere`` leaves the nodes and adds their meaning as functions, for tools that
run a graph but take no kernels (calibration). The folder is the registry: ``*_onnx`` and ``*_portable`` files.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from onnx import helper, inliner

from edgesep import fusion, head_fusion, mamba_fusion, ops, rows, stream_fusion, window_fusion
from edgesep.onnx_edit import fold_rearranged, inferred_shapes

DOMAIN = "edgesep"


def _modules(suffix: str) -> list[ModuleType]:
    names = (i.name for i in pkgutil.iter_modules(ops.__path__))
    return [import_module(f"{ops.__name__}.{name}") for name in sorted(names) if name.endswith(suffix)]


def register() -> None:
    """Make the operators known to this process's onnx (checker, shape inference); again does nothing."""
    for module in _modules("_onnx"):
        made = module.schema()
        if not onnx.defs.has(made.name, made.domain):
            onnx.defs.register_schema(made)


def translations() -> dict[str, Callable[..., Any]]:
    """Name in ``torch.ops.edgesep`` → what makes its node, called with an onnxscript opset before the arguments."""
    return {m.TORCH: m.translate for m in _modules("_onnx") if hasattr(m, "TORCH")}


def is_native(model: onnx.ModelProto) -> bool:
    """Whether the graph holds nodes that need native kernels."""
    return any(True for _ in _own(model))


def _own(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.domain == DOMAIN)


def callable_anywhere(model: onnx.ModelProto, chunked: bool = False) -> onnx.ModelProto:
    """A copy in which each custom node is a call of a function of the file; ``original_names`` takes that back."""
    made, functions = onnx.ModelProto(), {m.NAME: m.function for m in _modules("_portable")}
    made.CopyFrom(model)
    shapes = {c.name: tuple(c.dims) for c in made.graph.initializer}
    known: dict[bytes, str] = {}
    for node in list(_own(made)):
        function = functions[node.op_type](node, "body", shapes, chunked)
        name = known.get(function.SerializeToString())
        if name is None:
            name = known[function.SerializeToString()] = f"{node.op_type}__{len(known)}"
            function.name = name
            made.functions.append(function)
        node.op_type = name
        del node.attribute[:]  # they are part of the function's body
    return made


def original_names(model: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Take ``callable_anywhere`` back, in place; ``before`` is the model as it was, whose nodes keep their outputs."""
    attributes = {node.output[0]: node.attribute for node in _own(before)}
    for node in _own(model):
        node.op_type = node.op_type.partition("__")[0]
        node.attribute.extend(attributes[node.output[0]])
    del model.functions[:]


def portable(model: onnx.ModelProto, chunked: bool = False) -> onnx.ModelProto:
    """The model in standard operators alone, itself if it is; ``chunked`` for GPUs (``selective_scan_portable``)."""
    if not is_native(model):
        return model
    made = inliner.inline_local_functions(callable_anywhere(model, chunked))
    fold_rearranged(made)
    left = [o for o in made.opset_import if o.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(left)
    return made


def has_native_form(model: onnx.ModelProto, runtime: Any) -> bool:
    """Whether native kernels change anything: custom nodes in the graph, or units that the runtime can have fused."""
    return is_native(model) or (getattr(runtime, "FUSES", False) and (has_flat_maps(model) or streams(model)))


def has_flat_maps(model: onnx.ModelProto) -> bool:
    """Whether every map of the graph is ``(B, C, 1, L)``, as the export says."""
    return bool(_facts(model).get("flat_maps"))


def streams(model: onnx.ModelProto) -> bool:
    """Whether the graph streams, and holds what native kernels do for that."""
    return bool(_facts(model).get("stream")) and stream_fusion.applies(model)


def _facts(model: onnx.ModelProto) -> dict[str, Any]:
    """What the export says of the graph."""
    return dict(json.loads(next((p.value for p in model.metadata_props if p.key == DOMAIN), "{}")))


def write_form(model: Path, out: Path, runtime: Any = None, *, native: bool = False, precision: str = "fp32") -> None:
    """Write an exported file in the form that a runtime takes.

    Args:
        runtime: its module (``edgesep.runtimes``); without one the form is portable.
        native: it has the native kernels.
        precision: of the build; what the runtime makes bf16 of stays the runtime's.
    """
    made = onnx.load(model)
    if not native:
        made = portable(made, getattr(runtime, "CHUNKED_SCAN", False))
    elif getattr(runtime, "FUSES", False) and has_flat_maps(made):
        made = fusion.fuse(made)
    elif getattr(runtime, "FUSES", False) and streams(made):
        shapes = inferred_shapes(made)  # once: what is fused keeps the names of what it makes
        made = stream_fusion.fuse(head_fusion.fuse(made, shapes))
        if precision != "bf16":
            made = window_fusion.fuse(made, shapes, unfold=precision == "fp32")
    elif getattr(runtime, "FUSES", False):
        made = mamba_fusion.fuse(made, precision == "bf16")
    if native and getattr(runtime, "ROWS", False):
        made = rows.a_few_at_a_time(made)
    onnx.save(made, out)


def for_plugins(model: bytes) -> bytes:
    """A serialized model in the form in which TensorRT's parser finds the plug-ins.

    Their inputs have no gaps: ``given`` says which of the contract's inputs there are (bit i: input i). The namespace
    stands in an attribute too, where releases before 10.10 look for it.
    """
    made = onnx.load_from_string(model)
    for node in _own(made):
        given = sum(1 << i for i, name in enumerate(node.input) if name)
        there = [name for name in node.input if name]
        del node.input[:]
        node.input.extend(there)
        node.attribute.extend(
            [helper.make_attribute("given", given), helper.make_attribute("plugin_namespace", DOMAIN)]
        )
    return bytes(made.SerializeToString())
