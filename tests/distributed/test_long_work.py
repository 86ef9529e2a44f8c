"""A run in which whatever may take minutes takes long in one process: the other waits, and in no collective."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from distributed.spawn import spawn
from tiny_preset import tiny_preset
from torch.nn.parallel import DistributedDataParallel

from tokenseek.index import TokenIndex
from tokenseek.runs import fit, inputs, outline, preparation, score, train
from tokenseek.training import checkpoints

COLLECTIVES = ("barrier", "broadcast", "broadcast_object_list", "all_gather", "all_gather_object", "all_reduce",
               "all_gather_into_tensor", "reduce_scatter_tensor")  # fmt: skip
# What takes long, in which process; the second one is a process that loads from a slow disk.
WORK = {
    "tokenising": (0, inputs, "prepare_dataset"),
    "planning": (0, fit, "_choose"),
    "a plan for the outline": (0, outline, "_memory"),
    "merging": (0, score, "merge"),
    "verifying": (0, TokenIndex, "open"),
    "loading": (1, train, "load_model"),
    "converting a checkpoint": (0, checkpoints, "_make_universal"),
    "uploading": (0, train, "push"),
}
SETTINGS = ("training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=2",
            "training.memory_budget=8GiB", "training.max_steps=1")  # fmt: skip


class Waiting:
    """Notes while this process is in a collective, and whether the other is while this one works for long."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.mine, self.others = (folder / f"in-a-collective-{r}" for r in (rank, 1 - rank))
        self.depth, self.found = 0, Counter()
        for name in COLLECTIVES:
            setattr(dist, name, self._noted(getattr(dist, name)))
        # It compares and deals out weights below these functions, as other engines do.
        DistributedDataParallel.__init__ = self._noted(DistributedDataParallel.__init__)

    def _noted(self, collective):
        def noted(*args, **kwargs):
            self.depth += 1
            self.mine.touch()
            try:
                return collective(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.mine.unlink()

        return noted

    def long(self, what, work):
        """`work`, so late that the other process is wherever it waits."""

        def late(*args, **kwargs):
            time.sleep(1)
            if what not in self.found:
                self.found[what] = int(self.others.exists())
            return work(*args, **kwargs)

        return late


def whole_run(rank: int, folder: str) -> dict[str, int]:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    waiting = Waiting(rank, Path(folder))
    train.push = lambda config, final: "nowhere"
    checkpoints._make_universal = lambda parts: (parts.parent / "latest_universal").touch()
    for what, (slow, owner, name) in WORK.items():
        if rank == slow:
            setattr(owner, name, waiting.long(what, getattr(owner, name)))
    config = tiny_preset(Path(folder), *SETTINGS)
    training = config.training.model_copy(update={"push_to_hub": True, "hub_model_id": "a/b"})
    preparation.require_hub = lambda config: None
    train.train(config.model_copy(update={"training": training}), outlined=True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={}))
    state = SimpleNamespace(num_processes=2, is_main_process=rank == 0, is_local_main_process=rank == 0)
    checkpoints.fit_checkpoint(Path(folder) / "checkpoint", SimpleNamespace(deepspeed_plugin=plugin), state)
    dist.barrier()
    return waiting.found


def test_no_process_waits_in_a_collective_for_long_work(tmp_path):
    tiny_preset(tmp_path)  # writes model and data
    parts = tmp_path / "checkpoint" / "global_step4"
    parts.mkdir(parents=True)
    (parts.parent / "latest").write_text(parts.name)
    for part in range(3):
        (parts / f"zero_pp_rank_{part}_mp_rank_00_optim_states.pt").touch()
    found = spawn(2, whole_run, str(tmp_path), timeout=150)
    assert {what: waited for one in found for what, waited in one.items()} == dict.fromkeys(WORK, 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
