"The graph: what it plans, what it refuses, GPUs and resources."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowrepro import reproduce as R
from flowrepro.matrix import MatrixError, load_matrix

TINY = {"fastflow": {"title": "FastFlow", "method": "fastflow"}, "fastflow-altub": {"title": "FastFlow + AltUB", "method": "fastflow", "altub": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a matrix of two runs and one table."
    top = tmp_path_factory.mktemp("graph")
    write_matrix(top)
    return top


def write_matrix(top: Path, **changes) -> Path:
    m = load_matrix()
    m["variants"] = {k: v | {"overrides": changes.get(k, {})} for k, v in TINY.items()}
    m["outputs"] = {"F3": {"notebook": "altub_figures", "role": "first", "variants": list(TINY)}}
    m["presets"] = {"smoke": {"seeds": 1, "first": ["toy/weave"]}}
    (top / "matrix.yml").write_text(yaml.safe_dump(m))
    return top / "matrix.yml"


def go(top: Path, *more: str, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    command = [FLOWREPRO, "reproduce", "--preset", "smoke", "--matrix", "matrix.yml", "--out", "out", *more]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, env=os.environ | (env or {}), timeout=300, **options)


def stamps(top: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in top.glob("out/*/metrics.json")}


FLOWREPRO = str(Path(sys.executable).parent / "flowrepro")
RUNS = {"fastflow-toy-weave-smoke-0", "fastflow-altub-toy-weave-smoke-0"}


@pytest.mark.parametrize("more, named", [
    (["--only", "F33"], "did you mean 'F3'"), (["--preset", "smok"], "did you mean 'smoke'"), (["--data-root", "nowhere"], "no such folder"), (["--seeds", "0"], "at least 1"),
    (["--cluster", "slrum", "--dry-run"], "slurm"),
])
def test_bad_input(folder, more, named):
    "Named before any work, with exit code 2."
    done = go(folder, *more)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr


def test_inputs_follow_the_method():
    "An edit of a module redoes what imports it, and nothing else."
    plan = R.make_plan("demo", out="x")
    names = {n: {Path(p).stem for p in e["inputs"]} for n, e in plan["runs"].items()}
    assert all(("altub" in own) == ("altub" in n and "altub-no-turns" not in n) for n, own in names.items())
    assert all(("hgad" in own) == n.startswith("hgad") for n, own in names.items())
    assert not any({"tables", "figures", "reports", "cli"} & own for own in names.values())
    assert all({"figures"} <= {Path(p).stem for p in e["inputs"]} for e in plan["notebooks"].values())


def test_each_job_its_own_gpu(tmp_path, monkeypatch):
    "Two simulated GPUs: two jobs at once hold different ones, a third waits until one is free."
    monkeypatch.setenv("FLOWREPRO_GPUS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    script = ("import os, sys, time; from pathlib import Path; from flowrepro.reproduce import one_gpu\n"
              "with one_gpu(Path(sys.argv[1])) as i:\n    print(i, os.environ['CUDA_VISIBLE_DEVICES'], time.time(), flush=True); time.sleep(1.5); print(time.time())")
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    held = [tuple(map(float, j.communicate(timeout=120)[0].split())) for j in jobs]
    assert {h[0] for h in held} == {0.0, 1.0} and all(h[0] == h[1] for h in held)
    for a in held:
        assert not any(a is not b and a[0] == b[0] and a[2] < b[3] and b[2] < a[3] for b in held)


def test_slurm_plan(folder):
    "The profile for Slurm is read, and each run asks for its resources."
    command = [*R.snakemake_command(folder / "out/plan.json", "runs", "slurm", 1), "--dry-run", "--forceall"]
    (folder / "out").mkdir(exist_ok=True)
    plan = R.make_plan("smoke", out=folder / "out", matrix=folder / "matrix.yml")
    (folder / "out/plan.json").write_text(json.dumps(plan))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runtime=60" in done.stdout + done.stderr and "mem_mb=6000" in done.stdout + done.stderr


def test_unknown_key(tmp_path):
    write_matrix(tmp_path)
    path = tmp_path / "matrix.yml"
    path.write_text(path.read_text().replace("role:", "rolle:"))
    with pytest.raises(MatrixError, match="did you mean 'role'"):
        R.make_plan("smoke", matrix=path)
    assert go(tmp_path).returncode == 2
