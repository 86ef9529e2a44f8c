"""`tokenseek evaluate`: from a model and an adapter to scores."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from tokenseek import __version__
from tokenseek.config import DataConfig, ModelConfig
from tokenseek.data import prepare_dataset, require_supervised
from tokenseek.errors import UserError, first_line
from tokenseek.evaluation.benchmarks import HELD_OUT_LOSS, TABLE_1, Chosen, local_files, runnable_tasks
from tokenseek.evaluation.result import EvaluationResult, Score
from tokenseek.evaluation.subject import Subject, require_adapter
from tokenseek.launching.processes import first_on_main, join_processes, whole_models
from tokenseek.launching.sequence import launched_sp_size
from tokenseek.models.loading import load_model, load_tokenizer, require_decoder
from tokenseek.training import GroupTrainer, PaddingCollator
from tokenseek.training.held_out import held_out_loss

_log = logging.getLogger(__name__)

# Processes with longer examples finish later than others, which wait for them; the launcher ends all when one dies.
_PATIENCE = timedelta(days=7)
_PACKAGES = ("torch", "transformers", "peft", "datasets")


def evaluate(
    model: ModelConfig,
    adapter: str | Path | None = None,
    tasks: str | Sequence[str] = TABLE_1,
    *,
    data: Sequence[str | Path] = (),
    held_out: DataConfig | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 1234,
    allow_code_execution: bool = False,
    samples: bool = False,
    label: str | None = None,
) -> EvaluationResult:
    """Evaluate a model with an adapter; every process of a launch calls this and gets the same result.

    The scores do not depend on the number of processes, but for rounding where other examples share a batch, and
    for the standard error of BLEU, which is bootstrapped.

    Args:
        model: the base model, in the number format to evaluate it in.
        adapter: folder of a PEFT adapter on it.
        tasks: names of :data:`BENCHMARKS` (`name:shots` changes the paper's number of solved examples) and
            `held_out_loss`; a list, or one string with commas between.
        data: folders of local files, searched in order; empty takes all data from the hub.
        held_out: the data of `held_out_loss`.
        limit: the first so many examples of each task (of each subject of MMLU) instead of all.
        batch_size: prompts in a batch of one process.
        seed: of drawing solved examples; 1234 is the harness's own.
        allow_code_execution: run programs that the model writes (HumanEval).
        samples: keep every prompt and answer in the result.
        label: how tables call the model; its name by default.

    Raises:
        UserError: before the model is loaded, for tasks, data or a model that do not exist.
    """
    began = time.perf_counter()
    folders = [Path(folder) for folder in data]
    chosen, with_loss = runnable_tasks(tasks, folders, held_out, allow_code_execution)
    if adapter:
        require_adapter(Path(adapter))
    if limit is not None and limit < 1 or batch_size < 1:
        raise UserError(f"limit {limit}, batch size {batch_size}: both are at least 1")
    state = _join_processes()
    require_decoder(model, ditching=False)
    tokenizer = load_tokenizer(model)
    loaded: dict[str, dict[str, Any]] = {}
    if chosen:
        from tokenseek.evaluation.harness import ProcessLM, load_tasks, run_tasks  # late: the loss needs no harness

        place = dict(rank=state.process_index, processes=state.num_processes)
        loaded = first_on_main(state, lambda: load_tasks(chosen, folders, seed=seed, limit=limit, **place))
    loss_data = held_out if with_loss else None
    held_out_data = None if loss_data is None else _read_held_out(loss_data, tokenizer, state, limit)

    network = load_network(model, adapter, state)
    scores: dict[str, Score] = {}
    answers: dict[str, list] | None = None
    if chosen:
        lm = ProcessLM(network, tokenizer, state, batch_size)
        found = run_tasks(lm, loaded, chosen, limit, samples)
        (found,) = broadcast_object_list([found])
        scores, answers = found
    if held_out_data is not None:
        scores[HELD_OUT_LOSS] = _loss(network, tokenizer, held_out_data, batch_size)
    packages = [*_PACKAGES, "lm_eval"] if chosen else _PACKAGES
    return EvaluationResult(
        scores=scores,
        model={
            "label": label or str(adapter or model.name_or_path),
            "adapter": str(adapter) if adapter else None,
            **model.model_dump(mode="json"),
        },
        settings={
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
            "processes": state.num_processes,
            "device": str(state.device.type),
            "data": {item.benchmark.name: _digests(item, folders) for item in chosen} if folders else "hub",
            "eval_data": None if loss_data is None else loss_data.model_dump(mode="json"),
        },
        versions={"tokenseek": __version__, **{name: version(name) for name in packages}},
        seconds=round(time.perf_counter() - began, 1),
        samples=answers if samples else None,
    )


def _join_processes() -> PartialState:
    state = join_processes(_PATIENCE)
    if (size := launched_sp_size()) > 1:
        raise UserError(
            f"parallelism_config: evaluation shares no texts between processes (sp_size {size}). Launch with ddp.yaml."
        )
    return state


def _read_held_out(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, state: PartialState, limit: int | None
) -> Dataset:
    """The examples of the held-out loss, the first `limit` of them; the main process prepares them."""
    dataset = first_on_main(state, lambda: prepare_dataset(data, tokenizer, "eval_data")).dataset
    require_supervised(dataset, "eval_data")
    return dataset.select(range(min(limit, len(dataset)))) if limit else dataset


def evaluate_subject(
    subject: Subject, tasks: str, *, json: Path | None = None, samples: Path | None = None, **settings: Any
) -> None:
    """:func:`evaluate`, and then log its table and write its files; every process of a launch calls this.

    Args:
        json: the file for the scores; ``evaluation.json`` in the folder of a run by default.
        samples: a folder for every prompt and answer.
        settings: as for :func:`evaluate`.
    """
    result = evaluate(
        subject.model,
        subject.adapter,
        tasks,
        held_out=subject.held_out,
        samples=samples is not None,
        label=str(subject.run) if subject.run else None,
        **settings,
    )
    if PartialState().is_main_process:
        _log.info("\n%s", result.table())
        if json := json or (subject.run and subject.run / "evaluation.json"):
            result.save(json)
            _log.info("\nscores: %s", json)
        if samples:
            result.save_samples(samples)
            _log.info("prompts and answers: %s", samples)


def load_network(model: ModelConfig, adapter: str | Path | None, state: PartialState) -> PreTrainedModel | PeftModel:
    """The model, with the adapter if there is one, ready to answer."""
    with whole_models():
        network: PreTrainedModel | PeftModel = load_model(model)
        if not model.quantization:
            network.to(state.device)
        if adapter:
            try:
                network = PeftModel.from_pretrained(network, adapter)
            except (RuntimeError, ValueError, OSError) as error:
                reason = first_line(error)
                raise UserError(f"the adapter {adapter} does not fit {model.name_or_path}: {reason}") from error
    return network.eval()


def _loss(
    network: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int
) -> Score:
    arguments = TrainingArguments(
        per_device_eval_batch_size=batch_size,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = GroupTrainer(network, arguments, data_collator=PaddingCollator(tokenizer.pad_token_id))
    loss = held_out_loss(trainer, dataset)
    return Score("nats per response token", loss, None, len(dataset), None, {})


def _digests(item: Chosen, folders: Sequence[Path]) -> dict[str, str]:
    """Of every file that a benchmark read, its SHA-256."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in local_files(item, folders) if path}
