"""The figures of the papers: what is drawn against the data of fake runs, the files
written, the captions, runs that are missing."""
import base64
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT, run_experiment
from flowrepro import figures
from flowrepro.bases import HierarchicalMixture
from flowrepro.figures import FIGURES
from flowrepro.matrix import load_matrix, run_folder
from flowrepro.metrics import auroc
from flowrepro.reports import hardest, loss_words, outputs_section, read_runs, thresholds

MATRIX = load_matrix()
TOYS = ("biscuit", "bolt", "speckle", "weave")
CHANNELS, EPOCHS = 8, [0, 2, 4, 6]


def fake_history(draw) -> pd.DataFrame:
    "Seven epochs, every second one evaluated; the best is not the last."
    at = np.arange(1, 8)
    values = {m: np.where(at % 2 == 0, 0.7 + 0.25 * draw.random(7), np.nan) for m in ("image_auroc", "pixel_auroc")}
    for v in values.values():
        v[3], v[5] = 0.97, 0.8
    return pd.DataFrame({"epoch": at, "loss": 1.0 / at, **values})


def fake_scores(draw, categories) -> pd.DataFrame:
    "Twenty images a category, half of them anomalous and scored higher by and large."
    labels = np.tile([0, 1], 10)
    return pd.concat(
        [pd.DataFrame({"image": [f"{i}.png" for i in range(20)], "category": c,
                       "defect": np.where(labels, "cut", "good"), "label": labels,
                                    "score": draw.standard_normal(20) + 1.5 * labels}) for c in categories])


def fake_latents(draw, categories, variant) -> dict:
    "Two levels; learned bases with AltUB, centres and their trace with HGAD, none with one Gaussian."
    n = 24 * len(categories)
    arrays = {"level": 1, "z": draw.standard_normal((n, CHANNELS)).astype(np.float16),
              "category": np.repeat(categories, 24),
              "defective": np.tile([False, True], n // 2), "trace/epochs": np.array(EPOCHS)}
    for l in (0, 1):
        arrays |= {f"mean{l}": draw.normal(0, 0.2, CHANNELS).astype(np.float32),
                   f"var{l}": (0.5 + draw.random(CHANNELS)).astype(np.float32)}
        if variant.endswith("altub") and not variant.startswith("hgad"):
            shape = (len(EPOCHS), CHANNELS) if variant.startswith("cflow") else (len(EPOCHS), CHANNELS, 1, 1)
            arrays |= {f"trace/{l}.mean": draw.normal(0, 0.1, shape),
                       f"trace/{l}.log_scale": draw.normal(-0.1, 0.1, shape)}
    if variant in ("hgad", "hgad-altub"):
        steps = (np.array([5, 0.1, 0.1, 0.1])[:, None, None]
                 * draw.standard_normal((len(EPOCHS), len(categories), CHANNELS)))
        mu = np.cumsum(steps, axis=0)
        arrays |= {"trace/1.mu": mu, "trace/1.phi": np.zeros((len(EPOCHS), len(categories))),
                   "classes": np.array(categories),
                   "centres": (mu[-1][:, None]
                               + np.concatenate([np.zeros((1, CHANNELS)), draw.standard_normal((2, CHANNELS))])).astype(
                                   np.float16)}
        own = np.array([list(categories).index(c) for c in arrays["category"]])
        arrays["z"] = (mu[-1][own] + draw.standard_normal((n, CHANNELS))).astype(np.float16)
    return arrays


def fake_pictures(draw, categories, side: int = 16) -> dict:
    "A defective and a normal picture a category; the range of colours differs by category."
    n, label = 2 * len(categories), np.tile([1, 0], len(categories))
    mask = np.zeros((n, side, side), bool)
    mask[label == 1, 4:9, 5:12] = True
    low = np.repeat(np.arange(len(categories), dtype=float), 2)
    return dict(image=draw.integers(0, 255, (n, side, side, 3), dtype=np.uint8), mask=mask,
                map=draw.random((n, side, side)).astype(np.float16),
                category=np.repeat(categories, 2), defect=np.where(label, "broken_large", "good"), label=label, low=low,
                high=low + 1)


def fake_run(root: Path, variant: str, category: str, seed: int = 0, preset: str = "demo", categories=None,
             without=()) -> Path:
    "A run folder with the files that figures read."
    categories = categories or (TOYS if category == "all" else (category,))
    draw = np.random.default_rng([seed, *f"{variant}{category}".encode()])
    folder = root / run_folder(variant, "toy", category, preset, seed)
    folder.mkdir(parents=True)
    entry = MATRIX["variants"][variant]
    settings = {"backbone": {"name": "resnet18"}, "transform": {"size": 96}, "schedule": {"epochs": 7, "batch": 8},
                "detector": {"class_mode": "inferred"} if category == "all" else {}}
    config = dict(method=entry["method"], altub=entry.get("altub", False), dataset="toy", data_root=None,
                  category=category, preset=preset, seed=seed, settings=settings)
    files = {"history.csv": lambda p: fake_history(draw).to_csv(p, index=False),
             "scores.csv": lambda p: fake_scores(draw, categories).to_csv(p, index=False),
             "latents.npz": lambda p: np.savez(p, **fake_latents(draw, categories, variant)),
             "pictures.npz": lambda p: np.savez(p, **fake_pictures(draw, categories)),
             "config.json": lambda p: p.write_text(json.dumps(config)),
             "metrics.json": lambda p: p.write_text(json.dumps({"config": config, "results": {}, "timing": {},
                                                                "environment": {}}))}
    for name, write in files.items():
        if name not in without:
            write(folder / name)
    return folder


def make_runs(root: Path, output: str, categories=("weave",), seeds=(0,), variants=None, **kw) -> list[dict]:
    "The runs of an output, read as notebooks read them."
    unified = MATRIX["outputs"][output]["role"] == "unified"
    for variant in variants or MATRIX["outputs"][output]["variants"]:
        for seed in seeds:
            for category in ("all",) if unified else categories:
                fake_run(root, variant, category, seed, **kw)
    return read_runs(root)


def artists(figure, gid: str) -> list:
    "Everything drawn whose gid begins so."
    return figure.drawing.findobj(lambda a: str(a.get_gid() or "").startswith(gid))


def texts(figure) -> str:
    "Every visible text of a drawing, each once."
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in {id(t): t for t in figure.drawing.findobj(Text)}.values() if t.get_visible())


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, figures.Figure]:
    "All seven, each from its own runs of two seeds."
    made = {}
    for name, draw in FIGURES.items():
        made[name] = draw(make_runs(tmp_path_factory.mktemp(name), name, ("weave", "bolt"), seeds=(0, 1)), MATRIX,
                          "demo")
    return made


