"""The loop: seeded, resumable to the bit, stopped by a loss that is no number; its schedule; what it leaves alone."""
import math
from dataclasses import asdict, replace

import pytest
import torch

from flowrepro import training
from flowrepro.backbones import state_hash
from flowrepro.data import Dataset, Transform, load, read
from flowrepro.detectors import FastFlow
from flowrepro.training import Schedule, TrainingError, batches, fit, fit_dataset, read_checkpoint, train_step, write_checkpoint

SCHEDULE = Schedule(epochs=4, batch=4, lr=1e-2)


@pytest.fixture
def make(features, stand_in):
    "`make(seed)`: an untrained detector for the random features."
    def build(seed=0, **kw):
        torch.manual_seed(seed)
        model = FastFlow(stand_in(features.shapes), **{"steps": 2} | kw)
        model.prepare(features.bank)
        return model
    return build


def same(a, b) -> bool:
    "Equal to the bit (the calibration may be NaN in both)."
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(v.nan_to_num(7.0), y[k].nan_to_num(7.0)) for k, v in x.items())


def losses(history) -> list[float]:
    return [r["loss"] for r in history]


# -- the same again ------------------------------------------------------------------------------------------------

def test_same_seed_same_model(make, features):
    a, b, c = make(), make(), make()
    one, two = (fit(m, features.bank, SCHEDULE, progress=False) for m in (a, b))
    torch.manual_seed(123)  # what else was drawn does not matter
    torch.randn(5)
    three = fit(c, features.bank, replace(SCHEDULE, seed=1), progress=False)
    assert same(a, b) and losses(one) == losses(two)
    assert not same(a, c) and losses(one) != losses(three)


def test_fit_dataset_is_seeded(tiny_backbone, toy):
    train, _ = load("toy", toy, "weave", Transform(32))
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model = FastFlow(tiny_backbone(), steps=1)
        out.append((model, fit_dataset(model, train, epochs=2, batch=4, seed=seed, progress=False)))
    assert same(out[0][0], out[1][0]) and losses(out[0][1]) == losses(out[1][1]) != losses(out[2][1])


def test_loss_falls(make, features):
    "And the model is what the history says: the last loss is near that of the trained model."
    model = make()
    before = model.loss(features.bank[slice(None)]).item()
    history = fit(model, features.bank, replace(SCHEDULE, epochs=12), progress=False)
    after = model.loss(features.bank[slice(None)]).item()
    assert history[0]["loss"] > history[-1]["loss"] and before > after + 5 and abs(history[-1]["loss"] - after) < 0.2 * abs(before - after)


# -- resume --------------------------------------------------------------------------------------------------------

class Killed(Exception):
    pass


def kill_in(model, step):
    "From now on, training ends in this step (from 0) of the model's life."
    own, calls = model.loss, iter(range(10**6))

    def loss(x, labels=None):
        if next(calls) == step:
            raise Killed
        return own(x, labels)

    model.loss = loss


def without_time(history) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in history]


@pytest.mark.parametrize("when", [(), (1, 3)], ids=["each epoch", "evaluations"])
@pytest.mark.parametrize("step", [0, 2, 3, 7, 11])
def test_resume_is_exact(step, when, make, features, tmp_path):
    "Killed in any step and started again with another model: every weight, loss and evaluation as if nothing had happened."
    path, whole, part, seen = tmp_path / "checkpoint.pt", make(), make(), []
    evaluation = dict(evaluate=lambda e: seen.append(e) or {"score": e / 7}, when=when)
    history = fit(whole, features.bank, SCHEDULE, **evaluation, progress=False)
    kill_in(part, step)
    seen.clear()
    with pytest.raises(Killed):
        fit(part, features.bank, SCHEDULE, checkpoint=path, **evaluation, progress=False)
    saved = [e for e in (when or (1, 2, 3, 4)) if 3 * e <= step]  # 3 steps an epoch
    assert path.exists() == bool(saved)
    resumed = make(seed=77 if saved else 0)
    again = fit(resumed, features.bank, SCHEDULE, checkpoint=path, **evaluation, progress=False)
    assert same(whole, resumed) and without_time(again) == without_time(history) and seen == list(when)
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_finished_training_is_not_repeated(make, features, tmp_path):
    path, model = tmp_path / "checkpoint.pt", make()
    history = fit(model, features.bank, SCHEDULE, checkpoint=path, progress=False)
    again = make(seed=1)
    assert fit(again, features.bank, SCHEDULE, checkpoint=path, progress=False) == history and same(model, again)


