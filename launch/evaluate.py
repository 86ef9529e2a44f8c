"""Evaluate: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch/evaluate.py MODEL``."""

import sys

from tokenseek.cli import run_script


def run(args, subject):
    from tokenseek.evaluation.run import evaluate_subject  # late: mistakes are told before torch is imported

    evaluate_subject(
        subject,
        args.tasks,
        data=args.data,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        allow_code_execution=args.allow_code_execution,
        json=args.json,
        samples=args.samples,
    )


if __name__ == "__main__":
    sys.exit(run_script("evaluate", run))
