"""Detectors: what stands before the flow, the published settings, one score for one image, files, and bad input."""
import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flowrepro import backbones, detectors
from flowrepro.backbones import Backbone, WeightsError
from flowrepro.bases import Base
from flowrepro.data import DataError, Dataset, Transform, load, read
from flowrepro.detectors import DETECTORS, FASTFLOW_PUBLISHED, HGAD, CFlow, Detector, FastFlow, Standardise, norm_layer
from flowrepro.scores import PUBLISHED, Score, gaussian

SHAPES = {  # of the published backbones' features
    "resnet18.tv_in1k": [(64, 64, 64), (128, 32, 32), (256, 16, 16)],
    "wide_resnet50_2.racm_in1k": [(256, 64, 64), (512, 32, 32), (1024, 16, 16)],
    "deit_base_distilled_patch16_384.fb_in1k": [(768, 24, 24)],
    "cait_m48_448.fb_dist_in1k": [(768, 28, 28)],
}


@pytest.fixture(scope="module")
def images(parts_folder) -> torch.Tensor:
    "Images like those that `trained` knows."
    train, _ = load("folder", parts_folder, transform=Transform(32))
    return torch.stack([train[i].image for i in range(7)])


@pytest.fixture(scope="module")
def trained(tiny_backbone, parts_folder) -> FastFlow:
    "A small detector, trained for two epochs; tests do not change it."
    torch.manual_seed(0)
    model = FastFlow(tiny_backbone(), steps=2)
    return model.fit(load("folder", parts_folder, transform=Transform(32))[0], epochs=2, batch=4, progress=False)


def trainable(model) -> int:
    return sum(p.numel() for p in model.flows.parameters())


# -- what stands before the flow -----------------------------------------------------------------------------------

def test_standardise_measures_the_training_images(features, stand_in):
    """After `prepare`, each channel of the training features has mean 0 and deviation 1; a
    dead channel is only centered."""
    model = FastFlow(stand_in(features.shapes), steps=1)
    x = features.bank[slice(None)]
    assert all(torch.equal(norm(v), v) for norm, v in zip(model.norms, x))
    model.prepare(features.bank)
    for level, (norm, v) in enumerate(zip(model.norms, x)):
        y = norm(v)
        std = y.std((0, 2, 3), unbiased=False)
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), atol=1e-5, rtol=0)
        alive = [c for c in range(y.shape[1]) if (level, c) != (0, 2)]
        torch.testing.assert_close(std[alive], torch.ones(len(alive)), atol=1e-5, rtol=0)
    assert model.norms[0](x[0])[:, 2].abs().max() < 1e-4 and model.norms[0].std[2] == 1


def test_standardise_is_not_trained_and_is_saved(features, stand_in):
    model = FastFlow(stand_in(features.shapes), steps=1)
    model.prepare(features.bank)
    assert not list(model.norms.parameters())
    assert ({k for k in model.state_dict() if k.startswith("norms")}
            == {f"norms.{i}.{n}" for i in range(2) for n in ("mean", "std")})


def test_prepare_only_standardises(features, stand_in):
    "Other norms stay as they are made."
    for kind in ("layer", "layer-fixed", "none"):
        model = FastFlow(stand_in(features.shapes), steps=1, norm=kind)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.prepare(features.bank)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "calibration")


def test_norm_layers():
    shape = (4, 6, 5)
    x = torch.randn(3, *shape) * 4 + 2
    parameters = {kind: sum(p.numel() for p in norm_layer(kind, shape).parameters())
                  for kind in ("standard", "layer", "layer-fixed", "none")}
    assert parameters == {"standard": 0, "layer": 240, "layer-fixed": 0, "none": 0}
    assert torch.equal(norm_layer("none", shape)(x), x) and isinstance(norm_layer("standard", shape), Standardise)
    expected = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    for kind in ("layer", "layer-fixed"):
        torch.testing.assert_close(norm_layer(kind, shape)(x), expected, atol=1e-4, rtol=1e-4)


def test_unknown_norm(stand_in):
    with pytest.raises(ValueError, match="'batch': one of standard, layer, none, layer-fixed"):
        FastFlow(stand_in([(4, 2, 2)]), norm="batch")


@pytest.mark.parametrize("norm", ["standard", "layer", "layer-fixed", "none"])
@pytest.mark.parametrize("method, settings", [(FastFlow, {}), (CFlow, dict(code=8)), (HGAD, dict(code=8, centres=2))],
                         ids=lambda v: getattr(v, "method", ""))
def test_double_precision_by_default(method, settings, norm, tiny_backbone, parts_folder):
    "A program's own default type is the flow's, whatever stands before it; the backbone's features are float32."
    train, _ = load("folder", parts_folder, transform=Transform(32))
    torch.set_default_dtype(torch.float64)
    try:
        model = method(tiny_backbone(), steps=1, norm=norm, **settings).fit(train, epochs=1, batch=10, progress=False)
        maps, scores = model.predict(train)
    finally:
        torch.set_default_dtype(torch.float32)
    assert maps.dtype == scores.dtype == torch.float64 and maps.isfinite().all()


