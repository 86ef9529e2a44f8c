"""Score a data set: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/score.py --preset P``."""

import sys

from tokenseek.cli import run_script


def run(args, config):
    from tokenseek.runs.score import score  # late: a mistake in the configuration is told before torch is imported

    score(config, part=args.part)


if __name__ == "__main__":
    sys.exit(run_script("score", run))
