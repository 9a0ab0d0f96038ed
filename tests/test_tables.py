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
from flowrepro import comparisons
from flowrepro.cli import print_published
from flowrepro.comparisons import (
    TABLES, beside_papers, measured, measured_on, of_other_seeds, only, published, setting_note, steadiness
)
from flowrepro.data import OFFICIAL
from flowrepro.matrix import (
    DATA_FOLDERS, MATRIX as PATH, Job, command_of, find_roots, jobs_of, load_matrix, run_folder, variant_of
)
from flowrepro.reports import (
    category_means, changed_settings, headline, last_epochs, method_name, metrics_table, output_maker, overlay,
    plot_history, plot_overview, plot_scores, read_runs, run_section, runs_section, setting_name, summary, unified
)
from flowrepro.runs import configure
from flowrepro.tables import (
    HEADLINE, METRICS, Table, as_html, as_latex, as_markdown, as_published, numbers_in, percent, plain_values, points,
    quiet
)

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
    assert set(unified(runs)["mean"]) == {"0.900, 0.900, 0.900", "0.500, 0.500, 0.500"}


def test_no_such_folder_of_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; give the one that holds the run folders"):
        output_maker(TABLES, "altub_tables", str(tmp_path / "nowhere"), "demo", 0, "", "", "")


def test_linked_runs_are_read(root, tmp_path):
    write_run(root, "fastflow")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/run").symlink_to(next(root.iterdir()))
    assert len(read_runs(tmp_path / "linked")) == 1


def test_a_run_and_its_link_are_one(root):
    "The run itself is read, whose folder tells its variant."
    write_run(root, "fastflow")
    run = next(root.iterdir())
    (root / "a-link").symlink_to(run)
    assert [r["path"] for r in read_runs(root)] == [run]


def test_a_seed_that_was_run_twice_is_one_seed(pair):
    "Two runs of one seed have a mean and no deviation; beside another seed they count once."
    runs = pair({}, {})
    for runs, words in ((runs, "0.700"), ([*runs, *pair(dict(seed=1))], "0.800 ± 0.141")):
        assert set(summary(runs)["image AUROC"]) == {words} and unified(runs)["mean"].iloc[0].startswith(words + ",")
        assert headline(runs)["image AUROC"].str.startswith(words + " (").all()


def test_means_over_more_and_fewer_categories_are_two(pair):
    "Of one model for all: a mean over three categories is not averaged with one over two."
    runs = pair(dict(seed=0), dict(seed=1))
    for results in (runs[1]["results"]["last"], runs[1]["results"]["best"]):
        results["three"] = results["one"]
    assert not summary(runs).isin(["0.700 ± 0.283"]).any(axis=None)
    assert unified(runs)["method"].tolist() == ["FastFlow (toy, 2 categories)", "FastFlow (toy, 3 categories)"]


def test_no_number_is_a_dash(pair):
    runs = pair({}, dict(seed=1))
    for run in runs:
        for result in run["results"].values():
            result |= {c: values | {"pixel_auroc": None} for c, values in result.items()}
    assert set(headline(runs)["pixel AUROC"]) == {"– (–)"} and unified(runs)["one"].tolist() == ["0.700, –, 0.700"]


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


def test_stability_without_a_number_of_one_seed(root):
    "No deviation over seeds, or over evaluations, of fewer seeds than the row says."
    for seed, last in ((0, 0.9), (1, 0.8), (2, None)):
        write_run(root, "fastflow-published", seed=seed, last=last)
    (root / "fastflow-published-toy-weave-demo-2/history.csv").unlink()
    row = TABLES["T3"](read_runs(root), MATRIX, "demo").frame.iloc[0]
    assert row["seeds"] == "3" and row.filter(regex="image AUROC: (last|±)").eq("n/a").all()


def test_forms_of_a_score_need_every_category(root):
    "A category without a pixel metric leaves no mean over the others."
    write_run(root, "hgad", category="all")
    file = next(root.glob("*/score_forms.csv"))
    forms = pd.read_csv(file)
    forms.loc[forms["category"] == "bolt", "pixel_auroc"] = np.nan
    forms.to_csv(file, index=False)
    for row in comparisons.form_rows(read_runs(root)):
        assert row["pixel AUROC: last"] == "n/a" and row["image AUROC: last"] != "n/a"


def test_anchors_name_every_backbone(root):
    for seed, name in enumerate(("resnet18", "tf_efficientnet_b6")):
        write_run(root, "hgad", category="all", seed=seed, backbone=name)
    frame = TABLES["T9"](read_runs(root), MATRIX, "demo").frame
    assert frame.loc[0, "backbone"] == "resnet18 or tf_efficientnet_b6"


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


