"""Write the README's tables from the recorded rows in ``benchmarks/results``.

python benchmarks/readme_tables.py            # rewrite README.md in place
python benchmarks/readme_tables.py --check    # exit 1 if a table in it is not what the rows say
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

from recorded import cpu, rows

from edgesep.report import markdown_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def demo() -> str:
    found = rows("demo")
    env = found[0]["environment"]
    return f"{markdown_table(found)}\n\nMeasured on {env['cpu']}, {env['cores']} cores ({', '.join(env['isa'])})."


def overlapping() -> str:
    """The results of ``edgesep demo --separator Overlapping``."""
    return markdown_table(rows("overlapping"))


def runtimes() -> str:
    """The newest run of each separator, length and thread count."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows("runtimes"):
        case = row["separator"], row["audio_s"], row["threads"]
        if row["runtime"] == "eager":  # a run begins
            newest = {key: kept for key, kept in newest.items() if key[:3] != case}
        artifact = row["runtime"], row["precision"] + (f", {row['ops']}" if row.get("ops") else "")
        newest[*case, *artifact] = row
    lines = ["| separator | audio | threads | runtime | precision | p50 ms | times eager's speed | drop dB |"]
    lines.append("|" + "---|" * 8)
    for (separator, audio_s, threads, runtime, precision), row in newest.items():
        ratio = f"{row['faster_than_eager']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        drop = "-" if row["drop_db"] is None else f"{row['drop_db']:z.3f}"
        case = f"| {separator} | {audio_s:g} s | {threads} | {runtime} | {precision}"
        lines.append(f"{case} | {row['p50_ms']:.1f} | {ratio} | {drop} |")
    return "\n".join(lines)


def scan() -> str:
    """The operator alone and SPMamba around it."""
    lines = [
        "| what | runtime | scan | threads | p50 ms | ns per state update | times faster | SNR dB |",
        "|" + "---|" * 8,
    ]
    for row in rows("selective_scan"):
        alone = row["part"] == "operator"
        what = f"scan over {row['over']}" if alone else "SPMamba"
        per_update = f"{row['ns_per_update']:.3f}" if alone else "-"
        ratio = f"{row['faster']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        snr = row["snr_db"] if alone else row["output_snr_db"]
        lines.append(
            f"| {what} | {row['runtime']} | {row['scan']} | {row['threads']} | {row['p50_ms']:.1f} | {per_update}"
            f" | {ratio} | {snr:.1f} |"
        )
    found = rows("selective_scan")[0]
    peaks = {row["threads"]: row["matmul_gflops"] for row in rows("selective_scan") if "matmul_gflops" in row}
    rates = ", ".join(f"{gflops:.0f} GFLOP/s with {threads} thread(s)" for threads, gflops in peaks.items())
    cpu = f"{found['environment']['cpu']} ({found['instruction_set']})"
    return "\n".join(lines) + f"\n\nMeasured on {cpu}, whose matrix products reach {rates}."


def long_files() -> str:
    """A minute through every artifact: whole, and in blocks."""
    found: dict[tuple[str, ...], dict[float | None, dict[str, Any]]] = {}
    for row in rows("long_files"):
        form = row["precision"] + (f", {row['ops']}" if "ops" in row else "")
        found.setdefault((row["separator"], row["runtime"], form), {})[row["block_s"]] = row
    lengths = sorted({block for by_block in found.values() for block in by_block if block})
    heads = [f"{block:g} s blocks: peak MB, SNR to whole" for block in lengths]
    lines = ["| separator | runtime | precision | whole: peak MB | " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * (4 + len(heads)))
    for artifact, by_block in found.items():
        parts = [f"{by_block[None].get('peak_mb', 'failed')}"]
        parts += [f"{by_block[b]['peak_mb']}, {by_block[b]['snr_to_whole_db']:.1f} dB" for b in lengths]
        lines.append(f"| {' | '.join(artifact)} | {' | '.join(parts)} |")
    return "\n".join(lines)


