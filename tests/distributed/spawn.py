"""Several processes that talk over gloo, for tests: with a time limit, and with the traceback of whichever failed."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen3", "gpt2", "opt")]


class RankFailed(AssertionError):
    """A process of the group failed, or did not end in time."""


def spawn(ranks: int, function: Callable, *args, timeout: float = 200, check: bool = True) -> list:
    """``function(rank, *args)`` in each of `ranks` processes of one gloo group; returns what each returned.

    `function` has to be importable, and its result picklable. When one process fails the others get a few seconds to
    end by themselves and are killed then.

    Args:
        timeout: seconds for everything, start of the processes included.
        check: raise :class:`RankFailed` with the child's traceback; otherwise return, for each rank, its result, the
            traceback as a string, or None where it had to be killed or died without a word.
    """
    # Children fork from a server that has imported the slow libraries once, and has no threads of torch or gloo yet.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "deepspeed", "pytest", "tokenseek.runs.train", *_MODELS])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, ranks, folder, timeout, function, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        for process in processes:
            process.join()
        outcomes = [_load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    failures = {rank: outcome["error"] for rank, outcome in enumerate(outcomes) if outcome and "error" in outcome}
    silent = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
    if check and (failures or silent):
        told = [f"rank {rank}:\n{error}" for rank, error in failures.items()]
        raise RankFailed(
            "\n".join([*told, f"killed after {timeout} s, or once another had failed: {hung}; silent: {silent}"])
        )
    return [outcome and outcome.get("error", outcome.get("result")) for outcome in outcomes]


def _load(path: Path) -> dict | None:
    return torch.load(path, weights_only=False) if path.exists() else None


def _child(rank: int, ranks: int, folder: str, timeout: float, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # As a launcher would set them, for libraries that look there.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    path = Path(folder) / f"{rank}.pt"
    code = 0
    try:
        # A file and not a port: no other process can take it between choosing and using it.
        store = dist.FileStore(f"{folder}/rendezvous", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        torch.save({"result": function(rank, *args)}, path)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        torch.save({"error": traceback.format_exc()}, path)
        code = 1
    os._exit(code)  # skips gloo's wait for connections that the others have closed
