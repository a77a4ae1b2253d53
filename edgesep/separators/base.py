"""What a separator is to the rest of the library, and how a checkpoint file is read.

One file per separator in this folder; ``edgesep.separators.load`` finds it by the names it declares.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from edgesep.separators.widths import Width
from edgesep.spec import InputError, StreamSpec, TensorSpec

ENGINE_LENGTHS_S = (0.25, 1.0, 10.0)  # for runtimes that compile for a range of lengths


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content, before anyone knows whether it fits.

    Attributes:
        path: where it came from, for messages.
        state: tensors by key, prefixes of Lightning removed.
        video_state: those of the lip front-end, where a Lightning file holds both.
        model: class name from the configuration or the file, if either says.
        config: the architecture's arguments (``audionet_config``).
        sample_rate_hz: from the configuration, if it says.
    """

    path: Path
    state: dict[str, Tensor]
    model: str | None
    config: dict[str, Any]
    sample_rate_hz: int | None
    video_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Streaming:
    """How a causal separator becomes a streaming graph.

    Attributes:
        bound: (separator, seconds) → the same with that much past in sight of its attention; None keeps what the
            checkpoint says.
        stream: (bounded separator, hops per call) → the streaming separator around the same weights.
    """

    bound: Callable[[Separator, float | None], Separator]
    stream: Callable[[Separator, int], Separator]