@pytest.mark.parametrize("change", [dict(epochs=5), dict(lr=1e-3), dict(seed=3), dict(batch=5), dict(decay="constant"), dict(clip=1.0), dict(precision="bfloat16"), dict(betas=(0.8, 0.9))])
def test_checkpoint_of_another_schedule(change, make, features, tmp_path):
    "Refused, with the file and the remedy; nothing is overwritten."
    path = tmp_path / "checkpoint.pt"
    fit(make(), features.bank, SCHEDULE, checkpoint=path, progress=False)
    before, model = path.read_bytes(), make(seed=2)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint.pt was written under another schedule.*remove it"):
        fit(model, features.bank, replace(SCHEDULE, **change), checkpoint=path, progress=False)
    assert path.read_bytes() == before and all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items() if k != "calibration")


def test_checkpoint_is_replaced_atomically(make, features, tmp_path, monkeypatch):
    "A crash while writing leaves the last whole checkpoint."
    path, model = tmp_path / "checkpoint.pt", make()
    optimizer = torch.optim.Adam(model.parameters())
    write_checkpoint(path, model, optimizer, 0, [{"epoch": 1}], SCHEDULE)
    before = path.read_bytes()

    def crash(saved, target):
        open(target, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, model, optimizer, 1, [], SCHEDULE)
    assert path.read_bytes() == before
    assert read_checkpoint(path, make(), torch.optim.Adam(model.parameters()), SCHEDULE) == (1, [{"epoch": 1}])


def test_checkpoint_is_replaced_whole(make, tmp_path):
    "Who has the old one open reads the old one to its end."
    path, model = tmp_path / "checkpoint.pt", make()
    optimizer = torch.optim.Adam(model.parameters())
    write_checkpoint(path, model, optimizer, 0, [], SCHEDULE)
    before = path.read_bytes()
    with open(path, "rb") as old:
        write_checkpoint(path, model, optimizer, 1, [{"epoch": 1}], SCHEDULE)
        assert old.read() == before != path.read_bytes()


def test_checkpoint_holds_no_backbone(tiny_backbone, tmp_path):
    model = FastFlow(tiny_backbone(), steps=1)
    write_checkpoint(tmp_path / "c.pt", model, torch.optim.Adam(model.flows.parameters()), 0, [], SCHEDULE)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert not any(k.startswith("backbone") for k in saved["model"]) and saved["schedule"] == asdict(SCHEDULE)


# -- a loss that is no number --------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_the_first_bad_loss(value, make, features, bank_of):
    "Named: epoch, step and what to try; the weights are those of the last good step."
    levels = [x.clone() for x in features.bank.levels]
    levels[1][5] = value
    steps = [list(batches(14, 4, 0, e)) for e in range(4)]
    epoch, step = next((e, k) for e, s in enumerate(steps) for k, index in enumerate(s) if 5 in index.tolist())
    model = make()
    with pytest.raises(TrainingError) as error:
        fit(model, bank_of(*levels), SCHEDULE, progress=False)
    for words in (f"epoch {epoch + 1}, step {step + 1} of 3", "lower lr", "clip", "nan" if math.isnan(value) else "loss is"):
        assert words in str(error.value)
    assert all(v.isfinite().all() for k, v in model.state_dict().items() if k != "calibration")


def test_bad_loss_in_a_later_epoch(make, features, tmp_path):
    "The epochs count from 1, and the checkpoint of the last good epoch stays."
    model, path = make(), tmp_path / "c.pt"
    own, calls = model.loss, []

    def loss(x, labels=None):
        calls.append(1)
        return own(x) * (float("nan") if len(calls) == 8 else 1.0)

    model.loss = loss
    with pytest.raises(TrainingError, match="loss is nan in epoch 3, step 2 of 3"):
        fit(model, features.bank, SCHEDULE, checkpoint=path, progress=False)
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_bad_step_changes_nothing(make, features):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    train_step(model, optimizer, features.bank[slice(0, 4)], None, SCHEDULE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    value = train_step(model, optimizer, [x * float("nan") for x in features.bank[slice(0, 4)]], None, SCHEDULE)
    assert math.isnan(value) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "calibration")


# -- the schedule --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch, steps", [(10, 4, 2), (8, 4, 2), (3, 4, 1), (1, 1, 1), (7, 7, 1), (9, 2, 4)])
def test_batches(n, batch, steps):
    "Full batches of different images; the rest is dropped, unless there is nothing else."
    got = list(batches(n, batch, seed=0, epoch=0))
    flat = torch.cat(got)
    assert len(got) == steps and {len(b) for b in got} == {min(n, batch)} and len(flat.unique()) == len(flat) and 0 <= flat.min() <= flat.max() < n