# -- loss and parts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["standard", "layer", "layer-fixed", "none"])
def test_loss_and_parts_say_the_same(norm, features, stand_in):
    "The loss is minus the mean over images of the parts, summed over levels, positions and channels."
    torch.manual_seed(1)
    model = FastFlow(stand_in(features.shapes), steps=3, norm=norm)
    model.prepare(features.bank)
    x = features.bank[slice(0, 5)]
    parts = model.parts(x)
    assert [p.base.shape for p in parts] == [p.logdet.shape for p in parts] == [(5, 6, 6), (5, 3, 3)]
    total = -sum(p.loglik().sum((1, 2)) * s[0] for p, s in zip(parts, features.shapes)).mean()
    torch.testing.assert_close(model.loss(x), total)
    for part, v, n, flow in zip(parts, x, model.norms, model.flows):
        torch.testing.assert_close(part.base, -flow(n(v))[0].square().mean(1) / 2)


def test_loss_is_a_density(stand_in):
    "With its constant, exp(-loss) is the density of the features: for a linear flow, that of a normal distribution."
    model = FastFlow(stand_in([(2, 1, 1)]), steps=1, kernels=(1,), norm="none").double()
    step = model.flows[0].steps[0]
    for p in step.coupling.subnet.parameters():
        torch.nn.init.zeros_(p)
    step.mixing.gamma.data = torch.tensor([4.0, 12.0], dtype=torch.float64)
    step.mixing.offset.data = torch.tensor([0.3, -1.0], dtype=torch.float64)
    scale = 0.1 * torch.nn.functional.softplus(step.mixing.gamma, beta=0.5)
    normal = torch.distributions.Normal(-step.mixing.offset / scale, 1 / scale)
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    constant = torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))  # 2 dimensions, half of log 2π each
    torch.testing.assert_close(model.loss([x]) + constant, -normal.log_prob(x.flatten()).sum())


@pytest.mark.parametrize("method, settings",
                         [(FastFlow, {}), (CFlow, dict(code=4)),
                          (HGAD, dict(code=4, base="standard", categories=["a"]))],
                          ids=["eq-fastflow", "eq-cflow", "one normal"])
def test_gradient_of_the_loss(method, settings, stand_in):
    "Against finite differences in float64, in the features and in every parameter of the first step."
    torch.manual_seed(1)
    model = method(stand_in([(4, 2, 2)]), steps=2, norm="none", **settings).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    inputs = [torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True), *model.flows[0].steps[0].parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: sum(model.losses([x], torch.zeros(2, dtype=torch.long))), inputs)


def test_base_class_asks_for_a_method(stand_in):
    model = Detector(stand_in([(4, 2, 2)]), Score(), {"norm": "none"}, lambda shape: nn.Identity(),
                     lambda shape: nn.Identity())
    for name in ("losses", "parts"):
        with pytest.raises(NotImplementedError, match=f"Detector defines no {name}"):
            getattr(model, name)([torch.zeros(1, 4, 2, 2)])


# -- the published settings ----------------------------------------------------------------------------------------

def published(name, stand_in, **more) -> FastFlow:
    settings = FASTFLOW_PUBLISHED[name] | more
    backbone = stand_in(SHAPES[name], settings["size"])
    return FastFlow(backbone, **{k: v for k, v in settings.items() if k not in ("levels", "size")},
                    score=PUBLISHED["fastflow"])


@pytest.mark.parametrize("name", FASTFLOW_PUBLISHED)
def test_published_settings_take_a_step(name, stand_in):
    "At full size, without storage: shapes of latents, parts and maps, a gradient for every parameter."
    with torch.device("meta"):
        model = published(name, stand_in)
        x = [torch.randn(2, *s) for s in SHAPES[name]]
        loss = model.loss(x)
        loss.backward()
        parts = model.parts(x)
    assert loss.shape == ()
    assert [p.base.shape for p in parts] == [p.logdet.shape for p in parts] == [(2, *s[1:]) for s in SHAPES[name]]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_published_resnet18_in_numbers(stand_in):
    "One image at full size: a finite loss that a small step along the gradient lowers, and a map of the image's size."
    torch.manual_seed(0)
    model, x = published("resnet18.tv_in1k", stand_in), [torch.randn(1, *s) for s in SHAPES["resnet18.tv_in1k"]]
    loss = model.loss(x)
    loss.backward()
    with torch.no_grad():
        size = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for p in model.parameters():
            p -= 1e-3 * p.grad / size
        assert loss.isfinite() and model.loss(x) < loss
        maps, images = model.score_parts(model.parts(x))
    assert maps.shape == (1, 256, 256)
    assert images.shape == (1,)
    assert maps.isfinite().all()
    assert -1 <= maps.min() <= maps.max() == images[0] <= 0


@pytest.mark.parametrize("name, kernels, millions", [
    ("wide_resnet50_2.racm_in1k", (3, 1), 41.3), ("resnet18.tv_in1k", (3,), 4.7), ("resnet18.tv_in1k", (3, 1), 2.6)])
