"""The loop: seeded, resumable to the bit, stopped by a loss that is no number; its schedule;
turns of the base; what it leaves alone."""
import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Bank
from flowrepro import training
from flowrepro.altub import AltUB, BaseTurn
from flowrepro.backbones import state_hash
from flowrepro.data import Dataset, Transform, load, read
from flowrepro.detectors import HGAD, CFlow, FastFlow, fiber_batches
from flowrepro.scores import Score
from flowrepro.training import (
    Schedule, TrainingError, adam_step, batches, fit, fit_dataset, optimizers_of, read_checkpoint, train_batch,
    write_checkpoint
)

SCHEDULE = Schedule(epochs=4, batch=4, lr=1e-2)


@pytest.fixture
def make(features, stand_in):
    "`make(seed)`: an untrained detector for the random features."
    def build(seed=0, method=FastFlow, **kw):
        torch.manual_seed(seed)
        model = method(stand_in(features.shapes), **{"steps": 2} | kw)
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


def test_fit_leaves_the_random_numbers_of_others(tiny_backbone, toy):
    "So that several detectors made in one loop are several, an ensemble."
    train, _ = load("toy", toy, "weave", Transform(32))
    torch.manual_seed(5)
    model = FastFlow(tiny_backbone(), steps=1)
    state = torch.get_rng_state()
    model.fit(train, epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, progress=False) for _ in range(2))
    assert not torch.equal(next(one.flows.parameters()), next(two.flows.parameters()))


def test_checkpoint_in_a_new_folder(make, features, tmp_path):
    fit(make(), features.bank, replace(SCHEDULE, epochs=1), checkpoint=tmp_path / "new/c.pt", progress=False)
    assert (tmp_path / "new/c.pt").exists()


@pytest.mark.parametrize("wrong", [dict(epochs=1.5), dict(batch="8"), dict(seed=0.5), dict(seed="a")])
def test_whole_numbers(wrong):
    "NumPy's are some, too."
    assert Schedule(epochs=np.int64(3), seed=np.int64(1)).epochs == 3
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*whole number"):
        Schedule(**wrong)


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
    assert history[0]["loss"] > history[-1]["loss"]
    assert before > after + 5
    assert abs(history[-1]["loss"] - after) < 0.2 * abs(before - after)


# -- resume --------------------------------------------------------------------------------------------------------

class Killed(Exception):
    pass


def kill_in(model, step):
    "From now on, training ends in this step (from 0) of the model's life."
    own, calls = model.losses, iter(range(10**6))

    def losses(*given):
        if next(calls) == step:
            raise Killed
        return own(*given)

    model.losses = losses


def without_time(history) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in history]


@pytest.mark.parametrize("when", [(), (1, 3)], ids=["each epoch", "evaluations"])
@pytest.mark.parametrize("step", [0, 2, 3, 7, 11])
def test_resume_is_exact(step, when, make, features, tmp_path):
    """Killed in any step and started again with another model: every weight, loss and
    evaluation as if nothing had happened."""
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


SMALL = {FastFlow: {}, CFlow: dict(code=4, fibers=36),
         HGAD: dict(code=4, centres=2, stage_one=0.5, categories=["a", "b"])}
LABELS = torch.arange(14) % 2


@pytest.mark.parametrize("step", [4, 9])
@pytest.mark.parametrize("method, settings, altub", [
    (FastFlow, {}, dict(every=2)), (FastFlow, {}, dict(every=3, optimizer="sgd", factor=None, lr=1e-4, clip_by="norm")),
    (FastFlow, dict(per="position"), dict(unit="epoch", every=2)),
    (FastFlow, {}, dict(every=2, joint=False)), (CFlow, {}, dict(every=2)), (CFlow, dict(base="standard"), None),
    (HGAD, dict(base="hierarchical"), None),
    (HGAD, dict(base="hierarchical"), dict(every=2, joint=False)),
    (HGAD, dict(base="classes", joint=True), dict(every=2))], ids=str)
def test_resume_is_exact_with_every_method(method, settings, altub, step, make, features, tmp_path):
    """Killed in a step and started again: as if nothing had happened, for the base, its
    optimizer and shuffled fibers, too."""
    path, kw = tmp_path / "checkpoint.pt", dict(method=method, **SMALL[method] | {"base": "diagonal"} | settings)
    whole, part, resumed = make(**kw), make(**kw), make(**kw, seed=77)
    train = lambda model, **more: fit(model, features.bank, SCHEDULE, LABELS, altub and AltUB(**altub), progress=False,
                                      **more)
    history = train(whole)
    kill_in(part, step)
    with pytest.raises(Killed):
        train(part, checkpoint=path)
    assert path.exists() and not same(part, resumed)
    assert without_time(train(resumed, checkpoint=path)) == without_time(history) and same(whole, resumed)


@pytest.mark.parametrize("altub", [None, AltUB(every=2, warmup=0.0)], ids=["plain", "altub"])
@pytest.mark.parametrize("method", [CFlow, HGAD])
def test_resume_is_exact_with_idle(method, altub, make, features, tmp_path):
    "What Adam's memory moves goes on to move, before a first gradient reaches it."
    path, kw = tmp_path / "checkpoint.pt", dict(method=method, **dict(base="diagonal") | SMALL[method])
    whole, part, resumed = make(**kw), make(**kw), make(**kw, seed=77)
    train = lambda model, **more: fit(model, features.bank, replace(SCHEDULE, idle=True), LABELS, altub, progress=False,
                                      **more)
    history = train(whole)
    kill_in(part, 7)
    with pytest.raises(Killed):
        train(part, checkpoint=path)
    assert without_time(train(resumed, checkpoint=path)) == without_time(history) and same(whole, resumed)


