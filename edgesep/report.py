"""The bundle's pages: ``report.md`` for the one who decides, ``README.md`` for the one who flashes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgesep.profile_picture import profile_svg
from edgesep.spec import StreamSpec

PROFILE = "profile.svg"

#: (heading, key, format) of the table that every door shows
COLUMNS = (
    ("runtime", "runtime", "{}"),
    ("precision", "precision", "{}"),
    ("operators", "ops", "{}"),
    ("length", "length", "{}"),
    ("SI-SNRi dB", "si_snri_db", "{:.2f}"),
    ("drop dB", "drop_db", "{:z.3f}"),
    ("worst 5 % dB", "drop_worst5_db", "{:z.3f}"),
    ("output SNR dB", "output_snr_db", "{:.1f}"),
    ("shapes dB", "shapes_snr_db", "{:.1f}"),
    ("x fp32", "times_fp32_speed", "{:.2f}"),
    ("p50 ms", "p50_ms", "{:.2f}"),
    ("p90 ms", "p90_ms", "{:.2f}"),
    ("p99 ms", "p99_ms", "{:.2f}"),
    ("p99.9 ms", "p99.9_ms", "{:.2f}"),
    ("jitter ms", "jitter_ms", "{:.3f}"),
    ("late calls", "late_calls", "{}"),
    ("longest run", "longest_late_run", "{}"),
    ("algorithmic ms", "algorithmic_ms", "{:g}"),
    ("buffering ms", "buffering_ms", "{:g}"),
    ("latency ms", "latency_ms", "{:.2f}"),
    ("look-ahead", "look_ahead_samples", "{}"),
    ("RTF", "rtf", "{:.3f}"),
    ("size MB", "size_mb", "{:.2f}"),
    ("peak MB", "peak_rss_mb", "{:.0f}"),
    ("status", "status", "{}"),
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table as text; absent figures are a dash."""
    return [show.format(row[key]) if row.get(key) is not None else "-" for _, key, show in COLUMNS]


def headings(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(column, heading) of the columns in which some row has a figure."""
    rows = list(rows)
    return [(i, head) for i, (head, key, _) in enumerate(COLUMNS) if any(r.get(key) is not None for r in rows)]


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    shown = headings(rows)
    lines = ["| " + " | ".join(head for _, head in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(cells(row)[i] for i, _ in shown) + " |" for row in rows]
    return "\n".join(lines)


def write_pages(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write both pages and the picture of the profiles from the manifest."""
    (folder / "report.md").write_text(report_page(manifest))
    (folder / "README.md").write_text(readme_page(manifest))
    if any(r.get("audit") for r in manifest["results"]):
        (folder / PROFILE).write_text(profile_svg(manifest["results"]))


def report_page(manifest: Mapping[str, Any]) -> str:
    facts, rows = manifest["separator"], manifest["results"]
    tested = rows[0]
    query = "one call of the stream (eager: one second of audio)" if facts.get("stream") else "one second of audio"
    lines = [
        f"# {facts['name']}: {'criteria met' if manifest['ok'] else 'CRITERIA NOT MET'}",
        "",
        f"{facts['parameters']:,} parameters, {facts['sample_rate_hz']} Hz, {facts['sources']} sources,"
        f" {'causal' if facts['causal'] else 'offline (not causal)'}. {facts['note']}".rstrip(),
        "",
        markdown_table(rows),
        "",
        f"Quality: {tested['mixtures']} test mixtures; drop = mean SI-SNR lost against the float original on the same"
        " mixtures (a negative drop is a gain); output SNR = lowest SNR of an output against the original's output;"
        f" shapes = the same over three odd lengths, batch 1 and 2. Latency: {query} a query, one query"
        " after the other; percentiles only where there were enough queries (p90 from 64 on).",
        "",
        "## Drop in SI-SNR, 95 % interval (paired bootstrap)",
        "",
    ]
    lines += [
        f"* {r['runtime']} {r['precision']}: {r['drop_db']:.3f} dB [{r['drop_low_db']:.3f}, {r['drop_high_db']:.3f}]"
        for r in rows[1:]
        if "drop_db" in r
    ]
    if missed := [f"* {r['runtime']} {r['precision']}: {m}" for r in rows for m in r["misses"]]:
        lines += ["", "## Not met", "", *missed]
    if noted := [f"* {r['runtime']} {r['precision']}: {r['note']}" for r in rows if r.get("note")]:
        lines += ["", "## Not run here", "", *noted]
    if any(r.get("audit") for r in rows):
        lines += ["", "## Where the time goes", "", f"![Share of the time by operator, for each build]({PROFILE})"]
    lines += [line for r in rows if r.get("audit") for line in _audit(r)]
    lines += [line for p in manifest["passes"] if "fit" in p["report"] for line in _sensitivity(p)]
    lines += ["", "## How it was made", ""]
    for p in manifest["passes"]:
        settings = ", ".join(f"{k} = {v}" for k, v in p.items() if k not in ("pass", "report"))
        figures = ", ".join(f"{k} = {_short(v)}" for k, v in p["report"].items() if k != "fit")
        lines.append(f"* {p['pass']}: {settings}. Result: {figures}.")
    if not manifest["passes"]:
        lines.append("* no passes: the float separator as trained")
    lines.append("* versions: " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()))
    env = tested["environment"]
    lines.append(f"* measured on: {env['cpu']}, {env['cores']} cores ({', '.join(env['isa'])}), {env['system']}")
    return "\n".join(lines) + "\n"


