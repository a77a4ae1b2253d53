"""Mixture sets: where they lie, how they are read, how they become calibration feeds.

Shapes: a mixture is ``(samples,)``, its sources ``(sources, samples)``, float32; mouth video ``(frames, height,
width)`` uint8, see ``video``.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from edgesep import audio, video
from edgesep.spec import InputError

AUDIO = {".wav", ".flac"}
VIDEO = (".npz", ".npy")
SILENCE = 1e-6  # RMS below which a reference has no level to be measured against (-120 dBFS)


Row = tuple[Path, tuple[Path, ...], Path | None]


@dataclass(frozen=True)
class Mixture:
    """One mixture with its references, and the mouth video of the first source where the separator wants it."""

    name: str
    mixture: np.ndarray
    sources: np.ndarray
    sample_rate_hz: int
    mouth: np.ndarray | None = None

    def at_level(self, change_db: float) -> Mixture:
        """The same, louder or quieter."""
        gain = np.float32(10 ** (change_db / 20))
        return self if change_db == 0 else replace(self, mixture=gain * self.mixture, sources=gain * self.sources)

    def inputs(self) -> tuple[np.ndarray, ...]:
        """What a separator is given, batch 1: the mixture, and the mouth crops that fit it."""
        if self.mouth is None:
            return (self.mixture[None],)
        return self.mixture[None], video.fit(video.crops(self.mouth), self.mixture.size, self.sample_rate_hz)[None]


@dataclass(frozen=True)
class MixtureSet:
    """A mixture set on disk, read at one sample rate.

    Attributes:
        path: the folder or the CSV file.
        rows: (mixture file, source files, mouth video or None) of each mixture.
        sample_rate_hz: rate at which the files are read; other rates are resampled.
    """

    path: Path
    rows: tuple[Row, ...]
    sample_rate_hz: int

    @classmethod
    def open(cls, path: str | Path, sample_rate_hz: int, sources: int = 2, mouth: bool = False) -> MixtureSet:
        """Open a folder in the LibriMix/WHAM! layout (``mix*/``, ``s1/``, ``s2/``) or a CSV manifest.

        The CSV has a column for the mixture (``mixture`` or LibriMix's ``mixture_path``) and one for each source
        (``source_1`` or ``source_1_path``, ...); paths are relative to it. With ``mouth`` each mixture also needs the
        mouth video of its first source: ``mouth/NAME.npz`` beside the others, or a column ``mouth``; a folder's
        mixtures without video are left out.

        Raises:
            InputError: nothing there, an empty set or a mixture without its references.
        """
        path = Path(path)
        if path.is_dir():
            rows = _folder_rows(path, sources, mouth)
        elif path.is_file():
            rows = _csv_rows(path, sources, mouth)
        else:
            raise InputError(f"mixture set {path} does not exist; give a folder with mix*/, s1/, s2/ or a CSV file")
        if not rows:
            also = f" and mouth video in {path}/mouth/" if mouth else ""
            raise InputError(
                f"mixture set {path} is empty; expected .wav or .flac files in {path}/mix*/ and {path}/s1/{also}"
            )
        return cls(path, tuple(rows), sample_rate_hz)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mixture]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Mixture:
        return _load(*self.rows[index], self.sample_rate_hz)

    def digest(self) -> str:
        """SHA-256 over the files' contents, in order."""
        total = hashlib.sha256(str(self.sample_rate_hz).encode())
        for mixture, sources, mouth in self.rows:
            for file in (mixture, *sources, *([mouth] if mouth else [])):
                total.update(file.read_bytes())
        return total.hexdigest()


@cache
def _load(mixture: Path, sources: tuple[Path, ...], mouth: Path | None, rate_hz: int) -> Mixture:
    mixed, file_rate = audio.read(mixture, rate_hz)
    parts = []
    for file in sources:
        part, part_rate = audio.read(file, rate_hz)
        if part_rate != file_rate:
            raise InputError(f"reference {file} has {part_rate} Hz, its mixture {file_rate} Hz; resample one of them")
        if part.shape != mixed.shape:
            raise InputError(f"reference {file} has {part.size} samples, its mixture {mixed.size}; cut both alike")
        if np.sqrt(np.mean(part**2)) < SILENCE:
            raise InputError(f"reference {file} is silent, SI-SNR against it is undefined; leave this mixture out")
        parts.append(part)
    if np.sqrt(np.mean(mixed**2)) < SILENCE:
        raise InputError(f"mixture {mixture} is silent; leave it out")
    return Mixture(mixture.stem, mixed, np.stack(parts), rate_hz, video.read(mouth) if mouth else None)


def _folder_rows(path: Path, sources: int, mouth: bool) -> list[Row]:
    mixed = sorted(d for d in path.glob("mix*") if d.is_dir())
    if not mixed:
        raise InputError(f"mixture set {path} has no folder mix*/; expected the LibriMix layout mix*/, s1/, s2/")
    rows = []
    for file in sorted(f for f in mixed[0].iterdir() if f.suffix.lower() in AUDIO):
        parts = tuple(path / f"s{k + 1}" / file.name for k in range(sources))
        for part in parts:
            if not part.is_file():
                raise InputError(f"mixture {file} has no reference {part}")
        shown = next((f for s in VIDEO if (f := path / "mouth" / f"{file.stem}{s}").is_file()), None)
        if shown or not mouth:
            rows.append((file, parts, shown if mouth else None))
    return rows


def _csv_rows(path: Path, sources: int, mouth: bool) -> list[Row]:
    with path.open(newline="") as f:
        reader = csv.DictReader(f)
        columns = reader.fieldnames or []
        wanted = ["mixture", *(f"source_{k + 1}" for k in range(sources)), *(["mouth"] if mouth else [])]
        names = [next((c for c in (w, f"{w}_path") if c in columns), None) for w in wanted]
        if None in names:
            missing = [w for w, n in zip(wanted, names, strict=True) if n is None]
            raise InputError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
        rows = []
        for row in reader:
            files = [path.parent / row[n] for n in names if n is not None]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{path} names {file}, which does not exist")
            rows.append((files[0], tuple(files[1 : sources + 1]), files[-1] if mouth else None))
    return rows
