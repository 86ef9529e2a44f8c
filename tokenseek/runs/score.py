"""`tokenseek score`: from a configuration to the token-position index of its data."""

from __future__ import annotations

import gc
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from tokenseek.config import RunConfig
from tokenseek.errors import UserError
from tokenseek.index import IndexHeader, ShardStore, TokenIndex, merge_shards
from tokenseek.index.schema import differences
from tokenseek.launching.processes import join_processes, log_once, whole_models
from tokenseek.models.loading import load_model
from tokenseek.parallel import sequence_group
from tokenseek.runs.allocation import Allocation
from tokenseek.runs.inputs import RunInputs, read_inputs
from tokenseek.seeking import (
    ScoringPlan,
    SeekingProgress,
    Team,
    TokenScorer,
    assigned_shards,
    plan_batches,
    seek,
    seek_abandoned,
    wait_for_shards,
)

# The main process reads all shards before it begins to write.
_MERGE_SECONDS = 1800.0
_MERGE_SLOW_SECONDS = 30.0
_log = logging.getLogger(__name__)


@dataclass
class ScoringCost:
    """What scoring takes once the model is loaded; this process's, while its memory is traced.

    Attributes:
        seconds: until all shards are finished.
        average_memory_bytes, peak_memory_bytes: allocated, the model's weights among them.
    """

    seconds: float = 0.0
    average_memory_bytes: int = 0
    peak_memory_bytes: int = 0


def score(
    config: RunConfig,
    inputs: RunInputs | None = None,
    part: tuple[int, int] | None = None,
    cost: ScoringCost | None = None,
) -> Path:
    """Score the data of a run and merge the scores into its index; every process of a launch calls this.

    Shards that an earlier launch finished are kept. Nothing is done when the index exists already and fits.

    Args:
        inputs: tokenizer and data of the run, where they are checked and made already.
        part: (i, n) scores the i-th of n parts without merging, for jobs that know nothing of each other; run
            :func:`merge` when all are done.
        cost: filled with what it took; tracing memory on a CPU takes some time itself.

    Returns:
        The path of the index.

    Raises:
        UserError: before the model is loaded, where an index or shards of other data or settings are in the way.
    """
    if config.scoring.reduction == "error":
        raise UserError(
            "scoring.reduction: error is of steps that score their own tokens; an index takes abs, signed or l2."
        )
    if config.data.is_streamed:
        raise UserError(
            "data.sources: streaming: true has no end, and an index is of all data; set streaming to false, or train "
            "with scoring.mode: online, which scores in its steps."
        )
    if inputs is None:
        inputs = _read_inputs(config)
    state, path = inputs.state, config.index_path
    if path.exists():
        _require_same_scoring(path, inputs.fingerprints, _options(config))
        log_once(_log, state, f"{path} holds the scores of this data already.")
        return path
    plan, store = _plan(config, inputs)
    shards = assigned_shards(plan, *part) if part else range(len(plan.shards))
    # One short collective before the work, none behind it: processes that are slow or dead delay no other.
    run_id = broadcast_object_list([uuid.uuid4().hex])[0]
    began, loading, kept = time.perf_counter(), 0.0, store.finished() & set(shards)
    if kept:
        log_once(_log, state, f"{len(kept)} of {len(shards)} shards were finished before and are kept.")
    with SeekingProgress(store, plan, shards, disable=not state.is_main_process) as progress:
        if len(kept) < len(shards):
            loading = _seek(config, inputs, store, plan, run_id, shards, progress, Team(inputs.group), cost)
        if not state.is_main_process:
            return _wait_for_merge(path) if part is None else path
        wait_for_shards(store, shards, progress=progress)
    tokens = sum(plan.shard_tokens(shard) for shard in set(shards) - kept)
    seconds = time.perf_counter() - began - loading
    if cost:
        cost.seconds = seconds
    log_once(
        _log,
        state,
        f"Scored {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s), after {loading:.1f} s of "
        "loading the model.",
    )
    if part is None:
        merge(path)
        log_once(_log, state, f"Index: {path} ({path.stat().st_size:,} bytes).")
    return path


def merge(path: Path) -> IndexHeader:
    """Merge the shards of an index into `path` and remove them."""
    folder = shard_folder(path)
    header = merge_shards(folder, path)
    # Gone at once for processes that come late: they must not see some shards and take the others for unfinished.
    removed = folder.with_name(folder.name + ".merged")
    if removed.exists():
        shutil.rmtree(removed)
    folder.rename(removed)
    shutil.rmtree(removed)
    return header


def shard_folder(path: Path) -> Path:
    """Where the shards of an index are kept until they are merged: beside it."""
    return path.with_name(path.name + ".shards")


