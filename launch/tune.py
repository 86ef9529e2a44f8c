"""Tune: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/tune.py --preset P``."""

import sys

from tokenseek.cli import run_script, tune_grid


def run(args, config):
    from tokenseek.sweeps.tune import tune  # late: a mistake in the configuration is told before torch is imported

    tune(config, tune_grid(args), args.write)


if __name__ == "__main__":
    sys.exit(run_script("tune", run))