def test_published_parameter_counts(name, kernels, millions, stand_in):
    "Trained parameters without norms, in millions to one decimal; and by a formula of their own."
    with torch.device("meta"):
        model = published(name, stand_in, kernels=kernels)
    own = sum((k**2 * h * h + h) + (k**2 * h * 2 * h + 2 * h) + 4 * h for h in (s[0] // 2 for s in SHAPES[name])
              for k in (kernels * 8)[:8])
    assert trainable(model) == own and round(own / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["deit_base_distilled_patch16_384.fb_in1k", "cait_m48_448.fb_dist_in1k"])
def test_published_transformers(name, stand_in):
    "20 steps of hidden width 0.16 · 384, kernels in turn."
    with torch.device("meta"):
        model = published(name, stand_in)
    convs = [s.coupling.subnet.first for s in model.flows[0].steps]
    assert len(convs) == 20
    assert {c.weight.shape[:2] for c in convs} == {(61, 384)}
    assert [c.kernel_size[0] for c in convs] == [3, 1] * 10
    assert trainable(model) == 20 * (61 + 2 * 384 + 2 * 768) + 10 * (9 + 1) * 61 * 3 * 384


@pytest.mark.parametrize("name", FASTFLOW_PUBLISHED)
def test_published_backbones_have_these_shapes(name, monkeypatch):
    "Full timm tags and levels that give the features above; transformers without storage."
    monkeypatch.setattr(backbones, "state_hash", lambda net: "0")
    settings = FASTFLOW_PUBLISHED[name]
    with torch.device("cpu" if "resnet" in name else "meta"):
        backbone = Backbone(name, levels=settings["levels"], size=settings["size"], weights="random")
    assert backbone.shapes == SHAPES[name]
    assert backbones.full_name(name) == name and backbones.full_name(name.partition(".")[0]) == name


# -- predicting ----------------------------------------------------------------------------------------------------

def test_predict_takes_images_in_every_form(trained, parts_folder, tmp_path):
    "A data set, paths, a folder, a tensor, floats, single ones: the same maps and scores."
    files = sorted((parts_folder / "spot").iterdir()) + sorted((parts_folder / "good").iterdir())[:3]
    for i, f in enumerate(files):
        shutil.copy(f, tmp_path / f"{i:02}{f.suffix}")
    by_path = {r.image: r for r in read("folder", parts_folder)}
    dataset = Dataset([by_path[f.resolve()] for f in files], Transform(32))
    pixels = torch.stack([s.image for s in (dataset[i] for i in range(len(dataset)))])
    maps, scores = trained.predict(dataset)
    assert maps.shape == (6, 32, 32)
    assert scores.shape == (6,)
    assert maps.dtype == scores.dtype == torch.float32
    assert maps.isfinite().all()
    forms = {"paths": files, "strings": [str(f) for f in files], "folder": tmp_path, "folder as text": str(tmp_path),
             "tensor": pixels, "floats": pixels / 255, "generator": (f for f in files)}
    for form, given in forms.items():
        for a, b in zip(trained.predict(given), (maps, scores)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=form)
    for one in (files[2], str(files[2]), pixels[2], pixels[2:3]):
        a, b = trained.predict(one)
        torch.testing.assert_close(a, maps[2:3], rtol=1e-5,
                                   atol=1e-5), torch.testing.assert_close(b, scores[2:3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[:3], scores[3:])


def test_predict_does_not_depend_on_the_batch(trained, images):
    maps, scores = trained.predict(images)
    for batch in (1, 2, 3, 100):
        a, b = trained.predict(images, batch=batch)
        torch.testing.assert_close(a, maps, rtol=1e-5,
                                   atol=1e-5), torch.testing.assert_close(b, scores, rtol=1e-5, atol=1e-5)
    a, b = trained.predict(images.flip(0))
    torch.testing.assert_close(b.flip(0), scores, rtol=1e-5, atol=1e-5)


def test_predict_twice(trained, images):
    "No dropout, no gradient, no running statistics, even after train()."
    first = trained.predict(images)
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    trained.train()
    again = trained.predict(images)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not again[0].requires_grad
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())


def test_predict_transform(trained, parts_folder):
    "Paths are read with the transform given: another one, other maps."
    files = sorted((parts_folder / "spot").iterdir())
    squash, crop = trained.predict(files)[0], trained.predict(files, transform=Transform(32, policy="crop"))[0]
    assert squash.shape == crop.shape and not torch.allclose(squash, crop)


def test_predict_open_images(trained, parts_folder):
    "PIL images and arrays, one or several, colour or grey, are what their files are."
    files = sorted((parts_folder / "spot").iterdir())
    pictures = [Image.open(f).convert("RGB") for f in files]
    scores = trained.predict(files)[1]
    for given in (pictures, [np.asarray(p) for p in pictures], iter(pictures)):
        assert torch.equal(trained.predict(given)[1], scores)
    for given in (pictures[0], np.asarray(pictures[0]), files[0]):
        assert torch.allclose(trained.predict(given)[1], scores[:1], atol=1e-6)
    grey, clear = pictures[0].convert("L"), pictures[0].convert("RGBA")
    for given in (np.asarray(grey), np.asarray(grey)[..., None]):
        assert torch.equal(trained.predict(given)[1], trained.predict(grey)[1])
    for given in (clear, np.asarray(clear), np.asarray(clear)[None]):
        assert torch.allclose(trained.predict(given)[1], scores[:1], atol=1e-6)


def test_predict_sees_as_in_training(tiny_backbone, parts_folder, tmp_path):
    """The way images became square is saved with the detector: files give the scores of the
    data set that it was evaluated on."""
    train, test = load("folder", parts_folder, transform=Transform(32, policy="crop", interpolation="lanczos"))
    model = FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, batch=4, progress=False)
    model.save(tmp_path / "m.safetensors")
    again = Detector.load(tmp_path / "m.safetensors")
    files = [r.image for r in test.records]
    assert again.seen_through() == train.transform
    assert torch.allclose(model.predict(test)[1], again.predict(files)[1], atol=1e-6)
    assert not torch.allclose(again.predict(files)[1], again.predict(files, transform=Transform(32))[1], atol=1e-4)


