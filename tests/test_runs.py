"""Configuration refused before any work, the run folder as scripts rely on it, and the run notebook under papermill."""
import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowrepro import diagnostics, runs, training
from flowrepro.backbones import WeightsError
from flowrepro.data import DataError, Transform, load
from flowrepro.detectors import DETECTORS, Detector, not_trained_on
from flowrepro.runs import (
    PARAMETERS, PRESETS, ConfigError, Run, best_results, configure, evaluation_epochs, made_otherwise, mean_results,
    parse_overrides, resolve, run_notebook, settings_of, write_json
)
from flowrepro.scores import PUBLISHED, Score

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro_30", "aupro_05"]
PIXEL = [m for m in METRICS if not m.startswith("image")]
FILES = {"config.json", "environment.json", "history.csv", "scores.csv", "model.safetensors", "latents.npz",
         "pictures.npz", "metrics.json"}


def execute(out, **parameters) -> Run:
    "A whole run in this process."
    run = Run(configure({"out_dir": str(out)} | parameters), progress=False).train()
    run.metrics = run.finish()
    return run


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory) -> Run:
    "A run of one category of the small toy set at preset smoke."
    return execute(tmp_path_factory.mktemp("runs") / "done", data_root=str(toy))


@pytest.fixture(scope="module")
def unified(toy, tmp_path_factory) -> Run:
    "One model for all categories, evaluated three times."
    return execute(tmp_path_factory.mktemp("runs") / "all", data_root=str(toy), category="all",
                   overrides='{"epochs": 6, "evaluations": 3}')


def stored(run) -> dict:
    return json.loads((run.out / "metrics.json").read_text())


def flat(results) -> dict:
    "Nested results with one level of keys."
    return pd.json_normalize(results).iloc[0].to_dict()


def weights(run) -> dict:
    "The tensors in the folder's model file."
    return {k: v.tolist() for k, v in load_file(run.out / "model.safetensors").items()}


# -- configuration -------------------------------------------------------------------------------------------------

def test_defaults():
    "Those of the contract; a CPU run of seconds on toy data."
    config = configure()
    assert PARAMETERS == dict(method="fastflow", altub=False, dataset="toy", data_root=None, category="weave",
                              backbone="auto", weights="auto",
                              preset="smoke", seed=0, device="auto", out_dir="runs/run", overrides="{}")
    assert config.device in ("cpu", "cuda")
    assert config.settings["schedule"]["epochs"] <= 2
    assert config.settings["transform"]["size"] == 64


def test_notebook_parameters_are_these():
    "The notebook's parameters cell has the same names and defaults."
    cells = json.loads((ROOT / "nbs/experiments/run.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    given = {}
    exec("".join(cell["source"]), {}, given)
    assert given == PARAMETERS


@pytest.mark.parametrize("parameters, words", [
    (dict(methd="fastflow"), ["'methd'", *PARAMETERS]),
    (dict(method="patchcore"), ["method='patchcore'", "fastflow, cflow, hgad"]),
    (dict(dataset="coco"), ["dataset='coco'", "toy, mvtec, btad, visa, mvtec3d, union, folder"]),
    (dict(preset="large"), ["preset='large'", "smoke, demo, real, paper"]),
    (dict(device="tpu"), ["device='tpu'", "auto, cpu, cuda"]), (dict(altub="yes"), ["altub='yes'", "False, True"]),
    (dict(altub=0), ["altub=0", "False, True"]), (dict(altub=1), ["altub=1"]),
    (dict(seed=-1), ["seed=-1", "from 0"]), (dict(seed=1.5), ["seed=1.5"]), (dict(seed=True), ["seed=True"]),
    (dict(seed="1"), ["seed='1'"]),
    (dict(dataset="mvtec"), ["dataset='mvtec' needs data_root"]),
    (dict(dataset="folder", data_root=""), ["needs data_root"]),
    (dict(overrides="epochs=5"), ["overrides is not JSON", "{\"epochs\": 5}"]),
    (dict(overrides="[1]"), ["JSON object", "list"]),
    (dict(overrides='{"epoch": 5}'), ["'epoch' is unknown", "epochs"]),
    (dict(overrides='{"schedule.epoch": 5}'), ["'schedule.epoch' is unknown", "schedule.epochs"]),
    (dict(overrides='{"schedule": {"lrr": 5}}'), ["'schedule.lrr'", "schedule.lr"]),
    (dict(overrides='{"size": 5, "dtype": "float16", "seed": 3}'), ["'seed' is unknown"]),
    (dict(overrides='{"decay": "linear"}'), ["decay 'linear'", "cosine, constant"]),
    (dict(overrides='{"levels": "sum"}'), ["levels"]),
    (dict(overrides='{"score": {"levels": "sum"}}'), ["levels 'sum'", "linear, probability"]),
    (dict(overrides='{"policy": "stretch"}'), ["policy='stretch'", "squash, crop"]),
    (dict(overrides='{"epochs": "ten"}'), []), (dict(overrides='{"top": 2}'), ["(0, 1]"]),
], ids=str)
def test_refused(parameters, words, tmp_path):
    "An unknown parameter, value or override is named, with the allowed ones."
    with pytest.raises(ConfigError) as error:
        configure(parameters | {"out_dir": str(tmp_path / "out")})
    assert all(w in str(error.value) for w in words), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_where_there_is_none():
    with pytest.raises(ConfigError, match="no CUDA device.*'auto' or 'cpu'"):
        configure(device="cuda")


@pytest.mark.parametrize("method, overrides, words", [
    ("fastflow", {"centres": 3}, ["'centres' is unknown"]),
    ("fastflow", {"detector": {"fibers": 64}}, ["'detector.fibers' is unknown"]),
    ("cflow", {"kernels": [3]}, ["'kernels' is unknown"]),
    ("cflow", {"class_mode": "known"}, ["'class_mode' is unknown"]),
    ("hgad", {"detector.fibers": 64}, ["'detector.fibers' is unknown"]),
    ("hgad", {"per": "channel"}, ["'per' is unknown"]),
    ("hgad", {"categories": ["weave"]}, ["'categories' is unknown"]),
    ("cflow", {"fiber": 64}, ["'fiber' is unknown", "fibers"]),
    ("hgad", {"criterion": "sum"}, ["criterion 'sum'", "likelihood, entropy, product"])], ids=str)
def test_keys_of_another_method(method, overrides, words, tmp_path):
    "A setting exists for the methods that have it."
    with pytest.raises(ConfigError) as error:
        configure(method=method, overrides=overrides, out_dir=str(tmp_path / "out"))
    assert all(w in str(error.value) for w in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_names_that_several_groups_have():
    "AltUB yields to another group; between others the name is ambiguous, unless dotted."
    settings = settings_of("cflow")
    assert resolve("lr", settings) == ("schedule", "lr")
    assert resolve("altub.lr", settings) == ("altub", "lr")
    assert resolve("every", settings) == ("altub", "every")
    assert resolve("clip", settings) == ("schedule", "clip")
    assert resolve("warmup", settings) == ("schedule", "warmup")
    assert resolve("joint", settings) == ("altub", "joint")
    assert resolve("joint", settings_of("hgad")) == ("detector", "joint")
    assert (parse_overrides({"lr": 1, "altub": {"lr": 2, "factor": None}}, settings)
            == {"schedule": {"lr": 1}, "altub": {"lr": 2, "factor": None}})
    with pytest.raises(ConfigError, match="'levels' is ambiguous: say backbone.levels, score.levels"):
        resolve("levels", settings)


CONTRADICTIONS = [
    ("fastflow", True, {"base": "standard"}, "altub=True with base='standard'"),
    ("hgad", True, {"base": "standard"}, "altub=True with base='standard'"),
    ("cflow", False, {"every": 3}, "override altub.every with altub=False"),
    ("hgad", False, {"altub": {"joint": False}}, "override altub.joint with altub=False"),
    ("cflow", True, {"altub.factor": None}, "altub factor None and lr None"),
    ("cflow", True, {"altub": {"lr": 1e-3}}, "altub factor 5.0 and lr 0.001"),
    ("cflow", True, {"every": 1, "altub.warmup": 0.0}, "every=1 without warmup"),
    ("cflow", True, {"every": 2.5}, "every 2.5"), ("cflow", True, {"altub.warmup": 1.0}, "altub warmup 1.0"),
    ("cflow", True, {"unit": "image"}, "altub unit 'image'"),
    ("cflow", True, {"altub.optimizer": "lion"}, "altub optimizer 'lion'"),
    ("cflow", True, {"altub.clip": -1.0}, "altub clip -1.0"),
    ("cflow", False, {"copies": 3}, "set both transform.rotate and features.copies"),
    ("cflow", False, {"rotate": 5.0}, "set both transform.rotate and features.copies"),
    ("cflow", False, {"copies": 0}, "features.copies 0: a whole number from 1"),
    ("cflow", False, {"copies": "a"}, "override features.copies 'a': must be a whole number"),
    ("cflow", False, {"scale": False}, "override scale with base='standard'"),
    ("cflow", True, {"altub": {"clip": None, "clip_by": "norm"}}, "clip_by='norm' without clip"),
    ("cflow", True, {"altub.factor": "5"}, "override altub.factor '5': must be a number"),
    ("hgad", False, {"class_mode": "x"}, "class_mode 'x'"), ("hgad", False, {"base": "banana"}, "base 'banana'"),
    ("hgad", False, {"centres": 0}, "centres 0"),
    ("cflow", False, {"code": 6}, "multiple of four"),
    ("cflow", False, {"code": 4.0}, "code 4.0: must be a whole number"),
    ("hgad", False, {"steps": 0}, "steps 0"), ("cflow", False, {"steps": 2.5}, "steps 2.5"),
    ("hgad", False, {"smoothing": 2}, "smoothing 2"), ("cflow", False, {"per": "position"}, "per='position'"),
    ("fastflow", False, {"kernels": [2]}, "odd numbers"),
    ("fastflow", False, {"lr": "1e-3"}, "override schedule.lr '1e-3': must be a number"),
    ("fastflow", False, {"mask_size": "x"}, "override transform.mask_size 'x': must be a whole number or null"),
    ("fastflow", False, {"mask_size": 32.5}, "override transform.mask_size 32.5: must be a whole number or null"),
    ("fastflow", False, {"betas": ["a", 0.9]}, "override schedule.betas ('a', 0.9): must be a list of numbers"),
    ("hgad", False, {"pyramid": ["a"]}, "override backbone.pyramid ('a',): must be a list of numbers"),
    ("cflow", False, {"backbone.levels": [2.5]}, "override backbone.levels (2.5,): must be a list of whole numbers"),
    ("fastflow", False, {"kernels": [True]}, "override detector.kernels (True,): must be a list of whole numbers"),
]


@pytest.mark.parametrize("method, altub, overrides, words", CONTRADICTIONS, ids=str)
def test_contradictory_settings(method, altub, overrides, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        configure(method=method, altub=altub, overrides=overrides, out_dir=str(tmp_path / "out"))
    assert words in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, altub, overrides, words", [
    ("cflow", False, {"fibers": 513}, "a fiber batch of 513 rows is larger than a batch of 8 images, "
                                      "which has 128 rows"),
                                      ("cflow", False, {"batch": 3}, "a fiber batch of 64 rows is larger"),
    ("cflow", False, {"fibers": 0}, "fibers 0"), ("cflow", False, {"per": "position"}, "per='position'"),
    ("cflow", False, {"code": 6}, "multiple of four"),
    ("cflow", True, {"every": 50}, "every=50 steps after a warm-up of 10% never comes in 2 epochs of 1 steps"),
    ("fastflow", True, {"unit": "epoch", "every": 3}, "never comes"),
    ("hgad", False, {"centres": 0}, "centres 0"), ("hgad", False, {"class_mode": "guess"}, "class_mode 'guess'"),
    ("hgad", False, {"stage_one": 2}, "stage_one 2")], ids=str)
def test_refused_before_folder_and_features(method, altub, overrides, words, toy, tmp_path, monkeypatch):
    "What depends on backbone or data is found when the run is made: no folder, no features."
    monkeypatch.setattr(runs, "FeatureBank", lambda *a, **k: pytest.fail("features were made"))
    with pytest.raises(ValueError) as error:
        Run(configure(method=method, altub=altub, data_root=str(toy), out_dir=str(tmp_path / "out"),
                      overrides=overrides), progress=False)
    assert words in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", [
    {"norm": "batch"}, {"steps": 0}, {"steps": "two"}, {"kernels": [2]}, {"ratio": 0}, {"rule": "soft"},
    {"where": "moon"}, {"dtype": "int8"}, {"evaluations": 0}, {"evaluations": "all"},
    {"backbone": {"levels": [9]}}, {"backbone": {"pyramid": [2.0]}}, {"name": "resnet1800"}, {"clamp": -1.0},
    {"rotate": 5.0}], ids=str)