@pytest.mark.parametrize("written, wanted",
                         [(None, AltUB()), (AltUB(), None), (AltUB(), AltUB(every=3)), (AltUB(), AltUB(joint=False))],
                         ids=str)
def test_checkpoint_of_another_altub(written, wanted, make, features, tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(make(base="diagonal"), features.bank, SCHEDULE, altub=written, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="checkpoint.pt is of another training.*remove it"):
        fit(make(base="diagonal"), features.bank, SCHEDULE, altub=wanted, checkpoint=path, progress=False)


@pytest.mark.parametrize("change",
                         [dict(epochs=5), dict(lr=1e-3), dict(seed=3), dict(batch=5), dict(decay="constant"),
                          dict(floor=0.1), dict(warmup=1), dict(hold=2),
                                    dict(clip=1.0), dict(precision="bfloat16"), dict(betas=(0.8, 0.9))], ids=str)
def test_checkpoint_of_another_schedule(change, make, features, tmp_path):
    "Refused, with the file and the remedy; nothing is overwritten."
    path = tmp_path / "checkpoint.pt"
    fit(make(), features.bank, SCHEDULE, checkpoint=path, progress=False)
    before, model = path.read_bytes(), make(seed=2)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint.pt is of another training.*remove it"):
        fit(model, features.bank, replace(SCHEDULE, **change), checkpoint=path, progress=False)
    assert path.read_bytes() == before
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items() if k != "calibration")


@pytest.mark.parametrize("method, settings, words", [
    (CFlow, {}, "method 'hgad' there, 'cflow' here"), (HGAD, dict(steps=3), "detector.steps 1 there, 3 here"),
    (HGAD, dict(lambda2=7.0), "detector.lambda2 1.0 there, 7.0 here"),
    (HGAD, dict(categories=["b", "a"]), "detector.categories ['a', 'b'] there, ['b', 'a'] here"),
    (HGAD, dict(clamp=1.0), "detector.clamp"), (HGAD, dict(base="standard"), "detector.base")], ids=str)
def test_checkpoint_of_another_model(method, settings, words, make, features, tmp_path):
    "What differs is named, and the model keeps its weights."
    path, small = tmp_path / "checkpoint.pt", SMALL[HGAD] | dict(categories=["a", "b"], steps=1)
    fit(make(method=HGAD, **small), features.bank, SCHEDULE, LABELS % 2, checkpoint=path, progress=False)
    model = make(method=method, **(small if method is HGAD else SMALL[method]) | settings)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        fit(model, features.bank, SCHEDULE, LABELS % 2, checkpoint=path, progress=False)
    assert words in str(error.value) and "remove it" in str(error.value)
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items() if k != "calibration")


def test_checkpoint_of_another_width(make, features, tmp_path, bank_of, stand_in):
    "Both sizes are named, and nothing is loaded."
    path = tmp_path / "checkpoint.pt"
    fit(make(), features.bank, SCHEDULE, checkpoint=path, progress=False)
    wide = [torch.cat([x, x], dim=1) for x in features.bank.levels]
    model = FastFlow(stand_in([tuple(x.shape[1:]) for x in wide]), steps=2)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit.* is \(.*\) in the file, \(.*\) in the detector"):
        fit(model, bank_of(*wide), SCHEDULE, checkpoint=path, progress=False)
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items() if k != "calibration")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 half of a zip"])
def test_file_that_is_no_checkpoint(content, make, features, tmp_path):
    (path := tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt is no checkpoint.*remove it"):
        fit(make(), features.bank, SCHEDULE, checkpoint=path, progress=False)


def test_an_epoch_takes_one_copy():
    "Of three copies of ten images in turn, in an order of its own."
    epochs = [torch.cat(list(batches(10, 5, 0, e, copies=3))) for e in range(6)]
    assert [sorted(e.tolist()) for e in epochs] == [list(range(10 * (e % 3), 10 * (e % 3) + 10)) for e in range(6)]
    assert torch.equal(epochs[1] - 10, torch.cat(list(batches(10, 5, 0, 1)))) and not torch.equal(epochs[0], epochs[3])


def test_checkpoint_is_replaced_atomically(make, features, tmp_path, monkeypatch):
    "A crash while writing leaves the last whole checkpoint."
    path, model = tmp_path / "checkpoint.pt", make()
    optimizer = torch.optim.Adam(model.parameters())
    write_checkpoint(path, model, [optimizer], 0, [{"epoch": 1}], asdict(SCHEDULE))
    before = path.read_bytes()

    def crash(saved, target):
        open(target, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, model, [optimizer], 1, [], asdict(SCHEDULE))
    assert path.read_bytes() == before
    assert (read_checkpoint(path, make(), [torch.optim.Adam(model.parameters())], asdict(SCHEDULE))
            == (1, [{"epoch": 1}]))


def test_checkpoint_is_replaced_whole(make, tmp_path):
    "Who has the old one open reads the old one to its end."
    path, model = tmp_path / "checkpoint.pt", make()
    optimizer = torch.optim.Adam(model.parameters())
    write_checkpoint(path, model, [optimizer], 0, [], asdict(SCHEDULE))
    before = path.read_bytes()
    with open(path, "rb") as old:
        write_checkpoint(path, model, [optimizer], 1, [{"epoch": 1}], asdict(SCHEDULE))
        assert old.read() == before != path.read_bytes()


@pytest.mark.filterwarnings("ignore:for .*no-op")  # a model without values takes none
def test_history_stays_on_the_cpu(make, tmp_path):
    "Whatever device the model is on: what an evaluation returned before is put together with what it returns after."
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, make(), [], 0, [{"epoch": 1, "base": {"0.mean": torch.ones(2)}}], {})
    epoch, history = read_checkpoint(path, make().to("meta"), [], {})
    assert epoch == 1 and history[0]["base"]["0.mean"].device.type == "cpu"


