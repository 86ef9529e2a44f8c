"""Evaluate: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/evaluate.py MODEL``."""

import sys

from tokenseek.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))