def test_committed_tables_are_those_of_the_committed_runs():
    "The demo's, in every digit: neither a recipe nor a result changes alone."
    folder = ROOT / "results/reproduce-demo"
    runs = read_runs(folder / "runs")
    for name, recipe in TABLES.items():
        made = as_markdown(recipe(runs, MATRIX, "demo", "runs/demo"))
        assert made.strip() == (folder / f"tables/{name}.md").read_text().strip(), name


def test_best_on_test_below_last_is_explained():
    "Of one model for all categories the epoch is chosen by their mean; in some of them the last one is better."
    table = TABLES["T5"](read_runs(ROOT / "results/real"), MATRIX, "real")
    number = lambda column: pd.to_numeric(table.frame[f"pixel AUROC: {column}"].str.split().str[0], errors="coerce")
    assert (number("best on test") < number("last")).any()
    assert "by their mean, so one of them may be below last" in table.notes[0]


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


# imports, for the top of the file:


def sample() -> Table:
    "Two rows that a table sets apart, one cell in need of escaping, and what is missing."
    frame = pd.DataFrame({"data": ["toy", "toy", "btad"], "method": ["a", "b <1>", "b <1>"], "seeds": ["1", "2", "2"],
                          "image AUROC: last": ["90.00 ± 0.50", "n/a", "–"],
                          "image AUROC: published": ["98.7 / 98.9 [a]", "–", "[x]"],
                          "image AUROC: difference": ["−0.7 / +0.1 ?", "other data", "–"]})
    return Table("T0", "a & b", frame, ["[a] Paper, Table 1; last / best on test.", "n < 3"], ["run 1", "run 2"], 2, {1})


def test_values_keep_sign_part_and_source():
    "Each number of a cell is a row: which part of the cell it is, its sign, its paper."
    values = plain_values(sample())
    assert values[["data", "method", "column", "value", "deviation", "source"]].values.tolist() == [
        ["toy", "a", "last", "90.00", "0.50", ""],
        ["toy", "a", "published, last", "98.7", "", "Paper, Table 1; last / best on test."],
        ["toy", "a", "published, best on test", "98.9", "", "Paper, Table 1; last / best on test."],
        ["toy", "a", "difference, last", "-0.7", "", ""], ["toy", "a", "difference, best on test", "0.1", "", ""]]
    own = Table("T9", "", pd.DataFrame({"method": ["a"], "image AUROC": ["98.1"], "source": ["[a]"]}), ["[a] Paper."])
    assert plain_values(own).columns.tolist() == ["method", "metric", "column", "value", "deviation", "source"]
    assert plain_values(own).values.tolist() == [["a", "image AUROC", "", "98.1", "", "Paper."]]


def test_points_have_their_sign():
    "None where nothing is left of the difference."
    assert [points(v) for v in (0.012, -0.012, -0.0004, float("nan"))] == ["+1.2", "−1.2", "0.0", "n/a"]


def test_keys_that_repeat_are_left_out():
    "Of all keys but the last one, as long as every key before it repeats, too."
    frame = pd.DataFrame([["toy", "a", "m", "1"], ["toy", "b", "m", "1"], ["btad", "b", "m", "1"]])
    assert quiet(Table("T0", "", frame, keys=3)) == [["toy", "a", "m", "1"], ["", "b", "m", "1"],
                                                     ["btad", "b", "m", "1"]]


def test_markdown_of_a_table():
    assert as_markdown(sample()) == """**T0. a & b**

| data | method | seeds | image AUROC: last | image AUROC: published | image AUROC: difference |
| --- | --- | --- | --- | --- | --- |
| toy | a | 1 | 90.00 ± 0.50 | 98.7 / 98.9 [a] | −0.7 / +0.1 ? |
|  | **b <1>** | **2** | **n/a** | **–** | **other data** |
| btad | b <1> | 2 | – | [x] | – |

- [a] Paper, Table 1; last / best on test.
- n < 3

Missing runs:

```bash
run 1
run 2
```
"""


def test_html_of_a_table():
    "Both lines of the heading, every text escaped, the rows set apart in bold, notes and commands."
    page = as_html(sample())
    assert re.findall(r'<th colspan="(\d)"[^>]*>(.*?)</th>', page) == [("1", "")] * 3 + [("3", "image AUROC")]
    assert (re.findall(r"<th style[^>]*>(.*?)</th>", page)
            == ["data", "method", "seeds", "last", "published", "difference"])
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in page.partition("<tbody>")[2].split("</tr>")[:3]]
    assert rows == [["toy", "a", "1", "90.00 ± 0.50", "98.7 / 98.9 [a]", "−0.7 / +0.1 ?"],
                    ["", *(f"<b>{c}</b>" for c in ("b &lt;1&gt;", "2", "n/a", "–", "other data"))],
                    ["btad", "b &lt;1&gt;", "2", "–", "[x]", "–"]]
    assert "<b>T0. a &amp; b</b>" in page and "<li>n &lt; 3</li>" in page and "<pre>run 1\nrun 2</pre>" in page
    wide = Table("T0", "", pd.DataFrame({"x < y": ["1"]}), keys=1)
    assert "<th style" in as_html(wide) and "x &lt; y" in as_html(wide) and "colspan" not in as_html(wide)