def streaming() -> str:
    """Everything that was measured of streams, a small table for each part."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows("streaming"):
        parts.setdefault(row["part"], []).append(row)
    lines = ["At the pace of audio for a minute, one thread, alone and beside a process that keeps a core busy:", ""]
    lines += [
        "| runtime | precision | other load | p50 ms | p99 ms | p99.9 ms | jitter ms | late calls | longest run | RTF"
        " | algorithmic + buffering + p99 ms |",
        "|" + "---|" * 11,
    ]
    for r in parts["paced"]:
        busy = "yes" if r["load"] else "no"
        late = f"{r['late_calls']} of {r['calls']:,} | {r['longest_late_run']}"
        lines.append(
            f"| {r['runtime']} | {r['precision']} | {busy} | {r['p50_ms']:.2f} | {r['p99_ms']:.2f}"
            f" | {r['p99.9_ms']:.2f} | {r['jitter_ms']:.2f} | {late} | {r['rtf']:.3f}"
            f" | {r['algorithmic_ms']:g} + {r['buffering_ms']:g} + {r['p99_ms']:.2f} |"
        )
    lines += ["", "Ten minutes without a reset, the same minute of mixtures ten times (SI-SNR in dB):", ""]
    lines += [
        "| runtime | precision | first minute | last minute | largest change | after 10 s of silence"
        " | after 10 s 40 dB louder | memory grown |",
        "|" + "---|" * 8,
    ]
    for r in parts["drift"]:
        lines.append(
            f"| {r['runtime']} | {r['precision']} | {r['si_snr_db'][0]:.2f} | {r['si_snr_db'][-1]:.2f}"
            f" | {r['largest_change_db']:.2f} | {r['after_silence_db']:+.2f} | {r['after_40_db_louder_db']:+.2f}"
            f" | {r['grown_mb']:.1f} MB |"
        )
    lines += ["", "How much past the attention needs (ONNX Runtime, one hop a call, one thread):", ""]
    lines += ["| context | SI-SNRi dB | state kB | peak MB | p50 ms | RTF |", "|" + "---|" * 6]
    for r in parts["context"]:
        lines.append(
            f"| {r['context_s']:g} s | {r['si_snri_db']:.2f} | {r['state_kb']:,.0f} | {r['peak_rss_mb']:.0f}"
            f" | {r['p50_ms']:.2f} | {r['rtf']:.3f} |"
        )
    lines += ["", "Against the plain way, the offline graph run again over the last second for every hop:", ""]
    lines += ["| runtime | stream ms | plain way ms | times cheaper |", "|" + "---|" * 4]
    for r in parts["window"]:
        lines.append(f"| {r['runtime']} | {r['stream_ms']:.2f} | {r['window_ms']:.1f} | {r['cheaper']:.0f} |")
    lines += ["", "TFACM at its published size (8 kHz, 8 ms window, 1 ms hop), 8 hops a call, 0.5 s of context:", ""]
    lines += [
        "| processor | runtime | precision | operators | threads | p50 ms | RTF, of rounds | cores share a cache"
        " | they do not | SNR to offline dB |",
        "|" + "---|" * 10,
    ]
    for r in parts["published"]:
        apart = [f"{v:.2f}" if v is not None and r["threads"] > 1 else "" for v in (r["rtf_near"], r["rtf_far"])]
        lines.append(
            f"| {cpu(r)} | {r['runtime']} | {r['precision']} | {r['ops']} | {r['threads']} | {r['p50_ms']:.2f}"
            f" | {r['rtf']:.2f} [{r['rtf_low']:.2f}, {r['rtf_high']:.2f}] | {' | '.join(apart)}"
            f" | {r['output_snr_db']:.0f} |"
        )
    return "\n".join(lines)


def compression() -> str:
    """What INT8 and pruning cost and bring, a small table for each part that was measured."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows("compression"):
        parts.setdefault(row["part"], []).append(row)
    lines = [
        "| separator | runtime | budget, mean dB | MACs in INT8 | drop dB | worst 5 % dB | times smaller |",
        "|" + "---|" * 7,
    ]
    for r in (*parts.get("int8", ()), *parts.get("budget", ())):
        share = ", ".join(f"{v:.0%}" for v in r["quantized_macs_share"].values())
        lines.append(
            f"| {r['separator']} | {r['runtime']} | {r['limit_db']:g} | {share} | {r['drop_db']:z.3f}"
            f" | {r['drop_worst5_db']:z.3f} | {r['times_smaller']:.2f} |"
        )
    if "pruned" in parts:
        lines += ["", "Pruned, recovered by fine-tuning on mixtures of training voices, then INT8 (OpenVINO):", ""]
        heads = "MACs removed | parameters | steps | precision | drop dB | worst 5 % dB"
        lines += [f"| separator | {heads} |", "|" + "---|" * 7]
        for r in parts["pruned"]:
            lines.append(
                f"| {r['separator']} | {r['macs_removed_share']:.0%} | {r['parameters_before']:,} → {r['parameters']:,}"
                f" | {r['recovered_db'].get('steps', 0)} | {r['precision']} | {r['drop_db']:z.3f}"
                f" | {r['drop_worst5_db']:z.3f} |"
            )
    if "qat" in parts:
        lines += ["", "Every layer in INT8, no budget, after training in float or with INT8's rounding (OpenVINO):", ""]
        lines += ["| separator | trained | steps | precision | drop dB | worst 5 % dB |", "|" + "---|" * 6]
        lines += [
            f"| {r['separator']} | {r['trained']} | {r['steps']} | {r['precision']} | {r['drop_db']:z.3f}"
            f" | {r['drop_worst5_db']:z.3f} |"
            for r in parts["qat"]
        ]
    if "half" in parts:
        lines += ["", "Products in fp16 (`halve`); TensorRT's engines are built here, not run:", ""]
        lines += ["| separator | runtime | products in fp16 | drop dB | worst 5 % dB | MB |", "|" + "---|" * 6]
        for r in parts["half"]:
            if r["precision"] == "fp16":
                drops = [f"{r[k]:z.4f}" if r[k] is not None else r["status"] for k in ("drop_db", "drop_worst5_db")]
                products = " + ".join(r["fp16_products"])
                lines.append(
                    f"| {r['separator']} | {r['runtime']} | {products} | {' | '.join(drops)} | {r['size_mb']:.2f} |"
                )
    if mamba := _by_part([r for r in parts.get("sensitivity", ()) if r["separator"] == "SPMamba"]):
        lines += ["", "INT8 in each part of a Mamba separator alone (the packaged SPMamba):", ""]
        lines += [
            "| part | share of MACs that can be INT8 | output SNR dB | worst drop of a layer dB |",
            "|---|---|---|---|",
        ]
        lines += mamba
    if "peers" in parts:
        lines += [
            "",
            "By other tools' defaults, one thread, paired in one run, speed against our fp32 (IIANet: its audio path):",
            "",
        ]
        lines += [
            "| separator | quantizer | runtime | drop dB | worst 5 % dB | MB | times fp32's speed |",
            "|" + "---|" * 7,
        ]
        for r in parts["peers"]:
            if "failed" in r:
                lines.append(f"| {r['separator']} | {r['maker']} | {r['runtime']} | failed | | | |")
                continue
            lines.append(
                f"| {r['separator']} | {r['maker']} | {r['runtime']} | {r['drop_db']:z.3f} | {r['drop_worst5_db']:z.3f}"
                f" | {r['size_mb']:.2f} | {r['times_fp32_speed']:.2f} |"
            )
    return "\n".join(lines)


