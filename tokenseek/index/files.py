"""Index files on disk: written whole or not at all, read through a memory map and checked row by row.

A shard and a merged index have the same format, an uncompressed Arrow IPC file, which `pandas.read_feather` reads.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from tokenseek.errors import UserError
from tokenseek.index.schema import SCHEMA, IndexHeader, ScoredExample, record_batches, row_crc


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turns the errors of a disk that has no room for `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"There is no room to write {path}: {os.strerror(error.errno)}. Free some space and run the same command "
            "again: what was finished is kept."
        ) from error


@contextmanager
def durable_file(path: Path, incomplete: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that gets its name `path` only once all of it is on the disk.

    A crash leaves at most `incomplete` (default: `path` + ".incomplete"), which the next attempt overwrites; an error,
    such as a full disk, leaves nothing.
    """
    incomplete = incomplete or path.with_name(path.name + ".incomplete")
    try:
        with full_disk_told(path):
            with open(incomplete, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(incomplete, path)
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise
    # The rename is an entry of the directory, and survives a power cut only when that is on the disk too.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_examples(
    path: Path, header: IndexHeader, examples: Iterable[ScoredExample], incomplete: Path | None = None
) -> None:
    """Write examples, in the order given, holding one record batch in memory at a time."""
    schema = SCHEMA.with_metadata(header.to_metadata())
    with durable_file(path, incomplete) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in record_batches(examples):
            writer.write_batch(batch)


class ExampleFile:
    """The rows of a shard or an index, memory-mapped: scores are read from the disk when they are asked for.

    Args:
        path: an Arrow file written by `write_examples`.
        fix: how the user can replace the file, for the error messages.
    """

    def __init__(self, path: Path, fix: str) -> None:
        self.path, self.fix = path, fix
        try:
            # Closing the file frees its descriptor; the map lives as long as the columns. A merge can so hold
            # thousands of shards.
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            table.validate()
        except FileNotFoundError:
            raise UserError(f"There is no file {path}. {fix}") from None
        except (pa.ArrowException, OSError) as error:
            # What the system refuses has a number: no permission, no memory. The rest is Arrow on the file's contents.
            if getattr(error, "errno", None):
                raise
            raise self._damaged(f"it cannot be read: {error}.") from error
        try:
            self.header = IndexHeader.from_metadata(table.schema.metadata)
        except UserError as error:
            raise UserError(f"{path}: {error} {fix}") from error
        if not table.schema.equals(SCHEMA):
            raise self._damaged(f"its columns are not {', '.join(SCHEMA.names)}, or not of their types.")
        self._table = table
        if any(column.null_count for column in table.columns):
            raise self._damaged("it has empty cells.")
        self.example_ids, self._contexts, self._gradients = (
            table[name] for name in ("example_id", "context", "gradient")
        )
        self.rows, self.num_tokens, self.tokens_crcs, self._row_crcs = (
            table[name].to_numpy() for name in ("row", "num_tokens", "tokens_crc", "scores_crc")
        )

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, position: int) -> ScoredExample:
        """The example at a position of the file, its scores views of the memory map."""
        return ScoredExample(
            example_id=self.example_ids[position].as_py(),
            row=int(self.rows[position]),
            tokens_crc=int(self.tokens_crcs[position]),
            context=self._contexts[position].values.to_numpy(),
            gradient=self._gradients[position].values.to_numpy(),
        )

    def verify(self) -> None:
        """Read every row once; raises `UserError` naming the first example that is damaged or has unusable scores."""
        try:
            self._table.validate(full=True)  # before any offset is followed
        except pa.ArrowException as error:
            raise self._damaged(f"its columns contradict each other: {error}") from error
        for position in range(len(self)):
            example = self.example(position)
            name = f"example {example.example_id!r} (row {example.row})"
            if example.num_tokens != self.num_tokens[position] or row_crc(example) != self._row_crcs[position]:
                raise self._damaged(f"{name} does not have the checksum it was written with.")
            if fault := example.fault():
                raise UserError(f"{self.path}: {name} cannot be used: {fault}. {self.fix}")

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is truncated or damaged: {reason} {self.fix}")