def test_every_output_of_the_matrix_has_a_recipe():
    assert list(FIGURES) == [name for name in MATRIX["outputs"] if name.startswith("F")]


@pytest.mark.parametrize("name", FIGURES)
def test_files(every, name, tmp_path):
    "SVG that parses, PNG of 300 dpi at print width, the caption; the same bytes again."
    paths = every[name].save(tmp_path)
    assert [p.name for p in paths] == [f"{name}.svg", f"{name}.png", f"{name}.md"]
    assert ET.parse(paths[0]).getroot().tag.endswith("svg")
    with Image.open(paths[1]) as png:
        assert min(png.info["dpi"]) >= 299 and png.width <= 300 * 6.9 + 1
        assert np.asarray(png.convert("L")).std() > 5, "nothing is drawn"
    first = paths[0].read_bytes()
    assert every[name].save(tmp_path)[0].read_bytes() == first
    assert paths[2].read_text() == every[name].caption + "\n"


@pytest.mark.parametrize("name", FIGURES)
def test_captions_name_the_setting(every, name):
    "Data, backbone, size, length, seeds and protocol, from the runs' configurations; no folder of this machine."
    caption = every[name].caption
    setting = ("toy data", "resnet18 at 96 px", "7 epochs, batch 8", "seeds 0, 1;",
               "preset demo, which is not the papers' setting", "last epoch")
    for words in (f"**{name}.", *setting):
        assert words in caption, words
    assert "Missing" not in caption and "/tmp" not in caption
    assert ({"unified": "one model for all categories",
             "stability": ": weave"}.get(MATRIX["outputs"][name]["role"], ": bolt, weave") in caption)


@pytest.mark.parametrize("name", FIGURES)
def test_letters_are_large_enough(every, name):
    "No text below 7 points at print width, and nothing reaches over the page's edge."
    from matplotlib.text import Text

    drawing = every[name].drawing
    assert min(t.get_fontsize() for t in drawing.findobj(Text) if t.get_text().strip()) >= 7
    tight, (width, height) = drawing.get_tightbbox(), drawing.get_size_inches()
    assert tight.x0 > -0.02 and tight.y0 > -0.02 and tight.x1 < width + 0.02 and tight.y1 < height + 0.02, tight


def test_colour_is_never_alone():
    "Methods differ in line, marker and hatch, too; so do categories in marker."
    for key in ("color", "ls", "marker", "hatch"):
        assert len({look[key] for look in figures.LOOKS}) == len(figures.LOOKS)
    looks = figures.look_of([f"c{i}" for i in range(40)])
    assert len(set(looks.values())) == 40 and len({m for _, m in list(looks.values())[:12]}) == 12
    assert figures.look_of(["b", "a"]) == figures.look_of(["a", "b"])  # the same in every figure


def test_house_style_ends_with_its_block():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figures.house():
        assert matplotlib.rcParams["font.size"] == 8
    assert dict(matplotlib.rcParams) == before


def test_F1_draws_the_history(tmp_path):
    "One seed: the line is the history, evaluated epochs alone; the gap is last − best."
    runs = make_runs(tmp_path, "F1")
    figure = FIGURES["F1"](runs, MATRIX, "demo")
    for run in runs:
        variant = "fastflow-altub-published" if run["config"]["altub"] else "fastflow-published"
        history = pd.read_csv(run["path"] / "history.csv").dropna()
        for metric in ("image_auroc", "pixel_auroc"):
            (line,) = artists(figure, f"{variant}-weave-{metric}-")
            assert line.get_xdata().tolist() == [2, 4, 6]
            np.testing.assert_allclose(line.get_ydata(), history[metric])
    for gap in artists(figure, "gap-"):
        np.testing.assert_allclose(gap.get_ydata(), (0.97, 0.8))
    assert texts(figure).count("−0.170") == 4 and figure.caption.count("−0.170 and −0.170") == 2
    assert not [t for ax in figure.drawing.axes for t in ax.get_xticklabels() if "0.170" in t.get_text()], (
        "no tick of an axis")


def test_F1_as_committed():
    "Its caption holds the numbers of the committed runs."
    runs = read_runs(ROOT / "results/ablations")
    caption = (ROOT / "results/real/figures/F1.md").read_text()
    assert caption == FIGURES["F1"](runs, MATRIX, "real").caption + "\n"
    for category in ("bolt", "weave"):
        for metric, name in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC")):
            gaps = []
            for variant in ("fastflow-published", "fastflow-altub-published"):
                folders = [ROOT / f"results/ablations/{variant}-toy-{category}-demo-{seed}" for seed in range(3)]
                each = [pd.read_csv(f / "history.csv")[metric].dropna() for f in folders]
                gaps.append(f"{np.mean([h.iloc[-1] - h.max() for h in each]):.3f}".replace("-", "−"))
            assert f"{category} {name} {' and '.join(gaps)}" in caption