def test_latex_of_a_table():
    "What stands where, with its rules, packages and label; longer than a page and broader than one, the other forms."
    table = sample()
    table.frame, table.keys = table.frame.iloc[:, 1:], 1
    assert as_latex(table) == r"""% needs booktabs
\begin{table}
\centering\scriptsize\setlength{\tabcolsep}{3pt}
\caption{a \& b}\label{tab:T0}
\begin{tabular}{lrrrr}
\toprule
 &  & \multicolumn{3}{c}{image AUROC} \\\cmidrule(lr){3-5}
method & seeds & last & published & difference \\
\midrule
a & 1 & 90.00 $\pm$ 0.50 & 98.7 / 98.9 [a] & $-$0.7 / +0.1 ? \\
\textbf{b \textless{}1\textgreater{}} & \textbf{2} & \textbf{n/a} & \textbf{--} & \textbf{other data} \\
b \textless{}1\textgreater{} & 2 & -- & [x] & -- \\
\bottomrule
\end{tabular}
\par\noindent [a] Paper, Table 1; last / best on test.
\par\noindent n \textless{} 3
\end{table}
"""
    first = Table("T0", "", pd.DataFrame({"a": ["[x]"], "λ ×": ["1"]}), keys=1)
    assert "\n{}[x] & 1 \\\\\n" in as_latex(first) and r"$\lambda$ $\times$" in as_latex(first)
    two = Table("T0", "", pd.DataFrame({"a": ["x"], "u: b": ["1"], "u: c": ["1"], "v: d": ["1"], "v: e": ["1"]}), keys=1)
    assert r"\\\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in as_latex(two)
    for rows, columns, packages in ((40, 10, "booktabs and graphicx"), (41, 9, "booktabs and longtable"),
                                    (41, 10, "booktabs, longtable and pdflscape")):
        text = as_latex(Table("T0", "", pd.DataFrame([["1"] * columns] * rows).add_prefix("c"), ["a note"]))
        assert text.startswith(f"% needs {packages}\n") and text.count(r"\toprule") == 1 + (rows == 41)
        assert text.count("longtable}") == 2 * (rows == 41) and r"\par\noindent a note" in text


def made(root: Path, category: str, names, last: float = 0.9, detector: dict | None = None, **more) -> dict:
    "A run as `read_run` gives it, of the MVTec images that it names."
    result = {c: dict.fromkeys(METRICS, last) for c in (*names, "mean")}
    config = dict(method="fastflow", altub=False, dataset="mvtec", data_root="data", category=category, preset="paper",
                  seed=0, settings={"backbone": {"name": "resnet18"}, "detector": detector or {}}) | more
    return {"config": config, "results": {"last": result, "best": result}, "timing": {"epoch_s": 1.0},
            "path": root / run_folder("fastflow", config["dataset"], category, "paper", config["seed"])}


def test_what_counts_as_the_official_data(tmp_path):
    "Every category with all of its images, as far as the run's own files say; a union of some sets is not the union."
    assert comparisons.on_official_data(made(tmp_path, "bottle", ["bottle"]))
    assert comparisons.on_official_data(made(tmp_path, "all", OFFICIAL["mvtec"]))
    assert not comparisons.on_official_data(made(tmp_path, "all", ["bottle", "cable"]))
    assert not comparisons.on_official_data(made(tmp_path, "weave", ["weave"], dataset="toy"))
    assert comparisons.data_name([*OFFICIAL]) == "union" and comparisons.data_name(["mvtec", "visa"]) == "mvtec+visa"


def test_one_gaussian_has_no_class_mode(tmp_path):
    "Though its settings name one: its rows are of no way to treat the category."
    run = made(tmp_path, "all", ["bottle"], method="hgad", detector={"class_mode": "inferred", "base": "standard"})
    assert list(comparisons.results_of(run)) == [("last epoch", ""), ("best on test", "")]
    for base, modes in (("standard", [""]), ("diagonal", [""]), ("classes", ["inferred", "known"])):
        variant = {"method": "hgad", "overrides": {"base": base}}
        assert comparisons.modes_of(variant, measured([])) == modes
    assert comparisons.setting_of(True, "inferred") == "none"