@dataclass(frozen=True)
class Separator:
    """A trained separator, ready to be lowered, compressed and exported.

    Calling it runs the float original: ``(batch, samples)`` or ``(samples,)`` float32, array or tensor →
    ``(batch, sources, samples)`` tensor (without the batch axis for one-dimensional input). With a front-end the last
    input may be what the front-end takes.

    Attributes:
        name: class name of the architecture as its authors spell it.
        module: eval-mode module over the tensors that ``inputs`` names.
        config: arguments that rebuild ``module``; stored in the manifest.
        causal: whether no output depends on later input beyond ``algorithmic_latency_ms``.
        algorithmic_latency_ms: None for offline separators.
        min_samples: shortest mixture the architecture takes.
        frames_per_s: rate of the axis named ``frames`` of a further input (video).
        keep_float: names of submodules that must not be quantized (model input and output).
        keep_shape: names of submodules whose output channels must not be pruned.
        widths: the inner widths of a module of this architecture, where pruning goes along those.
        blocks: names of submodules whose outputs a compressed separator is taught to match.
        flat_maps: whether every map of its graph is ``(B, C, 1, L)``, so that units can be fused (``edgesep.fusion``).
        front_end: the graph that makes the last input, at a rate of its own (mouth crops → mouth embedding).
        streaming: how it becomes a streaming graph, for causal separators.
        stream: what the graph promises, if it is one.
        note: one line that the user must know, or empty.
    """

    name: str
    module: nn.Module
    config: dict[str, Any]
    sample_rate_hz: int
    sources: int
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    causal: bool = False
    algorithmic_latency_ms: float | None = None
    min_samples: int = 1
    frames_per_s: float | None = None
    keep_float: tuple[str, ...] = ()
    keep_shape: tuple[str, ...] = ()
    widths: Callable[[Any], list[Width]] | None = None
    blocks: tuple[str, ...] = ()
    flat_maps: bool = False
    front_end: Separator | None = None
    streaming: Streaming | None = None
    stream: StreamSpec | None = None
    note: str = ""

    def __call__(self, mixture: np.ndarray | Tensor, *others: np.ndarray | Tensor) -> Tensor:
        inputs = [torch.as_tensor(value, dtype=torch.float32) for value in (mixture, *others)]
        axes = len(self.inputs[0].shape)
        if inputs[0].ndim not in (axes - 1, axes) or inputs[0].shape[-1] < self.min_samples:
            raise ValueError(
                f"{self.inputs[0].name} must be {self.inputs[0].shape} (the first axis may be missing), with at least"
                f" {self.min_samples} samples; got {tuple(inputs[0].shape)}"
            )
        if inputs[0].ndim == axes - 1:
            return self._run(*(value[None] for value in inputs))[0]
        return self._run(*inputs)

    def _run(self, *inputs: Tensor) -> Tensor:
        front = self.front_end
        if front is not None and inputs[-1].ndim == len(front.inputs[0].shape):
            inputs = (*inputs[:-1], front._run(inputs[-1]))
        if len(inputs) != len(self.inputs):
            names = ", ".join(s.name for s in self.inputs)
            raise ValueError(f"{self.name} takes {len(self.inputs)} input(s) ({names}), got {len(inputs)}")
        with torch.inference_mode():
            y: Tensor = self.module(*inputs)
        return y

    def tensors(self, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Every named input of this graph and of its front-end, from what the whole is given (batch first)."""
        known = dict(zip((s.name for s in self.inputs), inputs, strict=True))
        if front := self.front_end:
            made = self.inputs[-1].name
            known[front.inputs[0].name] = known[made]
            known[made] = front(known[made]).numpy()
        return known

    def example_inputs(self, samples: int, batch: int = 1) -> tuple[Tensor, ...]:
        """Deterministic noise of the right shapes, for tracing and counting; other axes follow from ``samples``."""
        r = torch.Generator().manual_seed(0)
        sizes = {"batch": batch, "samples": samples}
        if self.frames_per_s:
            sizes["frames"] = max(1, round(samples / self.sample_rate_hz * self.frames_per_s))
        shapes = [[n if isinstance(n, int) else sizes[n] for n in spec.shape] for spec in self.inputs]
        return tuple(0.1 * torch.randn(shape, generator=r) for shape in shapes)

    def profile(self) -> dict[str, Any]:
        """Input name → its shapes at the shortest, usual and longest length, batch 1 (``runtimes.base.Shapes``)."""
        inputs = [self.example_inputs(int(s * self.sample_rate_hz)) for s in ENGINE_LENGTHS_S]
        shapes = zip(*([tuple(x.shape) for x in each] for each in inputs), strict=True)
        return dict(zip((s.name for s in self.inputs), shapes, strict=True))

    def describe(self) -> dict[str, Any]:
        """What a manifest says of this graph; ``second`` holds the input shapes of a second, or of a stream's call."""
        second = self.example_inputs(self.sample_rate_hz)
        return {
            "name": self.name,
            "config": self.config,
            "sample_rate_hz": self.sample_rate_hz,
            "parameters": self.parameters,
            "algorithmic_latency_ms": self.algorithmic_latency_ms,
            "inputs": [s.to_json() for s in self.inputs],
            "outputs": [s.to_json() for s in self.outputs],
            "second": {s.name: list(x.shape) for s, x in zip(self.inputs, second, strict=True)},
            "stream": self.stream and self.stream.to_json(),
        }


def read_checkpoint(path: str | Path, config: str | Path | Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint in any of the three formats users have.

    ``best_model.pth`` with ``conf.yml`` beside it (found there when ``config`` is not given), a Lightning ``.ckpt``,
    or a bare state dict. Loaded with ``weights_only=True``: a file that carries code is refused.

    Raises:
        InputError: missing, truncated or foreign file; unreadable configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give the path of a .pth or .ckpt file")
    try:
        raw = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0]
        if "Weights only" in reason or "GLOBAL" in str(e):
            raise InputError(
                f"checkpoint {path} holds Python code beside its weights and was not loaded; save only its state dict"
                " with torch.save(model.state_dict(), ...)"
            ) from e
        raise InputError(f"checkpoint {path} is not a PyTorch checkpoint or is damaged; copy it again") from e
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, UnicodeDecodeError) as e:
        raise InputError(f"checkpoint {path} is truncated or damaged ({type(e).__name__}); copy it again") from e
    if not isinstance(raw, dict):
        raise InputError(f"checkpoint {path} holds a {type(raw).__name__}, expected a state dict")

    model = raw.get("model_name") if isinstance(raw.get("model_name"), str) else None
    conf = _read_config(path, config, raw.get("conf"))
    net = conf.get("audionet") or conf.get("videonet") or {}
    state = raw.get("state_dict", raw.get("model_state_dict", raw))
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"checkpoint {path} holds no tensors, expected a state dict or a file with 'state_dict'")
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    video = {k.removeprefix("video_model."): v for k, v in state.items() if k.startswith("video_model.")}
    if any(k.startswith("audio_model.") for k in state):
        state = {k.removeprefix("audio_model."): v for k, v in state.items() if k.startswith("audio_model.")}
    elif video:  # a Lightning file of the front-end alone
        state = video
    rate = ((conf.get("datamodule") or {}).get("data_config") or {}).get("sample_rate")
    return Checkpoint(
        path=path,
        state=state,
        model=net.get("audionet_name") or net.get("videonet_name") or model,
        config=dict(net.get("audionet_config") or {}),
        sample_rate_hz=None if rate is None else int(rate),
        video_state=video,
    )


