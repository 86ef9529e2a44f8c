"""The short version of benchmarks/faults.py: kills at random moments change nothing."""

import pytest

from benchmarks import faults


@pytest.mark.slow
def test_killed_runs_that_go_on_leave_what_undisturbed_ones_do():
    scoring, training = faults.main(["--scoring", "2", "--training", "1"])
    assert (scoring.same, scoring.scored_again, scoring.killed + scoring.too_late) == (2, 0, 2), scoring
    assert training.same == 1, training