def told(*rows: dict) -> pd.DataFrame:
    "Published numbers of one category and metric, as `published_as` gives them."
    plain = dict(paper="FastFlow", table="Table 1", backbone="", data="mvtec", category="bottle", metric="pixel_auroc",
                 epoch="last", setting="one-class")
    return pd.DataFrame([plain | row | {"value": float(row["digits"])} for row in rows])


@pytest.mark.parametrize("rows, last, best, cell", [
    ([dict(paper="anomalib", backbone="ResNet-18", digits="0.91"), dict(backbone="EfficientNet-B5", digits="0.90")],
     0.90, 0.90, "90"),  # own papers before re-runs
    ([dict(backbone="EfficientNet-B5", digits="0.90"), dict(paper="CFLOW-AD", backbone="ResNet-18", digits="0.91")],
     0.91, 0.91, "91"),  # then the wanted backbone
    ([dict(digits="0.90"), dict(paper="CFLOW-AD", digits="0.91")], 0.90, 0.90, "90"),  # then the order of papers
    ([dict(digits="0.900"), dict(table="Table 2", digits="0.950")], 0.95, 0.95, "95.0"),  # then the best
    ([dict(digits="0.93"), dict(epoch="best on test", digits="0.95")], 0.93, 0.95, "93 / 95"),
    ([dict(backbone="ResNet-18", digits="0.93"), dict(epoch="best on test", digits="0.95")], 0.93, 0.93, "93"),
])
def test_which_published_number_stands_beside(rows, last, best, cell):
    "Of a category of a union as well; last and best of one table and backbone."
    for category in ("bottle", "mvtec/bottle"):
        found = comparisons.reference(told(*rows), "mvtec", category, "pixel_auroc", ["ResNet-18"])
        assert (found.last, found.best, found.cell) == (last, best, cell)


@pytest.mark.parametrize("change, said", [
    ({}, "−0.7 / +0.1"), (dict(best=None), "−0.7 / –"), (dict(elsewhere=False), "–"), (dict(official=False), "other data"),
    (dict(known=None), "–"), (dict(known=None, official=False), "other data"), (dict(backbone="resnet18"), "other backbone"),
    (dict(known=comparisons.Reference(0.987, 0.989, "", "")), "−0.7 / +0.1 ?"),
    (dict(known=comparisons.Reference(0.987, 0.989, "", ""), backbone="resnet10"), "other backbone"),
])
def test_difference_or_why_there_is_none(change, said):
    own = dict(last=0.98, best=0.99, known=comparisons.Reference(0.987, 0.989, "WideResNet-50-2", ""),
               backbone="wide_resnet50_2.tv_in1k", official=True, elsewhere=True)
    assert comparisons.difference(**own | change) == said


def values_of(*rows: dict) -> pd.DataFrame:
    "Rows of `measured` of one metric."
    plain = dict(variant="v", method="v", data="toy", category="weave", seed=0, protocol="last epoch", mode="",
                 metric="image_auroc", backbone="resnet18", epoch_s=1.0, official=True)
    return pd.DataFrame([plain | row for row in rows])


def test_means_over_the_categories_of_the_jobs():
    "Of each seed that has them all and no other; a missing number stays missing, other backbones are several."
    jobs = [Job("v", "demo", 0, dict(dataset="toy", data_root=None, category=c)) for c in ("weave", "bolt")]
    frame = values_of(*(dict(category=c, seed=s, value=v) for s, values in enumerate(((0.8, 0.6), (0.9, np.nan)))
                        for c, v in zip(("weave", "bolt"), values)), dict(category="speckle", value=0.1),
                      dict(seed=2, value=0.9), dict(category="bolt", seed=2, value=0.5, backbone="resnet34"),
                      dict(seed=3, value=0.9))
    means = only(comparisons.with_means(frame, jobs), category="mean").set_index("seed")
    assert means["value"].round(3).to_dict() == pytest.approx({0: 0.7, 1: np.nan, 2: 0.7}, nan_ok=True)
    assert means["backbone"].to_dict() == {0: "resnet18", 1: "resnet18", 2: "several"}
    assert not means["official"].any()  # not every category of the papers
    assert "mean" not in set(comparisons.with_means(frame, jobs[:1])["category"])
    whole = [Job("v", "demo", 0, dict(dataset="btad", data_root="d", category=c)) for c in OFFICIAL["btad"]]
    for official in ((True, True, True), (True, True, False)):
        rows = values_of(*(dict(data="btad", category=c, value=0.9, official=o)
                           for c, o in zip(OFFICIAL["btad"], official)))
        assert only(comparisons.with_means(rows, whole), category="mean")["official"].tolist() == [all(official)]