def _read_config(path: Path, config: str | Path | Mapping[str, Any] | None, embedded: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if config is None:
        if isinstance(embedded, dict):
            return embedded
        beside = path.with_name("conf.yml")
        if not beside.is_file():
            return {}
        config = beside
    if not Path(config).is_file():
        raise InputError(f"configuration {config} does not exist; give the conf.yml saved beside the checkpoint")
    try:
        conf = yaml.safe_load(Path(config).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"configuration {config} is not valid YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(conf, dict):
        raise InputError(f"configuration {config} holds no 'audionet' section; give the conf.yml of the training run")
    return conf


def settle(checkpoint: Checkpoint, shapes: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Combine what the weights' shapes determine with the configuration, and refuse contradictions.

    Args:
        shapes: sizes read from the state dict.
        known: further names the configuration may hold.
    """
    for key, value in checkpoint.config.items():
        if key in shapes and int(value) != shapes[key]:
            raise InputError(
                f"configuration says {key} = {value}, but the weights in {checkpoint.path} have {shapes[key]};"
                " give the conf.yml of this checkpoint"
            )
    allowed = set(known)
    return {**{k: v for k, v in checkpoint.config.items() if k in allowed}, **shapes}


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: Path, ignore: Callable[[str], bool]) -> None:
    """Copy ``state`` into ``module``; unit axes are added where the module's Conv2d stands for a Conv1d.

    Raises:
        InputError: keys or shapes that do not fit; the first few of each kind are listed.
    """
    want = module.state_dict()
    missing = [k for k in want if k not in state]
    extra = [k for k in state if k not in want and not ignore(k)]
    fitted = {k: state[k].reshape(v.shape) for k, v in want.items() if k in state and same_but_unit(state[k], v)}
    wrong = [f"{k} {tuple(state[k].shape)}" for k in want if k in state and k not in fitted]
    if missing or extra or wrong:
        parts = [("missing", missing), ("unexpected", extra), ("of another shape", wrong)]
        said = "; ".join(f"{len(v)} {kind} ({', '.join(v[:3])}{', …' if len(v) > 3 else ''})" for kind, v in parts if v)
        raise InputError(f"the weights in {source} are not those of this separator: {said}; check name and config")
    module.load_state_dict(fitted)


def same_but_unit(a: Tensor, b: Tensor) -> bool:
    return [n for n in a.shape if n != 1] == [n for n in b.shape if n != 1]


def sharing_copy(module: nn.Module) -> nn.Module:
    """A second module around the same parameters and buffers."""
    shared = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(t): t for t in shared})


def unrolled(module: nn.Module) -> nn.Module:
    """A copy in which iterated blocks are distinct modules that share their parameters.

    Quantizers key their observers by module: one module called n times would get one activation range for all
    iterations, or be refused.
    """
    module = sharing_copy(module)
    for part in list(module.modules()):
        if callable(unroll := getattr(part, "unroll", None)):
            unroll()
    return module


def resize(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module the sizes and values of a pruned state dict of it."""
    for name, part in module.named_modules():
        own = {k: state[f"{name}.{k}" if name else k] for k in part.state_dict() if "." not in k}
        for key, value in own.items():
            if key in part._parameters:
                part._parameters[key] = nn.Parameter(value.clone(), requires_grad=True)
            else:
                part._buffers[key] = value.clone()
        if isinstance(part, nn.Conv2d):
            depthwise = part.groups > 1
            part.out_channels = own["weight"].shape[0]
            part.groups = part.out_channels if depthwise else 1
            part.in_channels = own["weight"].shape[1] * part.groups
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = own["weight"].shape
        elif isinstance(part, nn.GroupNorm):
            part.num_channels = own["weight"].numel()
        elif isinstance(part, nn.ConvTranspose1d):
            part.in_channels = own["weight"].shape[0]
        elif isinstance(part, nn.LSTM):
            part.hidden_size, part.input_size = own["weight_hh_l0"].shape[1], own["weight_ih_l0"].shape[1]
            part._init_flat_weights()
        elif isinstance(part, nn.LayerNorm):
            part.normalized_shape = tuple(own["weight"].shape)
