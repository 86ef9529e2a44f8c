"""Reproduce: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/reproduce.py TABLE --preset P``."""

import sys

from tokenseek.cli import reproduction, run_script


def run(args, config):
    from tokenseek.sweeps.reproduce import reproduce  # late: mistakes are told before torch is imported

    table, rows, config = reproduction(args)
    reproduce(
        args.table,
        table,
        config,
        rows=rows,
        seeds=args.seeds,
        steps=args.steps,
        hold_out=args.hold_out,
        paper=args.paper,
        extra_data=args.extra_data,
        tasks=args.tasks,
        data=args.data,
        eval_limit=args.eval_limit,
    )


if __name__ == "__main__":
    sys.exit(run_script("reproduce", run))