def test_checkpoint_with_numbers_of_numpy(make, tmp_path):
    "They become Python's, and resume; a checkpoint is read without running code."
    path, model = tmp_path / "checkpoint.pt", make()
    adam = torch.optim.Adam(model.parameters(), lr=np.float64(1e-3))
    history = [{"epoch": 1, "results": {"bolt": {"auroc": np.float64(0.5), "ap": [np.float32(0.25)]}}}]
    training = {"schedule": asdict(replace(SCHEDULE, lr=np.float64(1e-3)))}
    write_checkpoint(path, model, [adam], 0, history, training)
    assert read_checkpoint(path, model, [adam], training) == (1, history)


def test_labels_of_every_copy(make, bank_of, features):
    "Labels of the images alone stand for each of their copies."
    bank, model = bank_of(*(torch.cat([x, x]) for x in features.bank[slice(None)])), make(method=HGAD, code=4)
    bank.copies, n = 2, len(features.bank)
    model.adopt(["a", "b"])
    labels = torch.arange(n) % 2
    one, two = (fit(copy.deepcopy(model), bank, SCHEDULE, own, progress=False) for own in (labels, labels.repeat(2)))
    assert losses(one) == losses(two)


def test_no_score_from_an_interrupted_training(tiny_backbone, toy, monkeypatch):
    "Weights that moved on have no calibration; those of before would be another model's."
    train, test = load("toy", toy, "bolt", Transform(32))
    model = FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, progress=False)
    monkeypatch.setattr(training, "train_batch", lambda *_: [math.nan])
    with pytest.raises(TrainingError):
        model.fit(train, epochs=1, progress=False)
    with pytest.raises(ValueError, match="needs the calibration"):
        model.predict(test)


def test_no_calibration_of_other_weights(make, features):
    "Trained on by the loop alone, without `Detector.fit`: it must be calibrated anew."
    model = make()
    model.calibrate(features.bank)
    calibrated = lambda epoch: model.calibrate(features.bank) or {}
    fit(model, features.bank, SCHEDULE, evaluate=calibrated, when=(1,), progress=False)  # and trains on
    assert model.calibration.isnan().all()


@pytest.mark.parametrize("size", [31, 33])
def test_images_of_another_size_than_the_backbone(size, tiny_backbone, toy):
    "Refused even where the features come out as large; `predict` would take no image afterwards."
    train, _ = load("toy", toy, "bolt", Transform(size))
    with pytest.raises(ValueError, match=rf"images of side {size}, a backbone for 32: load them with Transform\(32\)"):
        FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, progress=False)


