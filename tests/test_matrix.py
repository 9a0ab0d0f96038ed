"The matrix: what the file may say, which runs it comes to, and which runs a table takes."
import copy
from pathlib import Path

import pytest
import yaml

from flowrepro.data import OFFICIAL, DataError
from flowrepro.matrix import MATRIX, MatrixError, belongs, chosen, find_roots, jobs_of, load_matrix, papermill_line, select
from flowrepro.runs import configure

M = load_matrix()


@pytest.mark.parametrize("preset", M["presets"])
def test_every_job_is_a_run(preset, tmp_path):
    "Each job's parameters pass `configure`: no override is misspelt, none contradicts another."
    jobs = {(j.variant, str(j.parameters["overrides"])): j for j in jobs_of(M, preset, find_roots(None), seeds=1)}
    for j in jobs.values():
        configure(j.parameters | {"data_root": j.parameters["data_root"] or "somewhere", "out_dir": str(tmp_path)})


def test_names_are_unique_and_shared():
    jobs = jobs_of(M, "demo", {"toy": None})
    assert len({j.name for j in jobs}) == len(jobs)
    needs = {o: {j.name for j in jobs if o in j.outputs} for o in M["outputs"]}
    assert all(needs.values()) and needs["F4"] < needs["T5"] and needs["T3"] == needs["F1"]


def test_seeds_and_only():
    assert {j.seed for j in jobs_of(M, "demo", {"toy": None}, ["T1"], 3)} == {0, 1, 2}
    assert {o for j in jobs_of(M, "demo", {"toy": None}, ["T9"]) for o in j.outputs} == {"T9"}


def test_official_categories_where_data_are_missing():
    jobs = jobs_of(M, "paper", {"toy": None}, ["T2"], 1)
    assert {j.parameters["category"] for j in jobs} == set(OFFICIAL["btad"]) and all(j.missing == ["btad"] for j in jobs)


def test_union_root(tmp_path):
    (tmp_path / "mvtec_ad").mkdir(), (tmp_path / "visa").mkdir()
    (job,) = jobs_of(M, "real", find_roots(tmp_path), ["T9"], 1)
    assert job.parameters["dataset"] == "union" and job.parameters["data_root"] == f"mvtec={tmp_path / 'mvtec_ad'},visa={tmp_path / 'visa'},toy=" and not job.missing


def test_wrong_root(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_roots(tmp_path / "none")


def broken(change) -> dict:
    m = copy.deepcopy(M)
    change(m)
    return m


@pytest.mark.parametrize("change, named", [
    (lambda m: m["variants"]["hgad"].update(overides={}), "did you mean 'overrides'"),
    (lambda m: m["outputs"]["T1"].update(role="frist"), "did you mean 'first'"),
    (lambda m: m["outputs"]["T1"]["variants"].append("fastflo"), "did you mean 'fastflow"),
    (lambda m: m["presets"]["demo"].update(unifed=[]), "did you mean 'unified'"),
    (lambda m: m.update(variant={}), "did you mean 'variants'"),
], ids=["variant", "role", "name", "preset", "section"])
def test_misspelt(tmp_path, change, named):
    path = tmp_path / "experiments.yml"
    path.write_text(yaml.safe_dump(broken(change)))
    with pytest.raises(MatrixError, match=named) as error:
        load_matrix(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "a list", ""], ids=["yaml", "text", "empty"])
def test_no_matrix(tmp_path, text):
    (tmp_path / "m.yml").write_text(text)
    with pytest.raises(MatrixError, match="m.yml"):
        load_matrix(tmp_path / "m.yml")


@pytest.mark.parametrize("call", [lambda: jobs_of(M, "dmeo", {}), lambda: jobs_of(M, "demo", {}, ["T10"])])
def test_unknown_words(call):
    with pytest.raises(MatrixError, match="did you mean"):
        call()


def test_select_takes_its_own():
    "A run belongs to an output by variant, data and preset; the order is that of the variants."
    as_run = lambda j: {"path": Path("x") / j.name, "config": j.parameters}
    runs = [as_run(j) for p in ("smoke", "demo") for j in jobs_of(M, p, {"toy": None})]
    for output in M["outputs"]:
        own = select(runs, M, "demo", output)
        assert {r["path"].name for r in own} == {j.name for j in jobs_of(M, "demo", {"toy": None}, [output])}
    assert [r["path"].name.split("-toy")[0] for r in select(runs, M, "demo", "T7")] == M["outputs"]["T7"]["variants"]
    assert not belongs(runs[0], M, "demo", "T1")


def test_papermill_line_is_what_configure_takes():
    import json
    import shlex

    job = next(j for j in jobs_of(M, "demo", {"toy": None}) if j.variant == "altub-rate-fixed")
    words = shlex.split(papermill_line(job, "runs"))
    given = {words[i + 1]: words[i + 2] for i, w in enumerate(words) if w == "-p"}
    assert json.loads(given["overrides"]) == {"altub.factor": None, "altub.lr": 0.05} and given["altub"] == "True"
    assert given["out_dir"] == f"runs/{job.name}" and MATRIX.exists()


def test_chosen_refuses_what_is_not_its_own():
    with pytest.raises(MatrixError, match="F4"):
        chosen("F4", M, "altub_figures")
    with pytest.raises(MatrixError, match="allowed: F4, F5, F6, F7"):
        chosen("map", M, "hgad_figures")
