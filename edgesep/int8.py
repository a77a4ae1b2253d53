"""Q/DQ graphs: ONNX Runtime's quantizer on chosen layers of an export, and what share of the work is in INT8.

A layer is the submodule that a node computes (``graph.name_nodes``), all its iterations together.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgesep import compact, graph, kernels, onnx_edit, stream_fusion
from edgesep.graph import layer_of
from edgesep.ops import onnx_forms
from edgesep.runtimes.base import Int8Form
from edgesep.separators.base import Separator
from edgesep.spec import BuildError, UnsupportedError

QUANTIZED = ("Conv", "MatMul", "Gemm")
LSTMS = ("LSTM", "DynamicQuantizeLSTM")
MULTIPLIERS = {"Conv", "ConvTranspose", "MatMul", "Gemm", *LSTMS, "LstmSteps", "SelectiveScan", "CausalConv1dSilu"}


class OnnxRuntimeQuantizer:
    """ONNX Runtime's quantizer on one exported graph: calibrated once, written as often as wanted.

    Args:
        folder: where the ranges are kept.
        exact: modules whose weights are never rounded.
    """

    def __init__(
        self,
        separator: Separator,
        exported: onnx.ModelProto,
        feeds: Callable[[], Iterator[dict[str, np.ndarray]]],
        folder: Path,
        exact: Sequence[str] = (),
    ):
        self.separator, self.exported, self.feeds, self.exact = separator, exported, feeds, exact
        onnx_edit.products_of_gemms(exported)
        self.ranges = folder / f"ranges-{zlib.crc32(exported.SerializeToString()):08x}.json"  # forms have tensors apart
        # The quantizer infers shapes but knows no operators of ours: it gets them as functions of the file.
        self.callable = onnx_forms.callable_anywhere(exported)

    def write(self, out: Path, layers: Container[str], form: Int8Form, rounded: bool = False) -> None:
        """The graph with these layers quantized.

        Args:
            rounded: give the weights of all other products eight bits, too (``compact.round_weights``).

        Raises:
            BuildError: an activation was NaN or infinite on a calibration mixture.
        """
        from onnxruntime.quantization import QuantType, quantize_dynamic

        recurrent = [n.name for n in self.callable.graph.node if n.op_type == "LSTM" and layer_of(n) in layers]
        chosen = [n.name for n in self.callable.graph.node if n.op_type in QUANTIZED and layer_of(n) in layers]
        given = onnx.ModelProto()
        given.CopyFrom(self.callable)  # the quantizer moves its constants to a file of its own
        onnx_edit.unshare(given.graph, ("LSTM",))  # of those that share one it quantizes the first alone
        with graph.quiet():
            try:
                if chosen:  # an empty list would mean all
                    self._static(given, out, chosen, form)
                else:
                    onnx.save(given, out)
                if recurrent:
                    quantize_dynamic(
                        out,
                        out,
                        op_types_to_quantize=["LSTM"],
                        nodes_to_quantize=recurrent,
                        per_channel=True,
                        weight_type=QuantType.QInt8,
                    )
            except (ValueError, AssertionError) as e:  # it asserts that scales are finite
                raise BuildError(f"calibration of {self.separator.name} failed: {str(e).splitlines()[0]}") from e
        quantized = onnx.load(out)
        onnx_forms.original_names(quantized, self.exported)
        if rounded:
            compact.round_weights(quantized, lambda node: graph.within(layer_of(node), self.exact))
        onnx_edit.clean(quantized)
        graph.describe(quantized, self.separator)
        onnx.save(quantized, out)

    def _static(self, given: onnx.ModelProto, out: Path, nodes: list[str], form: Int8Form) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        if not self.ranges.exists():
            self._calibrate()
        # A product of matrices can leave its accumulators as float, which is more precise and one rounding less.
        floats_made = [kind for kind in QUANTIZED if kind != "Conv" or not form.outputs]
        options: dict[str, Any] = {
            "QuantizeBias": False,
            "ActivationSymmetric": form.symmetric,
            "OpTypesToExcludeOutputQuantization": floats_made,
        }
        quantize_static(
            given,
            out,
            None,  # the ranges are there
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=QuantType.QInt8 if form.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=options,
            calibration_cache_path=self.ranges,
        )

    def _calibrate(self) -> None:
        """The smallest and largest value of every factor and product over the feeds.

        Not the library's own calibration: that one runs our operators as functions, which takes tens of GB for a scan.
        """
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData, save_tensors_data

        model, options = _runnable(self.exported)
        constants = {i.name for i in model.graph.initializer}
        nodes = [n for n in model.graph.node if n.op_type in QUANTIZED]
        names = sorted({t for n in nodes for t in (*n.input, *n.output) if t and t not in constants})
        kinds = {"ReduceMin": min, "ReduceMax": max}
        asked = [(name, kind, f"{name}:{kind}") for name in names for kind in kinds]
        wanted = set(names)
        given = [i.name for i in model.graph.input]
        made: list[onnx.NodeProto] = []
        for of, node in [(given, None), *((list(n.output), n) for n in model.graph.node)]:
            made += [node] if node else []  # each behind its maker, so that no tensor outlives its readers
            made += [
                onnx.helper.make_node(kind, [t], [f"{t}:{kind}"], keepdims=0)
                for t in of
                if t in wanted
                for kind in kinds
            ]
        del model.graph.node[:]
        model.graph.node.extend(made)
        for *_, out in asked:
            model.graph.output.append(onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, []))
        session = _session(model, options)
        found: dict[tuple[str, str], float] = {}
        for feed in self.feeds():
            for (name, kind, _), value in zip(asked, session.run([out for *_, out in asked], feed), strict=True):
                if not np.isfinite(value):
                    raise BuildError(
                        f"calibration of {self.separator.name} failed: {name} is not finite on a calibration mixture"
                    )
                found[name, kind] = kinds[kind](found.get((name, kind), float(value)), float(value))
        bounds = {n: tuple(np.array([found[n, kind]], np.float32) for kind in kinds) for n in names}
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, bounds), self.ranges)


def _runnable(exported: onnx.ModelProto) -> tuple[onnx.ModelProto, Any]:
    """A copy that ONNX Runtime runs on this machine, every tensor with its name, and the session's options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # of every length only what it needs
    # In the order of the graph: what looks at a tensor does so at once, and not when all of them are there.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if onnx_forms.is_native(exported):
        with contextlib.suppress(UnsupportedError, BuildError):
            options.register_custom_ops_library(str(kernels.library("onnxruntime")))
            made = onnx.ModelProto()
            made.CopyFrom(exported)
            return made, options
    return onnx_forms.callable_anywhere(exported), options


