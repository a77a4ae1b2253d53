"""Finished steps on disk, found again by what went into them.

A step's folder is written beside and renamed when it is complete, so a name that exists is a step that ended well.
An interrupted step leaves its scratch folder; long steps continue from what they saved in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def default_root() -> Path:
    """``$EDGESEP_CACHE``, else the user's cache folder."""
    if named := os.environ.get("EDGESEP_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgesep"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def code_digest() -> str:
    """Digest of this package's sources: a changed library makes new steps."""
    total = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder: a second one waits, and should then look whether it is there."""
    file = folder.parent / f".{folder.name}.lock"
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


class Store:
    """A folder of finished steps."""

    def __init__(self, root: Path | None = None):
        self.root = root or default_root()
        self.redone: list[str] = []

    def folder(self, name: str, key: dict[str, Any]) -> Path:
        """Where the step with this key lies or would lie."""
        text = json.dumps({"code": code_digest(), "key": key}, sort_keys=True, default=str)
        return self.root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def lasting(self, name: str, key: dict[str, Any]) -> Path:
        """A folder for what is worth keeping of unfinished or varied work; not a finished step."""
        folder = self.folder(name, key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def step(self, name: str, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """The finished step's folder; ``make`` fills it if it is not there yet."""
        folder = self.folder(name, key)
        if folder.is_dir():
            return folder
        self.root.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not folder.is_dir():
                scratch = self.root / f".{folder.name}.partial"
                scratch.mkdir(exist_ok=True)
                make(scratch)
                scratch.rename(folder)
                self.redone.append(name)
        return folder


def replace_folder(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, which stays whole until that moment."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
