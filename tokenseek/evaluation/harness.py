"""lm-evaluation-harness: its tasks with the settings chosen, and its model class on our processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.api.model import LM
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenseek.errors import UserError
from tokenseek.evaluation.benchmarks import Chosen
from tokenseek.evaluation.local import local_settings, local_subjects, question_column
from tokenseek.evaluation.result import Score
from tokenseek.evaluation.shots import SharedDraws

# As of Transformers' `from_pretrained` on names that the hub, or the cache without network, does not have.
_NOT_AVAILABLE = (OSError, ConnectionError, ValueError)


class ProcessLM(HFLM):
    """The harness's Transformers model, whole in every process of a launch, each with its share of the requests.

    By itself the harness shares work on several GPUs of one machine only: on CPUs every process would do all of it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        state: PartialState,
        batch_size: int,
    ) -> None:
        with _quiet("lm_eval.models.huggingface"):  # warns that a ready model is shared by its caller, as it is here
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.state, self._rank, self._world_size = state, state.process_index, state.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other along the first axis."""
        return gather(tensor)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.state.wait_for_everyone()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def load_tasks(
    chosen: Sequence[Chosen],
    folders: Sequence[Path] = (),
    *,
    seed: int,
    limit: int | None = None,
    rank: int = 0,
    processes: int = 1,
) -> dict[str, dict[str, Any]]:
    """The harness's tasks of every benchmark, by its name, ready for process `rank` of `processes`.

    Args:
        folders: of local files; without them the data are the hub's.

    Raises:
        UserError: the hub's data cannot be fetched, local files are malformed, there are fewer questions than
            processes, or too few of them to draw solved examples from.
    """
    roots = {_root(item) for item in chosen}
    manager = lm_eval.tasks.TaskManager(include_path=sorted(roots), include_defaults=False)
    tasks = {item.benchmark.name: _load(manager, item, folders) for item in chosen}
    for item in chosen:
        for task in tasks[item.benchmark.name]["tasks"].values():
            task.set_fewshot_seed(seed)
            _prepare(task, item, bool(folders), limit, rank, processes)
    return tasks


def _root(item: Chosen) -> Path:
    folder = item.benchmark.folder
    return Path(__file__).parent / "tasks" if folder is None else Path(lm_eval.tasks.__file__).parent / folder


def _load(manager: lm_eval.tasks.TaskManager, item: Chosen, folders: Sequence[Path]) -> dict[str, Any]:
    benchmark = item.benchmark
    names = [name for name in manager.all_subtasks if re.fullmatch(benchmark.tasks, name)]
    if benchmark.name == "mmlu" and folders:
        subjects = local_subjects(item, folders)
        names = [name for name in names if name.removeprefix("mmlu_") in subjects]
        if unknown := sorted(map(str, subjects - {name.removeprefix("mmlu_") for name in names})):
            raise UserError(f"mmlu: the local file has rows of {', '.join(unknown)}, which is no subject of MMLU")
    members = []
    for name in names:
        local = local_settings(item, name, folders) if folders else {}
        members.append({"task": name, "num_fewshot": item.shots, **local})
    try:
        with _quiet("lm_eval.api.task"):  # explains to authors of tasks what their settings do
            # As members of a group tasks take settings of ours over their own.
            loaded = manager.load([{"group": benchmark.name, "task": members}])
    except _NOT_AVAILABLE as error:
        if folders or isinstance(error, UserError):
            raise
        raise UserError(
            f"{benchmark.name}: its data cannot be fetched from the hub ({error}). Download it with network access "
            "first, or give folders of local files with --data, see docs/evaluation.md."
        ) from error
    if len(names) == 1:
        return {**loaded, "groups": {}, "group_map": {}}
    metric, _, kind = benchmark.metric.partition(",")
    loaded["groups"][benchmark.name].aggregate_metric_list = [AggMetricConfig(metric, [kind], weight_by_size=True)]
    return loaded


def run_tasks(
    lm: LM, tasks: dict[str, dict[str, Any]], chosen: Sequence[Chosen], limit: int | None = None, samples: bool = False
) -> tuple[dict[str, Score], dict[str, list]] | None:
    """Run the benchmarks that :func:`load_tasks` has loaded; every process calls this and the main one gets the scores,
    with all prompts and answers if `samples`."""
    scores, answers = {}, {}
    for item in chosen:
        benchmark = item.benchmark
        found = lm_eval.evaluate(
            lm,
            tasks[benchmark.name],
            limit=limit,
            log_samples=samples,
            confirm_run_unsafe_code=benchmark.runs_code,  # leave was asked for before
        )
        if found is not None:
            scores[benchmark.name] = _score(found, item, tasks[benchmark.name])
            if samples:
                answers[benchmark.name] = [sample for each in found["samples"].values() for sample in each]
    return (scores, answers) if lm.rank == 0 else None


def _prepare(task: Task, item: Chosen, local: bool, limit: int | None, rank: int, processes: int) -> None:
    name = item.benchmark.name
    docs = list(task.eval_docs)
    count = min(len(docs), limit or len(docs))
    if count < processes:
        raise UserError(
            f"{name}: {count} examples of {task.task_name} cannot be shared by {processes} processes; raise --limit "
            "or start fewer"
        )
    if item.shots and type(task.sampler) is ContextSampler:
        # Without a file of its own for solved examples, a local benchmark draws them from the questions.
        own = local and task.fewshot_cfg.split == task.config.test_split
        column = question_column(name) if own else None
        pool = task.sampler.fewshot_docs()
        # A question may stand in the file several times, all of which are left out.
        enough = len({str(doc[column]) for doc in pool}) - 1 if column else len(pool)
        if enough < item.shots:
            raise UserError(
                f"{name}: {item.shots} solved examples are asked for, and there are {enough} others to draw them from; "
                f"give a larger file, or fewer with --tasks {name}:{enough}"
            )
        question = (lambda doc: doc[column]) if column else None
        task.sampler = SharedDraws(task.sampler, docs, rank, processes, question)


def _score(found: dict[str, Any], item: Chosen, loaded: dict[str, Any]) -> Score:
    benchmark = item.benchmark
    names = list(loaded["tasks"])
    group = len(names) > 1
    metrics = found["groups" if group else "results"][benchmark.name if group else names[0]]
    metric, _, kind = benchmark.metric.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{kind}")
    numbers = {key: float(value) for key, value in metrics.items() if "," in key and isinstance(value, (int, float))}
    if group:
        numbers |= {f"{name}:{benchmark.metric}": float(found["results"][name][benchmark.metric]) for name in names}
    return Score(
        metric=benchmark.metric,
        value=float(metrics[benchmark.metric]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        examples=sum(found["n-samples"][name]["effective"] for name in names),
        shots=item.shots,
        metrics=numbers,
    )