def test_impossible_values_stop_before_any_work(overrides, toy, tmp_path):
    "Found when the run is made at the latest: ValueError, and no folder."
    with pytest.raises(ValueError):
        Run(configure(data_root=str(toy), out_dir=str(tmp_path / "out"), overrides=overrides), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parameters, error",
                         [(dict(category="wave"), DataError), (dict(data_root="nowhere"), DataError),
                          (dict(backbone="resnet1800"), ValueError),
                                               (dict(weights="no-such-file.pth"), RuntimeError)], ids=str)
def test_wrong_data_or_backbone_leaves_no_folder(parameters, error, toy, tmp_path):
    with pytest.raises(error, match=next(iter(parameters.values())).split(".")[0]):
        Run(configure({"data_root": str(toy), "out_dir": str(tmp_path / "out")} | parameters), progress=False)
    assert not (tmp_path / "out").exists()


def test_overrides():
    "By name, dotted or nested, as text or dict; over the preset, and the rest stays."
    forms = ['{"epochs": 7, "temperature": 3}', {"schedule.epochs": 7, "score.temperature": 3},
             {"schedule": {"epochs": 7}, "score": {"temperature": 3}}]
    default = configure(preset="real").settings
    for form in forms:
        settings = configure(preset="real", overrides=form).settings
        assert settings["schedule"]["epochs"] == 7 and settings["score"]["temperature"] == 3
        settings["schedule"]["epochs"], settings["score"]["temperature"] = (default["schedule"]["epochs"],
                                                                            default["score"]["temperature"])
        assert settings == default
    with pytest.raises(ConfigError, match="ambiguous: .*score.levels"):
        configure(overrides='{"levels": [2, 3]}')
    assert configure(overrides={"backbone": {"levels": [2]}, "evaluations": 1}).settings["backbone"]["levels"] == (2,)


@pytest.mark.parametrize("altub", [False, True])
@pytest.mark.parametrize("method, preset", [(m, p) for m in PRESETS for p in PRESETS[m]])
def test_presets(method, preset, altub):
    "Every setting is one that exists, and one that can be overridden; the notebook's table shows all."
    config, settings = configure(method=method, preset=preset, altub=altub), settings_of(method)
    assert config.settings.keys() == settings.keys() | {"evaluations"}
    assert all(config.settings[g].keys() == settings[g].keys() for g in settings)
    table = config.table()
    assert len(table) == len(PARAMETERS) - 1 + sum(map(len, settings.values())) + 1
    assert table.loc["preset", "value"] == preset
    assert (config.settings["transform"]["size"] == {"smoke": 64, "demo": 192, "real": 384 if method == "hgad" else 256,
                                                     "paper": 1024 if method == "hgad" else 256}[preset])
    assert (config.settings["detector"]["base"] == ("hierarchical" if method == "hgad" else "diagonal" if altub
                                                    else "standard"))


def test_every_method_has_every_preset():
    assert PRESETS.keys() == DETECTORS.keys()
    assert all(list(p) == ["smoke", "demo", "real", "paper"] for p in PRESETS.values())


def test_paper_preset():
    "The public code's settings, and those of its other backbones by name."
    s = configure(preset="paper").settings
    assert s["backbone"]["name"] == "wide_resnet50_2.racm_in1k"
    assert Score(**s["score"]) == PUBLISHED["fastflow"]
    assert s["detector"]["norm"] == "layer"
    assert ((s["schedule"]["epochs"], s["schedule"]["batch"], s["schedule"]["lr"], s["schedule"]["weight_decay"],
             s["schedule"]["decay"]) == (500, 32, 1e-3, 1e-5, "constant"))
    # with its weight tag and without
    for name in ("deit_base_distilled_patch16_384.fb_in1k", "deit_base_distilled_patch16_384"):
        deit = configure(preset="paper", backbone=name, overrides={"steps": 3}).settings
        assert ((deit["transform"]["size"], deit["backbone"]["levels"], deit["detector"]["ratio"],
                 deit["detector"]["norm"], deit["detector"]["steps"]) == (384, (7,), 0.16, "none", 3))


