"""The short version of benchmarks/faults.py: kills at random moments change nothing."""

import pytest

from benchmarks import faults


@pytest.mark.slow
def test_killed_runs_that_go_on_leave_what_undisturbed_ones_do():
    scoring, training = faults.main(["--scoring", "2", "--training", "1"])
    assert scoring.killed == 2 and scoring.good, scoring
    assert training.killed == 1 and training.good, training