def test_checkpoint_holds_no_backbone(tiny_backbone, tmp_path):
    model = FastFlow(tiny_backbone(), steps=1)
    write_checkpoint(tmp_path / "c.pt", model, [torch.optim.Adam(model.flows.parameters())], 0, [], asdict(SCHEDULE))
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert not any(k.startswith("backbone") for k in saved["model"]) and saved["training"] == asdict(SCHEDULE)


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
    for words in (f"epoch {epoch + 1}, step {step + 1} of 3", "lower lr", "clip",
                  "nan" if math.isnan(value) else "loss is"):
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
    train_batch(model, optimizer, model.losses(features.bank[slice(0, 4)]), 0.1, SCHEDULE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (value,) = train_batch(model, optimizer, model.losses([x * float("nan") for x in features.bank[slice(0, 4)]]), 0.1,
                           SCHEDULE)
    assert math.isnan(value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "calibration")


def test_bad_loss_among_several(make):
    "The losses before it have had their steps; those after it are not computed."
    model, asked = make(), []
    p = model.flows[0].steps[0].mixing.offset

    def losses():
        for factor in (1.0, 1.0, float("inf"), 1.0):
            asked.append(factor)
            yield p[0] * factor

    start = p[0].item() + 1.0
    p.data[0] = start
    values = train_batch(model, torch.optim.SGD(model.parameters()), losses(), 0.25, SCHEDULE)
    assert values == pytest.approx([start, start - 0.25, math.inf])
    assert len(asked) == 3
    assert p[0].item() == pytest.approx(start - 0.5)


def test_bad_fiber_batch(make, features, bank_of):
    "Of several losses in a batch the bad one stops the training, in its own step."
    levels = [x.clone() for x in features.bank.levels]
    levels[1][5] = float("nan")
    step = next(k for k, index in enumerate(batches(14, 4, 0, 0)) if 5 in index.tolist())
    model = make(method=CFlow, code=4, fibers=16)
    with pytest.raises(TrainingError, match=f"loss is nan in epoch 1, step {step + 1} of 3"):
        fit(model, bank_of(*levels), SCHEDULE, progress=False)
    assert all(v.isfinite().all() for k, v in model.state_dict().items() if k != "calibration")


# -- the schedule --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch, steps", [(10, 4, 2), (8, 4, 2), (3, 4, 1), (1, 1, 1), (7, 7, 1), (9, 2, 4)])
def test_batches(n, batch, steps):
    "Full batches of different images; the rest is dropped, unless there is nothing else."
    got = list(batches(n, batch, seed=0, epoch=0))
    flat = torch.cat(got)
    assert len(got) == steps
    assert {len(b) for b in got} == {min(n, batch)}
    assert len(flat.unique()) == len(flat)
    assert 0 <= flat.min() <= flat.max() < n


def test_another_default_device():
    "The order of images and fibers is drawn where its generator is, as torch asks for."
    with torch.device("meta"):
        drawn = [*batches(6, 2, 0, 0), fiber_batches(6, 2, torch.Generator())]
    assert {i.device.type for i in drawn} == {"cpu"}


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


@pytest.mark.parametrize("passes, hold", [(8, 8), (1, 1)], ids=["8 passes a meta-epoch", "one"])
def test_published_rates(passes, hold):
    """CFLOW-AD's and HGAD's 25 meta-epochs of 8 passes, as their utils.py sets the rate in
    each step, in formulas of its own."""
    lr, meta_epochs, warm, steps, own = 2e-4, 25, 2, 8 * 7, 8 * 7 // passes  # of a meta-epoch, of an epoch
    eta = lr * 0.1**3
    cosine = lambda meta: eta + (lr - eta) * (1 + math.cos(math.pi * meta / meta_epochs)) / 2
    schedule = Schedule(epochs=25 * passes, lr=lr, floor=1e-3, warmup=2 * passes, hold=hold)
    for meta in range(meta_epochs):
        for i in range(steps):
            expected = (lr / 10 + (i + meta * steps) / (warm * steps) * (cosine(warm) - lr / 10) if meta < warm
                        else cosine(meta))
            epoch, step = divmod(meta * steps + i, own)
            assert schedule.rate((epoch + step / own) / schedule.epochs) == pytest.approx(expected, rel=1e-9), (meta, i)


def test_hold_changes_with_the_epoch():
    "Not a step late, however long the training."
    for n in range(1, 60):
        s = Schedule(epochs=n, lr=1.0, hold=1)
        rates = [[s.rate((e + k / 3) / n) for k in range(3)] for e in range(n)]
        assert rates == [3 * [pytest.approx(0.5 * (1 + math.cos(math.pi * e / n)))] for e in range(n)]


def test_warm_up_and_floor():
    "A rise from a tenth to where the decay stands; the cosine ends at the floor; without decay the rate stays."
    s = Schedule(epochs=10, lr=1.0, warmup=5)
    assert [s.rate(p) for p in (0.0, 0.25, 0.5)] == pytest.approx([0.1, 0.3, 0.5])
    assert replace(s, warmup=0, floor=0.2).rate(0.5) == pytest.approx(0.6)
    assert replace(s, floor=0.2).rate(1 - 1e-9) == pytest.approx(0.2)
    assert [replace(s, decay="constant").rate(p) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert len({round(replace(s, warmup=0, hold=4).rate(i / 100), 9) for i in range(100)}) == 3


def test_the_rate_is_used(make, features, monkeypatch):
    "Step by step in the optimizer, and the last of each epoch in the history."
    seen, own = [], training.adam_step
    monkeypatch.setattr(training, "adam_step",
                        lambda o, *rest: own(o, *rest) or seen.append({g["lr"] for g in o.param_groups}))
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
        adam_step(torch.optim.SGD(model.parameters(), 7.0), model.loss(features.bank[slice(0, 4)]), 1.0, clip)
        lengths[clip] = sum((p - q).square().sum() for p, q in zip(model.parameters(), before)).sqrt().item()
    assert lengths[None] > 1
    assert lengths[0.5] == pytest.approx(0.5, rel=1e-3)
    assert lengths[1e9] == pytest.approx(lengths[None], rel=1e-4)


def test_idle():
    "Adam's memory moves what a loss does not reach as PyTorch 1.x did, or not at all."
    def moved(idle: bool) -> bool:
        net, x = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)]), torch.ones(1, 1)
        adam = torch.optim.Adam(net.parameters(), 0.1)
        for level in net:
            adam_step(adam, level(x).sum(), 0.1, None, idle)
        before = net[0].weight.item()
        adam_step(adam, net[1](x).sum(), 0.1, None, idle)
        return net[0].weight.item() != before
    assert moved(True) and not moved(False)


def test_idle_after_a_turn_of_the_base():
    "Which leaves no gradient: memory moves the base of a level that the next loss does not reach all the same."
    net, x = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)]), torch.ones(1, 1)
    adam, turn = torch.optim.Adam(net.parameters(), 0.1), BaseTurn(AltUB(), net.parameters())
    for level in net:
        adam_step(adam, level(x).sum(), 0.1, None, idle=True)
    turn.step(net[1](x).sum(), 0.1)
    before = net[0].weight.item()
    adam_step(adam, net[1](x).sum(), 0.1, None, idle=True)
    assert net[0].weight.item() != before


@pytest.mark.parametrize("idle", [True, False])
def test_idle_is_used(make, features, monkeypatch, idle):
    seen, own = [], training.adam_step
    monkeypatch.setattr(training, "adam_step", lambda *given: seen.append(given[4]) or own(*given))
    fit(make(), features.bank, replace(SCHEDULE, epochs=1, idle=idle), progress=False)
    assert set(seen) == {idle}


def test_bfloat16_is_close(make, features):
    "The networks run in bfloat16, weights stay float32, and training goes the same way."
    a, b = make(), make()
    full = fit(a, features.bank, replace(SCHEDULE, epochs=10), progress=False)
    half = fit(b, features.bank, replace(SCHEDULE, epochs=10, precision="bfloat16"), progress=False)
    assert {p.dtype for p in b.parameters()} == {torch.float32} and not same(a, b), "bfloat16 was not used"
    drop = full[0]["loss"] - full[-1]["loss"]
    assert drop > 1 and all(abs(x - y) < 0.03 * drop for x, y in zip(losses(full), losses(half)))


@pytest.mark.parametrize("change, words", [
    (dict(decay="linear"), "decay 'linear': one of cosine, constant"),
    (dict(precision="float16"), "precision 'float16': one of float32, bfloat16"),
    (dict(epochs=0), "epochs 0"), (dict(batch=-1), "batch -1"), (dict(lr=0.0), "lr 0.0"),
    (dict(lr=float("nan")), "lr nan")])
def test_impossible_schedules(change, words):
    with pytest.raises(ValueError) as error:
        Schedule(**change)
    assert words in str(error.value)


