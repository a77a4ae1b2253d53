"""From a torch module to a clean ONNX file: the only caller of ``torch.onnx.export``.

Shapes: exports keep batch and samples dynamic.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import slice_split_rule
from onnxscript.values import Opset
from torch import nn
from torch.export._patches import register_lstm_while_loop_decomposition

from edgesep.onnx_edit import clean, leaky, split_products
from edgesep.ops import onnx_forms
from edgesep.separators.base import Separator, unrolled
from edgesep.spec import BuildError

OPSET = 20
EXAMPLE_S = 1.03717  # length of the example, odd in samples at 8 kHz: a multiple of a hop may get burnt in


def dynamic_shapes(separator: Separator) -> tuple[dict[int, torch.export.Dim], ...] | None:
    """One entry per input: its named axes as dynamic dimensions; None where all sizes are fixed (streams)."""
    if separator.stream is not None:
        return None
    dims = {name: torch.export.Dim(name) for spec in separator.inputs for name in spec.shape if isinstance(name, str)}
    # The bound keeps shape guards of very short lengths out of the trace; the graph itself is not bound by it.
    dims["samples"] = torch.export.Dim("samples", min=separator.sample_rate_hz // 4)
    return tuple({i: dims[n] for i, n in enumerate(spec.shape) if isinstance(n, str)} for spec in separator.inputs)


def capture(separator: Separator) -> nn.Module:
    """The separator as an ATen graph with distinct modules for each iteration, for quantizers."""
    with quiet(), lstms_of_any_length():
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

    The project's own operators stay nodes of their own; ``onnx_forms.portable`` writes them out.

    Raises:
        BuildError: the exporter failed or made an invalid graph.
    """
    try:
        with quiet(), torch.no_grad(), lstms_of_any_length(), quick_rewriting():
            program = torch.onnx.export(
                module,
                example(separator),
                dynamo=True,
                input_names=[s.name for s in separator.inputs],
                output_names=[s.name for s in separator.outputs],
                dynamic_shapes=dynamic_shapes(separator),
                opset_version=OPSET,
                external_data=False,
                custom_translation_table=_translations(),
                verbose=False,
            )
        assert program is not None  # dynamo=True always returns one
        model = program.model_proto
    except Exception as e:  # the exporter raises whatever its passes raise
        raise BuildError(f"torch.onnx.export failed for {separator.name}: {str(e).splitlines()[0]}") from e
    name_nodes(model, separator)
    leaky(model)
    split_products(model)
    clean(model)
    _refuse_burnt_in(model, separator)
    describe(model, separator)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def name_nodes(model: onnx.ModelProto, separator: Separator) -> None:
    """Name every node after the submodule it computes: ``sm.unet.res_conv/Conv_12``.

    That is the one whose weight it takes, found by value because exporters rename and transpose; else the one whose
    forward it was traced in.
    """
    owners: dict[bytes, str] = {}
    for owner, module in separator.module.named_modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if value.ndim >= 2:
                for form in (value, value.mT):
                    owners.setdefault(form.detach().contiguous().numpy().tobytes(), owner)
    constants = {c.name: owners.get(onnx.numpy_helper.to_array(c).tobytes()) for c in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "['', '']")
        traced = ast.literal_eval(scopes)[-2]
        owner = next((found for name in node.input if (found := constants.get(name)) is not None), traced)
        node.name = f"{owner}/{node.op_type}_{number}"


def layer_of(node: onnx.NodeProto) -> str:
    """The submodule that an exported node computes (``name_nodes``)."""
    return node.name.rpartition("/")[0]


def within(layer: str, modules: Iterable[str]) -> bool:
    """Whether a layer is one of these submodules or lies in one."""
    return any(layer == m or layer.startswith(f"{m}.") for m in modules)


def _refuse_burnt_in(model: onnx.ModelProto, separator: Separator) -> None:
    """The exporter may fix a length that was to stay dynamic, and says nothing.

    Raises:
        BuildError: names the input and the length.
    """
    for value, spec in zip(model.graph.input, separator.inputs, strict=True):
        for size, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(wanted, str) and not size.dim_param:
                raise BuildError(
                    f"the export of {separator.name} takes {size.dim_value} {wanted} in {spec.name} alone; report this"
                )


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter makes of the project's torch operators (those whose files were imported)."""
    onnx_forms.register()
    opset, own = Opset(onnx_forms.DOMAIN, 1), torch.ops.edgesep
    return {
        getattr(own, name).default: functools.partial(translate, opset)
        for name, translate in onnx_forms.translations().items()
        if hasattr(own, name)
    }


def describe(model: onnx.ModelProto, separator: Separator) -> None:
    """Write into the file what a device needs to feed it."""
    facts = {
        "separator": separator.name,
        "sample_rate_hz": separator.sample_rate_hz,
        "sources": separator.sources,
        "inputs": [s.to_json() for s in separator.inputs],
        "outputs": [s.to_json() for s in separator.outputs],
        "stream": separator.stream and separator.stream.to_json(),
        "flat_maps": separator.flat_maps,
    }
    onnx.helper.set_model_props(model, {"edgesep": json.dumps(facts)})


@contextlib.contextmanager
def lstms_of_any_length() -> Iterator[None]:
    """Traces do not unroll LSTMs over the example's frames.

    The exporter sees to that by itself, but for its first step alone, and only as long as no other trace of the
    process has met an LSTM: which decomposition a trace takes is cached, and registering another does not clear that.
    """
    cached = torch.ops.aten.lstm.input._dispatch_cache
    cached.clear()
    try:
        with register_lstm_while_loop_decomposition():
            yield
    finally:
        cached.clear()


@contextlib.contextmanager
def quick_rewriting() -> Iterator[None]:
    """The exporter's rewriting without the one rule that looks through the whole graph for every node that it tries.

    It is the only one of several outputs and makes the time quadratic in the nodes; no separator has what it looks for.
    """
    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter._DEFAULT_REWRITE_RULES = tuple(r for r in rules if r is not slice_split_rule)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


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
