"""Static INT8: Q/DQ around convolutions and matrix products, calibrated on mixtures.

Two methods make the same kind of graph. ``neural-compressor`` quantizes the captured torch graph (PT2E) and exports
it; ``onnxruntime`` quantizes the exported ONNX file. Model input and output, norms and everything else stay float;
biases stay float too, because TensorRT's parser refuses int32 ones.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch

from edgesep import graph, onnx_edit
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, PassResult
from edgesep.separators.base import Separator
from edgesep.spec import BuildError, InputError, StreamSpec
from edgesep.stream import Hops


@dataclass(frozen=True)
class Quantize:
    """Static INT8 quantization.

    Attributes:
        method: which library places and calibrates the quantizers.
        mixtures: how many calibration mixtures are run, at most.
        keep_float: further submodules to leave in float, beside the separator's own input and output.
        symmetric: int8 activations around zero, as TensorRT and ARM want them; else uint8 with a zero point, which
            x86 multiplies fastest.
    """

    method: Literal["neural-compressor", "onnxruntime"] = "neural-compressor"
    mixtures: int = 16
    keep_float: tuple[str, ...] = ()
    symmetric: bool = False

    stage: ClassVar[str] = "onnx"
    precision: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.method not in ("neural-compressor", "onnxruntime"):
            raise InputError(f"quantize.method {self.method!r} is not known, use neural-compressor or onnxruntime")
        if self.mixtures < 1:
            raise InputError(f"quantize.mixtures is {self.mixtures}, at least one mixture is needed to calibrate")
        object.__setattr__(self, "keep_float", tuple(self.keep_float))

    def __call__(self, separator: Separator, model: Path, out: Path, context: Context) -> PassResult:
        """Write the INT8 graph of ``separator`` (whose float export is ``model``) to ``out``."""
        names = {name for name, _ in separator.module.named_modules()}
        if unknown := [name for name in self.keep_float if name not in names]:
            raise InputError(f"quantize.keep_float names {unknown[0]!r}, which {separator.name} does not have")
        if self.method == "neural-compressor":
            self._neural_compressor(separator, out, context)
        else:
            self._onnxruntime(separator, model, out, context)
        share = quantized_share(out, separator)
        if share["quantized_macs_share"] == 0:
            raise BuildError(f"{self.method} quantized no multiplication of {separator.name}; report this graph")
        return PassResult(None, True, {**share, "method": self.method})

    def _feeds(self, separator: Separator, context: Context) -> Iterator[dict[str, np.ndarray]]:
        """What ``separator`` is given for each calibration mixture, by input name."""
        count = min(self.mixtures, len(context.calibration))
        for i in range(count):
            context.tick(i, count, "calibrating")
            if separator.stream is None:
                known = context.original.tensors(context.calibration[i].inputs())
                yield {s.name: known[s.name] for s in separator.inputs}
            else:  # a few calls of each stream: neighbours see much the same
                calls = _calls(separator, separator.stream, context.calibration[i].mixture)
                yield from itertools.islice(calls, 20, 420, 25)

    def _neural_compressor(self, separator: Separator, out: Path, context: Context) -> None:
        os.environ.setdefault("LOGLEVEL", "ERROR")  # it logs its whole configuration at INFO otherwise
        with graph.quiet():
            from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

            captured: Any = graph.capture(separator)
            captured._exported = True  # what its own export function sets; that one cannot defer shape guards
            captured.dynamic_shapes = None
            config = StaticQuantConfig(act_sym=self.symmetric, act_dtype="int8" if self.symmetric else "uint8")
            for name in (*separator.keep_float, *self.keep_float):
                config.set_local(name, StaticQuantConfig(w_dtype="fp32", act_dtype="fp32"))
            prepared = prepare(captured, config)
            with torch.no_grad():
                for feed in self._feeds(separator, context):
                    prepared(*map(torch.from_numpy, feed.values()))
            converted = convert(prepared)
        graph.export_onnx(separator, converted, out)

    def _onnxruntime(self, separator: Separator, model: Path, out: Path, context: Context) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        feeds = self._feeds(separator, context)

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(feeds, None)

        kept = (*separator.keep_float, *self.keep_float)
        # The quantizer runs the graph but takes no kernels: it gets the operators as functions of the file.
        exported = onnx.load(model)
        float_graph = onnx_forms.callable_anywhere(exported)
        with graph.quiet():
            quantize_static(
                float_graph,
                out,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_exclude=[
                    n.name for n in float_graph.graph.node if _belongs_to(n, float_graph, separator, kept)
                ],
                per_channel=True,
                activation_type=QuantType.QInt8 if self.symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "QuantizeBias": False,
                    "ActivationSymmetric": self.symmetric,
                    "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"],
                },
            )
        quantized = onnx.load(out)
        onnx_forms.original_names(quantized, exported)
        onnx_edit.clean(quantized)
        graph.describe(quantized, separator)
        onnx.save(quantized, out)


def _calls(separator: Separator, spec: StreamSpec, mixture: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """What a streaming graph is fed for ``(samples,)``, call after call."""

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            made = separator.module(*(torch.from_numpy(feeds[s.name]) for s in separator.inputs))
        return {s.name: value.numpy() for s, value in zip(separator.outputs, made, strict=True)}

    hops, size = Hops(lambda _: run, spec), spec.call_samples
    for start in range(0, mixture.size - size + 1, size):
        samples = mixture[start : start + size]
        yield {name: value.copy() for name, value in hops.feeds.items()} | {"mixture": samples[None]}
        hops.call(samples)


def _belongs_to(node: onnx.NodeProto, model: onnx.ModelProto, separator: Separator, kept: tuple[str, ...]) -> bool:
    """Whether a node multiplies by a weight of one of the submodules ``kept`` (found by value)."""
    weights = [
        form.detach().numpy().tobytes()
        for name, p in separator.module.named_parameters()
        if any(name.startswith(f"{k}.") for k in kept)
        for form in (p, p.T.contiguous() if p.ndim == 2 else p)  # a Linear is exported as MatMul by its transpose
    ]
    constants = {c.name: c for c in model.graph.initializer}
    return any(onnx.numpy_helper.to_array(constants[i]).tobytes() in weights for i in node.input if i in constants)


MULTIPLIERS = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "SelectiveScan", "CausalConv1dSilu"}


def quantized_share(path: Path, separator: Separator) -> dict[str, Any]:
    """Which share of the multiply-accumulates of one second stands between DequantizeLinear nodes.

    The sizes come from running the graph with the shape of every product as a further output.
    """
    import onnxruntime

    exported = onnx.load(path)
    nodes = [n for n in exported.graph.node if n.op_type in MULTIPLIERS]
    model = onnx_forms.callable_anywhere(exported)
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    wanted = {name for n in nodes for name in (*n.input[:3], *n.output[:1]) if name}
    for name in wanted:
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"shape:{name}"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"shape:{name}", onnx.TensorProto.INT64, [None]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    examples = separator.example_inputs(separator.sample_rate_hz)
    feed = {s.name: x.numpy() for s, x in zip(separator.inputs, examples, strict=True)}
    shape_names = [f"shape:{name}" for name in wanted]
    shapes = dict(zip(wanted, session.run(shape_names, feed), strict=True))
    total = quantized = 0
    for node in nodes:
        macs = _macs(node, shapes)
        total += macs
        if all(name in dequantized for name in node.input[:2]):
            quantized += macs
    seconds = separator.stream.call_samples / separator.stream.sample_rate_hz if separator.stream else 1.0
    return {"gmacs_per_s": total / seconds / 1e9, "quantized_macs_share": quantized / total if total else 0.0}


def _macs(node: onnx.NodeProto, shapes: dict[str, np.ndarray]) -> int:
    first, second = (shapes[name] for name in node.input[:2])
    if node.op_type == "LSTM":  # every row of every step: both weight matrices
        return int(np.prod(first[:2]) * (np.prod(second[1:]) + np.prod(shapes[node.input[2]][1:])))
    if node.op_type == "SelectiveScan":  # two for each element of the state and step
        return int(2 * np.prod(first) * shapes[node.input[2]][1])
    if node.op_type == "CausalConv1dSilu":
        return int(np.prod(first) * second[1])
    if node.op_type == "Conv":  # every output sample: input channels per group x kernel
        return int(np.prod(shapes[node.output[0]]) * np.prod(second[1:]))
    if node.op_type == "ConvTranspose":  # every input sample: output channels per group x kernel
        return int(np.prod(first) * np.prod(second[1:]))
    return int(np.prod(shapes[node.output[0]]) * first[-1])