@pytest.mark.parametrize("change",
                         [dict(epochs=2.5), dict(batch=1.5), dict(clip=-1.0), dict(clip=0.0), dict(weight_decay=-1e-5),
                          dict(betas=(1.5, 0.9)), dict(betas=(0.9,)),
                                    dict(floor=-0.1), dict(floor=1.5), dict(floor=float("nan")), dict(warmup=-1),
                                    dict(warmup=1.5), dict(warmup=31), dict(hold=-1), dict(hold=0.5)], ids=str)
def test_more_impossible_schedules(change):
    "Found before any work, too."
    with pytest.raises(ValueError, match=next(iter(change))):
        Schedule(**change)


# -- several losses a batch, several groups ------------------------------------------------------------------------

def test_each_loss_has_its_step(make):
    "And the next loss is computed after it."
    model = make()
    p, seen = model.flows[0].steps[0].mixing.offset, []

    def losses():
        for _ in range(3):
            seen.append(p[0].item())
            yield p[0]

    values = train_batch(model, torch.optim.SGD(model.parameters()), losses(), 0.1, SCHEDULE)
    assert values == seen == pytest.approx([0.0, -0.1, -0.2]) and p[0].item() == pytest.approx(-0.3)


def moved(model, before) -> set[str]:
    return {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}


@pytest.mark.parametrize("fibers, steps", [(16, (9, 2)), (36, (4, 1)), (None, (1, 1))])
def test_each_fiber_batch_has_its_step(fibers, steps, make, features, monkeypatch):
    "Level after level; a step moves the flow of its own level alone, and the history has the mean over all."
    model, own, seen = make(method=CFlow, code=4, fibers=fibers), training.adam_step, []

    def step(optimizer, loss, *rest):
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        own(optimizer, loss, *rest)
        seen.append((loss.item(), moved(model, before)))

    monkeypatch.setattr(training, "adam_step", step)
    history = fit(model, features.bank, replace(SCHEDULE, epochs=1), progress=False)
    flow = lambda l: {k for k, _ in model.named_parameters() if k.startswith(f"flows.{l}.")}
    assert [names for _, names in seen] == 3 * (steps[0] * [flow(0)] + steps[1] * [flow(1)])
    assert history[0]["loss"] == pytest.approx(sum(v for v, _ in seen) / len(seen))


@pytest.mark.parametrize("altub", [None, AltUB(every=2, warmup=0.0)], ids=["plain", "altub"])
def test_a_trainable_norm_learns_from_every_fiber_batch(altub, make, features, monkeypatch):
    "Each batch is of rows as the norm makes them after the step before it; in the base's turns it stays."
    base = {} if altub is None else dict(base="diagonal", per="scalar")
    model, own, learned = make(method=CFlow, code=4, fibers=16, norm="layer", **base), training.adam_step, []
    loss, drawn, every = model.loss, [], []

    def step(*given):
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        own(*given)
        learned.append({k for k in moved(model, before) if k.startswith("norms.")})

    def listen(level, rows, *rest):
        if level == 0:
            drawn.append(rows.detach())
            every.append(model.rows(0, images).detach().flatten(0, 1))
        return loss(level, rows, *rest)

    model.loss, images = listen, features.bank.levels[0]
    monkeypatch.setattr(training, "adam_step", step)
    fit(model, features.bank, replace(SCHEDULE, epochs=1), altub=altub, progress=False)
    names = [{f"norms.{l}.weight", f"norms.{l}.bias"} for l in (0, 1)]
    assert learned == (3 if altub is None else 2) * (9 * [names[0]] + 2 * [names[1]])
    assert len(drawn) == 27
    for rows, now in zip(drawn, every):  # those of the norm as it is now, to the bit
        assert all((now == row).all(-1).any() for row in rows)


def test_fibers_are_shuffled_anew(make, features, bank_of):
    """Every row once a batch, in every batch in another order (the images are all the same), by the seed of
    the schedule and nothing else."""
    drawn, bank = {}, bank_of(*(x[:1].expand_as(x) for x in features.bank.levels))
    for key, seed in (("a", 0), ("again", 0), ("other", 1)):
        model, drawn[key] = make(method=CFlow, code=4, fibers=16), []
        own = model.loss
        model.loss = lambda level, rows, *rest: drawn[key].append((level, rows.detach())) or own(level, rows, *rest)
        torch.manual_seed(len(drawn))
        fit(model, bank, replace(SCHEDULE, epochs=2, seed=seed), progress=False)
    flat = {k: [rows for level, rows in v if level == 0] for k, v in drawn.items()}
    assert all(torch.equal(x, y) for x, y in zip(flat["a"], flat["again"]))
    assert not torch.equal(flat["a"][0], flat["other"][0])
    assert not any(torch.equal(x, y) for i, x in enumerate(flat["a"]) for y in flat["a"][:i])
    _, counts = torch.cat(flat["a"][:9]).unique(dim=0, return_counts=True)
    assert counts.tolist() == [4] * 36  # 4 images of 36 positions


def test_groups_have_their_own_rates(make, features):
    "HGAD's centres learn at a multiple of the rate, and nothing but the flows decays."
    model, schedule = (make(method=HGAD, joint=True, centre_rate=3.0, **SMALL[HGAD] | {"stage_one": 0.0}),
                       replace(SCHEDULE, weight_decay=0.1))
    adam, turn = optimizers_of(model, schedule, None)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    train_batch(model, adam, model.losses(features.bank[slice(0, 8)], LABELS[:8]), 1e-3, schedule)
    assert turn is None
    assert [g["lr"] for g in adam.param_groups] == pytest.approx([1e-3, 3e-3, 1e-3])
    assert [g["weight_decay"] for g in adam.param_groups] == [0.1, 0.0, 0.0]
    # of Adam's first step: the rate
    largest = {k: (p - before[k]).abs().max().item() for k, p in model.named_parameters()}
    assert {k.split(".")[-1] for k in largest} >= {"mu", "delta", "phi", "psi", "gamma"}
    assert all(v == pytest.approx(3e-3 if k.endswith(("mu", "delta")) else 1e-3, rel=0.02)
               for k, v in largest.items()), largest