def test_save_where_there_is_no_folder(trained, tmp_path):
    "It is made; where it cannot be, the error names the file."
    trained.save(tmp_path / "a/b/m.safetensors")
    assert Detector.load(tmp_path / "a/b/m.safetensors").method == trained.method
    for path in (tmp_path / "a/b/m.safetensors/m", tmp_path / "a"):
        with pytest.raises(OSError, match=f"{path}: the detector cannot be written there"):
            trained.save(path)


def test_no_rotation_but_in_training(trained):
    model = copy.copy(trained)
    model.transform = Transform(32, rotate=5.0)
    assert model.seen_through() == Transform(32)


def test_predict_bad_input(trained, tiny_backbone, tmp_path, images):
    "Each says what to do."
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/parts").symlink_to(tmp_path / "empty", target_is_directory=True)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for given, words in ((tmp_path / "empty", "no image in this folder; "), (tmp_path / "linked", "only parts, of another format or linked; "),
                         (tmp_path / "broken.png", "cannot be decoded"), (tmp_path / "none.png", "missing")):
        with pytest.raises(DataError, match=words) as error:
            trained.predict(given)
        assert given.name in str(error.value)
    with pytest.raises(ValueError, match="call fit first"):
        FastFlow(tiny_backbone(), steps=1).predict(images)
    unfair = FastFlow(tiny_backbone(), steps=1, score=PUBLISHED["cflow"])
    with pytest.raises(ValueError, match="whole test set"):
        unfair.predict(images)
    for given, words in ((torch.zeros(2, 1, 32, 32), r"\(1, 32, 32\): this detector takes \(3, 32, 32\)"),
                         (torch.zeros(2, 3, 64, 64), r"\(3, 64, 64\)"),
                         (images.float(), "divide by 255"), (torch.full((1, 3, 32, 32), float("nan")), "nan"),
                         (np.zeros((2, 3, 32, 32), np.float32), "an image is a path, a PIL image"),
                         ([7], "an image is a path"), (None, "an image is a path"),
                         (np.zeros((3, 32, 32), np.uint8), "an image is a path"),
                         (np.zeros((0, 0, 3), np.uint8), "an image is a path"),
                         (np.zeros((32, 32, 3), np.uint16), "of uint16"),
                         (Image.new("I;16", (32, 32)), "more than 8 bits")):
        with pytest.raises(DataError, match=words):
            trained.predict(given)


def test_predict_batches_of_nothing(trained, images):
    with pytest.raises(ValueError, match="batch 0: a whole number from 1"):
        trained.predict(images, batch=0)


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, 3, 32, 32)], ids=["no paths", "no images"])
def test_predict_nothing(trained, nothing):
    "No images give no maps and no scores, or an error that says so; never something that cannot be unpacked."
    try:
        maps, scores = trained.predict(nothing)
    except ValueError as error:
        assert "no image" in str(error)
    else:
        assert len(maps) == len(scores) == 0


# -- every part matters --------------------------------------------------------------------------------------------

def test_autocast_around_it(tiny_backbone):
    "Features and smoothed maps are as exact as without."
    with torch.autocast("cpu", torch.bfloat16):
        backbone, x = tiny_backbone(), torch.rand(2, 3, 32, 32)
        features, maps = backbone(x), gaussian(x[:, 0], 2.0)
    assert all(torch.equal(a, b) for a, b in zip(features, backbone(x)))
    assert maps.dtype == torch.float32 and torch.equal(maps, gaussian(x[:, 0], 2.0))


def test_scores_depend_on_every_part(trained, images):
    """Of every level, the base density changes map and score; the log-determinant changes the map,
    and the score if it is asked to."""
    with torch.no_grad():
        parts = trained.parts(trained.backbone(images))
    mine = replace(trained.score, logdet=0.5)
    both = replace(mine, image_logdet=1.0)
    maps, scores = trained.score_parts(parts, mine)
    _, scores_both = trained.score_parts(parts, both)
    for level in range(len(parts)):
        for field in ("base", "logdet"):
            changed = [p._replace(**{field: getattr(p, field) - 0.3}) if l == level else p for l, p in enumerate(parts)]
            new_maps, new_scores = trained.score_parts(changed, mine)
            assert (new_maps > maps).all(), f"{field} of level {level} is not in the map"
            assert (new_scores > scores).all() if field == "base" else torch.equal(new_scores, scores)
            assert (trained.score_parts(changed, both)[1] > scores_both).all()


def test_scores_depend_on_every_tensor(trained, images, tmp_path):
    """Every trained or measured tensor, and every level of the features, moves the maps; but not the last
    shuffle, as N(0, I) knows no order."""
    trained.save(tmp_path / "m.safetensors")
    maps, _ = trained.predict(images)
    for key in load_file(tmp_path / "m.safetensors").keys() - {"flows.0.steps.1.mixing.perm",
                                                               "flows.1.steps.1.mixing.perm"}:
        model = Detector.load(tmp_path / "m.safetensors")
        tensor = dict(model.named_parameters()).get(key, dict(model.named_buffers()).get(key))
        with torch.no_grad():
            tensor.copy_(tensor.roll(1) if key.endswith("perm") else tensor + 0.05 * (1 + torch.rand_like(tensor)))
        assert (model.predict(images)[0] - maps).abs().max() > 1e-5, key
    with torch.no_grad():
        x = trained.backbone(images)
        for level in range(len(x)):
            y = [v + 0.1 * torch.randn_like(v) if l == level else v for l, v in enumerate(x)]
            assert (trained.score_parts(trained.parts(y))[0] - maps).abs().max() > 1e-3


