"""Static INT8: Q/DQ around convolutions and matrix products, calibrated on mixtures.

Two methods make the same kind of graph, but that only the second takes LSTMs. ``neural-compressor`` quantizes the
captured torch graph (PT2E) and exports it; ``onnxruntime`` quantizes the exported ONNX file. Model input and output,
norms and everything else stay float; biases stay float too, because TensorRT's parser refuses int32 ones.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch

from edgesep import budget, graph, lstm_fusion, onnx_edit
from edgesep.int8 import QUANTIZED, OnnxRuntimeQuantizer, counted_macs, layer_macs, quantized_share
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, PassResult
from edgesep.runtimes.base import Int8Form
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
        symmetric: int8 activations around zero instead of uint8 with a zero point; default: as the target multiplies
            fastest (``runtimes.base.Int8Form``).
        outputs: quantize what convolutions make too; default: where the target needs it to multiply in INT8.
        fit: return layers to float until the recipe's criteria hold on the calibration mixtures (``budget``).
        least_macs_share: with ``fit``, so much is left in INT8 when small noisy layers go back to float although the
            budget holds; the budget itself may take more.
        round_weights: with ONNX Runtime's quantizer, weights of layers that stay in float get eight bits, too, but for
            those in ``keep_float``: a tenth to a fifth of the file. With ``fit`` not if that takes half of the budget.
        levels_db: calibrate on every mixture at these levels too, in dB relative to its own.
    """

    method: Literal["neural-compressor", "onnxruntime"] = "neural-compressor"
    mixtures: int = 16
    keep_float: tuple[str, ...] = ()
    symmetric: bool | None = None
    outputs: bool | None = None
    fit: bool = False
    least_macs_share: float = 0.9
    round_weights: bool = True
    levels_db: tuple[float, ...] = ()

    stage: ClassVar[str] = "onnx"
    precision: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.method not in ("neural-compressor", "onnxruntime"):
            raise InputError(f"quantize.method {self.method!r} is not known, use neural-compressor or onnxruntime")
        if self.mixtures < 1:
            raise InputError(f"quantize.mixtures is {self.mixtures}, at least one mixture is needed to calibrate")
        if not 0 <= self.least_macs_share <= 1:
            raise InputError(f"quantize.least_macs_share is {self.least_macs_share}, it must lie between 0 and 1")
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        object.__setattr__(self, "levels_db", tuple(self.levels_db))

    def __call__(
        self, separator: Separator, model: Path, out: Path, context: Context, form: Int8Form | None = None
    ) -> PassResult:
        """Write the INT8 graph of ``separator`` (whose float export is ``model``) to ``out``.

        Raises:
            InputError: ``keep_float`` names no submodule of the separator or its front-end.
            BuildError: no layer is left to quantize, or activations are not finite.
        """
        form = form or Int8Form()
        own = self.method == "onnxruntime"
        chosen = replace(
            form,
            symmetric=form.symmetric if self.symmetric is None else self.symmetric,
            outputs=form.outputs if self.outputs is None else self.outputs,
            recurrent=form.recurrent and own,
            narrow=form.narrow and own and self.round_weights,
        )
        exported = onnx.load(model)
        onnx_edit.fold_rearranged(exported)  # weights of LSTMs are put together from pieces
        if chosen.fused and own and onnx_forms.streams(exported):
            exported, chosen = lstm_fusion.lstms_apart(exported), replace(chosen, recurrent=False)
        counted = counted_macs(exported, separator)
        macs = layer_macs(counted, (*QUANTIZED, "LSTM") if chosen.recurrent else QUANTIZED)
        graphs = (separator, context.original, context.original.front_end)
        modules = {name for g in graphs if g for name, _ in g.module.named_modules()}
        if unknown := [name for name in self.keep_float if name not in modules | set(macs)]:
            raise InputError(f"quantize.keep_float names {unknown[0]!r}, which {separator.name} does not have")
        kept = (*separator.keep_float, *self.keep_float)
        open_layers = {name: count for name, count in macs.items() if not graph.within(name, kept)}
        report: dict[str, Any] = {"method": self.method, "form": asdict(chosen)}
        if not open_layers:
            raise BuildError(f"keep_float leaves no layer of {separator.name} to quantize; use fp32 or bf16 instead")
        engine = OnnxRuntimeQuantizer(
            separator, exported, lambda: self._feeds(separator, context), context.folder, self.keep_float
        )
        rounded = chosen.narrow
        if self.fit:

            def make(layers: Iterable[str], narrow: bool) -> Path:
                trial = context.folder / f"trial-{os.getpid()}" / "model.onnx"
                trial.parent.mkdir(exist_ok=True)
                engine.write(trial, set(layers), chosen, narrow)
                return trial

            trials = budget.Trials(separator, context, make, context.folder, chosen.fused)
            total = sum(count for _, count, _ in counted)
            spare = sum(open_layers.values()) - self.least_macs_share * total
            try:
                fitted = budget.fit(open_layers, spare, trials, context.criteria, context.tick, rounded)
            finally:
                shutil.rmtree(context.folder / f"trial-{os.getpid()}", ignore_errors=True)
            open_layers = {name: count for name, count in open_layers.items() if name not in fitted.kept}
            rounded, report["fit"] = fitted.rounded, fitted.report
        report["rounded_weights"] = rounded
        if not open_layers:
            raise BuildError(
                f"no layer of {separator.name} can be quantized within the budget"
                f" (mean {context.criteria.max_si_snr_drop_db} dB, worst 5 % {context.criteria.worst5_drop_db} dB);"
                " use fp32 or bf16, or raise the budget"
            )
        if self.method == "onnxruntime":
            engine.write(out, set(open_layers), chosen, rounded)
        else:
            self._neural_compressor(separator, out, context, chosen, [n for n in macs if n not in open_layers])
        share = quantized_share(out, separator, chosen.fused)
        if share["quantized_macs_share"] == 0:
            raise BuildError(f"{self.method} quantized no multiplication of {separator.name}; report this graph")
        return PassResult(None, True, {**share, **report})

    def _feeds(self, separator: Separator, context: Context) -> Iterator[dict[str, np.ndarray]]:
        """What ``separator`` is given for each calibration mixture, by input name."""
        count = min(self.mixtures, len(context.calibration))
        for i, level_db in itertools.product(range(count), (0.0, *self.levels_db)):
            context.tick(i, count, "calibrating")
            item = context.calibration[i].at_level(level_db)
            if separator.stream is None:
                known = context.original.tensors(item.inputs())
                yield {s.name: known[s.name] for s in separator.inputs}
            else:  # a few calls of each stream: neighbours see much the same
                calls = _calls(separator, separator.stream, item.mixture)
                yield from itertools.islice(calls, 20, 420, 25)

    def _neural_compressor(
        self, separator: Separator, out: Path, context: Context, form: Int8Form, kept: Iterable[str]
    ) -> None:
        os.environ.setdefault("LOGLEVEL", "ERROR")  # it logs its whole configuration at INFO otherwise
        with graph.quiet():
            from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

            captured: Any = graph.capture(separator)
            captured._exported = True  # what its own export function sets; that one cannot defer shape guards
            captured.dynamic_shapes = None
            config = StaticQuantConfig(act_sym=form.symmetric, act_dtype="int8" if form.symmetric else "uint8")
            for name in (*separator.keep_float, *kept):
                config.set_local(name, StaticQuantConfig(w_dtype="fp32", act_dtype="fp32"))
            prepared = prepare(captured, config)
            with torch.no_grad():
                for feed in self._feeds(separator, context):
                    prepared(*map(torch.from_numpy, feed.values()))
            converted = convert(prepared)
        graph.export_onnx(separator, converted, out)


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