def _by_part(found: list[dict[str, Any]]) -> list[str]:
    """Layers of the same name in all blocks and directions together: their noises add up."""
    noise: dict[str, float] = {}
    share: dict[str, float] = {}
    worst: dict[str, float] = {}
    for r in found:
        part = re.sub(r"_\d+", "", r["layer"].rsplit(".mixer.")[-1].rsplit("blocks.")[-1].lstrip("0123456789."))
        part = part or "attention (both products)"
        noise[part] = noise.get(part, 0.0) + 10 ** (-r["output_snr_db"] / 10)
        share[part] = share.get(part, 0.0) + r["macs_share"]
        worst[part] = max(worst.get(part, -9.0), r["drop_db"])
    ranked = sorted(noise, key=lambda n: -noise[n])
    return [f"| `{n}` | {share[n]:.1%} | {-10 * math.log10(noise[n]):.1f} | {worst[n]:.3f} |" for n in ranked]


PLAIN = "plain export, onnxruntime"


def peers() -> str:
    """Published sizes on each processor: the fastest of the others, of ours in float and of ours in lower precision."""
    lines = [
        "| processor | separator | audio | plain export ms | fastest other | edgesep, fp32"
        " | edgesep, lower precision |",
        "|" + "---|" * 7,
    ]
    again = before()
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows("peers"):
        if "faster" in r and r["threads"] == 2:
            cases.setdefault((cpu(r), r["separator"], r["audio_s"]), []).append(r)
    for (processor, separator, audio_s), found in cases.items():
        ours = [r for r in found if r["candidate"].startswith("edgesep")]
        base = next(r for r in found if r["candidate"] == PLAIN)
        columns = [
            [r for r in found if r not in ours and r is not base],
            [r for r in ours if r["candidate"].endswith("fp32")],
            [r for r in ours if not r["candidate"].endswith("fp32")],
        ]
        best = [max(column, key=lambda r: r["faster"]) for column in columns]
        cells = [
            f"{r['faster']:.2f} ({r['candidate'].removeprefix('edgesep, ')})"
            + (f"; before {again[_candidate(r)]}" if _candidate(r) in again else "")
            for r in best
        ]
        lines.append(f"| {processor} | {separator} | {audio_s:g} s | {base['p50_ms']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def before() -> dict[tuple[Any, ...], str]:
    """How many times faster earlier runs found a candidate on the same processor."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for r in rows("peers_again"):
        if "faster" in r:
            found.setdefault(_candidate(r), []).append(f"{r['faster']:.2f}")
    return {candidate: ", ".join(ratios) for candidate, ratios in found.items()}


def _candidate(row: dict[str, Any]) -> tuple[Any, ...]:
    return cpu(row), row["separator"], row["audio_s"], row["threads"], row["candidate"]


def all_peers() -> str:
    """Every candidate on the processor of the first row, and what earlier runs on it found."""
    lines = [
        "| separator | audio | threads | candidate | p50 ms | times the plain export's speed | before"
        " | output SNR dB | of peak | MB |",
        "|" + "---|" * 10,
    ]
    home, again = rows("peers")[0], before()
    for r in rows("peers"):
        if cpu(r) != cpu(home):
            continue
        case = f"| {r['separator']} | {r['audio_s']:g} s | {r['threads']} | {r['candidate']}"
        if "failed" in r:
            lines.append(f"{case} | failed | | | | | |")
            continue
        lines.append(
            f"{case} | {r['p50_ms']:.1f} | {r['faster']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            f" | {again.get(_candidate(r), '')}"
            f" | {r['output_snr_db']:.1f} | {r['of_peak']:.0%} | {r['memory_mb']:.0f} |"
        )
    lines += ["", f"Measured on {cpu(home)}, {home['environment']['cores']} cores."]
    return "\n".join([*lines, *_with_front_end(cpu(home))])


def _with_front_end(processor: str) -> list[str]:
    """IIANet and its front-end, one after the other: medians of both, added."""
    timed = [r for r in rows("peers") if "p50_ms" in r and (cpu(r), r["audio_s"], r["threads"]) == (processor, 1, 2)]
    parts = [
        {r["candidate"]: r["p50_ms"] for r in timed if r["separator"] == name}
        for name in ("IIANet", "IIANet's front-end")
    ]
    both = {what: parts[0][what] + ms for what, ms in parts[1].items() if what in parts[0]}
    if not both:
        return []
    lines = ["", "IIANet with its front-end, from mouth crops on, 1 s, 2 threads (medians of both graphs, added):", ""]
    lines += ["| candidate | front-end ms | both ms | times the plain export's speed |", "|" + "---|" * 4]
    base = both[PLAIN]
    for what, ms in both.items():
        lines.append(f"| {what} | {parts[1][what]:.1f} | {ms:.1f} | {base / ms:.2f} |")
    return lines


def lengths() -> str:
    """What dynamic lengths cost."""
    lines = [
        "| separator | runtime | precision | audio | dynamic ms | fixed ms | fixed is faster | first query s |",
        "|" + "---|" * 8,
    ]
    for r in rows("lengths"):
        lines.append(
            f"| {r['separator']} | {r['runtime']} | {r['precision']} | {r['audio_s']:g} s | {r['dynamic_ms']:.1f}"
            f" | {r['fixed_ms']:.1f} | {r['fixed_faster']:.2f} | {r['first_query_s']:.1f} |"
        )
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


TABLES = (
    demo,
    runtimes,
    peers,
    all_peers,
    lengths,
    compression,
    scan,
    overlapping,
    streaming,
    long_files,
    papers,
    demos,
)


def filled(text: str) -> str:
    for make in TABLES:
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