def test_calibration_is_of_the_training_images(trained, parts_folder):
    """Means and deviations of each level's base density and log-determinant over them, no entropy,
    and the largest log-likelihood."""
    train, _ = load("folder", parts_folder, transform=Transform(32))
    with torch.no_grad():
        parts = trained.parts(trained.backbone(torch.stack([train[i].image for i in range(len(train))])))
    expected = torch.tensor([[p.base.mean(), p.logdet.mean(), 0.0, p.base.std(correction=0), p.logdet.std(correction=0),
                              *((p.base + s * p.logdet).max() for s in (0, 0.5, 1))] for p in parts])
    torch.testing.assert_close(trained.calibration, expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_bank(features, stand_in):
    "In eval mode, without gradients, whatever the size of the batches."
    model = FastFlow(stand_in(features.shapes), steps=2).train()
    parts = model.all_parts(features.bank, batch=4)
    assert not model.training and all(not p.base.requires_grad for p in parts)
    for a, b in zip(parts, model.parts(features.bank[slice(None)])):
        torch.testing.assert_close(a.base, b.base), torch.testing.assert_close(a.logdet, b.logdet)


# -- files ---------------------------------------------------------------------------------------------------------

def rewrite(source, target, tensors=None, **about):
    "A copy of a detector's file with other tensors or other metadata."
    with safe_open(str(source), "pt") as f:
        old = f.metadata()
    save_file(load_file(source) if tensors is None else tensors, str(target),
              metadata={k: v for k, v in (old | about).items() if v is not None})
    return target


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class Laplace(Base):
    "A base without parameters, so that a file of its detector looks like any other."
    def log_prob(self, z, label=None): return -z.abs().sum(self.dim)


def test_a_base_of_your_own_is_not_lost(tiny_backbone, tmp_path, monkeypatch):
    "A file does not load as something else, but it loads into a detector made alike, or by a class that is known."
    make = lambda kind=FastFlow: kind(tiny_backbone(), steps=1)
    model, path = make(), tmp_path / "m.safetensors"
    model.bases = nn.ModuleList(Laplace(c, 1) for c in model.backbone.channels)
    model.save(path)
    with pytest.raises(DataError, match="Laplace of your own"):
        Detector.load(path)

    class Mine(FastFlow):
        method = "mine"
    make(Mine).save(path)
    monkeypatch.setitem(DETECTORS, "mine", Mine)
    assert type(Detector.load(path)) is Mine


def test_a_backbone_of_your_own_is_not_lost(tiny_backbone, tmp_path):
    "One that makes other features of the same weights: the file does not load with plain ones."
    class Pooled(Backbone):
        def forward(self, images): return [x.mean((2, 3), keepdim=True).expand_as(x) for x in super().forward(images)]
    backbone, path = tiny_backbone(), tmp_path / "m.safetensors"
    backbone.__class__ = Pooled
    FastFlow(backbone, steps=1).save(path)
    with pytest.raises(DataError, match="Pooled of your own"):
        Detector.load(path)


@pytest.mark.parametrize("settings", [
    dict(steps=2), dict(steps=1, norm="layer", soft=True, score=PUBLISHED["fastflow"]),
    dict(steps=3, kernels=(1, 3), ratio=0.5, clamp=1.5, rule="unit-gain", norm="none",
    score=Score(logdet=0.5, normalise="none", top=0.1, levels="linear")),
    dict(steps=1, norm="layer-fixed", score=Score(logdet=0.5, normalise="none", image="max"))])
def test_save_and_load(settings, tiny_backbone, images, tmp_path):
    "The same settings, the same numbers, whatever seed is set meanwhile."
    model = FastFlow(tiny_backbone(levels=(1, 2, 3), weights="random:4"), **settings)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0
    model.calibration.copy_(torch.linspace(0.1, 0.9, 24).view(3, 8))
    model.save(tmp_path / "m.safetensors")
    torch.manual_seed(99)
    again = Detector.load(tmp_path / "m.safetensors")
    assert type(again) is FastFlow
    assert again.config == model.config
    assert again.score == model.score
    assert again.backbone.config() == model.backbone.config()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.predict(images), again.predict(images)))
    assert all(torch.equal(a, b)
               for a, b in zip(model.predict(images), FastFlow.load(str(tmp_path / "m.safetensors")).predict(images)))


DENSE = [(CFlow, dict(code=8, fibers=64)),
         (CFlow, dict(code=4, fibers=None, base="diagonal", per="scalar", norm="layer")),
         (HGAD, dict(code=8, categories=["b", "a"], centres=3)),
         (HGAD, dict(code=4, categories=["a"], base="classes", class_mode="inferred-top")),
         (HGAD, dict(code=4, categories=["a", "b"], base="diagonal")),
         (FastFlow, dict(base="diagonal", per="position"))]