def test_places_of_many_runs(monkeypatch):
    "The rows are not searched again for each run of one category; a unified run has the categories of its data alone."
    searched, own = [], comparisons.only
    monkeypatch.setattr(comparisons, "only", lambda *a, **k: searched.append(1) or own(*a, **k))
    jobs = jobs_of(MATRIX, "paper", {}, ["T1"])
    frame = values_of(*(dict(data="mvtec", category=c) for c in OFFICIAL["mvtec"]), dict(data="toy", category="weave"),
                      dict(data="toy", category="mean"))
    assert comparisons.places(jobs, frame) == {"mvtec": [*OFFICIAL["mvtec"], "mean"]} and not searched
    assert comparisons.places(jobs_of(MATRIX, "demo", {}, ["T5"]), frame) == {"toy": ["weave"]}


def test_seeds_are_averaged_before_they_are_compared():
    "Of both protocols; seeds of two backbones, or one of other data, are not compared."
    known = comparisons.Reference(0.9, 0.9, "ResNet-18", "FastFlow")
    rows = [dict(seed=s, protocol=p, value=v) for p, values in (("last epoch", (0.90, 0.94)), ("best on test", (0.95, 0.99)))
            for s, v in enumerate(values)]
    cells = lambda change: list(comparisons.beside(values_of(*(r | (change if r["seed"] else {}) for r in rows)),
                                                   "image_auroc", known, True, {}, "missing").values())
    assert cells({}) == ["92.00 ± 2.83", "97.00 ± 2.83", " [a]", "+2.0 / +7.0"]
    assert cells({"backbone": "resnet34"})[3] == "other backbone" and cells({"official": False})[3] == "other data"


def test_letters_of_many_sources():
    "No two the same, and none that Markdown takes for a checkbox."
    sources: dict[str, str] = {}
    marks = [comparisons.letter(sources, str(n)) for n in range(60)]
    assert len(set(marks)) == 60 and "x" not in marks and comparisons.letter(sources, "3") == marks[3] == "d"


def test_lacking_says_what_is_there(root):
    write_run(root, "fastflow", category="weave")
    frame = TABLES["T1"](read_runs(root), MATRIX, "demo").frame.query("data == 'toy'").set_index(["category", "method"])
    assert frame.loc[("mean", "CFLOW-AD"), "image AUROC: last"] == "missing"
    seeds = MATRIX | {"presets": MATRIX["presets"] | {"demo": MATRIX["presets"]["demo"] | {"seeds": 2}}}
    assert TABLES["T1"](read_runs(root), seeds, "demo").frame.query(
        "category == 'weave' and method == 'FastFlow'")["seeds"].tolist() == ["1 of 2"]


def test_cells_of_stability():
    "Evaluations of the second half alone; what choosing the epoch gains has a sign; deviations of the right thing."
    history = pd.DataFrame({"epoch": [2, 4, 6, 8], "m": [0.1, 0.9, 0.5, 0.6]})
    assert comparisons.wobble(history, "m") == pytest.approx(np.std([0.5, 0.6], ddof=1))
    rows = pd.DataFrame([dict(metric=m, seed=s, last=0.8 + 0.1 * s, best=0.95, wobble=0.02 * s)
                         for m in HEADLINE for s in (0, 1)])
    assert list(comparisons.stability_row(rows).values()) == ["85.00", "95.00", "+10.00", "1.00", "7.07"] * len(HEADLINE)


def test_change_is_against_the_same_class_mode_and_the_last_epoch():
    frame = values_of(*(dict(variant=v, mode=m, seed=s, protocol=p, metric=k, value=x + (0.02 * s if v == "a" else 0))
                        for k in HEADLINE for s in (0, 1) for v, m, p, x in (
                            ("a", "known", "last epoch", 0.90), ("b", "known", "last epoch", 0.80),
                            ("b", "inferred", "last epoch", 0.50), ("b", "known", "best on test", 0.85),
                            ("c", "", "last epoch", 0.70))))
    row = lambda *a: list(comparisons.changed_row(frame, *a).values())[:3]
    assert row("a", "b", "known") == ["91.00 ± 1.41", "–", "+11.00 ± 1.41"] and row("a", "c", "known")[2] == "+21.00 ± 1.41"
    assert row("b", "b", "known") == ["80.00 ± 0.00", "85.00 ± 0.00", "–"]