# -- turns of the base ---------------------------------------------------------------------------------------------

def watch(monkeypatch) -> list[tuple[bool, set, bool]]:
    """Of each batch from now on: is it a turn of the base, which parameters moved, and did Adam's
    state of the ordinary steps stay."""
    seen, own, adam = [], training.train_batch, []
    make_own = training.optimizers_of
    monkeypatch.setattr(training, "optimizers_of", lambda *a: (out := make_own(*a), adam.append(out[0]))[0])

    def batch(model, optimizer, losses, rate, schedule):
        before, state = ({k: p.detach().clone() for k, p in model.named_parameters()},
                         copy.deepcopy(adam[-1].state_dict()["state"]))
        values = own(model, optimizer, losses, rate, schedule)
        after = adam[-1].state_dict()["state"]
        still = (state.keys() == after.keys()
                 and all(torch.equal(v, after[i][k]) for i, s in state.items() for k, v in s.items()))
        seen.append((isinstance(optimizer, BaseTurn), moved(model, before), still))
        return values

    monkeypatch.setattr(training, "train_batch", batch)
    return seen


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("settings, turns",
                         [(dict(every=2, warmup=0.25), [3, 5, 7, 9, 11]),
                          (dict(every=5, warmup=0.0, optimizer="sgd", clip=1.0), [4, 9]),
                                             (dict(unit="epoch", every=2, warmup=0.0), [3, 4, 5, 9, 10, 11])], ids=str)
@pytest.mark.parametrize("method, base", [(FastFlow, "diagonal"), (CFlow, "diagonal"), (HGAD, "hierarchical")])
def test_turns_of_the_base(method, base, settings, turns, joint, make, features, monkeypatch):
    """A turn moves the base alone and leaves Adam's state of the flow; an ordinary step moves both, or
    with joint=False the flow alone."""
    model, seen = (make(method=method, base=base, **SMALL[method] | ({"stage_one": 0.0} if method is HGAD else {})),
                   watch(monkeypatch))
    fit(model, features.bank, SCHEDULE, LABELS, AltUB(joint=joint, **settings), progress=False)
    bases = {k for k, _ in model.named_parameters() if k.startswith("bases.")}
    flows = {k for k, _ in model.named_parameters() if k.startswith("flows.")}
    assert [i for i, (turn, _, _) in enumerate(seen) if turn] == turns and len(seen) == 12 and bases and flows
    for turn, names, still in seen:
        assert names == (bases if turn else flows | bases if joint else flows) and still == turn


def test_rate_of_the_turns(make, features):
    "A multiple of the current rate, or a constant."
    model, x = make(base="diagonal"), features.bank[slice(0, 8)]
    for settings, expected in ((dict(factor=4.0), 4e-3), (dict(factor=None, lr=0.02), 0.02)):
        _, turn = optimizers_of(model, SCHEDULE, AltUB(**settings))
        before = [p.detach().clone() for p in model.base_parameters()]
        train_batch(model, turn, model.losses(x), 1e-3, SCHEDULE)
        assert all((p - q).abs().max().item() == pytest.approx(expected, rel=0.02)
                   for p, q in zip(model.base_parameters(), before))


@pytest.mark.parametrize("joint", [True, False])
def test_clip_counts_what_the_step_moves(joint, make, features):
    "After turns and ordinary steps, a clipped gradient of what the step moves is as long as `clip`."
    model, altub, x = make(base="diagonal"), AltUB(joint=joint), features.bank[slice(0, 8)]
    adam, turn = optimizers_of(model, SCHEDULE, altub)
    for optimizer in (adam, turn, adam, adam):
        train_batch(model, optimizer, model.losses(x), 1e-4, replace(SCHEDULE, clip=0.5))
    assert (math.sqrt(sum(p.grad.square().sum().item() for g in adam.param_groups for p in g["params"]))
            == pytest.approx(0.5, rel=1e-3))


@pytest.mark.parametrize("method, settings, altub, words", [
    (FastFlow, dict(base="standard"), AltUB(), "altub needs a base with parameters.*base='diagonal'"),
    (CFlow, dict(base="standard"), AltUB(), "altub needs a base"),
    (HGAD, dict(base="standard"), AltUB(), "altub needs a base"),
    (FastFlow, dict(base="diagonal"), AltUB(every=50), "never comes in 4 epochs of 3 steps"),
    (FastFlow, dict(base="diagonal"), AltUB(unit="epoch", every=5), "never comes"),
    (CFlow, dict(fibers=37), None, "a fiber batch of 37 rows is larger than a batch of 4 images, which has 36 rows")])
def test_refused_before_any_work(method, settings, altub, words, make, features, tmp_path):
    model, path = make(method=method, **SMALL[method] | settings), tmp_path / "c.pt"
    model.losses = model.begin = lambda *a: pytest.fail("it began to work")
    with pytest.raises(ValueError, match=words):
        fit(model, features.bank, SCHEDULE, LABELS, altub, checkpoint=path, progress=False)
    assert not path.exists()


@pytest.mark.parametrize("method, settings, altub, words",
                         [(FastFlow, {}, AltUB(), "altub needs a base"),
                          (CFlow, dict(fibers=10**6), None, "fiber batch of 1000000 rows")])
def test_refused_before_features(method, settings, altub, words, tiny_backbone, toy, monkeypatch):
    "Found by `fit_dataset` before the backbone has seen an image."
    train, _ = load("toy", toy, "weave", Transform(32))
    model = method(tiny_backbone(), steps=1, **SMALL[method] | settings)
    monkeypatch.setattr(training, "FeatureBank", lambda *a, **k: pytest.fail("features were made"))
    with pytest.raises(ValueError, match=words):
        model.fit(train, epochs=2, altub=altub, progress=False)