@pytest.mark.parametrize("method, settings", DENSE)
def test_save_and_load_of_every_method(method, settings, tiny_backbone, images, tmp_path):
    "Base, categories and all; the class of the method, and the base class, load it, another method's does not."
    model = method(tiny_backbone(), steps=1, **settings)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0
    model.calibration.copy_(torch.linspace(0.1, 0.9, 16).view(2, 8))
    model.save(tmp_path / "m.safetensors")
    for kind in (method, Detector):
        again = kind.load(tmp_path / "m.safetensors")
        assert type(again) is method and again.config == model.config and again.score == model.score
        assert all(torch.equal(a, b) for a, b in zip(model.predict(images), again.predict(images)))
        assert not any("code" in k for k in again.state_dict())
    other = FastFlow if method is HGAD else HGAD
    with pytest.raises(DataError, match=f"m.safetensors holds method {method.method}, not {other.method}: "
                                        f"use {method.__name__}.load, or Detector.load"):
        other.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("method, settings", DENSE)
def test_no_method_mixes_images(method, settings, features, stand_in):
    "The parts of an image are the same alone and among others."
    model = method(stand_in(features.shapes), steps=2, **settings).eval()
    model.prepare(features.bank)
    x = features.bank[slice(0, 5)]
    with torch.no_grad():
        whole, alone = model.parts(x), model.parts([v[3:4] for v in x])
    for w, a in zip(whole, alone):
        assert all((t is None and s is None) or torch.allclose(t[3:4], s, rtol=1e-4, atol=1e-5) for t, s in zip(w, a))
        assert (w.entropy is not None) == (method is HGAD and settings.get("base") != "diagonal")


def test_file_holds_no_backbone(saved, trained):
    assert not any(k.startswith("backbone") for k in load_file(saved))
    assert (saved.stat().st_size < 4.5
            * sum(v.numel() for k, v in trained.state_dict().items() if not k.startswith("backbone")) + 50_000)


def test_load_nothing(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(DataError, match="no detector at .*model.safetensors"):
            Detector.load(path)


@pytest.mark.parametrize("content", [b"", b"hello" * 100, b"\x10" + b"\0" * 7 + b"{" * 16],
                         ids=["empty", "text", "broken header"])
def test_load_something_else(content, tmp_path):
    "A file that is no safetensors file is named."
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match="model.safetensors"):
        Detector.load(path)


def test_load_cut_off(saved):
    "So is one whose end is missing."
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(DataError, match="model.safetensors"):
        Detector.load(saved)


def test_load_other_tensors(saved, tmp_path):
    "Weights of something else, or of a method unknown here."
    save_file({"a": torch.zeros(3)}, str(tmp_path / "plain.safetensors"))
    for path in (tmp_path / "plain.safetensors", rewrite(saved, tmp_path / "other.safetensors", method="glow")):
        with pytest.raises(DataError, match=f"{path.name} holds no flowrepro detector of a known method .fastflow"):
            Detector.load(path)


def test_load_tampered(saved, tmp_path):
    "A tensor missing, one too many, one of another shape: named."
    state = load_file(saved)
    key = "flows.0.steps.1.mixing.gamma"
    n = len(state[key])
    for name, tensors, words in (("less", {k: v for k, v in state.items() if k != key},
                                  f"{key} is none in the file, ({n},) in the detector"),
                                 ("more", state | {key + "2": state[key].clone()},
                                  f"{key}2 is ({n},) in the file, none in the detector"),
                                 ("shape", state | {key: state[key][:-1].clone()},
                                  f"{key} is ({n - 1},) in the file, ({n},) in the detector")):
        with pytest.raises(DataError) as error:
            Detector.load(rewrite(saved, tmp_path / f"{name}.safetensors", tensors))
        assert words in str(error.value) and f"{name}.safetensors" in str(error.value)


def test_load_other_settings(saved, tmp_path):
    "Tensors that do not fit the settings beside them."
    with safe_open(str(saved), "pt") as f:
        config = json.loads(f.metadata()["config"])
    with pytest.raises(DataError,
                       match=r"deeper.safetensors does not fit: flows.0.steps.2.\S+ is none in the file, "
                             r"\([\d, ]+\) in the detector"):
        Detector.load(rewrite(saved, tmp_path / "deeper.safetensors", config=json.dumps(config | {"steps": 3})))


def test_load_other_backbone_weights(saved, tmp_path):
    "The weights that it was trained on, or an error; never maps from others."
    with pytest.raises(DataError, match="was trained on backbone weights random:0:.* here are random:3"):
        Detector.load(saved, weights="random:3")
    with pytest.raises(DataError, match="trained on backbone weights random:0:000"):
        Detector.load(rewrite(saved, tmp_path / "changed.safetensors", weight_id="random:0:000"))
    with pytest.raises(WeightsError, match="no such weight file"):
        Detector.load(saved, weights=str(tmp_path / "weights.pth"))