def test_batches_are_shuffled_anew():
    "In every epoch and for every seed; over the epochs no image is left out."
    order = lambda s, e: torch.cat(list(batches(10, 4, s, e))).tolist()
    assert order(0, 0) == order(0, 0) and len({tuple(order(s, e)) for s in range(5) for e in range(5)}) == 25
    assert {i for e in range(20) for i in order(0, e)} == set(range(10))


def test_rates():
    "Cosine from lr to zero, or constant; per step of the whole training."
    s = Schedule(lr=2e-3)
    assert s.rate(0.0) == 2e-3 and s.rate(0.5) == pytest.approx(1e-3) and s.rate(1 - 1e-9) < 1e-10
    assert s.rate(1 / 3) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 3)))
    assert all(replace(s, decay="constant").rate(p) == 2e-3 for p in (0.0, 0.3, 0.99))


def test_the_rate_is_used(make, features, monkeypatch):
    "Step by step in the optimizer, and the last of each epoch in the history."
    seen, own = [], training.train_step
    monkeypatch.setattr(training, "train_step", lambda m, o, *rest: seen.append({g["lr"] for g in o.param_groups}) or own(m, o, *rest))
    history = fit(make(), features.bank, SCHEDULE, progress=False)
    expected = [SCHEDULE.rate(i / 12) for i in range(12)]  # 4 epochs of 3 steps
    assert [r for (r,) in seen] == pytest.approx(expected)
    assert [r["lr"] for r in history] == pytest.approx(expected[2::3])


def test_clip(make, features):
    "A step of plain gradient descent is as long as the gradient, or as `clip`."
    lengths = {}
    for clip in (None, 0.5, 1e9):
        model = make()
        before = [p.detach().clone() for p in model.parameters()]
        train_step(model, torch.optim.SGD(model.parameters(), 1.0), features.bank[slice(0, 4)], None, replace(SCHEDULE, clip=clip))
        lengths[clip] = sum((p - q).square().sum() for p, q in zip(model.parameters(), before)).sqrt().item()
    assert lengths[None] > 1 and lengths[0.5] == pytest.approx(0.5, rel=1e-3) and lengths[1e9] == pytest.approx(lengths[None], rel=1e-4)


def test_bfloat16_is_close(make, features):
    "The networks run in bfloat16, weights stay float32, and training goes the same way."
    a, b = make(), make()
    full = fit(a, features.bank, replace(SCHEDULE, epochs=10), progress=False)
    half = fit(b, features.bank, replace(SCHEDULE, epochs=10, precision="bfloat16"), progress=False)
    assert {p.dtype for p in b.parameters()} == {torch.float32} and not same(a, b), "bfloat16 was not used"
    drop = full[0]["loss"] - full[-1]["loss"]
    assert drop > 1 and all(abs(x - y) < 0.03 * drop for x, y in zip(losses(full), losses(half)))


@pytest.mark.parametrize("change, words", [
    (dict(decay="linear"), "decay 'linear': one of cosine, constant"), (dict(precision="float16"), "precision 'float16': one of float32, bfloat16"),
    (dict(epochs=0), "epochs 0"), (dict(batch=-1), "batch -1"), (dict(lr=0.0), "lr 0.0"), (dict(lr=float("nan")), "lr nan")])
def test_impossible_schedules(change, words):
    with pytest.raises(ValueError) as error:
        Schedule(**change)
    assert words in str(error.value)


@pytest.mark.parametrize("change", [dict(epochs=2.5), dict(batch=1.5), dict(clip=-1.0), dict(clip=0.0), dict(weight_decay=-1e-5), dict(betas=(1.5, 0.9))], ids=str)
def test_more_impossible_schedules(change):
    "Found before any work, too."
    with pytest.raises(ValueError, match=next(iter(change))):
        Schedule(**change)


# -- what else the loop does ---------------------------------------------------------------------------------------

def test_history_and_evaluation(make, features):
    "One row an epoch; `evaluate` is called after the epochs asked for, and what it returns joins the row."
    called, model = [], make()

    def evaluate(epoch):
        called.append((epoch, model.flows[0].steps[0].mixing.offset.detach().clone()))
        model.eval()
        return {"score": epoch / 10}

    history = fit(model, features.bank, SCHEDULE, evaluate=evaluate, when=(2, 4), progress=False)
    assert [r["epoch"] for r in history] == [1, 2, 3, 4] and [r.get("score") for r in history] == [None, 0.2, None, 0.4]
    assert [e for e, _ in called] == [2, 4] and torch.equal(called[1][1], model.flows[0].steps[0].mixing.offset)
    assert all(r["seconds"] > 0 and math.isfinite(r["loss"]) for r in history)