def test_F1_seeds_and_their_mean(tmp_path):
    runs = make_runs(tmp_path, "F1", seeds=(0, 1, 2))
    figure = FIGURES["F1"](runs, MATRIX, "demo")
    lines = {a.get_gid(): a.get_ydata() for a in artists(figure, "fastflow-published-weave-image")}
    assert len(lines) == 4
    mean = lines.pop("fastflow-published-weave-image_auroc-mean")
    np.testing.assert_allclose(mean, np.mean(list(lines.values()), axis=0))
    assert "Thin lines: seeds" in figure.caption and "seeds 0, 1, 2" in figure.caption


def test_F1_many_categories_become_one_panel(tmp_path):
    "With more categories than panels, their mean is drawn, and the axis says of how many."
    matrix = MATRIX | {"presets": MATRIX["presets"] | {"demo": MATRIX["presets"]["demo"] | {"stability": ["toy/each"]}}}
    runs = make_runs(tmp_path, "F1", [f"c{i}" for i in range(6)])
    figure = FIGURES["F1"](runs, matrix, "demo")
    (line,) = artists(figure, "fastflow-published-mean of 6 categories-image_auroc-mean")
    tables = [pd.read_csv(r["path"] / "history.csv").dropna()["image_auroc"] for r in runs if not r["config"]["altub"]]
    np.testing.assert_allclose(line.get_ydata(), np.mean(tables, axis=0))


def test_F1_without_a_category_of_one_method(tmp_path):
    "Drawn all the same, and said; a mean over categories is of those that every method has."
    for variant, names in (("fastflow-published", ("weave", "bolt")), ("fastflow-altub-published", ("weave",))):
        for name in names:
            fake_run(tmp_path / "two", variant, name)
    figure = FIGURES["F1"](read_runs(tmp_path / "two"), MATRIX, "real")
    assert figure.drawing and " and –" in figure.caption
    for variant in ("fastflow-published", "fastflow-altub-published"):
        for k in range(7 if variant == "fastflow-published" else 5):
            fake_run(tmp_path / "many", variant, f"part {k}")
    runs = read_runs(tmp_path / "many")
    assert {name: len(own) for name, own in figures.panels_of(runs).items()} == {"mean of 5 categories": 10}


def test_F1_without_a_metric_of_one_run(tmp_path):
    "A seed without it has no line; a mean over two categories is none where one lacks it."
    runs = make_runs(tmp_path, "F1", categories=("weave", "bolt"), seeds=(0, 1))
    for run in runs:
        if run["config"]["category"] == "bolt" and run["config"]["seed"]:
            file = run["path"] / "history.csv"
            pd.read_csv(file).assign(pixel_auroc=np.nan).to_csv(file, index=False)
    assert artists(FIGURES["F1"](runs, MATRIX, "real"), "fastflow-published-bolt-pixel_auroc-mean")
    assert list(figures.curves(figures.opened(runs, "history.csv"), "pixel_auroc")) == [0]
    assert list(figures.curves(figures.opened(runs, "history.csv"), "image_auroc")) == [0, 1]


def test_categories_are_text(tmp_path):
    "BTAD's are 01, 02, 03."
    fake_run(tmp_path, "hgad", "all", categories=("01", "02"))
    (run,) = figures.opened(read_runs(tmp_path), "scores.csv")
    assert set(run["file"]["category"]) == {"01", "02"}


def test_F2_moments_and_bars(tmp_path):
    "Points are the moments of the file; a bar is the mean divergence over its runs."
    runs = make_runs(tmp_path, "F2", ("weave", "bolt"))
    figure = FIGURES["F2"](runs, MATRIX, "demo")
    run = next(r for r in runs if r["path"].name == "fastflow-toy-bolt-demo-0")
    arrays = np.load(run["path"] / "latents.npz")
    points = artists(figure, "latent-1")[0].get_offsets()
    np.testing.assert_allclose(points, np.stack([arrays["mean1"], arrays["var1"]], 1))
    assert len(artists(figure, "latent-0")) == 4 and len(artists(figure, "base-0")) == 2
    own = [np.load(r["path"] / "latents.npz") for r in runs if r["path"].name.startswith("fastflow-toy")]
    kl = [np.mean([0.5 * (v - np.log(v) + m**2 - 1) for l in "01" for m, v in zip(a[f"mean{l}"], a[f"var{l}"])])
          for a in own]
    bars = artists(figure, "bar-")
    assert len(bars) == 6, "N(0, I) for four methods, the learned base for two"
    assert np.isclose(next(b for b in bars if b.get_gid() == "bar-0").get_width(), np.mean(kl), rtol=1e-5)
    shown = [t for ax in figure.drawing.axes for t in ax.texts if t.get_text() == f"{np.mean(kl):.3f}"]
    assert shown and all(t.get_position()[0] > 1 for t in shown), "the mean stands outside the axes, at no run's marker"
    assert {"a run, bolt", "a run, weave", "mean, N(0, I)"} <= set(texts(figure).split("\n"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (CHANNELS,), (CHANNELS, 1, 1), (CHANNELS, 3, 2)])
