"""Runs programs that a model wrote, each in a process of its own with little time, memory and disk.

That stops mistakes, not attacks: a program still can read files and use the network as this user can. Whoever runs
programs of a model that is not trusted does so in a container or a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0  # the harness's own time limit is 3; a busy machine starts Python slowly
MEMORY_BYTES = 2 * 2**30
FILE_BYTES = 2**20

# Sets the limits in the new process itself: `preexec_fn` is not safe in a process with threads, as one with torch is.
_RUNNER = """
import resource, sys
seconds, memory, file_size = map(int, sys.argv[1:])
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_DATA, memory),
    (resource.RLIMIT_FSIZE, file_size), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(limit, (value, value))
source = sys.stdin.read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end, in time and without an error."""
    # Ending early, with `exit()` for one, is not passing: the last line has to be reached.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tokenseek-program-") as folder, open(Path(folder, "out"), "w+b") as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, str(int(seconds) + 1), str(MEMORY_BYTES), str(FILE_BYTES)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            process.communicate(f"{program}\nprint('\\n{token}')\n".encode(errors="surrogateescape"), seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too; the group bears the session's number
            except ProcessLookupError:  # nothing of it is left
                pass
            process.wait()
        out.seek(0)
        return process.returncode == 0 and out.read().decode(errors="replace").rstrip().endswith(token)


def join_prompts(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The harness's filter of HumanEval: programs are a prompt and what the model wrote after it."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
    """The harness's metric of HumanEval: the share of a question's programs that pass its tests."""
    (tests,), (programs,) = references, predictions
    return {"pass@1": sum(passes(f"{program}\n{tests}") for program in programs) / len(programs)}
