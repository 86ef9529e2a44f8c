"""Shards: the units of scoring work, written by any number of processes and kept across crashes."""

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenseek.errors import UserError
from tokenseek.index.files import durable_file, full_disk_told, write_examples
from tokenseek.index.schema import IndexHeader, ScoredExample, differences

# A claim that its holder has not renewed for so long is given up, or for ten times as long as this process has ever
# taken between two renewals of its own, should that be longer.
LEASE_SECONDS = 30.0
_LEASE_IN_RENEWALS = 10


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

    def __init__(self, directory: str | Path, header: IndexHeader, num_shards: int) -> None:
        if num_shards < 1:
            raise UserError(f"num_shards is {num_shards}; an index needs at least 1 shard. Is the data set empty?")
        self.directory, self.header, self.num_shards = Path(directory), header, num_shards
        self._held: tuple[int, Path, float] | None = None  # shard, claim and time of the last renewal
        self._longest_silence = 0.0  # between two renewals, of this process itself
        self._seen: dict[Path, tuple[int, float]] = {}  # a claim's time of change, and since when it is known
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
        """The file of a shard, whether it is there or not.

        Raises:
            UserError: the plan has no shard of this number.
        """
        if not 0 <= shard < self.num_shards:
            raise UserError(f"shard is {shard}; the plan in {self.directory} has shards 0 to {self.num_shards - 1}.")
        return self.directory / f"shard-{shard:05d}.arrow"

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is on the disk, whole; true of all, once they have been merged and the folder removed."""
        return self.path(shard).exists() or not self.directory.exists()

    def finished(self) -> set[int]:
        """Numbers of the shards that are on the disk, whole; all, once they have been merged and the folder removed."""
        try:
            names = [re.fullmatch(r"shard-(\d{5,})\.arrow", name) for name in os.listdir(self.directory)]
        except FileNotFoundError:
            return set(range(self.num_shards))
        return {int(match[1]) for match in names if match and int(match[1]) < self.num_shards}

    def claim(self, shard: int, run_id: str) -> bool:
        """Take a shard for the calling process. True for exactly one caller of a run, unless the shard is finished.

        Claims are kept per run: those of a run that was killed count no more.

        Args:
            run_id: the same in all processes of one run, new in every run; letters, digits, ".", "_" and "-".
        """
        if not re.fullmatch(r"\w[\w.-]*", run_id, re.ASCII):
            raise UserError(f"run_id is {run_id!r}; it names a folder: use letters, digits, '.', '_' and '-'.")
        if self.is_finished(shard):
            return False
        return self._create_claim(shard, run_id, 0)

    def take_over(self, shard: int, run_id: str, lease_seconds: float | None = None) -> str | None:
        """Claim a shard whose holder, a process of this run, has given no sign for so long that it must be dead.

        Time is taken on this process's own clock, from when it first asked. A holder that lives after all and writes
        the shard writes the same scores.

        Returns:
            The host and process that held it; None where it cannot be taken over (yet).
        """
        lease = lease_seconds or max(LEASE_SECONDS, _LEASE_IN_RENEWALS * self._longest_silence)
        times_taken = 0
        while self._claim_path(shard, run_id, times_taken + 1).exists():
            times_taken += 1
        path = self._claim_path(shard, run_id, times_taken)
        try:
            changed, holder = path.stat().st_mtime_ns, path.read_text()
        except FileNotFoundError:
            return None
        known, since = self._seen.get(path, (None, 0.0))
        if changed != known:
            self._seen[path] = (changed, time.monotonic())
            return None
        if time.monotonic() - since < lease or self.is_finished(shard):
            return None
        return holder if self._create_claim(shard, run_id, times_taken + 1) else None

    def renew(self, shard: int) -> None:
        """Show the others that this process is still at work on the shard that it has claimed last."""
        if self._held and self._held[0] == shard:
            _, path, renewed = self._held
            try:
                os.utime(path)
            except FileNotFoundError:  # merged and removed by others, who believed this process to be dead
                return
            now = time.monotonic()
            self._longest_silence = max(self._longest_silence, now - renewed)
            self._held = (shard, path, now)

    def _claim_path(self, shard: int, run_id: str, times_taken: int) -> Path:
        suffix = f".{times_taken}" if times_taken else ""
        return self.directory / "claims" / run_id / f"{shard:05d}{suffix}"

    def _create_claim(self, shard: int, run_id: str, times_taken: int) -> bool:
        path = self._claim_path(shard, run_id, times_taken)
        with full_disk_told(path):
            try:
                for folder in (path.parent.parent, path.parent):  # not the store's own, which is gone after a merge
                    folder.mkdir(exist_ok=True)
                with open(path, "x", encoding="utf-8") as file:
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
            except (FileExistsError, FileNotFoundError):
                return False
        self._held = (shard, path, time.monotonic())
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
        # Another file than that of the process it was taken over from, which may be writing after all.
        taken = self._held[1].suffix if self._held and self._held[0] == shard else ""
        write_examples(path, self.header, examples, path.with_name(f"{path.name}{taken}.incomplete"))


def _read_plan(path: Path) -> tuple[IndexHeader, int]:
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        return IndexHeader.from_json(json.dumps(plan["header"])), int(plan["num_shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a plan of this TokenSeek version ({error}). Delete the folder {path.parent} and score "
            "again, or choose another output folder."
        ) from error
