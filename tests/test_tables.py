"""The tables of the papers: numbers against made-up runs, what may be compared with a
paper, what is missing, the files written."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, run_experiment
from flowrepro.data import OFFICIAL
from flowrepro.matrix import DATA_FOLDERS, command_of, find_roots, jobs_of, load_matrix, run_folder, variant_of
from flowrepro.reports import headline, last_epochs, output_maker, read_runs, summary, unified
from flowrepro.cli import print_published
from flowrepro.comparisons import TABLES, beside_papers, measured, measured_on, of_other_seeds, published, setting_note, steadiness
from flowrepro.tables import HEADLINE, METRICS, Table, as_html, as_latex, as_markdown, as_published

MATRIX = load_matrix()
TOYS = ("biscuit", "bolt", "speckle", "weave")


def write_run(root: Path, variant: str, dataset: str = "toy", category: str = "weave", seed: int = 0,
              preset: str = "demo", last: float = 0.9, best: float = 0.95,
              backbone: str = "resnet18", images: dict[str, int] | None = None) -> None:
    "A run folder with the files that tables read; every metric has the value `last` in the last epoch."
    names = TOYS if category == "all" else (category,)
    result = lambda v: {c: dict.fromkeys(METRICS, v) for c in (*names, "mean")}
    entry, folder = MATRIX["variants"][variant], root / run_folder(variant, dataset, category, preset, seed)
    folder.mkdir(parents=True)
    mixture = entry["method"] == "hgad" and variant != "hgad-single"
    config = dict(method=entry["method"], altub=entry.get("altub", False), dataset=dataset, data_root="data",
                  category=category, preset=preset, seed=seed,
                  settings={"backbone": {"name": backbone}, "detector": {"class_mode": "inferred"} if mixture else {}})
    results = ({"last": result(last), "best": result(best)}
               | ({"last_by_class_mode": {"known": result(last + 0.02), "inferred": result(last),
                                          "inferred-top": result(last + 0.01)}} if mixture else {}))
    (folder / "metrics.json").write_text(json.dumps({"config": config, "results": results, "environment": {},
                                                     "timing": {"epoch_s": 1.0}}))
    columns = [*METRICS, *(f"{c}/{m}" for c in names for m in METRICS)]
    pd.DataFrame({"epoch": range(1, 9), **dict.fromkeys(columns, [np.nan, 0.5, np.nan, (last or 0.9) - 0.1] * 2)}).to_csv(
        folder / "history.csv", index=False)
    pd.DataFrame([{"category": c} for c, n in (images or {}).items() for _ in range(n)],
                 columns=["category"]).to_csv(folder / "scores.csv", index=False) if images else None
    forms = [dict(category=c, score=s, **dict.fromkeys(METRICS, v)) for c in names
             for s, v in (("likelihood", 0.7), ("entropy", 0.6), ("product", 0.8), ("default", 0.1))]
    pd.DataFrame(forms).to_csv(folder / "score_forms.csv", index=False) if mixture else None


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def pair():
    "`pair(a, b)`: two made-up runs of seed 0 that differ in what is given, one at 0.9, one at 0.5."
    def make(*changes: dict) -> list[dict]:
        runs = []
        for change, value in zip(changes, (0.9, 0.5)):
            config = dict(method="fastflow", altub=False, dataset="toy", data_root=None, category="all", preset="demo",
                          seed=0, overrides={}, backbone="auto", weights="auto", settings={"detector": {}}) | change
            result = {c: dict.fromkeys(METRICS, value) for c in ("one", "two", "mean")}
            runs.append({"config": config, "results": {"last": result, "best": result}, "timing": {"epoch_s": 1.0}})
        return runs
    return make


@pytest.mark.parametrize("one, other", [
    (dict(dataset="union", data_root="mvtec=a,btad=b"), dict(dataset="union", data_root="mvtec=a,visa=c")),
    (dict(dataset="folder", data_root="a/parts"), dict(dataset="folder", data_root="b/parts")),
    (dict(preset="smoke"), dict(preset="demo")),
    (dict(method="hgad", settings={"detector": {"base": "standard"}}),
     dict(method="hgad", settings={"detector": {"base": "diagonal"}})),
    (dict(altub=True, overrides={"schedule": {"lr": 0.1}, "altub": {"lr": 0.05}}),
     dict(altub=True, overrides={"schedule": {"lr": 0.2}, "altub": {"lr": 0.05}})),
], ids=["unions", "folders", "presets", "bases", "rates"])
def test_only_seeds_are_averaged(pair, one, other):
    "What differs in anything else has a row of its own: no ± beside one seed."
    runs = pair(one, other)
    assert not summary(runs)[list(METRICS.values())].map(lambda text: "±" in text).any(axis=None)
    assert not headline(runs).astype(str).map(lambda text: "±" in text).any(axis=None)
    assert set(last_epochs(runs)["image_auroc"]) == {0.9, 0.5}
    if one.get("preset") != "smoke":
        assert set(unified(runs)["mean"]) == {"0.900, 0.900, 0.900", "0.500, 0.500, 0.500"}


def test_no_such_folder_of_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; give the one that holds the run folders"):
        output_maker(TABLES, "altub_tables", str(tmp_path / "nowhere"), "demo", 0, "", "", "")


def test_linked_runs_are_read(root, tmp_path):
    write_run(root, "fastflow")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/run").symlink_to(next(root.iterdir()))
    assert len(read_runs(tmp_path / "linked")) == 1


def test_another_base_is_not_the_published_setting(pair):
    run, _ = pair(dict(method="hgad", preset="paper", overrides={"detector": {"base": "classes"}},
                       settings={"detector": {"base": "classes"}, "backbone": {"name": "b"}}), {})
    assert "not the published setting (base classes)" in setting_note([run])


def test_stability_over_categories(root):
    "T3's mean is of the seeds that have every category; a run without its history has no deviation."
    for seed, categories in ((0, ("weave", "bolt")), (1, ("weave",))):
        for k, category in enumerate(categories):
            write_run(root, "fastflow-published", category=category, seed=seed, last=0.9 - 0.2 * k, best=0.95)
    table = lambda: TABLES["T3"](read_runs(root), MATRIX, "real").frame.set_index(["category", "method"])
    mean = table().loc["mean", "FastFlow, published setting"]
    assert mean["seeds"] == "1" and mean["image AUROC: last"] == "80.00" and mean["image AUROC: best on test"] == "95.00"
    for path in root.glob("*/history.csv"):
        path.unlink()
    without = table().loc["mean", "FastFlow, published setting"]
    assert (mean != without).sum() == len(HEADLINE) and without["image AUROC: last"] == "80.00"


def test_titles_say_the_preset_of_their_runs():
    "The ablations keep that of their role."
    for name, preset in dict(T1="real", T3="demo", T4="demo", T5="real", T7="demo", T8="demo").items():
        assert TABLES[name]([], MATRIX, "real").title.rpartition("(preset ")[2].startswith(preset)


def test_columns_of_words_stand_left():
    table = Table("T0", "words", pd.DataFrame({"data": ["a"], "method": ["b"], "of": ["2022"], "AUROC": ["–"],
                                               "source": ["[c]"]}), keys=1)
    assert re.search(r"tabular}{(\w+)}", as_latex(table))[1] == "llrrl"
    assert re.findall(r'<td style="text-align:(\w+)', as_html(table)) == ["left", "left", "right", "right", "left"]


def test_steadiness(root):
    "Of every category, also of one model for all: last, best, and the deviation over late evaluations."
    write_run(root, "fastflow", category="all", last=0.9, best=0.95)
    write_run(root, "fastflow-altub", category="bolt", last=0.9, best=0.95)
    for variant, names in (("fastflow", set(TOYS)), ("fastflow-altub", {"bolt"})):
        own = steadiness([r for r in read_runs(root) if variant_of(r) == variant])
        assert set(own["category"]) == names and len(own) == len(names) * len(HEADLINE)
        assert own[["last", "best"]].drop_duplicates().values.tolist() == [[0.9, 0.95]]
        assert np.allclose(own["wobble"], np.std([0.5, 0.8], ddof=1))


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, Table]:
    "All tables from all their runs at preset demo, with two seeds."
    made = {}
    for name, output in MATRIX["outputs"].items():
        if name in TABLES:
            top, unified = tmp_path_factory.mktemp(name), output["role"] in ("unified", "further", "components")
            for variant in output["variants"]:
                for category in ("all",) if unified else [d.split("/")[1]
                                                          for d in MATRIX["presets"]["demo"][output["role"]]]:
                    for seed in (0, 1):
                        write_run(top, variant, category=category, seed=seed, last=0.9 + 0.01 * seed)
            made[name] = TABLES[name](read_runs(top), MATRIX, "demo")
    return made


def test_every_table_of_the_matrix(every):
    assert list(TABLES) == [o for o in MATRIX["outputs"] if o.startswith("T")] and every.keys() == TABLES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_complete_runs_leave_no_gap(every, name):
    "Nothing is missing, and every measured cell has mean and deviation of both seeds."
    table = every[name]
    assert not table.missing
    assert not (table.frame == "missing").any(axis=None)
    assert "missing" not in " ".join(table.notes)
    measured_rows = table.frame[~table.frame.isin(["not run"]).any(axis=1)]
    if name == "T9":
        measured_rows = measured_rows[measured_rows["method"] == "HGAD, measured here"]
    cells = measured_rows.filter(regex=": last$|^image AUROC$").stack()
    expected = ({"90.50"} if name == "T3" else {"90.50 ± 0.71", "92.50 ± 0.71"}
                | ({"70.00 ± 0.00", "60.00 ± 0.00", "80.00 ± 0.00"} if name == "T7" else set()))
    assert len(cells) and cells.isin(expected).all(), cells


@pytest.mark.parametrize("name", TABLES)
def test_files(every, name, tmp_path):
    """CSV with every cell, Markdown with as many columns in each row, LaTeX that closes what it opens, has as many
    columns and fits a page, the HTML."""
    table = every[name]
    paths = table.save(tmp_path)
    assert [p.name for p in paths] == [f"{name}.{e}" for e in ("csv", "values.csv", "md", "tex", "html")]
    assert pd.read_csv(paths.pop(0), dtype=str,
                       keep_default_na=False).equals(table.frame.astype(str).reset_index(drop=True))
    lines = [line for line in paths[1].read_text().splitlines() if line.startswith("|")]
    assert len(lines) == len(table.frame) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {table.frame.shape[1] + 1}
    tex = paths[2].read_text()
    assert ("resizebox{\\textwidth}" in tex or "begin{landscape}" in tex) == (table.frame.shape[1] > 9)
    assert re.findall(r"\\begin\{(\w+)\}", tex) == re.findall(r"\\end\{(\w+)\}", tex)[::-1] and tex.isascii(), (
        [c for c in tex if not c.isascii()])
    body = tex[tex.index(r"\midrule"):].split("\n")
    rows = [line for line in body if line.endswith(r" \\") and "multicolumn" not in line and "&" in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {table.frame.shape[1] - 1}
    plain = re.sub(r"\\[{}%&$#_]", "", tex)
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0


@pytest.mark.parametrize("name", TABLES)
def test_no_row_twice(every, name):
    "What names a row names one alone, also where runs have a third way to treat the category."
    names = [k for k in every[name].frame if k.partition(": ")[0] not in METRICS.values() and k != "seeds"]
    assert not every[name].frame.duplicated(names).any()
    measured_here = every["T9"].frame.query("method == 'HGAD, measured here'")
    assert measured_here["setting"].tolist() == ["unified; class inferred", "unified; class known"]
    assert not measured_here.duplicated(["data", "setting", "method"]).any()


def test_committed_anchors_are_those_of_the_committed_runs():
    folder = ROOT / "results/reproduce-demo"
    table = TABLES["T9"](read_runs(folder / "runs"), MATRIX, "demo")
    assert pd.read_csv(folder / "tables/T9.csv", dtype=str, keep_default_na=False).equals(table.frame)
    assert (folder / "tables/T9.md").read_text() == as_markdown(table)


def test_components_hold_each_number_once(every):
    "The score of the runs is the row of the finished HGAD, and none of the forms below it repeats it."
    methods = every["T7"].frame["method"].tolist()
    assert "HGAD, class inferred" in methods
    assert ([m for m in methods if "score:" in m] == ["HGAD, score: likelihood", "HGAD, score: entropy",
                                                      "HGAD, score: likelihood × entropy"])


def test_values_are_the_printed_numbers(every, tmp_path):
    "One row a number, in plain digits, with deviation and source; none is lost."
    every["T1"].save(tmp_path)
    values = pd.read_csv(tmp_path / "T1.values.csv", dtype={"source": str})
    own = values.query("data == 'toy' and category == 'weave' and method == 'FastFlow' and metric "
                       "== 'pixel AUROC'").set_index("column")
    assert own.loc["last", ["value", "deviation"]].tolist() == [90.5, 0.71] and own.loc["best on test", "value"] == 95
    known = values.query("data == 'mvtec' and category == 'mean' and method == 'FastFlow + AltUB'")
    assert known[["column", "value"]].values.tolist() == [["published", 98.83]]
    assert known["source"].iloc[0].startswith("AltUB, listing")
    cells = every["T1"].frame.filter(regex=": ").stack()
    assert (len(values) == sum(len(re.findall(r"\d[\d.]*(?! ± )(?!\d)", re.sub(r"± [\d.]+", "", c))) for c in cells
                               if not re.search("[a-z]{4}", c)))


def bottle(root, **kw) -> pd.Series:
    write_run(root, "fastflow", "mvtec", "bottle", preset="paper", **kw)
    return TABLES["T1"](read_runs(root), MATRIX,
                        "paper").frame.query("category == 'bottle' and method == 'FastFlow'").iloc[0]


def test_same_data_and_backbone_give_a_difference(root):
    "98.7 last and 98.9 best are published for FastFlow on bottle with this backbone."
    row = bottle(root, backbone="wide_resnet50_2.racm_in1k", images={"bottle": sum(OFFICIAL["mvtec"]["bottle"][1:])},
                 last=0.98, best=0.99)
    assert row["pixel AUROC: published"].startswith("98.7 / 98.9") and row["pixel AUROC: difference"] == "−0.7 / +0.1"


@pytest.mark.parametrize("change, said",
                         [(dict(backbone="tf_efficientnet_lite0"), "other backbone"),
                          (dict(images={"bottle": 82}), "other data")])
def test_what_does_not_compare(root, change, said):
    "Another backbone, or a folder called mvtec that lacks an image, gives no difference."
    row = bottle(root, **dict(backbone="wide_resnet50_2", images={"bottle": 83}, last=0.98) | change)
    assert row["pixel AUROC: difference"] == said and row["pixel AUROC: last"] == "98.00"


def test_toy_is_never_compared(every):
    "Toy data get no number in a column of differences, of any table."
    for name, table in every.items():
        toy = table.frame[table.frame["data"] == "toy"].filter(regex=": difference$")
        assert toy.isin({"other data", "–"}).all(axis=None), name


def test_missing_runs_are_named(root):
    "A row for each, the commands, and how many; a mean over fewer categories than asked is none."
    write_run(root, "fastflow", category="weave")
    table = TABLES["T1"](read_runs(root), MATRIX, "demo", "out")
    own = table.frame[table.frame["data"] == "toy"].set_index(["category", "method"])["image AUROC: last"]
    assert own["bolt", "FastFlow"] == "missing"
    assert own["mean", "FastFlow"] == "1 of 2 categories"
    assert own["weave", "FastFlow"] == "90.00"
    assert table.missing[0].startswith("mkdir -p out/fastflow-altub-toy-weave-demo-0 && papermill "
                                       "nbs/experiments/run.ipynb")
    assert "7 of 8 runs are missing." in table.notes


def test_a_missing_metric_stays_missing(root):
    "A missing metric stays n/a, also in the mean over seeds."
    write_run(root, "fastflow", category="weave")
    write_run(root, "fastflow", category="weave", seed=1, last=None)
    frame = TABLES["T1"](read_runs(root), MATRIX, "demo").frame
    assert frame.query("category == 'weave' and method == 'FastFlow'").iloc[0]["image AUROC: last"] == "n/a"


def test_changes_are_paired_by_seed(root):
    "The change is taken over seeds that both have: seed 1 of the reference is not there."
    write_run(root, "fastflow-altub", seed=0, last=0.8)
    for seed, last in ((0, 0.85), (1, 0.99)):
        write_run(root, "altub-mean", seed=seed, last=last)
    frame = TABLES["T4"](read_runs(root), MATRIX, "demo").frame.set_index("method")
    assert frame.loc["mean only", "image AUROC: change"] == "+5.00"
    assert frame.loc["mean only", "image AUROC: last"] == "92.00 ± 9.90"


@pytest.mark.parametrize("preset", ["real", "paper"])
def test_commands_find_the_data(preset, tmp_path):
    "A printed command names the folders that `flowrepro reproduce` finds under the names of the README."
    for name in DATA_FOLDERS.values():
        (tmp_path / name).mkdir()
    assert all(f"`{name}`" in (ROOT / "README.md").read_text() for name in DATA_FOLDERS.values())
    found = jobs_of(MATRIX, preset, find_roots(tmp_path), seeds=1,
                    only=[n for n in MATRIX["outputs"] if preset == "real" or n in ("T5", "T6")])
    missing = {j.name: j for j in jobs_of(MATRIX, preset, {}, seeds=1)}
    for job in found:
        words = shlex.split(command_of(missing[job.name], "out"))
        root = next((words[i + 1] for i, word in enumerate(words) if word == "data_root"), None)
        assert (root and root.replace("DATA", str(tmp_path))) == job.parameters["data_root"], job.name


def test_published_numbers_keep_their_digits():
    "The text of the file, two places further; 0.9460 is not 94.6."
    for digits in published()["digits"]:
        shown = as_published(digits)
        assert float(shown) == pytest.approx(100 * float(digits))
        assert len(shown.partition(".")[2]) == max(len(digits.partition(".")[2]) - 2, 0)
    cflow = TABLES["T1"]([], MATRIX, "demo").frame.query("data == 'mvtec' and category == 'mean' and "
                                                         "method == 'CFLOW-AD'").iloc[0]
    assert cflow["AUPRO@0.3: published"].startswith("94.60 [")


def test_anchors_say_how_to_read_them():
    "Percent, deviation and epochs, as under the other tables."
    note = TABLES["T9"]([], MATRIX, "demo").notes[0]
    assert all(words in note
               for words in ("Percent", "±", "last epoch", *TABLES["T9"]([], MATRIX, "demo").frame["epoch"].unique()))


def test_anchors_keep_protocols_apart():
    "Each published mean stands once, with setting and epoch; own papers in bold."
    table = TABLES["T9"]([], MATRIX, "demo")
    means = published(category="mean")
    keys = means[means["metric"].isin(["image_auroc", "pixel_auroc", "aupro_30"])
                 & means["dataset"].isin([*OFFICIAL, "union"])]
    assert (
        len(table.frame)
        == len(keys.fillna("").groupby(["paper", "table", "method", "backbone", "dataset", "protocol"])))
    assert set(table.frame["epoch"]) <= {"best on test", "early stopping on test", "last", "unknown epoch"}
    assert {table.frame.iloc[i]["method"] for i in table.strong} >= {"HGAD", "FastFlow + AltUB", "CFLOW-AD + AltUB"}


def test_last_by_class_mode(root):
    "HGAD's last epoch is there for every way to treat the category, best on test for the configured one."
    write_run(root, "hgad", category="all")
    frame = measured(read_runs(root), MATRIX).query("category == 'mean' and metric == 'image_auroc'")
    assert (sorted(zip(frame["protocol"], frame["mode"], frame["value"].round(3)))
            == [("best on test", "inferred", 0.95), ("last epoch", "inferred", 0.9),
                ("last epoch", "inferred-top", 0.91), ("last epoch", "known", 0.92)])


def test_special_characters_in_latex_and_markdown():
    table = Table("T0", "a_b & 5 %", pd.DataFrame({"x": ["a|b"], "y": ["λ1 ≥ {2}"], "z": ["[a] #~^\\"]}))
    assert r"a\|b" in as_markdown(table) and r"\#\textasciitilde{}\textasciicircum{}\textbackslash{}" in as_latex(table)


@pytest.mark.parametrize("notebook", sorted({o["notebook"] for n, o in MATRIX["outputs"].items() if n in TABLES}))
def test_notebook_writes_its_tables(notebook, tmp_path):
    "The cells of an experiment notebook, run with other parameters, write every table of theirs."
    names = [n for n, o in MATRIX["outputs"].items() if o["notebook"] == notebook]
    run_experiment(notebook, tmp_path, tmp_path)
    assert sorted(p.name for p in (tmp_path / "tables").glob("*.tex")) == [f"{n}.tex" for n in names]


def own_runs(root: Path, variant: str, category: str, **more) -> list[dict]:
    "Runs of preset paper on the official images, read as the run notebook reads them."
    official = {c: sum(n[1:]) for c, n in OFFICIAL["mvtec"].items()}
    for seed, last in ((0, 0.97), (1, 0.99)):
        write_run(root, variant, "mvtec", category, seed, "paper", last, images={category: official[category]}, **more)
    for path in root.glob("*/metrics.json"):
        run = json.loads(path.read_text())
        run["config"] |= {"backbone": "auto", "weights": "auto", "overrides": {}}
        path.write_text(json.dumps(run))
    return of_other_seeds(root / run_folder(variant, "mvtec", category, "paper", 0))


def test_beside_the_papers(root, capsys):
    runs = own_runs(root, "cflow", "bottle", backbone="wide_resnet50_2.tv_in1k")
    table = beside_papers(runs)
    row = table.frame.set_index("category").loc["bottle"]
    assert row["seeds"] == 2
    assert row["pixel AUROC: last"] == "98.00 ± 1.41"
    assert row["pixel AUROC: published"].startswith("98.98 [")
    assert row["pixel AUROC: difference"].startswith("−1.0 / ")
    assert any(n.endswith("the published setting, as preset paper has it.") for n in table.notes)
    print_published(runs)
    assert "98.98 [a]" in capsys.readouterr().out


@pytest.mark.parametrize("more, words",
                         [(dict(backbone="resnet10"), "other backbone"),
                          (dict(backbone="wide_resnet50_2.tv_in1k", images={"bottle": 3}), "other data")],
                          ids=["backbone", "data"])
def test_beside_the_papers_but_not_comparable(more, words, root):
    own_runs(root, "cflow", "bottle", backbone=more["backbone"])
    if "images" in more:
        for path in root.glob("*/scores.csv"):
            pd.DataFrame({"category": ["bottle"] * 3}).to_csv(path, index=False)
    assert beside_papers(of_other_seeds(next(root.iterdir()))).frame["image AUROC: difference"].iloc[0] == words


def test_random_weights_are_another_backbone(root):
    "Though it has the name of the papers'."
    own_runs(root, "cflow", "bottle", backbone="wide_resnet50_2.tv_in1k")
    for path in root.glob("*/metrics.json"):
        run = json.loads(path.read_text())
        run["config"]["weights"] = "random"
        path.write_text(json.dumps(run))
    frame = beside_papers(read_runs(root)).frame
    assert set(frame.filter(regex=": difference$").stack()) - {"–"} == {"other backbone"}


def test_beside_the_papers_a_mean_needs_every_category(root):
    runs = [run for category in OFFICIAL["mvtec"]
            for run in own_runs(root, "cflow", category, backbone="wide_resnet50_2.tv_in1k")]
    mean = lambda own: beside_papers(own).frame.set_index("category").loc["mean"]
    assert mean(runs)["pixel AUROC: last"] == "98.00 ± 1.41" and mean(runs)["seeds"] == 2
    assert mean(runs[2:])["pixel AUROC: last"] == "not run"
    assert mean(runs[2:])["pixel AUROC: published"].startswith("98.62 [")


def test_beside_no_paper(root, capsys):
    write_run(root, "fastflow")
    run = read_runs(root)[0]
    run["config"] |= {"backbone": "auto", "weights": "auto", "overrides": {"schedule": {"epochs": 3}}}
    table = beside_papers([run])
    assert list(table.frame)[-2:] == ["AUPRO@0.3: last", "AUPRO@0.3: best on test"]
    assert "No paper that is known here" in table.notes[1]
    assert "(preset demo, epochs 3)" in table.notes[2]
    print_published([run])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("weights, random", [("random-init/w.pth", False), ("random", True), ("random:3", True)])
def test_random_is_not_a_file(root, weights, random):
    "In the numbers and in the note below them."
    write_run(root, "fastflow")
    (run,) = read_runs(root)
    run["config"]["weights"] = weights
    assert all(name.startswith("random ") == random for name in measured([run])["backbone"])
    assert ("with random " in measured_on([run], MATRIX)[0]) == random