def test_paper_preset_of_cflow():
    """Its public code's settings: 25 meta-epochs of 8 passes, each over images rotated otherwise, 256 rows a step,
    Lanczos, and the input size of the category."""
    config = configure(method="cflow", preset="paper")
    s = config.settings
    assert s["backbone"]["name"] == "wide_resnet50_2.tv_in1k"
    assert s["backbone"]["levels"] == (2, 3, 4)
    assert Score(**s["score"]) == PUBLISHED["cflow"]
    assert ((s["schedule"]["epochs"], s["features"]["copies"], s["transform"]["rotate"], s["schedule"]["batch"],
             s["detector"]["fibers"]) == (200, 8, 5.0, 32, 256))
    assert s["transform"]["interpolation"] == "lanczos" and s["evaluations"] == 25
    assert ({k: s["detector"][k] for k in ("steps", "code", "clamp", "norm", "soft")}
            == dict(steps=8, code=128, clamp=1.9, norm="none", soft=True))
    assert ((s["schedule"]["lr"], s["schedule"]["floor"], s["schedule"]["warmup"], s["schedule"]["hold"],
             s["schedule"]["weight_decay"]) == (2e-4, 1e-3, 16, 8, 0.0))
    sizes = {c: configure(method="cflow", preset="paper", dataset="mvtec", data_root="x",
                          category=c).settings["transform"]["size"] for c in ("bottle", "cable", "transistor", "all")}
    assert sizes == dict(bottle=512, cable=256, transistor=128, all=256)


def test_paper_preset_of_hgad():
    s = configure(method="hgad", preset="paper").settings
    assert s["backbone"] == dict(name="tf_efficientnet_b6.aa_in1k", levels=(3,), pyramid=(1.0, 0.5, 0.25))
    assert Score(**s["score"]) == PUBLISHED["hgad"]
    own = dict(steps=12, code=256, centres=10, lambda1=1.0, lambda2=100.0, lambda_e=1.0, smoothing=0.02, stage_one=0.08,
               joint=False, clamp=1.9, norm="none", class_mode="known")
    assert {k: s["detector"][k] for k in own} == own
    assert (s["transform"]["size"], s["transform"]["mask_size"]) == (1024, 256)
    assert {k: s["schedule"][k]
            for k in ("epochs", "batch", "lr", "floor", "warmup", "hold", "weight_decay", "betas")} == dict(
        epochs=200, batch=8, lr=2e-4, floor=1e-3, warmup=16, hold=8, weight_decay=1e-4, betas=(0.95, 0.99))


def test_checking_settings_draws_no_numbers():
    "Seeds stay what they were."
    torch.manual_seed(4)
    configure(method="hgad", overrides={"centres": 7})
    drawn = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(3))


def test_unknown_backbone():
    with pytest.raises(ConfigError, match="unknown backbone 'resnet81'"):
        configure(backbone="resnet81")


def test_other_backbone():
    settings = configure(backbone="resnet18", overrides={"backbone": {"levels": [1, 2]}}).settings
    assert settings["backbone"]["name"] == "resnet18" and settings["backbone"]["levels"] == (1, 2)


def test_backbone_by_either_way():
    "As a parameter or as an override, with what is published of it; an unknown one is refused at once."
    name = "cait_m48_448.fb_dist_in1k"
    one, other = configure(preset="paper", backbone=name), configure(preset="paper", overrides={"backbone.name": name})
    assert one.settings == other.settings and one.backbone == other.backbone and one.settings["detector"]["steps"] == 20
    with pytest.raises(ConfigError, match="nope"):
        configure(overrides={"backbone.name": "nope"})


def test_globals_of_a_notebook():
    """Modules, functions, private names and Jupyter's own pass; a plain value that is no parameter is
    refused, before anything else."""
    namespace = {**PARAMETERS, "seed": 4, "np": np, "configure": configure, "_i1": "text", "__name__": "__main__",
                 "In": ["x"], "Out": {}, "Path": Path, "exit": "exit"}
    assert configure(namespace).seed == 4
    with pytest.raises(ConfigError, match="unknown parameter 'bogus'.*method, altub"):
        configure(namespace | {"bogus": 1})


@pytest.mark.parametrize("given",
                         [dict(out_dir=Path("elsewhere")), dict(data_root=Path("here")), dict(seed=np.int64(3)),
                          dict(bogus=Path("x"))], ids=str)
def test_no_argument_is_dropped(given):
    "A value of another type than expected is taken or refused; never replaced by the default without a word."
    try:
        config = configure(**given)
    except ConfigError:
        return
    ((name, value),) = given.items()
    assert str(getattr(config, name)) == str(value)


def test_btad_categories_are_two_digits():
    "papermill reads `-p category 01` as a number."
    assert configure(dataset="btad", data_root="x", category=1).category == "01"


# -- the run folder ------------------------------------------------------------------------------------------------

def test_folder(done):
    "The files of the contract, and nothing unfinished."
    assert {p.name for p in done.out.iterdir()} == FILES


def test_metrics_json(done):
    m = stored(done)
    assert list(m) == ["config", "results", "timing", "environment"] and m["results"].keys() == {"last", "best"}
    for protocol in ("last", "best"):
        assert m["results"][protocol].keys() == {"weave", "mean"}
        for values in m["results"][protocol].values():
            assert list(values) == METRICS and all(isinstance(v, float) and 0 <= v <= 1 for v in values.values())
        assert m["results"][protocol]["mean"] == m["results"][protocol]["weave"]
    assert m["config"] == json.loads((done.out / "config.json").read_text())
    assert m["environment"] == json.loads((done.out / "environment.json").read_text())
    assert ({k: m["config"][k] for k in ("method", "dataset", "category", "preset", "seed")}
            == dict(method="fastflow", dataset="toy", category="weave", preset="smoke", seed=0))
    assert m["config"]["settings"]["schedule"]["epochs"] == 2


def test_environment(done):
    "Versions, hardware and the code's revision stand beside the numbers."
    e, t = stored(done)["environment"], stored(done)["timing"]
    assert e["torch"] == torch.__version__.split("+")[0] or e["torch"] == torch.__version__
    assert ({"revision", "python", "flowrepro", "timm", "numpy", "device", "device_name", "cpus", "threads", "system",
             "date"} <= e.keys())
    assert time.strptime(e["date"], "%Y-%m-%dT%H:%M:%SZ") and e["device_name"] not in ("", "x86_64")
    assert e["device"] == done.config.device
    assert e["revision"] is None or len(e["revision"].rstrip("+")) == 12
    assert {"features_s", "train_s", "evaluate_s", "epoch_s", "epoch_without_bank_s", "ram_mib"} <= t.keys()
    assert all(t[k] > 0 for k in t)
    assert t["epoch_without_bank_s"] > t["epoch_s"] and t["ram_mib"] > 50


def test_history_csv(unified):
    "A row per evaluation; the mean and each category."
    rows = pd.read_csv(unified.out / "history.csv")
    assert list(rows["epoch"]) == [2, 4, 6]
    assert {"loss", "lr", "seconds", *METRICS, "bolt/aupro_30", "weave/image_auroc"} <= set(rows.columns)
    last = stored(unified)["results"]["last"]
    assert rows["pixel_ap"].iloc[-1] == pytest.approx(last["mean"]["pixel_ap"])
    assert rows["bolt/image_ap"].iloc[-1] == pytest.approx(last["bolt"]["image_ap"])


def test_scores_csv(done):
    "A row per test image, in the data set's order; its scores give the image metrics."
    from sklearn.metrics import average_precision_score, roc_auc_score

    with open(done.out / "scores.csv") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["image", "category", "defect", "label", "score"] and len(rows) == len(done.test_set) == 10
    assert [r["image"] for r in rows] == [str(r.image) for r in done.test_set.records]
    assert {r["defect"] for r in rows} == {"good", "pull", "stain", "misweave"}
    labels, scores = [int(r["label"]) for r in rows], [float(r["score"]) for r in rows]
    last = stored(done)["results"]["last"]["weave"]
    assert roc_auc_score(labels, scores) == pytest.approx(last["image_auroc"])
    assert average_precision_score(labels, scores) == pytest.approx(last["image_ap"])


