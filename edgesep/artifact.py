"""One build of a separator, and that build as a function. Needs numpy and its runtime.

Shapes: mixtures ``(batch, samples)``, estimates ``(batch, sources, samples)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgesep import kernels, stream
from edgesep.runtimes import runtime
from edgesep.spec import StreamSpec, VerificationError


@dataclass(frozen=True)
class Artifact:
    """One build of the separator for one runtime.

    Attributes:
        runtime, precision: what it was built for.
        threads: what it was verified with; None leaves it to the runtime.
        folder: where its files lie.
        files: their names, the one to load first.
        note: why it was not run on the build host, or empty.
        front_end: the same build of the front-end.
        ops: native or portable, for separators that can be both.
        rejected: why another precision of the same runtime is to be preferred, or empty.
        settings: what its runtime is set to instead of the defaults (``tune``).
    """

    runtime: str
    precision: str
    threads: int | None
    folder: Path
    files: tuple[str, ...]
    note: str = ""
    front_end: Artifact | None = None
    ops: str | None = None
    rejected: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extras = [", native operators"] * (self.ops == "native") + [", fixed length"] * self.fixed_length
        return "".join([f"{self.runtime} {self.precision}", *extras])

    @property
    def fixed_length(self) -> bool:
        return bool(self.settings.get("fixed_length"))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What builds of several precisions have in common."""
        return self.runtime, self.ops, self.fixed_length

    def available(self) -> None:
        """Check that this machine has what the artifact needs.

        Raises:
            UnsupportedError: its runtime is not installed, or its native kernels were built for another machine.
        """
        runtime(self.runtime)
        for graph in self.graphs():
            kernels.library_among(graph.runtime, graph.folder, list(graph.files))

    def label(self) -> dict[str, Any]:
        """What tells it from the others, at the head of its rows."""
        known = {"ops": self.ops, "length": "fixed" if self.fixed_length else None}
        return {"runtime": self.runtime, "precision": self.precision} | {k: v for k, v in known.items() if v}

    def runner(self, threads: int | None = None) -> Any:
        """A runner of this artifact (see ``runtimes.base.Runner``)."""
        module = runtime(self.runtime)
        return module.Runner(self.folder, list(self.files), self.precision, threads or self.threads, self.settings)

    def graphs(self) -> tuple[Artifact, ...]:
        """In the order in which they run."""
        return (self,) if self.front_end is None else (self.front_end, self)

    def described(self, facts: dict[str, Any]) -> tuple[tuple[Artifact, dict[str, Any]], ...]:
        """Each graph with what a manifest's ``separator`` says of it."""
        return tuple(zip(self.graphs(), [facts["front_end"], facts][-len(self.graphs()) :], strict=True))

    def size_mb(self) -> float:
        return sum((g.folder / f).stat().st_size for g in self.graphs() for f in g.files) / 1e6

    def to_json(self, root: Path) -> dict[str, Any]:
        """Its entry in the manifest."""
        entry = {
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "folder": self.folder.relative_to(root).as_posix(),
            "files": list(self.files),
            "note": self.note,
            "ops": self.ops,
            "rejected": self.rejected,
            "settings": dict(self.settings),
        }
        return entry if self.front_end is None else entry | {"front_end": self.front_end.to_json(root)}

    @classmethod
    def from_json(cls, entry: dict[str, Any], root: Path) -> Artifact:
        front = entry.get("front_end")
        return cls(
            entry["runtime"],
            entry["precision"],
            entry["threads"],
            root / entry["folder"],
            tuple(entry["files"]),
            entry["note"],
            None if front is None else cls.from_json(front, root),
            entry["ops"],
            entry["rejected"],
            entry["settings"],
        )


class Separating:
    """A loaded artifact as a function: ``(batch, samples)``, further inputs → ``(batch, sources, samples)``.

    One that streams separates each mixture call after call, and its delay is taken out.
    """

    def __init__(self, artifact: Artifact, facts: dict[str, Any], threads: int | None = None):
        self._stack = contextlib.ExitStack()
        self._stream = StreamSpec.from_json(facts["stream"]) if facts.get("stream") else None
        self.hops: stream.Hops | None = None
        self._graphs = [
            (graph.runner(threads), [i["name"] for i in fact["inputs"]], fact["outputs"][0]["name"])
            for graph, fact in artifact.described(facts)
        ]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as entered:
            for runner, _, _ in self._graphs:
                entered.enter_context(runner)
            if self._stream is not None:
                self.hops = stream.Hops(self._graphs[0][0].bound, self._stream)
            self._stack = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        if self.hops is not None:
            return np.stack([stream.whole(self.hops, mixture) for mixture in inputs[0]])
        given = list(inputs)
        for runner, names, output in self._graphs:
            mine = given[-len(names) :]  # a front-end takes the last input and leaves its output there
            outputs = runner.run(dict(zip(names, mine, strict=True)))
            if output not in outputs:
                raise VerificationError(f"the artifact returned {', '.join(outputs)}, expected {output!r}")
            given = [*given[: len(given) - len(names)], outputs[output]]
        return np.asarray(given[0])

    def look_ahead(self) -> dict[str, Any]:
        """Of a stream: the look-ahead that was measured, and a miss if it is more than the spec says."""
        if self.hops is None:
            return {}
        found, stated = stream.measured_look_ahead(self.hops), self.hops.spec.look_ahead_samples
        row: dict[str, Any] = {"look_ahead_samples": found}
        if found > stated:
            row["misses"] = [f"an estimate depends on input {found} samples ahead of it, stated are {stated}"]
        return row
