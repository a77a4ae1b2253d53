"""What all doors of the command line share: the progress line, the table of rows, and the types of common options."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

screen = Console(stderr=True)

Checkpoint = Annotated[Path, typer.Argument(help="best_model.pth, a Lightning .ckpt or a bare state dict")]
Config = Annotated[Path | None, typer.Option(help="conf.yml of the training run (looked for beside the checkpoint)")]
FrontEnd = Annotated[Path | None, typer.Option(help="IIANet: checkpoint of its lip front-end")]
Variant = Annotated[str | None, typer.Option(help="TFACM: causal or released arithmetic")]
BundlePath = Annotated[Path, typer.Argument(help="folder that `edgesep deploy` wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of the runtime (default: as deployed)")]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress line on a terminal; nothing elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)

        def tick(done: int, total: int, text: str) -> None:
            bar.update(task, description=text, completed=done, total=total or None)

        yield tick


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print result rows as a table, or as JSON."""
    from edgesep import report

    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    shown = report.headings(rows)
    for _, head in shown:
        table.add_column(head, justify="left" if head in ("runtime", "precision", "ops", "status") else "right")
    for row in rows:
        text = report.cells(row)
        table.add_row(*(text[i] for i, _ in shown))
    Console(width=None if sys.stdout.isatty() else 190).print(table)
    for row in rows:
        for said in [*row.get("misses", []), *([row["note"]] if row.get("note") else [])]:
            print(f"{row['runtime']} {row['precision']}: {said}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as they are, a column for each key."""
    if not rows:
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 190).print(table)