@pytest.mark.parametrize("scale", [True, False])
def test_learned_base_of_any_shape(shape, scale):
    """Scalar, per channel, per position; without a scale it is 1. Per position, the moments
    of the mixture over positions."""
    draw = np.random.default_rng(0)
    m, s = draw.normal(size=(2, *shape)), draw.normal(0, 0.3, (2, *shape))
    arrays = {"mean0": np.zeros(CHANNELS), "trace/0.mean": m} | ({"trace/0.log_scale": s} if scale else {})
    mean, var = figures.learned_base(arrays, 0)
    full = np.broadcast_to(m[-1].reshape(shape[0], -1), (CHANNELS, m[-1].size // shape[0]))
    wide = np.broadcast_to(np.exp(2 * s[-1]).reshape(shape[0], -1), full.shape) if scale else np.ones_like(full)
    assert mean.shape == var.shape == (CHANNELS,)
    np.testing.assert_allclose(mean, full.mean(1))
    np.testing.assert_allclose(var, (wide + full**2).mean(1) - full.mean(1) ** 2)


@pytest.mark.parametrize("name, methods", [("F3", 4), ("F6", 2)])
def test_pictures(every, name, methods):
    "Each row has image, image with mask and a map a method, in the colour range of its category."
    figure = every[name]
    rows = 4 if name == "F3" else 8
    counts = {kind: len(artists(figure, kind)) for kind in ("image", "mask", "map")}
    assert counts == {"image": rows, "mask": rows, "map": methods * rows}
    ranges = [a.get_clim() for a in artists(figure, "map")]
    assert all(high - low == 1 for low, high in ranges) and len(set(ranges)) == (1 if name == "F3" else 4)
    assert "broken large" in texts(figure) and f"{rows} test images" in figure.caption


def test_pictures_of_a_method_without_the_category(tmp_path):
    "A map that is not there stays empty and says so; the others keep their rows."
    make_runs(tmp_path, "F3", ("weave", "bolt"), variants=["fastflow", "cflow"])
    fake_run(tmp_path, "cflow-altub", "weave")
    figure = FIGURES["F3"](read_runs(tmp_path), MATRIX, "demo")
    assert len(artists(figure, "map")) == 2 * 4 + 2 and texts(figure).count("no run") == 2
    assert "cflow-altub-toy-bolt-demo-0" in figure.caption and "Missing here" in figure.caption


def test_F4_histograms_are_shares(every):
    "Eight histograms (two methods, two quantities, two kinds), each summing to 1."
    values = [a.get_data().values for a in artists(every["F4"], "normal") + artists(every["F4"], "anomalous")]
    assert len(values) == 8
    np.testing.assert_allclose([v.sum() for v in values], 1)


def test_F4_tells_overlap_and_auroc(tmp_path):
    "The numbers above a panel are those of scores.csv."
    runs = make_runs(tmp_path, "F4")
    figure = FIGURES["F4"](runs, MATRIX, "demo")
    for run in runs:
        table = pd.read_csv(run["path"] / "scores.csv")
        each = np.mean([auroc(t["score"], t["label"]) for _, t in table.groupby("category")])
        assert f"AUROC {auroc(table['score'], table['label']):.3f}; mean of categories {each:.3f}" in texts(figure)
    points = {a.get_gid(): a.get_ydata() for a in artists(figure, "auroc-")}
    assert len(points) == 2 and all(len(v) == 4 for v in points.values())


def test_F4_tells_how_many(tmp_path):
    """The numbers of images and positions in the panels; a category without anomalous
    positions has a place that says so."""
    runs = make_runs(tmp_path, "F4")
    for run in runs:
        arrays = dict(np.load(run["path"] / "latents.npz"))
        np.savez(run["path"] / "latents.npz",
                 **arrays | {"defective": arrays["defective"] & (arrays["category"] != "bolt")})
    figure = FIGURES["F4"](runs, MATRIX, "demo")
    assert texts(figure).count("40 normal\n40 anomalous") == 2 and texts(figure).count("60 normal\n36 anomalous") == 2
    assert texts(figure).count("one kind only") == 1 and texts(figure).count("bolt") == 2
    points = {a.axes: np.isnan(a.get_ydata()).tolist() for a in artists(figure, "auroc-")}
    assert sorted(points.values()) == [[False] * 4, [False, True, False, False]]


@pytest.mark.parametrize("k", [2, 3])
def test_base_log_prob_has_the_trained_weights(k):
    "Of the categories and of the centres inside them; the same as the base's own density, a channel."
    mixture, z = HierarchicalMixture(k, 5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.randn(50, 5)
    with torch.no_grad():
        mixture.phi.normal_(), mixture.psi.normal_(0, 3)
    arrays = {"z": z.numpy(), "centres": mixture.all_centres().detach().numpy(), "level": np.array(1),
              "trace/1.phi": mixture.phi.detach().numpy()[None], "trace/1.psi": mixture.psi.detach().numpy()[None]}
    assert np.allclose(figures.base_log_prob(arrays), mixture.log_prob(z.double()).detach().numpy() / 5, atol=1e-9)


def test_F4_without_latents(tmp_path):
    "Older runs show their scores alone, and the caption says so."
    figure = FIGURES["F4"](make_runs(tmp_path, "F4", without=("latents.npz",)), MATRIX, "demo")
    assert len(artists(figure, "normal")) == 2 and "No run kept its latents" in figure.caption


def test_F5_draws_every_latent_and_centre(tmp_path):
    figure = FIGURES["F5"](make_runs(tmp_path, "F5"), MATRIX, "demo")
    for category in TOYS:
        assert sum(len(a.get_offsets()) for a in artists(figure, f"normal-{category}")) == 24
        assert sum(len(a.get_offsets()) for a in artists(figure, f"defective-{category}")) == 24
        assert [len(a.get_offsets()) for a in artists(figure, f"main-{category}")] == [1, 1]
    assert sorted(len(a.get_offsets()) for a in artists(figure, "inner-")) == [0] * 4 + [2] * 4
    assert "HGAD: 100% nearest to their own centre" in texts(figure) and "t-SNE, perplexity" in figure.caption
    assert "the span of the 4 main centres (3 dimensions)" in figure.caption


def test_F5_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    figure = FIGURES["F5"](make_runs(tmp_path, "F5"), MATRIX, "demo")
    assert "PCA (scikit-learn is not installed)" in figure.caption


def test_F7_paths_and_distances(tmp_path):
    "A path has a point for each evaluation, and a pair its distance in the whole space."
    runs = make_runs(tmp_path, "F7")
    figure = FIGURES["F7"](runs, MATRIX, "demo")
    paths = artists(figure, "path-")
    assert len(paths) == 2 * len(TOYS) and all(len(p.get_xdata()) == len(EPOCHS) for p in paths)
    mu = np.load(next(r for r in runs if r["path"].name.startswith("hgad-toy"))["path"] / "latents.npz")["trace/1.mu"]
    pairs = [a for a in artists(figure, "pair-0")]
    np.testing.assert_allclose(pairs[0].get_ydata(), np.linalg.norm(mu[:, 0] - mu[:, 1], axis=-1))
    assert len(artists(figure, "pair-")) == 2 * 6 and pairs[0].get_xdata().tolist() == EPOCHS


def test_F7_of_methods_with_other_categories(tmp_path):
    "Each path is named after its own centre."
    fake_run(tmp_path, "hgad", "all", categories=("b", "d"))
    fake_run(tmp_path, "hgad-altub", "all", 1, categories=("a", "b", "c"))
    drawn = FIGURES["F7"](read_runs(tmp_path), MATRIX, "demo")
    assert [a.get_gid() for a in artists(drawn, "path-")] == [f"path-{c}" for c in "bdabc"]


def test_F7_of_one_category(tmp_path):
    "No pairs, no distances, no error."
    for variant in ("hgad", "hgad-altub"):
        fake_run(tmp_path, variant, "all", categories=("weave",))
    assert "one centre, no pairs" in texts(FIGURES["F7"](read_runs(tmp_path), MATRIX, "demo"))


@pytest.mark.parametrize("name", FIGURES)
def test_without_runs(name, tmp_path):
    "No drawing; the caption holds the commands, and an older drawing does not stay."
    figure = FIGURES[name]([], MATRIX, "real")
    assert figure.drawing is None
    assert "papermill nbs/experiments/run.ipynb" in figure.caption
    assert figure.caption.count("papermill") <= 3 and "the whole graph: flowrepro reproduce" in figure.caption
    for suffix in ("svg", "png"):
        (tmp_path / f"{name}.{suffix}").write_text("old")
    assert figure.save(tmp_path) == [tmp_path / f"{name}.md"] and [p.name for p in tmp_path.iterdir()] == [f"{name}.md"]


@pytest.mark.parametrize("name, file",
                         [("F1", "history.csv"), ("F2", "latents.npz"), ("F3", "pictures.npz"), ("F5", "latents.npz"),
                          ("F7", "latents.npz")])
def test_runs_without_the_file(name, file, tmp_path):
    "One run without it is left out with a word; none with it, and there is no drawing."
    variants = MATRIX["outputs"][name]["variants"]
    make_runs(tmp_path, name, ("weave", "bolt"), variants=variants[1:])
    first = fake_run(tmp_path, variants[0], "all" if name in ("F5", "F7") else "weave", without=(file,))
    runs = read_runs(tmp_path)
    figure = FIGURES[name](runs, MATRIX, "demo")
    assert figure.drawing is not None and f"hold no {file}" in figure.caption and f": {first.name}." in figure.caption
    for path in tmp_path.rglob(file):
        path.unlink()
    assert FIGURES[name](runs, MATRIX, "demo").drawing is None


def test_F7_needs_centres(tmp_path):
    "A run whose base has no centres is left out with a word."
    make_runs(tmp_path, "F7")
    path = tmp_path / "hgad-altub-toy-all-demo-0/latents.npz"
    np.savez(path, **{k: v for k, v in np.load(path).items() if k != "classes"})
    figure = FIGURES["F7"](read_runs(tmp_path), MATRIX, "demo")
    assert "hold no latents.npz with classes: hgad-altub-toy-all-demo-0" in figure.caption
    assert "Missing here" not in figure.caption  # it was run
    assert len(artists(figure, "path-")) == len(TOYS)


def test_one_seed_of_three_is_said(tmp_path):
    "Seeds that were not run are said, and not counted as missing runs."
    matrix = MATRIX | {"presets": MATRIX["presets"] | {"demo": MATRIX["presets"]["demo"] | {"seeds": 3}}}
    figure = FIGURES["F7"](make_runs(tmp_path, "F7"), matrix, "demo")
    assert "seed 0 of 3 planned" in figure.caption and "Missing" not in figure.caption


@pytest.mark.parametrize("notebook, names",
                         [("altub_figures", ("F1", "F2", "F3")), ("hgad_figures", ("F4", "F5", "F6", "F7"))])
def test_notebook_writes_its_figures(notebook, names, tmp_path):
    "The cells of an experiment notebook, run with other parameters, write every figure of theirs."
    for name in names:
        for variant in MATRIX["outputs"][name]["variants"]:
            for category in ("all",) if notebook == "hgad_figures" else ("weave", "bolt"):
                if not (tmp_path / run_folder(variant, "toy", category, "demo", 0)).exists():
                    fake_run(tmp_path, variant, category)
    run_experiment(notebook, tmp_path, tmp_path / "out")
    assert (sorted(p.name for p in (tmp_path / "out/figures").iterdir())
            == sorted(f"{n}.{k}" for n in names for k in ("md", "png", "svg")))


def test_import_needs_no_drawing_library():
    "`import flowrepro.figures` loads neither matplotlib nor scikit-learn."
    code = "import sys, flowrepro.figures; print(sorted({'matplotlib', 'seaborn', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_report_shows_captions_and_what_is_missing(tmp_path):
    "Bold and code are rendered; a figure that is not drawn keeps its place, with its caption and the commands."
    FIGURES["F1"](make_runs(tmp_path / "runs", "F1"), MATRIX, "demo").save(tmp_path / "figures")
    FIGURES["F2"]([], MATRIX, "real").save(tmp_path / "figures")
    (tmp_path / "tables").mkdir()
    for name in ("T1", "T2"):
        (tmp_path / f"tables/{name}.html").write_text(f"table {name}")
    page = outputs_section(tmp_path)
    assert page.count("<img") == 1 and "table T1" in page and "table T2" in page
    assert base64.b64encode((tmp_path / "figures/F1.png").read_bytes()).decode() in page
    assert "<b>F1. Does the last epoch keep what the best one had?</b>" in page
    assert "**" not in page
    assert "```" not in page
    missing = page[page.index("<section id=F2>"):]
    assert ("<h3>F2</h3><p class='note'><b>F2. Is the latent of normal images N(0, "
            "I)?</b> Not drawn at preset real" in missing)
    assert "<code>DATA</code>" in missing
    assert "<pre>mkdir -p runs/reproduce/fastflow-mvtec-bottle-real-0 &amp;&amp; papermill" in missing
    assert "-p data_root DATA/mvtec_ad" in missing


def test_loss_is_called_what_it_is():
    "Every method has its own, as it is trained."
    words = lambda method, **detector: " ".join(loss_words({"method": method, "settings": {"detector": detector}}))
    assert words("fastflow") == "−log-likelihood (nats an image) sum over levels"
    assert "log σ" in words("cflow")
    assert "nats" not in words("cflow")
    assert "HGAD" in words("hgad", base="hierarchical", joint=True)
    assert "sum" in words("hgad", base="hierarchical", joint=True)
    assert words("hgad", base="standard", joint=False) == "−log-likelihood (nats a dimension) mean over levels"


def test_hardest_of_every_category():
    """Each category has its own threshold; failures from the furthest, successes from the nearest on;
    a single kind has no failures."""
    table = pd.DataFrame({"category": [*"aaaaaabbbbc"], "label": [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0],
                          "score": [1, 2, 7, 3, 6, 9, 10, 20, 30, 5, 0.0]})
    assert thresholds(table).tolist() == [3.0] * 6 + [30.0] * 4 + [np.inf]
    groups = hardest(table, 9)
    assert (list(groups) == ["failures: missed", "failures: false alarms", "successes: just found",
                             "successes: just passed"])
    assert sorted(i for rows in groups.values() for i in rows) == list(range(11))
    assert groups["failures: missed"] == [9]
    assert groups["failures: false alarms"] == [2]
    assert groups["successes: just found"] == [3, 8, 4, 5]
    assert groups["successes: just passed"] == [1, 0, 7, 6, 10]


def ends(ax, marker: str) -> list[tuple[float, float]]:
    "Where single marks of a kind are."
    return [(l.get_xdata()[0], l.get_ydata()[0]) for l in ax.lines if l.get_marker() == marker and len(l.get_xdata()) == 1]


def test_curves_mark_their_last_and_best():
    "Of each seed the best, of their mean the last; a seed that ended before counts with its own last one."
    frame = pd.DataFrame({0: [0.5, 0.9, 0.7], 1: [0.8, 0.6, np.nan]}, index=[2, 4, 6])
    several, one, gaps = figures.canvas(2).subplots(1, 3)
    figures.draw_curves(several, frame, figures.LOOKS[0], "g")
    assert ends(several, "*") == [(4, 0.9), (2, 0.8)] and ends(several, "o") == [(6, 0.7)]
    figures.draw_curves(one, frame[[0]], figures.LOOKS[0], "g")
    assert ends(one, "*") == [(4, 0.9)] and ends(one, "o") == [(6, 0.7)]
    figures.draw_gaps(gaps, [frame])
    assert gaps.lines[0].get_ydata() == pytest.approx([0.85, 0.65]) and figures.gap(frame) == pytest.approx(-0.2)


def test_F1_legend_names_its_lines(every):
    handles = {t.get_text(): h for legend in every["F1"].drawing.legends
               for t, h in zip(legend.get_texts(), legend.legend_handles)}
    for variant in MATRIX["outputs"]["F1"]["variants"]:
        (line,) = artists(every["F1"], f"{variant}-weave-image_auroc-mean")
        assert handles[MATRIX["variants"][variant]["title"]].get_color() == line.get_color()


def bare(variant: str, seed: int = 0, category: str = "weave", preset: str = "demo") -> dict:
    "A run without files."
    settings = {"backbone": {"name": "b"}, "transform": {"size": 9}, "schedule": {"epochs": 7, "batch": 8}, "detector": {}}
    config = dict(dataset="toy", data_root=None, category=category, preset=preset, seed=seed, settings=settings)
    return {"path": Path("x") / run_folder(variant, "toy", category, preset, seed), "config": config}


def test_order_of_methods_and_seeds():
    "Methods as they come, their seeds rising; one category and seed for all of them where there is one."
    runs = [bare("hgad", 1), bare("hgad", 0), bare("cflow", 0)]
    groups = figures.by_variant(runs[:1] + runs[2:] + runs[1:2])
    assert list(groups) == ["hgad", "cflow"] and [r["config"]["seed"] for r in groups["hgad"]] == [0, 1]
    shown = figures.representative([bare("hgad", category="weave"), bare("hgad", category="bolt"),
                                    bare("cflow", category="bolt")])
    assert {r["config"]["category"] for r in shown.values()} == {"bolt"}


def test_about_says_the_preset_of_the_runs():
    "And how many seeds lack; missing runs are those of the seeds that are there."
    assert "preset demo, which is not the papers' setting." in figures.about([bare("cflow")], MATRIX, "real")
    assert figures.about([bare("cflow", preset="paper")], MATRIX, "paper").endswith("preset paper.")
    missing = figures.missing_jobs([bare("cflow", 1)], MATRIX, "demo", "F2")
    assert missing and {j.seed for j in missing} == {1}


def test_about_says_that_weights_are_random():
    "As the tables do: at preset paper nothing else would."
    run = bare("cflow", preset="paper")
    run["config"]["weights"] = "random"
    assert "Backbone: random b at 9 px, frozen." in figures.about([run], MATRIX, "paper")


def test_a_setting_that_differs_is_told_of_each_method():
    titles = [MATRIX["variants"][v]["title"] for v in ("cflow", "hgad")]
    words = figures.agree([bare("cflow"), bare("hgad"), bare("hgad", 1)], MATRIX, lambda c: f"seed {c['seed']}")
    assert words == f"seed 0 ({', '.join(titles)}); seed 1 ({titles[1]})"


def test_lines_of_categories_reach_from_the_lowest_to_the_highest():
    ax = figures.canvas(2).subplots()
    each = {"cflow": pd.Series({"a": 0.6, "b": 0.9}), "hgad": pd.Series({"a": 0.8, "b": 0.7})}
    figures.draw_categories(ax, each, ["a", "b"], MATRIX)
    assert [line[:, 1].tolist() for line in ax.collections[0].get_segments()] == [[0.6, 0.8], [0.7, 0.9]]


def test_divergence_from_a_learned_base():
    assert figures.divergence(1.0, 2.0, (0.5, 4.0)) == pytest.approx(0.5 * (np.log(2) + 2.25 / 4 - 1))


def test_ridges_are_of_normal_latents():
    "The channels closest to N(0, 1), in the middle and furthest, from below; both bases with their own width."
    draw = np.random.default_rng(0)
    z = np.concatenate([draw.standard_normal((400, 5)) * 0.5 + [3, 0, 1, 0.4, 2], np.full((400, 5), -4.4)])
    arrays = {"level": np.array(0), "z": z, "defective": np.arange(800) >= 400, "mean0": np.zeros(5),
              "trace/0.mean": np.zeros((1, 5)), "trace/0.log_scale": np.full((1, 5), np.log(0.5))}
    ax = figures.canvas(2).subplots()
    figures.draw_ridges(ax, arrays)
    for patch, centre in zip(ax.patches, (0, 1, 3)):
        values, edges, base = patch.get_data()
        assert np.average((edges[1:] + edges[:-1]) / 2, weights=values - base) == pytest.approx(centre, abs=0.15)
    for line, spread in zip(ax.lines[:2], (1.0, 0.5)):
        x, y = line.get_data()
        assert np.sqrt(np.average(x**2, weights=y)) == pytest.approx(spread, rel=0.02)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["closest", "median", "furthest"]
    assert ax.get_xlabel() == "z, level 1"


def test_F2_bars_have_their_names(tmp_path):
    "Each its base, the first at the top; N(0, I) is at mean 0 and variance 1."
    runs = make_runs(tmp_path, "F2", seeds=(0, 1))
    figure = FIGURES["F2"](runs, MATRIX, "demo")
    bars = {b.get_gid(): b for b in artists(figure, "bar-")}
    ax = bars["bar-0"].axes
    titles = {v: MATRIX["variants"][v]["title"] for v in MATRIX["outputs"]["F2"]["variants"]}
    for y, label in enumerate(t.get_text() for t in ax.get_yticklabels()):
        own = [dict(np.load(r["path"] / "latents.npz")) for r in runs
               if titles[r["path"].name.partition("-toy")[0]] == label.rpartition(",")[0].removesuffix(", N(0")]
        kl = [np.mean([figures.divergence(a[f"mean{l}"], a[f"var{l}"],
                                          figures.learned_base(a, l) if label.endswith("learned base") else None)
                       for l in (0, 1)]) for a in own]
        assert len(own) == 2 and bars[f"bar-{y}"].get_width() == pytest.approx(np.mean(kl), rel=1e-5), label
    assert ax.yaxis_inverted()
    assert [end for ax in figure.drawing.axes for end in ends(ax, "+")] == [(0, 1)] * 4


def test_pictures_stand_upright_with_their_own_mask():
    "Colour range and outline are of the picture itself; the image alone has no outline."
    arrays = fake_pictures(np.random.default_rng(0), ("a", "b"))
    arrays["mask"][2] = np.arange(16)[:, None] < 2
    drawn = {}
    for kind in ("image", "mask", "map"):
        ax = figures.canvas(2).subplots()
        figures.draw_picture(ax, kind, arrays, 2, 1.0, 2.0, 0.5)
        drawn[kind] = ax
        assert ax.images[0].get_extent() == [1.0, 1.5, 2.5, 2.0] and len(ax.collections) == (kind != "image")
    assert drawn["map"].images[0].get_clim() == (1.0, 2.0)
    low, high = drawn["map"].collections[0].get_paths()[0].get_extents().get_points()
    assert high[1] < 2.1 and low[0] < 1.02 and high[0] > 1.48
    fig = figures.canvas(2)
    figures.draw_scale(fig, 2)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["median", "99.8th percentile"]


def test_pictures_of_the_first_seed_and_the_normal_one():
    first, second = (dict(category=np.array(["a"]), defect=np.array(["cut"])) for _ in range(2))
    found = figures.pictures_of([{"file": first}, {"file": second}])
    assert found["a", "cut", 1][0] is first
    keys = [("a", d, 1) for d in ("bent", "cut", "hole", "good")]
    assert figures.rows_to_show(keys, 3) == [keys[0], keys[1], keys[3]]


def test_F6_maps_stand_below_their_method(tmp_path):
    runs = make_runs(tmp_path, "F6")
    figure = FIGURES["F6"](runs, MATRIX, "demo")
    columns = {}
    for a in artists(figure, "map"):
        columns.setdefault(round(a.get_extent()[0], 3), []).append(np.asarray(a.get_array()))
    places = {t.get_text().replace("\n", " "): t.get_position()[0] for t in figure.drawing.axes[0].texts[::-1]}
    for x, variant in zip(sorted(columns)[:2], MATRIX["outputs"]["F6"]["variants"]):
        run = next(r for r in runs if r["path"].name.startswith(f"{variant}-toy"))
        maps = np.load(run["path"] / "pictures.npz")["map"].astype(np.float32)
        assert any(np.array_equal(columns[x][0], m) for m in maps)
        assert x < places[MATRIX["variants"][variant]["title"]] < x + 1.25


def test_separation_is_a_mean_over_seeds():
    "Scores of two seeds are not ranked with each other."
    table = pd.DataFrame({"category": "a", "seed": [0, 0, 1, 1, 2, 2], "label": [0, 1] * 3, "value": [0, 1, 10, 20, 9, 8]})
    table = pd.concat([table, table[table["label"] == 0].assign(category="b")])
    assert figures.separation(table).to_dict() == {"a": pytest.approx(2 / 3)}  # b has one kind only


def test_shares_of_normal_and_anomalous():
    "Each where it is; the negative of the values with sign -1."
    table = pd.DataFrame({"category": "a", "seed": 0, "label": [0] * 20 + [1] * 10,
                          "value": [*np.linspace(0, 1, 20), *np.linspace(5, 6, 10)]})
    for sign in (1, -1):
        ax = figures.canvas(2).subplots()
        figures.draw_shares(ax, table, sign)
        for gid, centre in (("normal", 0.5), ("anomalous", 5.5)):
            (patch,) = [p for p in ax.patches if p.get_gid() == gid]
            values, edges, _ = patch.get_data()
            assert np.average((edges[1:] + edges[:-1]) / 2, weights=values) == pytest.approx(sign * centre, abs=0.2)
        assert ax.get_title(loc="left") == "overlap 0.00, AUROC 1.000"


def test_F4_pools_the_seeds(every):
    "Log-likelihoods are drawn as they are, not their negative."
    assert texts(every["F4"]).count("80 normal\n80 anomalous") == 2
    for patch in artists(every["F4"], "normal"):
        if "log-likelihood" in patch.axes.get_xlabel():
            assert patch.get_data().edges.max() < 0


def test_likelihoods_are_negative_so_that_higher_is_worse(tmp_path):
    np.savez(tmp_path / "latents.npz", z=np.array([[0.0], [3.0]]), defective=np.array([False, True]),
             category=np.array(["a", "a"]), level=0)
    table = figures.likelihood_values([{"path": tmp_path, "config": {"seed": 0}}])
    assert table["value"][1] > table["value"][0] and figures.separation(table)["a"] == 1


def test_nearest_own_in_the_whole_space():
    "A mean does not hold the latent that it is compared with."
    arrays = {"z": np.array([[0.0], [1.9], [2.1], [4.0]]), "category": np.array([*"aabb"]), "defective": np.zeros(4, bool)}
    assert figures.nearest_own(arrays) == 0.5
    arrays = {"z": np.array([[0, 0, 0], [0, 0, 5], [0, 0, 5.1]]), "category": np.array([*"abb"]),
              "defective": np.zeros(3, bool), "classes": np.array([*"ab"]),
              "centres": np.array([[[0, 0, 0.1]], [[0, 0, 5.0]]])}
    assert figures.nearest_own(arrays) == 1


def test_main_centre_is_the_first():
    arrays = fake_latents(np.random.default_rng(0), ("a", "b", "c"), "hgad")
    fig = figures.canvas(2)
    ax = fig.subplots()
    figures.draw_latents(ax, arrays, figures.look_of([*"abc"]))
    for name in "abc":
        main, inner = ([p for c in ax.collections if c.get_gid() == f"{kind}-{name}" for p in c.get_offsets().tolist()]
                       for kind in ("main", "inner"))
        assert len(main) == 1 and len(inner) == 2 and main[0] not in inner


def test_components_and_their_shares():
    x = np.random.default_rng(0).normal(size=(50, 4)) * [5, 2, 1, 0.5]
    xy, share = figures.pca(x)
    assert share == pytest.approx(xy.var(0) / x.var(0).sum()) and share[0] > share[1]


def test_paths_are_magnified_about_their_starts():
    plane = np.array([[[0.0, 0.0], [1.0, 0.0]], [[0.01, 0.0], [1.0, 0.02]]])
    assert [figures.magnify([plane * [1, s]]) for s in (1, 100)] == [10, 1]
    ax = figures.canvas(2).subplots()
    figures.draw_paths(ax, plane, figures.look_of(["a", "b"]), 10)
    lines = [np.transpose(l.get_data()).tolist() for l in ax.lines]
    assert lines == [[[0, 0], [0.1, 0]], [[0, 0]], [[0.1, 0]], [[1, 0], [1, 0.2]], [[1, 0]], [[1, 0.2]]]


def test_F7_paths_numbers_and_means(tmp_path):
    "Of the method they stand under; the mean of pairs is over all runs."
    runs = make_runs(tmp_path, "F7", seeds=(0, 1))
    figure = FIGURES["F7"](runs, MATRIX, "demo")
    mu = {r["path"].name: np.load(r["path"] / "latents.npz")["trace/1.mu"] for r in runs}
    first = [mu[f"{v}-toy-all-demo-0"] for v in MATRIX["outputs"]["F7"]["variants"]]
    xy, share = figures.pca(np.concatenate([m.reshape(-1, CHANNELS) for m in first]))
    planes = np.split(xy, 2)
    planes = [p.reshape(len(EPOCHS), len(TOYS), 2) for p in planes]
    factor = figures.magnify(planes)
    for line, plane in zip(artists(figure, "path-biscuit"), planes):
        own = plane[:1] + factor * (plane - plane[:1])
        np.testing.assert_allclose(np.transpose(line.get_data()), own[:, 0], atol=1e-6)
    assert f"component 2 ({share[1]:.0%})" in texts(figure)
    moved = " and ".join(f"{np.linalg.norm(m[-1] - m[0], axis=-1).mean():.2f}" for m in first)
    assert f"a centre moved by {moved} on average" in figure.caption
    assert texts(figure).count(f"movement × {factor}") == 2 * (factor > 1)
    (mean, _) = artists(figure, "mean")
    both = [figures.pair_distances(mu[f"hgad-toy-all-demo-{s}"]).mean(1) for s in (0, 1)]
    np.testing.assert_allclose(mean.get_ydata(), np.mean(both, axis=0))
