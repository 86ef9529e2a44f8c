"""Fine-tune: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/train.py --preset P``."""

import sys

from tokenseek.cli import run_script


def run(args, config):
    from tokenseek.runs.train import train  # late: a mistake in the configuration is told before torch is imported

    train(config)


if __name__ == "__main__":
    sys.exit(run_script("train", run))
