"""Every preset of every method at full size: it is a valid configuration, and one training step of it works.

Backbones, parameters and features lie on the device `meta`: shapes without storage, no weights to download. What reads
values stands aside for that: the hash of the backbone's weights, the draw of rotations (its determinant's sign), the
range check of labels; and autocast, which torch has not for `meta`.
In numbers, HGAD takes a step on one image.
"""
import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from flowrepro import backbones, bases, flows, hgad
from flowrepro.altub import AltUB
from flowrepro.backbones import Backbone
from flowrepro.data import Transform
from flowrepro.detectors import DETECTORS, FASTFLOW_PUBLISHED, Detector
from flowrepro.runs import PRESETS, Config, configure
from flowrepro.scores import PUBLISHED, Score, score_batch
from flowrepro.training import Schedule, check_training

WRN, R18, DEIT, CAIT = ("wide_resnet50_2.racm_in1k", "resnet18.tv_in1k", "deit_base_distilled_patch16_384.fb_in1k",
                        "cait_m48_448.fb_dist_in1k")
MVTEC = ["bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
         "toothbrush", "transistor", "wood", "zipper"]
# CFLOW-AD's README; transistor 128, the others 256
CFLOW_512 = {"bottle", "carpet", "grid", "leather", "screw", "tile", "toothbrush", "wood", "zipper"}
IMAGES = {"all": 3629}  # normal training images of MVTec AD; about 240 a category

PAPER = {  # parameters, and the shapes of the features
    f"fastflow {WRN}": (dict(), [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]),
    f"fastflow {R18}": (dict(backbone=R18), [(64, 64, 64), (128, 32, 32), (256, 16, 16)]),
    f"fastflow {DEIT}": (dict(backbone=DEIT), [(768, 24, 24)]),
    f"fastflow {CAIT}": (dict(backbone=CAIT), [(768, 28, 28)]),
    "fastflow altub": (dict(altub=True), [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]),
    "cflow 128": (dict(category="transistor"), [(512, 16, 16), (1024, 8, 8), (2048, 4, 4)]),
    "cflow 256": (dict(category="cable"), [(512, 32, 32), (1024, 16, 16), (2048, 8, 8)]),
    "cflow 512": (dict(category="bottle"), [(512, 64, 64), (1024, 32, 32), (2048, 16, 16)]),
    "cflow altub": (dict(category="transistor", altub=True), [(512, 16, 16), (1024, 8, 8), (2048, 4, 4)]),
    "hgad": (dict(category="all"), [(200, 64, 64), (200, 32, 32), (200, 16, 16)]),
    "hgad altub": (dict(category="all", altub=True), [(200, 64, 64), (200, 32, 32), (200, 16, 16)]),
}
every_paper_preset = pytest.mark.parametrize("name", PAPER)


def paper(name: str) -> Config:
    "The configuration of a case above, on MVTec AD."
    return configure(method=name.split()[0], preset="paper", dataset="mvtec", data_root="mvtec",
                     **{"category": "cable"} | PAPER[name][0])


def build(config: Config, backbone) -> Detector:
    "The detector of a configuration, as a run makes it; HGAD for the categories of MVTec AD."
    s = config.settings
    model = DETECTORS[config.method](backbone, score=Score(**s["score"]), **s["detector"])
    if model.labelled:
        model.adopt(MVTEC)
    return model