def test_backbone_weights_from_a_file(tiny_backbone, images, tmp_path):
    "Only the caller knows where the file is now."
    import timm
    net = timm.create_model("test_resnet.r160_in1k")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    model = FastFlow(tiny_backbone(weights=str(tmp_path / "weights.pth")), steps=1,
                     score=Score(logdet=0.5, normalise="none"))
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="pass that file as weights="):
        Detector.load(tmp_path / "m.safetensors")
    again = Detector.load(tmp_path / "m.safetensors", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(model.predict(images)[0], again.predict(images)[0])


def test_packaged_backbone_weights(tmp_path):
    "A detector on packaged weights loads without being told where they are."
    model = FastFlow(Backbone(levels=(2,), size=32), steps=1, score=Score(logdet=0.5, normalise="none"))
    model.save(tmp_path / "m.safetensors")
    assert Detector.load(tmp_path / "m.safetensors").backbone.weight_id == model.backbone.weight_id


# -- in five lines -------------------------------------------------------------------------------------------------

def test_five_lines(parts_folder, monkeypatch):
    "The usage that the notebook shows, on somebody's own folder: fit, predict, and the spots stand out where they are."
    monkeypatch.chdir(parts_folder.parent)
    from flowrepro import FastFlow, load

    train, test = load("folder", "my_parts")           # good/ and others
    model = FastFlow().fit(train, epochs=3, progress=False)
    maps, scores = model.predict(test)                 # heat maps (N, H, W), one score per image

    labels = np.array(test.labels)
    assert maps.shape == (len(test), 256, 256) and scores.shape == (len(test),)
    assert scores[labels == 1].min() > scores[labels == 0].max()
    for i in np.flatnonzero(labels):
        y, x = divmod(int(maps[i].argmax()), 256)
        assert 60 < y < 180 and 30 < x < 190, f"the maximum is at ({x}, {y}), outside of the spot"


def test_predict_passes_over_hidden_files(trained, parts_folder, tmp_path):
    "As training does: what a Mac or Jupyter leaves beside images is none of them."
    folder = shutil.copytree(parts_folder / "good", tmp_path / ".mine/good")
    before = trained.predict(folder)[1]
    (folder / "._00.bmp").write_bytes(b"no image")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
        shutil.copy(folder / "00.bmp", folder / hidden)
    assert torch.equal(trained.predict(folder)[1], before)


class Gray(Transform):
    "Somebody's own preprocessing."

    def image(self, *args):
        return super().image(*args).float().mean(0).byte().expand(3, -1, -1)


def test_save_tells_what_the_file_cannot_hold(tiny_backbone, parts_folder, tmp_path):
    "A transform of one's own: a warning with the remedy, and the same scores with it."
    train, _ = load("folder", parts_folder, transform=Gray(32))
    model = FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, progress=False)
    with pytest.warns(UserWarning, match="not a Gray: once it is loaded, set detector.transform"):
        model.save(tmp_path / "m.safetensors")
    again = Detector.load(tmp_path / "m.safetensors", weights="random")
    assert not torch.equal(again.predict(parts_folder)[1], model.predict(parts_folder)[1])
    again.transform = Gray(32)
    assert torch.equal(again.predict(parts_folder)[1], model.predict(parts_folder)[1])


def test_settings_in_numbers_of_numpy(tiny_backbone, parts_folder, tmp_path):
    train, _ = load("folder", parts_folder, transform=Transform(np.int64(32)))
    model = FastFlow(tiny_backbone(), steps=1, clamp=np.float32(2), score=Score(temperature=np.float32(0.5)))
    model.fit(train, epochs=1, progress=False).save(tmp_path / "m.safetensors")
    again = Detector.load(tmp_path / "m.safetensors", weights="random")
    assert torch.equal(again.predict(parts_folder)[1], model.predict(parts_folder)[1])


def test_registry():
    assert DETECTORS["fastflow"] is FastFlow and all(cls.method == name for name, cls in DETECTORS.items())


def test_unknown_setting():
    with pytest.raises(TypeError):
        FastFlow("resnet18", depth=3)
    with pytest.raises(ValueError, match="unknown backbone"):
        FastFlow("resnet1800")


def test_a_base_of_the_mean_alone(stand_in):
    "`scale=False` reaches the base of every level; what AltUB's turns move is the mean."
    for method, settings in ((FastFlow, {}), (CFlow, dict(code=4))):
        for scale in (True, False):
            model = method(stand_in([(4, 2, 2), (5, 1, 1)]), steps=1, base="diagonal", scale=scale, **settings)
            assert [b.log_scale.requires_grad for b in model.bases] == [scale] * 2
            assert len(model.base_parameters()) == (4 if scale else 2)


@pytest.mark.parametrize("below, zero", [(-2.0, "-2"), (-0.01, "-0.01")])
def test_floats_that_are_standardised_already(trained, images, below, zero):
    "Negative ones are refused as well as those up to 255."
    with pytest.raises(DataError, match=rf"lie in \[0, 1\], these in \[{zero}, "):
        trained.predict(torch.where(images[:1] < 130, below, 1.0))


def test_a_table_of_scores_beside_the_images(trained, parts_folder, tmp_path):
    "What `flowrepro predict` wrote below is left out; a table in the folder itself takes no image away."
    folder = shutil.copytree(parts_folder / "spot", tmp_path / "spot")
    for at in (folder, folder / "heat"):
        at.mkdir(exist_ok=True)
        (at / "scores.csv").write_text("image,score\n")
    shutil.copy(sorted(folder.glob("*.png"))[0], folder / "heat")
    assert len(trained.predict(folder)[1]) == 3