def test_fit_with_altub(tiny_backbone, toy):
    "From the data set: the base moves, and the score is finite."
    train, _ = load("toy", toy, "weave", Transform(32))
    model = CFlow(tiny_backbone(), steps=1, code=4, fibers=32,
                  base="diagonal").fit(train, epochs=2, batch=5, altub=AltUB(every=2), progress=False)
    assert all(p.abs().max() > 0 for p in model.base_parameters()) and model.predict(train)[1].isfinite().all()


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
    values = iter([[3.0], [5.0, 6.0], [10.0]])
    monkeypatch.setattr(training, "train_batch", lambda *a: next(values))
    assert fit(make(), features.bank, replace(SCHEDULE, epochs=1), progress=False)[0]["loss"] == pytest.approx(6.0)


def test_labels_go_with_their_images(make, features):
    "Each batch carries the category numbers of its own images."
    model, seen = make(), []
    own, first = model.losses, features.bank.levels[0]
    number = lambda x: next(i for i in range(14) if torch.equal(first[i], x))
    model.losses = lambda x, labels, generator: seen.append([(number(v), int(l)) for v, l in zip(x[0], labels)]) or own(
        x, labels)
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
    clean, dirty = (Dataset([r for r in records if r.split == "train" or any_ and r.label], Transform(32))
                    for any_ in (False, True))
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
        expected = torch.tensor(
            [[p.base.mean(), p.logdet.mean(), 0.0, p.base.std(correction=0), p.logdet.std(correction=0),
                                  *((p.base + s * p.logdet).max() for s in (0, 0.5, 1))] for p in model.parts(x)])
    torch.testing.assert_close(model.calibration, expected, rtol=1e-4, atol=1e-4)


def test_fit_dataset_refuses_unknown_settings(tiny_backbone, toy):
    train, _ = load("toy", toy, "weave", Transform(32))
    with pytest.raises(TypeError, match="no setting epoch: one of epochs, batch"):
        FastFlow(tiny_backbone(), steps=1).fit(train, epoch=3)


def test_fit_dataset_takes_a_dataset(tiny_backbone, toy):
    "A folder does not say which of its images are good."
    with pytest.raises(TypeError, match=r"no Dataset to train on: make one, such as load\('folder'"):
        FastFlow(tiny_backbone(), steps=1).fit(str(toy / "weave"))


@pytest.mark.parametrize("altub", [True, dict(every=2)], ids=str)
def test_fit_dataset_takes_altubs_settings(altub, tiny_backbone, toy):
    with pytest.raises(TypeError, match="altub .*AltUB"):
        FastFlow(tiny_backbone(), steps=1,
                 base="diagonal").fit(load("toy", toy, "weave", Transform(32))[0], altub=altub)


def test_a_last_step_that_diverges(tiny_backbone, toy):
    "No loss comes after it; its model is found out as the score is calibrated."
    with pytest.raises(RuntimeError, match="diverged in its last step"):
        FastFlow(tiny_backbone(), steps=1).fit(load("toy", toy, "weave", Transform(32))[0], lr=1e10, epochs=1, batch=10,
                                               progress=False)


def test_the_model_knows_the_epoch(make, features, tmp_path):
    "It is told as each begins, on resuming as well: HGAD's second stage hangs on it."
    kw = dict(method=HGAD, **SMALL[HGAD])
    for model, first in ((make(**kw), 0), (make(**kw), 2)):
        told, own = [], model.losses
        begin = model.begin
        model.begin = lambda epoch, epochs: told.append((epoch, epochs)) or begin(epoch, epochs)
        model.losses = lambda *given: told.append(model.intra) or own(*given)
        fit(model, features.bank, SCHEDULE, LABELS, checkpoint=tmp_path / "c.pt", progress=False)
        assert told == [t for e in range(first, 4) for t in ((e, 4), *3 * [e >= 2])]
        saved = torch.load(tmp_path / "c.pt", weights_only=True)
        torch.save(saved | {"epoch": 1}, tmp_path / "c.pt")


def test_layers_in_training(features, stand_in):
    "The model is in training mode while it trains, even after an evaluation put it in eval mode."
    model, modes = FastFlow(stand_in(features.shapes), steps=1, norm="none"), []
    own = model.loss
    model.loss = lambda x, labels=None: modes.append(model.training) or own(x)
    fit(model, features.bank, replace(SCHEDULE, epochs=2), evaluate=lambda e: model.eval() and {}, when=(1,),
        progress=False)
    assert modes == [True] * 6


def test_default_schedule_is_fixed():
    "What people trained without settings of their own was trained under these."
    assert asdict(Schedule()) == dict(epochs=30, batch=8, lr=3e-3, weight_decay=1e-5, betas=(0.9, 0.999),
                                      decay="cosine", floor=0.0, warmup=0, hold=0, clip=None, idle=False,
                                      precision="float32", seed=0)


def test_schedules_at_the_limits():
    "A rise through the whole training is one; a memory that never fades is none."
    assert Schedule(epochs=3, warmup=3, lr=1.0, decay="constant").rate(0.5) == pytest.approx(0.55)
    assert Schedule(floor=1.0, weight_decay=0.0, lr=1.0).rate(0.9) == 1
    for betas in ((1.0, 0.9), (0.9, 1.0)):
        with pytest.raises(ValueError, match="betas"):
            Schedule(betas=betas)


def test_checkpoint_runs_no_code(make, features, tmp_path):
    "A file that would run something on being read is no checkpoint, and runs nothing."
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    path = tmp_path / "checkpoint.pt"
    torch.save({"training": {}, "model": Trap()}, path)
    with pytest.raises(ValueError, match="checkpoint.pt is no checkpoint"):
        fit(make(), features.bank, SCHEDULE, checkpoint=path, progress=False)
    assert not (tmp_path / "sprung").exists()