@pytest.fixture
def meta(monkeypatch):
    "Everything on the device `meta`, and nothing that reads values."
    monkeypatch.setattr(backbones, "state_hash", lambda net: "meta")
    monkeypatch.setattr(flows, "random_rotation", lambda n, generator=None: torch.empty(n, n))
    for module in (bases, hgad):
        monkeypatch.setattr(module, "check_label", lambda label, classes, n: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.device("meta"):
        yield


@cache
def features_of(size: int, **backbone) -> list[tuple]:
    "Shapes of the features of a backbone with random weights."
    return Backbone(**backbone, weights="random", size=size).shapes


LITE_CHANNELS = {2: 40, 3: 112, 4: 320}  # of tf_efficientnet_lite0, strides 8, 16, 32


def lite_shapes(size: int, name: str, levels: tuple, pyramid: tuple) -> list[tuple]:
    "The same of tf_efficientnet_lite0, by arithmetic."
    assert name == "tf_efficientnet_lite0"
    return [(LITE_CHANNELS[l], side := math.ceil(round(size * scale) / 2 ** (l + 1)), side) for scale in pyramid
            for l in levels]


def batch_of(model: Detector, schedule: Schedule) -> int:
    """Images of a batch; of CFLOW-AD, which takes hundreds of steps a batch, no more than the
    smallest level needs for one of them."""
    fibers, (_, h, w) = model.config.get("fibers"), model.backbone.shapes[-1]
    return schedule.batch if fibers is None else min(schedule.batch, math.ceil(fibers / (h * w)))


def steps_of(model: Detector, images: int) -> int:
    "How many losses a batch has."
    fibers = model.config.get("fibers")
    if model.method == "cflow":
        return sum(images * h * w // fibers if fibers else 1 for _, h, w in model.backbone.shapes)
    return len(model.flows) if model.method == "hgad" and not model.config["joint"] else 1


def take_steps(model: Detector, schedule: Schedule, epoch: int) -> set[str]:
    "All steps of one batch in an epoch; returns the trained parameters that got no gradient."
    model.train(), model.zero_grad(set_to_none=True), model.begin(epoch, schedule.epochs)
    count, images = 0, batch_of(model, schedule)
    features, labels = [torch.randn(images, *s) for s in model.backbone.shapes], torch.zeros(images, dtype=torch.long)
    for loss in model.losses(features, labels if model.labelled else None):
        assert loss.shape == () and loss.dtype == torch.float32
        loss.backward()
        count += 1
    assert count == steps_of(model, images)
    own = [(n, p) for n, p in model.named_parameters() if not n.startswith("backbone.")]
    assert all(p.grad.shape == p.shape for _, p in own if p.grad is not None)
    return {n for n, p in own if p.requires_grad and p.grad is None}


# -- configurations ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("altub", [False, True])
@pytest.mark.parametrize("preset", ["smoke", "demo", "real", "paper"])
@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_is_a_configuration(method, preset, altub):
    "On every data set; each group can be made of its settings, and the numbers of a preset arrive in them."
    assert set(PRESETS) == set(DETECTORS) and set(PRESETS[method]) == {"smoke", "demo", "real", "paper"}
    for dataset in ("toy", "mvtec", "btad", "visa", "mvtec3d", "union", "folder"):
        config = configure(method=method, preset=preset, altub=altub, dataset=dataset, data_root="somewhere",
                           category="all")
        s = config.settings
        Transform(**s["transform"]), Score(**s["score"]), Schedule(**s["schedule"]), AltUB(**s["altub"])
        for group, values in PRESETS[method][preset].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert s[group][key] == value or (group, key, dataset) == ("transform", "size", "mvtec"), (
                    f"{group}.{key}")
        assert s["detector"]["base"] == ({"hgad": "hierarchical"}.get(method) or ("diagonal" if altub else "standard"))
        assert config.table().loc["evaluations", "value"] == PRESETS[method][preset]["evaluations"]


@pytest.mark.parametrize("method", PRESETS)
def test_paper_presets_score_as_published(method):
    assert Score(**configure(method=method, preset="paper").settings["score"]) == PUBLISHED[method]


def test_cflow_sizes():
    "By category of MVTec AD; elsewhere 256."
    size = lambda **kw: configure(method="cflow", preset="paper", data_root="somewhere",
                                  **kw).settings["transform"]["size"]
    assert ({c: size(dataset="mvtec", category=c) for c in MVTEC}
            == {c: 512 if c in CFLOW_512 else 128 if c == "transistor" else 256 for c in MVTEC})
    assert size(dataset="btad", category="01") == size(dataset="mvtec", category="all") == 256


@pytest.mark.parametrize("method", PRESETS)
def test_shapes_by_arithmetic(method):
    """The packaged backbone's features are those that the smaller presets are tried on below; the
    network itself, with random weights."""
    s = configure(method=method, preset="smoke").settings
    assert features_of(s["transform"]["size"], **s["backbone"]) == lite_shapes(s["transform"]["size"], **s["backbone"])


# -- a step at full size -------------------------------------------------------------------------------------------

@every_paper_preset
def test_backbone_has_these_shapes(name, meta):
    "The network that the preset names, its stages, pyramid and input size."
    s = paper(name).settings
    assert features_of(s["transform"]["size"], **s["backbone"]) == PAPER[name][1]


@every_paper_preset
def test_a_step_of_every_paper_preset(name, meta, stand_in):
    """A batch (`batch_of`): as many losses as there are steps, a gradient for every parameter; in HGAD's
    first stage none inside categories."""
    config = paper(name)
    schedule, altub = (Schedule(**config.settings["schedule"]), AltUB(**config.settings["altub"]) if config.altub
                       else None)
    model = build(config, stand_in(PAPER[name][1], config.settings["transform"]["size"]))
    check_training(model, IMAGES.get(config.category, 240), schedule, altub)
    inside = {n for n, _ in model.named_parameters() if n.endswith(("delta", "psi"))}
    if inside:
        # the last of the first two meta-epochs
        assert take_steps(model, schedule, epoch=15) == inside
        assert not model.intra
    assert take_steps(model, schedule, epoch=schedule.epochs - 1) == set()
    grouped = [id(p) for g in model.groups(schedule.weight_decay) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert bool(model.base_parameters()) == (config.altub or config.method == "hgad")


@every_paper_preset
def test_maps_of_every_paper_preset(name, meta, stand_in):
    "Of two test images: parts of each level's size, maps of the mask's."
    config = paper(name)
    s = config.settings
    model = build(config, stand_in(shapes := PAPER[name][1], s["transform"]["size"])).eval()
    with torch.no_grad():
        parts = model.parts([torch.randn(2, *s) for s in shapes], torch.zeros(2, dtype=torch.long) if model.labelled
                            else None)
        assert [(p.base.shape, p.logdet.shape) for p in parts] == [((2, *s[1:]),) * 2 for s in shapes]
        assert all((p.entropy is not None) == model.labelled for p in parts)
        size = s["transform"]["mask_size"] or s["transform"]["size"]
        maps, images = score_batch(parts, size, model.score)
    assert maps.shape == (2, size, size)
    assert images.shape == (2,)
    assert size == {"hgad": 256}.get(config.method, s["transform"]["size"])


@pytest.mark.parametrize("preset, altub", [("smoke", False), ("smoke", True), ("demo", False), ("real", False)])
@pytest.mark.parametrize("method", PRESETS)
def test_a_step_of_every_other_preset(method, preset, altub, meta, stand_in):
    config = configure(method=method, preset=preset, altub=altub)
    schedule = Schedule(**config.settings["schedule"])
    model = build(config,
                  stand_in(lite_shapes(size := config.settings["transform"]["size"], **config.settings["backbone"]),
                           size))
    check_training(model, 40, schedule, AltUB(**config.settings["altub"]) if altub else None)
    assert take_steps(model, schedule, epoch=schedule.epochs - 1) == set()


# -- numbers of parameters -----------------------------------------------------------------------------------------

def trained(model: Detector) -> dict[str, int]:
    "Of each kind."
    return {kind: sum(p.numel() for p in getattr(model, kind).parameters() if p.requires_grad)
            for kind in ("norms", "flows", "bases")}


@pytest.mark.parametrize("name, millions", [(WRN, (41.3, 41.3)), (R18, (4.7, 4.9))],
                         ids=["wide_resnet50_2", "resnet18"])
def test_fastflow_parameters_as_published(name, millions, meta, stand_in):
    "The flows', in millions: 41.3 by the paper's table; the public ResNet-18 has 4.7, the paper says 4.9."
    model = build(paper(f"fastflow {name}"), stand_in(PAPER[f"fastflow {name}"][1]))
    assert millions[0] <= round(trained(model)["flows"] / 1e6, 1) <= millions[1]


@pytest.mark.parametrize("name", [n for n in PAPER if n.startswith("fastflow")])
def test_fastflow_parameters(name, meta, stand_in):
    """Two convolutions of the passive half with biases, scale and offset, in each step; LayerNorm's
    gain and shift before ResNets."""
    config, (_, shapes) = paper(name), PAPER[name]
    known = FASTFLOW_PUBLISHED[config.settings["backbone"]["name"]]
    steps = [known["kernels"][k % len(known["kernels"])] for k in range(known["steps"])]
    def step(channels, kernel):
        half, hidden = channels // 2, int(channels // 2 * known["ratio"])
        return (kernel**2 * half * hidden + hidden) + (kernel**2 * hidden * 2 * half + 2 * half) + 2 * channels
    assert trained(build(config, stand_in(shapes))) == {
        "flows": sum(step(c, k) for c, _, _ in shapes for k in steps),
        "norms": sum(2 * math.prod(s) for s in shapes) if known["norm"] == "layer" else 0,
        "bases": sum(2 * c for c, _, _ in shapes) if config.altub else 0}


def dense_step(channels: int, code: int) -> int:
    "Linear(in → 2 in), ReLU, Linear on half the channels and the code; scale and offset."
    inputs = channels // 2 + code
    return (inputs * 2 * inputs + 2 * inputs) + (2 * inputs * channels + channels) + 2 * channels


@pytest.mark.parametrize("name", ["cflow 256", "cflow 512", "cflow altub"])
def test_cflow_parameters(name, meta, stand_in):
    "8 steps, code 128; whatever the size of the image. None are published; 8 rotations a level are not trained."
    model = build(paper(name), stand_in(PAPER[name][1]))
    assert (trained(model) == {"norms": 0, "flows": sum(8 * dense_step(c, 128) for c in (512, 1024, 2048)),
                               "bases": 2 * (512 + 1024 + 2048) if "altub" in name else 0})
    assert [tuple(s.mixing.perm.shape) for s in model.flows[2].steps] == [(2048, 2048)] * 8


def test_hgad_parameters(meta, stand_in):
    """12 steps, code 256; of each level 15 categories of 10 centres in 200 dimensions, the first of
    them shared. None are published."""
    model = build(paper("hgad"), stand_in(PAPER["hgad"][1]))
    assert (trained(model) == {"norms": 0, "flows": 3 * 12 * dense_step(200, 256),
                               "bases": 3 * (15 * 200 + 15 * 9 * 200 + 15 + 15 * 10)})


# -- in numbers ----------------------------------------------------------------------------------------------------

def check_numbers(model: Detector, losses) -> None:
    "The sum of `losses()` and its gradient are finite, and a small step along it lowers the sum."
    before = sum(losses())
    before.backward()
    moved = [p for p in model.parameters() if p.grad is not None]
    size = sum(p.grad.square().sum() for p in moved).sqrt()
    with torch.no_grad():
        for p in moved:
            p -= 1e-3 * p.grad / size
        assert before.isfinite() and size.isfinite() and sum(losses()) < before


def test_hgad_in_numbers(stand_in):
    "One image at full size, the second stage: 5376 positions against 150 centres a level."
    torch.manual_seed(0)
    model = build(paper("hgad"), stand_in(shapes := PAPER["hgad"][1], 1024))
    x = [torch.randn(1, *s) for s in shapes]
    model.begin(199, 200)
    check_numbers(model, lambda: model.losses(x, torch.tensor([14])))


@pytest.mark.slow
def test_cflow_in_numbers(stand_in):
    "A fiber batch of each level, whose maps are made as small as that; the rotations of up to 2048 channels are drawn."
    torch.manual_seed(0)
    config = paper("cflow 256")
    assert config.settings["detector"]["fibers"] == 16 * 16
    model = build(config, stand_in(shapes := [(c, 16, 16) for c, _, _ in PAPER["cflow 256"][1]], 256))
    rotation = model.flows[2].steps[0].mixing.perm
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2048), atol=1e-4, rtol=0)
    x = [torch.randn(1, *s) for s in shapes]
    check_numbers(model, lambda: model.losses(x, None, torch.Generator().manual_seed(0)))
