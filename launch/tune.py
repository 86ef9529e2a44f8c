"""Tune: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/tune.py --preset P``."""

import sys

from tokenseek.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("tune"))
