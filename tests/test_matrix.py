"The matrix: what the file may say, which runs it comes to, and which runs a table takes."
import copy
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from flowrepro.data import OFFICIAL, DataError
from flowrepro.matrix import (
    MATRIX, SHOWN, MatrixError, belongs, check_once, chosen, command_of, commands, find_roots, first_seeds, jobs_of,
    load_matrix, parameters_of, select, sets_of, variant_of
)
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
    assert {j.parameters["category"] for j in jobs} == set(OFFICIAL["btad"])
    assert all(j.missing == ["btad"] for j in jobs)


def test_union_root(tmp_path):
    (tmp_path / "mvtec_ad").mkdir(), (tmp_path / "visa").mkdir()
    (job,) = jobs_of(M, "real", find_roots(tmp_path), ["T9"], 1)
    assert job.parameters["dataset"] == "union"
    assert job.parameters["data_root"] == f"mvtec={tmp_path / 'mvtec_ad'},visa={tmp_path / 'visa'},toy="
    assert not job.missing


def test_union_root_with_a_comma(tmp_path):
    "The parts of a union are parted by commas: another path is named, not taken for a data set."
    for name in ("mvtec", "visa"):
        (tmp_path / "a,b" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="a,b/mvtec: a union .* rename the folder"):
        jobs_of(M, "real", find_roots(tmp_path / "a,b"), ["T9"])


def test_data_are_read_once(monkeypatch):
    "However many tables and seeds need its categories."
    read = []
    monkeypatch.setattr("flowrepro.matrix.read",
                        lambda dataset, root: read.append(dataset) or [SimpleNamespace(category="bottle")])
    jobs = jobs_of(M, "paper", {"mvtec": "x", "btad": "y"})
    assert sorted(read) == ["btad", "mvtec"] and {j.parameters["category"] for j in jobs} == {"bottle", "all"}