def _audit(row: Mapping[str, Any]) -> list[str]:
    """What a build really ran."""
    found = row["audit"]
    lines = ["", f"## What ran: {row['runtime']} {row['precision']}", ""]
    if "note" in found:
        lines.append(f"{found['note']}.")
    else:
        shares = ", ".join(f"{p} {share:.0%}" for p, share in found["time_share"].items())
        lines.append(f"{found['ms']:.2f} ms in kernels. Share of the time: {shares}.")
    if "times_fp32_speed" in found:
        ratios = found["times_fp32_speed"], found["times_smaller"]
        lines[-1] += " Paired with fp32: {:.2f} times the speed, {:.2f} times smaller.".format(*ratios)
    lines += [f"**Rejected:** {found['rejected']}."] if found.get("rejected") else []
    if "note" in found:
        return lines
    lines += ["", "| operator | precision | ms | share of the time |", "|---|---|---|---|"]
    lines += [f"| {o['operator']} | {o['precision']} | {o['ms']:.3f} | {o['share']:.1%} |" for o in found["operators"]]
    return lines


def _form(form: Mapping[str, bool]) -> str:
    """The form of a Q/DQ graph in words."""
    words = ["int8 activations" if form["symmetric"] else "uint8 activations"]
    words += ["quantized outputs"] if form["outputs"] else []
    words += ["INT8 LSTMs"] if form["recurrent"] else []
    return ", ".join(words)


def _sensitivity(p: Mapping[str, Any]) -> list[str]:
    """The layers by what INT8 does to them, most noise for their size first, as a chart."""
    fit = p["report"]["fit"]
    last = fit["steps"][-1]
    most = max((10 ** (-row["output_snr_db"] / 10) for row in fit["layers"]), default=1.0) or 1.0
    lines = [
        "",
        f"## Sensitivity to INT8: {p['graph']} ({_form(p['report']['form'])})",
        "",
        f"Each layer in INT8 alone, on calibration mixtures; those in float were returned for the budget. All others in"
        f" INT8 together lose {last['drop_db']:.3f} dB, the worst 5 % {last['worst5_drop_db']:.3f} dB"
        f" ({fit['mixtures']} calibration mixtures).",
        "",
        "| layer | share of MACs | drop dB | output SNR dB | noise | |",
        "|---|---|---|---|---|---|",
    ]
    for row in fit["layers"]:
        bar = "█" * max(1, round(30 * 10 ** (-row["output_snr_db"] / 10) / most))
        stays = "float" if row["float"] else ""
        lines.append(
            f"| `{row['layer'] or '(functions)'}` | {row['macs_share']:.1%} | {row['drop_db']:.3f} |"
            f" {row['output_snr_db']:.1f} | {bar} | {stays} |"
        )
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interface(facts: Mapping[str, Any]) -> str:
    """What a graph takes and gives."""
    taken, given = facts["inputs"][0], facts["outputs"][0]
    if not facts.get("stream"):
        return (
            f"Input `{taken['name']}`: float32 (batch, samples), at least {facts['min_samples']} samples.\n"
            f"Output `{given['name']}`: float32 (batch, {facts['sources']}, samples)."
        )
    spec = StreamSpec.from_json(facts["stream"])
    lines = [
        f"A stream: a call takes {spec.hops_per_call} hop(s) of {spec.hop_samples} samples and every state, and returns"
        " as many samples and the next states. States are float32, but for those that the metadata of"
        " an INT8 file say are uint8.",
        f"Algorithmic latency {spec.algorithmic_latency_samples} samples; outputs lag {spec.delay_samples} samples"
        " behind the inputs of their call.",
        f"Input `{taken['name']}`: float32 {tuple(taken['shape'])}. Output `{given['name']}`: float32"
        f" {tuple(given['shape'])}.",
        "",
        "| state | shape | at the start | its next value |",
        "|---|---|---|---|",
    ]
    for state in spec.states:
        start = f"{state.initial:g}" if isinstance(state.initial, float) else "a row, see `manifest.json`"
        follows = f"`next_{state.name}`"
        if state.ring_axis is not None:
            follows += f" goes to slot (frame modulo {state.shape[state.ring_axis]}) of axis {state.ring_axis}"
        lines.append(f"| `{state.name}` | {state.shape} | {start} | {follows} |")
    return "\n".join(lines)


def readme_page(manifest: Mapping[str, Any]) -> str:
    facts = manifest["separator"]
    artifacts = "\n".join(
        f"* `{a['folder']}/{a['files'][0]}`: {a['runtime']} {a['precision']}" + (f" ({a['note']})" if a["note"] else "")
        for a in manifest["artifacts"]
    )
    stream = (
        "\n    edgesep bench . --stream                      # in time, at the pace of audio?"
        if facts.get("stream")
        else ""
    )
    return f"""# {facts["name"]} for the edge

Separates mono audio at {facts["sample_rate_hz"]} Hz into {facts["sources"]} sources.
{_interface(facts)}

{artifacts}

On the device (numpy and one of these runtimes suffice):

    pip install edgesep onnxruntime
    edgesep verify .                              # the same dB here?
    edgesep bench .                               # how many ms here?
    edgesep separate . mixture.wav --out sources/{stream}

Figures and how they were measured: `report.md`. Hash of every file: `manifest.json`.
"""