def test_checkpoint_of_other_features(make, features, tmp_path):
    "What `source` says of them must be the same."
    path = tmp_path / "checkpoint.pt"
    train = lambda key: fit(make(), features.bank, SCHEDULE, checkpoint=path, source={"features": key}, progress=False)
    assert train("a") == train("a")
    with pytest.raises(ValueError, match="source.features 'a' there, 'b' here.*remove it"):
        train("b")


def test_fewer_images_than_a_batch(make, features):
    "Are a batch, for the fibers as well."
    model = make(method=CFlow, code=4, fibers=36)
    training.check_training(model, 4, Schedule(batch=8))
    with pytest.raises(ValueError, match="36 rows is larger than a batch of 3 images, which has 27 rows"):
        training.check_training(model, 3, Schedule(batch=8))


def test_where_features_are_held(tiny_backbone, toy, tmp_path, monkeypatch):
    "As `fit` is told; a cache serves the next training."
    made, own = [], training.FeatureBank
    monkeypatch.setattr(training, "FeatureBank", lambda *a, **kw: made.append(own(*a, **kw)) or made[-1])
    train, _ = load("toy", toy, "weave", Transform(32))
    for where, cache in (("disk", tmp_path), ("ram", tmp_path), ("ram", None)):
        FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1, where=where, cache=cache, progress=False)
    assert [(b.place, b.found) for b in made] == [("disk", False), ("ram", True), ("ram", False)]


def test_no_half_checkpoint_is_left(tmp_path, monkeypatch):
    def full(saved, path):
        path.write_bytes(b"x")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "checkpoint.pt", torch.nn.Linear(1, 1), [], 0, [], {})
    assert not list(tmp_path.iterdir())


def test_schedule_of_numpy_numbers():
    s = Schedule(epochs=np.int64(1), batch=np.int64(2), seed=np.uint8(200))
    assert [len(b) for b in batches(4, s.batch, s.seed, 0)] == [2, 2]


def test_checkpoints_from_before_idle(make, features, tmp_path):
    "Go on; with `idle`, it is another training."
    schedule, path = replace(SCHEDULE, epochs=1), tmp_path / "c.pt"
    fit(make(), features.bank, schedule, checkpoint=path, progress=False)
    assert "idle" not in torch.load(path, weights_only=True)["training"]["schedule"]
    fit(make(), features.bank, schedule, checkpoint=path, progress=False)
    with pytest.raises(training.OtherTraining, match="idle"):
        fit(make(), features.bank, replace(schedule, idle=True), checkpoint=path, progress=False)


@pytest.mark.parametrize("labels, words", [
    (torch.tensor([0, 1]), r"shape \(2,\)"), (torch.zeros(99, dtype=torch.long), r"shape \(99,\)"),
    ([0] * 12, "labels list"), (torch.zeros(12), "float32"), (torch.full((12,), 3), "labels 3 to 3"),
])
def test_labels_are_checked_before_any_work(labels, words, stand_in):
    "Too few were repeated, too many cut off, and what is out of range was found when it was drawn."
    for base in ("hierarchical", "standard"):
        model = HGAD(stand_in([(8, 2, 2)]), ["a", "b", "c"], steps=1, code=4, centres=2, base=base)
        before = [p.clone() for p in model.flows.parameters()]
        with pytest.raises(ValueError, match=words):
            fit(model, Bank(torch.randn(12, 8, 2, 2)), Schedule(epochs=2, batch=4), labels, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(before, model.flows.parameters()))
        with pytest.raises(ValueError, match=words):
            model.calibrate(Bank(torch.randn(12, 8, 2, 2)), labels)


def test_a_refused_first_fit_leaves_no_trace(tiny_backbone, toy):
    "Neither its categories, nor the score of a model of one category."
    one, many = (load("toy", toy, c, Transform(32))[0] for c in ("bolt", "all"))
    model = HGAD(tiny_backbone(), steps=1, code=4, centres=2)
    with pytest.raises(ValueError):
        model.fit(one, altub=AltUB(every=99), epochs=1, progress=False)
    assert model.config["categories"] is None and model.score.image_criterion == "product"
    with pytest.raises(ValueError, match="call fit first"):
        model.predict(many)
    assert model.fit(many, epochs=1, progress=False).config["categories"] == many.categories


def test_a_score_that_the_method_cannot_have(tiny_backbone, toy):
    "Refused before the training, not at the first evaluation."
    model = FastFlow(tiny_backbone(), steps=1, score=Score(image_criterion="product"))
    with pytest.raises(ValueError, match="image_criterion 'product': only a mixture"):
        model.fit(load("toy", toy, "bolt", Transform(32))[0], epochs=1, progress=False)


def test_copies_of_what_rotates(tiny_backbone, toy):
    "CFLOW-AD's rotation by `fit` itself; without copies, the remedy is one that `fit` takes."
    train, test = load("toy", toy, "bolt", Transform(32, rotate=5))
    with pytest.raises(ValueError, match="copies=k, of fit or of FeatureBank"):
        CFlow(tiny_backbone(), steps=1, code=4).fit(train, epochs=1, progress=False)
    model = CFlow(tiny_backbone(), steps=1, code=4).fit(train, epochs=2, copies=2, progress=False)
    assert model.predict(test)[1].isfinite().all()


def test_no_stderr(tiny_backbone, toy, monkeypatch):
    "A service without one trains and scores, and no bar's lock stays taken."
    train, test = load("toy", toy, "bolt", Transform(32))
    monkeypatch.setattr("sys.stderr", None)
    assert FastFlow(tiny_backbone(), steps=1).fit(train, epochs=1).predict(test)[1].isfinite().all()
