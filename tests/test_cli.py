"""The command line: exit codes, help with examples, and each command on small data."""
import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flowrepro import __version__
from flowrepro.backbones import Backbone
from flowrepro.cli import main, parser, print_summary, run_each, run_name
from flowrepro.data import Dataset, Transform, load
from flowrepro.detectors import HGAD, Detector


def run(capsys, *arguments) -> tuple[int, str, str]:
    "Exit code, standard output and standard error of a command."
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


PROGRAM = (sys.executable, "-c", "import sys; from flowrepro.cli import main; sys.exit(main())")


def helps(p, path=()) -> dict[str, str]:
    "The help of every command and action, by name."
    found = {" ".join(path): p.format_help()} if path else {}
    for action in p._subparsers._group_actions if p._subparsers else []:
        for name, sub in action.choices.items():
            found |= helps(sub, (*path, name))
    return found


@pytest.fixture(scope="module")
def model(parts_folder, tmp_path_factory):
    "A detector that `fit` wrote, of packaged weights and one epoch."
    path = tmp_path_factory.mktemp("model") / "parts.safetensors"
    assert main(["fit", str(parts_folder), "--size", "64", "--epochs", "1", "--device", "cpu", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    "A folder with one finished run, by `flowrepro run`."
    out = tmp_path_factory.mktemp("runs")
    assert (
        main(["run", "--data-root", str(toy), "--category", "weave", "--preset", "smoke", "--device", "cpu", "--out",
              str(out)]) == 0)
    return out


# -- help ----------------------------------------------------------------------------------------------------------

def test_every_command_has_an_example():
    "Which parses, as it stands."
    texts = helps(parser())
    assert ({"run", "reproduce", "report", "bench", "data", "fit", "predict", "export", "data toy", "data check"}
            <= texts.keys())
    for name, text in texts.items():
        examples = re.findall(r"^\s*(?:example: )?flowrepro (.+)$",
                              text.partition("example:")[2] and text[text.index("example:"):], re.M)
        assert examples and all(e.startswith(name) for e in examples), f"{name} --help has no example of its own"
        for example in examples:
            parser().parse_args(shlex.split(example))


def test_every_flag_says_its_default():
    "And what it is for."
    def actions(p):
        for action in p._actions:
            yield from (a for sub in action.choices.values()
                        for a in actions(sub)) if action.nargs == "A..." else [(p, action)]
    for p, action in actions(parser()):
        assert action.help, f"{p.prog}: {action.dest} has no help"
        if action.option_strings and action.default is not False and action.default not in (None, "", "==SUPPRESS=="):
            assert re.search(rf"\(default\s+{re.escape(str(action.default))}", p.format_help()), (
                f"{p.prog} {action.option_strings[0]} does not say its default")
        assert not re.search(r"\(default\s+(None|False|)\)|\(default[^()]*\)\s+\(default", p.format_help()), (
            f"{p.prog} says a default that is none, or says it twice")


@pytest.mark.parametrize("command, expected", [
    ("run", dict(method="fastflow", altub=False, category="each", dataset="toy", preset="demo", seeds=[0],
                 overrides="{}", device="auto", out="runs", resume=False)),
    ("reproduce", dict(preset="demo", only="", seeds=None, jobs=None, dry_run=False, out="runs/reproduce")),
    ("bench", dict(repeats=5, device="cpu", out=None)), ("data toy x", dict(seed=0)),
    ("data check x --dataset visa", dict(crop=False)),
    ("fit x", dict(method="fastflow", altub=False, category="all", dataset="folder", size=256, policy="squash",
                   backbone="auto", epochs=30, seed=0, device="auto", out="model.safetensors")),
    ("predict m x", dict(good=None, fpr=None, device="auto", out="predictions")),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_command_does_without_flags(command, expected):
    "Is what the guides and earlier results were made by, so that a change of it shows here."
    parsed = vars(parser().parse_args(command.split()))
    assert {k: parsed[k] for k in expected} == expected


@pytest.mark.parametrize("arguments",
                         [["--help"], ["run", "--help"], ["data", "check", "--help"], ["predict", "--help"]],
                         ids=" ".join)
def test_help(arguments, capsys):
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("usage: flowrepro")


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"flowrepro {__version__}\n")


@pytest.mark.parametrize("arguments",
                         [[], ["train"], ["run", "--epochs", "3"], ["data"], ["data", "check", "x"], ["fit"],
                          ["predict", "m"], ["run", "--seeds", "one"], ["export", "m", "x"],
                          ["fit", "x", "--policy", "pad"]], ids=" ".join)
def test_wrong_usage(arguments, capsys):
    "Exit code 2 and the usage."
    code, out, err = run(capsys, *arguments)
    assert code == 2 and "usage: flowrepro" in err and not out


def test_as_a_program(tmp_path):
    "The installed entry point hands the exit code on; a name that the terminal cannot show is no reason to stop."
    ran = subprocess.run([*PROGRAM, "data", "check", str(tmp_path / "nöne"), "--dataset", "mvtec"], cwd=tmp_path,
                         env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and not ran.stderr and r"n\xf6ne" in ran.stdout


@pytest.mark.parametrize("unbuffered, code", [("1", 0), ("", 2)], ids=["while it works", "at its end"])
def test_a_reader_that_has_gone(unbuffered, code, tmp_path):
    "Such as `head` is no error: what was done by then decides the exit code, and nothing is said."
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([*PROGRAM, "data", "check", str(tmp_path / "none"), "--dataset", "mvtec"], stdout=writing,
                         env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert ran.returncode == code and not ran.stderr


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["none", "of a notebook"])
def test_without_a_terminal(stream, tmp_path, monkeypatch):
    "Nor any stream that could be told how to write."
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["data", "check", str(tmp_path / "none"), "--dataset", "mvtec"]) == 2


# -- data ----------------------------------------------------------------------------------------------------------

def test_data_toy(tmp_path, capsys, monkeypatch):
    "Writes the set in MVTec AD's layout; again changes nothing; another folder's content is not touched."
    from flowrepro import data
    own = data.make_toy
    monkeypatch.setattr(data, "make_toy",
                        lambda folder, seed=0: own(folder, seed, size=32, n_train=5, n_test_good=2, n_per_defect=1))
    code, out, _ = run(capsys, "data", "toy", tmp_path / "toy", "--seed", 3)
    assert code == 0
    assert str(tmp_path / "toy") in out
    assert json.loads((tmp_path / "toy/toy.json").read_text())["seed"] == 3
    assert len(list((tmp_path / "toy/weave/train/good").iterdir())) == 5
    assert (tmp_path / "toy/bolt/ground_truth/rust/000_mask.png").is_file()
    assert run(capsys, "data", "toy", tmp_path / "toy", "--seed", 3)[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for other in ([tmp_path / "toy", "--seed", 4], [tmp_path / "mine"]):
        code, _, err = run(capsys, "data", "toy", *other)
        assert code == 2 and str(other[0]) in err and "new folder" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_data_check(toy, capsys):
    "Counts per category and split; no problem, exit code 0."
    code, out, _ = run(capsys, "data", "check", toy, "--dataset", "toy")
    assert code == 0 and "0 problems" in out
    rows = {tuple(line.split()[:2]): line.split()[2:4] for line in out.splitlines() if len(line.split()) >= 4}
    assert all(rows[c, "train"] == ["10", "0"] and rows[c, "test"] == ["4", "6"]
               for c in ("weave", "speckle", "bolt", "biscuit"))


def test_data_check_finds_every_problem(toy, tmp_path, capsys):
    "A broken copy: exit code 2, each file named with its remedy, all in one pass."
    root = tmp_path / "broken"
    shutil.copytree(toy, root)
    (root / "toy.json").unlink()
    image, mask, small = (root / "weave/train/good/003.png", root / "bolt/ground_truth/rust/001_mask.png",
                          root / "speckle/ground_truth/bald/000_mask.png")
    image.write_bytes(image.read_bytes()[:500])
    mask.unlink()
    Image.new("L", (9, 9), 255).save(small)
    shutil.copy(toy / "weave/train/good/000.png", root / "biscuit/lost.png")
    code, out, _ = run(capsys, "data", "check", root, "--dataset", "toy")
    assert code == 2 and "4 problems:" in out
    for path, words in ((image, "truncated"), (mask, "missing"), (small, "9×9"),
                        (root / "biscuit/lost.png", "without a label")):
        (line,) = [line for line in out.splitlines() if path.name in line and path.parent.name in line
                   and "restore" in line or str(path) in line]
        assert words in line and ("restore" in line or "move" in line)


@pytest.mark.parametrize("root, dataset, words",
                         [("", "coco", "allowed: toy, mvtec"), ("weave", "toy", "one level too low"),
                          ("nowhere", "visa", "no such folder")])
def test_data_check_of_something_else(root, dataset, words, toy, capsys):
    code, out, _ = run(capsys, "data", "check", toy / root, "--dataset", dataset)
    assert code == 2 and "1 problem:" in out and words in out


def test_data_check_against_official_counts(toy, tmp_path, capsys):
    "Fewer images than the official release are a problem."
    shutil.copytree(toy / "weave", tmp_path / "bottle")
    code, out, _ = run(capsys, "data", "check", tmp_path, "--dataset", "mvtec")
    assert code == 2 and "officially 209" in out and "not here: cable" in out


def test_data_check_crop(tiny_visa, capsys):
    "What a center crop would lose is counted whatever the problems are; these have fewer images than the release."
    code, out, _ = run(capsys, "data", "check", tiny_visa, "--dataset", "visa", "--crop")
    assert code == 2 and "officially 450" in out and "center crop: 0 defects cut, 0 of them wholly lost" in out
    code, out, _ = run(capsys, "data", "check", tiny_visa / "none", "--dataset", "visa", "--crop")
    assert code == 2 and "no such folder" in out and "center crop" not in out  # nothing to count


def test_data_check_crop_of_wide_images(tmp_path, capsys, monkeypatch):
    """A defect outside of the center square is counted, beside a mask that cannot be
    decoded too; the folder is read once."""
    from flowrepro import data
    root = tmp_path / "wide"
    for kind, n in (("good", 5), ("spot", 3)):
        for i in range(n):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 10), (n, i, 0)).save(root / kind / f"{i}.png")
    (root / "masks/spot").mkdir(parents=True)
    for i, x in enumerate((0, 14, 22)):  # of the center square 10 ... 19
        mask = np.zeros((10, 30), np.uint8)
        mask[:, x] = 255
        Image.fromarray(mask).save(root / f"masks/spot/{i}.png")
    reading, times = data.read_folder, []
    monkeypatch.setitem(data.READERS, "folder", lambda *a, **k: times.append(a) or reading(*a, **k))
    code, out, _ = run(capsys, "data", "check", root, "--dataset", "folder", "--crop")
    assert len(times) == 1
    assert code == 0
    assert "center crop: 2 defects cut, 2 of them wholly lost" in out
    assert "wide: 2 cut" in out
    assert "0 problems" in out
    assert "center crop" not in run(capsys, "data", "check", root, "--dataset", "folder")[1]
    broken = root / "masks/spot/2.png"
    broken.write_bytes(broken.read_bytes()[:46])
    code, out, _ = run(capsys, "data", "check", root, "--dataset", "folder", "--crop")
    assert code == 2 and "center crop: 1 defect cut" in out and "1 problem:" in out and "2.png" in out


@pytest.mark.parametrize("arguments, words", [
    (["run", "--dataset", "mvtec", "--category", "bottle"], "needs data_root"),
    (["run", "--preset", "large", "--category", "weave"], "smoke, demo, real, paper"),
    (["run", "--overrides", "{{\"epoch\": 1}}", "--category", "weave"], "epochs"),
    (["run", "--method", "patchcore"], "fastflow, cflow, hgad"),
    (["run", "--altub", "--overrides", "{{\"base\": \"standard\"}}", "--category", "weave"], "base='standard'"),
    (["run", "--overrides", "{{\"every\": 3}}", "--category", "weave"], "altub=False"),
    (["fit", "{}", "--dataset", "toy", "--method", "cflow", "--altub", "--epochs", "1", "--size", "64", "--category",
      "weave"], "never comes"),
    (["run", "--data-root", "{}/nowhere", "--preset", "smoke"], "nowhere"),
    (["run", "--data-root", "{}", "--preset", "smoke", "--category", "wave"], "weave"),
    (["fit", "{}/nowhere"], "no such folder"), (["fit", "{}", "--size", "64"], "one level too high; use root"),
    (["fit", "{}", "--dataset", "toy", "--category", "wave"], "weave"),
    (["fit", "{}", "--dataset", "toy", "--backbone", "resnet1800"], "unknown backbone"),
    (["fit", "{}", "--dataset", "toy", "--weights", "nowhere.pth"], "no such weight file"),
    (["fit", "{}", "--dataset", "toy", "--method", "patchcore"], "fastflow"),
    (["fit", "{}", "--dataset", "toy", "--epochs", "0", "--size", "64"], "epochs 0"),
    (["fit", "{}", "--dataset", "toy", "--device", "cuda"], "no CUDA device is available here"),
    (["predict", "m", ""], "no detector at m"),
    (["fit", "{}", "--dataset", "toy", "--size", "0"], "size"),
    (["predict", "{}/none.safetensors", "{}"], "model.safetensors"), (["predict", "{}/toy.json", "{}"], "toy.json"),
    (["report", "{}"], "metrics.json"), (["report", "{}/nowhere"], "nowhere"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_errors(arguments, words, toy, tmp_path, capsys, monkeypatch):
    "Exit code 2; one line on standard error that says what to do; no file is made."
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *[a.format(toy) for a in arguments])
    assert code == 2 and err.startswith("flowrepro: ") and words in err and "Traceback" not in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


FILES = ["fit {0}/weave --size 64 --out", "export {1} {0}/weave --out", "bench --only metrics --out"]
FOLDERS = ["run --data-root {0} --preset smoke --category weave --out", "predict {1} {0}/weave --out", "data toy"]


@pytest.mark.parametrize("command, out",
                         [(c, out) for c in FILES + FOLDERS for out in ("file/m.onnx", "/proc/none/m.onnx")]
                         + [(c, "folder") for c in FILES])
def test_nowhere_to_write(command, out, toy, model, tmp_path, capsys, monkeypatch):
    "Is said before the work, not after it."
    from flowrepro import bench, data, runs
    for where, name in ((Detector, "fit"), (Detector, "predict"), (bench, "main"), (runs, "run_notebook"),
                        (data, "make_toy")):
        monkeypatch.setattr(where, name, lambda *a, **k: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch(), (tmp_path / "folder").mkdir()
    code, _, err = run(capsys, *command.format(toy, model).split(), out)
    assert code == 2
    assert re.fullmatch(r"flowrepro: (/proc|file).*: nothing can be written there .*\n"
                        r"|flowrepro: folder: is a folder; give a file in it\n", err)


# -- own images ----------------------------------------------------------------------------------------------------

def test_fit(model):
    "A detector of the size and backbone asked for."
    detector = Detector.load(model)
    assert detector.backbone.size == 64
    assert detector.backbone.name == "tf_efficientnet_lite0"
    assert detector.calibration.isfinite().all()


def test_fit_says_where(parts_folder, tmp_path, capsys):
    code, out, _ = run(capsys, "fit", parts_folder, "--size", 64, "--epochs", 1, "--seed", 1, "--weights", "random",
                       "--out", tmp_path / "m.safetensors")
    assert code == 0
    assert f"fastflow trained on 10 images: {tmp_path / 'm.safetensors'}" in out
    kept = load("folder", parts_folder, transform=Transform(64))[1].filter(label=0)
    detector = Detector.load(tmp_path / "m.safetensors", weights="random")
    highest = detector.predict(kept)[1].max()
    assert detector.backbone.name == "tf_efficientnet_lite0"  # auto
    assert f"2 good images kept back score {highest:.4g} at most; " in out and "probability of at most 33%" in out


def test_fit_good_images_alone(parts_folder, tmp_path, capsys):
    "A folder with train/good and nothing else: all of them are trained on."
    shutil.copytree(parts_folder / "good", tmp_path / "mine/train/good")
    code, out, _ = run(capsys, "fit", tmp_path / "mine", "--size", 64, "--epochs", 1, "--device", "cpu", "--out",
                       tmp_path / "m.safetensors")
    assert code == 0
    assert "trained on 12 images" in out and "kept back" not in out
    assert len(Detector.load(tmp_path / "m.safetensors").predict(tmp_path / "mine")[1]) == 12


def test_fit_is_seeded(parts_folder, model, tmp_path):
    "The same command, the same detector, whatever was drawn before; another seed, another."
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(7)
    for seed in (0, 1):
        main(["fit", str(parts_folder), "--size", "64", "--epochs", "1", "--device", "cpu", "--seed", str(seed),
              "--out", str(tmp_path / f"{seed}")])
    a, b, c = (load_file(p) for p in (model, tmp_path / "0", tmp_path / "1"))
    assert all((a[k] == b[k]).all() for k in a) and any((a[k] != c[k]).any() for k in a if k.endswith("perm"))


@pytest.mark.parametrize("method, flags, epochs", [("cflow", [], 1), ("cflow", ["--altub"], 6), ("hgad", [], 1)],
                         ids=str)
def test_fit_every_method(method, flags, epochs, parts_folder, tmp_path):
    "A detector of that method, whose scores differ between images."
    path = tmp_path / "m.safetensors"
    assert (
        main(["fit", str(parts_folder), "--method", method, *flags, "--size", "64", "--epochs", str(epochs), "--device",
              "cpu", "--out", str(path)]) == 0)
    detector = Detector.load(path)
    assert detector.method == method
    assert bool(flags) == any(p.abs().max() > 0 for p in detector.base_parameters() if method == "cflow")
    assert len(set(detector.predict(parts_folder / "spot")[1].numpy().round(6))) == 3


def test_predict(model, parts_folder, tmp_path, capsys):
    "A score for each image, the highest first, and a heat map over each."
    code, out, _ = run(capsys, "predict", model, parts_folder, "--device", "cpu", "--out", tmp_path / "heat")
    table = pd.read_csv(tmp_path / "heat/scores.csv")
    assert code == 0 and f"15 images scored: {tmp_path / 'heat/scores.csv'}" in out
    assert list(table.columns) == ["image", "score"] and len(table) == 15
    assert (table["score"].diff().dropna() <= 0).all()
    assert set(table["image"]) == {str(p) for p in parts_folder.rglob("*.*") if p.is_file()}
    pictures = sorted((tmp_path / "heat").rglob("*.png"))
    assert len(pictures) == 15 and {Image.open(p).size for p in pictures} == {(64, 64)}
    maps, scores = Detector.load(model).predict([table["image"][0]])
    assert scores.item() == pytest.approx(table["score"][0], rel=1e-4)


def test_predict_of_a_model_that_must_be_told_the_category(tmp_path, capsys, monkeypatch):
    "It is told on the command line, also of the good images; without it, or with another one, an error says so."
    monkeypatch.chdir(tmp_path)
    train, test = load("toy", None, "all", Transform(64))
    backbone = Backbone(levels=(3,), pyramid=(1.0, 0.5), size=64)
    detector = HGAD(backbone, steps=2, code=16, centres=3, class_mode="known")
    detector.fit(Dataset(train.records[::8], train.transform), epochs=1, progress=False).save("m.safetensors")
    images = next(r.image.parent for r in test.records if r.category == "weave" and not r.label)
    told = ["predict", "m.safetensors", images, "--good", images, "--fpr", "0.1"]
    assert run(capsys, *told, "--category", "weave")[0] == 0
    scores = pd.read_csv("predictions/scores.csv").set_index("image")["score"]
    want = detector.predict(sorted(images.iterdir()), category="weave", progress=False)[1]
    assert np.allclose(scores[[str(p) for p in sorted(images.iterdir())]], want, rtol=1e-4)
    for more, words in (([], "category=..."), (["--category", "nut"], "category 'nut'")):
        code, _, error = run(capsys, *told, *more)
        assert code == 2 and words in error


def test_predict_with_a_threshold(model, parts_folder, tmp_path, capsys):
    """Good images that were not trained on say which are anomalous, whatever others lie beside them; too few of them
    are an error that says how many it takes."""
    good, rng = tmp_path / "good", np.random.default_rng(1)
    shutil.copytree(parts_folder / "good", good)
    for i in range(9):
        Image.fromarray(rng.integers(120, 160, (48, 40, 3), dtype=np.uint8)).save(good / f"new {i}.png")
    code, out, _ = run(capsys, "predict", model, good, "--good", good, "--fpr", "0.1", "--device", "cpu",
                       "--out", tmp_path / "heat")
    table = pd.read_csv(tmp_path / "heat/scores.csv")
    names = table["image"].map(lambda p: Path(p).name)
    kept = table[names.str.contains("new") | names.isin(["04.bmp", "09.png"])]  # every fifth is kept back
    assert code == 0 and "11 good images for the threshold, 10 left out that the detector was trained on" in out
    limit = kept["score"].max()
    assert list(table["anomalous"]) == list(table["score"] > limit)
    assert f"{table['anomalous'].sum()} of 21 images above {limit:.4g}, " in out and "at most 0.1\n" in out
    for n, words in ((None, "2 good images cannot vouch for 0.05; give 19 or more"),
                     (4, "trained on every image of it; give others, kept back")):
        few = tmp_path / f"few {n}"
        few.mkdir()
        for p in sorted((parts_folder / "good").iterdir())[:n]:
            shutil.copy(p, few)
        code, _, err = run(capsys, "predict", model, parts_folder, "--good", few, "--device", "cpu", "--out",
                           tmp_path / "other")
        assert code == 2 and words in err and not (tmp_path / "other/scores.csv").exists()


@pytest.mark.parametrize("flags, words", [(["--fpr", "0.3"], "with --good"), (["--good", ""], "missing")], ids=str)
def test_predict_with_half_of_a_threshold(flags, words, model, parts_folder, tmp_path, capsys):
    code, _, err = run(capsys, "predict", model, parts_folder, *flags, "--device", "cpu", "--out", tmp_path / "heat")
    assert code == 2 and words in err and not (tmp_path / "heat/scores.csv").exists()


def test_predict_one_image(model, parts_folder, tmp_path, capsys):
    code, out, _ = run(capsys, "predict", model, parts_folder / "spot/00.bmp", "--device", "cpu", "--out",
                       tmp_path / "heat")
    assert code == 0 and {p.name for p in (tmp_path / "heat").iterdir()} == {"scores.csv", "00.bmp.png"}


def test_predict_on_the_device_asked_for(model, parts_folder, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "predict", model, parts_folder, "--device", "cuda", "--out", tmp_path / "heat")
    assert code == 2 and "no CUDA device is available here" in err


def test_predict_keeps_pictures_apart(model, parts_folder, tmp_path, capsys):
    "Images of the same name in folders of the same name, or of another format: a picture each."
    for where in ("a/good/1.png", "b/good/1.png", "a/good/1.bmp"):
        (tmp_path / "in" / where).parent.mkdir(parents=True, exist_ok=True)
        Image.open(parts_folder / "good/00.bmp").save(tmp_path / "in" / where)
    assert run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_predict_among_its_own_pictures(model, parts_folder, tmp_path, capsys):
    "Heat maps of an earlier call that lie among the images are no images to score."
    shutil.copytree(parts_folder / "spot", tmp_path / "in")
    for _ in range(2):
        code, out, _ = run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out", tmp_path / "in/heat")
        assert code == 0 and "3 images scored" in out
    code, out, _ = run(capsys, "predict", model, tmp_path / "in/00.bmp", "--device", "cpu", "--out", tmp_path)
    assert code == 0 and "1 images scored" in out  # above the images
    code, out, _ = run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out", tmp_path / "elsewhere")
    assert code == 0 and "3 images scored" in out
    code, _, err = run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out",
                       tmp_path / "in/../in")
    assert code == 2 and "heat maps would lie among the images" in err


def test_fit_crops(parts_folder, tmp_path, capsys):
    "A detector that was trained on crops takes crops."
    assert (run(capsys, "fit", parts_folder, "--size", "64", "--epochs", "1", "--policy", "crop", "--out",
                tmp_path / "m.safetensors", "--device", "cpu")[0] == 0)
    assert Detector.load(tmp_path / "m.safetensors").seen_through() == Transform(64, "crop")


def test_run_of_bad_input(parts_folder, toy, tmp_path, capsys):
    "Exit code 2, though it is found inside a notebook."
    shutil.copytree(toy, tmp_path / "toy")
    image = sorted((tmp_path / "toy/weave/train/good").iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    code, _, err = run(capsys, "run", "--preset", "smoke", "--data-root", tmp_path / "toy", "--category", "weave",
                       "--out", tmp_path / "runs", "--device", "cpu")
    assert code == 2 and image.name in err and "run.ipynb" in err


def test_predict_bad_images(model, tmp_path, capsys):
    "An empty folder or a broken image: exit code 2, the file named, no table."
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    for given, words in ((tmp_path / "empty", "no image"), (tmp_path / "broken.png", "cannot be decoded"),
                         (tmp_path / "none.png", "missing")):
        code, _, err = run(capsys, "predict", model, given, "--out", tmp_path / "out")
        assert code == 2 and given.name in err and words in err
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_predict_some_bad_images(model, parts_folder, tmp_path, capsys):
    "The others are scored, and the bad one is named: exit code 2. What is no image is counted."
    shutil.copytree(parts_folder / "spot", tmp_path / "in")
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    (tmp_path / "in/readme.txt").write_text("a note")
    for name in ("phone.heic", "scan.gif"):
        (tmp_path / "in" / name).write_bytes(b"another format")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match="in: 3 left out, of another format or linked, .*link.png first"):
        code, out, err = run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 2 and "3 images scored" in out and "not scored: " in err and "broken.png" in err
    assert len(pd.read_csv(tmp_path / "out/scores.csv")) == len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_predict_names_that_are_hard_to_write(model, parts_folder, tmp_path, capsys):
    "One too long for a heat map's, which is told, and one of another encoding, which the table keeps as it is."
    names = ("x" * 248 + ".png", os.fsdecode(b"deep/er/caf\xe9.png"))
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(parts_folder / "good/00.bmp").save(tmp_path / "in" / name)
    code, out, err = run(capsys, "predict", model, tmp_path / "in", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 2 and "2 images scored" in out
    assert err.count("no heat map: ") == 1 and names[0] in err
    assert b"deep/er/caf\xe9.png," in (tmp_path / "out/scores.csv").read_bytes()
    assert (tmp_path / "out" / f"{names[1]}.png").is_file()


def test_predict_on_a_full_disk(model, parts_folder, tmp_path, capsys, monkeypatch):
    "Is not taken for names that are too long: it ends there."
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run(capsys, "predict", model, parts_folder, "--device", "cpu", "--out", tmp_path / "heat")
    assert code == 2 and "no space left" in err and "no heat map" not in err


def test_predict_scores_first(model, parts_folder, tmp_path, monkeypatch):
    "An interrupt among the pictures leaves the scores."
    from flowrepro import reports

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, "overlay", stop)
    assert main(["predict", str(model), str(parts_folder), "--device", "cpu", "--out", str(tmp_path / "heat")]) == 130
    assert len(pd.read_csv(tmp_path / "heat/scores.csv")) == 15


def test_backbone_weights_from_a_file(parts_folder, tmp_path, capsys):
    "What `fit` was given, `predict` and `export` are given, too."
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet.r160_in1k").state_dict(), tmp_path / "w.pth")
    given = ["--weights", tmp_path / "w.pth"]
    code, *_ = run(capsys, "fit", parts_folder, "--backbone", "test_resnet.r160_in1k", "--size", 64,
                   "--epochs", 1, *given, "--out", tmp_path / "m.safetensors", "--device", "cpu")
    assert code == 0
    code, _, err = run(capsys, "predict", tmp_path / "m.safetensors", parts_folder, "--out", tmp_path / "heat")
    assert code == 2 and "pass that file as weights=" in err
    assert run(capsys, "predict", tmp_path / "m.safetensors", parts_folder, *given, "--out", tmp_path / "heat")[0] == 0
    assert run(capsys, "export", tmp_path / "m.safetensors", parts_folder / "good", *given, "--out",
               tmp_path / "m.pt2")[0] == 0


def test_a_run_on_other_images_is_not_replaced(toy, tmp_path, capsys):
    "Two folders of the same name: before any work, with the remedy."
    for where in ("a", "b"):
        shutil.copytree(toy / "weave", tmp_path / where / "weave")
    command = ["run", "--dataset", "folder", "--category", "all", "--preset", "smoke", "--device", "cpu", "--out",
               tmp_path / "runs", "--data-root"]
    (tmp_path / "runs/fastflow-folder-all-smoke-0").mkdir(parents=True)
    (tmp_path / "runs/fastflow-folder-all-smoke-0/config.json").write_text(
        json.dumps({"data_root": str(tmp_path / "a/weave")}))
    code, _, err = run(capsys, *command, tmp_path / "b/weave")
    assert code == 2 and f"holds a run on {tmp_path / 'a/weave'}; give another --out, or a --tag" in err


def test_a_relative_folder_is_that_of_its_run(toy, tmp_path, capsys, monkeypatch):
    """The same words in another working directory are other images, which replace no run;
    other words for the same folder are the same images."""
    from flowrepro import cli

    def begin(jobs: list[dict], resume: bool) -> dict[str, Exception]:
        for job in jobs:
            folder = Path(job["out_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(job))
        return {job["out_dir"]: RuntimeError("stopped") for job in jobs}

    for where in ("a", "b"):
        shutil.copytree(toy / "weave", tmp_path / where / "parts")
    monkeypatch.setattr(cli, "run_each", begin)
    command = ["run", "--dataset", "folder", "--category", "all", "--preset", "smoke", "--out", tmp_path / "runs"]
    for where, root, expected in (("a", "parts", 1), ("b", "parts", 2), ("b", "../a/parts", 1), ("", "a/parts", 1)):
        monkeypatch.chdir(tmp_path / where)
        code, _, err = run(capsys, *command, "--data-root", root)
        assert code == expected and ("holds a run on" in err) == (expected == 2), (where, root, err)


def test_a_package_that_is_not_installed(tmp_path, monkeypatch, capsys):
    "Named, with the extras that bring it."
    monkeypatch.setitem(sys.modules, "flowrepro.reports", None)  # as if its import failed
    code, _, err = run(capsys, "report", tmp_path)
    assert code == 2 and "flowrepro.reports is not installed" in err and "[run]" in err


def test_a_run_of_other_settings_is_not_replaced(finished, toy, tmp_path, capsys):
    "Nor redone by `reproduce` in its place without a word; AltUB that never comes is a mistake in the settings."
    from flowrepro.runs import made_otherwise

    folder = shutil.copytree(next(finished.glob("*/metrics.json")).parent, tmp_path / "runs/fastflow-toy-weave-smoke-0")
    command = ["run", "--data-root", toy, "--category", "weave", "--preset", "smoke", "--device", "cpu", "--out",
               tmp_path / "runs"]
    code, _, err = run(capsys, *command, "--overrides", '{"epochs": 3}')
    assert code == 2 and "holds a run of other settings; give a --tag" in err
    same = dict(dataset="toy", data_root=str(toy), category="weave", preset="smoke")
    assert not made_otherwise(folder, same | {"overrides": {"features.cache": "elsewhere"}})
    assert made_otherwise(folder, same | {"overrides": {"lr": 1.0}}) and not made_otherwise(tmp_path, same)
    code, _, err = run(capsys, *command, "--altub", "--overrides", '{"every": 99}')
    assert code == 2 and "never comes" in err


def test_report_of_what_is_no_run(tmp_path, capsys):
    (tmp_path / "stray").mkdir()
    for content in ("{}", "no json"):
        (tmp_path / "stray/metrics.json").write_text(content)
        code, _, err = run(capsys, "report", tmp_path)
        assert code == 2 and "stray/metrics.json: not the metrics.json of a run" in err and "remove it" in err


# -- runs and reports ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, name",
                         [([], "fastflow"), (["--method", "hgad", "--altub"], "hgad-altub"),
                          (["--tag", "half/lr"], "fastflow-half_lr"),
                                         (["--method", "cflow", "--altub", "--tag", "wide"], "cflow-altub-wide")],
                                         ids=str)
def test_names_of_run_folders(flags, name):
    "Tell method, AltUB, tag, data, category, preset and seed apart."
    assert run_name(parser().parse_args(["run", *flags]), "a/b", 3) == f"{name}-toy-a_b-demo-3"


def test_run(finished):
    "A run folder with its executed notebook, and a report."
    (folder,) = [p for p in finished.iterdir() if p.is_dir()]
    assert folder.name == "fastflow-toy-weave-smoke-0"
    assert (folder / "metrics.json").is_file()
    assert (folder / "run.ipynb").is_file()
    assert (finished / "report.html").is_file()


def test_a_run_that_fails_does_not_stop_the_others(finished, toy, tmp_path, capsys, monkeypatch):
    "It is named and decides the exit code; --resume does again what is not finished, and nothing else."
    from flowrepro import runs

    shutil.copytree(finished, tmp_path / "runs")
    (made,) = finished.glob("*/metrics.json")
    done = []

    def notebook(job, progress):
        done.append(job["category"])
        if job["category"] == "biscuit" and len(done) < 5:
            raise RuntimeError("no memory")
        shutil.copytree(made.parent, job["out_dir"], dirs_exist_ok=True)

    monkeypatch.setattr(runs, "run_notebook", notebook)
    categories = sorted(p.name for p in toy.iterdir() if p.is_dir())
    arguments = ("run", "--preset", "smoke", "--data-root", toy, "--device", "cpu", "--out", tmp_path / "runs")
    code, out, err = run(capsys, *arguments, "--resume")
    assert code == 1 and done == [c for c in categories if c != "weave"] and "finished before" in out
    assert err.count("no memory") == 2 and "report: " in out
    done.clear()
    done.extend(["an earlier call"] * 5)
    assert run(capsys, *arguments, "--resume")[0] == 0 and done[5:] == ["biscuit"]


def test_report(finished, capsys):
    "The table on the terminal, the page with everything in it: figures inlined, nothing loaded from elsewhere."
    (finished / "report.html").unlink()
    code, out, _ = run(capsys, "report", finished)
    page = (finished / "report.html").read_text()
    assert code == 0 and "last epoch" in out and "best on test" in out and f"report: {finished / 'report.html'}" in out
    assert page.count("<img") == 4
    assert "best on test" in page
    assert not re.findall(r"""(?:src|href)="(?!data:)(?!fastflow-toy)[^"]*""", page)
    metrics = json.loads((finished / "fastflow-toy-weave-smoke-0/metrics.json").read_text())["results"]["last"]["weave"]
    assert f"{metrics['image_auroc']:.3f}" in out and f"{metrics['aupro_30']:.3f}" in page


def test_report_leaves_out_what_is_not_complete(finished, tmp_path, capsys):
    "A run without metrics.json does not count; two seeds become mean ± deviation."
    root = tmp_path / "runs"
    shutil.copytree(finished, root)
    second = root / "second"
    shutil.copytree(root / "fastflow-toy-weave-smoke-0", second)
    m = json.loads((second / "metrics.json").read_text())
    m["config"]["seed"] = 1
    m["results"]["last"]["weave"]["image_auroc"] = 0.5
    (second / "metrics.json").write_text(json.dumps(m))
    first = json.loads(
        (root / "fastflow-toy-weave-smoke-0/metrics.json").read_text())["results"]["last"]["weave"]["image_auroc"]
    _, out, _ = run(capsys, "report", root)
    assert f"{(first + 0.5) / 2:.3f} ± {np.std([first, 0.5], ddof=1):.3f}" in out
    (second / "metrics.json").unlink()
    _, out, _ = run(capsys, "report", root)
    assert "±" not in out


@pytest.mark.parametrize("command, before, waits",
                         [(("bench", "--only", "fastflow"), None, None),
                          (("data", "check", "nowhere", "--dataset", "mvtec"), None, "passive"),
                          (("data", "check", "nowhere", "--dataset", "mvtec"), "active", "active")],
                         ids=["bench", "others", "as told"])
def test_waiting_threads_sleep_but_in_a_bench(command, before, waits, monkeypatch, capsys):
    "A bench measures what a plain script would have; everything else leaves the cores to its neighbours."
    from flowrepro import bench

    monkeypatch.setattr(bench, "main", lambda *a, **k: [])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    run(capsys, *command)
    policy = os.environ.pop("OMP_WAIT_POLICY", None)
    assert policy == waits


def test_summary_names_what_differs(capsys):
    rows = [(method, "toy", "smoke", "weave", "last epoch", 1, *["0.900"] * 4) for method in ("FastFlow", "CFLOW-AD")]
    keys, metrics = (["method", "dataset", "preset", "category", "protocol"],
                     ["image AUROC", "pixel AUROC", "pixel AP", "AUPRO@0.3"])
    table = pd.DataFrame(rows, columns=[*keys, "seeds", *metrics]).set_index(keys)
    print_summary(table)
    both = capsys.readouterr().out
    print_summary(table[:1])
    assert all(metric in both for metric in metrics)
    assert "CFLOW-AD" in both and "smoke" not in both and "FastFlow" not in capsys.readouterr().out


def test_resume_does_a_damaged_run_again(tmp_path, monkeypatch):
    "And a category that is too small does not stop the others."
    from flowrepro import runs

    def notebook(job, progress):
        if job["category"] == "a":
            raise runs.ConfigError("never comes")
        Path(job["out_dir"]).mkdir()
        (Path(job["out_dir"]) / "metrics.json").write_text("{")

    monkeypatch.setattr(runs, "run_notebook", notebook)
    jobs = [{"category": c, "seed": 0, "out_dir": str(tmp_path / c)} for c in "ab"]
    assert list(run_each(jobs)) == [jobs[0]["out_dir"]]
    done = []
    monkeypatch.setattr(runs, "run_notebook", lambda job, progress: done.append(job["category"]))
    assert not run_each(jobs, resume=True) and done == ["a", "b"]


def test_every_seed_and_category_is_run(toy, tmp_path, capsys, monkeypatch):
    "Each in its own folder; what is wrong with the last seed is found first; without weights none is tried again."
    from flowrepro import runs
    from flowrepro.backbones import WeightsError

    jobs, error = [], RuntimeError("stop")

    def notebook(job, progress):
        jobs.append(job)
        raise error

    monkeypatch.setattr(runs, "run_notebook", notebook)
    command = ["run", "--preset", "smoke", "--data-root", toy, "--device", "cpu", "--out", tmp_path / "runs"]
    assert run(capsys, *command, "--category", "weave", "--seeds", 0, 2)[0] == 1
    assert [Path(j["out_dir"]).name for j in jobs] == [f"fastflow-toy-weave-smoke-{j['seed']}" for j in jobs]
    assert [j["seed"] for j in jobs] == [0, 2]
    jobs.clear()
    assert run(capsys, *command, "--category", "weave", "--seeds", 0, -1)[0] == 2 and not jobs
    error = WeightsError("no file")
    assert run(capsys, *command, "--seeds", 0, 1)[0] == 2 and len(jobs) == 1


def test_reproduce_and_bench_hand_their_flags_on(tmp_path, capsys, monkeypatch):
    "And `reproduce` its exit code."
    from flowrepro import bench, reproduce

    seen = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *a: seen.append(a) or 3)
    monkeypatch.setattr(bench, "main", lambda *a, **k: seen.append((a, k)))
    code, *_ = run(capsys, "reproduce", "--preset", "real", "--data-root", "D", "--only", "T1, F2,", "--seeds", 3,
                   "--out", "O", "--jobs", 4, "--cluster", "slurm", "--dry-run", "--matrix", "M")
    assert code == 3
    out = str(tmp_path / "ratios.json")
    run(capsys, "bench", "--only", "metrics", "--threads", 1, "--repeats", 7, "--device", "cuda", "--out", out)
    assert seen == [("real", "D", ["T1", "F2"], 3, "O", 4, "slurm", True, "M"),
                    ((["metrics"],), dict(threads=1, repeats=7, out=out, device="cuda"))]


def test_fit_of_one_category_for_so_many_epochs(toy, tmp_path, capsys, monkeypatch):
    own, seen = Detector.fit, []
    monkeypatch.setattr(Detector, "fit", lambda d, images, **k: seen.append(k) or own(d, images, **k | {"epochs": 1}))
    code, out, _ = run(capsys, "fit", toy, "--dataset", "toy", "--category", "weave", "--size", 64, "--epochs", 3,
                       "--seed", 4, "--device", "cpu", "--out", tmp_path / "m.safetensors")
    assert code == 0 and (seen[0]["epochs"], seen[0]["seed"]) == (3, 4) and "trained on 10 images" in out


@pytest.mark.parametrize("method, base", [("fastflow", "diagonal"), ("cflow", "diagonal"), ("hgad", "hierarchical")])
def test_altub_learns_a_base(method, base, parts_folder, tmp_path, capsys, monkeypatch):
    "A diagonal one; HGAD's mixture is learned anyway, and stays."
    def fit(detector, images, **k):
        raise RuntimeError(f"base {detector.config['base']}, altub {bool(k['altub'])}")

    monkeypatch.setattr(Detector, "fit", fit)
    _, _, err = run(capsys, "fit", parts_folder, "--method", method, "--altub", "--size", 64, "--device", "cpu",
                    "--backbone", "test_resnet.r160_in1k", "--weights", "random", "--out", tmp_path / "m.safetensors")
    assert err == f"flowrepro: base {base}, altub True\n"


def test_the_same_folder_by_another_name(toy, tmp_path, monkeypatch):
    "Is the same data."
    from flowrepro.cli import of_the_same_data

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data_root": str(tmp_path / "a")}))
    of_the_same_data(tmp_path, "a"), of_the_same_data(tmp_path, "a/../a")


@pytest.mark.parametrize("before, now, other", [
    ("{", "a", False), ("{}", "a", False), ("[]", "a", False), (None, "a", False),  # nothing to lose
    ('{"data_root": null}', None, False), ('{"data_root": null}', "a", True), ('{"data_root": "a"}', None, True),
], ids=str)
def test_what_a_run_would_replace(before, now, other, tmp_path):
    "Only a run on other images is held back; without a folder the toy set is meant."
    from flowrepro.cli import of_the_same_data

    if before:
        (tmp_path / "config.json").write_text(before)
    with pytest.raises(ValueError, match="give another --out") if other else contextlib.nullcontext():
        of_the_same_data(tmp_path, now)


def test_failed_runs_are_summed_up(toy, tmp_path, capsys, monkeypatch):
    "One as it is; of several their number and the first, whose kind decides the exit code."
    from flowrepro import runs
    from flowrepro.data import DataError

    def notebook(job, progress):
        raise (RuntimeError if job["seed"] == 2 else DataError)(f"broken by {job['seed']}")

    monkeypatch.setattr(runs, "run_notebook", notebook)
    command = ["run", "--preset", "smoke", "--data-root", toy, "--category", "weave", "--device", "cpu", "--out",
               tmp_path / "runs", "--seeds"]
    for seeds, code, last in (([0], 2, "broken by 0"), ([1, 2, 0], 2, "3 runs failed, the first: broken by 1"),
                              ([2, 1], 1, "2 runs failed, the first: broken by 2")):
        got, _, err = run(capsys, *command, *seeds)
        assert (got, err.splitlines()[-1]) == (code, f"flowrepro: {last}")


def test_what_papers_report_is_printed(capsys, monkeypatch):
    "With its notes; nothing where no paper reports any of it."
    from flowrepro import cli, comparisons
    from flowrepro.tables import Table

    for column, shown in (("pixel AUROC: published", True), ("pixel AUROC: measured", False)):
        table = Table("P", "beside", pd.DataFrame({"category": ["weave"], column: ["97.5 [a]"]}), ["[a] a paper"])
        monkeypatch.setattr(comparisons, "beside_papers", lambda runs: table)
        cli.print_published([])
        out = capsys.readouterr().out
        assert ("97.5 [a]" in out and "[a] a paper" in out) if shown else not out


def test_threshold_bears_the_share_it_is_given(model, parts_folder, tmp_path, monkeypatch):
    "Of the images that were not trained on, and refuses good ones of which one cannot be read."
    from flowrepro import cli
    from flowrepro.data import DataError

    rng, detector = np.random.default_rng(0), Detector.load(model)
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    shutil.copytree(parts_folder / "good", tmp_path, dirs_exist_ok=True)  # 10 of 12 were: 11 others vouch for 0.1
    scores = sorted(detector.predict(tmp_path)[1].tolist())
    limits = [cli.threshold_from(detector, str(tmp_path), fpr) for fpr in (0.1, 0.5)]
    assert limits[0] == pytest.approx(scores[-1]) and limits[1] < scores[-1]
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.png"):
        cli.threshold_from(detector, str(tmp_path), 0.1)


def test_heat_maps_are_of_their_image(model, parts_folder, tmp_path, capsys):
    "From the median of all maps to their 99.8th percentile."
    from flowrepro.reports import overlay

    assert run(capsys, "predict", model, parts_folder, "--device", "cpu", "--out", tmp_path / "heat")[0] == 0
    detector, files = Detector.load(model), sorted(p for p in parts_folder.rglob("*.*") if p.is_file())
    maps = detector.predict(files)[0].numpy()
    low, high = np.percentile(maps, [50, 99.8])
    for i in (0, len(files) - 1):
        name = files[i].relative_to(parts_folder).with_name(f"{files[i].name}.png")
        drawn = np.asarray(Image.open(tmp_path / "heat" / name))
        seen = detector.seen_through().image(Image.open(files[i]).convert("RGB")).permute(1, 2, 0).numpy()
        assert np.abs(drawn.astype(int) - overlay(seen, maps[i], low, high)).mean() < 0.01


def test_run_says_what_papers_report(finished, toy, tmp_path, capsys, monkeypatch):
    "Of the runs that it was asked for."
    from flowrepro import cli

    shutil.copytree(finished, tmp_path / "runs")
    seen = []
    monkeypatch.setattr(cli, "print_published", seen.append)
    code, *_ = run(capsys, "run", "--preset", "smoke", "--data-root", toy, "--category", "weave", "--device", "cpu",
                   "--out", tmp_path / "runs", "--resume")
    assert code == 0 and [r["config"]["category"] for r in seen[0]] == ["weave"]
