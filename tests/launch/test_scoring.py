"""Scoring through the launcher: the same bytes from any number of processes, jobs, and kills."""

import random
import signal
import subprocess

import pytest
from conftest import NUM_EXAMPLES, kill_tree, wait_until, workers

from tokenseek.config import load_config
from tokenseek.index import TokenIndex
from tokenseek.runs.score import score, shard_folder


@pytest.fixture(scope="module")
def index(workspace):
    """The index that one process makes."""
    made = score(load_config(str(workspace.preset), [f"output_dir={workspace.folder}/one"]))
    assert not shard_folder(made).exists()
    return made


def test_the_index_does_not_depend_on_the_number_of_processes(workspace, index):
    assert len(TokenIndex.open(index)) == NUM_EXAMPLES
    arguments = ["--preset", workspace.preset, "--set", f"output_dir={workspace.folder}/two"]
    assert "tokens/s" in workspace.launch("score", *arguments, processes=2).out
    assert (workspace.folder / "two" / "index.arrow").read_bytes() == index.read_bytes()
    three = workspace.tokenseek(
        "score", "--accelerate-config", "ddp_cpu", "--num-processes", "3",
        "--preset", workspace.preset, "--set", f"output_dir={workspace.folder}/three",
    )  # fmt: skip
    assert three.status == 0, three
    assert (workspace.folder / "three" / "index.arrow").read_bytes() == index.read_bytes()


def test_parts_are_scored_without_a_process_group_and_merged(workspace, index, script, console):
    output = workspace.folder / "parts"
    arguments = ["--preset", str(workspace.preset), "--set", f"output_dir={output}"]
    for part in (2, 0):
        assert script("score", *arguments, "--part", f"{part}/3").status == 0
    assert "shards" in (message := console("merge", *arguments).refusal()) and "are not finished" in message
    shards = {path: path.stat().st_ino for path in shard_folder(output / "index.arrow").glob("*.arrow")}
    assert script("score", *arguments, "--part", "1/3").status == 0
    assert {path: path.stat().st_ino for path in shards} == shards
    merged = console("merge", *arguments)
    assert merged.status == 0 and f"{NUM_EXAMPLES} examples" in merged.out, merged
    assert (output / "index.arrow").read_bytes() == index.read_bytes()
    # Scoring again finds all done.
    again = script("score", *arguments)
    assert again.status == 0 and "holds the scores of this data already" in again.out


def test_a_killed_run_goes_on_where_it_was(workspace, index, script):
    output = workspace.folder / "killed"
    arguments = ["--preset", workspace.preset, "--set", f"output_dir={output}"]
    command = workspace.launch_command("score", *arguments, processes=2)
    folder = shard_folder(output / "index.arrow")

    def finished():
        shards = folder.glob("shard-*.arrow")
        return {path.name: (status.st_ino, status.st_mtime_ns) for path in shards for status in [path.stat()]}

    moment = random.randint(1, 12)
    process = workspace.start(command, "killed")
    wait_until(lambda: len(finished()) >= moment, process)
    random.choice(workers(process)).send_signal(signal.SIGKILL)
    result = workspace.finish(process, "killed")
    assert result.status != 0, result
    first = finished()
    assert moment <= len(first) and not (output / "index.arrow").exists()

    process = workspace.start(command, "killed")
    more = len(first) + random.randint(1, 12)
    wait_until(lambda: len(finished()) >= more, process)
    kill_tree(process)
    second = finished()
    assert first.items() <= second.items() and not (output / "index.arrow").exists()

    result = script("score", *arguments)  # one process, where there were two
    assert result.status == 0 and f"{len(second)} of " in result.out, result
    assert "were finished before and are kept" in result.out
    assert not folder.exists()
    assert (output / "index.arrow").read_bytes() == index.read_bytes()


@pytest.mark.slow  # waits for the 30 seconds after which a silent process counts as dead
@pytest.mark.parametrize("rank", [1, 0])
def test_a_process_that_hangs_is_told_and_holds_nobody_up(workspace, index, rank):
    output = workspace.folder / f"hangs-{rank}"
    arguments = ["--preset", workspace.preset, "--set", f"output_dir={output}"]
    process = workspace.start(workspace.launch_command("score", *arguments, processes=2), "hangs")
    folder = shard_folder(output / "index.arrow")
    wait_until(lambda: len(list(folder.glob("shard-*.arrow"))) >= 2, process)
    (hung,) = [worker for worker in workers(process) if worker.environ().get("RANK") == str(rank)]
    hung.suspend()
    try:
        if rank == 1:
            wait_until((output / "index.arrow").exists, process)
        else:  # the one that merges
            message = "the main process, which is to merge them, does not respond"
            wait_until(lambda: message in (workspace.folder / "hangs.err").read_text(), process)
    finally:
        hung.resume()
    result = workspace.finish(process, "hangs")
    assert result.status == 0, result
    assert (output / "index.arrow").read_bytes() == index.read_bytes()


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(workspace, index, script, tmp_path):
    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, str(tmp_path)], capture_output=True, text=True)

    if (made := mount("-o", "size=64k", "tokenseek-test")).returncode:
        pytest.skip(f"a small disk is needed: mount says {made.stderr.strip()}")
    try:
        arguments = ["--preset", workspace.preset, "--set", f"output_dir={tmp_path}"]
        command = workspace.launch_command("score", *arguments, processes=2)
        full = workspace.finish(workspace.start(command, "full"), "full")
        assert full.status != 0 and "tokenseek: error: There is no room to write" in full.err, full
        kept = {path.name: path.stat().st_ino for path in shard_folder(tmp_path / "index.arrow").glob("shard-*.arrow")}
        assert kept and not (tmp_path / "index.arrow").exists()
        mount("-o", "remount,size=16m", "tokenseek-test")
        result = script("score", *arguments)
        assert result.status == 0 and f"{len(kept)} of " in result.out, result
        assert "were finished before and are kept" in result.out
        assert (tmp_path / "index.arrow").read_bytes() == index.read_bytes()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
