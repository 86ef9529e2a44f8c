"""Several trainings in the processes of one launch: importing torch and DeepSpeed takes longer than all of them.

Usage: accelerate launch --config_file ... tests/launch/train_several.py PRESET RUNS.json

RUNS.json is a list of `{"output": folder, "set": [overrides], "resume": checkpoint or null}`. Each run leaves, beside
its usual files, `gathers.json` under ZeRO-3 and FSDP2: how often each parameter was gathered in each micro batch; and
`traffic.json`, the bytes that sequence parallelism sent from the first process.
"""

import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import Trainer, TrainerCallback

from tokenseek.commands.terminal import log_to_terminal
from tokenseek.config import load_config
from tokenseek.launching.environment import zero_stage
from tokenseek.launching.processes import join_processes
from tokenseek.parallel import measured
from tokenseek.runs import preparation
from tokenseek.runs.train import train


class Gathers(TrainerCallback):
    """Counts gathers, by parameter, in every micro batch; of ZeRO-3 those of the two passes apart."""

    def __init__(self):
        self.counts, self.micro_batches = {"forward": Counter(), "backward": Counter()}, []
        self.names: dict[int, str] = {}

    def watch_zero3(self):
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        gather = Coordinator._PartitionedParameterCoordinator__all_gather_params_

        def counted(coordinator, params, forward, quantize=False):
            self.counts["forward" if forward else "backward"].update(self.names.get(param.ds_id) for param in params)
            return gather(coordinator, params, forward, quantize)

        Coordinator._PartitionedParameterCoordinator__all_gather_params_ = counted

    def watch_fsdp2(self):
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group

        gather, self.counts = _fsdp_param_group.foreach_all_gather, {"both": Counter()}

        def counted(params, *args, **kwargs):
            self.counts["both"].update(param._param_fqn for param in params)
            return gather(params, *args, **kwargs)

        _fsdp_param_group.foreach_all_gather = counted

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.names = {getattr(p, "ds_id", None): name for name, p in model.named_parameters()}
        self.micro_batches = []

    def on_step_begin(self, *args, **kwargs):  # an evaluation may have come before
        for counts in self.counts.values():
            counts.clear()

    def on_substep_end(self, *args, **kwargs):
        self.micro_batches.append({way: dict(counts) for way, counts in self.counts.items()})
        self.on_step_begin()

    on_step_end = on_substep_end


def believe_in_gpus() -> None:
    """accelerate makes DDP of FSDP where there is no GPU; told that there are, it runs its FSDP2 on CPUs over gloo."""
    init = PartialState.__init__

    def with_gpus(state, *args, **kwargs):
        init(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = with_gpus
    preparation.require_engine = lambda *_: None  # which refuses what is done here


def main(preset: str, runs: list[dict]) -> None:
    gathers, fsdp = None, parse_flag_from_env("ACCELERATE_USE_FSDP")
    if fsdp:
        believe_in_gpus()
    if fsdp or zero_stage() == 3:
        gathers = Gathers()
        if fsdp:
            gathers.watch_fsdp2()
        else:
            gathers.watch_zero3()
        init = Trainer.__init__

        def with_counter(trainer, *args, **kwargs):
            init(trainer, *args, **kwargs)
            trainer.add_callback(gathers)

        Trainer.__init__ = with_counter
    for run in runs:
        output = Path(run["output"])
        join_processes()
        if run.get("resume") and PartialState().is_main_process:
            shutil.copytree(run["resume"], output / Path(run["resume"]).name)
        PartialState().wait_for_everyone()
        with measured() as traffic:
            train(load_config(preset, [f"output_dir={output}", *run["set"]]))
        if PartialState().is_main_process:
            (output / "traffic.json").write_text(json.dumps(asdict(traffic)))
        if gathers and PartialState().is_main_process:
            (output / "gathers.json").write_text(json.dumps(gathers.micro_batches))
    assert parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") == bool(zero_stage())


if __name__ == "__main__":
    log_to_terminal()
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
