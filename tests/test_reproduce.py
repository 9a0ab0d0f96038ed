"The graph: what it plans, what it refuses, GPUs and resources."
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import yaml
from PIL import Image

from flowrepro import reproduce as R
from flowrepro.data import DataError
from flowrepro.figures import FIGURES
from flowrepro.matrix import Job, MatrixError, load_matrix

TINY = {"fastflow": {"title": "FastFlow", "method": "fastflow"},
        "fastflow-altub": {"title": "FastFlow + AltUB", "method": "fastflow", "altub": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a matrix of two runs and one table."
    top = tmp_path_factory.mktemp("graph")
    write_matrix(top)
    return top


def write_matrix(top: Path, **changes) -> Path:
    m = load_matrix()
    m["variants"] = {k: v | {"overrides": changes.get(k, {})} for k, v in TINY.items()}
    m["outputs"] = {name: {"notebook": f"altub_{kind}", "role": "first", "variants": list(TINY)}
                    for name, kind in (("F3", "figures"), ("T1", "tables"))}
    m["presets"] = {"smoke": {"seeds": 1, "first": ["toy/weave"]}, "real": {"seeds": 1, "first": ["toy/weave"]}}
    (top / "matrix.yml").write_text(yaml.safe_dump(m))
    return top / "matrix.yml"


def go(top: Path, *more: str, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    command = [FLOWREPRO, "reproduce", "--preset", "smoke", "--matrix", "matrix.yml", "--out", "out", *more]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, env=os.environ | (env or {}), timeout=300,
                          **options)


def stamps(top: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in top.glob("out/*/metrics.json")}


FLOWREPRO = str(Path(sys.executable).parent / "flowrepro")
RUNS = {"fastflow-toy-weave-smoke-0", "fastflow-altub-toy-weave-smoke-0"}


def test_runs_then_nothing_then_only_what_changed(folder):
    """The outputs are drawn, a second call does nothing and says so, a changed setting or seed redoes or
    adds what depends on it alone."""
    write_matrix(folder)
    first = go(folder)
    assert first.returncode == 0 and "T1, percent, last epoch (1 table in out/tables" in first.stdout, (
        first.stdout + first.stderr)
    before = stamps(folder)
    assert before.keys() == RUNS and "[2/2]" in first.stdout
    assert ({"figures/F3.svg", "figures/F3.png", "tables/T1.csv", "tables/T1.md", "tables/T1.tex", "report.html"}
            <= {str(p.relative_to(folder / "out")) for p in folder.glob("out/**/*")})
    again = go(folder)
    assert again.returncode == 0 and "nothing to do" in again.stdout and stamps(folder) == before
    write_matrix(folder, **{"fastflow-altub": {"epochs": 3}})
    changed = go(folder)
    after = stamps(folder)
    assert "[1/1] fastflow-altub" in changed.stdout
    assert {n for n in RUNS if after[n] != before[n]} == {"fastflow-altub-toy-weave-smoke-0"}
    seeds = go(folder, "--seeds", "2")
    assert "to do: 2" in seeds.stdout
    assert stamps(folder).keys() == RUNS | {n[:-1] + "1" for n in RUNS}
    assert {n: t for n, t in stamps(folder).items() if n in RUNS} == after
    table = lambda: pd.read_csv(folder / "out/tables/T1.csv", dtype=str)
    assert set(table()["seeds"]) == {"2"}
    one = go(folder, "--seeds", "1")
    # no run to make, the table drawn of the seeds asked for
    assert "nothing to do" in one.stdout
    assert set(table()["seeds"]) == {"1"}


def test_report_holds_every_output(folder):
    """One page without a network: the table, the figure with its caption, each run with links to its
    settings and executed notebook."""
    page = (folder / "out/report.html").read_text()
    assert "<section id=T1>" in page and "<section id=F3>" in page and "http" not in page
    assert 'name="viewport"' in page and '<img alt="F3"' not in page
    for name in RUNS:
        assert f'href="{name}/run.ipynb"' in page
        assert f'href="{name}/config.json"' in page
        assert (folder / "out" / name / "run.ipynb").exists()


CLONE = Path(R.__file__).parent


@pytest.fixture
def clone(tmp_path):
    "A copy of the package in another place, and an environment that takes it."
    shutil.copytree(CLONE, tmp_path / "clone/flowrepro", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "clone/flowrepro", {"PYTHONPATH": str(tmp_path / "clone")}


def planned(done: subprocess.CompletedProcess) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.strip() for line in done.stdout.splitlines() if line.startswith("  ")}


def edit(path: Path) -> None:
    "Change a file, which then is older than any run."
    path.write_text(path.read_text() + "\n")
    os.utime(path, (10**9, 10**9))


def test_content_decides_not_dates(folder, clone):
    """The same content in another clone is nothing new; an edited module or notebook, dated back,
    redoes exactly what depends on it."""
    write_matrix(folder)
    top, env = clone
    assert go(folder).returncode == 0
    dates = lambda: {p.stem: p.stat().st_mtime_ns for p in folder.glob("out/notebooks/*.done")}
    runs, drawn = stamps(folder), dates()
    again = go(folder, env=env)
    assert again.returncode == 0 and "nothing to do" in again.stdout and dates() == drawn, again.stdout + again.stderr
    edit(top / "comparisons.py")
    assert go(folder, env=env).returncode == 0
    assert stamps(folder) == runs and {n for n, t in dates().items() if t != drawn[n]} == {"altub_tables"}
    edit(top / "altub.py")
    assert planned(go(folder, "--dry-run", env=env)) == {"fastflow-altub-toy-weave-smoke-0"}
    edit(top / "experiments/run.ipynb")
    assert planned(go(folder, "--dry-run", env=env)) == RUNS


def with_second(top: Path, data: str) -> None:
    "A matrix whose T2 needs other data."
    m = yaml.safe_load(write_matrix(top).read_text())
    m["outputs"]["T2"] = {"notebook": "altub_tables", "role": "second", "variants": list(TINY)}
    m["presets"]["smoke"]["second"] = [data]
    (top / "matrix.yml").write_text(yaml.safe_dump(m))


def test_images_are_part_of_the_plan(tmp_path):
    "A run depends on its images, wherever they and the results lie; a category that is not there is refused."
    data, m = put(tmp_path / "data", "mvtec_ad/bottle", "mvtec_ad/nut", good="good"), load_matrix()
    m["presets"]["smoke"]["first"] = ["mvtec/bottle"]
    (tmp_path / "m.yml").write_text(yaml.safe_dump(m))
    plan = lambda **more: R.make_plan("smoke", **{"data_root": data, "only": ["T1"], "out": tmp_path / "out",
                                                  "matrix": tmp_path / "m.yml"} | more)["runs"]
    depends = lambda runs: {name: (e["settings"], e["content"]) for name, e in runs.items()}
    before = depends(plan())
    assert before == depends(plan(data_root=shutil.copytree(data, tmp_path / "moved"), out=tmp_path / "other"))
    (data / "mvtec_ad/nut/train/good/0000.png").unlink()
    assert before == depends(plan())
    (data / "mvtec_ad/bottle/train/good/0000.png").unlink()
    now = depends(plan())
    assert all(before[name][1] != now[name][1] for name in before)
    m["presets"]["smoke"]["first"] = ["mvtec/botle"]
    (tmp_path / "m.yml").write_text(yaml.safe_dump(m))
    with pytest.raises(R.DataError, match="no category 'botle'; available: bottle, nut"):
        plan()


def test_a_run_of_other_settings_is_not_taken(folder, monkeypatch, capsys):
    "It is to be done, and said, though Snakemake sees nothing new; the others stay done, and a dry run changes nothing."
    assert go(folder).returncode == 0
    monkeypatch.chdir(folder)
    ask = lambda: R.reproduce("smoke", out="out", matrix="matrix.yml", dry_run=True) or capsys.readouterr().out
    before = ask()
    name = sorted(RUNS)[0]
    path = folder / "out" / name / "metrics.json"
    made, when = json.loads(path.read_text()), path.stat()
    made["config"]["settings"]["schedule"]["lr"] *= 2
    path.write_text(json.dumps(made))
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    after = ask()
    assert "other settings" not in before and f"runs of other settings, which are replaced: {name}\n" in after
    assert f"  {name}\n" in after and path.exists() and "to do: 1," in after


def test_missing_data_are_no_success(folder):
    """What can be done is done, what is missing is named at the end, and the exit code is 1,
    also when nothing is left to do."""
    with_second(folder, "mvtec/bottle")
    for _ in range(2):
        done = go(folder, "--out", "my out")  # a space in a path breaks nothing
        made = {p.parent.name for p in folder.glob("my out/*/metrics.json")}
        assert done.returncode == 1 and RUNS <= made and "every run is there" not in done.stdout, (
            done.stdout + done.stderr)
        # before and after the work
        assert (
            done.stdout.count("missing data: mvtec, so 2 runs cannot be made; "
                              "put it in the data root (--data-root) as mvtec_ad/") == 2)
    assert "nothing to do: every run whose data are here is there" in done.stdout


def put(top: Path, *categories: str, good: str = "ok") -> Path:
    "Two images of each kind of some categories, such as btad/01."
    for c in categories:
        for kind in (f"train/{good}", f"test/{good}", "test/ko", "ground_truth/ko"):
            (folder := top / c / kind).mkdir(parents=True)
            for i in (0, 1):
                Image.new("L", (8, 8), 255 * (kind == "ground_truth/ko")).save(folder / f"{i:04}.png")
    return top


def test_categories_that_lack(tmp_path):
    """A data set without some official categories is told of where all are wanted, in the plan's words, and
    a damaged image ends the plan."""
    plan = R.make_plan("paper", put(tmp_path, "btad/01", "btad/03"), ["T2", "T6"], 1)
    assert plan["lacking"] == {"btad": ["02"]} and "missing data: 02 of btad" in R.describe(plan, [], {}, 1)
    assert not R.make_plan("paper", put(tmp_path, "btad/02"), ["T2"], 1)["lacking"]
    assert R.make_plan("real", tmp_path, ["T2"], 1)["lacking"] == {}
    (tmp_path / "btad/02/test/ko/0001.png").write_bytes(b"")
    with pytest.raises(DataError, match="0001.png"):
        R.make_plan("paper", tmp_path, ["T6"], 1)


def test_no_sbatch(tmp_path, monkeypatch):
    "Jobs for Slurm where nothing takes them: an error before any work, but the plan can be seen."
    monkeypatch.setattr(R.shutil, "which", lambda name: None)
    assert R.reproduce("smoke", only=["T1"], out=tmp_path, cluster="slurm", dry_run=True) == 0
    with pytest.raises(OSError, match="no sbatch"):
        R.reproduce("smoke", only=["T1"], out=tmp_path, cluster="slurm")
    assert not (tmp_path / "snakemake.log").exists()


@pytest.mark.parametrize("root", [None, "empty"])
def test_no_data_at_all(tmp_path, root):
    """Without any run an error before any work, whether there is no data root or one without the
    data sets; toy data need none."""
    with_second(tmp_path, "mvtec+visa/all")
    (tmp_path / "empty").mkdir()
    more = ["--data-root", root] if root else []
    done = go(tmp_path, "--only", "T2", *more)
    assert done.returncode == 2
    assert f"data root{f' {root}:' if root else ','}" in done.stderr
    assert "give --data-root, the folder that holds mvtec_ad/, visa/" in done.stderr
    assert "nothing to do" not in done.stdout and not (tmp_path / "out").exists()
    assert go(tmp_path, "--only", "T1", "--dry-run", *more).returncode == 0
    assert not any(R.make_plan(p, tmp_path / "empty" if root else None)["missing"] for p in ("smoke", "demo"))


def test_planted_failure(tmp_path):
    """One run fails: the other finishes, the failed one is named with its executed notebook, the exit
    code is 1; mended, only it is run."""
    write_matrix(tmp_path, fastflow={"lr": 1e30})
    done = go(tmp_path)
    assert done.returncode == 1 and stamps(tmp_path).keys() == {"fastflow-altub-toy-weave-smoke-0"}, (
        done.stdout + done.stderr)
    failed = done.stdout[done.stdout.index("failed:"):]
    assert "fastflow-toy-weave-smoke-0" in failed
    assert "fastflow-toy-weave-smoke-0/run.ipynb" in failed
    assert (tmp_path / "out/fastflow-toy-weave-smoke-0/run.ipynb").exists()
    write_matrix(tmp_path)
    mended = go(tmp_path)
    assert mended.returncode == 0 and "[1/1] fastflow-toy" in mended.stdout, mended.stdout + mended.stderr


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_goes_on(tmp_path, sign):
    """An interrupt, a request to terminate or a lost terminal ends the jobs at once and keeps what is finished; the
    next call does the rest alone. Killed itself, it takes its jobs along."""
    write_matrix(tmp_path, **{"fastflow-altub": {"epochs": 20000}})
    command = [FLOWREPRO, "reproduce", "--preset", "smoke", "--matrix", "matrix.yml", "--out", "out", "--jobs", "2"]
    # a shell's background job, such as these tests may be, ignores them
    heard = lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=heard)
    lines = iter(process.stdout.readline, "")
    next(line for line in lines if "[1/2]" in line)
    until = time.time() + 60
    while not (tmp_path / "out/fastflow-altub-toy-weave-smoke-0/config.json").exists() and time.time() < until:
        time.sleep(0.2)
    assert (tmp_path / "out/fastflow-altub-toy-weave-smoke-0/config.json").exists()
    time.sleep(2)  # until Snakemake, too, knows of the finished one
    process.send_signal(sign)
    rest = process.communicate(timeout=60)[0]
    if sign != signal.SIGKILL:
        assert process.returncode == 130 and "1 of 2 runs finished" in rest and "Traceback" not in rest, rest
    (done,) = stamps(tmp_path).items()
    time.sleep(1 if sign != signal.SIGKILL else 10)  # Snakemake ends by itself, as its job has
    left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] and Path(p.info["cwd"]).is_relative_to(tmp_path)]
    assert not left, f"still running: {left}"
    write_matrix(tmp_path)
    went_on = go(tmp_path)
    assert went_on.returncode == 0 and "1 of them done" in went_on.stdout and done in stamps(tmp_path).items(), (
        went_on.stdout + went_on.stderr)


