"""Rows of a deployment: what each artifact reaches on the test set and costs here, beside the float original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgesep import audit, bench, measure, verify
from edgesep.artifact import Artifact, Separating
from edgesep.calibration import MixtureSet
from edgesep.passes.base import Tick
from edgesep.runtimes import runtime
from edgesep.separators import Separator
from edgesep.spec import Criteria, VerificationError

SECONDS = 2.0  # of queries, to time one build


@dataclass(frozen=True)
class Results:
    """Judges artifacts of one separator.

    Attributes:
        references: the original's estimates on the test set.
        cases: (inputs, the original's estimates) of odd lengths and batch sizes.
        facts: what the manifest says of the separator.
    """

    original: Separator
    test: MixtureSet
    references: list[np.ndarray]
    cases: list[tuple[verify.Inputs, np.ndarray]]
    facts: dict[str, Any]
    criteria: Criteria
    tick: Tick

    def rows(self, artifacts: Sequence[Artifact]) -> tuple[list[dict[str, Any]], list[Artifact]]:
        """A row for the original and one for each artifact, and the artifacts, the rejected ones marked."""
        rows = [self._eager(), *(self._row(artifact) for artifact in artifacts)]
        return rows, self._audited(artifacts, rows[1:])

    def _judge(self, separate: verify.Separate, text: str) -> verify.Quality:
        count = [0]

        def tick() -> None:
            count[0] += 1
            self.tick(count[0], len(self.test), text)

        items = ((m.inputs(), m.sources, r) for m, r in zip(self.test, self.references, strict=True))
        return verify.quality(separate, items, tick)

    def _eager(self) -> dict[str, Any]:
        """The original itself: its quality from the references, its latency from a few runs."""
        it = iter(self.references)
        quality = self._judge(lambda *_: next(it)[None], "judging the original")
        inputs = list(self.original.example_inputs(self.original.sample_rate_hz))
        if front := self.original.front_end:
            inputs[-1:] = front.example_inputs(front.sample_rate_hz)
        self.tick(0, 0, "measuring eager fp32")
        times = measure.latencies_ms(lambda: self.original(*inputs), SECONDS)
        found = measure.percentiles(times)
        return {
            "runtime": "eager",
            "precision": "fp32",
            "status": "ok",
            **quality.to_json(),
            **found,
            "queries": len(times),
            "rtf": round((found["p50_ms"] or 0) / 1e3, 5),
            "size_mb": round(sum(s.parameters for s in (self.original, self.original.front_end) if s) * 4 / 1e6, 4),
            "runtime_version": f"torch {torch.__version__}",
            "environment": measure.environment(),
            "misses": [],
        }

    def _row(self, artifact: Artifact) -> dict[str, Any]:
        if artifact.note:
            row = bench.row(artifact, self.facts, 0)
            version = runtime(artifact.runtime).version()
            return row | {"status": "built, not run", "runtime_version": version, "misses": []}
        self.tick(0, 0, f"measuring {artifact.name}")
        row = bench.row(artifact, self.facts, SECONDS)
        try:
            with Separating(artifact, self.facts) as run:
                quality = self._judge(run, f"verifying {artifact.name}")
                shapes_db = verify.shapes_snr_db(run, self.cases)
                look = run.look_ahead()
        except VerificationError as e:
            return row | {"status": "failed", "misses": [str(e)]}
        misses = verify.misses(quality, shapes_db, row["rtf"], artifact.precision, self.criteria)
        misses += look.pop("misses", [])
        found = {**quality.to_json(), "shapes_snr_db": round(shapes_db, 2), **look, "misses": misses}
        return row | found | {"status": "failed" if misses else "ok"}

    def _audited(self, artifacts: Sequence[Artifact], rows: list[dict[str, Any]]) -> list[Artifact]:
        """Which kernels each build ran, in lower precision beside the float one; the rows get what was found."""
        plain = audit.float_builds(artifacts)
        audited = []
        for artifact, row in zip(artifacts, rows, strict=True):
            if not artifact.note and "drop_db" in row:
                self.tick(0, 0, f"auditing {artifact.name}")
                row["audit"] = found = audit.look(artifact, plain, self.facts)
                row["times_fp32_speed"] = found.get("times_fp32_speed")
                artifact = replace(artifact, rejected=found.get("rejected", ""))
            audited.append(artifact)
        return audited
