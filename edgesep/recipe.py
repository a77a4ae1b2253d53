"""The recipe: one TOML file that says what goes in, what is done to it and what it must reach.

Paths are relative to the recipe file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from edgesep.spec import Criteria, InputError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _beside_recipe(value: Path | None, info: ValidationInfo) -> Path | None:
    folder = (info.context or {}).get("folder", Path())
    return None if value is None else folder / value


class SeparatorSection(Section):
    """Which checkpoint. ``name`` only where neither file says it, ``variant`` for TFACM, ``front_end`` for IIANet where
    the lip front-end is a file of its own."""

    checkpoint: Path
    config: Path | None = None
    name: str | None = None
    variant: str | None = None
    front_end: Path | None = None

    _paths = field_validator("checkpoint", "config", "front_end")(_beside_recipe)


class DataSection(Section):
    """Mixture sets; ``golden`` is how many test mixtures travel in the bundle for re-verification."""

    calibration: Path
    test: Path
    train: Path | None = None
    golden: Annotated[int, Field(ge=1)] = 8

    _paths = field_validator("calibration", "test", "train")(_beside_recipe)


class StreamSection(Section):
    """Builds streaming graphs, which take some hops and the state and return as many hops and the next state.

    ``context_s`` is how much of the past attention sees (default: as in the checkpoint)."""

    hops_per_call: Annotated[int, Field(ge=1)] = 1
    context_s: Annotated[float, Field(gt=0)] | None = None


class TargetSection(Section):
    """One artifact. ``threads = 0`` leaves the number to the runtime; ``ops = "native"`` runs the selective scan, the
    units of U-Conv separators and the attention and LSTMs of streams on kernels that are compiled for this machine,
    "portable" all in the runtime's own operators. ``fixed_length``: compiled for the length of a query, and again, in
    seconds, when that changes."""

    runtime: str
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    threads: Annotated[int, Field(ge=0)] = 0
    ops: Literal["portable", "native"] = "portable"
    fixed_length: bool = False


class CriteriaSection(Section):
    """What every artifact must reach; ``Criteria`` explains the fields."""

    max_si_snr_drop_db: Annotated[float, Field(gt=0)] | None = 0.3
    worst5_drop_db: Annotated[float, Field(gt=0)] | None = None
    min_output_snr_db: float | None = 80.0
    max_rtf: Annotated[float, Field(gt=0)] | None = None


class Recipe(Section):
    """A validated recipe."""

    separator: SeparatorSection
    data: DataSection
    passes: tuple[dict[str, Any], ...] = ()
    targets: Annotated[tuple[TargetSection, ...], Field(min_length=1)]
    criteria: CriteriaSection = CriteriaSection()
    stream: StreamSection | None = None

    def limits(self) -> Criteria:
        return Criteria(**self.criteria.model_dump())


def read_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        InputError: missing file, broken TOML, an unknown key or a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"recipe {path} does not exist")
    try:
        data = tomllib.loads(path.read_text())
        return Recipe.model_validate(data, context={"folder": path.parent})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"recipe {path} is not valid TOML: {e}") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"recipe {path}: unknown key {where}; known here: {', '.join(_known(first['loc']))}"
            ) from e
        raise InputError(f"recipe {path}: {where}: {first['msg']}") from e


def _known(location: tuple[int | str, ...]) -> list[str]:
    """Field names beside the one at ``location``."""
    kind: Any = {
        "separator": SeparatorSection,
        "data": DataSection,
        "targets": TargetSection,
        "criteria": CriteriaSection,
        "stream": StreamSection,
    }.get(str(location[0]) if len(location) > 1 else "", Recipe)
    return sorted(kind.model_fields)