def test_random_images_are_read_in_turn(parts_folder, monkeypatch):
    "A rotation is drawn image by image, never ahead in threads, whose order would decide it."
    files, turned = sorted((parts_folder / "good").iterdir()), Transform(32, rotate=30.0)
    monkeypatch.setattr(detectors, "read_ahead", None)
    for given in (Dataset(read("folder", parts_folder), turned), files):
        assert len(list(detectors.open_images(given, turned))) == len(given)


@pytest.mark.parametrize("method, more", [(FastFlow, dict(kernels=(1, 3), ratio=0.5)), (CFlow, dict(code=8)),
                                          (HGAD, dict(code=8, categories=["a", "b"]))])
def test_settings_reach_every_step(method, more, stand_in):
    "Not the default of the flow, nor that of another method."
    for soft, rule, clamp in ((True, "unit-gain", 1.3), (False, "published", 2.7)):
        model = method(stand_in([(8, 2, 2), (6, 1, 1)]), steps=3, soft=soft, rule=rule, clamp=clamp, **more)
        for flow, c in zip(model.flows, (8, 6)):
            nets = [step.coupling.subnet for step in flow.steps]
            assert len(nets) == 3
            assert {(s.mixing.soft, s.coupling.rule, s.coupling.clamp) for s in flow.steps} == {(soft, rule, clamp)}
            if method is FastFlow:
                assert [n.first.kernel_size[0] for n in nets] == [1, 3, 1]
                assert {n.first.out_channels for n in nets} == {int(c / 2 * 0.5)}
            else:
                assert {n.first.in_features for n in nets} == {c // 2 + 8}


def test_likelihoods_that_are_not_finite(features, stand_in):
    "What a last step ruined is told at once, and there is no calibration to score by."
    model = FastFlow(stand_in(features.shapes), steps=1)
    with torch.no_grad():
        model.flows[1].steps[0].mixing.offset[0] = float("inf")
    with pytest.raises(RuntimeError, match="not finite: the training diverged.*lower lr, or clip"):
        model.calibrate(features.bank)
    assert model.calibration.isnan().all()


def test_labels_of_a_bank(features, stand_in):
    "Each batch has those of its own images."
    model = HGAD(stand_in(features.shapes), ["a", "b"], steps=1, code=4, centres=2, class_mode="known")
    labels = torch.arange(14) // 7
    for a, b in zip(model.all_parts(features.bank, labels, batch=4), model.parts(features.bank[slice(None)], labels)):
        torch.testing.assert_close(a.base, b.base)


def test_a_data_set_of_images_told_their_category(tiny_backbone, parts_folder):
    "The category that is given counts, whatever the data set calls its own."
    test = Dataset(read("folder", parts_folder)[:3], Transform(32))
    model = HGAD(tiny_backbone(levels=(1,)), ["a", "b"], steps=1, code=4, centres=2, class_mode="known",
                 score=Score(logdet=0.5, normalise="none"))
    pixels = torch.stack([test[i].image for i in range(3)])
    assert torch.equal(model.predict(test, category="b")[1], model.predict(pixels, category="b")[1])


def test_features_of_another_shape(stand_in):
    "As many positions in other places would have other codes."
    for method, more in ((CFlow, {}), (HGAD, dict(categories=["a"]))):
        model = method(stand_in([(4, 4, 4)]), steps=1, code=4, **more)
        with pytest.raises(ValueError, match=r"features of level 0 are \(4, 2, 8\), this detector's \(4, 4, 4\)"):
            model.parts([torch.zeros(1, 4, 2, 8)])


@pytest.mark.parametrize("fibers, images, words", [(50, 2, "fiber batch of 50 rows"), (None, 0, "empty batch")])
def test_losses_of_too_few_rows(stand_in, fibers, images, words):
    "An error for one's own loop, too, where it was NaN."
    model = CFlow(stand_in([(8, 4, 4), (8, 2, 2)]), steps=1, code=4, fibers=fibers)
    with pytest.raises(ValueError, match=words):
        list(model.losses([torch.randn(images, 8, 4, 4), torch.randn(images, 8, 2, 2)]))


def test_rows_of_a_fiber_batch_keep_their_codes(stand_in):
    "All rows of two images in one fiber batch have the loss of all rows in their order."
    model, x = CFlow(stand_in([(8, 4, 4)]), steps=2, code=4, fibers=32), [torch.randn(2, 8, 4, 4)]
    for p in model.flows.parameters():
        nn.init.normal_(p, std=0.3)
    (shuffled,) = model.losses(x)
    model.config["fibers"] = None
    (in_order,) = model.losses(x)
    torch.testing.assert_close(shuffled, in_order)


def test_a_saved_detector_is_as_readable_as_other_files(stand_in, tmp_path):
    "By the umask, not by its owner alone."
    (other := tmp_path / "other").touch()
    CFlow(stand_in([(8, 2, 2)]), steps=1, code=4).save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode == other.stat().st_mode
    assert {p.name for p in tmp_path.iterdir()} == {"other", "m.safetensors"}


def test_a_category_it_does_not_know_is_refused_before_images_are_read(stand_in, toy, monkeypatch):
    model = HGAD(stand_in([(8, 2, 2)]), ["a", "b"], steps=1, code=4, centres=2)
    model.calibration.fill_(1.0)
    monkeypatch.setattr("flowrepro.detectors.open_images", lambda *_: pytest.fail("images are read"))
    with pytest.raises(DataError, match="category 'nuts'"):
        model.predict(toy, category="nuts")