def test_ablations_are_of_the_mean(root):
    "Where there are several categories; the reference says that it is one, and forms of the score are of HGAD alone."
    for variant in ("hgad", "hgad-centres-1"):
        write_run(root, variant, category="all")
    path = root / "hgad-toy-all-demo-0/metrics.json"
    run = json.loads(path.read_text())
    run["results"]["last"]["mean"] = dict.fromkeys(METRICS, 0.8)
    path.write_text(json.dumps(run))
    frame = TABLES["T8"](read_runs(root), MATRIX, "demo").frame
    assert set(frame["category"]) == {"mean"} and frame["method"][0] == "HGAD, class inferred (reference)"
    assert frame["image AUROC: last"][0] == "80.00"
    write_run(root, "hgad-intra", category="all")
    (next(root.glob("hgad-intra*")) / "score_forms.csv").write_text(
        (next(root.glob("hgad-toy*")) / "score_forms.csv").read_text().replace("0.7", "0.1"))
    forms = TABLES["T7"](read_runs(root), MATRIX, "demo").frame.set_index("method")
    assert forms.loc["HGAD, score: likelihood", "image AUROC: last"] == "70.00"


def test_anchors_begin_with_the_best():
    "In each data set and setting, by image AUROC; ours are of the last epoch and of one way to treat the category."
    frame = pd.DataFrame(comparisons.anchor_rows({}))
    for _, own in frame.groupby(["data", "setting"]):
        numbers = pd.to_numeric(own["image AUROC"], errors="coerce").dropna()
        assert numbers.is_monotonic_decreasing


def test_anchors_measured_here(root):
    write_run(root, "hgad", category="all", last=0.9, best=0.95)
    frame = TABLES["T9"](read_runs(root), MATRIX, "demo").frame.query("method == 'HGAD, measured here'")
    assert frame["image AUROC"].tolist() == ["90.00", "92.00"]


def test_seeds_of_one_setting(root):
    "Also where another device made one; another category is another setting."
    write_run(root, "fastflow"), write_run(root, "fastflow", seed=1), write_run(root, "fastflow", category="bolt", seed=2)
    path = root / "fastflow-toy-weave-demo-1/metrics.json"
    run = json.loads(path.read_text())
    run["config"] |= {"device": "cuda", "out_dir": "elsewhere"}
    path.write_text(json.dumps(run))
    assert [r["config"]["seed"] for r in of_other_seeds(root / "fastflow-toy-weave-demo-0")] == [0, 1]


def test_another_setting_is_no_other_seed(root):
    "A run beside it of another backbone or preset is none of its seeds."
    for seed, more in enumerate(({}, dict(backbone="wide_resnet50_2"), dict(preset="smoke"), {})):
        write_run(root, "fastflow", seed=seed, **more)
    own = of_other_seeds(root / run_folder("fastflow", "toy", "weave", "demo", 0))
    assert [r["config"]["seed"] for r in own] == [0, 3]


def test_notes_say_on_what_it_was_measured(root):
    "Official only if every run is; else a part, or no data of the papers."
    note = lambda runs: comparisons.measured_on(runs, MATRIX)[0]
    runs = [made(root, "bottle", ["bottle"]), made(root, "all", ["bottle"], seed=1)]
    assert "the official test images" in note(runs[:1]) and "a part or another split" in note(runs)
    assert "not the papers' data" in note([made(root, "weave", ["weave"], dataset="toy")])
    both = made(root, "all", ["mvtec/bottle", "visa/pcb1"], dataset="union", data_root="mvtec=a,visa=b")
    assert "a part or another split" in note([both])
    assert {t["method"] for i, t in TABLES["T9"]([], MATRIX, "demo").frame.iterrows()
            if i in TABLES["T9"]([], MATRIX, "demo").strong} >= {"HGAD", "FastFlow + AltUB"}


def test_base_and_weights_are_named(pair):
    "In the name of the method, or among what a run changes."
    run = pair(dict(method="hgad", settings={"detector": {"base": "diagonal"}}), {})[0]["config"]
    assert method_name(run) == "single learned Gaussian, unified"
    assert setting_name(run | {"weights": "random", "method": "fastflow"}) == "FastFlow, one model for all (weights random)"


def test_numbers_of_several_seeds(pair):
    "Means of the best, the median of the seconds, no ± but at the mean; one model of several has its mean already."
    runs = pair({}, {"seed": 1})
    for run, seconds in zip(runs, (1.0, 3.0)):
        run["timing"]["epoch_s"] = seconds
    row = headline(runs).iloc[0]
    assert row["image AUROC"] == "0.700 ± 0.283 (0.700)" and row["s/epoch"] == 2.0
    assert unified(runs).loc[0, ["one", "mean"]].tolist() == ["0.700, 0.700, 0.700", ", ".join(["0.700 ± 0.283"] * 3)]
    assert last_epochs(runs)["data"].str.contains("mean of").sum() == 2