def test_model_file_gives_the_same_scores(done):
    "The detector in the folder predicts what the run has measured."
    maps, scores = Detector.load(done.out / "model.safetensors").predict(done.test_set)
    np.testing.assert_allclose(scores, pd.read_csv(done.out / "scores.csv")["score"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps, done.maps, rtol=1e-4, atol=1e-4)


def test_unified_run(unified):
    "category='all': one model, a row for every category, and their mean."
    results = stored(unified)["results"]
    assert list(results["last"]) == list(results["best"]) == ["biscuit", "bolt", "speckle", "weave", "mean"]
    for m in METRICS:
        assert (results["last"]["mean"][m]
                == pytest.approx(np.mean([results["last"][c][m] for c in ("biscuit", "bolt", "speckle", "weave")])))
    assert len(unified.train_set) == 40 and len(pd.read_csv(unified.out / "scores.csv")) == 40


def test_categories_are_evaluated_alone(unified):
    "The numbers of a category are those of its own images."
    from flowrepro.metrics import evaluate

    rows = [i for i, r in enumerate(unified.test_set.records) if r.category == "bolt"]
    own = unified.test_set.filter(category="bolt")
    assert (evaluate(unified.maps[rows], own.masks(), unified.scores[rows], own.labels)
            == pytest.approx(stored(unified)["results"]["last"]["bolt"]))


def test_best_is_at_least_last(unified):
    "Best on test is of each metric alone the evaluation with the highest mean over categories; last is the last one."
    results, evaluated = stored(unified)["results"], [r["results"] for r in unified.history if "results" in r]
    assert len(evaluated) == 3
    for m in results["best"]["mean"]:
        best = max(evaluated, key=lambda r: r["mean"][m])
        for c in results["best"]:
            assert results["best"][c][m] == pytest.approx(best[c][m])
            assert results["last"][c][m] == pytest.approx(evaluated[-1][c][m])
    assert results["best"] != results["last"]


def test_best_and_mean_of_given_numbers():
    rows = [{"results": {"a": {"x": 0.2, "y": 0.9}}}, {"loss": 1.0}, {"results": {"a": {"x": 0.5, "y": 0.1}}}]
    assert best_results(rows) == {"a": {"x": 0.5, "y": 0.9}} and best_results([{"loss": 1.0}]) == {}
    several = [{"results": {"a": {"x": 0.9}, "b": {"x": 0.2}, "mean": {"x": 0.55}}},
               {"results": {"a": {"x": 0.7}, "b": {"x": 0.6}, "mean": {"x": 0.65}}}]
    assert best_results(several) == several[1]["results"]  # one evaluation for all categories
    unknown = [{"results": r["results"] | {"c": {"x": float("nan")}, "mean": {"x": float("nan")}}} for r in several]
    # a category without masks
    assert best_results(unknown)["b"] == {"x": 0.6}
    assert math.isnan(best_results(unknown)["mean"]["x"])
    assert mean_results({"a": {"x": 0.2}, "b": {"x": 0.4}}) == {"x": pytest.approx(0.3)}
    assert math.isnan(mean_results({"a": {"x": 0.2}, "b": {"x": float("nan")}})["x"])


@pytest.mark.parametrize("epochs, evaluations, expected",
                         [(10, 5, (2, 4, 6, 8, 10)), (2, 2, (1, 2)), (3, 10, (1, 2, 3)), (7, 1, (7,)),
                          (40, 8, tuple(range(5, 41, 5)))])
def test_evaluation_epochs(epochs, evaluations, expected):
    assert evaluation_epochs(epochs, evaluations) == expected


def test_same_seed_same_numbers(done, toy, tmp_path):
    "Every number, score and weight; with another seed, others."
    again, other = (execute(tmp_path / str(s), data_root=str(toy), seed=s) for s in (0, 1))
    assert stored(again)["results"] == stored(done)["results"]
    assert weights(again) == weights(done) != weights(other)
    assert ((again.out / "scores.csv").read_bytes() == (done.out / "scores.csv").read_bytes()
            != (other.out / "scores.csv").read_bytes())


def test_features_from_a_cache(done, toy, tmp_path):
    "The second run finds the features, says so, and gives the same numbers."
    first, second = (execute(tmp_path / str(i), data_root=str(toy), overrides={"cache": str(tmp_path / "cache")})
                     for i in range(2))
    assert stored(first)["results"] == stored(second)["results"] == stored(done)["results"]
    assert stored(first)["timing"]["features_s"] > 0
    assert stored(second)["timing"]["features_s"] == 0
    assert stored(second)["timing"]["epoch_without_bank_s"] is None


def test_no_masks_no_pixel_metrics(parts_folder, tmp_path):
    "Null in the file, NaN in Python; the image metrics are there, in the results, the means and the tables."
    from flowrepro.reports import metrics_table, report

    run = execute(tmp_path / "run", dataset="folder", data_root=str(parts_folder), category="all")
    text = (run.out / "metrics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    for protocol in stored(run)["results"].values():
        for values in protocol.values():
            assert all(values[m] is None for m in PIXEL) and all(0 <= values[m] <= 1 for m in set(METRICS) - set(PIXEL))
    assert metrics_table(run.metrics)["pixel AUROC"].isna().all()
    assert report(tmp_path).read_text().count("–") >= len(PIXEL)


@pytest.mark.parametrize("name", ["a#b", "50%25", 'a"b', "é"])
def test_a_link_leads_to_a_file_of_any_name(name, tmp_path):
    from flowrepro.reports import link

    (tmp_path / name).touch()
    place = link(tmp_path / name, tmp_path, "x").removeprefix('<a href="').removesuffix('">x</a>')
    assert unquote(urlsplit(place).path) == name and not set(place) & set('#"<>')


@pytest.mark.filterwarnings("ignore:image_auroc, image_ap, image_f1max. NaN")
@pytest.mark.parametrize("method", ["fastflow", "hgad"])
def test_no_normal_test_images(method, parts_folder, tmp_path):
    "Maps and scores, and no latents to show, which are of normal images."
    root = tmp_path / "parts"
    shutil.copytree(parts_folder / "good", root / "train/good")
    shutil.copytree(parts_folder / "spot", root / "test/spot")
    run = execute(tmp_path / "run", method=method, dataset="folder", data_root=str(root), category="all")
    assert len(run.scores) == 3 and stored(run)["results"]["last"]["parts"]["image_auroc"] is None
    assert not (run.out / "latents.npz").exists() and (run.out / "pictures.npz").exists()


# -- every method --------------------------------------------------------------------------------------------------

RUNS = {
    "cflow": dict(method="cflow"),
    "cflow-altub": dict(method="cflow", altub=True, overrides={"every": 2, "batch": 5, "fibers": 16}),
    "fastflow-altub": dict(altub=True, overrides={"every": 2, "batch": 5, "altub": {"joint": False}}),
    "hgad": dict(method="hgad", category="all"),
    "hgad-one-category": dict(method="hgad", category="weave"),
    "hgad-one-centre": dict(method="hgad", category="all", overrides={"centres": 1}),
    "hgad-classes-altub": dict(method="hgad", category="all", altub=True,
                               overrides={"base": "classes", "detector": {"joint": True}}),
    "hgad-single": dict(method="hgad", category="weave", overrides={"base": "standard"}),
    "hgad-single-altub": dict(method="hgad", category="weave", altub=True,
                              overrides={"base": "diagonal", "every": 2, "batch": 5}),
}


@pytest.fixture(scope="module")
def every(toy, tmp_path_factory):
    "`every(name)`: a smoke run of `RUNS`, done once."
    known, root = {}, tmp_path_factory.mktemp("every")
    return lambda name: known.get(name) or known.setdefault(name,
                                                            execute(root / name, data_root=str(toy), **RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_smoke_runs(name, every):
    "The whole folder, numbers for every metric, and the detector in it predicts what the run has measured."
    run = every(name)
    m, categories = stored(run), ["biscuit", "bolt", "speckle", "weave"] if run.config.category == "all" else ["weave"]
    assert {p.name for p in run.out.iterdir()} == FILES
    assert m["config"]["method"] == run.config.method
    assert m["config"]["altub"] == run.config.altub
    for protocol in ("last", "best"):
        assert list(m["results"][protocol]) == categories + ["mean"]
        assert all(list(v) == METRICS and all(x is not None and 0 <= x <= 1 for x in v.values())
                   for v in m["results"][protocol].values())
    assert len(pd.read_csv(run.out / "scores.csv")) == 10 * len(categories)
    assert list(pd.read_csv(run.out / "history.csv")["epoch"]) == [1, 2]
    maps, scores = DETECTORS[run.config.method].load(run.out / "model.safetensors").predict(run.test_set)
    np.testing.assert_allclose(scores, pd.read_csv(run.out / "scores.csv")["score"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps, run.maps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_images_have_scores_of_their_own(name, every):
    run = every(name)
    assert len(set(run.scores.round(6))) > 0.8 * len(run.test_set) and (run.maps.std((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", ["cflow-altub", "fastflow-altub", "hgad-classes-altub", "hgad-single-altub"])
def test_altub_has_moved_the_base(name, every):
    "With other settings than without it, another base."
    run = every(name)
    assert run.altub is not None and (name != "fastflow-altub" or not run.altub.joint)
    assert all(p.abs().max() > 0 for n, p in run.detector.bases.named_parameters()
               if n.endswith(("mean", "log_scale", "phi")))


@pytest.mark.parametrize("name", ["cflow-altub", "hgad"])
def test_every_method_is_seeded(name, every, toy, tmp_path):
    again = execute(tmp_path / "again", data_root=str(toy), **RUNS[name])
    assert stored(again)["results"] == stored(every(name))["results"] and weights(again) == weights(every(name))


@pytest.mark.parametrize("name", RUNS)
def test_results_by_class_mode(name, every):
    "HGAD with a mixture reports all three, the chosen one as the run itself; the others none."
    results = stored(every(name))["results"]
    if name not in ("hgad", "hgad-one-category", "hgad-one-centre", "hgad-classes-altub"):
        assert results.keys() == {"last", "best"}
        return
    modes = results["last_by_class_mode"]
    assert results.keys() == {"last", "best", "last_by_class_mode"}
    assert list(modes) == ["known", "inferred", "inferred-top"]
    assert every(name).detector.config["class_mode"] == "inferred"
    assert flat(modes["inferred"]) == pytest.approx(flat(results["last"]))
    assert every(name).detector.calibration.tolist() == weights(every(name))["calibration"]
    for values in modes.values():
        assert values.keys() == results["last"].keys()
        assert all(list(v) == METRICS and all(0 <= x <= 1 for x in v.values()) for v in values.values())
    assert (modes["known"] == modes["inferred"]) == (name == "hgad-one-category"), (
        "a single category is always known, one of several not")


def test_known_categories(toy, tmp_path, every):
    "With class_mode='known' the training is the same, and the results are those reported for it."
    run, other = (execute(tmp_path / "run", data_root=str(toy), method="hgad", category="all",
                          overrides={"class_mode": "known"}), every("hgad"))
    modes = stored(other)["results"]["last_by_class_mode"]
    assert flat(stored(run)["results"]["last"]) == pytest.approx(flat(modes["known"])) != flat(modes["inferred"])
    assert flat(stored(run)["results"]["last_by_class_mode"]) == pytest.approx(flat(modes))
    own, its = weights(run), weights(other)
    assert all(own[k] == its[k] for k in own if k != "calibration") and own["calibration"] != its["calibration"]


@pytest.mark.parametrize("name, forms", [
    ("cflow", {"published (fastflow)", "published (cflow)"}),
    ("hgad-single", {"published (fastflow)", "published (cflow)"}),
    ("hgad", {"published (hgad)", "likelihood", "entropy", "product"})])
def test_scores_of_every_method(name, forms, every):
    "Those that the method's parts allow."
    table = runs.score_forms(every(name))
    assert set(table.index.get_level_values("score")) == {"this run", "default"} | forms
    assert table.notna().all(axis=None)


def test_rotated_copies(toy, tmp_path):
    "Several variants of each training image, none of the test images."
    run = execute(tmp_path / "run", data_root=str(toy), method="hgad", category="all",
                  overrides={"rotate": 5.0, "copies": 2})
    assert len(run.train_bank) == len(run.labels) == 80
    assert len(run.test_bank) == 40
    assert torch.equal(run.labels[:40], run.labels[40:])


def test_mask_size(toy, tmp_path):
    "Masks and maps of another size than the images."
    run = execute(tmp_path / "run", data_root=str(toy), overrides={"mask_size": 32})
    assert run.maps.shape == (10, 32, 32)
    assert all(v is not None for v in stored(run)["results"]["last"]["weave"].values())


def test_other_scores_of_the_same_run(done):
    "A row per form; this run's own form repeats its numbers."
    forms = runs.score_forms(done)
    assert (set(forms.index.get_level_values("score")) == {"this run", "default", "published (fastflow)",
                                                           "published (cflow)"})
    assert forms.loc[("weave", "this run")].to_dict() == pytest.approx(stored(done)["results"]["last"]["weave"])
    assert not forms.loc[("weave", "published (fastflow)")].equals(forms.loc[("weave", "this run")])


def test_test_images_do_not_train(done, toy, tmp_path):
    "Calibration and standardisation are of the training images alone: other test images, the same model."
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "toy" / "toy.json").unlink()
    for kind in ("test", "ground_truth"):
        for f in (tmp_path / "toy" / "weave" / kind).rglob("001*.png"):
            f.unlink()
    run = execute(tmp_path / "run", data_root=str(tmp_path / "toy"))
    assert len(run.test_set) == 6 and weights(run) == weights(done)
    scores = pd.read_csv(done.out
                         / "scores.csv")["score"][[not r.image.name.startswith("001") for r in done.test_set.records]]
    np.testing.assert_allclose(pd.read_csv(run.out / "scores.csv")["score"], scores, rtol=1e-4, atol=1e-5)


# -- complete or not -----------------------------------------------------------------------------------------------

def test_metrics_json_comes_last(toy, tmp_path, monkeypatch):
    "When it appears, everything else is there; a run that ends before leaves none."
    run = Run(configure(data_root=str(toy), out_dir=str(tmp_path / "run")), progress=False).train()
    own, seen = runs.write_json, []
    monkeypatch.setattr(runs, "write_json",
                        lambda path, value: seen.append((path.name, {p.name for p in run.out.iterdir()}))
                        or own(path, value))
    assert not (run.out / "metrics.json").exists()
    run.finish()
    assert [name for name, _ in seen] == ["metrics.json"] and seen[0][1] - {"checkpoint.pt"} == FILES - {"metrics.json"}


def crash(*args):
    raise OSError("disk full")


def test_unfinished_run_has_no_result(done, toy, tmp_path, monkeypatch):
    """An older result does not stand for it; started again it finishes, with the numbers
    of a run that was never stopped."""
    config = configure(data_root=str(toy), out_dir=str(tmp_path / "run"))
    shutil.copytree(done.out, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "save", crash)
        run = Run(config, progress=False)
        assert not (run.out / "metrics.json").exists()
        with pytest.raises(OSError, match="disk full"):
            run.train().finish()
    assert not (run.out / "metrics.json").exists() and (run.out / "checkpoint.pt").exists()
    again = Run(config, progress=False).train()
    again.finish()
    assert stored(again)["results"] == stored(done)["results"] and weights(again) == weights(done)
    assert (run.out / "scores.csv").read_bytes() == (done.out / "scores.csv").read_bytes()
    assert {p.name for p in run.out.iterdir()} == FILES


def test_resumed_run(unified, toy, tmp_path, monkeypatch):
    """Killed after the first of three evaluations: history, best and last are those of the whole run,
    without repeating what is done."""
    config = configure(data_root=str(toy), category="all", overrides='{"epochs": 6, "evaluations": 3}',
                       out_dir=str(tmp_path / "run"))
    own, trained = training.train_batch, []

    def step(*args):
        trained.append(1)
        return crash() if len(trained) == 18 else own(*args)  # 5 steps an epoch: in the fourth

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_batch", step)
        with pytest.raises(OSError):
            Run(config, progress=False).train()
    trained.clear()
    monkeypatch.setattr(training, "train_batch", lambda *args: trained.append(1) or own(*args))
    again = Run(config, progress=False).train()
    again.finish()
    assert len(trained) == 20
    evaluating = [r["evaluating"] for r in again.history if "results" in r]
    assert len(evaluating) == 3 and stored(again)["timing"]["evaluate_s"] == sum(evaluating)  # the killed one's, too
    assert stored(again)["results"] == stored(unified)["results"]
    assert weights(again) == weights(unified)
    assert pd.read_csv(again.out / "history.csv").drop(columns="seconds").equals(
        pd.read_csv(unified.out / "history.csv").drop(columns="seconds"))


def test_resumed_wherever_it_lies(toy, tmp_path, monkeypatch):
    "A stopped run goes on under another name of its folder, or when that was moved, and with its features elsewhere."
    config = lambda **more: configure(data_root=str(toy), **more)
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "save", crash)
        with pytest.raises(OSError):
            Run(config(out_dir=str(tmp_path / "run")), progress=False).train().finish()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train_batch", crash)  # all of it is done
    for more in ({}, {"overrides": {"features.cache": str(tmp_path / "cache"), "where": "disk"}}):
        again = Run(config(out_dir="moved", **more), progress=False).train()
        assert [r["epoch"] for r in again.history] == [1, 2]


def test_checkpoint_of_another_configuration(done, toy, tmp_path, monkeypatch):
    "Is not resumed from: a changed setting, even one that the schedule does not know, starts anew."
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "save", crash)
        with pytest.raises(OSError):
            execute(out, data_root=str(toy), overrides='{"clamp": 1.0}')
    run = execute(out, data_root=str(toy))
    assert weights(run) == weights(done) and stored(run)["results"] == stored(done)["results"]


@pytest.mark.parametrize("what", ["images", "code"])
def test_checkpoint_of_other_images_or_code(what, toy, tmp_path, monkeypatch, capsys):
    "Is not resumed from: the run begins anew and says so."
    shutil.copytree(toy, data := tmp_path / "toy")
    config = configure(data_root=str(data), out_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "save", crash)
        with pytest.raises(OSError):
            Run(config, progress=False).train().finish()
    if what == "code":
        monkeypatch.setattr(runs, "training_code", lambda: "another")
    else:
        images = sorted((data / "weave/train/good").iterdir())
        images[0].write_bytes(images[1].read_bytes())
    again, fresh = (Run(config, progress=False).train(),
                    Run(replace(config, out_dir=str(tmp_path / "fresh")), progress=False).train())
    assert f"source.{dict(images='features', code='code')[what]}" in capsys.readouterr().out
    assert [r["loss"] for r in again.history] == [r["loss"] for r in fresh.history]


def test_published_product_of_one_category(toy, tmp_path):
    "Whose entropy is zero: its score is the likelihood."
    published = asdict(PUBLISHED["hgad"])
    run = execute(tmp_path / "run", data_root=str(toy), method="hgad", overrides={"score": published})
    assert (run.detector.score.criterion, run.detector.score.image_criterion) == ("likelihood", "likelihood")
    assert run.scores.std() > 1e-3


def test_saved_model_sees_what_the_run_saw(toy, tmp_path):
    "Scores of the test images' files are those in scores.csv, for another interpolation, too."
    run = execute(tmp_path / "run", data_root=str(toy), overrides={"interpolation": "lanczos"})
    table = pd.read_csv(run.out / "scores.csv")
    model = Detector.load(run.out / "model.safetensors")
    assert model.predict(list(table["image"]))[1].numpy() == pytest.approx(table["score"].to_numpy(), abs=1e-5)


def test_json_is_written_atomically(tmp_path, monkeypatch):
    "A crash while writing leaves what was there."
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}


def test_json_is_replaced_whole(tmp_path):
    "Who has the old one open reads the old one to its end."
    write_json(tmp_path / "a.json", {"x": 1})
    with open(tmp_path / "a.json") as old:
        write_json(tmp_path / "a.json", {"x": 2})
        assert json.load(old) == {"x": 1}


def test_json_values(tmp_path):
    "What is not finite becomes null; numpy and paths become plain."
    write_json(tmp_path / "a.json",
               {"a": float("nan"), "b": [np.float32(0.5), float("inf"), (1, np.int64(2))],
                3: {"p": Path("x"), "t": True, "n": None}})
    assert (json.loads((tmp_path / "a.json").read_text())
            == {"a": None, "b": [0.5, None, [1, 2]], "3": {"p": "x", "t": True, "n": None}})


# -- real images ---------------------------------------------------------------------------------------------------

def test_tiny_visa(tiny_visa, tmp_path):
    "A smoke run on real images in the original layout."
    run = execute(tmp_path / "run", dataset="visa", data_root=str(tiny_visa), category="fryum")
    last = stored(run)["results"]["last"]["fryum"]
    assert all(v is not None and 0 <= v <= 1 for v in last.values()) and last["pixel_auroc"] > 0.5
    assert asdict(run.config)["dataset"] == "visa" and run.history[-1]["loss"] < run.history[0]["loss"]


# -- the notebook --------------------------------------------------------------------------------------------------

def papermill(out, *arguments) -> subprocess.CompletedProcess:
    "The command line of the contract."
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/experiments/run.ipynb"), str(out), "-k", "python3",
               "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def test_papermill(toy, tmp_path):
    """The whole notebook at preset smoke: run folder, figures and tables; the numbers are
    those of the same run in Python."""
    ran = papermill(tmp_path / "out.ipynb", "-p", "data_root", str(toy), "-p", "category", "bolt", "-p", "out_dir",
                    "run", "-p", "seed", "2", "-p", "overrides", '{"epochs": 3}')
    assert ran.returncode == 0, ran.stderr[-2000:]
    out = tmp_path / "run"
    assert FILES <= {p.name for p in out.iterdir()}
    assert ([p.name for p in sorted((out / "figures").iterdir())]
            == ["1_data.png", "2_history.png", "3_gallery.png", "4_scores.png"])
    assert all(p.stat().st_size > 2000 for p in (out / "figures").iterdir())
    last = max((p for p in out.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    assert last.name == "metrics.json" and (out / "score_forms.csv").exists()  # a folder that holds it is complete
    assert len(pd.read_csv(out / "score_forms.csv")) == 4
    m = json.loads((out / "metrics.json").read_text())
    assert ((m["config"]["seed"], m["config"]["category"], m["config"]["settings"]["schedule"]["epochs"])
            == (2, "bolt", 3))
    same = execute(tmp_path / "again", data_root=str(toy), category="bolt", seed=2, overrides='{"epochs": 3}')
    assert m["results"]["last"]["bolt"] == pytest.approx(stored(same)["results"]["last"]["bolt"], abs=2e-3)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    shown = [o for c in cells for o in c.get("outputs", []) if "data" in o]
    assert sum("image/png" in o["data"] for o in shown) == 4 and sum("text/html" in o["data"] for o in shown) >= 3
    assert "best on test" in str(shown) and "last epoch" in str(shown)


def test_papermill_unknown_parameter(tmp_path):
    "Papermill itself would let it pass: the run stops, names it and the allowed ones, and leaves no folder."
    ran = papermill(tmp_path / "out.ipynb", "-p", "bogus", "1", "-p", "out_dir", "run")
    assert ran.returncode != 0 and "unknown parameter 'bogus'" in ran.stderr and "data_root" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_run_notebook_checks_first(tmp_path):
    "No kernel is started, no folder made, for parameters that cannot be."
    for parameters in (dict(preset="large"), dict(bogus=1), dict(overrides='{"epoch": 1}')):
        with pytest.raises(ConfigError):
            run_notebook(parameters | {"out_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_run_notebook_that_fails(toy, tmp_path):
    "The error is named with the notebook that shows where; there is no metrics.json."
    with pytest.raises(DataError, match="DataError.*wave.*run.ipynb"):
        run_notebook(dict(data_root=str(toy), category="wave", out_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("given", [{"soft": "no"}, {"score.align_corners": []}, {"transform.size": 64.0},
                                   {"backbone.name": None}, {"temperature": float("inf")}, {"epochs": True}])
def test_override_of_a_wrong_kind(given):
    with pytest.raises(ConfigError):
        configure(overrides=given)


def test_two_backbones():
    with pytest.raises(ConfigError, match="resnet18"):
        configure(backbone="resnet18", overrides={"backbone.name": "resnet34"})


def test_levels_that_the_backbone_lacks_are_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="rising numbers"):
        Run(configure(out_dir=tmp_path, overrides={"backbone.levels": [9]}), progress=False)


def test_a_run_from_before_idle(tmp_path):
    "Is of the same settings as one without."
    p = dict(preset="smoke", dataset="toy")
    config = json.loads(json.dumps(asdict(configure(p))))
    del config["settings"]["schedule"]["idle"]
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config}))
    assert not made_otherwise(tmp_path, p)
    assert made_otherwise(tmp_path, p | {"overrides": {"idle": True}})


def test_overrides_of_paths_and_numpy_numbers():
    "Are texts and numbers."
    given = {"features.cache": Path("x"), "size": np.int64(64), "lr": np.float32(0.5), "epochs": np.int64(3)}
    s = configure(overrides=given).settings
    assert s["features"]["cache"] == "x" and s["transform"]["size"] == 64 and s["schedule"]["lr"] == 0.5
    with pytest.raises(ConfigError, match="a text or null"):
        configure(overrides={"features.cache": 3})


def test_weights_of_the_backbone_are_those_asked_for(toy, tmp_path):
    made = [Run(configure(data_root=str(toy), out_dir=str(tmp_path / w), weights=w), progress=False).backbone
            for w in ("auto", "random")]
    assert made[0].weight_id != made[1].weight_id


def test_times_are_of_all_evaluations(done, monkeypatch):
    "The median epoch; nothing about a backbone that did not run."
    monkeypatch.setattr(done, "history", [r | {"seconds": s} for r, s in zip(done.history * 2, (1.0, 2.0, 9.0))])
    assert runs.timing(done)["epoch_s"] == 2.0 and runs.timing(done)["train_s"] == 12.0
    monkeypatch.setattr(done.train_bank, "seconds", 0.0)
    assert runs.timing(done)["epoch_without_bank_s"] is None


def test_contents_say_what_is_missing(done, unified, monkeypatch):
    assert runs.contents(done) == "10 training images, 10 test images, 6 of them anomalous"
    for label in (0, 1):
        monkeypatch.setattr(done, "test_set", unified.test_set.filter(category="weave", label=label))
        assert "all of one kind" in runs.contents(done)
    monkeypatch.undo()
    monkeypatch.setattr(unified, "config", replace(unified.config, dataset="btad"))
    assert "3 official categories are not here, so the mean is of 4: without 01, 02, 03" in runs.contents(unified)


def test_history_has_the_mean_once(unified):
    assert not [c for c in pd.read_csv(unified.out / "history.csv") if c.startswith("mean/")]


def test_every_evaluation_counts(unified, monkeypatch):
    monkeypatch.setattr(unified, "history", [{"seconds": 1.0}, unified.evaluate(6) | {"seconds": 1.0, "evaluating": 7.0},
                                             unified.evaluate(6) | {"seconds": 1.0}])
    assert runs.timing(unified)["evaluate_s"] > 7


def test_what_makes_a_run_another_one(done, toy):
    "Its settings, its weights, AltUB; not where features are kept, nor on which data."
    same = dict(data_root=str(toy))
    for change in ({}, {"overrides": {"where": "ram"}}, {"overrides": {"features.cache": "x"}}, {"seed": 3}):
        assert not runs.made_otherwise(done.out, same | change)
    for change in ({"weights": "random"}, {"altub": True, "overrides": {"altub.every": 2}}, {"method": "cflow"},
                   {"overrides": {"lr": 0.5}}):
        assert runs.made_otherwise(done.out, same | change)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    "With what to do, before any work."
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run: nothing can be written there .*; give a folder where you may write"):
        runs.open_folder(configure(out_dir=str(tmp_path / "file/run")))


def test_nothing_of_another_configuration_is_left(toy, tmp_path):
    "Its score forms and pictures would stand beside the new run's numbers, if that is stopped."
    given = dict(method="fastflow", dataset="toy", data_root=str(toy), category="weave", preset="smoke", device="cpu",
                 out_dir=str(tmp_path))
    runs.open_folder(configure(given))
    (tmp_path / "figures").mkdir()
    made = [tmp_path / name for name in (*runs.MADE, "figures/1_data.png")]
    for path in made:
        path.touch()
    runs.open_folder(configure(given))
    assert all(path.exists() for path in made)
    runs.open_folder(configure(given | {"seed": 1}))
    assert not any(path.exists() for path in made)


def test_images_without_masks_are_told(tmp_path):
    "The pixel metrics would be missing without a word."
    for kind, n in (("good", 8), ("bad", 3)):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (40, 40), (9 * i, 0, 0)).save(tmp_path / f"own/{kind}/{i}.png")
    run = Run(configure(dict(method="fastflow", dataset="folder", data_root=str(tmp_path / "own"), category="own",
                             preset="smoke", device="cpu", out_dir=str(tmp_path / "run"))), progress=False)
    assert "anomalous images of own are without masks, so pixel metrics cannot be computed there" in runs.contents(run)


def test_names_that_are_not_utf8(tmp_path):
    "They end no training; where a notebook cannot hold them, that is said before it."
    names, own = ("0", "1", os.fsdecode(b"caf\xe9")), tmp_path / "own"
    for kind, stems in (("train/good", "0123"), ("test/good", "012"), ("test/bad", names), ("masks/bad", names)):
        (own / kind).mkdir(parents=True)
        for i, stem in enumerate(stems):
            Image.new("L", (40, 40), 60 * i).save(own / kind / f"{stem}.png")
            if kind == "masks/bad":
                Image.fromarray(np.eye(40, dtype=np.uint8)).save(own / kind / f"{stem}.png")
    run = execute(tmp_path / "run", dataset="folder", data_root=str(own), category="own")
    assert run.metrics["results"]["last"]["own"]["pixel_auroc"] is not None
    assert pd.read_csv(run.out / "scores.csv")["image"].str.contains("caf.udce9", regex=True).sum() == 1
    odd = str(own.rename(tmp_path / os.fsdecode(b"parts\xe9")))
    with pytest.raises(ConfigError, match="UTF-8 alone; rename"):
        run_notebook(dict(dataset="folder", data_root=odd, category="all", out_dir=str(tmp_path / "nb")))


@pytest.mark.parametrize("name, category", [("mean", "all"), ("mean", "weave"), ("mean", "mean"), ("all", "all")])
def test_a_category_called_as_something_else(name, category, toy, tmp_path):
    "Its results would be replaced by the mean, or all categories would be trained on in its place."
    shutil.copytree(toy / "bolt", tmp_path / "data" / name)
    shutil.copytree(toy / "weave", tmp_path / "data" / "weave")
    given = configure(dataset="mvtec", data_root=str(tmp_path / "data"), category=category, out_dir=str(tmp_path / "r"))
    if category == "weave":
        Run(given, progress=False)
        return
    with pytest.raises(ConfigError, match="rename its folder"):
        Run(given, progress=False)
    assert not (tmp_path / "r").exists()


# -- what a run keeps for the figures ------------------------------------------------------------------------------

def test_trace_of_the_base_begins_before_the_training(every):
    "Each epoch has its own state, the last one is the detector's; the weights of classes and centres are among them."
    run = every("cflow-altub")
    saved = np.load(run.out / "latents.npz")
    assert saved["trace/epochs"].tolist() == [0, 1, 2]
    for name in ("mean", "log_scale"):
        trace = saved[f"trace/0.{name}"]
        assert not trace[0].any() and len({row.tobytes() for row in trace}) == 3
        assert np.array_equal(trace[-1], getattr(run.detector.bases[0], name).detach())
    hgad = np.load(every("hgad").out / "latents.npz")
    assert {f"trace/0.{name}" for name in ("mu", "phi", "psi")} <= set(hgad)
    assert hgad["trace/0.psi"].shape == (3, 4, 3) and "trace/0.delta" not in hgad


def test_latents_are_of_normal_test_images_in_evaluation(every, monkeypatch):
    "Mean and variance of each level, the sample of the middle one, and every centre of every class by its name."
    run = every("hgad")
    saved, detector = np.load(run.out / "latents.npz"), run.detector.eval()
    normal = torch.as_tensor(np.flatnonzero(run.test_set.labels == 0))
    for level, z in enumerate(diagnostics.latent_rows(detector, run.test_bank[normal])):
        z = z.detach().flatten(0, 1).numpy()
        np.testing.assert_allclose(saved[f"mean{level}"], z.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(saved[f"var{level}"], z.var(0), rtol=1e-3, atol=1e-4)
    assert saved["level"] == len(detector.bases) // 2 == 1 and saved["classes"].tolist() == run.test_set.categories
    np.testing.assert_allclose(saved["centres"], detector.bases[1].all_centres().detach(), rtol=1e-2, atol=1e-2)
    before = []
    monkeypatch.setattr(diagnostics, "latent_moments", lambda d, *_: before.append(d.training) or [])
    diagnostics.latents_file(run.out.parent / "x.npz", detector.train(), run.test_bank, run.test_set, {})
    assert before == [False]


def test_moments_of_many_batches(bank_of):
    "Over images and positions, to many digits: a mean far from zero takes nothing from the variance."
    z = 3000 + torch.randn(70, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    shown = SimpleNamespace(latents=lambda f: [(x, None) for x in f], backbone=SimpleNamespace(shapes=[(2, 3, 3)]),
                            device="cpu")
    ((mean, var),) = diagnostics.latent_moments(shown, bank_of(z), np.arange(5, 70), batch=32)
    own = z[5:].double().transpose(0, 1).flatten(1)
    assert torch.allclose(mean, own.mean(1)) and torch.allclose(var, own.var(1, correction=0), rtol=1e-4)


class Shown(list):
    "Samples with masks, in the place of a data set."
    records, transform = property(lambda self: self), None


def test_positions_that_are_defects(monkeypatch):
    "More than half of one is; the rest of an anomalous image is neither, and so is one without a mask; else normal."
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[:2, 2:] = mask[2:, 0] = True
    mask[2:, 2:], mask[3, 3] = True, False  # a quarter, all, half, three quarters
    shown = Shown(SimpleNamespace(label=l, mask=m and m[0]) for l, m in ((1, [mask]), (1, None), (0, [mask])))
    monkeypatch.setattr(diagnostics, "read_mask", lambda record, transform: record.mask)
    labels = [diagnostics.position_labels(shown, i, (2, 2)).tolist() for i in range(3)]
    assert labels == [[-1, 1, -1, 1], [-1] * 4, [0] * 4]


def test_sampled_latents_are_those_of_their_places(toy, bank_of, monkeypatch):
    "With the category and the label of their own position; as many of each category, spread over its images."
    data = load("toy", toy, "all", Transform(32))[1]
    data.records = data.records[::-1]  # in another order than that of the categories
    z = torch.stack([torch.arange(len(data)).repeat_interleave(256), torch.arange(256).repeat(len(data))])
    z = z.reshape(2, -1, 16, 16).transpose(0, 1).float()  # each position tells where it is
    shown = SimpleNamespace(latents=lambda f: [(x, None) for x in f], backbone=SimpleNamespace(shapes=[(2, 16, 16)]),
                            device="cpu")
    saved = diagnostics.latent_sample(shown, bank_of(z), data, 0, rows=64)
    image, position = saved["z"].astype(int).T
    assert saved["category"].tolist() == [data.records[i].category for i in image]
    labels = [diagnostics.position_labels(data, i, (16, 16))[p] for i, p in zip(image, position)]
    assert labels == saved["defective"].astype(int).tolist() and 0 < sum(labels)
    for category in data.categories:
        own = (saved["category"] == category) & ~saved["defective"]
        assert own.sum() == 8 and len(set(image[own])) > 2
    passes = []
    shown.latents = lambda f: passes.append(len(f[0])) or [(x, None) for x in f]
    again = diagnostics.latent_sample(shown, bank_of(z), data, 0, rows=64, batch=20)
    assert all(np.array_equal(again[k], saved[k]) for k in saved)
    assert passes == [20, len(set(image)) - 20]  # a batch a pass, not an image
    monkeypatch.setattr("flowrepro.data.open_image", None)  # masks alone are decoded
    few = diagnostics.latent_sample(shown, bank_of(z), data, 0, rows=1)
    assert set(few["category"]) == set(data.categories)  # one at least


def test_pictures_are_of_their_images(toy, tmp_path):
    "Map, mask, image, names and colour range of the same test image; each kind of defect once, and a normal one."
    data = load("toy", toy, "all", Transform(32))[1]
    maps = np.arange(len(data), dtype=np.float32)[:, None, None] * np.ones((1, 32, 32), np.float32)
    maps[:, :16] += 0.25  # upper half
    maps[:, 5, 5] += 9  # one pixel of each is above the colour range
    diagnostics.pictures_file(tmp_path / "p.npz", data, maps, side=32)
    saved, rows = np.load(tmp_path / "p.npz"), diagnostics.picture_rows(data)
    assert saved["map"][:, 0, 0].tolist() == [i + 0.25 for i in rows] and saved["map"][:, -1, 0].tolist() == rows
    names = [(data.records[i].category, data.records[i].defect, data.records[i].label) for i in rows]
    assert list(zip(*(saved[k].tolist() for k in ("category", "defect", "label")))) == names
    for k, i in enumerate(rows):
        sample, own = data[i], maps[[r.category == data.records[i].category for r in data.records]]
        assert np.array_equal(saved["image"][k], sample.image.permute(1, 2, 0))
        assert np.array_equal(saved["mask"][k], sample.mask) and sample.mask.any() == sample.label
        assert (saved["low"][k], saved["high"][k]) == pytest.approx(tuple(np.percentile(own, (50, 99.8))))
    for category in data.categories:
        own = [i for i in rows if data.records[i].category == category]
        records = [data.records[i] for i in own]
        assert [r.label for r in records] == [1, 1, 1, 0] and len({r.defect for r in records}) == 4
        kinds = [(r.category, r.defect) for r in data.records]
        assert own == [kinds.index((category, r.defect)) for r in records]  # the first of each
    assert len(diagnostics.picture_rows(data, each=2)) == 2 * len(data.categories)
    assert sorted(diagnostics.picture_rows(data, each=9)) == sorted(rows)  # none twice where there are no more


def test_gallery_shows_each_image_with_its_own_map(done, unified):
    """In the order of the hardest, beside the threshold of its category, whose side the sign tells;
    one scale for all maps."""
    import matplotlib.pyplot as plt

    from flowrepro.reports import gallery, hardest, thresholds

    for run in (done, unified):
        table = runs.score_table(run)
        rows, limit = [i for own in hardest(table, 2).values() for i in own], thresholds(table)
        figure = gallery(run, 2)
        for i, image, mask, drawn in zip(rows, *np.array(figure.axes).reshape(3, len(rows))):
            sample = run.test_set[i]
            assert np.array_equal(image.images[0].get_array(), sample.image.permute(1, 2, 0))
            assert all(np.array_equal(shown.get_array(), sample.mask) for shown in mask.images)
            assert np.array_equal(drawn.images[0].get_array(), run.maps[i])
            assert drawn.images[0].get_clim() == pytest.approx(np.percentile(run.maps, (50, 99.8)))
            sign = "≥" if run.scores[i] >= limit[i] else "<"
            assert drawn.get_title() == f"{run.scores[i]:.4g} {sign} {limit[i]:.4g}"
        plt.close(figure)


# -- what stands beside a result -----------------------------------------------------------------------------------

def test_revision_of_a_checkout(tmp_path, monkeypatch):
    "Of the one that tracks the package; '+' if a tracked file was changed, not for a file that is not tracked."
    def git(*args):
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *args],
                              check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "package").mkdir()
    for name in ("other.txt", "package/__init__.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(runs, "HERE", tmp_path / "package")
    git("init"), git("add", "other.txt"), git("commit", "-m", "other")
    assert runs.revision() is None  # somebody's own checkout, in which the package is installed
    git("add", "package"), git("commit", "-m", "package")
    (tmp_path / "new.txt").write_text("")
    assert runs.revision() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "other.txt").write_text("changed")
    assert runs.revision() == git("rev-parse", "--short=12", "HEAD") + "+"


def test_numbers_of_numpy_within_a_list():
    "And in evaluations, which no group holds."
    s = configure(overrides={"kernels": [np.int64(3), np.int64(1)], "evaluations": np.int64(1)}).settings
    assert s["detector"]["kernels"] == (3, 1) and s["evaluations"] == 1
    json.dumps(s["detector"])
    with pytest.raises(ConfigError, match="betas"):
        configure(overrides={"betas": [0.9, float("inf")]})


@pytest.mark.parametrize("name", ["backbone", "weights", "out_dir"])
@pytest.mark.parametrize("value", ["", " ", None, 3])
def test_a_text_that_is_none(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*: a text"):
        configure({name: value})


def test_features_take_the_time_of_both_banks(done, monkeypatch):
    monkeypatch.setattr(done.train_bank, "seconds", 3.0), monkeypatch.setattr(done.test_bank, "seconds", 5.0)
    assert runs.timing(done)["features_s"] == 8.0


def test_model_file_knows_what_it_was_trained_on(done):
    "So that a threshold is of other images."
    files = [r.image for r in (*done.train_set.records, *done.test_set.records)]
    new = not_trained_on(Detector.load(done.out / "model.safetensors"), files)
    assert new == [r.image for r in done.test_set.records]


@pytest.mark.parametrize("name, kind", [("DataError", DataError), ("ConfigError", ConfigError),
                                        ("WeightsError", WeightsError), ("KeyError", RuntimeError)])
def test_errors_of_a_notebook_keep_their_kind(name, kind, tmp_path, monkeypatch):
    "With its path; a disk that is full is told as one, another error of a file is not."
    import papermill

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    error = papermill.PapermillExecutionError(0, 1, "", name, "why", [])
    with pytest.raises(kind, match=f"{name}: why .*x.ipynb") as raised:
        runs.execute_notebook("run", tmp_path / "x.ipynb", {})
    assert type(raised.value) is kind
    for number, full in ((errno.ENOSPC, True), (errno.EACCES, False)):
        error = OSError(number, "refused")
        with pytest.raises(OSError) as raised:
            runs.execute_notebook("run", tmp_path / "x.ipynb", {})
        assert raised.value.errno == number and ("disk full; free some" in str(raised.value)) == full


def test_engine_of_a_notebook_is_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "execute_notebook", lambda *a: a)
    given = dict(out_dir=str(tmp_path), seed=2)
    assert run_notebook(given, engine="here") == ("run", tmp_path / "run.ipynb", given, "here", False)
