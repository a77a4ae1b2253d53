"""The bundle: a folder to flash, and what a device does with it. Needs numpy and the runtime of one artifact.

Layout: ``manifest.json`` (how it was made, hash of every file, results), ``artifacts/RUNTIME-PRECISION/``,
``golden.npz`` (test mixtures with references and the original's output), ``results.jsonl``, ``report.md``,
``README.md``. Shapes: mixtures ``(batch, samples)``, estimates ``(batch, sources, samples)``, mouth video
``(frames, height, width)`` uint8.

An audio-visual separator is two graphs at two rates: its artifacts hold a second one, the front-end, that makes the
separator's last input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesep import bench, blocks, stream, verify, video
from edgesep.artifact import Artifact, Separating
from edgesep.spec import Criteria, InputError, UnsupportedError, VerificationError

FORMAT = 7
MANIFEST = "manifest.json"


class Bundle:
    """An opened bundle. Every file was checked against the manifest's hash."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        facts = manifest["separator"]
        self.name: str = facts["name"]
        self.sample_rate_hz: int = facts["sample_rate_hz"]
        self.sources: int = facts["sources"]
        self.min_samples: int = facts["min_samples"]
        self.causal: bool = facts["causal"]
        self.artifacts = tuple(Artifact.from_json(a, path) for a in manifest["artifacts"])
        self.criteria = Criteria(**manifest["criteria"])

    def artifact(self, runtime: str | None = None, precision: str | None = None, ops: str | None = None) -> Artifact:
        """The first artifact that fits and can run here; those that were rejected come last.

        Raises:
            UnsupportedError: none fits; the message lists what there is.
        """
        fitting = [
            a
            for a in self.artifacts
            if all(
                asked in (None, held) for asked, held in ((runtime, a.runtime), (precision, a.precision), (ops, a.ops))
            )
        ]
        if not fitting:
            asked = " ".join(x for x in (runtime, precision, ops and f"{ops} operators") if x)
            held = ", ".join(a.name for a in self.artifacts)
            raise UnsupportedError(f"{self.path} holds no artifact for {asked}; it holds {held}")
        reasons = []
        for found in sorted(fitting, key=lambda a: bool(a.rejected)):
            if found.note:
                reasons.append(f"{found.name}: {found.note}")
                continue
            try:
                found.available()
            except UnsupportedError as e:
                reasons.append(str(e))
            else:
                return found
        raise UnsupportedError("; ".join(dict.fromkeys(reasons)))

    def runner(
        self,
        runtime: str | None = None,
        *,
        precision: str | None = None,
        ops: str | None = None,
        threads: int | None = None,
    ) -> Any:
        """A runner, to be entered: ``with bundle.runner("onnxruntime") as r: r.run({"mixture": x})``."""
        return self.artifact(runtime, precision, ops).runner(threads)

    def separating(self, artifact: Artifact, threads: int | None = None) -> Separating:
        return Separating(artifact, self.manifest["separator"], threads)

    def separate(
        self,
        mixture: np.ndarray,
        mouth: np.ndarray | None = None,
        *,
        late_s: float = 0.0,
        block_s: float | None = None,
        runtime: str | None = None,
        precision: str | None = None,
        ops: str | None = None,
        threads: int | None = None,
    ) -> np.ndarray:
        """Separate ``(samples,)`` or ``(batch, samples)`` at ``sample_rate_hz`` → sources on the second last axis.

        Args:
            mouth: video of the wanted speaker's mouth, for audio-visual separators (one mixture at a time).
            late_s: how much later than the audio the video starts.
            block_s: separate in overlapping blocks of this length, in bounded memory (see ``blocks``).
            runtime, precision, ops: which artifact; by default the first that can run here.

        Raises:
            InputError: too short, silent, or with NaN; video missing, or of another length than the audio.
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
        inputs = (np.atleast_2d(x), *self._video(x, mouth, late_s))
        block = None if block_s is None else self.block_samples(block_s)
        with self.separating(self.artifact(runtime, precision, ops), threads) as run:
            if block is None:
                estimates = run(*inputs)
            else:
                estimates = blocks.separate(run, inputs, block, self.min_samples, self.causal)
        return estimates[0] if x.ndim == 1 else estimates

    def block_samples(self, block_s: float) -> int:
        """Samples of a block.

        Raises:
            InputError: it would be too short for this separator.
        """
        shortest_s = self.min_samples / self.sample_rate_hz
        if not block_s >= 2 * shortest_s:
            raise InputError(f"blocks of {block_s} s are too short, {self.name} needs at least {2 * shortest_s:.3f} s")
        return round(block_s * self.sample_rate_hz)

    def _video(self, mixture: np.ndarray, mouth: np.ndarray | None, late_s: float) -> tuple[np.ndarray, ...]:
        """The crops that a front-end wants, batch 1."""
        if not self.manifest["separator"].get("front_end"):
            if mouth is not None:
                raise InputError(f"{self.name} takes audio alone; leave out the mouth video")
            return ()
        if mouth is None:
            raise InputError(f"{self.name} needs the mouth video of the wanted speaker (--mouth FILE.npz)")
        if mixture.ndim != 1:
            raise InputError("with mouth video one mixture (samples,) is separated at a time")
        return (video.fit(video.crops(mouth), mixture.size, self.sample_rate_hz, late_s)[None],)

    def golden(
        self,
    ) -> tuple[list[tuple[verify.Inputs, np.ndarray, np.ndarray]], list[tuple[verify.Inputs, np.ndarray]]]:
        """Test items (inputs, sources, original's estimates) and odd shapes (inputs, original's estimates)."""
        with np.load(self.path / "golden.npz") as data:

            def inputs(kind: str, i: int) -> tuple[np.ndarray, ...]:
                mixture, name = np.atleast_2d(data[f"{kind}_{i}"]), f"{kind}_mouth_{i}"
                if name not in data:
                    return (mixture,)
                fitted = (video.fit(video.crops(v), mixture.shape[1], self.sample_rate_hz) for v in data[name])
                return mixture, np.stack(list(fitted))

            items = [
                (inputs("mixture", i), data[f"sources_{i}"], data[f"original_{i}"]) for i in range(int(data["items"]))
            ]
            cases = [(inputs("case", i), data[f"case_original_{i}"]) for i in range(int(data["cases"]))]
        return items, cases

    def verify(self, tick: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
        """Re-verify every artifact on this machine against the golden vectors and the recipe's criteria.

        Artifacts whose runtime is missing here are reported as not run. All checks run before anything is judged.
        """
        items, cases = self.golden()
        rows = []
        for artifact in self.artifacts:
            tick(artifact.name)
            row: dict[str, Any] = artifact.label()
            try:
                if artifact.note:
                    raise UnsupportedError(artifact.note)
                with self.separating(artifact) as run:
                    found = verify.quality(run, items)
                    shapes_db = verify.shapes_snr_db(run, cases)
                    look = run.look_ahead()
                missed = verify.misses(found, shapes_db, None, artifact.precision, self.criteria)
                missed += look.pop("misses", [])
                row |= {"status": "failed" if missed else "ok", **found.to_json(), "shapes_snr_db": round(shapes_db, 2)}
                row |= look | {"misses": missed}
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
            rows.append(bench.row(artifact, self.manifest["separator"], seconds, threads))
        return rows

    def bench_stream(
        self,
        minutes: float = 1.0,
        threads: int | None = None,
        load: bool = False,
        tick: Callable[[str], None] = lambda _: None,
    ) -> list[dict[str, Any]]:
        """Measure every artifact at the pace of audio (``paced``), each in a process of its own.

        Raises:
            UnsupportedError: the bundle does not stream.
        """
        rows, spec = [], stream.spec_of(self)
        for artifact in self.artifacts:
            tick(artifact.name)
            rows.append(bench.stream_row(artifact, self.manifest["separator"], spec, minutes, threads, load))
        return rows


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
    beside = folder / f".{MANIFEST}"
    beside.write_text(json.dumps(manifest, indent=1) + "\n")
    beside.replace(folder / MANIFEST)  # whole or not at all


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
