"""A recipe, run end to end: checkpoint and mixture sets in, verified bundle out. Runs on the build host.

Every step is kept by what went into it (``store``), so a rerun redoes only what a change touches. The bundle is
written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesep import bundle, golden, graph, kernels, passes
from edgesep.build import OF_THE_RUNTIME, Models, build, claim, made_by, versions
from edgesep.calibration import MixtureSet
from edgesep.passes.base import Context, Tick, silent
from edgesep.recipe import Recipe, read_recipe
from edgesep.report import write_pages
from edgesep.results import Results
from edgesep.runtimes import runtime
from edgesep.separators import Separator, load_separator
from edgesep.separators.base import resize
from edgesep.spec import InputError
from edgesep.store import Store, file_digest, replace_folder


@dataclass(frozen=True)
class Deployed:
    """What came out.

    Attributes:
        path: the bundle.
        ok: whether every artifact met the criteria.
        rows: one per artifact and one for the float original: quality and latency.
        redone: the steps that were not found finished.
    """

    path: Path
    ok: bool
    rows: tuple[dict[str, Any], ...]
    redone: tuple[str, ...]


def deploy(
    recipe: str | Path | Recipe, out: str | Path, *, store: Store | None = None, tick: Tick = silent
) -> Deployed:
    """Run a recipe and write its bundle to ``out`` (replaced if it is a bundle already).

    Args:
        recipe: path of a TOML file, or a validated recipe.
        store: where finished steps are kept.
        tick: called with (done, total, text) as work goes on; total 0 where the length is unknown.

    Raises:
        InputError: the recipe or what it names cannot be used.
        UnsupportedError: a runtime is not installed.
    """
    line = Line(recipe if isinstance(recipe, Recipe) else read_recipe(recipe), store or Store(), tick)
    return line.run(Path(out))


class Line:
    """The steps of one recipe, in order; each method is one of them."""

    def __init__(self, recipe: Recipe, store: Store, tick: Tick = silent):
        self.recipe, self.store, self.tick = recipe, store, tick
        for target in recipe.targets:
            runtime(target.runtime)
            if target.runtime == "eager":
                raise InputError("eager is the reference and always measured; name another runtime as target")
            if target.fixed_length and not getattr(runtime(target.runtime), "FIXES_LENGTH", False):
                raise InputError(f"{target.runtime} gains nothing from a fixed_length; leave it out of this target")
        self.passes = [passes.make(**{"name": p.get("pass", ""), **_fields(p)}) for p in recipe.passes]
        made = {p.precision for p in self.passes if p.stage == "onnx"} | OF_THE_RUNTIME
        for target in recipe.targets:
            if target.precision not in made:
                maker = next(n for n in passes.names() if getattr(passes.make(n), "precision", "") == target.precision)
                raise InputError(
                    f"target {target.runtime} asks for {target.precision}, but no pass makes it; add a {maker} pass"
                )
        named = recipe.separator
        self.original = load_separator(
            named.checkpoint, named.config, name=named.name, variant=named.variant, front_end=named.front_end
        )
        if recipe.stream:
            streaming = self.original.streaming
            if streaming is None:
                why = self.original.note or "its norms or attention take in the whole utterance"
                if self.original.causal:
                    why = "no streaming graph for this configuration"
                raise InputError(f"{self.original.name} does not stream: {why}; leave out the [stream] section")
            self.original = streaming.bound(self.original, recipe.stream.context_s)
        self.stream = self._streaming(self.original).stream  # refused now, if it is
        visual = len(self.original.inputs) > 1
        if visual and self.original.front_end is None:
            raise InputError(
                f"{self.original.name} needs its lip front-end; name it in the recipe: separator.front_end"
            )
        rate, sources = self.original.sample_rate_hz, self.original.sources
        self.calibration = MixtureSet.open(recipe.data.calibration, rate, sources, visual)
        self.test = MixtureSet.open(recipe.data.test, rate, sources, visual)
        self.train = (
            MixtureSet.open(recipe.data.train, rate, sources, visual) if recipe.data.train else self.calibration
        )

    def _streaming(self, separator: Separator) -> Separator:
        """The separator as what the recipe builds: a streaming graph, or itself."""
        if self.recipe.stream is None or separator.streaming is None:
            return separator
        return separator.streaming.stream(separator, self.recipe.stream.hops_per_call)

    def plan(self) -> list[str]:
        """What would happen, a line each."""
        sep = self.original
        lines = [
            f"load {sep.name}: {sep.parameters:,} parameters, {sep.sample_rate_hz} Hz, {sep.sources} source(s)",
            *([f"front-end {f.name}: {f.parameters:,} parameters"] if (f := sep.front_end) else []),
            f"reference: float original on {len(self.test)} test mixtures ({self.test.path})",
        ]
        lines += [f"pass {_name(p)}: {_settings(p)}" for p in self.passes]
        for t in self.recipe.targets:
            operators = ", native operators" if t.ops == "native" else ""
            lines.append(f"build {t.runtime} {t.precision}{operators}, verify, measure")
        criteria = {k: v for k, v in asdict(self.recipe.limits()).items() if v is not None}
        if spec := self.stream:
            ms = 1e3 / spec.sample_rate_hz
            lines.append(
                f"stream: {spec.hops_per_call} hop(s) of {spec.hop_samples * ms:g} ms a call, algorithmic latency"
                f" {spec.algorithmic_latency_samples * ms:g} ms, attention over {spec.context_frames} frames"
            )
        lines.append("criteria: " + ", ".join(f"{k} = {v}" for k, v in criteria.items()))
        return lines

    def run(self, out: Path) -> Deployed:
        partial = claim(out)
        try:
            return self._run(out, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _run(self, out: Path, partial: Path) -> Deployed:
        references = self._references(self._loaded_key())
        separator, front, models, front_models, reports = self.compressed()
        facts = self._facts(separator)
        cases = golden.cases(self.original, self.test)
        golden.write(partial / "golden.npz", self.test, references, self.recipe.data.golden, cases)
        artifacts = []
        for target in self.recipe.targets:
            artifact = build(target, separator, models, partial / "artifacts", self.store, self.tick)
            if front:
                beside = partial / "artifacts" / "front-end"
                built = build(target, front, front_models, beside, self.store, self.tick, main=False)
                artifact = replace(artifact, front_end=built, note=artifact.note or built.note)
            artifacts.append(artifact)
        results = Results(self.original, self.test, references, cases, facts, self.recipe.limits(), self.tick)
        rows, artifacts = results.rows(artifacts)
        ok = not any(row["misses"] for row in rows)
        manifest = {
            "edgesep": metadata.version("edgesep"),
            "ok": ok,
            "separator": facts,
            "recipe": json.loads(self.recipe.model_dump_json()),
            "passes": reports,
            "criteria": asdict(self.recipe.limits()),
            "artifacts": [a.to_json(partial) for a in artifacts],
            "versions": versions(),
            "results": rows,
        }
        with (partial / "results.jsonl").open("w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        write_pages(partial, manifest)
        bundle.write_manifest(partial, manifest)
        replace_folder(partial, out)
        return Deployed(out, ok, tuple(rows), tuple(self.store.redone))

    def compressed(self) -> tuple[Separator, Separator | None, Models, Models, list[dict[str, Any]]]:
        """All passes: the separator and its front-end as they are exported, their files, and what passes report."""
        separator, key, reports = self._torch_passes(self._loaded_key())
        separator = self._streaming(separator)
        key = {"of": key, "stream": separator.stream and separator.stream.to_json()}
        front, front_key = self.original.front_end, {"of": key, "graph": "front end"}
        for p in (p for p in self.passes if p.stage == "lower"):
            separator, key = self._lowered(p, separator, key, reports)
            if front:
                front, front_key = self._lowered(p, front, front_key, reports)
        models = self._models(separator, key, reports)
        front_models = self._models(front, front_key, reports) if front else {}
        return separator, front, models, front_models, reports

    def trial(self) -> dict[str, float]:
        """What passes that fit lose on the calibration mixtures, without building or verifying anything.

        Returns:
            ``drop_db``, ``worst5_drop_db``; those of a front-end are added.

        Raises:
            BuildError: no layer can be quantized within the budget.
        """
        last = [r["report"]["fit"]["steps"][-1] for r in self.compressed()[-1] if r.get("fit")]
        return {name: round(sum(step[name] for step in last), 4) for name in ("drop_db", "worst5_drop_db")}

    def _loaded_key(self) -> dict[str, Any]:
        return {
            "checkpoint": file_digest(self.recipe.separator.checkpoint),
            "config": self.original.config,
            "name": self.original.name,
            "rate": self.original.sample_rate_hz,
            "front_end": file_digest(self.recipe.separator.front_end) if self.recipe.separator.front_end else None,
            "kernels": kernels.sources_digest(),
        }

    @cached_property
    def _calibration_digest(self) -> str:
        return self.calibration.digest()

    @cached_property
    def _train_digest(self) -> str:
        return self.train.digest()

    def _key(self, p: Any, of: dict[str, Any]) -> dict[str, Any]:
        """What the outcome of a pass depends on; fields stand apart, because they may have any name."""
        return {"of": of, "pass": _name(p), "fields": asdict(p), "calibration": self._calibration_digest}

    def _references(self, key: dict[str, Any]) -> list[np.ndarray]:
        """The float original's estimates on the test set."""

        def make(folder: Path) -> None:
            found: dict[str, Any] = {}
            for i, item in enumerate(self.test):
                self.tick(i, len(self.test), "float original")
                found[f"{i}"] = self.original(*item.inputs())[0].numpy()
            np.savez(folder / "estimates.npz", **found)

        folder = self.store.step("reference", {**key, "test": self.test.digest()}, make)
        with np.load(folder / "estimates.npz") as data:
            return [data[f"{i}"] for i in range(len(self.test))]

    def _torch_passes(self, key: dict[str, Any]) -> tuple[Separator, dict[str, Any], list[dict[str, Any]]]:
        separator, reports = self.original, []
        for p in self.passes:
            if p.stage != "torch":
                continue
            key = self._key(p, key) | {"train": self._train_digest}
            before = separator

            def make(folder: Path, p: Any = p, before: Separator = before) -> None:
                result = p(before, self._context(folder))
                torch.save(result.separator.module.state_dict(), folder / "state.pt")
                (folder / "report.json").write_text(json.dumps(result.report))

            folder = self.store.step(_name(p), key, make)
            separator = _with_state(before, torch.load(folder / "state.pt", weights_only=True))
            reports.append({"pass": _name(p), **asdict(p), "report": json.loads((folder / "report.json").read_text())})
        return separator, key, reports

    def _lowered(
        self, p: Any, separator: Separator, key: dict[str, Any], reports: list[dict[str, Any]]
    ) -> tuple[Separator, dict[str, Any]]:
        """One pass on what is exported. Modules may be others afterwards, so its outcome is made again each time."""
        key = self._key(p, key)
        self.tick(0, 0, f"{_name(p)}: {separator.name}")
        result = p(separator, self._context(Path()))
        reports.append({"pass": _name(p), "graph": separator.name, **asdict(p), "report": result.report})
        return result.separator, key

    def _models(self, separator: Separator, key: dict[str, Any], reports: list[dict[str, Any]]) -> Models:
        """The ONNX file of each precision and form that a target asks for, with its key."""

        def export(folder: Path) -> None:
            self.tick(0, 0, f"exporting {separator.name} to ONNX")
            graph.export_onnx(separator, separator.module, folder / "model.onnx")

        key = {"of": key, "export": graph.OPSET}
        source = self.store.step("export", key, export) / "model.onnx"
        models: Models = {("fp32", None): (source, key)}
        wanted = dict.fromkeys(made_by(t) for t in self.recipe.targets)
        for p, (precision, form) in itertools.product(self.passes, wanted):
            if p.stage != "onnx" or p.precision != precision:
                continue
            step = self._key(p, key) | {"form": form and asdict(form)}
            tried = self.store.lasting("trials", step)  # what was tried for one budget serves another
            step |= {"criteria": asdict(self.recipe.limits()) if getattr(p, "fit", False) else None}

            def make(folder: Path, p: Any = p, form: Any = form, tried: Path = tried) -> None:
                self.tick(0, 0, f"{_name(p)}: {separator.name}")
                result = p(separator, source, folder / "model.onnx", self._context(tried), form)
                (folder / "report.json").write_text(json.dumps(result.report))

            folder = self.store.step(_name(p), step, make)
            models[precision, form] = (folder / "model.onnx", step)
            report = json.loads((folder / "report.json").read_text())
            reports.append({"pass": _name(p), "graph": separator.name, **asdict(p), "report": report})
        return models

    def _context(self, folder: Path) -> Context:
        limits = self.recipe.limits()
        if self.original.front_end:  # two graphs share the budget
            limits = limits.half()
        return Context(self.original, self.calibration, self.train, folder, self.tick, limits)

    def _facts(self, separator: Separator) -> dict[str, Any]:
        return separator.describe() | {
            "sources": separator.sources,
            "min_samples": separator.min_samples,
            "causal": separator.causal,
            "note": separator.note,
            "front_end": self.original.front_end.describe() if self.original.front_end else None,
        }


def _fields(section: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != "pass"}


def _name(p: Any) -> str:
    return type(p).__name__.lower()


def _settings(p: Any) -> str:
    return ", ".join(f"{k} = {v}" for k, v in asdict(p).items())


def _with_state(separator: Separator, state: dict[str, torch.Tensor]) -> Separator:
    module = copy.deepcopy(separator.module)
    resize(module, state)
    return replace(separator, module=module.eval(), parameters=sum(p.numel() for p in module.parameters()))
