"""Many runs of one configuration that differ in a few settings: the engine under `tune` and `reproduce`.

A sweep is a folder. Each trial leaves one line in its ``rows.jsonl``; trials that have one are not run again, so that a
sweep that was killed continues where it was, and trials may be added to it. Any number of processes, of one launch or
of several, take trials from it without talking to each other: a trial is its lock file's holder's, and the operating
system takes a lock back from a process that dies, however it dies. (Shards of an index are claimed by leases instead,
which do without locks of the file system.)
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenseek.config import RunConfig, override_config
from tokenseek.errors import UserError
from tokenseek.runs.score import ScoringCost, score
from tokenseek.runs.summary import TrainingSummary
from tokenseek.runs.train import train

_log = logging.getLogger(__name__)

Row = dict[str, Any]
Measure = Callable[[RunConfig, TrainingSummary], Mapping[str, Any]]

_POLL_SECONDS = 2.0
# Settings that say where things are, not what is learned.
_PLACES: dict[str, bool | set[str]] = {"output_dir": True, "scoring": {"index"}}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder; unlike those of the other trials.
        settings: what it changes in the sweep's configuration, by dotted path.
        labels: further columns of its row.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)


class Sweep:
    """The trials of a folder.

    Args:
        folder: made if it does not exist.
        base: what all trials share. Its index is used for every trial that changes neither model, data nor scoring, and
            is made where it does not exist; the others share one for each set of those.
        trials: in the order in which they are run.
        measure: further columns of a trial's row, from the model in ``summary.final``, which is removed afterwards.

    Example:
        >>> sweep = Sweep("runs/tune", config, [Trial("a", {"selection.alpha": 1}), Trial("b", {"selection.alpha": 5})])
        >>> sweep.run()
        >>> sweep.rows()
    """

    def __init__(
        self, folder: str | Path, base: RunConfig, trials: Sequence[Trial], measure: Measure | None = None
    ) -> None:
        self.folder, self.base, self.trials, self.measure = Path(folder), base, list(trials), measure
        if len({trial.name for trial in trials}) < len(trials):
            raise UserError(f"Trials need names of their own, got {sorted(trial.name for trial in trials)}.")
        self._configs = {trial.name: self._config(trial) for trial in trials}  # reports mistakes before work starts

    def config(self, trial: Trial) -> RunConfig:
        """The whole configuration of a trial."""
        return self._configs[trial.name]

    def rows(self) -> list[Row]:
        """The rows of the finished trials, in the order of the trials; two that are the same share a run."""
        rows = {row["key"]: row for row in read_rows(self.rows_file)}
        keys = [(trial, self.key(trial)) for trial in self.trials]
        return [{**rows[key], "trial": trial.name, **trial.labels} for trial, key in keys if key in rows]

    def key(self, trial: Trial) -> str:
        """Of every setting that is not at its default, so that a changed configuration is another trial."""
        settings = self.config(trial).model_dump(mode="json", exclude_defaults=True, exclude=_PLACES)
        return _digest(settings)

    @property
    def rows_file(self) -> Path:
        """Where a line of JSON is appended for every run that has ended."""
        return self.folder / "rows.jsonl"

    def run(self, tell: Callable[[str], None] = _log.info) -> list[Row]:
        """Run trials until all are finished, by this process or by others; every process calls this.

        A trial that another process has is waited for, and run here should that process die.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while left := self._unfinished():
            ran = 0
            for trial in left:
                with lock(self.folder / "locks" / self.key(trial)) as mine:
                    if mine and trial in self._unfinished():
                        self._run(trial, tell)
                        ran += 1
            if not ran:
                time.sleep(_POLL_SECONDS)
        return self.rows()

    def _unfinished(self) -> list[Trial]:
        keys = {row["key"] for row in read_rows(self.rows_file)}
        return [trial for trial in self.trials if self.key(trial) not in keys]

    def _run(self, trial: Trial, tell: Callable[[str], None]) -> None:
        config, began = self.config(trial), time.perf_counter()
        output = Path(config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        row: Row = {"trial": trial.name, **trial.labels, "settings": dict(trial.settings)}
        with open(output / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            if config.needs_index:
                with lock(self.folder / "locks" / config.index_path.name, wait=True):
                    row |= _scored(config)
            before = [r for r in read_rows(self.rows_file) if r.get("before") == _before(config)]
            try:
                summary = train(config, before[0]["loss_before"] if before else None)
                row |= {**asdict(summary), **(self.measure(config, summary) if self.measure else {})}
                del row["final"]  # the folder is removed
            except UserError as error:
                raise UserError(f"trial {trial.name}: {error}") from error
            except torch.OutOfMemoryError as error:  # a result: this method does not fit here
                row["error"] = str(error).split(". ")[0]
        gc.collect()
        row |= {"before": _before(config), "key": self.key(trial)}
        append_row(self.rows_file, row)
        shutil.rmtree(output / "final", ignore_errors=True)
        result = row.get("error") or f"held-out loss {_number(row['loss_after'])}"
        tell(f"{trial.name}: {result} ({time.perf_counter() - began:.0f} s; {len(self._unfinished())} left)")

    def _config(self, trial: Trial) -> RunConfig:
        settings = {**trial.settings, "output_dir": str(self.folder / "trials" / trial.name)}
        config = override_config(self.base, settings, f"trial {trial.name}")
        if not config.needs_index:
            return config
        own = _scored_settings(config)
        index = self.base.index_path
        if own != _scored_settings(self.base):
            index = self.folder / f"index-{_digest(own)}.arrow"
        return override_config(config, {"scoring.index": str(index)})


def _scored_settings(config: RunConfig) -> dict[str, Any]:
    """Everything that an index depends on."""
    sections = {"model", "data", "scoring"}
    without = {"data": {"hold_out"}, "scoring": {"index"}}
    return config.model_dump(mode="json", exclude_defaults=True, include=sections, exclude=without)


def _scored(config: RunConfig) -> dict[str, float]:
    """Make the index of a trial unless it exists; what that took, which is kept beside it."""
    index = config.index_path
    cost = index.with_name(index.name + ".cost.json")
    if not index.exists():
        taken = ScoringCost()
        score(config, cost=taken)
        named = {f"scoring_{name}": value for name, value in asdict(taken).items()}
        cost.write_text(json.dumps(named), encoding="utf-8")
    return json.loads(cost.read_text(encoding="utf-8")) if cost.exists() else {}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; half a line at its end, which a killed process left, is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def append_row(path: Path, row: Row) -> None:
    """Add a row, whole or not at all, even if other processes add one at the same time."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock, which is given back at the end of the block or of the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _before(config: RunConfig) -> str:
    """Of everything that the held-out loss before training depends on."""
    settings = {"model", "data", "eval_data", "peft"}
    return _digest(config.model_dump(mode="json", exclude_defaults=True, include=settings))


def _digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
