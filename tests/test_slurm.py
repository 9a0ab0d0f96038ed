"""The Slurm profile on a real cluster of one node: Debian's munge, slurmctld and
slurmd, started here. Needs root; run by name."""
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from test_reproduce import RUNS, go, stamps, write_matrix

CONF_PATH = Path("/etc/slurm/slurm.conf")  # where a job's own srun looks
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={top}/munge.socket
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=600
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def stop(servers: list[subprocess.Popen], top: Path) -> None:
    for server in servers[::-1]:
        server.terminate()
        server.wait(20)
    CONF_PATH.unlink()
    shutil.rmtree(top, ignore_errors=True)


@pytest.fixture
def cluster():
    "A cluster of one node. Whoever asks for this test by name wants it run, so what is missing fails it."
    if missing := [t for t in TOOLS if not shutil.which(t)]:
        pytest.fail(f"not installed: {', '.join(missing)} (Debian: "
                    "apt-get install munge slurmctld slurmd slurm-client)")
    if os.getuid():
        pytest.fail("starting slurmd needs root")
    if CONF_PATH.exists():
        pytest.fail(f"this machine has a Slurm of its own ({CONF_PATH})")
    top = Path("/run/flowrepro-slurm")  # munge wants a folder that nobody else may write to
    shutil.rmtree(top, ignore_errors=True)
    for folder in (top, top / "state", top / "spool"):
        folder.mkdir(mode=0o755)
    (top / "munge.key").write_bytes(os.urandom(1024))
    (top / "munge.key").chmod(0o600)
    CONF_PATH.write_text(CONF.format(host=socket.gethostname(), top=top))
    servers = [subprocess.Popen(command, stdout=open(top / "out.log", "a"), stderr=subprocess.STDOUT) for command in (
        ["munged", "--foreground", "--force", f"--key-file={top}/munge.key", f"--socket={top}/munge.socket",
         f"--pid-file={top}/munge.pid",
         f"--log-file={top}/munge.log", f"--seed-file={top}/munge.seed"], ["slurmctld", "-D", "-c"], ["slurmd", "-D"])]
    until = time.time() + 60
    while "idle" not in (state := subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)).stdout:
        if time.time() > until:
            log = (top / "out.log").read_text()[-2000:]
            stop(servers, top)
            raise RuntimeError(f"the cluster does not come up: {state.stdout}{state.stderr}\n{log}")
        time.sleep(1)
    yield
    stop(servers, top)


@pytest.mark.slow
def test_runs_are_slurm_jobs(cluster, tmp_path):
    "Each run is one job with its resources, tables and figures follow, and a second call does nothing."
    write_matrix(tmp_path)
    done = go(tmp_path, "--cluster", "slurm")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out/snakemake.log").read_text()[-3000:]
    assert stamps(tmp_path).keys() == RUNS
    assert (tmp_path / "out/figures/F3.png").exists()
    assert (tmp_path / "out/tables/T1.csv").exists()
    jobs = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%T %C %m"], capture_output=True,
                          text=True).stdout.split("\n")
    assert [j for j in jobs if j] == ["COMPLETED 4 6000M"] * 2, jobs
    again = go(tmp_path, "--cluster", "slurm")
    assert again.returncode == 0 and "nothing to do" in again.stdout
