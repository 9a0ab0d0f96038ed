"""AltUB: whose turn it is, settings that contradict each other, what a turn of the base moves and by how much, on
every detector, and what it is good for."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowrepro import training
from flowrepro.altub import AltUB, BaseTurn, check_turns, is_base_turn
from flowrepro.bases import DiagonalNormal, StandardNormal
from flowrepro.detectors import HGAD, CFlow, Detector, FastFlow
from flowrepro.flows import Flow, Step
from flowrepro.training import Schedule, fit, optimizers_of, train_batch

# -- turns ---------------------------------------------------------------------------------------------------------

TURNS = [  # settings, epochs, steps of each, the turns (B) epoch by epoch
    (dict(every=5, warmup=0), 1, 12, "....B....B.."),
    (dict(every=2, warmup=0), 3, 3, ".B. B.B .B."),
    (dict(every=3, warmup=0), 2, 4, "..B. .B.."),
    (dict(every=3, warmup=0.5), 2, 6, "...... ..B..B"),
    (dict(every=2, warmup=0.25), 2, 4, "...B .B.B"),
    (dict(every=1, warmup=0.5), 2, 3, "... BBB"),
    (dict(every=1, warmup=0.1), 1, 10, ".BBBBBBBBB"),
    (dict(every=4, warmup=0.1), 5, 2, ".. .B .. .B .."),
    (dict(every=2, unit="epoch", warmup=0), 5, 3, "... BBB ... BBB ..."),
    (dict(every=3, unit="epoch", warmup=0.5), 6, 2, ".. .. .. .. .. BB"),
    (dict(every=1, unit="epoch", warmup=0.5), 4, 2, ".. .. BB BB"),
    (dict(every=2, unit="epoch", warmup=0.3), 5, 4, ".... ..BB .... BBBB ...."),
    (dict(every=100, warmup=0), 2, 3, "... ..."),
]


@pytest.mark.parametrize("settings, epochs, steps, turns", TURNS, ids=lambda v: v if isinstance(v, str) else "")
def test_turns(settings, epochs, steps, turns):
    "Counted from the start of the training, every `every`-th step or epoch, none in the warm-up."
    altub = AltUB(**settings)
    assert (" ".join("".join(".B"[is_base_turn(altub, e, s, epochs, steps)] for s in range(steps))
                     for e in range(epochs)) == turns)


def test_turns_by_default():
    "Every fifth step after the first tenth of the training."
    got = [is_base_turn(AltUB(), e, s, 10, 10) for e in range(10) for s in range(10)]
    assert got == [k >= 10 and k % 5 == 4 for k in range(100)]


@pytest.mark.parametrize("settings, epochs, steps, turns", TURNS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_training_without_turns_is_refused(settings, epochs, steps, turns):
    "And only that."
    if "B" in turns:
        check_turns(AltUB(**settings), epochs, steps)
    else:
        text = r"every=100 steps after a warm-up of 0% never comes in 2 epochs of 3 steps: train longer, or lower"
        with pytest.raises(ValueError, match=text):
            check_turns(AltUB(**settings), epochs, steps)


@pytest.mark.parametrize("settings, words", [
    (dict(every=0), "every 0"), (dict(every=-3), "every -3"), (dict(every=2.5), "every 2.5"),
    (dict(every=True), "every True"), (dict(every="5"), "every '5'"),
    (dict(unit="week"), "unit 'week': one of step, epoch"),
    (dict(optimizer="lamb"), "optimizer 'lamb': one of adam, sgd"),
    (dict(clip_by="size"), "clip_by 'size': one of value, norm"),
    (dict(joint="no"), "joint 'no'"), (dict(lr=0.05), "factor 5.0 and lr 0.05"),
    (dict(factor=None), "factor None and lr None"),
    (dict(factor=0.0), "factor 0.0: a positive number"), (dict(factor=None, lr=-1.0), "lr -1.0: a positive number"),
    (dict(clip=0), "clip 0: a positive number"),
    (dict(clip=float("nan")), "clip nan"), (dict(warmup=1.0), "warmup 1.0"), (dict(warmup=-0.1), "warmup -0.1"),
    (dict(warmup=float("nan")), "warmup nan"), (dict(every=1, warmup=0), "every=1 without warmup")])
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match="altub") as error:
        AltUB(**settings)
    assert words in str(error.value)


def test_settings_are_fixed():
    with pytest.raises(AttributeError):
        AltUB().every = 3
    assert AltUB(factor=None, lr=0.05) != AltUB() and AltUB(clip=None).clip is None


# -- a turn, by hand -----------------------------------------------------------------------------------------------

def leaf(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def linear(p: nn.Parameter, gradient: list[float]) -> torch.Tensor:
    "A loss with this gradient."
    return (p * torch.tensor(gradient, dtype=torch.float64)).sum()


GRADIENTS = [[3.0, -0.2, 0.0], [-1.0, 0.4, 2.0], [0.5, 0.5, -4.0]]
CLIPS = {"none": (dict(clip=None), lambda g: g), "far": (dict(clip=100.0), lambda g: g),
         "value": (dict(clip=0.3), lambda g: g.clamp(-0.3, 0.3)),
         "norm": (dict(clip=0.3, clip_by="norm"), lambda g: g * min(1.0, 0.3 / g.norm().item())),
         "norm, far": (dict(clip=50.0, clip_by="norm"), lambda g: g)}
RATES = {"factor": (dict(factor=5.0), lambda rate: 5 * rate), "less": (dict(factor=0.5), lambda rate: 0.5 * rate),
         "constant": (dict(factor=None, lr=0.07), lambda rate: 0.07)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("rate", RATES)
def test_three_turns_by_hand(optimizer, clip, rate):
    "Clip, then the optimizer's formula, at a rate that changes from turn to turn."
    (clip_settings, clipped), (rate_settings, rate_of) = CLIPS[clip], RATES[rate]
    p = leaf(1.0, 2.0, 3.0)
    turn = BaseTurn(AltUB(optimizer=optimizer, **clip_settings, **rate_settings), [p])
    x, m, v = p.detach().clone(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for k, (gradient, lr) in enumerate(zip(GRADIENTS, (0.1, 0.02, 0.01)), 1):
        turn.step(linear(p, gradient), lr)
        g = clipped(torch.tensor(gradient, dtype=torch.float64))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate_of(lr) * (g if optimizer == "sgd" else (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
        torch.testing.assert_close(p.detach(), x, rtol=1e-6, atol=1e-9)


def test_norm_is_that_of_all_parameters():
    "Value bounds each entry; norm bounds all parameters together, and keeps the direction."
    a, b = leaf(0.0, 0.0), leaf(0.0)
    loss = lambda: linear(a, [3.0, 0.0]) + linear(b, [4.0])
    BaseTurn(AltUB(optimizer="sgd", factor=1.0, clip=1.0, clip_by="norm"), [a, b]).step(loss(), 1.0)
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([-0.6, 0.0, -0.8], dtype=torch.float64),
                               rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        a.zero_(), b.zero_()
    BaseTurn(AltUB(optimizer="sgd", factor=1.0, clip=1.0), [a, b]).step(loss(), 1.0)
    assert torch.cat([a, b]).tolist() == [-1.0, 0.0, -1.0]


def test_only_the_gradient_of_the_base_is_computed():
    "Nothing is propagated back through the flow: no gradient there, not even of the latent; old gradients stay."
    torch.manual_seed(0)
    flow, base = Flow(Step(3, 8) for _ in range(2)), DiagonalNormal(3)
    before, seen = [p.detach().clone() for p in flow.parameters()], []
    for p in flow.parameters():
        p.register_hook(lambda g: seen.append("flow"))
    z, logdet = flow(torch.randn(20, 3) + 1)
    z.register_hook(lambda g: seen.append("latent")), logdet.register_hook(lambda g: seen.append("logdet"))
    next(flow.parameters()).grad = mark = torch.ones_like(next(flow.parameters()))
    BaseTurn(AltUB(), base.parameters()).step(-(base.log_prob(z) + logdet).mean(), 0.01)
    assert not seen and all(torch.equal(a, b) for a, b in zip(before, flow.parameters()))
    assert next(flow.parameters()).grad is mark and all(p.grad is None for p in list(flow.parameters())[1:])
    assert base.mean.abs().min() > 0 and base.log_scale.abs().min() > 0


def test_a_parameter_that_plays_no_part_stays():
    "As HGAD's centres inside a category do in its first stage; it is not moved by Adam's memory either."
    a, b = leaf(1.0), leaf(1.0)
    turn = BaseTurn(AltUB(), [a, b])
    turn.step(linear(a, [1.0]) + linear(b, [1.0]), 0.1)
    moved = b.item()
    turn.step(linear(a, [1.0]), 0.1)
    assert b.item() == moved != 1.0 and a.item() < moved


def test_a_turn_begins_without_old_gradients():
    "What an ordinary step left at the base is not added."
    p = leaf(0.0)
    p.grad = torch.tensor([1e6], dtype=torch.float64)
    BaseTurn(AltUB(optimizer="sgd", factor=1.0), [p]).step(linear(p, [2.0]), 0.5)
    assert p.item() == -1.0


def test_a_base_without_parameters():
    "N(0, I), or one that is not to learn."
    fixed = nn.Parameter(torch.zeros(2), requires_grad=False)
    for parameters in ([], StandardNormal(3).parameters(), [fixed]):
        with pytest.raises(ValueError, match="altub needs a base with parameters.*base='diagonal'"):
            BaseTurn(AltUB(), parameters)
    base = DiagonalNormal(2, scale=False)
    turn = BaseTurn(AltUB(), base.parameters())
    turn.step(-base.log_prob(torch.ones(4, 2)).mean(), 0.01)
    assert base.mean.abs().min() > 0 and not base.log_scale.any()


# -- on the detectors ----------------------------------------------------------------------------------------------

SHAPES = [(4, 4, 4), (5, 2, 2)]
DETECTORS = {
    "fastflow": lambda b: FastFlow(b, steps=2, base="diagonal"),
    "fastflow position": lambda b: FastFlow(b, steps=2, base="diagonal", per="position"),
    "fastflow mean only": lambda b: FastFlow(b, steps=2, base="diagonal", scale=False),
    "cflow": lambda b: CFlow(b, steps=2, code=4, fibers=8, base="diagonal"),
    "cflow scalar": lambda b: CFlow(b, steps=2, code=4, fibers=None, base="diagonal", per="scalar"),
    "hgad": lambda b: HGAD(b, ["bolt", "nut", "pin"], steps=2, code=4, centres=3, stage_one=0.0),
    "hgad joint": lambda b: HGAD(b, ["bolt", "nut", "pin"], steps=2, code=4, centres=3, stage_one=0.0, joint=True),
    "hgad classes": lambda b: HGAD(b, ["bolt", "nut", "pin"], steps=2, code=4, base="classes"),
    "hgad diagonal": lambda b: HGAD(b, ["bolt", "nut", "pin"], steps=2, code=4, base="diagonal"),
}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])


@pytest.fixture
def bank(bank_of):
    g = torch.Generator().manual_seed(0)
    return bank_of(*(torch.randn(12, *s, generator=g) * 1.5 + 0.4 for s in SHAPES))


def make(name, stand_in, seed=0) -> Detector:
    torch.manual_seed(seed)
    return DETECTORS[name](stand_in(SHAPES))


def state(model: Detector) -> tuple[list, list]:
    "Copies of the parameters of the base that learn, and of all others that do."
    base = {id(p) for p in model.base_parameters()}
    own = [p for n, p in model.named_parameters() if p.requires_grad]
    return [p.detach().clone() for p in own if id(p) in base], [p.detach().clone() for p in own if id(p) not in base]


def same(a: list, b: list) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_turn_moves_the_base_alone(name, stand_in, bank):
    "All of it, and not a bit of the flow."
    model = make(name, stand_in)
    turn, (base, flow) = BaseTurn(AltUB(), model.base_parameters()), state(model)
    values = train_batch(model, turn, model.losses(bank[torch.arange(12)], LABELS), 1e-2, Schedule())
    after = state(model)
    assert all(map(math.isfinite, values)) and not any(same(base, after[0])) and all(same(flow, after[1]))
    assert base and all(p.grad is None for n, p in model.named_parameters() if n.startswith("flows."))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", DETECTORS)
def test_steps_of_a_training(name, joint, stand_in, bank, monkeypatch):
    """Turns come as `is_base_turn` says and move the base alone; ordinary steps move the flow,
    and the base if they are joint."""
    model, log = make(name, stand_in), []
    own = training.train_batch

    def watched(model, optimizer, losses, rate, schedule):
        before = state(model)
        out = own(model, optimizer, losses, rate, schedule)
        moved = [not all(same(a, b)) for a, b in zip(before, state(model))]
        log.append((isinstance(optimizer, BaseTurn), *moved))
        return out

    monkeypatch.setattr(training, "train_batch", watched)
    altub = AltUB(every=3, warmup=0.25, joint=joint)
    fit(model, bank, Schedule(epochs=4, batch=4, lr=1e-2), LABELS, altub, progress=False)
    turns = [is_base_turn(altub, e, s, 4, 3) for e in range(4) for s in range(3)]
    assert [t for t, *_ in log] == turns and sum(turns) == 3
    for turn, base, flow in log:
        assert (base, flow) == ((True, False) if turn else (joint, True))


@pytest.mark.parametrize("name", ["fastflow", "hgad joint"])
def test_clipping_of_a_flow_that_learns_alone(name, stand_in, bank):
    "With joint=False the base has no part in ordinary steps, nor its gradient in the norm that theirs is clipped to."
    model, schedule = make(name, stand_in), Schedule(batch=12, clip=1e-3)
    adam, _ = optimizers_of(model, schedule, AltUB(joint=False))
    flow = [p for group in adam.param_groups for p in group["params"]]
    assert not {id(p) for p in flow} & {id(p) for p in model.base_parameters()}
    for step in range(3):
        train_batch(model, adam, model.losses(bank[torch.arange(12)], LABELS), 1e-2, schedule)
        norm = torch.cat([p.grad.flatten() for p in flow]).norm()
        assert abs(norm / schedule.clip - 1) < 1e-3, f"step {step}: clipped to {norm / schedule.clip:.3f} of the bound"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["fastflow", "cflow", "hgad"])
def test_resumed_training_alternates_on(name, optimizer, stand_in, bank, tmp_path):
    "Interrupted and resumed, with the memory of both optimizers: every weight as if nothing had happened."
    schedule, altub = Schedule(epochs=4, batch=4, lr=5e-3), AltUB(every=2, warmup=0.1, optimizer=optimizer)
    whole, part = make(name, stand_in), make(name, stand_in)
    fit(whole, bank, schedule, LABELS, altub, progress=False)

    def stop(epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt):
        fit(part, bank, schedule, LABELS, altub, evaluate=stop, when=(1, 2, 3, 4), checkpoint=tmp_path / "c.pt",
            progress=False)
    again = make(name, stand_in, seed=5)
    fit(again, bank, schedule, LABELS, altub, when=(1, 2, 3, 4), checkpoint=tmp_path / "c.pt", progress=False)
    assert all(map(all, (same(a, b) for a, b in zip(state(whole), state(again)))))
    other = make(name, stand_in)
    for changed in (replace(altub, every=3), None):
        with pytest.raises(ValueError, match="another training"):
            fit(other, bank, schedule, LABELS, changed, checkpoint=tmp_path / "c.pt", progress=False)


@pytest.mark.parametrize("make_model",
                         [lambda b: FastFlow(b, steps=1), lambda b: CFlow(b, steps=1, code=4, fibers=8),
                          lambda b: HGAD(b, ["nut"], steps=1, code=4, base="standard")],
                         ids=["fastflow", "cflow", "hgad"])
def test_a_detector_whose_base_does_not_learn(make_model, stand_in, bank):
    "Refused before the first step."
    model = make_model(stand_in(SHAPES))
    before = state(model)
    with pytest.raises(ValueError, match="altub needs a base with parameters"):
        fit(model, bank, Schedule(epochs=2, batch=4), LABELS % 1, AltUB(), progress=False)
    assert all(same(before[1], state(model)[1]))


def test_a_training_too_short_is_refused(stand_in, bank):
    with pytest.raises(ValueError, match="never comes in 1 epochs of 3 steps"):
        fit(make("fastflow", stand_in), bank, Schedule(epochs=1, batch=4), None, AltUB(), progress=False)


def test_the_base_starts_as_the_normal(stand_in, bank):
    "Loss and parts of a fresh detector are those without AltUB."
    x = bank[torch.arange(12)]
    for plain, learned in ((FastFlow(stand_in(SHAPES), steps=2), make("fastflow", stand_in)),
                           (CFlow(stand_in(SHAPES), steps=2, code=4, fibers=None), make("cflow scalar", stand_in))):
        learned.load_state_dict(plain.state_dict()
                                | {k: v for k, v in learned.state_dict().items() if k.startswith("bases")})
        for a, b in zip(plain.losses(x, None, torch.Generator().manual_seed(1)),
                        learned.losses(x, None, torch.Generator().manual_seed(1)), strict=True):
            torch.testing.assert_close(a, b)
        assert all(torch.equal(p.base, q.base) for p, q in zip(plain.parts(x), learned.parts(x)))


def test_the_learned_base_is_in_the_score(stand_in, bank):
    "Mean and log-scale of every level change the parts by what the density says."
    model, x = make("fastflow", stand_in), bank[torch.arange(12)]
    before = model.parts(x)
    with torch.no_grad():
        model.bases[1].mean.fill_(0.3), model.bases[1].log_scale.fill_(0.2)
    after = model.parts(x)
    z, _ = model.flows[1](x[1])
    assert torch.equal(before[0].base, after[0].base)
    torch.testing.assert_close(after[1].base, -(((z - 0.3) * math.exp(-0.2)).square() / 2 + 0.2).mean(1))


# -- what it is good for -------------------------------------------------------------------------------------------

def shifted(n: int, g: torch.Generator) -> torch.Tensor:
    "Normal data in two dimensions: a bent ridge, far from the origin and not of unit scale."
    t = torch.randn(n, generator=g)
    return torch.stack([2.0 + 2.5 * t, 0.8 * t.square() - 3.0], 1) + 0.3 * torch.randn(n, 2, generator=g)


def train(altub: AltUB | None, seed: int, steps: int = 120, rate: float = 1e-3):
    "A flow and its base after a training that is stopped, as real ones are; and its latents of the training data."
    torch.manual_seed(seed)
    flow, base, data = (Flow(Step(2, 16, soft=True) for _ in range(4)),
                        DiagonalNormal(2) if altub else StandardNormal(2), torch.Generator().manual_seed(seed))
    ordinary = torch.optim.Adam([*flow.parameters(), *base.parameters()], rate)
    turn = altub and BaseTurn(altub, base.parameters())
    for k in range(steps):
        z, logdet = flow(shifted(256, data))
        loss = -(base.log_prob(z) + logdet).mean()
        if altub and is_base_turn(altub, 0, k, 1, steps):
            turn.step(loss, rate)
        else:
            ordinary.zero_grad(), loss.backward(), ordinary.step()
    with torch.no_grad():
        z, logdet = flow(shifted(4000, torch.Generator().manual_seed(99)))
        return z, base, -(base.log_prob(z) + logdet).mean().item()


@pytest.mark.parametrize("altub", [AltUB(), AltUB(every=2, factor=None, lr=0.05)], ids=["default", "lr 0.05"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_base_follows_the_latent(seed, altub):
    """Trained against N(0, I) the latent is not N(0, I); with AltUB the base ends nearer to the latent's mean and
    deviation than N(0, I) does, and the data are likelier."""
    z, _, plain = train(None, seed)
    assert z.mean(0).abs().max() > 0.3 or (z.std(0) - 1).abs().max() > 0.3
    z, base, learned = train(altub, seed)
    for name, own, latent in (("mean", base.mean.detach(), z.mean(0)),
                              ("log-deviation", base.log_scale.detach(), z.std(0).log())):
        # of N(0, I) both are zero
        assert (own - latent).norm() < latent.norm(), f"{name}: base {own.tolist()}, latent {latent.tolist()}"
    assert learned < plain - 0.1


def test_turns_alone_reach_the_moments():
    "With the flow standing still, the base of highest likelihood is the latent's mean and deviation."
    g = torch.Generator().manual_seed(0)
    z, base = (torch.randn(500, 3, generator=g) * torch.tensor([0.4, 1.0, 2.0]) + torch.tensor([1.0, -2.0, 0.0]),
               DiagonalNormal(3))
    turn = BaseTurn(AltUB(factor=None, lr=0.05), base.parameters())
    for k in range(400):
        turn.step(-base.log_prob(z).mean(), rate=0.0)
    torch.testing.assert_close(base.mean.detach(), z.mean(0), atol=1e-2, rtol=0)
    torch.testing.assert_close(base.log_scale.detach().exp(), z.std(0, unbiased=False), atol=1e-2, rtol=0)


@pytest.mark.parametrize("warmup, epochs, first", [(0.07, 100, 7), (0.14, 50, 7), (0.28, 25, 7), (0.55, 100, 55)])
def test_the_first_epoch_after_the_warm_up_is_whole(warmup, epochs, first):
    "0.07 · 100 is a little more than 7 in floating point."
    turns = [is_base_turn(AltUB(unit="epoch", every=first + 1, warmup=warmup), first, s, epochs, 5) for s in range(5)]
    assert turns == [True] * 5
