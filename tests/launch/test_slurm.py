"""The Slurm scripts under a real Slurm: a controller and two nodes on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, assert_close_steps, steps

from tokenseek.config import load_config
from tokenseek.config.resources import find_resource
from tokenseek.runs.train import train

if missing := [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]:
    pytest.skip(
        f"no {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)", allow_module_level=True
    )
if os.geteuid() != 0:
    pytest.skip("slurmd needs root", allow_module_level=True)

pytestmark = pytest.mark.slow
TIMEOUT = 240


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Slurm's daemons, and its commands with this cluster's configuration."""

    def __init__(self, folder: Path, env: dict):
        self.folder = folder
        host, (controller, one, two) = socket.gethostname().split(".")[0], free_ports(3)
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir(parents=True)
        conf = folder / "slurm.conf"
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": controller,
            "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "CredType": "cred/munge",
            # A job that is queued again starts once its credential has expired.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "MpiDefault": "none", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU", "ReturnToService": 2, "KillWait": 5,
            "SlurmctldPidFile": f"{folder}/slurmctld.pid", "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmdSpoolDir": f"{folder}/%n", "StateSaveLocation": f"{folder}/state",
            "SchedulerParameters": "sched_interval=1,batch_sched_delay=0,bf_interval=1",
        }  # fmt: skip
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()}"
            for name, port in (("n1", one), ("n2", two))
        ]
        conf.write_text("\n".join([*lines, "PartitionName=main Nodes=n1,n2 Default=YES State=UP"]) + "\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.env = {**env, "SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1", "PROCESSES_PER_NODE": "1"}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        munge = [
            f"--{name}={folder}/munge.{name.split('-')[0]}"
            for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ]
        self.daemons = [self._start("munged", "--foreground", "--force", *munge)]
        wait_until(lambda: (folder / "munge.socket").exists())
        self.daemons += [self._start("slurmctld", "-D"), *(self._start("slurmd", "-D", "-N", n) for n in ("n1", "n2"))]
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%T %D", check=False).split() == ["idle", "2"])

    def _start(self, name, *arguments):
        with open(self.folder / "daemons.log", "a") as log:
            return subprocess.Popen([name, *arguments], env=self.env, stdout=log, stderr=log)

    def run(self, *command, check=True):
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments):
        arguments = [str(argument) for argument in arguments]
        name = "%A_%a" if any(argument.startswith("--array") for argument in arguments) else "%j"
        return self.run("sbatch", "--parsable", f"--output={self.folder}/{name}.log", *arguments)

    def logs(self, job):
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{job}*.log")))

    def wait(self, job):
        wait_until(lambda: not self.run("squeue", "--noheader", f"--jobs={job}", check=False))
        states = set(re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job)))
        assert states == {"COMPLETED"}, (states, self.logs(job)[-6000:])

    def stop(self):
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(workspace):
    cluster = Cluster(workspace.folder / "slurm", workspace._env)
    yield cluster
    cluster.stop()


def processes_of(job, node):
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except psutil.Error:
            continue
        if env.get("SLURM_JOB_ID") == job and env.get("SLURM_NODEID") == node and "SLURM_PROCID" in env:
            found.append(process)
    return found


def test_score_merge_and_train_with_a_node_that_dies(workspace, cluster):
    alone, output = workspace.folder / "one-process", workspace.folder / "on-slurm"
    settings = ["selection.ratio=0.5", "training.num_train_epochs=20"]
    train(
        load_config(
            str(workspace.training), [f"output_dir={alone}", "training.gradient_accumulation_steps=4", *settings]
        )
    )

    config = yaml.safe_load(find_resource("accelerate config", "multinode_ddp").read_text())
    (cluster.folder / "cpu.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True}))
    cluster.env["ACCELERATE_CONFIG"] = str(cluster.folder / "cpu.yaml")
    arguments = ["--preset", workspace.training, "--set", f"output_dir={output}"]
    arguments += [word for setting in settings for word in ("--set", setting)]

    score = cluster.submit("--array=3-4", "launch/slurm/score.sbatch", *arguments)
    words = " ".join(map(str, ["tokenseek", "merge", *arguments]))
    merge = cluster.submit(f"--dependency=afterok:{score}", f"--wrap={words}")
    job = cluster.submit(f"--dependency=afterok:{merge}", "--nodes=2", "launch/slurm/train.sbatch", *arguments)
    cluster.wait(score)
    cluster.wait(merge)
    assert (output / "index.arrow").read_bytes() == (alone / "index.arrow").read_bytes()

    wait_until(lambda: (output / "checkpoint-4" / "trainer_state.json").exists())
    victims = processes_of(job, "1")
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    cluster.wait(job)
    assert "the job is queued again" in cluster.logs(job)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    assert len(steps(alone)) == 60
    assert_close_steps(steps(output), steps(alone), roundings=1024)  # errors grow over so many steps
    assert (output / "final" / "adapter_model.safetensors").exists()