def _read_inputs(config: RunConfig) -> RunInputs:
    state = join_processes()
    inputs = read_inputs(config, state, sequence_group(state.device.type))
    log_once(_log, state, f"Data to score: {inputs.data.report}")
    return inputs


def _plan(config: RunConfig, inputs: RunInputs) -> tuple[ScoringPlan, ShardStore]:
    """The batches and shards of the data, and the folder where shards are kept."""
    dataset = inputs.data.dataset
    plan = plan_batches(
        [len(ids) for ids in dataset.with_format("numpy")["input_ids"]],
        tokens_per_batch=config.scoring.tokens_per_batch,
        tokens_per_shard=config.scoring.tokens_per_shard,
    )
    header = IndexHeader(
        fingerprints=inputs.fingerprints,
        scoring=_options(config),
        num_examples=len(dataset),
        num_tokens=plan.num_tokens,
    )
    return plan, ShardStore(shard_folder(config.index_path), header, len(plan.shards))


def _options(config: RunConfig) -> dict:
    """The settings that decide the scores; batches are among them, by the last bits of a float."""
    return config.scoring.model_dump(exclude={"index"}) | {
        "mode": "index",  # whatever training does
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "attn_implementation": config.model.attn_implementation,
    }


def require_scores(index: TokenIndex, config: RunConfig) -> None:
    """Refuse an index of other scores than those that the run asks for; batches and numbers may be others.

    Raises:
        UserError: with every setting that differs.
    """
    stored, wanted = index.header.scoring, _options(config)
    known = [name for name in ("gradient_layer", "reduction", "loss_scope") if name in stored]
    _require_no_difference(index.path, *({name: options[name] for name in known} for options in (stored, wanted)))


def _require_same_scoring(path: Path, fingerprints: dict, options: dict) -> None:
    index = TokenIndex.open(path, verify=False)
    index.require(fingerprints)
    _require_no_difference(path, index.header.scoring, options)


def _require_no_difference(path: str | Path, stored: dict, wanted: dict) -> None:
    if differing := differences(stored, wanted, "the index", "this run"):
        raise UserError(
            f"{path} was scored with other settings:\n  " + "\n  ".join(differing) + "\n"
            "Give another scoring.index (or output_dir), delete the index, or go back to its settings."
        )


def _seek(
    config: RunConfig,
    inputs: RunInputs,
    store: ShardStore,
    plan: ScoringPlan,
    run_id: str,
    shards: range,
    progress: SeekingProgress,
    team: Team,
    cost: ScoringCost | None,
) -> float:
    """Score until all shards are finished; returns the seconds that the model took to load."""
    began = time.perf_counter()
    with _cpu_threads(config.scoring.cpu_threads if inputs.state.device.type == "cpu" else None):
        with whole_models():
            model = load_model(config.model)
        if not config.model.quantization:
            model.to(inputs.state.device)
        scorer = TokenScorer(
            model,
            gradient_layer=config.scoring.gradient_layer,
            reduction=config.scoring.reduction,
            loss_scope=config.scoring.loss_scope,
            tile_rows=config.training.tile_rows,
            group=team.group,
        )
        loading = time.perf_counter() - began
        allocation = Allocation(partial(_weights, model)) if cost else None
        with allocation or nullcontext():
            for work in (seek, seek_abandoned):
                work(
                    scorer, inputs.data.dataset, store, plan, run_id=run_id, shards=shards, progress=progress, team=team
                )
        if cost and allocation:
            cost.average_memory_bytes, cost.peak_memory_bytes = allocation.average, allocation.peak
    del model, scorer, allocation
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return loading


def _weights(model: PreTrainedModel) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _cpu_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait_for_merge(path: Path) -> Path:
    """Until the main process has merged. If it dies on this machine, the launcher ends us."""
    incomplete, last, since = path.with_name(path.name + ".incomplete"), None, time.monotonic()
    warned = False
    while not path.exists():
        changed = incomplete.stat().st_mtime_ns if incomplete.exists() else None
        if changed != last:
            last, since = changed, time.monotonic()
        elif not warned and time.monotonic() - since > _MERGE_SLOW_SECONDS:
            warned = True
            _log.warning(
                "All shards of %s are finished, and the main process, which is to merge them, does not respond. If it "
                "hangs, end the run and give `tokenseek merge` the same arguments.", path,
            )  # fmt: skip
        elif time.monotonic() - since > _MERGE_SECONDS:
            raise UserError(
                f"All shards of {path} are finished, but the main process has not merged them: it is dead or hangs. "
                "Run the same command again, or `tokenseek merge`."
            )
        time.sleep(0.5)
    return path
