"""The bundle: a folder to flash, and what a device does with it. Needs numpy and the runtime of one artifact.

Layout: ``manifest.json`` (how it was made, hash of every file, results), ``artifacts/RUNTIME-PRECISION/``,
``golden.npz`` (test mixtures with references and the original's output), ``results.jsonl``, ``report.md``,
``README.md``. Shapes: mixtures ``(batch, samples)``, estimates ``(batch, sources, samples)``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgesep import measure, verify
from edgesep.runtimes import runtime
from edgesep.spec import Criteria, InputError, UnsupportedError, VerificationError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """One build of the separator for one runtime.

    Attributes:
        runtime, precision: what it was built for.
        threads: what it was verified with; None leaves it to the runtime.
        folder: where its files lie.
        files: their names, the one to load first.
        note: why it was not run on the build host, or empty.
    """

    runtime: str
    precision: str
    threads: int | None
    folder: Path
    files: tuple[str, ...]
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.precision}"

    def runner(self, threads: int | None = None) -> Any:
        """A runner of this artifact (see ``runtimes.base.Runner``)."""
        module = runtime(self.runtime)
        return module.Runner(self.folder, list(self.files), self.precision, threads or self.threads)

    def size_mb(self) -> float:
        return sum((self.folder / f).stat().st_size for f in self.files) / 1e6


class Separating:
    """A loaded artifact as a function: ``(batch, samples)`` → ``(batch, sources, samples)``."""

    def __init__(self, runner: Any, input_name: str, output_name: str):
        self._runner, self._input, self._output = runner, input_name, output_name

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    def __call__(self, mixture: np.ndarray) -> np.ndarray:
        outputs = self._runner.run({self._input: mixture})
        if self._output not in outputs:
            raise VerificationError(f"the artifact returned {', '.join(outputs)}, expected {self._output!r}")
        estimates: np.ndarray = outputs[self._output]
        return estimates


class Bundle:
    """An opened bundle. Every file was checked against the manifest's hash."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        facts = manifest["separator"]
        self.name: str = facts["name"]
        self.sample_rate_hz: int = facts["sample_rate_hz"]
        self.sources: int = facts["sources"]
        self.min_samples: int = facts["min_samples"]
        self.artifacts = tuple(
            Artifact(a["runtime"], a["precision"], a["threads"], path / a["folder"], tuple(a["files"]), a["note"])
            for a in manifest["artifacts"]
        )
        self.criteria = Criteria(**manifest["criteria"])

    def artifact(self, runtime: str | None = None, precision: str | None = None) -> Artifact:
        """The first artifact that fits and can run here.

        Raises:
            UnsupportedError: none fits; the message lists what there is.
        """
        fitting = [
            a
            for a in self.artifacts
            if (runtime is None or a.runtime == runtime) and (precision is None or a.precision == precision)
        ]
        if not fitting:
            asked = " ".join(x for x in (runtime, precision) if x)
            held = ", ".join(a.name for a in self.artifacts)
            raise UnsupportedError(f"{self.path} holds no artifact for {asked}; it holds {held}")
        reasons = []
        for found in fitting:
            if found.note:
                reasons.append(f"{found.name}: {found.note}")
                continue
            try:
                _import(found.runtime)
            except UnsupportedError as e:
                reasons.append(str(e))
            else:
                return found
        raise UnsupportedError("; ".join(dict.fromkeys(reasons)))

    def runner(self, runtime: str | None = None, *, precision: str | None = None, threads: int | None = None) -> Any:
        """A runner, to be entered: ``with bundle.runner("onnxruntime") as r: r.run({"mixture": x})``."""
        return self.artifact(runtime, precision).runner(threads)

    def separating(self, artifact: Artifact, threads: int | None = None) -> Separating:
        facts = self.manifest["separator"]
        return Separating(artifact.runner(threads), facts["inputs"][0]["name"], facts["outputs"][0]["name"])

    def separate(
        self,
        mixture: np.ndarray,
        *,
        runtime: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
    ) -> np.ndarray:
        """Separate ``(samples,)`` or ``(batch, samples)`` at ``sample_rate_hz`` → sources on the second last axis.

        Raises:
            InputError: too short, silent, or with NaN.
        """
        x = np.asarray(mixture, np.float32)
        if x.ndim not in (1, 2):
            raise InputError(f"mixture has shape {x.shape}, expected (samples,) or (batch, samples)")
        if x.shape[-1] < self.min_samples:
            raise InputError(f"mixture has {x.shape[-1]} samples, {self.name} needs at least {self.min_samples}")
        if not np.isfinite(x).all():
            raise InputError(f"mixture holds {np.count_nonzero(~np.isfinite(x))} NaN or infinite samples")
        if not np.abs(x).max() > 0:
            raise InputError("mixture is silent, there is nothing to separate")
        with self.separating(self.artifact(runtime, precision), threads) as run:
            estimates = run(np.atleast_2d(x))
        return estimates[0] if x.ndim == 1 else estimates

    def golden(self) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
        """Test items (mixture, sources, original's estimates) and odd shapes (batch, original's estimates)."""
        with np.load(self.path / "golden.npz") as data:
            items = [
                (data[f"mixture_{i}"], data[f"sources_{i}"], data[f"original_{i}"]) for i in range(int(data["items"]))
            ]
            cases = [(data[f"case_{i}"], data[f"case_original_{i}"]) for i in range(int(data["cases"]))]
        return items, cases

    def verify(self, tick: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
        """Re-verify every artifact on this machine against the golden vectors and the recipe's criteria.

        Artifacts whose runtime is missing here are reported as not run. All checks run before anything is judged.
        """
        items, cases = self.golden()
        rows = []
        for artifact in self.artifacts:
            tick(artifact.name)
            row: dict[str, Any] = {"runtime": artifact.runtime, "precision": artifact.precision}
            try:
                if artifact.note:
                    raise UnsupportedError(artifact.note)
                with self.separating(artifact) as run:
                    found = verify.quality(run, items)
                    shapes_db = verify.shapes_snr_db(run, cases)
                missed = verify.misses(found, shapes_db, None, artifact.precision, self.criteria)
                row |= {"status": "failed" if missed else "ok", **found.to_json(), "shapes_snr_db": round(shapes_db, 2)}
                row["misses"] = missed
            except UnsupportedError as e:
                row |= {"status": "not run", "misses": [], "note": str(e)}
            except VerificationError as e:
                row |= {"status": "failed", "misses": [str(e)]}
            rows.append(row)
        return rows

    def bench(
        self, seconds: float = 2.0, threads: int | None = None, tick: Callable[[str], None] = lambda _: None
    ) -> list[dict[str, Any]]:
        """Measure every artifact on this machine, one second of audio a query, each in a process of its own."""
        rows = []
        for artifact in self.artifacts:
            tick(artifact.name)
            rows.append(bench_row(artifact, self.manifest["separator"], seconds, threads))
        return rows


def bench_row(
    artifact: Artifact, separator: dict[str, Any], seconds: float, threads: int | None = None
) -> dict[str, Any]:
    """Latency, memory, load time and size of one artifact, with the environment they were measured in."""
    row: dict[str, Any] = {
        "runtime": artifact.runtime,
        "precision": artifact.precision,
        "threads": threads or artifact.threads,
        "size_mb": round(artifact.size_mb(), 4),
    }
    if artifact.note:
        return row | {"status": "not run", "note": artifact.note}
    job = {
        "runtime": artifact.runtime,
        "folder": str(artifact.folder),
        "files": list(artifact.files),
        "precision": artifact.precision,
        "threads": threads or artifact.threads,
        "inputs": {separator["inputs"][0]["name"]: [1, separator["sample_rate_hz"]]},
        "seconds": seconds,
    }
    try:
        _import(artifact.runtime)
        row |= {"status": "ok", **measure.measure_apart(job)}
    except UnsupportedError as e:
        return row | {"status": "not run", "note": str(e)}
    row["rtf"] = round(row["p50_ms"] / 1e3, 5)  # queries are one second of audio
    return row | {"environment": measure.environment()}


def _import(name: str) -> None:
    runtime(name)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check every file against the manifest first.

    Raises:
        InputError: no bundle there, or one of another format.
        VerificationError: a file is missing, changed or unknown.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is no bundle: {MANIFEST} is missing; make one with: edgesep deploy RECIPE --out {path}"
        )
    try:
        manifest = json.loads(file.read_text())
        hashes: dict[str, str] = manifest["files"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise VerificationError(f"{file} is damaged ({type(e).__name__}); copy the bundle again") from e
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has bundle format {manifest.get('format')}, this edgesep reads format {FORMAT}")
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise VerificationError(f"{path}: {name} is missing; copy the bundle again")
        with (path / name).open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != expected:
                raise VerificationError(f"{path}: {name} has changed since the bundle was made; copy the bundle again")
    if _digest(manifest) != manifest.get("digest"):
        raise VerificationError(f"{path}: {MANIFEST} has changed since the bundle was made; copy the bundle again")
    return Bundle(path, manifest)


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest."""
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash what lies in ``folder`` and write its manifest last."""
    files = {}
    for file in _files(folder):
        with file.open("rb") as f:
            files[file.relative_to(folder).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    manifest = json.loads(json.dumps({"format": FORMAT, **manifest, "files": files}))
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)


@contextlib.contextmanager
def golden_writer(path: Path) -> Iterator[dict[str, Any]]:
    """Collect arrays and write ``golden.npz`` at the end."""
    arrays: dict[str, Any] = {}
    yield arrays
    np.savez_compressed(path, **arrays)
