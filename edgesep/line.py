"""A recipe, run end to end: checkpoint and mixture sets in, verified bundle out. Runs on the build host.

Every step is kept by what went into it (``store``), so a rerun redoes only what a change touches. The bundle is
written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgesep import bundle, golden, graph, kernels, passes
from edgesep.artifact import Artifact
from edgesep.calibration import MixtureSet
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, Tick, silent
from edgesep.recipe import Recipe, TargetSection, read_recipe
from edgesep.report import write_pages
from edgesep.results import Results
from edgesep.runtimes import int8_form, runtime
from edgesep.runtimes.base import Int8Form
from edgesep.separators import Separator, load_separator
from edgesep.separators.base import resize
from edgesep.spec import InputError, UnsupportedError
from edgesep.store import Store, file_digest, replace_folder

OF_THE_RUNTIME = {"fp32", "bf16"}  # precisions of the runtime, not of the graph
#: (precision, form) → the ONNX file and the key of the step that made it
Models = dict[tuple[str, Int8Form | None], tuple[Path, dict[str, Any]]]


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
            artifact = self._build(target, separator, models, partial / "artifacts")
            if front:
                built = self._build(target, front, front_models, partial / "artifacts" / "front-end")
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
            "versions": _versions(),
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
        wanted = dict.fromkeys(_made_by(t) for t in self.recipe.targets)
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
            limits = replace(
                limits, **{k: v / 2 for k in ("max_si_snr_drop_db", "worst5_drop_db") if (v := getattr(limits, k))}
            )
        return Context(self.original, self.calibration, self.train, folder, self.tick, limits)

    def _facts(self, separator: Separator) -> dict[str, Any]:
        return separator.describe() | {
            "sources": separator.sources,
            "min_samples": separator.min_samples,
            "causal": separator.causal,
            "note": separator.note,
            "front_end": self.original.front_end.describe() if self.original.front_end else None,
        }

    def _build(self, target: TargetSection, separator: Separator, models: Models, out: Path) -> Artifact:
        module, (model, key) = runtime(target.runtime), models[_made_by(target)]
        native, has_both = target.ops == "native", onnx_forms.has_native_form(onnx.load(model), module)
        if native and not has_both and separator.name == self.original.name:
            raise InputError(
                f'{separator.name} has no native operators for {target.runtime}; leave ops = "portable" for this target'
            )
        native = native and has_both
        library = None
        if native:
            kernels.refuse_without(module)
            self.tick(0, 0, f"compiling the native kernels for {target.runtime}")
            library = kernels.library(target.runtime)

        def make(folder: Path) -> None:
            self.tick(0, 0, f"building {separator.name} for {target.runtime} {target.precision}")
            form = folder / "model.onnx"
            onnx_forms.write_form(model, form, module, native=native)
            files = module.build(form, folder, target.precision, separator.profile(), library)
            (folder / "files.json").write_text(json.dumps(files))

        built_key = {"of": key, "runtime": target.runtime, "precision": target.precision, "version": module.version()}
        built_key |= {"ops": target.ops, "library": library and file_digest(library)}
        built = self.store.step("build", built_key, make)
        files = json.loads((built / "files.json").read_text())
        extras = [*(["native"] if library else []), *(["fixed"] if target.fixed_length else [])]
        folder = out / "-".join([target.runtime, target.precision, *extras])
        folder.mkdir(parents=True)
        for name in files:
            shutil.copyfile(built / name, folder / name)
        if library:
            files.append(kernels.file_name(target.runtime))
            shutil.copyfile(library, folder / files[-1])
        artifact = Artifact(
            target.runtime,
            target.precision,
            target.threads or None,
            folder,
            tuple(files),
            ops=target.ops if has_both else None,
            settings=({"fixed_length": True} if target.fixed_length else {})
            | (getattr(module, "STREAM_SETTINGS", {}) if separator.stream else {}),
        )
        try:
            with artifact.runner():
                pass
        except UnsupportedError as e:
            return replace(artifact, note=str(e))
        return artifact


def _fields(section: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != "pass"}


def _name(p: Any) -> str:
    return type(p).__name__.lower()


def _settings(p: Any) -> str:
    return ", ".join(f"{k} = {v}" for k, v in asdict(p).items())


def _made_by(target: TargetSection) -> tuple[str, Int8Form | None]:
    """Which graph is behind a target."""
    if target.precision in OF_THE_RUNTIME:
        return "fp32", None
    form = int8_form(target.runtime, target.ops == "native") if target.precision == "int8" else None
    return target.precision, form


def _with_state(separator: Separator, state: dict[str, torch.Tensor]) -> Separator:
    module = copy.deepcopy(separator.module)
    resize(module, state)
    return replace(separator, module=module.eval(), parameters=sum(p.numel() for p in module.parameters()))


def claim(out: Path) -> Path:
    """A fresh folder beside ``out``, after checking that ``out`` may be written and holds nothing foreign."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the bundle")
    if out.is_dir() and any(out.iterdir()) and not (out / bundle.MANIFEST).is_file():
        raise InputError(f"{out} is not empty and holds no bundle; give another folder")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as e:
        raise InputError(f"{out} cannot be written ({e.strerror}); give a folder you may write to") from e
    return partial


def _versions() -> dict[str, str]:
    wanted: list[str] = [
        "numpy",
        "torch",
        "onnx",
        "onnxruntime",
        "openvino",
        "tensorrt-rtx",
        "neural-compressor",
        "torch-pruning",
    ]
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in wanted:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