def _session(model: onnx.ModelProto, options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantized_share(path: Path, separator: Separator, fused: bool = False) -> dict[str, Any]:
    """Which share of the multiply-accumulates of one second is between DequantizeLinear nodes or in INT8 LSTMs.

    Args:
        fused: it will run on native kernels, some of which sum in float.
    """
    model = onnx.load(path)
    counted = counted_macs(model, separator)
    kept = stream_fusion.in_float(model) if fused else set()
    total = sum(macs for _, macs, _ in counted)
    quantized = sum(macs for node, macs, dequantized in counted if dequantized and node.output[0] not in kept)
    seconds = separator.stream.call_samples / separator.stream.sample_rate_hz if separator.stream else 1.0
    return {"gmacs_per_s": total / seconds / 1e9, "quantized_macs_share": quantized / total if total else 0.0}


def layer_macs(counted: list[tuple[onnx.NodeProto, int, bool]], operators: Container[str]) -> dict[str, int]:
    """Multiply-accumulates of each layer of these operators, all iterations together, from ``counted_macs``."""
    found: dict[str, int] = {}
    for node, macs, _ in counted:
        if node.op_type in operators:
            found[layer_of(node)] = found.get(layer_of(node), 0) + macs
    return found


def counted_macs(exported: onnx.ModelProto, separator: Separator) -> list[tuple[onnx.NodeProto, int, bool]]:
    """Every product of the graph, its multiply-accumulates in one second and whether both factors are dequantized.

    The sizes come from running the graph with the shape of every product as a further output.
    """
    nodes = [n for n in exported.graph.node if n.op_type in MULTIPLIERS]
    model, options = _runnable(exported)
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    wanted = {name for n in nodes for name in (*n.input[:3], *n.output[:1]) if name}
    for name in wanted:
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"shape:{name}"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"shape:{name}", onnx.TensorProto.INT64, [None]))
    session = _session(model, options)
    examples = separator.example_inputs(separator.sample_rate_hz)
    feed = {s.name: x.numpy() for s, x in zip(separator.inputs, examples, strict=True)}
    shape_names = [f"shape:{name}" for name in wanted]
    shapes = dict(zip(wanted, session.run(shape_names, feed), strict=True))
    return [
        (
            node,
            _macs(node, shapes),
            node.op_type == "DynamicQuantizeLSTM" or all(i in dequantized for i in node.input[:2]),
        )
        for node in nodes
    ]


def _macs(node: onnx.NodeProto, shapes: dict[str, np.ndarray]) -> int:
    first, second = (shapes[name] for name in node.input[:2])
    if node.op_type in LSTMS:  # every row of every step: both weight matrices
        return int(np.prod(first[:2]) * (np.prod(second[1:]) + np.prod(shapes[node.input[2]][1:])))
    if node.op_type == "LstmSteps":  # every row of every step, held ones too
        return int(np.prod(shapes[node.output[0]]) * 4 * shapes[node.output[0]][-1])
    if node.op_type == "SelectiveScan":  # two for each element of the state and step
        return int(2 * np.prod(first) * shapes[node.input[2]][1])
    if node.op_type == "CausalConv1dSilu":
        return int(np.prod(first) * second[1])
    if node.op_type == "Conv":  # every output sample: input channels per group x kernel
        return int(np.prod(shapes[node.output[0]]) * np.prod(second[1:]))
    if node.op_type == "ConvTranspose":  # every input sample: output channels per group x kernel
        return int(np.prod(first) * np.prod(second[1:]))
    return int(np.prod(shapes[node.output[0]]) * first[-1])