def test_outputs_of_another_matrix_and_of_the_first_seeds(root, tmp_path):
    "A name alone makes that output alone; the commands put runs where these lie."
    for seed in (0, 1):
        write_run(root, "fastflow", seed=seed, last=0.9 + 0.02 * seed)
    (tmp_path / "m.yml").write_text(PATH.read_text().replace("title: FastFlow,", "title: Mine,", 1))
    show = output_maker(TABLES, "altub_tables", str(root), "demo", 1, str(tmp_path), "t1", str(tmp_path / "m.yml"))
    assert show("T2") is None and not (tmp_path / "tables/T2.csv").exists()
    table = show("T1")
    own = table.frame.query("category == 'weave' and method == 'Mine'").iloc[0]
    assert own["image AUROC: last"] == "90.00" and f"mkdir -p {root}/" in table.missing[0]


def test_rows_of_the_papers_are_those_of_the_role():
    assert set(TABLES["T1"]([], MATRIX, "demo").frame["data"]) == {"toy", "mvtec"}
    assert set(TABLES["T2"]([], MATRIX, "demo").frame["data"]) == {"toy", "btad"}


def test_keys_that_repeat_more_than_once_are_left_out():
    frame = pd.DataFrame([["toy", m, "1"] for m in "abcd"])
    assert [row[0] for row in quiet(Table("T0", "", frame))] == ["toy", "", "", ""]


def test_numbers_beside_letters_of_many_sources():
    "A letter is no part of a number, nor are two of them."
    assert numbers_in("98.7 [aa]") == [("", "98.7", "")]
    assert numbers_in("98.7 / 98.9 [aa]") == [("last", "98.7", ""), ("best on test", "98.9", "")]
    assert percent(0.9, np.nan) == percent(0.9) == "90.00"


def test_files_in_a_folder_that_is_not_there(tmp_path):
    "Nor the one it lies in; the commands of the page are escaped as every other text."
    table = Table("T0", "", pd.DataFrame({"a": ["x"]}), missing=["mkdir a && run <b>"], keys=1)
    assert all(p.exists() for p in table.save(tmp_path / "new/tables"))
    assert "<pre>mkdir a &amp;&amp; run &lt;b&gt;</pre>" in (tmp_path / "new/tables/T0.html").read_text()


def test_means_over_categories_need_every_number():
    "Of each seed and protocol alone; a missing number stays missing, a seed without a category has no mean."
    rows = pd.DataFrame([dict(m="x", category=c, protocol=p, seed=s, v=v) for c, p, s, v in (
        ("a", "last", 0, 0.2), ("b", "last", 0, 0.4), ("a", "best", 0, 0.6), ("b", "best", 0, 0.8),
        ("a", "last", 1, 0.5), ("b", "last", 1, np.nan), ("a", "last", 2, 0.9))])
    means = category_means(rows, ["m"], ["v"]).query("category == 'mean of 2'").set_index(["protocol", "seed"])["v"]
    assert means.to_dict() == pytest.approx({("last", 0): 0.3, ("best", 0): 0.7, ("last", 1): np.nan}, nan_ok=True)


def test_seconds_of_an_epoch_are_the_median(pair):
    runs = [*pair({}, {"seed": 1}), *pair({"seed": 2})]
    runs = [r | {"timing": {"epoch_s": s}} for r, s in zip(runs, (1.0, 3.0, 14.0))]
    assert headline(runs)["s/epoch"].unique().tolist() == [3.0]


def test_headline_has_the_last_epoch_and_the_best_in_brackets(pair):
    runs = pair({}, {"seed": 1})
    for run in runs:
        run["results"] |= {"best": {c: {m: v + 0.05 for m, v in r.items()} for c, r in run["results"]["last"].items()}}
    for metric in ("image AUROC", "pixel AUROC", "pixel AP", METRICS["aupro_30"]):
        assert set(headline(runs)[metric]) == {"0.700 ± 0.283 (0.750)"}


def test_unified_has_a_row_for_each_way_to_treat_the_category(pair):
    (run,) = pair({})
    run["results"]["last_by_class_mode"] = {mode: {c: dict.fromkeys(METRICS, v) for c in ("one", "two", "mean")}
                                            for mode, v in (("known", 0.8), ("inferred", 0.9))}
    assert headline([run])["data"].unique().tolist() == ["toy"]  # how many is said beside another number only
    table = unified([run]).set_index("category of a test image")
    assert table["one"].to_dict() == {"known": ", ".join(["0.800"] * 3), "inferred": ", ".join(["0.900"] * 3)}


def test_where_features_are_kept_changes_nothing(pair):
    overrides = {"features": {"where": "ram", "cache": "x", "copies": 2}, "evaluations": 3}
    assert changed_settings(pair({"overrides": overrides})[0]["config"]) == ["copies 2", "evaluations 3"]


