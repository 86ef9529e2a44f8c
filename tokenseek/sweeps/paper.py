"""The paper's tables: which runs they compare, and the figures that they report. Nothing heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tokenseek.config import RunConfig, load_config, override_config
from tokenseek.config.resources import find_resource, folder_of
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

# Rows of Open-Platypus that the paper trains on: shares of other data are kept when fewer are used.
PAPER_EXAMPLES = 21_221


# The table whose rows translate.
TRANSLATION = "S7"
# What `--here` leaves out, and what it needs.
NOT_HERE = {"S3": "hours of training: `tokenseek reproduce S3`, on a machine that does nothing else"}


class TableRow(BaseModel):
    """A run of a table.

    Attributes:
        method: a file of ``launch/presets/methods``; its `peft` section replaces that of the preset.
        settings: what else it changes, by dotted path.
        extra_data: a source that is added to the data.
        paper: the paper's figures, in the order of the table's columns, by model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    label: str
    method: str
    settings: dict[str, Any] = {}
    extra_data: dict[str, Any] | None = None
    paper: dict[str, list[float]] = {}


class PaperTable(BaseModel):
    """A file of ``launch/tables``.

    Attributes:
        paper: presets of the models whose figures it has.
        columns: what the paper reports.
        shows: what is measured beside it: scores (or a held-out loss), their variance over seeds, training time, or the
            cost of scoring; or what a figure draws of them: scores by ratio, curves of the training loss, or memory.
        tasks: benchmarks that its columns need.
        needs: files that the presets name, and how to get them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    paper: list[str]
    columns: list[str]
    shows: Literal["scores", "variance", "time", "scoring", "ratio", "curves", "memory"] = "scores"
    tasks: str | None = None
    needs: str | None = None
    rows: list[TableRow]

    @property
    def is_drawn(self) -> bool:
        """Whether it is a figure."""
        return self.shows in ("ratio", "curves", "memory")

    @model_validator(mode="after")
    def _check(self) -> PaperTable:
        for row in self.rows:
            for model, figures in row.paper.items():
                if model not in self.paper or len(figures) != len(self.columns):
                    raise ValueError(f"row {row.name}: {model} has {len(figures)} figures, not {len(self.columns)}")
        return self

    def choose(self, names: str | None) -> list[TableRow]:
        """Rows by name, with commas between; all by default."""
        known = {row.name: row for row in self.rows}
        for name in (chosen := names.split(",") if names else list(known)):
            if name not in known:
                accepted = ", ".join(known)
                raise UserError(f"--rows: there is no row {name!r}{did_you_mean(name, known)}; accepted are {accepted}")
        return [known[name] for name in known if name in chosen]

    def require_measurable(self, rows: Sequence[TableRow], config: RunConfig, seeds: int, tasks: str | None) -> None:
        """Raise UserError unless runs of `rows` can be compared as the table does."""
        if self.is_drawn and importlib.util.find_spec("matplotlib") is None:
            raise UserError("figures need matplotlib: pip install 'tokenseek[report]'.")
        if self.tasks and not tasks:
            raise UserError(f"the table shows {', '.join(self.columns)}: give --tasks {self.tasks} and --data FOLDER")
        missing = [source.path for source in config.data.sources if source.path and not Path(source.path).exists()]
        if self.needs and missing:
            raise UserError(f"data.sources: there is no {', '.join(missing)}. The table needs {self.needs}")
        if self.shows == "variance" and seeds < 2:
            raise UserError("the table shows a variance over seeds: give --seeds 2 or more")
        if any(row.extra_data for row in rows) and config.eval_data is None and not tasks:
            raise UserError(
                "the rows have other data and no held-out data in common: give an eval_data section or --tasks"
            )


def load_table(name: str) -> PaperTable:
    """A table by its number in the paper, such as 1 or S11, or by the path of a file."""
    path = find_resource("table", name)
    try:
        return PaperTable.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except ValidationError as error:
        raise UserError(f"{path}: {error}") from error


def require_here(name: str) -> None:
    """Raise UserError unless there is such a table and `--here` runs it."""
    if name in NOT_HERE:
        raise UserError(f"--tables {name}: --here does not run it, as it needs {NOT_HERE[name]}")
    load_table(name)


def table_config(
    table: PaperTable,
    preset: str | None,
    overrides: Sequence[str] = (),
    *,
    paper: str | None = None,
    limit: int | None = None,
) -> RunConfig:
    """What all runs of a table share: the preset, or that of the paper's model.

    Args:
        limit: train on a random choice of so many rows of the data.
    """
    if paper is not None and paper not in table.paper:
        raise UserError(f"--paper {paper}: the table has figures of {', '.join(table.paper)}")
    config = load_config(preset or paper or table.paper[0], overrides)
    if limit is None:
        return config
    if len(config.data.sources) > 1:
        raise UserError("--limit: the data has several sources; set data.sources.0.rows, ... instead")
    return override_config(config, {"data.sources.0.rows": limit, "data.sources.0.weight": None}, "--limit")


def row_settings(row: TableRow, config: RunConfig, extra_data: Path | None = None) -> dict[str, Any]:
    """What a row changes, by dotted path.

    Args:
        extra_data: a file of texts in place of the row's own source of extra data.
    """
    path = folder_of("preset") / "methods" / f"{row.method}.yaml"
    settings: dict[str, Any] = {"training.ditching": True}
    for section, values in parse_yaml(path.read_text(encoding="utf-8"), str(path)).items():
        if section == "peft":
            settings[section] = values
        else:
            settings |= {f"{section}.{key}": value for key, value in values.items()}
    if row.extra_data:
        source: Mapping[str, Any] = dict(row.extra_data)
        if extra_data:
            source = {**source, "name": None, "path": str(extra_data)}
        if (limit := config.data.sources[0].rows) is not None:
            source = {**source, "rows": max(1, round(limit * source["rows"] / PAPER_EXAMPLES))}
        settings[f"data.sources.{len(config.data.sources)}"] = source
    return settings | row.settings
