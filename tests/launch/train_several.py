"""Several trainings in the processes of one launch: importing torch and DeepSpeed takes longer than all of them.

Usage: accelerate launch --config_file ... tests/launch/train_several.py PRESET RUNS.json

RUNS.json is a list of `{"output": folder, "set": [overrides], "resume": checkpoint or null}`. Each run leaves, beside
its usual files, `gathers.json` under ZeRO-3: how often each parameter was gathered in the forward pass and in the
backward pass of each micro batch; and `traffic.json`, the bytes that sequence parallelism sent from the first process.
"""

import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import Trainer, TrainerCallback

from tokenseek.config import load_config
from tokenseek.parallel import measured
from tokenseek.runs.processes import join_processes, zero_stage
from tokenseek.runs.train import train


class Gathers(TrainerCallback):
    """Counts the gathers of ZeRO-3, by parameter."""

    def __init__(self):
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        self.counts, self.micro_batches, self.names = {True: Counter(), False: Counter()}, [], {}
        gather = Coordinator._PartitionedParameterCoordinator__all_gather_params_

        def counted(coordinator, params, forward, quantize=False):
            self.counts[forward].update(param.ds_id for param in params)
            return gather(coordinator, params, forward, quantize)

        Coordinator._PartitionedParameterCoordinator__all_gather_params_ = counted

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.names = {p.ds_id: name for name, p in model.named_parameters()}
        self.micro_batches = []

    def on_step_begin(self, *args, **kwargs):  # an evaluation may have come before
        for counts in self.counts.values():
            counts.clear()

    def on_substep_end(self, *args, **kwargs):
        forward, backward = ({self.names[i]: n for i, n in self.counts[way].items()} for way in (True, False))
        self.micro_batches.append({"forward": forward, "backward": backward})
        self.on_step_begin()

    on_step_end = on_substep_end


def main(preset: str, runs: list[dict]) -> None:
    gathers = None
    if zero_stage() == 3:
        gathers = Gathers()
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
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
