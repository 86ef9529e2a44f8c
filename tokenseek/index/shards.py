"""Shards: the units of scoring work, written by any number of processes and kept across crashes."""

import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenseek.errors import UserError
from tokenseek.index.files import durable_file, write_examples
from tokenseek.index.schema import IndexHeader, ScoredExample, differences


class ShardStore:
    """A folder of numbered shards that belong to one plan.

    Shards are global: what shard 12 holds is fixed by the plan and not by the number of processes, so a run may be
    continued by more or fewer of them.

    Args:
        directory: made if it does not exist.
        header: what is scored and how. With `num_examples` and `num_tokens` a merge can tell that the last rows are
            missing.
        num_shards: number of shards of the plan, at least 1.

    Raises:
        UserError: the folder holds shards of another plan; every differing field is named.

    Example:
        >>> store = ShardStore("run/shards", header, num_shards=40)
        >>> for shard in range(40):
        ...     if store.claim(shard, run_id):
        ...         store.write(shard, score(shard))
        >>> merge_shards("run/shards", "run/index.arrow")
    """

    def __init__(self, directory: str | Path, header: IndexHeader, num_shards: int):
        if num_shards < 1:
            raise UserError(f"num_shards is {num_shards}; an index needs at least 1 shard. Is the data set empty?")
        self.directory, self.header, self.num_shards = Path(directory), header, num_shards
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "plan.json"
        if not path.exists():
            # All processes may come here at once, each with its own incomplete file; the last rename wins. Should
            # their plans differ after all, the headers of their shards differ and the merge refuses them.
            with durable_file(path, path.with_name(f"plan-{uuid.uuid4().hex}.json.incomplete")) as file:
                file.write(json.dumps({"header": json.loads(header.to_json()), "num_shards": num_shards}).encode())
        stored, stored_shards = _read_plan(path)
        differing = differences(
            {**stored.flat(), "num_shards": stored_shards},
            {**header.flat(), "num_shards": num_shards},
            "the folder",
            "this run",
        )
        if differing:
            raise UserError(
                f"{directory} holds the shards of another scoring run:\n  " + "\n  ".join(differing) + "\n"
                "Delete the folder to score again, choose another output folder, or go back to the settings above."
            )

    @classmethod
    def open(cls, directory: str | Path) -> "ShardStore":
        """The store that is in a folder, by its own plan."""
        path = Path(directory) / "plan.json"
        if not path.exists():
            raise UserError(
                f"{directory} holds no shards (there is no plan.json). Run scoring with it as output first."
            )
        return cls(directory, *_read_plan(path))

    def path(self, shard: int) -> Path:
        if not 0 <= shard < self.num_shards:
            raise UserError(f"shard is {shard}; the plan in {self.directory} has shards 0 to {self.num_shards - 1}.")
        return self.directory / f"shard-{shard:05d}.arrow"

    def is_finished(self, shard: int) -> bool:
        return self.path(shard).exists()

    def finished(self) -> set[int]:
        """Numbers of the shards that are on the disk, whole."""
        names = (re.fullmatch(r"shard-(\d{5,})\.arrow", path.name) for path in self.directory.iterdir())
        return {int(match[1]) for match in names if match and int(match[1]) < self.num_shards}

    def claim(self, shard: int, run_id: str) -> bool:
        """Take a shard for the calling process. True for exactly one caller of a run, unless the shard is finished.

        Claims are kept per run: those of a run that was killed bind nobody.

        Args:
            run_id: the same in all processes of one run, new in every run; letters, digits, ".", "_" and "-".
        """
        if not re.fullmatch(r"\w[\w.-]*", run_id, re.ASCII):
            raise UserError(f"run_id is {run_id!r}; it names a folder: use letters, digits, '.', '_' and '-'.")
        if self.is_finished(shard):
            return False
        folder = self.directory / "claims" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(folder / f"{shard:05d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def write(self, shard: int, examples: Iterable[ScoredExample]) -> None:
        """Write all examples of a shard; order does not matter. The shard is finished when this returns."""
        path = self.path(shard)
        examples = list(examples)
        if not examples:
            raise UserError(f"Shard {shard} has no examples; plan only shards that hold at least one.")
        for example in examples:
            if fault := example.fault():
                raise UserError(
                    f"Shard {shard}: example {example.example_id!r} (row {example.row}) cannot be stored: {fault}. "
                    "Scores that are not finite come from the model's own output: check its weights, or score in "
                    "float32 or bfloat16."
                )
        write_examples(path, self.header, examples)


def _read_plan(path: Path) -> tuple[IndexHeader, int]:
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        return IndexHeader.from_json(json.dumps(plan["header"])), int(plan["num_shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a plan of this TokenSeek version ({error}). Delete the folder {path.parent} and score "
            "again, or choose another output folder."
        ) from error