def test_results_of_a_run_by_protocol():
    "The way to treat the category that the run itself has is not there twice."
    result = lambda v: {c: dict.fromkeys(METRICS, v) for c in ("weave", "mean")}
    modes = {"known": result(0.7), "inferred": result(0.8)}
    table = metrics_table({"results": {"last": result(0.8), "best": result(0.9), "last_by_class_mode": modes},
                           "config": {"settings": {"detector": {"class_mode": "inferred"}}}})
    assert table["image AUROC"].to_dict() == {("weave", "last epoch"): 0.8, ("weave", "best on test"): 0.9,
                                              ("weave", "last epoch, category known"): 0.7}


def test_heat_over_an_image():
    "Half of it at the highest value and beyond, none up to the lowest, also where all values are the same."
    image = np.full((1, 4, 3), 101, np.uint8)
    drawn = overlay(image, np.array([[-1.0, 0.0, 1.0, 9.0]]), 0.0, 1.0)
    assert (drawn[0, :2] == 101).all() and (drawn[0, 2] == drawn[0, 3]).all()
    brightest = np.array([0.988362, 0.998364, 0.644924]) * 255  # of inferno
    assert (drawn[0, 2] == (brightest / 2 + 101 / 2).round()).all()
    assert (overlay(image, np.zeros((1, 4)), 0.0, 0.0) == image).all()


def test_overview_draws_each_seed_and_the_mean():
    "And a number from elsewhere, in the row of its data and method."
    row = lambda seed, value: {"data": "toy weave", "method": "HGAD", "seed": seed} | dict.fromkeys(HEADLINE, value)
    figure = plot_overview(pd.DataFrame([row(0, 0.5), row(1, 0.8), row(2, 0.8)]), pd.DataFrame([row(0, 0.9)]), "paper")
    for ax in figure.axes:
        drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines if 1 in line.get_ydata()}
        assert drawn == {"a seed": [0.5, 0.8, 0.8], "mean over seeds": [pytest.approx(0.7)], "paper": [0.9]}


def test_histories_and_scores_are_drawn_as_they_are():
    from types import SimpleNamespace

    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.0, "image_auroc": 0.7, "pixel_auroc": 0.9}]
    config = configure(dict(method="fastflow", dataset="toy", category="weave", preset="smoke"))
    left, right = plot_history(SimpleNamespace(history=history, config=config)).axes
    assert [list(v) for v in left.lines[0].get_data()] == [[1, 2], [3, 2]]
    assert {line.get_label(): [list(v) for v in line.get_data()] for line in right.lines} == {
        "image AUROC": [[2], [0.7]], "pixel AUROC": [[2], [0.9]]}
    (ax,) = plot_scores(pd.DataFrame({"category": "a", "label": [0] * 4 + [1] * 2, "score": [0] * 4 + [5] * 2})).axes
    bars = {patch.get_label(): patch.get_xy() for patch in ax.patches}
    assert {name: (xy[:, 1].max(), xy[xy[:, 1].argmax(), 0] > 4) for name, xy in bars.items()} == {
        "normal": (4, False), "anomalous": (2, True)}


def test_what_a_report_says_of_a_run(tmp_path):
    "Times under their names; a link as an address, where the file is."
    settings = {"backbone": {"name": "b"}, "schedule": {"epochs": 7}, "detector": {}}
    run = {"path": tmp_path / "a b", "timing": {"train_s": 12.3, "epoch_s": 0.45, "ram_mib": 678.0},
           "config": dict(method="cflow", altub=False, dataset="toy", category="weave", preset="demo", seed=0,
                          overrides={}, backbone="auto", weights="auto", settings=settings),
           "environment": {"torch": "2", "device": "cpu", "cpus": 3, "revision": None}}
    assert ("b, 7 epochs; 12 s training, 0.45 s an epoch, 678 MiB; torch 2, cpu (3 CPUs), revision unknown"
            in run_section(run, tmp_path))
    cells = ["a b", "settings", "CFLOW-AD", "b", "7", "12.3", "0.45", "678", "cpu (3 CPUs)", "2", "unknown"]
    assert re.findall("<td>(.*?)</td>", runs_section([run], tmp_path)) == cells
    run["config"]["weights"] = "random"
    assert ">random b, 7 epochs;" in run_section(run, tmp_path) and "<td>random b</td>" in runs_section([run], tmp_path)
    (tmp_path / "a b").mkdir(), (tmp_path / "a b/run.ipynb").touch()
    assert '<a href="a%20b/run.ipynb">a b</a>' in runs_section([run], tmp_path)
