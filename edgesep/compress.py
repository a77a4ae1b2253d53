"""The short way to a compressed separator: a budget in dB in, the smallest build within it out, proven.

INT8 first, with as many layers in float as the budget asks for; what is then left of it is spent on pruning, step by
step, each step recovered by fine-tuning and quantized the same way. Steps are judged on calibration mixtures; the
bundle of the last that fits is then verified on the test set. Finished steps are kept, so an interrupted search resumes
and ends with the same result.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgesep.build import claim
from edgesep.line import Deployed, Line
from edgesep.passes.base import Tick, silent
from edgesep.recipe import CriteriaSection, DataSection, Recipe, SeparatorSection, StreamSection, TargetSection
from edgesep.spec import BuildError, InputError
from edgesep.store import Store

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of the multiply-accumulates, tried in this order
FEW = 64  # training mixtures below which a pruned separator learns them by heart


@dataclass(frozen=True)
class Compressed:
    """What came out.

    Attributes:
        deployed: the bundle.
        tried: a row for each step that fits: share pruned, drop on the calibration mixtures.
        said: sentences that the user must know.
    """

    deployed: Deployed
    tried: tuple[dict[str, Any], ...]
    said: tuple[str, ...]


def compress(
    separator: SeparatorSection,
    data: DataSection,
    out: Path,
    *,
    budget_db: float,
    worst5_db: float | None = None,
    runtime: str = "onnxruntime",
    steps: int = 600,
    ops: Literal["portable", "native"] = "portable",
    stream: StreamSection | None = None,
    store: Store | None = None,
    tick: Tick = silent,
) -> Compressed:
    """Compress a separator within a budget and write the verified bundle to ``out``.

    Args:
        budget_db: mean SI-SNR that may be lost.
        worst5_db: what the worst 5 % may lose (default: three times the budget).
        steps: of fine-tuning after each pruning; 0 leaves pruning out.

    Raises:
        InputError: the budget is no budget, or an input cannot be used.
        BuildError: no layer can be quantized within the budget.
    """
    store, limit = store or Store(), 3 * budget_db if worst5_db is None else worst5_db
    if not (budget_db > 0 and limit > 0):
        raise InputError(f"a budget of {min(budget_db, limit)} dB leaves nothing to gain; give one above 0, as 0.2")
    shutil.rmtree(claim(out))  # refused now, not after the search
    criteria = CriteriaSection(max_si_snr_drop_db=budget_db, worst5_drop_db=limit)
    targets = tuple(TargetSection(runtime=runtime, precision=p, ops=ops) for p in ("fp32", "int8"))

    def line(share: float) -> Line:
        passes: list[dict[str, Any]] = [
            {"pass": "prune", "share": share},
            {"pass": "finetune", "steps": steps},
            {"pass": "lower"},
            {"pass": "equalize"},
            {"pass": "quantize", "method": "onnxruntime", "fit": True},
        ]
        recipe = Recipe(
            separator=separator,
            data=data,
            passes=tuple(passes if share else passes[2:]),
            targets=targets,
            criteria=criteria,
            stream=stream,
        )
        return Line(recipe, store, tick)

    said: list[str] = []
    best = line(0)
    tried = [{"share": 0.0, **best.trial()}]
    if steps and (data.train is None or len(best.train) < FEW):
        have = "none are named" if data.train is None else f"there are {len(best.train)}"
        said.append(f"not pruned: recovery needs at least {FEW} training mixtures, {have}")
    elif steps:
        for share in SHARES:
            pruned = line(share)
            try:
                tried.append({"share": share, **pruned.trial()})
            except BuildError as e:
                said.append(f"pruning ends at {tried[-1]['share']:.0%}: {e}")
                break
            best = pruned
    return Compressed(best.run(out), tuple(tried), tuple(said))
