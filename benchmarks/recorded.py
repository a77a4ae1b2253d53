"""Recorded figures: ``results/*.jsonl``, one row a line, with date, commit and machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgesep import measure

HERE = Path(__file__).parent


def file_of(name: str) -> Path:
    return HERE / "results" / f"{name}.jsonl"


def rows(name: str) -> list[dict[str, Any]]:
    """All rows of a benchmark, none if it has never run."""
    file = file_of(name)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def about() -> dict[str, Any]:
    """Date, commit and machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": measure.environment()}


def cpu(row: dict[str, Any]) -> str:
    """The processor that a row was measured on."""
    return str(row["environment"]["cpu"])


def record(
    name: str, new: Iterable[dict[str, Any]], same: tuple[str, ...] = (), *, each_processor: bool = False
) -> None:
    """Put rows in the place of those that agree with one of them in the keys ``same``; beside all where none is named.

    What ``about`` says is added to rows that do not say so themselves. With ``each_processor`` rows of other processors
    stay.
    """

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*(row.get(k) for k in same), cpu(row) if each_processor else None)

    made = [row | {key: value for key, value in about().items() if key not in row} for row in new]
    replaced = {case(row) for row in made}
    kept = [row for row in rows(name) if not same or case(row) not in replaced]
    file_of(name).write_text("".join(json.dumps(row) + "\n" for row in [*kept, *made]))