def test_wrong_root(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_roots(tmp_path / "none")


def broken(change) -> dict:
    m = copy.deepcopy(M)
    change(m)
    return m


def put(*keys, value):
    "A change of a matrix: the value at some keys."
    def change(m):
        for k in keys[:-1]:
            m = m[k]
        m[keys[-1]] = value
    return change


def drop(*keys):
    "A change of a matrix: without the value at some keys."
    def change(m):
        for k in keys[:-1]:
            m = m[k]
        del m[keys[-1]]
    return change


MISSPELT = {
    "section": (put("variant", value={}), "did you mean 'variants'"),
    "section empty": (put("variants", value=None), "variants: must be a mapping"),
    "variant": (put("variants", "hgad", "overides", value={}), "variants: hgad: .*did you mean 'overrides'"),
    "variant empty": (put("variants", "cflow", value=None), "variants: cflow: must be a mapping with title, method"),
    "variant name": (put("variants", 1, value={"title": "x", "method": "cflow"}), "variants: must be names"),
    "no title": (drop("variants", "cflow", "title"), "variants: cflow: title is missing"),
    "no method": (drop("variants", "cflow", "method"), "variants: cflow: method is missing"),
    "title": (put("variants", "cflow", "title", value=3), "cflow: title: must be a text"),
    "title blank": (put("variants", "cflow", "title", value=" "), "cflow: title: must be a text"),
    "method": (put("variants", "cflow", "method", value="cflw"),
               "cflow: method: 'cflw' is unknown; did you mean 'cflow'"),
    "altub": (put("variants", "cflow-altub", "altub", value="yess"),
              "cflow-altub: altub: must be true or false, not 'yess'"),
    "altub as a number": (put("variants", "cflow-altub", "altub", value=1), "altub: must be true or false, not 1"),
    "overrides": (put("variants", "cflow", "overrides", value=["epochs"]), "cflow: overrides: must be a mapping"),
    "setting": (put("variants", "altub-mean", "overrides", value={"sclae": False}),
                "altub-mean: overrides: override 'sclae' is unknown: did you mean .*scale"),
    "setting of none": (put("variants", "new", value={"title": "x", "method": "hgad", "overrides": {"centrs": 2}}),
                        "new: overrides: override 'centrs' is unknown: did you mean centres"),
    "value": (put("variants", "cflow", "overrides", value={"epochs": "many"}), "variants: cflow: overrides"),
    "role": (put("outputs", "T1", "role", value="frist"), "did you mean 'first'"),
    "no role": (drop("outputs", "T1", "role"), "outputs: T1: role is missing"),
    "name": (lambda m: m["outputs"]["T1"]["variants"].append("fastflo"), "did you mean 'fastflow"),
    "no variants": (drop("outputs", "T1", "variants"), "outputs: T1: variants is missing"),
    "variants": (put("outputs", "T1", "variants", value="hgad"), "T1: variants: must be a list"),
    "variants empty": (put("outputs", "T1", "variants", value=[]), "T1: variants: must be a list"),
    "variants' kind": (put("outputs", "T1", "variants", value=["fastflow", 1]), "T1: variants: must be a list"),
    "variant twice": (lambda m: m["outputs"]["T1"]["variants"].append("fastflow"), "T1: variants: must be each once"),
    "notebook": (put("outputs", "T1", "notebook", value="altub_table"),
                 "T1: notebook: 'altub_table' is unknown; did you mean 'altub_tables'"),
    "run notebook": (put("outputs", "T1", "notebook", value="run"),
                     "T1: notebook: 'run' is unknown; allowed: ablations, "),
    "preset": (put("presets", "demo", "unifed", value=[]), "did you mean 'unified'"),
    "no seeds": (drop("presets", "demo", "seeds"), "presets: demo: seeds is missing"),
    "seeds": (put("presets", "demo", "seeds", value="one"), "demo: seeds: must be a whole number from 1, not 'one'"),
    "no seed": (put("presets", "demo", "seeds", value=0), "demo: seeds: must be a whole number"),
    "seeds as a word": (put("presets", "demo", "seeds", value=True), "demo: seeds: must be a whole number"),
    "run preset": (put("presets", "dmo", value={"seeds": 1, "first": ["toy/weave"]}),
                   "dmo: first: preset: 'dmo' is unknown; did you mean 'demo'"),
    "role's key": (put("presets", "real", "ablation", value={"data": ["toy/weave"], "prset": "demo"}),
                   "real: ablation: 'prset' is unknown; did you mean 'preset'"),
    "role's data": (put("presets", "real", "ablation", value={"dta": ["toy/weave"], "preset": "demo"}),
                    "real: ablation: 'dta' is unknown; did you mean 'data'"),
    "role without data": (put("presets", "real", "ablation", value={"preset": "demo"}),
                          "real: ablation: data is missing"),
    "role's preset": (put("presets", "real", "ablation", value={"data": ["toy/weave"], "preset": "dmo"}),
                      "ablation: preset: 'dmo' is unknown; did you mean 'demo'"),
    "role's form": (put("presets", "demo", "second", value="toy/bolt"), "demo: second: must be a list"),
    "no category": (put("presets", "demo", "second", value=["toy"]),
                    "demo: second: must be DATASET/CATEGORY.*not 'toy'"),
    "data set": (put("presets", "demo", "second", value=["toyy/bolt"]),
                 "second: 'toyy' is unknown; did you mean 'toy'"),
    "part": (put("presets", "real", "unified", value=["mvtec+vsa/all"]),
             "unified: 'vsa' is unknown; did you mean 'visa'"),
    "category": (put("presets", "demo", "second", value=["toy/blt"]), "second: 'blt' is unknown; did you mean 'bolt'"),
    "union": (put("presets", "real", "unified", value=["mvtec+visa/each"]), "unified: must be mvtec.visa/all"),
    "all beside one": (put("presets", "demo", "first", value=["toy/weave", "toy/all"]),
                       "first: must be toy/all alone, or its rows are mixed with others"),
    "part twice": (put("presets", "real", "unified", value=["mvtec+mvtec/all"]), "unified: must be each data set once"),
    "pattern's kind": (put("presets", "smoke", "overrides", value={1: {"epochs": 2}}),
                       "smoke: overrides: must be names of variants"),
    "pattern": (put("presets", "smoke", "overrides", value={"altub-epoch": {"altub.every": 2}}),
                "smoke: overrides: 'altub-epoch' is unknown; did you mean 'altub-epochs'"),
    "one pattern": (put("presets", "smoke", "overrides", value={"cflow* hgda*": {"epochs": 2}}),
                    "smoke: overrides: 'hgda\\*' is unknown"),
    "pattern's setting": (put("presets", "smoke", "overrides", value={"cflow*": {"epoch": 2}}),
                          "cflow: overrides, with those of presets: smoke: override 'epoch' is unknown: "
                          "did you mean .*epochs"),
    "pattern empty": (put("presets", "smoke", "overrides", value={"cflow*": None}),
                      "smoke: overrides: cflow.: must be a mapping"),
}


@pytest.mark.parametrize("change, named", MISSPELT.values(), ids=MISSPELT)
def test_misspelt(tmp_path, change, named):
    path = tmp_path / "experiments.yml"
    path.write_text(yaml.safe_dump(broken(change)))
    with pytest.raises(MatrixError, match=named) as error:
        load_matrix(path)
    assert str(path) in str(error.value)


def test_what_one_preset_allows(tmp_path):
    """Settings that only the preset that runs a variant takes, a preset of another name,
    and a variant that nothing runs."""
    path, m = tmp_path / "experiments.yml", copy.deepcopy(M)
    # paper's preset alone rotates
    m["variants"]["cflow-copies"] = {"title": "four copies", "method": "cflow", "overrides": {"features.copies": 4}}
    m["outputs"] = {"T2": {"notebook": "altub_tables", "role": "second", "variants": ["cflow-copies"]}}
    m["presets"] = {"paper": {"seeds": 1, "second": ["mvtec/own"]},
                    "mine": {"seeds": 1, "first": {"data": ["toy/each"], "preset": "demo"}}}
    path.write_text(yaml.safe_dump(m))
    (job,) = jobs_of(load_matrix(path), "paper", find_roots(None))
    assert job.missing == ["mvtec"]


@pytest.mark.parametrize("text", ["a: [", "a list", ""], ids=["yaml", "text", "empty"])
def test_no_matrix(tmp_path, text):
    (tmp_path / "m.yml").write_text(text)
    with pytest.raises(MatrixError, match="m.yml"):
        load_matrix(tmp_path / "m.yml")


@pytest.mark.parametrize("call", [lambda: jobs_of(M, "dmeo", {}), lambda: jobs_of(M, "demo", {}, ["T10"])])
def test_unknown_words(call):
    with pytest.raises(MatrixError, match="did you mean"):
        call()


@pytest.mark.parametrize("preset", ["smoke", "demo", "paper"])
def test_one_number_changed_is_changed(preset):
    "At no preset does a row of T7 or T8 configure as HGAD does, though what is published is that preset's own."
    parameters = {j.variant: j.parameters | {"data_root": None, "seed": 0}
                  for j in jobs_of(M, preset, find_roots(None), ["T7", "T8"], 1)}
    settings = {v: asdict(configure(p | {"dataset": "toy"}))["settings"] for v, p in parameters.items()}
    assert len(settings) > 10
    assert not [v for v, s in settings.items() if v != "hgad" and s == settings["hgad"]]


def test_select_takes_its_own():
    "A run belongs to an output by variant, data and preset; the order is that of the variants."
    as_run = lambda j: {"path": Path("x") / j.name, "config": j.parameters}
    runs = [as_run(j) for p in ("smoke", "demo") for j in jobs_of(M, p, {"toy": None})]
    for output in M["outputs"]:
        own = select(runs, M, "demo", output)
        assert {r["path"].name for r in own} == {j.name for j in jobs_of(M, "demo", {"toy": None}, [output])}
    assert [r["path"].name.split("-toy")[0] for r in select(runs, M, "demo", "T7")] == M["outputs"]["T7"]["variants"]
    assert not belongs(runs[0], M, "demo", "T1")


def test_variant_with_the_name_of_the_data_in_it():
    config = dict(dataset="toy", category="weave", preset="demo", seed=0)
    assert variant_of({"path": "runs/fastflow-toy-wide-toy-weave-demo-0", "config": config}) == "fastflow-toy-wide"


def test_two_unions_of_one_name():
    m = load_matrix()
    m["presets"]["demo"]["further"] = ["mvtec+visa/all", "mvtec+btad/all"]
    with pytest.raises(MatrixError, match=r"mvtec\+btad and of mvtec\+visa would have one folder, .*union-all-demo-0"):
        jobs_of(m, "demo", {"mvtec": "A", "visa": "B", "btad": "C"}, ["T6"])


def test_a_run_twice_below_a_folder(tmp_path):
    config = dict(dataset="toy", category="weave", preset="demo", seed=0)
    runs = [{"path": tmp_path / top / "fastflow-toy-weave-demo-0", "config": config} for top in ("a", "b")]
    with pytest.raises(MatrixError, match="a/fastflow.* and .*b/fastflow.* are the same run: give the folder"):
        select(runs, M, "demo", "T1")


@pytest.mark.parametrize("seeds", ["1", -1, True])
def test_seeds_that_are_no_number(seeds):
    with pytest.raises(MatrixError, match="seeds: must be a whole number from 0"):
        first_seeds(M, "demo", [], seeds)


def test_command_of_is_what_configure_takes():
    import json
    import shlex

    job = next(j for j in jobs_of(M, "demo", {"toy": None}) if j.variant == "altub-rate-fixed")
    words = shlex.split(command_of(job, "runs"))
    given = {words[i + 1]: words[i + 2] for i, w in enumerate(words) if w == "-p"}
    assert json.loads(given["overrides"]) == {"altub.factor": None, "altub.lr": 0.05} and given["altub"] == "True"
    assert given["out_dir"] == f"runs/{job.name}" and MATRIX.exists()


def test_chosen_in_the_order_of_the_matrix():
    "Small letters, spaces and a comma too many are no fault; no name stands for all."
    assert chosen(" f3,f1,, ", M, "altub_figures") == ["F1", "F3"]
    assert chosen("", M, "altub_figures") == ["F1", "F2", "F3"]


def test_chosen_refuses_what_is_not_its_own():
    with pytest.raises(MatrixError, match="F4"):
        chosen("F4", M, "altub_figures")
    with pytest.raises(MatrixError, match="allowed: F4, F5, F6, F7"):
        chosen("map", M, "hgad_figures")


@pytest.mark.parametrize("old, new, said", [
    ("variants:\n", "variants:\n  hgad: {title: X, method: fastflow}\n", "'hgad' is there twice"),
    ("title: FastFlow, method: fastflow}", "title: FastFlow, method: fastflow, method: cflow}", "'method' is there twice"),
    ("outputs:\n", "outputs:\n  T77: {notebook: altub_tables, role: first, variants: [fastflow]}\n", "T77"),
    ("T1: {notebook: altub_tables", "T1: {notebook: hgad_tables", "T1"),
])
def test_matrix_that_would_lose_something(tmp_path, old, new, said):
    (tmp_path / "m.yml").write_text(MATRIX.read_text().replace(old, new, 1))
    with pytest.raises(MatrixError, match=said):
        load_matrix(tmp_path / "m.yml")


def test_matrix_without_the_run_that_a_table_compares_with(tmp_path):
    text = json.dumps(yaml.safe_load(MATRIX.read_text())).replace('"hgad"', '"mine"')
    m = json.loads(text.replace('"method": "mine"', '"method": "hgad"'))
    (tmp_path / "m.yml").write_text(yaml.safe_dump(m, sort_keys=False))
    with pytest.raises(MatrixError, match="hgad"):
        load_matrix(tmp_path / "m.yml")


def test_matrix_of_another_encoding(tmp_path):
    (tmp_path / "m.yml").write_bytes("variants: {ü: 1}".encode("latin1"))
    with pytest.raises(MatrixError, match="m.yml"):
        load_matrix(tmp_path / "m.yml")


def test_a_name_that_is_there_twice_is_told_with_its_line():
    with pytest.raises(MatrixError, match="'a' is there twice, again in line 3"):
        check_once(yaml.compose("a: 1\nb: 2\na: 3\n"), "m")


def test_two_merges():
    "Lose nothing."
    check_once(yaml.compose("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n", Loader=yaml.SafeLoader), "m")


@pytest.mark.parametrize("table, variant", [("T4", "fastflow-altub"), ("T7", "hgad-single"), ("T7", "hgad"),
                                            ("T8", "hgad")])
def test_matrix_whose_table_lacks_its_reference(table, variant, tmp_path):
    m = yaml.safe_load(MATRIX.read_text())
    m["outputs"][table]["variants"].remove(variant)
    (tmp_path / "m.yml").write_text(yaml.safe_dump(m, sort_keys=False))
    with pytest.raises(MatrixError, match=f"{table}: variants: compares with one named '{variant}'"):
        load_matrix(tmp_path / "m.yml")


def test_folders_by_their_usual_names(tmp_path):
    "Whatever the case and the marks between; a file of that name is none."
    (tmp_path / "MVTec-AD").mkdir(), (tmp_path / "BTech_Dataset_transformed").mkdir(), (tmp_path / "visa").touch()
    assert find_roots(tmp_path) == {"toy": None, "mvtec": str(tmp_path / "MVTec-AD"),
                                    "btad": str(tmp_path / "BTech_Dataset_transformed")}


def test_every_pattern_that_names_a_variant_counts():
    "A later one of the preset over an earlier one, in what both change, and over the variant's own."
    own = {"hgad*": {"epochs": 3, "lr": 0.5}, "cflow hgad": {"epochs": 4}}
    m = broken(put("presets", "demo", "overrides", value=own))
    m["variants"]["hgad"]["overrides"] = {"epochs": 2, "batch": 6}
    assert parameters_of(m, "hgad", "demo")["overrides"] == {"epochs": 4, "batch": 6, "lr": 0.5}


def test_each_category_is_not_all():
    "One model for all categories is no run of an output that has one model for each."
    m = broken(put("presets", "demo", "first", value=["toy/each"]))
    run = lambda c: {"path": f"x/fastflow-toy-{c}-demo-0",
                     "config": dict(dataset="toy", data_root=None, category=c, preset="demo", seed=0)}
    assert belongs(run("bolt"), m, "demo", "T1") and not belongs(run("all"), m, "demo", "T1")


def test_an_output_is_named_once_by_a_run():
    m = broken(put("presets", "demo", "first", value=["toy/each", "toy/weave"]))
    jobs = jobs_of(m, "demo", {"toy": None}, ["T1"])
    assert len({j.name for j in jobs}) == len(jobs) and all(j.outputs == ["T1"] for j in jobs)


def test_seeds_of_first_seeds():
    "So many from seed 0 on; with 0, all that are there."
    runs = [{"config": {"seed": s}} for s in range(4)]
    assert first_seeds(M, "demo", runs, 0) == (M, runs)
    m, own = first_seeds(M, "demo", runs, 2)
    assert own == runs[:2] and m["presets"]["demo"]["seeds"] == 2


def test_commands_for_what_is_missing():
    "The first few, how many more, and the whole graph, which is told of the data if any of the runs needs some."
    jobs = jobs_of(M, "demo", {"toy": None}, ["T1"])[:SHOWN]
    other = jobs_of(M, "paper", {}, ["T2"], 1)[:1]
    assert commands([], "T1", "demo", "out", M) == [] and len(jobs) == SHOWN
    assert commands(jobs, "T1", "demo", "my out", M)[SHOWN:] == [
        f"# the whole graph: flowrepro reproduce --preset demo --seeds {M['presets']['demo']['seeds']} --out 'my out'"]
    more = first_seeds(M, "demo", [], 7)[0] | {"file": "m.yml"}
    assert commands([*jobs, *other], "T1", "demo", "out", more)[SHOWN:] == [
        "# and 1 more for T1; the whole graph: flowrepro reproduce --preset demo --data-root DATA --seeds 7 "
        "--matrix m.yml --out out"]


def test_names_that_are_written_otherwise():
    "A folder that was renamed at its end keeps its variant; spaces in a union's root are no part of a name."
    config = dict(dataset="toy", category="weave", preset="demo", seed=0)
    assert variant_of({"path": "runs/fastflow-altub-toy-weave-demo-0-old", "config": config}) == "fastflow-altub"
    assert sets_of({"dataset": "union", "data_root": "mvtec=a, visa = b"}) == ["mvtec", "visa"]
