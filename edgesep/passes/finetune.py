"""Recovery after compression: PIT SNR on remixed sources, and distillation from the float original.

Shapes: mixtures ``(batch, samples)``, sources ``(batch, sources, samples)``, mouth embedding ``(batch, E, frames)``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgesep import training
from edgesep.calibration import Mixture, MixtureSet
from edgesep.fake_quant import RoundedProducts
from edgesep.passes.base import Context, PassResult
from edgesep.separators.base import Separator
from edgesep.spec import InputError

VALIDATED = 32  # mixtures, at most


@dataclass(frozen=True)
class Finetune:
    """Train the separator for a while on remixed sources.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate (AdamW, cosine to zero).
        batch: mixtures a step.
        seconds: length of a training mixture.
        distill: weight of the original's estimates beside the references, 0 to 1.
        blocks: weight of what the original's blocks return beside that; 0 leaves it out.
        quantized: train with the rounding of INT8 (quantization-aware), for a quantize pass that follows.
        patience: stop after this many validations (every 50 steps) without gain.
        seed: of the remixing.
    """

    steps: int = 600
    lr: float = 5e-4
    batch: int = 4
    seconds: float = 2.0
    distill: float = 0.5
    blocks: float = 0.1
    quantized: bool = False
    patience: int = 6
    seed: int = 0

    stage: ClassVar[str] = "torch"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.seconds <= 0:
            raise InputError("finetune.steps, batch and seconds must be positive")
        if not 0 <= self.distill <= 1:
            raise InputError(f"finetune.distill is {self.distill}, it must lie between 0 and 1")
        if self.blocks < 0:
            raise InputError(f"finetune.blocks is {self.blocks}, it must not be negative")

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Train a copy; an interrupted run continues from its last validation.

        Raises:
            InputError: fewer than two mixtures to train on.
        """
        module = copy.deepcopy(separator.module)
        teacher = copy.deepcopy(context.original.module)
        # A quarter of the mixtures is held out, whole, to choose the step to keep.
        held = max(1, len(context.train) // 4)
        if len(context.train) - held < 1:
            raise InputError(f"fine-tuning needs at least 2 mixtures, {context.train.path} has {len(context.train)}")
        samples = int(self.seconds * separator.sample_rate_hz)
        remix = Remix(context.train, range(held, len(context.train)), samples, context.original)
        trials = [remix.whole(context.train[i]) for i in range(min(held, VALIDATED))]
        mine, theirs = (Outputs(m, separator.blocks) for m in (module, teacher))
        inputs: tuple[Tensor, ...] = ()

        def batches(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
            nonlocal inputs
            inputs, sources = remix(np.random.default_rng([self.seed, step]), self.batch)
            mine.seen.clear()
            return inputs, sources

        def loss(mixture: Tensor, estimates: Tensor, references: Tensor) -> Tensor:
            plain = training.pit_snr_loss(mixture, estimates, references)
            if not self.distill and not self.blocks:
                return plain
            theirs.seen.clear()
            with torch.no_grad():
                taught = teacher(*inputs)
            total = (1 - self.distill) * plain + self.distill * training.pit_snr_loss(mixture, estimates, taught)
            return total + self.blocks * mine.distance_db(theirs) if self.blocks and mine.seen else total

        def validate(m: nn.Module) -> float:
            scores = [training.pit_db(m(*given), sources, training.si_snr_db) for given, sources in trials]
            mine.seen.clear()
            return float(torch.cat(scores).mean())

        rounded = RoundedProducts(module, separator.keep_float) if self.quantized else None
        if rounded:
            given = (context.original.tensors(item.inputs()) for item in context.calibration)
            rounded.calibrate(tuple(torch.from_numpy(g[s.name]) for s in separator.inputs) for g in given)
        with torch.no_grad():
            before = validate(module.eval())
        progress = training.fit(
            module,
            batches,
            self.steps,
            validate,
            loss=loss,
            lr=self.lr,
            warmup=min(50, self.steps // 4),
            every=50,
            patience=self.patience,
            state_path=context.folder / "finetune.pt",
            on_step=lambda step, _: context.tick(step, self.steps, "fine-tuning"),
        )
        mine.close()
        if rounded:
            rounded.close()
        if progress.best_db < before:  # training made it worse: keep what there was
            return PassResult(separator, False, {"valid_si_snr_db_before": before, "valid_si_snr_db": before})
        report = {"valid_si_snr_db_before": before, "valid_si_snr_db": progress.best_db, "steps": progress.step}
        return PassResult(replace(separator, module=module), True, report)


class Outputs:
    """What some submodules return, call by call, as maps of energy: ``(batch, positions)``, whatever their width."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        self.seen: list[Tensor] = []
        self._hooks = [module.get_submodule(name).register_forward_hook(self._keep) for name in names]

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        energy = first.square().mean(1).flatten(1)
        self.seen.append(energy / (energy.norm(dim=1, keepdim=True) + 1e-8))

    def distance_db(self, other: Outputs) -> Tensor:
        """Difference of the maps in dB, mean over calls; levelled off at -30 dB."""
        errors = [(a - b).square().sum(1) for a, b in zip(self.seen, other.seen, strict=True)]
        return (10 * torch.log10(torch.stack(errors) + 1e-3)).mean()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Remix:
    """New mixtures from the single sources of a set: random pairs of different mixtures, -5 to 5 dB.

    For an audio-visual separator the wanted voice is one whose mouth video there is, cut where its frames begin.
    """

    def __init__(self, mixtures: MixtureSet, indices: range, samples: int, original: Separator):
        self.samples, self.original = samples, original
        self.parts: list[np.ndarray] = []
        self.embedded: list[Tensor] = []
        first: list[int] = []
        for i in indices:
            item = mixtures[i]
            first.append(len(self.parts))
            self.parts += list(item.sources)
            if original.front_end:
                self.embedded.append(self._embedding(item))
        self.first = np.array(first)
        self.mixed = max(2, original.sources)
        if len(self.parts) < self.mixed:
            raise InputError(
                f"fine-tuning mixes {self.mixed} voices, {mixtures.path} leaves {len(self.parts)} to train on"
            )
        if self.embedded:  # video cannot be padded: what is shown would not be what is heard
            self.samples = min(samples, *(self.parts[i].size for i in first))

    def _embedding(self, item: Mixture) -> Tensor:
        known = self.original.tensors(item.inputs())
        return torch.from_numpy(known[self.original.inputs[-1].name][0])

    def whole(self, item: Mixture) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs, sources) of one mixture as it is, batch 1."""
        mixture, sources = torch.from_numpy(item.mixture[None]), torch.from_numpy(item.sources[None])
        return ((mixture, self._embedding(item)[None]) if self.embedded else (mixture,)), sources

    def __call__(self, rng: np.random.Generator, batch: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs, mixture first), sources (batch, sources, samples)."""
        out = np.zeros((batch, self.mixed, self.samples), np.float32)
        shown = []
        for b in range(batch):
            wanted = int(rng.integers(len(self.first)))
            chosen = rng.choice(len(self.parts), self.mixed, replace=False)
            if self.embedded:
                chosen[0] = self.first[wanted]
                chosen[1:] = (chosen[0] + rng.integers(1, len(self.parts))) % len(self.parts)
            for s, index in enumerate(chosen):
                part = self.parts[index]
                start = int(rng.integers(0, max(1, part.size - self.samples + 1)))
                if self.embedded and s == 0:
                    start, embedding = self._at_frame(start, self.embedded[wanted])
                    shown.append(embedding)
                cut = part[start : start + self.samples]
                level = 10 ** (rng.uniform(-2.5, 2.5) / 20) * 0.05 / max(1e-4, float(np.sqrt(np.mean(cut**2))))
                out[b, s, : cut.size] = cut * level
        sources = torch.from_numpy(out)
        inputs = (sources.sum(1), *([torch.stack(shown)] if self.embedded else []))
        return inputs, sources[:, : self.original.sources]

    def _at_frame(self, start: int, embedding: Tensor) -> tuple[int, Tensor]:
        """The start moved to a video frame, and what is shown from there on; a last frame that is missing stays."""
        a_frame = self.original.sample_rate_hz / (self.original.frames_per_s or 1)
        frame = int(start // a_frame)
        shown = torch.arange(frame, frame + max(1, round(self.samples / a_frame)))
        return round(frame * a_frame), embedding[:, shown.clamp(max=embedding.shape[1] - 1)]
