"""Recovery after pruning: PIT SNR on remixed sources, and distillation from the float original."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgesep import training
from edgesep.calibration import MixtureSet
from edgesep.passes.base import Context, PassResult
from edgesep.separators.base import Separator
from edgesep.spec import InputError, UnsupportedError


@dataclass(frozen=True)
class Finetune:
    """Train the separator for a while on remixed sources.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate (AdamW, cosine to zero).
        batch: mixtures a step.
        seconds: length of a training mixture.
        distill: weight of the original's estimates beside the references, 0 to 1.
        patience: stop after this many validations (every 50 steps) without gain.
        seed: of the remixing.
    """

    steps: int = 600
    lr: float = 5e-4
    batch: int = 4
    seconds: float = 2.0
    distill: float = 0.5
    patience: int = 6
    seed: int = 0

    stage: ClassVar[str] = "torch"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.seconds <= 0:
            raise InputError("finetune.steps, batch and seconds must be positive")
        if not 0 <= self.distill <= 1:
            raise InputError(f"finetune.distill is {self.distill}, it must lie between 0 and 1")

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Train a copy; an interrupted run continues from its last validation."""
        if len(separator.inputs) > 1:
            raise UnsupportedError(
                f"finetune remixes sources, and {separator.name} also needs video that no remix has; leave the pass out"
            )
        module = copy.deepcopy(separator.module)
        teacher = context.original.module
        # A quarter of the mixtures is held out, whole, to choose the step to keep.
        held = max(1, len(context.train) // 4)
        if len(context.train) - held < 1:
            raise InputError(f"fine-tuning needs at least 2 mixtures, {context.train.path} has {len(context.train)}")
        remix = Remix(context.train, range(held, len(context.train)), int(self.seconds * separator.sample_rate_hz))
        trials = [context.train[i] for i in range(held)]

        def loss(mixture: Tensor, estimates: Tensor, references: Tensor) -> Tensor:
            plain = training.pit_snr_loss(mixture, estimates, references)
            if not self.distill:
                return plain
            with torch.no_grad():
                taught = teacher(mixture)
            return (1 - self.distill) * plain + self.distill * training.pit_snr_loss(mixture, estimates, taught)

        def validate(m: nn.Module) -> float:
            scores = [
                training.pit_db(
                    m(torch.from_numpy(t.mixture[None])), torch.from_numpy(t.sources[None]), training.si_snr_db
                )
                for t in trials
            ]
            return float(torch.cat(scores).mean())

        with torch.no_grad():
            before = validate(module.eval())
        progress = training.fit(
            module,
            lambda step: remix(np.random.default_rng([self.seed, step]), self.batch),
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
        best = max(before, progress.best_db)
        if best == before and not math.isclose(before, progress.best_db):
            return PassResult(separator, False, {"valid_si_snr_db_before": before, "valid_si_snr_db": before})
        report = {"valid_si_snr_db_before": before, "valid_si_snr_db": progress.best_db, "steps": progress.step}
        return PassResult(replace(separator, module=module), True, report)


class Remix:
    """New mixtures from the single sources of a set: random pairs of different mixtures, -5 to 5 dB."""

    def __init__(self, mixtures: MixtureSet, indices: range, samples: int):
        self.parts = [s for i in indices for s in mixtures[i].sources]
        self.per_mixture = len(self.parts) // len(indices)
        self.samples = samples

    def __call__(self, rng: np.random.Generator, batch: int) -> tuple[tuple[Tensor], Tensor]:
        """(mixture (batch, samples),), sources (batch, sources, samples)."""
        out = np.zeros((batch, self.per_mixture, self.samples), np.float32)
        for b in range(batch):
            chosen = rng.choice(len(self.parts), self.per_mixture, replace=False)
            for s, index in enumerate(chosen):
                part = self.parts[index]
                start = int(rng.integers(0, max(1, part.size - self.samples + 1)))
                cut = part[start : start + self.samples]
                level = 10 ** (rng.uniform(-2.5, 2.5) / 20) * 0.05 / max(1e-4, float(np.sqrt(np.mean(cut**2))))
                out[b, s, : cut.size] = cut * level
        sources = torch.from_numpy(out)
        return (sources.sum(1),), sources
