"""From a torch module to a clean ONNX file: the only caller of ``torch.onnx.export``.

Shapes: exports keep batch and samples dynamic.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from edgesep.separators.base import Separator, unrolled
from edgesep.spec import BuildError

OPSET = 20
EXAMPLE_S = 1.03  # length of the example; no multiple of any stride in use


def dynamic_shapes(separator: Separator) -> tuple[dict[int, torch.export.Dim], ...]:
    """One entry per input: its named axes as dynamic dimensions."""
    dims = {name: torch.export.Dim(name) for spec in separator.inputs for name in spec.shape if isinstance(name, str)}
    # The bound keeps shape guards of very short lengths out of the trace; the graph itself is not bound by it.
    dims["samples"] = torch.export.Dim("samples", min=separator.sample_rate_hz // 4)
    return tuple({i: dims[n] for i, n in enumerate(spec.shape) if isinstance(n, str)} for spec in separator.inputs)


def capture(separator: Separator) -> nn.Module:
    """The separator as an ATen graph with distinct modules for each iteration, for quantizers."""
    with quiet():
        program = torch.export.export(
            unrolled(separator.module),
            example(separator),
            dynamic_shapes=dynamic_shapes(separator),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    return program.module()


def example(separator: Separator) -> tuple[torch.Tensor, ...]:
    # Batch 2: a size of 1 would be burnt in.
    return separator.example_inputs(int(EXAMPLE_S * separator.sample_rate_hz), batch=2)


def export_onnx(separator: Separator, module: nn.Module, path: Path) -> None:
    """Export ``module`` (the separator's own, or a quantized capture of it) with the separator's names.

    Raises:
        BuildError: the exporter failed or made an invalid graph.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                example(separator),
                dynamo=True,
                input_names=[s.name for s in separator.inputs],
                output_names=[s.name for s in separator.outputs],
                dynamic_shapes=dynamic_shapes(separator),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        assert program is not None  # dynamo=True always returns one
        model = program.model_proto
    except Exception as e:  # the exporter raises whatever its passes raise
        raise BuildError(f"torch.onnx.export failed for {separator.name}: {str(e).splitlines()[0]}") from e
    clean(model)
    describe(model, separator)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def describe(model: onnx.ModelProto, separator: Separator) -> None:
    """Write into the file what a device needs to feed it."""
    facts = {
        "separator": separator.name,
        "sample_rate_hz": separator.sample_rate_hz,
        "sources": separator.sources,
        "inputs": [s.to_json() for s in separator.inputs],
        "outputs": [s.to_json() for s in separator.outputs],
    }
    onnx.helper.set_model_props(model, {"edgesep": json.dumps(facts)})


def clean(model: onnx.ModelProto) -> None:
    """Quantized weights as integers, each constant once, no traces of the exporter."""
    fold_quantized_weights(model)
    share_initializers(model)
    for node in nodes(model.graph):
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]  # stale where lengths are dynamic
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for constant in model.graph.initializer:
        del constant.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def fold_quantized_weights(model: onnx.ModelProto) -> None:
    """Replace QuantizeLinear of a constant by the integer constant: a quarter of the size, the same numbers."""
    graph = model.graph
    constants = {c.name: c for c in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or any(name not in constants for name in node.input):
            kept.append(node)
            continue
        value, scale, *zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        zero_point = zero[0] if zero else np.zeros(scale.shape, np.uint8)
        along = [1] * value.ndim
        if scale.ndim:
            along[axis] = scale.size
        limits = np.iinfo(zero_point.dtype)
        steps = np.rint(value / scale.reshape(along)) + zero_point.reshape(along).astype(np.float32)
        integer = steps.clip(limits.min, limits.max).astype(zero_point.dtype)
        graph.initializer.append(numpy_helper.from_array(integer, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused_initializers(graph)


def share_initializers(model: onnx.ModelProto) -> None:
    """Keep one of equal constants (iterated blocks share their weights)."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    rename = {}
    for constant in model.graph.initializer:
        key = (constant.data_type, tuple(constant.dims), numpy_helper.to_array(constant).tobytes())
        rename[constant.name] = first.setdefault(key, constant.name)
    for node in nodes(model.graph):
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
    drop_unused_initializers(model.graph)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those in bodies of loops too: a body reads constants of the graph around it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in nodes(graph) for name in node.input} | {o.name for o in graph.output}
    kept = [c for c in graph.initializer if c.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' log lines and deprecation notes off the user's terminal; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
