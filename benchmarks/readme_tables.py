"""Write the README's tables from the recorded rows in ``benchmarks/results``.

python benchmarks/readme_tables.py            # rewrite README.md in place
python benchmarks/readme_tables.py --check    # exit 1 if a table in it is not what the rows say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from edgesep.report import markdown_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text().splitlines()]


def demo() -> str:
    found = rows("demo")
    env = found[0]["environment"]
    return f"{markdown_table(found)}\n\nMeasured on {env['cpu']}, {env['cores']} cores ({', '.join(env['isa'])})."


def runtimes() -> str:
    """The newest run of each separator, length and thread count."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows("runtimes"):
        newest[row["separator"], row["audio_s"], row["threads"], row["runtime"], row["precision"]] = row
    lines = ["| separator | audio | threads | runtime | precision | p50 ms | times eager's speed | drop dB |"]
    lines.append("|" + "---|" * 8)
    for (separator, audio_s, threads, runtime, precision), row in newest.items():
        ratio = f"{row['faster_than_eager']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        drop = "-" if row["drop_db"] is None else f"{row['drop_db']:.3f}"
        case = f"| {separator} | {audio_s:g} s | {threads} | {runtime} | {precision}"
        lines.append(f"{case} | {row['p50_ms']:.1f} | {ratio} | {drop} |")
    return "\n".join(lines)


def demos() -> str:
    lines = [
        "| separator | parameters | rate | SI-SNRi, unseen voices | training | seed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows("demos"):
        wrong = row.get("wrong_mouth_si_snri_db")
        aside = "" if wrong is None else f"; shown the other mouth {wrong:.2f} dB"
        lines.append(
            f"| {row['separator']} | {row['parameters']:,} | {row['sample_rate_hz']} Hz"
            f" | {row['test_si_snri_db']:.2f} dB [{row['low_db']:.2f}, {row['high_db']:.2f}]{aside}"
            f" | {row['training']} | {row['seed']} |"
        )
    return "\n".join(lines)


def papers() -> str:
    lines = ["| size | parameters | paper | GMAC/s | paper | counted as papers do |", "|" + "---|" * 6]
    for row in rows("papers"):
        lines.append(
            f"| {row['size']} | {row['parameters']:,} | {row['paper_parameters']:,} | {row['gmacs_per_s']:.2f}"
            f" | {row['paper_gmacs_per_s']} | {row['profiled_gmacs_per_s']:.2f} |"
        )
    return "\n".join(lines)


def filled(text: str) -> str:
    for make in (demo, runtimes, papers, demos):
        pattern = rf"(<!-- table: {make.__name__} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, count=1, flags=re.DOTALL)
        if not found:
            sys.exit(f"README.md has no place for the table {make.__name__!r}")
    return text


def main() -> None:
    text = README.read_text()
    if "--check" in sys.argv:
        sys.exit(0 if filled(text) == text else "README.md differs from benchmarks/results; run readme_tables.py")
    README.write_text(filled(text))


if __name__ == "__main__":
    main()
