"""Waiting for another process outside collectives."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from distributed.spawn import spawn

from tokenseek.errors import UserError
from tokenseek.launching.processes import first_on_main, meet

PATIENCE = timedelta(seconds=0.3)


def _state(rank):
    dist.distributed_c10d._set_pg_timeout(PATIENCE)
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes of two
    return SimpleNamespace(process_index=rank, num_processes=4)


def _slow_work(rank, folder):
    state, ran = _state(rank), []

    def work():
        ran.append([path.name for path in Path(folder).iterdir()])
        if rank % 2 == 0:
            time.sleep(1.5)
        (Path(folder) / str(rank)).touch()
        return rank

    results = [first_on_main(state, work) for _ in range(2)]
    return results, ran[0]


def test_no_process_waits_in_a_collective(tmp_path):
    """Work of five times what a collective has patience for; first on every node, then in the others."""
    outcomes = spawn(4, _slow_work, str(tmp_path))
    assert [results for results, _ in outcomes] == [[rank, rank] for rank in range(4)]
    for rank, (_, done_before) in enumerate(outcomes):
        assert {"0", "2"} <= set(done_before) if rank % 2 else not set(done_before) & {"1", "3"}


def _failing_work(rank, error):
    def work():
        if rank == 2:
            raise error
        return rank

    try:
        first_on_main(_state(rank), work)
    except Exception as met:
        return type(met).__name__, str(met)


@pytest.mark.parametrize("error,others", [(UserError("no such file"), "UserError"), (OSError("full"), "RuntimeError")])
def test_an_error_of_a_first_process_is_met_by_all(error, others):
    outcomes = spawn(4, _failing_work, error)
    assert outcomes[2] == (type(error).__name__, str(error))
    for rank in (1, 3):  # rank 0 has done its own work by then, and learns of it too
        assert outcomes[rank][0] == others and str(error) in outcomes[rank][1]
    assert outcomes[0][0] == others


def _late(rank, folder):
    if rank == 1:
        time.sleep(1.5)
    (Path(folder) / str(rank)).touch()
    meet(_state(rank))
    return sorted(path.name for path in Path(folder).iterdir())


def test_nobody_waits_in_a_collective_for_those_that_come_late(tmp_path):
    assert spawn(4, _late, str(tmp_path)) == [["0", "1", "2", "3"]] * 4


def test_one_process_works_alone():
    meet(SimpleNamespace(num_processes=1))
    assert first_on_main(SimpleNamespace(num_processes=1), lambda: 3) == 3