def test_loss_is_the_mean_of_the_steps(make, features, monkeypatch):
    values = iter([3.0, 5.0, 10.0])
    monkeypatch.setattr(training, "train_step", lambda *a: next(values))
    assert fit(make(), features.bank, replace(SCHEDULE, epochs=1), progress=False)[0]["loss"] == pytest.approx(6.0)


def test_labels_go_with_their_images(make, features):
    "Each batch carries the category numbers of its own images."
    model, seen = make(), []
    own, first = model.loss, features.bank.levels[0]
    number = lambda x: next(i for i in range(14) if torch.equal(first[i], x))
    model.loss = lambda x, labels: seen.append([(number(v), int(l)) for v, l in zip(x[0], labels)]) or own(x)
    fit(model, features.bank, replace(SCHEDULE, epochs=1), labels=torch.arange(14) * 10, progress=False)
    assert len(seen) == 3 and all(label == 10 * image for pairs in seen for image, label in pairs)


def test_backbone_stays_as_it_is(tiny_backbone, toy):
    "No weight, statistic or gradient of it changes; every weight of the flows does."
    backbone = tiny_backbone()
    before, model = state_hash(backbone.net), FastFlow(backbone, steps=2, norm="layer")
    start = {k: v.clone() for k, v in model.named_parameters()}
    model.fit(load("toy", toy, "bolt", Transform(32))[0], epochs=2, batch=4, progress=False)
    assert state_hash(backbone.net) == before and not backbone.training
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert all(not torch.equal(p, start[k]) for k, p in model.named_parameters() if not k.startswith("backbone"))


def test_only_normal_images_are_trained_on(tiny_backbone, toy):
    "Anomalous ones in the data set change nothing; without normal ones there is nothing to train on."
    records = read("toy", toy, "weave")
    clean, dirty = (Dataset([r for r in records if r.split == "train" or any_ and r.label], Transform(32)) for any_ in (False, True))
    assert len(dirty) == len(clean) + 6
    models = []
    for data in (clean, dirty):
        torch.manual_seed(0)
        models.append(FastFlow(tiny_backbone(), steps=1).fit(data, epochs=1, batch=4, progress=False))
    assert same(*models) and models[0].calibration.isfinite().all()
    with pytest.raises(ValueError, match="no normal image"):
        fit_dataset(models[0], dirty.filter(label=1), epochs=1)


def test_fit_dataset_prepares_and_calibrates(tiny_backbone, toy):
    "The features of the training images are standardised before training and the levels put on one scale after it."
    train, _ = load("toy", toy, "weave", Transform(32))
    model = FastFlow(tiny_backbone(), steps=1).fit(train, epochs=2, batch=4, progress=False)
    x = model.backbone(torch.stack([train[i].image for i in range(len(train))]))
    for v, norm in zip(x, model.norms):
        torch.testing.assert_close(norm(v).mean((0, 2, 3)), torch.zeros(v.shape[1]), atol=1e-4, rtol=0)
        alive = v.std((0, 2, 3)) > 1e-6
        torch.testing.assert_close(norm(v).std((0, 2, 3))[alive], torch.ones(int(alive.sum())), atol=0.02, rtol=0)
        assert alive.sum() > 20
    with torch.no_grad():
        expected = torch.tensor([[p.base.mean(), p.logdet.mean()] for p in model.parts(x)])
    torch.testing.assert_close(model.calibration, expected, rtol=1e-4, atol=1e-4)


def test_fit_dataset_refuses_unknown_settings(tiny_backbone, toy):
    train, _ = load("toy", toy, "weave", Transform(32))
    with pytest.raises(TypeError, match="epoch"):
        FastFlow(tiny_backbone(), steps=1).fit(train, epoch=3)


def test_layers_in_training(features, stand_in):
    "The model is in training mode while it trains, even after an evaluation put it in eval mode."
    model, modes = FastFlow(stand_in(features.shapes), steps=1, norm="none"), []
    own = model.loss
    model.loss = lambda x, labels=None: modes.append(model.training) or own(x)
    fit(model, features.bank, replace(SCHEDULE, epochs=2), evaluate=lambda e: model.eval() and {}, when=(1,), progress=False)
    assert modes == [True] * 6