def test_whatever_the_folder_and_the_environment(tmp_path):
    """A folder whose name YAML would read otherwise, a profile of Snakemake's own and a long temporary folder;
    what was removed of the outputs is drawn again."""
    write_matrix(tmp_path)
    (long := tmp_path / ("t" * 120)).mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.yaml").write_text("executor: none-of-ours\n")
    call = lambda: go(tmp_path, "--out", "ü b: a #1", "--only", "T1,F3",
                      env={"TMPDIR": str(long), "SNAKEMAKE_PROFILE": str(tmp_path / "own")})
    done, out = call(), tmp_path / "ü b: a #1"
    assert done.returncode == 0 and "[2/2]" in done.stdout, done.stdout + done.stderr
    (out / "tables/T1.csv").unlink(), (out / "figures/F3.md").unlink()
    again = call()
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout + again.stderr
    assert (out / "tables/T1.csv").exists() and (out / "figures/F3.md").exists()


def test_a_killed_run_is_told_as_such(tmp_path):
    "Its notebook was begun and it left no word."
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.ipynb").touch()
    (line,) = R.failures({"out": str(tmp_path), "runs": {"a": {}}, "notebooks": {}})
    assert line.startswith("a: it was killed") and "goes on from its checkpoint" in line


def test_a_killed_call_keeps_its_folder_while_its_snakemake_lives(tmp_path):
    "The lock is Snakemake's, too."
    with R.only_one(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    with pytest.raises(ValueError, match="another flowrepro reproduce works"), R.only_one(tmp_path):
        pass
    child.kill(), child.wait()
    with R.only_one(tmp_path):
        pass


@pytest.mark.parametrize("more, named", [
    (["--only", "F33"], "did you mean 'F3'"), (["--preset", "smok"], "did you mean 'smoke'"),
    (["--data-root", "nowhere"], "no such folder"), (["--seeds", "0"], "at least 1"),
    (["--cluster", "slrum", "--dry-run"], "slurm"), (["--cluster", "slrum", "--jobs", "2", "--dry-run"], "slurm"),
    (["--cluster", "local"], "slurm"),
    (["--jobs", "0"], "jobs 0: at least 1"), (["--jobs", "-2"], "jobs -2: at least 1"),
    (["--out", "/proc/x"], "/proc/x: nothing can be written there"),
    (["--out", "matrix.yml"], "matrix.yml: nothing can be written there"),
])
def test_bad_input(folder, more, named):
    "Named before any work, with exit code 2."
    done = go(folder, *more)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("given", ["two", "-1", ""])
def test_gpus_that_are_no_number(monkeypatch, given):
    monkeypatch.setenv("FLOWREPRO_GPUS", given)
    with pytest.raises(ValueError, match=f"FLOWREPRO_GPUS='{given}': must be a whole number"):
        R.reproduce("smoke", dry_run=True)


def test_inputs_follow_the_method():
    "An edit of a module redoes what imports it, and nothing else."
    plan = R.make_plan("demo", out="x")
    names = {n: {Path(p).stem for p in e["inputs"]} for n, e in plan["runs"].items()}
    assert all(("altub" in own) == ("altub" in n and "altub-no-turns" not in n) for n, own in names.items())
    assert all(("hgad" in own) == n.startswith("hgad") for n, own in names.items())
    assert not any({"tables", "comparisons", "figures", "reports", "cli"} & own for own in names.values())
    for n, e in plan["notebooks"].items():
        assert ({"figures", "comparisons"}
                & {Path(p).stem for p in e["inputs"]} == {"figures" if n.endswith("figures") else "comparisons"})


def test_each_job_its_own_gpu(tmp_path, monkeypatch):
    """Two simulated GPUs, within an allocation of Slurm: two jobs at once hold different ones, a third waits until
    one is free."""
    monkeypatch.setenv("FLOWREPRO_GPUS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = ("import os, sys, time; from pathlib import Path; from flowrepro.reproduce import one_gpu\n"
              "with one_gpu(Path(sys.argv[1])) as i:\n    print(i, os.environ['CUDA_VISIBLE_DEVICES'], time.time(), "
              "flush=True); time.sleep(1.5); print(time.time())")
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
    held = [tuple(map(float, j.communicate(timeout=120)[0].split())) for j in jobs]
    assert {h[0] for h in held} == {0.0, 1.0} and all(h[0] == h[1] for h in held)
    for a in held:
        assert not any(a is not b and a[0] == b[0] and a[2] < b[3] and b[2] < a[3] for b in held)


def write_past(folder: Path, seconds: float, device: str = "cpu", overrides: dict | None = None,
               method: str = "fastflow", preset: str = "demo") -> None:
    "A finished run's `metrics.json`, as far as estimates read it."
    folder.mkdir(parents=True)
    timing = {"features_s": 0.0, "train_s": seconds - R.OVERHEAD, "evaluate_s": 0.0}
    config = {"method": method, "preset": preset, "category": "all" if method == "hgad" else "bolt",
              "overrides": overrides or {}}
    content = {"config": config, "timing": timing,
               "environment": {"device": device}}
    (folder / "metrics.json").write_text(json.dumps(content))


def test_past_seconds_of_the_same_device(tmp_path):
    "What a GPU took says nothing about a CPU; of the seeds of a run the fewest count."
    for device, seed, seconds in (("cpu", 0, 70.0), ("cpu", 1, 40.0), ("cpu", 2, 60.0), ("cuda", 0, 12.0)):
        write_past(tmp_path / device / f"fastflow-toy-weave-demo-{seed}", seconds, device)
    took = [R.past_seconds([tmp_path], d)["fastflow-toy-weave-demo", "{}"] for d in ("cpu", "cuda")]
    assert R.past_seconds([tmp_path])["fastflow demo one", "{}"] == 60.0  # the median of a method, the fewest of a run
    assert took == [40.0, 12.0] and R.past_seconds([tmp_path]) == R.past_seconds([tmp_path], "cpu")


def test_only_runs_as_long_stand_in(tmp_path):
    """A run that was cut short says nothing of a whole one, and the other way round; where
    features are cached does not matter."""
    plan = R.make_plan("demo", only=["T1", "T4", "T9"], out=tmp_path / "out")
    plain, ablation, hgad = "fastflow-toy-weave-demo-0", "altub-every-2-toy-weave-demo-0", "hgad-toy-all-demo-0"
    write_past(tmp_path / "a/fastflow-toy-bolt-demo-0", 50.0, overrides={"features": {"cache": "elsewhere"}})
    write_past(tmp_path / "a/short", 10.0, overrides={"schedule": {"epochs": 1}, "evaluations": 1})
    # the preset's epochs, of which the matrix takes 12
    write_past(tmp_path / "a/hgad-toy-all-demo-0", 90.0, method="hgad")
    past = R.past_seconds([tmp_path / "a"])
    assert R.known_seconds([plain, ablation, hgad], plan, past) == {plain: 50.0}
    write_past(tmp_path / "b/any", 70.0, overrides={"schedule": {"epochs": 12}, "features": {"cache": "x"}},
               method="hgad")
    past = R.past_seconds([tmp_path / "a", tmp_path / "b"])
    assert R.known_seconds([hgad, plain], plan, past) == {hgad: 70.0, plain: 50.0}


def test_paper_has_no_estimate_from_short_runs(tmp_path, monkeypatch, capsys):
    """The committed runs of preset `paper` were cut short: no time is told, and the page of costs is named. Ten runs
    at a time are not faster than one run."""
    monkeypatch.setenv("FLOWREPRO_GPUS", "1")
    monkeypatch.chdir(CLONE.parent)
    assert (R.reproduce("paper", put(tmp_path / "data", "mvtec_ad/bottle", good="good"), ["T5"], out=tmp_path / "out",
                        dry_run=True) == 0)
    said = capsys.readouterr().out
    assert "to do: 15, 1 at a time; no past timings to tell how long; the page of costs (nbs/12e_costs.ipynb)" in said
    plan, name = R.make_plan("smoke", only=["T9"], out=tmp_path), "hgad-toy-all-smoke-0"
    assert "10 at a time; about 90 s by" in R.describe(plan, [name], {name: 90.0}, 10)


@pytest.mark.parametrize("text",
                         ['{"config": {"method', "{}", "[]", '{"config": {"method": "other", "preset": "demo"}}',
                          "\x01", None], ids=["cut", "empty", "list", "other", "control", "folder"])
def test_a_file_that_is_no_run(tmp_path, monkeypatch, text):
    "Estimates skip what they cannot read; in the folder of the results it is named with the remedy."
    stray = tmp_path / "results/fastflow-toy-weave-smoke-0/metrics.json"
    stray.parent.mkdir(parents=True)
    stray.mkdir() if text is None else stray.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert R.past_seconds([Path("results")]) == {}
    assert R.reproduce("smoke", only=["T9"], out="out", dry_run=True) == 0
    with pytest.raises(ValueError, match="results/fastflow-toy-weave-smoke-0/metrics.json: "
                                         "not the metrics.json of a run .*; remove it"):
        R.reproduce("smoke", only=["T9"], out="results", dry_run=True)


def test_jobs_share_gpus(tmp_path, monkeypatch):
    """Two places on each of two simulated GPUs: the emptiest GPU is taken first; Snakemake may
    run as many jobs as asked for."""
    monkeypatch.setenv("FLOWREPRO_GPUS", "2")
    monkeypatch.setattr(R.time, "sleep", lambda _: pytest.fail("no place is free"))
    with contextlib.ExitStack() as held:
        for expected in (0, 1, 0, 1):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            assert held.enter_context(R.one_gpu(tmp_path, share=2)) == expected
            assert os.environ["CUDA_VISIBLE_DEVICES"] == str(expected)
    assert "gpu=4" in R.snakemake_command(tmp_path / "plan.json", "runs", None, 4)


@pytest.mark.parametrize("preset, given, gpu",
                         [("real", None, 1), ("real", "0", 0), ("smoke", None, 0), ("smoke", "1", 1),
                          ("smoke", "4", 1)])
def test_slurm_plan(folder, monkeypatch, preset, given, gpu):
    """The profile for Slurm is read, and each run asks for its resources: for a GPU as its preset
    wants, not as this machine has."""
    monkeypatch.delenv("FLOWREPRO_GPUS",
                       raising=False) if given is None else monkeypatch.setenv("FLOWREPRO_GPUS", given)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 - gpu)  # of the machine on which the command is typed
    write_matrix(folder)
    (folder / "out").mkdir(exist_ok=True)
    plan = R.make_plan(preset, out=folder / "out", matrix=folder / "matrix.yml", cluster="slurm")
    (folder / "out/slurm.json").write_text(json.dumps(plan))
    command = [*R.snakemake_command(folder / "out/slurm.json", "runs", "slurm", 7), "--dry-run", "--forceall"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert f"runtime={60 if preset == 'smoke' else 1440}" in told
    assert "mem_mb=6000" in told
    assert told.count("gpu=1") == len(RUNS) * gpu
    assert plan["gpu"] == gpu and command[command.index("--jobs") + 1] == "7"


def test_how_many_at_a_time(tmp_path, monkeypatch, capsys):
    "On a cluster as its profile says, whatever this machine has; elsewhere one a GPU."
    monkeypatch.setenv("FLOWREPRO_GPUS", "3")
    assert ([R.at_once(None, None), R.at_once(5, None), R.at_once(None, "slurm"), R.at_once(5, "slurm")]
            == [3, 5, 100, 5])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    monkeypatch.setenv("FLOWREPRO_GPUS", "0")
    assert R.at_once(None, None) == 2  # the cores that this process may use
    assert R.reproduce("smoke", only=["T9"], out=tmp_path, cluster="slurm", dry_run=True) == 0
    assert "to do: 1, 100 at a time" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["share"] == 1


def test_unknown_key(tmp_path):
    write_matrix(tmp_path)
    path = tmp_path / "matrix.yml"
    path.write_text(path.read_text().replace("role:", "rolle:"))
    with pytest.raises(MatrixError, match="did you mean 'role'"):
        R.make_plan("smoke", matrix=path)
    assert go(tmp_path).returncode == 2


@pytest.mark.parametrize("left, told",
                         [(None, "it was not run; see snakemake.log"), ("", "it left no word"),
                          ("ValueError: no\nmore", "ValueError: no")])
def test_reason(tmp_path, left, told):
    if left is not None:
        (tmp_path / "error.txt").write_text(left)
    assert R.reason(tmp_path / "error.txt") == told


FULL = """
import shutil, sys, time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from flowrepro.cli import main
# Snakemake has noted the first run and begun the second
full = lambda log: log.exists() and log.read_text().count("rule run:") > 1
left = lambda out: 2**20 if full(Path(out, "snakemake.log")) else 2**30
shutil.disk_usage = lambda out: namedtuple("usage", "total used free")(2**30, 0, left(out))
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02))  # look before the second has ended
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk_goes_on(tmp_path):
    """A disk that fills after the first of two runs: said with the remedy, the finished run stays, and
    with room again the rest is run."""
    write_matrix(tmp_path)
    command = [sys.executable, "-c", FULL, "reproduce", "--preset", "smoke", "--matrix", "matrix.yml", "--out", "out",
               "--jobs", "1"]
    full = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert full.returncode == 2 and "disk full: 1 MiB free" in full.stderr and "Traceback" not in full.stderr, (
        full.stdout + full.stderr)
    # the second may have made it
    finished = {n: t for n, t in stamps(tmp_path).items() if (tmp_path / "out" / n / "finished").exists()}
    mended = go(tmp_path)
    kept = finished.items() & stamps(tmp_path).items()
    assert (mended.returncode == 0 and kept and f"{len(kept)} of them done" in mended.stdout
            and stamps(tmp_path).keys() == RUNS), mended.stdout + mended.stderr


@pytest.fixture
def small_disk(tmp_path):
    "A function that makes a disk of so many KiB, or changes its size, and returns its folder; for root alone."
    top, made = tmp_path / "disk", []
    top.mkdir()

    def size(kib: int) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{'remount,' * bool(made)}size={kib}k", "tmpfs", str(top)],
                       check=True)
        made.append(kib)
        return top

    yield size
    if made:
        subprocess.run(["umount", str(top)], check=True)


@pytest.mark.slow
def test_a_really_full_disk(small_disk):
    "A file system that fills up during the second run; enlarged, the same command ends the work."
    top = small_disk(300 * 1024)
    write_matrix(top)
    with ThreadPoolExecutor() as pool:
        going = pool.submit(go, top, "--jobs", "1")
        while not going.done() and not [*top.glob("out/*/finished")]:
            time.sleep(0.05)
        small_disk((shutil.disk_usage(top).used + R.RESERVE) // 1024 + 300)  # room for a part of the second run
        full = going.result()
    assert full.returncode == 2 and "disk full" in full.stderr and "Traceback" not in full.stderr, (
        full.stdout + full.stderr)
    done = stamps(top)  # of one run; on a busy machine the disk may have shrunk late, when the second was done too
    small_disk(300 * 1024)
    mended = go(top)
    assert (mended.returncode == 0 and done and f"{len(done)} of them done" in mended.stdout
            and done.items() <= stamps(top).items() and stamps(top).keys() == RUNS), mended.stdout + mended.stderr


@pytest.mark.slow
def test_one_run_on_a_full_disk(small_disk):
    "Without the graph nothing keeps a reserve: the run ends at the full disk, with the remedy and without a number."
    top = small_disk(1024)
    done = subprocess.run([FLOWREPRO, "run", "--preset", "smoke", "--dataset", "toy", "--category", "weave", "--out",
                           "out"], cwd=top, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "disk full; free some" in done.stderr, done.stdout + done.stderr
    assert not [*top.glob("out/*/metrics.json")]


# -- by itself, without Snakemake -----------------------------------------------------------------------------------

def test_seconds_in_words():
    assert [R.said(s) for s in (99.4, 100, 5399, 5400, 36000)] == ["99 s", "2 min", "90 min", "1.5 h", "10.0 h"]


def test_news_of_runs(tmp_path):
    """Each result once, AUROCs that there are, what is left by how fast it went so far; what an earlier call left, or
    a run whose last pictures are not there yet, is no news."""
    watch = R.Watch(tmp_path, list("abcd"), dict(a=30.0, b=10.0, c=20.0, d=60.0), 2)
    assert list(watch.news()) == []
    content = {"results": {"last": {"mean": {"image_auroc": 0.9, "pixel_auroc": None}}},
               "timing": {"features_s": 100.0, "train_s": 20.0, "evaluate_s": 3.0}}
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    (tmp_path / "d/error.txt").write_text("of an earlier call")
    os.utime(tmp_path / "d/error.txt", (10**9, 10**9))
    (tmp_path / "a/finished").touch(), (tmp_path / "c/error.txt").write_text("ValueError: no\nmore")
    watch.began = time.time() - 80  # of the first run and half of another
    assert list(watch.news()) == ["[1/4] a: image AUROC 0.900 (2 min), about 3 min left",
                                  "[2/4] c: FAILED, ValueError: no, about 90 s left"]
    (tmp_path / "b/finished").touch(), (tmp_path / "d/finished").touch()
    *_, last = watch.news()
    assert last == "[4/4] d: image AUROC 0.900 (2 min)" and not list(watch.news())
    assert watch.done == dict(a=True, b=True, c=False, d=True)
    assert R.Watch(tmp_path, ["a"], {}, 1).left() == ""
    unknown = R.Watch(tmp_path, ["a", "b"], {"a": 30.0}, 1)
    unknown.done["a"] = True
    assert unknown.left() == ""  # nobody knows how long b takes


def test_table_on_the_terminal(tmp_path):
    "The first that was made, its measured rows, the last epoch; a published number only beside one that compares."
    own = {"data": "toy", "method": list("abcd"), "image AUROC: last": ["90.00", "80.00", "missing", "not run"],
           "image AUROC: best on test": "95.00", "image AUROC: published": ["98.7 / 98.9 [a]", "97.1 [b]", "96.1", "–"],
           "image AUROC: difference": ["−0.7 / +0.1", "other data", "–", "–"],
           "AUPRO@0.3: last": ["1.00", "2.00", "3.00", "4.00"], "AUPRO@0.3: published": "66.6",
           "AUPRO@0.3: difference": "other data"}
    (tmp_path / "tables").mkdir()
    pd.DataFrame(own).to_csv(tmp_path / "tables/T1.csv", index=False)
    pd.DataFrame(own).to_csv(tmp_path / "tables/T2.csv", index=False)
    said = R.glance(tmp_path, ["T3", "T1", "T2"])
    assert said.startswith("T1, percent, last epoch (3 tables in ")
    assert [line.split() for line in said.splitlines()[2:]] == [
        ["toy", "a", "90.00", "98.7", "/", "98.9", "[a]", "1.00"], ["toy", "b", "80.00", "–", "2.00"]]
    assert R.glance(tmp_path, ["T3"]) == ""
    pd.DataFrame(own)[2:].to_csv(tmp_path / "tables/T4.csv", index=False)
    assert R.glance(tmp_path, ["T4"]) == ""


@pytest.mark.parametrize("change", [{"split": "train"}, {"label": 0}, {"image": "other"}, {"mask": None}])
def test_whatever_of_an_image_changes_is_another_plan(tmp_path, monkeypatch, change):
    "Also a label alone, which VisA has in its split file."
    for name in ("image", "other", "mask"):
        (tmp_path / name).touch()
    plain = dict(split="test", label=1, image="image", mask="mask")
    where = lambda r: r | {k: tmp_path / r[k] for k in ("image", "mask") if r[k]}
    plans = []
    for record in (plain, plain | change):
        monkeypatch.setattr(R, "read", lambda *_, r=record: [SimpleNamespace(**where(r))])
        job = Job("fastflow", "demo", 0, dict(dataset="visa", category="fryum"))
        plans.append(R.images_of([job], {"visa": str(tmp_path)}))
    assert plans[0] != plans[1]


def test_settings_of_a_run_are_in_its_plan(tmp_path):
    "Where the data lie is no setting."
    plain = dict(method="fastflow", altub=False, dataset="toy", category="weave", data_root="here", overrides={})
    own, moved, other = (R.run_entry(Job("fastflow", "demo", 0, plain | change), tmp_path)["settings"]
                         for change in ({}, {"data_root": "there"}, {"overrides": {"epochs": 2}}))
    assert own == moved != other


def test_tables_of_a_notebook_that_failed_are_old(tmp_path):
    "Those that an earlier call has left are not shown as made by this one."
    plan = {"out": str(tmp_path), "notebooks": {"hgad_tables": {"parameters": {"only": "T5,F4"}},
                                                "ablations": {"parameters": {"only": "T7"}}}}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/ablations.done").touch()
    assert R.wanted_tables(plan) == ["T7"]


def test_what_failed(tmp_path):
    "Each run that began and has no result, how many did not begin, each notebook that was not done."
    for name in "abcdefg":
        (tmp_path / name).mkdir()
    for file in ("a/metrics.json", "b/error.txt", "c/run.ipynb", "notebooks/x.done", "notebooks/y.error.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("why")
    lines = R.failures({"out": str(tmp_path), "runs": dict.fromkeys("abcdefg"), "notebooks": dict.fromkeys("xyz")})
    assert [line.partition(": ")[0] for line in lines[:2]] == ["b", "c"] and lines[0] == "b: why"
    assert lines[1].endswith(f"(executed notebook: {tmp_path / 'c/run.ipynb'})")
    assert lines[2].startswith("4 not begun") and lines[2].endswith("why: d, e, f and 1 more")
    assert [line.partition(" (")[0] for line in lines[3:]] == ["y: why", "z: it was not run; see snakemake.log"]


def test_runs_of_another_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "revision", lambda: "new")
    for name, made in (("a", "old"), ("b", "new"), ("c", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"environment": {"revision": made}}))
    plan = {"out": str(tmp_path)}
    told = R.other_revisions(plan, list("abcd"))
    assert told.startswith("2 finished runs are of revision old, now it is new") and "to make them anew" in told
    assert R.other_revisions(plan, list("bd")) == ""


def test_estimate_of_what_is_to_do(tmp_path):
    "Several at a time share the seconds; a run without past timings is counted, not guessed."
    plan = R.make_plan("smoke", only=["T1"], out=tmp_path)
    names = list(plan["runs"])[:3]
    said = R.describe(plan, names, dict(zip(names, (100.0, 50.0))), 2)
    assert "to do: 3, 2 at a time; about 75 s by past timings, not counting 1 that never ran" in said
    assert "to do" not in R.describe(plan, [], {}, 2)


def test_one_job(tmp_path, monkeypatch):
    "Exit code and marks are of this call, what an earlier one left is removed; an interrupt leaves its word, too."
    plan = {"cwd": str(tmp_path), "out": "out", "share": 1, "cluster": None, "runs": {"a": {"parameters": {}}},
            "notebooks": {"n": {"parameters": {}}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "out/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWREPRO_GPUS", "0")
    marks = lambda: sorted(p.name for p in (tmp_path / "out/a").iterdir())
    for problem in (None, ValueError("no"), None, KeyboardInterrupt("stop")):
        def notebook(parameters, engine):
            assert marks() == []
            if problem:
                raise problem

        monkeypatch.setattr(R, "run_notebook", notebook)
        assert R.execute("plan.json", "a") == (1 if problem else 0)
        assert marks() == (["error.txt"] if problem else ["finished"])
    assert (tmp_path / "out/a/error.txt").read_text() == "KeyboardInterrupt: stop\n"
    monkeypatch.setattr(R, "execute_notebook", lambda *_: 1 / 0)
    assert R.execute("plan.json", "n", notebook=True) == 1
    assert (tmp_path / "out/notebooks/n.error.txt").read_text().startswith("ZeroDivisionError")


def test_plan_of_notebooks(tmp_path):
    "Each draws its outputs of their own runs alone, of the preset's seeds or those asked for, with its own inputs."
    plan = R.make_plan("demo", only=["t1", "T9"], out="x")
    assert [e["parameters"]["only"] for e in plan["notebooks"].values()] == ["T1", "T9"]
    for e in plan["notebooks"].values():
        only = e["parameters"]["only"]
        assert e["runs"] == [n for n, run in plan["runs"].items() if only in run["outputs"]] != []
        assert e["parameters"]["seeds"] == load_matrix()["presets"]["demo"]["seeds"]
    again = R.make_plan("demo", only=["T1", "F1"], seeds=2, out="x")["notebooks"]
    assert {e["parameters"]["seeds"] for e in again.values()} == {2}
    published = {n: any(p.endswith(".csv") for p in e["inputs"]) for n, e in again.items()}
    assert published == {"altub_tables": True, "altub_figures": False}
    with_second(tmp_path, "btad/each")
    few = R.make_plan("smoke", put(tmp_path / "data", "btad/01"), out="x", matrix=tmp_path / "matrix.yml")
    assert len(few["runs"]) == 4 and few["lacking"] == {}  # preset paper alone is of whole data sets
    real = R.make_plan("real", out="x", matrix=write_matrix(tmp_path))["runs"].values()
    assert {e["minutes"] for e in real} == {1440}
    assert {e["minutes"] for e in plan["runs"].values()} == {60}
    assert plan["mem_mb"] < R.make_plan("paper", only=["T1"], out="x")["mem_mb"]


def test_another_image_of_the_same_name_is_another_plan(tmp_path):
    "And another mask; so a run is made again."
    data, m = put(tmp_path / "data", "mvtec_ad/bottle", good="good"), load_matrix()
    m["presets"]["smoke"]["first"] = ["mvtec/bottle"]
    (tmp_path / "m.yml").write_text(yaml.safe_dump(m))
    seen, dots = set(), Image.frombytes("L", (8, 8), bytes(255 * (i % 3 == 0) for i in range(64)))
    for changed in (None, "test/ko/0000.png", "ground_truth/ko/0001.png"):
        if changed:
            dots.save(data / "mvtec_ad/bottle" / changed)
        plan = R.make_plan("smoke", data, ["T1"], out=tmp_path / "out", matrix=tmp_path / "m.yml")["runs"]
        seen.add(tuple(e["content"] for e in plan.values()))
    assert len(seen) == 3


def test_runs_of_other_settings_are_made_again(tmp_path, monkeypatch):
    "Their results are removed before the work, as Snakemake would take them; jobs share the GPUs that there are."
    monkeypatch.setenv("FLOWREPRO_GPUS", "2")
    path, out, seen = write_matrix(tmp_path), tmp_path / "out", []
    for name in RUNS:
        (out / name).mkdir(parents=True)
        (out / name / "metrics.json").write_text("{}")
    for name, fake in dict(to_do=lambda *_: [], made_otherwise=lambda folder, _: "altub" in str(folder),
                           read_runs=lambda _: [], report=lambda _: out / "report.html",
                           work=lambda plan, file, todo, *_: seen.append((plan["share"], todo, stamps(tmp_path).keys()))
                           or 0).items():
        monkeypatch.setattr(R, name, fake)
    assert R.reproduce("smoke", out=out, matrix=path, jobs=5) == 0
    changed = "fastflow-altub-toy-weave-smoke-0"
    assert seen == [(3, [changed], RUNS - {changed})]


@pytest.mark.parametrize("missing, lacking, failed, code", [
    ({}, {}, [], 0), ({}, {}, ["a: why"], 1), ({"a": ["mvtec"]}, {}, [], 1), ({}, {"btad": ["02"]}, [], 1)])
def test_what_is_missing_is_no_success(missing, lacking, failed, code, tmp_path, monkeypatch, capsys):
    "In the exit code, whether a run failed, its data are not there, or only a part of them."
    monkeypatch.setattr(R, "drive", lambda *_: 0)
    monkeypatch.setattr(R, "failures", lambda _: failed)
    plan = {"out": str(tmp_path), "missing": missing, "lacking": lacking, "notebooks": {}}
    assert R.work(plan, tmp_path / "plan.json", [], {}, 1, "slurm", 0) == code
    assert ("nothing to do: every run is there" in capsys.readouterr().out) == (code == 0)


def test_locks_and_signals(tmp_path, monkeypatch):
    "One call a folder; a request to terminate is an interrupt within the work alone, and in the main thread alone."
    with R.only_one(tmp_path):
        with pytest.raises(ValueError, match="another flowrepro reproduce works in this folder"):
            with R.only_one(tmp_path):
                pass
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with R.terminable():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: R.terminable().__enter__()).result()


def test_gpus_of_a_job(tmp_path, monkeypatch):
    "A cluster gives each job its own, so none is taken; without any it is told of none; a single one is each run's."
    plan = {"cwd": str(tmp_path), "out": "out", "share": 1, "cluster": "slurm", "runs": {"a": {"parameters": {}}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(R, "one_gpu", lambda *_: pytest.fail("a GPU is taken"))
        m.setattr(R, "run_notebook", lambda *_, **__: None)
        assert R.execute("plan.json", "a") == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count in (0, 1):
        monkeypatch.setenv("FLOWREPRO_GPUS", str(count))
        with R.one_gpu(tmp_path) as i:
            assert i == (0 if count else None)
        assert R.job_gpus([]) == count


def test_past_seconds_are_of_every_stage(tmp_path):
    write_past(tmp_path / "fastflow-toy-weave-demo-0", 70.0)
    content = json.loads((tmp_path / "fastflow-toy-weave-demo-0/metrics.json").read_text())
    content["timing"] |= {"features_s": 20.0, "evaluate_s": 3.0}
    (tmp_path / "fastflow-toy-weave-demo-0/metrics.json").write_text(json.dumps(content))
    assert set(R.past_seconds([tmp_path]).values()) == {93.0}


def test_room_that_is_kept(tmp_path, monkeypatch):
    "Less than the reserve is a full disk, as much as it is not."
    for free in (R.RESERVE, R.RESERVE - 1):
        monkeypatch.setattr(R.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        if free == R.RESERVE:
            R.room(tmp_path)
        else:
            with pytest.raises(OSError, match="free some .what lies in .*features is .* or give another --out"):
                R.room(tmp_path)


@pytest.mark.parametrize("gone", ["figures/F3.svg", "figures/F3.png", "figures/F3.md", "tables/T1.csv",
                                  "tables/T1.values.csv", "tables/T1.md", "tables/T1.tex", "tables/T1.html"])
def test_whatever_was_removed_is_drawn_again(gone, tmp_path):
    "Any file of a table or figure has its notebook done again; a figure without runs has no drawing to miss."
    entry = lambda only: {"parameters": {"only": only}}
    plan = {"out": str(tmp_path), "notebooks": {"tables": entry("T1"), "figures": entry("F3,F4")}}
    kinds = {"tables/T1": ("csv", "values.csv", "md", "tex", "html"), "figures/F3": ("md", "svg", "png")}
    for name in ("tables", "figures", "notebooks"):
        (tmp_path / name).mkdir()
    for stem, endings in kinds.items():
        for ending in endings:
            (tmp_path / f"{stem}.{ending}").write_text("**F3. What?** Drawn.")
    (tmp_path / "figures/F4.md").write_text(FIGURES["F4"]([], load_matrix(), "smoke").caption)
    done = {name: tmp_path / f"notebooks/{name}.done" for name in plan["notebooks"]}
    for path in done.values():
        path.touch()
    R.undrawn(plan)
    assert all(path.exists() for path in done.values())
    (tmp_path / gone).unlink()
    R.undrawn(plan)
    assert [name for name, path in done.items() if not path.exists()] == [gone.partition("/")[0]]
