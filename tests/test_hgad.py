"""HGAD: every loss term against plain formulas and finite differences, its two stages; and the
detector: class modes, categories, groups, files."""
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import Largest
from flowrepro.bases import ClassMixture, HierarchicalMixture
from flowrepro.data import DataError, Dataset, Transform, load
from flowrepro.detectors import CLASS_MODES, HGAD, CFlow, Detector, FastFlow
from flowrepro.features import FeatureBank
from flowrepro.hgad import Affinity, affinities, hgad_loss, hgad_terms
from flowrepro.scores import PUBLISHED, Score
from flowrepro.training import Schedule, fit, optimizers_of

STAGE_ONE, STAGE_TWO = ["L_g", "L_mi", "L_e"], ["L_g", "L_mi", "L_e", "L_in", "L_z"]
NAMES = ("mu", "delta", "phi", "psi")
SIZES = {  # images, positions, channels, categories, centres
    "usual": (3, 4, 5, 3, 3), "one position": (4, 1, 3, 3, 2), "one category": (2, 3, 4, 1, 3),
    "one centre": (3, 2, 3, 2, 1),
    "one of everything": (1, 1, 2, 1, 1), "more categories than channels": (3, 2, 2, 5, 2),
    "one channel": (2, 3, 1, 2, 2)}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def make(size, seed=0, dtype=torch.float64):
    "Latent rows, log-determinants, labels and a mixture with random parameters."
    torch.manual_seed(seed)
    b, p, d, k, m = size
    mixture = HierarchicalMixture(k, d, m)
    with torch.no_grad():
        for v in mixture.parameters():
            v.copy_(torch.randn_like(v) * 0.8)
    return torch.randn(b, p, d).to(dtype), torch.randn(b, p).to(dtype), torch.arange(b).flip(0) % k, mixture.to(dtype)


def plain(z, logdet, label, mixture, smoothing=0.02) -> dict[str, float]:
    "The terms from their definitions, one number at a time."
    (b, p, d), k, m = z.shape, *mixture.psi.shape
    softmax = lambda v: [math.exp(x) / sum(math.exp(y) for y in v) for x in v]
    mu, delta = mixture.mu.tolist(), mixture.delta.tolist()
    prior, inside = softmax(mixture.phi.tolist()), [softmax(row) for row in mixture.psi.tolist()]
    kernel = lambda x, c: math.exp(-sum((u - v) ** 2 for u, v in zip(x, c)) / 2)
    sums = dict.fromkeys(STAGE_TWO, 0.0)
    for i in range(b):
        y = int(label[i])
        centres = [mu[y]] + [[u + v for u, v in zip(mu[y], offset)] for offset in delta[y]]
        for n in range(p):
            x, j = z[i, n].tolist(), logdet[i, n].item()
            likelihood = [kernel(x, c) for c in mu]
            total = sum(w * l for w, l in zip(prior, likelihood))
            posterior = [l / sum(likelihood) for l in likelihood]
            own = math.log(sum(w * kernel(x, c) for w, c in zip(inside[y], centres))) + j
            ell = (own - d / 2 * math.log(2 * math.pi)) / d
            target = [(1 - smoothing) * (c == y) + smoothing / k for c in range(k)]
            sums["L_g"] += (-math.log(total) - j) / d
            sums["L_mi"] += sum(t * math.log(l / total) for t, l in zip(target, likelihood))
            sums["L_e"] -= sum(q * math.log(q) for q in posterior if q)
            sums["L_in"] -= own / d
            sums["L_z"] += math.log(1 + math.exp(-ell))
    return {name: v / (b * p) for name, v in sums.items()}


# -- the terms -----------------------------------------------------------------------------------------------------

@every_size
@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.3])
def test_terms_by_their_definitions(size, smoothing):
    given = make(size)
    terms, expected = hgad_terms(*given, smoothing=smoothing), plain(*given, smoothing)
    assert list(terms) == STAGE_TWO
    for name, value in terms.items():
        assert value.shape == () and value.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("seed", range(5))
def test_terms_of_other_draws(seed):
    given = make((2, 3, 4, 3, 3), seed=100 + seed)
    for name, value in hgad_terms(*given).items():
        assert value.item() == pytest.approx(plain(*given)[name], rel=1e-12)


MOVED = {"L_g": ("z", "logdet", "mu", "phi"), "L_mi": ("z", "mu"), "L_e": ("z", "mu"),
         "L_in": ("z", "logdet", "delta", "psi"), "L_z": ("z", "logdet", "delta", "psi")}


@every_size
@pytest.mark.parametrize("name", STAGE_TWO)
def test_gradients_by_finite_differences(name, size):
    "Of all that a term moves; of what is fixed in it (weights in L_mi, main centres in L_in and L_z), nothing."
    z, logdet, label, mixture = make(size)
    values = {"z": z, "logdet": logdet} | dict(mixture.named_parameters())
    moved = {k: values[k].detach().clone().requires_grad_() for k in MOVED[name] if values[k].numel()}

    def term(*given):
        now = values | dict(zip(moved, given))
        run = lambda *_: hgad_terms(now["z"], now["logdet"], label, mixture)[name]
        mixture.forward = run
        return torch.func.functional_call(mixture, {k: now[k] for k in NAMES}, ())

    assert torch.autograd.gradcheck(term, tuple(moved.values()))
    fixed = [v.detach().requires_grad_() for v in (z, logdet)]
    rest = {k: v for k, v in ({"z": fixed[0], "logdet": fixed[1]} | dict(mixture.named_parameters())).items()
            if k not in moved}
    loss = hgad_terms(*fixed, label, mixture)[name]
    for k, g in zip(rest, torch.autograd.grad(loss, list(rest.values()), allow_unused=True)):
        assert g is None or not g.any(), f"{name} moves {k}"


def test_the_stages():
    "The first has neither L_in nor L_z, and moves nothing inside categories; the other terms are those of the second."
    z, logdet, label, mixture = make(SIZES["usual"])
    first, second = hgad_terms(z, logdet, label, mixture, intra=False), hgad_terms(z, logdet, label, mixture)
    assert list(first) == STAGE_ONE and list(second) == STAGE_TWO
    for name in STAGE_ONE:
        torch.testing.assert_close(first[name], second[name], rtol=1e-13, atol=0)
    hgad_loss(first).backward()
    assert mixture.delta.grad is mixture.psi.grad is None and mixture.mu.grad.any() and mixture.phi.grad.any()
    mixture.zero_grad()
    hgad_loss(second).backward()
    assert all(p.grad is not None and p.grad.any() for p in mixture.parameters())


def test_the_first_stage_needs_no_hierarchy():
    "A mixture of classes has the three terms, too."
    z, logdet, label, mixture = make(SIZES["usual"])
    classes = ClassMixture(3, 5).double()
    classes.load_state_dict({k: v for k, v in mixture.state_dict().items() if k in ("mu", "phi")})
    for name, value in hgad_terms(z, logdet, label, classes, intra=False).items():
        torch.testing.assert_close(value, hgad_terms(z, logdet, label, mixture)[name])


def test_the_loss():
    "The published weights by default: L_mi is maximised a hundred times, the others count once."
    terms = {name: torch.tensor(v) for name, v in zip(STAGE_TWO, (1.0, 10.0, 100.0, 1000.0, 10000.0))}
    assert hgad_loss(terms).item() == 1 - 1000 + 100 + 1000 + 10000
    assert hgad_loss({k: terms[k] for k in STAGE_ONE}).item() == 1 - 1000 + 100
    assert hgad_loss(terms, lambda1=3.0, lambda2=0.5, lambda_e=2.0).item() == 3 - 5 + 200 + 11000
    assert hgad_loss({k: terms[k] for k in STAGE_ONE}, 3.0, 0.0, 0.0).item() == 3


@pytest.mark.parametrize("name", ["L_in", "L_z"])
@every_size
def test_main_centres_do_not_move_inside_categories(name, size):
    "Not by L_in and L_z; a step of the whole loss moves them exactly as the first stage alone would."
    z, logdet, label, mixture = make(size)
    (g,) = torch.autograd.grad(hgad_terms(z, logdet, label, mixture)[name], mixture.mu, allow_unused=True)
    assert g is None or not g.any()
    whole, first = (torch.autograd.grad(hgad_loss(hgad_terms(z, logdet, label, mixture, intra)), mixture.mu)[0]
                    for intra in (True, False))
    torch.testing.assert_close(whole, first, rtol=1e-12, atol=1e-13)


@every_size
def test_order_does_not_matter(size):
    "Images with their labels, and positions, in any order; terms and gradients of the parameters."
    z, logdet, label, mixture = make(size)
    images, positions = torch.randperm(z.shape[0]), torch.randperm(z.shape[1])
    expected = hgad_terms(z, logdet, label, mixture)
    for a, b, c in ((z[images], logdet[images], label[images]), (z[:, positions], logdet[:, positions], label)):
        terms = hgad_terms(a, b, c, mixture)
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(hgad_loss(t), list(mixture.parameters()), retain_graph=True)
                 for t in (terms, expected)]
        for x, y in zip(*grads):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_labels_matter():
    "Those of another image give other L_mi, L_in and L_z; L_g and L_e know no label."
    z, logdet, label, mixture = make(SIZES["usual"])
    terms, other = hgad_terms(z, logdet, label, mixture), hgad_terms(z, logdet, label.roll(1), mixture)
    assert {name for name in terms if not torch.isclose(terms[name], other[name])} == {"L_mi", "L_in", "L_z"}


@every_size
def test_one_position_an_image_is_many_images(size):
    "Each row as an image of its own: the same terms and gradients, another way to its centres."
    z, logdet, label, mixture = make(size)
    b, p, d = z.shape
    alone = (z.reshape(b * p, 1, d), logdet.reshape(b * p, 1), label.repeat_interleave(p), mixture)
    one, many = hgad_terms(*alone), hgad_terms(z, logdet, label, mixture)
    for name in STAGE_TWO:
        torch.testing.assert_close(one[name], many[name], rtol=1e-12, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(hgad_loss(t), list(mixture.parameters())) for t in (one, many))):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@every_size
def test_affinities(size):
    "z·μ − ‖μ‖²/2 to all main centres, and to the own category's."
    z, _, label, mixture = make(size)
    of = lambda c: (z[:, :, None] * c).sum(-1) - c.square().sum(-1) / 2
    _, main, own = affinities(z, mixture, label, own=True)
    torch.testing.assert_close(main,
                               of(mixture.mu)), torch.testing.assert_close(own,
                                                                           of(mixture.all_centres()[label][:, None]))
    _, again, none = affinities(z, mixture, label, own=False)
    torch.testing.assert_close(again, main)
    assert none is None


def test_smoothing():
    "L_mi is linear in it, the label alone at 0, all categories alike at 1; no other term knows it."
    given = make(SIZES["usual"])
    at = {s: hgad_terms(*given, smoothing=s) for s in (0.0, 0.02, 0.5, 1.0)}
    for s, terms in at.items():
        torch.testing.assert_close(terms["L_mi"], (1 - s) * at[0.0]["L_mi"] + s * at[1.0]["L_mi"])
        assert all(torch.equal(terms[k], at[0.0][k]) for k in STAGE_TWO if k != "L_mi")
    others = torch.stack([hgad_terms(*given[:2], torch.full((3,), y), given[3], smoothing=0.0)["L_mi"]
                          for y in range(3)])
    torch.testing.assert_close(at[1.0]["L_mi"], others.mean())
    torch.testing.assert_close(hgad_terms(*given)["L_mi"], at[0.02]["L_mi"])


def test_bounds():
    """With equal weights: the information is at most log K, and is that at the own centre, far from the others; the
    entropy lies between 0 and log K."""
    for seed in range(20):
        z, logdet, label, mixture = make((3, 4, 5, 4, 2), seed)
        nn.init.zeros_(mixture.phi)
        terms = hgad_terms(z, logdet, label, mixture, smoothing=0.0)
        assert terms["L_mi"] < math.log(4) and 0 < terms["L_e"] < math.log(4) and terms["L_z"] > 0
    with torch.no_grad():
        mixture.mu.copy_(torch.eye(4, 5) * 30)
    sure = hgad_terms(mixture.mu[label][:, None].expand(3, 4, 5), logdet, label, mixture, smoothing=0.0)
    assert abs(sure["L_mi"] - math.log(4)) < 1e-10 and abs(sure["L_e"]) < 1e-10
    even = hgad_terms(torch.full((3, 4, 5), 7.0, dtype=torch.float64) * torch.tensor([1.0, 1, 1, 1, 0]), logdet, label,
                      mixture)
    assert abs(even["L_e"] - math.log(4)) < 1e-10


def test_one_category_tells_nothing():
    terms = hgad_terms(*make(SIZES["one category"]))
    assert terms["L_mi"].abs() < 1e-15 and terms["L_e"].abs() < 1e-15


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_far_away(distance):
    "Finite terms and gradients where every density is zero in floating point, in float32 as well."
    for dtype in (torch.float32, torch.float64):
        z, logdet, label, mixture = make(SIZES["usual"], dtype=dtype)
        z = (z + distance).requires_grad_()
        terms = hgad_terms(z, logdet, label, mixture)
        hgad_loss(terms).backward()
        assert all(t.isfinite() for t in terms.values())
        assert all(p.grad.isfinite().all() for p in (z, *mixture.parameters()))


def test_float32_is_near_float64():
    given = make((4, 9, 24, 5, 6), dtype=torch.float32)
    mixture = HierarchicalMixture(5, 24, 6).double()
    mixture.load_state_dict(given[3].state_dict())
    exact = hgad_terms(given[0].double(), given[1].double(), given[2], mixture)
    for name, value in hgad_terms(*given).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-6)


def test_autocast_keeps_float32():
    "Under bfloat16 autocast the terms and gradients are those of float32, to the bit."
    z, logdet, label, mixture = make((3, 6, 24, 4, 5), dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = hgad_terms(z, logdet, label, mixture)
        results.append([*terms.values(), *torch.autograd.grad(hgad_loss(terms), list(mixture.parameters()))])
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("size", [(6, 20, 24, 4, 8), (120, 1, 24, 4, 8), (1, 130, 24, 4, 8)], ids=str)
def test_no_gather_of_centres(size):
    "No tensor of N·M·D elements, forward or backward."
    z, logdet, label, mixture = make(size)
    with Largest() as largest:
        hgad_loss(hgad_terms(z.requires_grad_(), logdet.requires_grad_(), label, mixture)).backward()
    assert 4 * largest.elements < size[0] * size[1] * size[2] * size[4]


@pytest.mark.parametrize("label, words", [
    (torch.tensor([0, 1, 3]), "labels 0 to 3.*categories 0 to 2"), (torch.tensor([0, -1, 1]), "labels -1 to 1"),
    (torch.tensor([0, 1]), "for each of the 3 images"),
    (torch.tensor([0, 1, 2, 0]), "for each of the 3 images"), (torch.tensor(1), "for each of the 3 images"),
    (torch.zeros(3, 4, dtype=torch.long), "for each of the 3 images"),
    (torch.tensor([0.0, 1.0, 2.0]), "float32"), (torch.tensor([True, False, True]), "bool")], ids=str)
@pytest.mark.parametrize("intra", [True, False])
def test_labels_that_make_no_sense(label, words, intra):
    z, logdet, _, mixture = make(SIZES["usual"])
    with pytest.raises(ValueError, match=words):
        hgad_terms(z, logdet, label, mixture, intra)


@pytest.mark.parametrize("shape", [lambda B, P: (P,), lambda B, P: (B, 1), lambda B, P: (1, 1), lambda B, P: ()])
def test_log_determinants_that_would_be_broadcast(shape):
    z, logdet, label, mixture = make(SIZES["usual"])
    with pytest.raises(ValueError, match="log-determinants of shape .*: one for each row"):
        hgad_terms(z, torch.zeros(shape(*logdet.shape)).to(z.dtype), label, mixture)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_labels_of_another_whole_number_type(dtype):
    "The same numbers, or refused with a ValueError."
    z, logdet, label, mixture = make(SIZES["usual"])
    try:
        terms = hgad_terms(z, logdet, label.to(dtype), mixture)
    except ValueError:
        return
    for name, value in hgad_terms(z, logdet, label, mixture).items():
        torch.testing.assert_close(terms[name], value)


# -- the detector --------------------------------------------------------------------------------------------------

SHAPES, CATEGORIES = [(6, 4, 4), (5, 2, 3)], ["bolt", "nut", "pin"]


def detector(stand_in, seed=0, shapes=SHAPES, categories=CATEGORIES, spread=0.4, **kw) -> HGAD:
    "A small HGAD; its parameters random but for the weights of the categories, which stay equal."
    torch.manual_seed(seed)
    model = HGAD(stand_in(shapes), categories, **dict(steps=2, code=4, centres=3) | kw)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "phi" not in n:
                p.add_(torch.randn_like(p) * spread)
    return model


def features(n=6, seed=1, shapes=SHAPES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *s, generator=g) * 1.5 for s in shapes]


LABELS = torch.tensor([2, 0, 1, 1, 0, 2])


def likelihoods(model, x, y) -> list[torch.Tensor]:
    "log p(z | y) of each level and position, (n, H·W), every image in category y."
    return [base.log_prob(z, torch.full((len(z),), y)) for base, (z, _) in zip(model.bases, model.latents(x))]


def test_losses_are_the_terms_of_each_level(stand_in):
    "With the detector's weights and smoothing, in both stages; one after the other, or joint."
    kw = dict(lambda1=0.7, lambda2=30.0, lambda_e=0.2, smoothing=0.1)
    model, joint, x = detector(stand_in, **kw), detector(stand_in, joint=True, **kw), features()
    for epoch, intra in ((0, False), (24, True)):
        model.begin(epoch, 25), joint.begin(epoch, 25)
        expected = [hgad_loss(hgad_terms(z, j, LABELS, b, intra, 0.1), 0.7, 30.0, 0.2)
                    for b, (z, j) in zip(model.bases, model.latents(x))]
        torch.testing.assert_close(list(model.losses(x, LABELS)), expected)
        torch.testing.assert_close(list(joint.losses(x, LABELS)), [sum(expected)])


def test_a_level_is_computed_after_the_step_of_the_one_before(stand_in):
    "`losses` is lazy: what the first step changed, the second level's loss sees."
    model, x = detector(stand_in), features()
    losses, untouched = model.losses(x, LABELS), list(model.losses(x, LABELS))
    next(losses)
    with torch.no_grad():
        model.bases[1].mu.add_(1.0)
    assert next(losses).item() != untouched[1].item()


@pytest.mark.parametrize("stage_one, epochs, first",
                         [(0.08, 25, 2), (0.08, 200, 16), (0.0, 10, 0), (1.0, 10, None), (0.5, 5, 3), (0.1, 10, 1),
                          (0.08, 12, 1), (0.3, 10, 3)])
def test_begin_switches_the_stage(stage_one, epochs, first, stand_in):
    "Of the public code's 25 meta-epochs of 8 passes, two are the first stage."
    model = detector(stand_in, stage_one=stage_one)
    stages = []
    for epoch in range(epochs):
        model.begin(epoch, epochs)
        stages.append(model.intra)
    assert stages == [first is not None and epoch >= first for epoch in range(epochs)]


def test_only_a_hierarchy_has_a_second_stage(stand_in):
    for base in ("classes", "standard", "diagonal"):
        model = detector(stand_in, base=base)
        model.begin(9, 10)
        assert not model.intra and all(l.isfinite() for l in model.losses(features(), LABELS))


@pytest.mark.parametrize("base", ["standard", "diagonal"])
def test_a_single_normal(base, stand_in):
    "The plain negative log-likelihood per dimension, without labels; no entropy, and a score that needs none."
    model, x = detector(stand_in, base=base), features()
    (z, j), *_ = model.latents(x)
    expected = -(model.bases[0].log_prob(z) + j).mean() / 6 - math.log(2 * math.pi) / 2
    torch.testing.assert_close(next(model.losses(x)), expected)
    assert all(p.entropy is None for p in model.parts(x)) and model.score == Score() and not model.mixture
    torch.testing.assert_close([p.base for p in model.parts(x)], [p.base for p in model.parts(x, LABELS)])


def test_training_needs_labels(stand_in):
    with pytest.raises(ValueError, match="category of each image: pass labels"):
        next(detector(stand_in).losses(features()))
    with pytest.raises(ValueError, match="labels 0 to 3"):
        next(detector(stand_in).losses(features(), torch.tensor([0, 1, 2, 3, 0, 0])))


# -- class modes ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["hierarchical", "classes"])
def test_known_is_the_density_of_the_category(base, stand_in):
    model, x = detector(stand_in, base=base, class_mode="known"), features()
    for level, part in enumerate(model.parts(x, LABELS)):
        expected = torch.stack([likelihoods(model, x, int(y))[level][i] for i, y in enumerate(LABELS)])
        d = SHAPES[level][0]
        torch.testing.assert_close(part.base.flatten(1), expected / d + math.log(2 * math.pi) / 2)
        torch.testing.assert_close(part.logdet.flatten(1), list(model.latents(x))[level][1] / d)
        assert part.base.shape == part.logdet.shape == part.entropy.shape == (6, *SHAPES[level][1:])


def test_entropy_needs_no_label(stand_in):
    "Minus the entropy over categories by their main centres, the same in every mode."
    model, x = detector(stand_in), features()
    for level, (z, _) in enumerate(model.latents(x)):
        q = (-(z[:, :, None] - model.bases[level].mu).square().sum(-1) / 2).softmax(-1)
        expected = -torch.distributions.Categorical(q).entropy()
        for mode in CLASS_MODES:
            torch.testing.assert_close(model.parts(x, LABELS, mode)[level].entropy.flatten(1), expected, rtol=1e-4,
                                       atol=1e-5)
        assert (expected <= 0).all() and (expected >= -math.log(3)).all()


@pytest.mark.parametrize("base", ["hierarchical", "classes"])
def test_inferred_is_the_marginal(base, stand_in):
    """Without labels or whatever they are; with equal weights of K categories never below the known category's less
    log K, never above the best one's."""
    model, x = detector(stand_in, base=base).double(), [v.double() for v in features()]
    inferred = model.parts(x, class_mode="inferred")
    assert all(torch.equal(a, b) for p, q in zip(inferred, model.parts(x, LABELS, "inferred")) for a, b in zip(p, q))
    each = [model.parts(x, torch.full((6,), y), "known") for y in range(3)]
    for level, (d, *_) in enumerate(SHAPES):
        known = torch.stack([e[level].base for e in each])
        assert (inferred[level].base >= known - math.log(3) / d - 1e-12).all()
        assert (inferred[level].base <= known.amax(0) + 1e-12).all()
        torch.testing.assert_close(inferred[level].base * d, (known * d).logsumexp(0) - math.log(3))


@pytest.mark.parametrize("base", ["hierarchical", "classes"])
def test_inferred_top_is_the_known_one_of_the_best_category(base, stand_in):
    "Best for the whole image, over all levels and positions; the same for all levels."
    model, x = detector(stand_in, base=base, spread=0.8), features(12)
    whole = torch.stack([sum(l.sum(1) for l in likelihoods(model, x, y)) for y in range(3)])
    best = whole.argmax(0)
    assert len(best.unique()) > 1, "all images are of one category: the test cannot fail"
    top = model.parts(x, class_mode="inferred-top")
    for a, b in zip(top, model.parts(x, best, "known")):
        torch.testing.assert_close(a.base, b.base)
    assert not torch.allclose(top[0].base, model.parts(x, (best + 1) % 3, "known")[0].base)
    assert torch.equal(model.categories_for(list(model.latents(x)), (best + 1) % 3, "inferred-top"), best)


@pytest.mark.parametrize("mode", CLASS_MODES)
def test_images_do_not_see_each_other(mode, stand_in):
    model, x = detector(stand_in, class_mode=mode), features()
    whole = model.parts(x, LABELS)
    for i in range(6):
        alone = model.parts([v[i:i + 1] for v in x], LABELS[i:i + 1])
        for a, b in zip(alone, whole):
            for u, v in zip(a, b):
                torch.testing.assert_close(u, v[i:i + 1], rtol=1e-5, atol=1e-5)


def test_the_mode_is_the_configured_one(stand_in):
    "Unless told otherwise."
    for mode in CLASS_MODES:
        model, x = detector(stand_in, class_mode=mode), features()
        assert torch.equal(model.parts(x, LABELS)[0].base, model.parts(x, LABELS, mode)[0].base)
    assert detector(stand_in).config["class_mode"] == "inferred"


def test_known_without_labels(stand_in):
    with pytest.raises(ValueError, match="class_mode='known'.*must be given.*class_mode='inferred'"):
        detector(stand_in, class_mode="known").parts(features())


def test_a_mode_that_there_is_not(stand_in):
    with pytest.raises(ValueError, match="class_mode 'Known': one of known, inferred, inferred-top"):
        detector(stand_in).parts(features(), LABELS, "Known")


def test_one_category_makes_no_difference(stand_in):
    "Known, inferred and most probable are one; there is no entropy to speak of."
    model, x = detector(stand_in, categories=["nut"]), features()
    results = [model.parts(x, torch.zeros(6, dtype=torch.long), mode) for mode in CLASS_MODES]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a.base, b.base, rtol=1e-5, atol=1e-5)
    assert all(p.entropy.abs().max() == 0 for p in results[0])


# -- categories ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [[], ["nut", "nut"], ["bolt", "nut", "bolt"]])
def test_categories_that_make_no_sense(names, stand_in):
    for build in (lambda: HGAD(stand_in(SHAPES), names, steps=1, code=4), lambda: detector(stand_in).adopt(names)):
        with pytest.raises(ValueError, match="at least one, each once") as error:
            build()
        assert all(n in str(error.value) for n in names)


def test_adopt(stand_in):
    "Each level gets a base over the categories, of the kind, size and place that was asked for."
    model = HGAD(stand_in(SHAPES), steps=1, code=4, centres=5)
    assert model.config["categories"] is None and not list(model.bases.parameters())
    model.adopt(c for c in CATEGORIES)
    assert model.config["categories"] == CATEGORIES and [b.mu.shape for b in model.bases] == [(3, 6), (3, 5)]
    assert [b.psi.shape for b in model.bases] == [(3, 5), (3, 5)]
    assert [model.number_of(c) for c in CATEGORIES] == [0, 1, 2]
    double = detector(stand_in, base="classes")
    assert [type(b) for b in double.bases] == [ClassMixture] * 2


def test_a_category_not_trained_on(stand_in, toy):
    "Named, and the known ones with it; alone, in a data set, before any training."
    model = detector(stand_in)
    with pytest.raises(DataError, match="category 'screw': this model knows bolt, nut, pin; "
                                        "train it on that category, too"):
        model.number_of("screw")
    with pytest.raises(DataError, match="'weave': this model knows bolt, nut, pin"):
        model.labels_of(load("toy", toy, "weave", Transform(32))[0])
    with pytest.raises(DataError, match="'nut': this model knows none yet"):
        HGAD(stand_in(SHAPES), steps=1, code=4).number_of("nut")


def test_labels_of_a_dataset(stand_in, toy):
    "By name; the first data set's categories are adopted, in the order of their names."
    train, test = load("toy", toy, transform=Transform(32))
    model = HGAD(stand_in(SHAPES), steps=1, code=4)
    labels = model.labels_of(train)
    assert model.config["categories"] == train.categories and len(train.categories) == 4 and labels.dtype == torch.long
    assert [train.categories[i] for i in labels] == [r.category for r in train.records]
    assert [train.categories[i] for i in model.labels_of(test)] == [r.category for r in test.records]
    told = detector(stand_in, categories=train.categories[::-1])
    assert torch.equal(told.labels_of(train), 3 - labels)


# -- training and predicting ---------------------------------------------------------------------------------------

SMALL = dict(steps=2, code=4, centres=3)
PYRAMID = dict(levels=(1,), pyramid=(1.0, 0.5))


@pytest.fixture(scope="module")
def two(toy) -> tuple[Dataset, Dataset]:
    "Training and test images of two categories."
    train, test = load("toy", toy, transform=Transform(32))
    keep = lambda d: Dataset([r for r in d.records if r.category in d.categories[:2]], d.transform)
    return keep(train), keep(test)


@pytest.fixture(scope="module")
def trained(tiny_backbone, two) -> HGAD:
    "Trained for some epochs on two categories; tests do not change it."
    torch.manual_seed(0)
    return HGAD(tiny_backbone(**PYRAMID), **SMALL, stage_one=0.3,
                joint=True).fit(two[0], epochs=4, batch=4, progress=False)


def test_calibration_on_copies(tiny_backbone, two):
    "Of rotated images, each copy has the category of its image."
    data = Dataset(two[0].records, Transform(32, rotate=10.0))
    model = HGAD(tiny_backbone(**PYRAMID), **SMALL, class_mode="known")
    labels = model.labels_of(data)
    model.calibrate(FeatureBank(data, model.backbone, copies=2, progress=False), labels)
    assert model.calibration.isfinite().all()


def with_mode(model: HGAD, mode: str, path) -> HGAD:
    "The same model under another class mode, through a file."
    model.save(path)
    with safe_open(str(path), "pt") as f:
        about = f.metadata()
    save_file(load_file(path), str(path),
              metadata=about | {"config": json.dumps(json.loads(about["config"]) | {"class_mode": mode})})
    return HGAD.load(path)


def pixels(dataset: Dataset) -> torch.Tensor:
    return torch.stack([dataset[i].image for i in range(len(dataset))])


def test_fit_adopts_and_learns(trained, two):
    "The categories of the training set; the centres moved, calibration is there, and the loss fell."
    assert trained.config["categories"] == two[0].categories and trained.intra and trained.calibration.isfinite().all()
    assert all(b.psi.any() and b.phi.any() for b in trained.bases)


@pytest.mark.parametrize("mode", CLASS_MODES)
def test_predict_in_every_form(mode, trained, two, tmp_path):
    "A data set tells its categories itself; images are told one; without, known refuses and the others infer."
    model, test = with_mode(trained, mode, tmp_path / "m.safetensors"), two[1]
    maps, scores = model.predict(test)
    assert maps.shape == (len(test), 32, 32)
    assert scores.shape == (len(test),)
    assert maps.isfinite().all()
    assert scores.isfinite().all()
    for category in test.categories:
        rows = [i for i, r in enumerate(test.records) if r.category == category]
        own = test.filter(category=category)
        for given in (pixels(own), own, [r.image for r in own.records]):
            a, b = model.predict(given, category=category)
            torch.testing.assert_close(a, maps[rows], rtol=1e-4,
                                       atol=1e-5), torch.testing.assert_close(b, scores[rows], rtol=1e-4, atol=1e-5)
    if mode == "known":
        with pytest.raises(ValueError, match="class_mode='known'"):
            model.predict(pixels(test))
        wrong = [c for c in test.categories if c != test.records[0].category][0]
        assert not torch.allclose(model.predict(pixels(test)[:1], category=wrong)[0], maps[:1])
    else:
        a, b = model.predict(pixels(test))
        torch.testing.assert_close(a, maps, rtol=1e-4,
                                   atol=1e-5), torch.testing.assert_close(b, scores, rtol=1e-4, atol=1e-5)


def test_predict_does_not_depend_on_the_batch(trained, two, tmp_path):
    "Labels go with their images, whatever the batch."
    model, test = with_mode(trained, "known", tmp_path / "m.safetensors"), two[1]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = Dataset([test.records[i] for i in order], test.transform)
    maps, scores = model.predict(test)
    for batch in (1, 5, 100):
        a, b = model.predict(mixed, batch=batch)
        torch.testing.assert_close(a, maps[order], rtol=1e-4,
                                   atol=1e-5), torch.testing.assert_close(b, scores[order], rtol=1e-4, atol=1e-5)


def test_predict_a_category_not_trained_on(trained, toy, two):
    other = load("toy", toy, transform=Transform(32))[1].filter(category=load("toy", toy)[1].categories[3])
    name = other.categories[0]
    known = ", ".join(two[0].categories)
    with pytest.raises(DataError, match=f"category '{name}': this model knows {known}"):
        trained.predict(other)
    with pytest.raises(DataError, match="category 'screw': this model knows"):
        trained.predict(pixels(other)[:1], category="screw")


def test_a_category_is_nothing_to_other_methods(tiny_backbone, parts_folder):
    "FastFlow and CFLOW-AD score the same, told one or not."
    train, test = load("folder", parts_folder, transform=Transform(32))
    for model in (FastFlow(tiny_backbone(), steps=1), CFlow(tiny_backbone(), steps=1, code=4, fibers=16)):
        model.fit(train, epochs=1, batch=4, progress=False)
        assert torch.equal(model.predict(pixels(test))[0], model.predict(pixels(test), category="screw")[0])


def test_fit_refuses_another_category(tiny_backbone, two):
    "A detector told its categories is not trained on others."
    with pytest.raises(DataError, match="this model knows screw"):
        HGAD(tiny_backbone(**PYRAMID), ["screw"], **SMALL).fit(two[0], epochs=1, progress=False)


def test_training_learns_the_categories(stand_in, bank_of):
    """Features whose categories differ: the information about them rises on every level, the most probable category is
    the right one, and its density exceeds another's."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    bank = bank_of(*(torch.randn(24, *s, generator=g) + 2 * torch.nn.functional.one_hot(labels, s[0])[:, :, None, None]
                     for s in SHAPES))
    model, x = detector(stand_in, spread=0.0, joint=True, stage_one=0.2), bank[torch.arange(24)]
    model.prepare(bank)
    information = lambda: torch.stack(
        [hgad_terms(z, j, labels, b, intra=False)["L_mi"] for b, (z, j) in zip(model.bases, model.latents(x))])
    before = information()
    fit(model, bank, Schedule(epochs=25, batch=8, lr=2e-2), labels, progress=False)
    with torch.no_grad():
        assert (information() > before + 0.5).all(), f"{before.tolist()} to {information().tolist()}"
        assert (model.categories_for(list(model.latents(x)), None, "inferred-top") == labels).float().mean() > 0.9
        for right, wrong in zip(model.parts(x, labels, "known"), model.parts(x, (labels + 1) % 3, "known")):
            assert right.base.mean() > wrong.base.mean()


# -- groups --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["hierarchical", "classes", "standard", "diagonal"])
@pytest.mark.parametrize("norm", ["layer", "standard"])
def test_groups(base, norm, stand_in):
    "Every parameter once; decay for flows and norms alone, another rate for centres alone."
    model = detector(stand_in, base=base, norm=norm, centre_rate=3.0)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [({names[id(p)] for p in g["params"]}, g["weight_decay"], g.get("rate", 1.0)) for g in model.groups(0.1)]
    together = [n for members, *_ in groups for n in members]
    assert sorted(together) == sorted(names.values()) and all(members for members, *_ in groups)
    for members, decay, rate in groups:
        for n in members:
            assert (decay == 0.1) == n.startswith(("flows", "norms")) and decay in (0.0, 0.1), n
            assert rate == (3.0 if n.endswith(("mu", "delta")) else 1.0), n


@pytest.mark.parametrize("given, same", [({}, True), ({"clip": 0.1}, False), ({"idle": True}, False)], ids=str)
def test_when_a_joint_step_tells(given, same, stand_in, bank_of):
    "Levels share no parameter: one step for all is one each, unless the clipped norm or Adam's memory is of all."
    weights = []
    for joint in (False, True):
        model = detector(stand_in, joint=joint, stage_one=0.0)
        fit(model, bank_of(*features()), Schedule(epochs=3, batch=3, lr=1e-2, **given), LABELS, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights) == same


def test_groups_in_a_step(stand_in, bank_of):
    "Centres take three times the step; nothing but the flows decays."
    moved = {}
    for rate in (1.0, 3.0):
        model = detector(stand_in, centre_rate=rate, joint=True, stage_one=0.0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        fit(model, bank_of(*features()), Schedule(epochs=1, batch=6, lr=1e-3, weight_decay=0.0), LABELS, progress=False)
        moved[rate] = {n: (p.detach() - before[n]) for n, p in model.named_parameters()}
    for n in moved[1.0]:
        torch.testing.assert_close(moved[3.0][n], moved[1.0][n] * (3 if n.endswith(("mu", "delta")) else 1), rtol=1e-3,
                                   atol=1e-6)
    adam, _ = optimizers_of(model, Schedule(weight_decay=1e-4, betas=(0.95, 0.99)), None)
    assert [g["weight_decay"] for g in adam.param_groups] == [1e-4, 0.0, 0.0]
    assert {g["betas"] for g in adam.param_groups} == {(0.95, 0.99)}


# -- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, dict(base="classes", class_mode="known", joint=True), dict(base="standard"), dict(base="diagonal", soft=False),
    dict(categories=None, score=PUBLISHED["hgad"]),
    dict(centres=1, categories=["nut"], lambda2=100.0, stage_one=0.5, centre_rate=3.0, rule="unit-gain", norm="layer")],
    ids=str)
def test_save_and_load(settings, tiny_backbone, tmp_path):
    "Categories, settings, score and tensors; with categories or before it has any."
    torch.manual_seed(1)
    model = HGAD(tiny_backbone(**PYRAMID), **{"categories": CATEGORIES} | SMALL | settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.calibration.copy_(torch.rand_like(model.calibration))
    model.save(tmp_path / "m.safetensors")
    for again in (HGAD.load(tmp_path / "m.safetensors"), Detector.load(tmp_path / "m.safetensors")):
        assert type(again) is HGAD and again.config == model.config and again.score == model.score
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        if model.config["categories"]:
            images = torch.rand(3, 3, 32, 32)
            x, y = model.backbone(images), torch.zeros(3, dtype=torch.long)
            assert all(torch.equal(a, b) for p, q in zip(model.parts(x, y), again.parts(x, y)) for a, b in zip(p, q)
                       if a is not None)


def test_position_codes_are_not_saved(trained, tmp_path):
    "They follow from the sizes."
    trained.save(tmp_path / "m.safetensors")
    keys = load_file(tmp_path / "m.safetensors").keys()
    assert not [k for k in keys if "code" in k]
    assert {k for k in keys if k.startswith("bases.1")} == {f"bases.1.{n}" for n in NAMES}


def test_load_another_method(tiny_backbone, tmp_path):
    "Both methods are named, and what to use instead; `Detector.load` takes any."
    makers = {"fastflow": (FastFlow, {}), "cflow": (CFlow, dict(code=4, fibers=8)),
              "hgad": (HGAD, dict(categories=CATEGORIES, code=4))}
    for name, (kind, kw) in makers.items():
        path = tmp_path / f"{name}.safetensors"
        kind(tiny_backbone(levels=(1,)), steps=1, **kw).save(path)
        assert type(Detector.load(path)) is kind
        for other, (wrong, _) in makers.items():
            if other != name:
                with pytest.raises(DataError, match=f"{name}.safetensors holds method {name}, not {other}: "
                                                    f"use {kind.__name__}.load"):
                    wrong.load(path)


@pytest.mark.parametrize("change, names", [
    (dict(centres=5), ("bases.0.delta", "(3, 2, ", "(3, 4, ", "bases.0.psi", "(3, 3)", "(3, 5)")),
    (dict(categories=["bolt", "nut"]), ("bases.0.delta", "(3, 2, ", "(2, 2, ", "bases.0.mu")),
    (dict(steps=3), ("flows.0.steps.2", "none in the file")),
    (dict(code=8), ("subnet.first.weight",)),
    (dict(base="classes"), ("bases.0.delta", "none in the detector")),
], ids=str)
def test_load_other_sizes(change, names, tiny_backbone, tmp_path):
    "A tensor that does not fit is named with both sizes."
    HGAD(tiny_backbone(levels=(1,)), CATEGORIES, **SMALL).save(tmp_path / "m.safetensors")
    with safe_open(str(tmp_path / "m.safetensors"), "pt") as f:
        about = f.metadata()
    save_file(load_file(tmp_path / "m.safetensors"), str(tmp_path / "other.safetensors"),
              metadata=about | {"config": json.dumps(json.loads(about["config"]) | change)})
    with pytest.raises(DataError, match="other.safetensors does not fit") as error:
        HGAD.load(tmp_path / "other.safetensors")
    assert all(n in str(error.value) for n in names), str(error.value)


def test_load_other_widths(tiny_backbone, tmp_path):
    "Tensors of a backbone of other channels: both widths are named."
    HGAD(tiny_backbone(levels=(1,)), CATEGORIES, **SMALL).save(tmp_path / "one.safetensors")
    HGAD(tiny_backbone(levels=(2,)), CATEGORIES, **SMALL).save(tmp_path / "two.safetensors")
    (one, two) = (load_file(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    with safe_open(str(tmp_path / "one.safetensors"), "pt") as f:
        save_file(two, str(tmp_path / "mixed.safetensors"), metadata=f.metadata())
    with pytest.raises(DataError, match="mixed.safetensors does not fit") as error:
        HGAD.load(tmp_path / "mixed.safetensors")
    assert all(str(tuple(s["bases.0.delta"].shape)) in str(error.value) for s in (one, two)), str(error.value)


# -- settings ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [6, 2, 0, 130, -4])
def test_position_codes_come_in_fours(code, stand_in):
    with pytest.raises(ValueError, match=f"position code of {code} channels.*multiple of four"):
        HGAD(stand_in(SHAPES), CATEGORIES, steps=1, code=code)


@pytest.mark.parametrize("settings, words", [
    (dict(base="mixture"), "base 'mixture': one of hierarchical, classes, standard, diagonal"),
    (dict(class_mode="guess"), "class_mode 'guess': one of known, inferred, inferred-top"),
    (dict(stage_one=1.5), "stage_one 1.5"), (dict(stage_one=-0.1), "stage_one -0.1"),
    (dict(smoothing=1.0), "smoothing 1.0"), (dict(smoothing=-0.1), "smoothing -0.1"),
    (dict(centre_rate=0.0), "centre_rate 0.0"), (dict(lambda2=-1.0), "not negative"),
    (dict(lambda_e=-1.0), "not negative"), (dict(lambda1=float("inf")), "finite"),
    (dict(centres=0), "centres 0: a whole number from 1"),
    (dict(norm="batch"), "'batch': one of"), (dict(clamp=0.0), "clamp 0.0 must be positive")], ids=str)
def test_settings_that_make_no_sense(settings, words, stand_in):
    with pytest.raises(ValueError, match=words):
        HGAD(stand_in(SHAPES), CATEGORIES, **dict(steps=1, code=4) | settings)


def test_settings_at_the_limits(stand_in):
    "No smoothing, no second stage, and terms that do not count."
    own = dict(smoothing=0.0, stage_one=1.0, lambda1=0.0, lambda2=0.0, lambda_e=0.0)
    model = HGAD(stand_in(SHAPES), CATEGORIES, steps=1, code=4, **own)
    assert {k: model.config[k] for k in own} == own


def test_defaults(stand_in):
    """The published ones but for λ2, the standardised features and the inferred category; images by the
    product, pixels by the likelihood."""
    model = HGAD(stand_in([(8, 2, 2)]), CATEGORIES)
    assert {k: model.config[k]
            for k in ("steps", "code", "centres", "lambda1", "lambda2", "lambda_e", "smoothing", "stage_one", "clamp",
                      "soft", "norm", "class_mode")} == dict(
        steps=12, code=256, centres=10, lambda1=1.0, lambda2=1.0, lambda_e=1.0, smoothing=0.02, stage_one=0.08,
        clamp=1.9, soft=True, norm="standard", class_mode="inferred")
    assert model.score == replace(Score(), image_criterion="product")
    assert HGAD.labelled
    assert len(model.flows[0].steps) == 12


def test_affinity_function():
    """Its values against the definition, its first and second derivatives against finite
    differences, and no NaN at zero."""
    torch.manual_seed(0)
    z, c = (torch.randn(3, n, 5, dtype=torch.double, requires_grad=True) for n in (4, 2))
    half, a = Affinity.apply(z, c)
    torch.testing.assert_close(half[..., None] - a, (z[:, :, None] - c[:, None]).square().sum(-1) / 2)
    assert torch.autograd.gradcheck(Affinity.apply, (z, c)) and torch.autograd.gradgradcheck(Affinity.apply, (z, c))
    zero = torch.zeros(1, 2, 5, requires_grad=True)
    (g,) = torch.autograd.grad(sum(t.sum() for t in Affinity.apply(zero, torch.ones(1, 2, 5))), zero)
    assert (g == 2).all()


def test_spread_reaches_every_level(stand_in):
    """The offsets of the centres inside a category start `spread` times the published ones;
    the main centres do not change."""
    made = []
    for spread in (1.0, 0.1):
        torch.manual_seed(0)
        made.append(HGAD(stand_in(SHAPES), CATEGORIES, steps=1, code=4, centres=5, spread=spread))
    for wide, narrow in zip(*(m.bases for m in made)):
        assert torch.allclose(narrow.delta, 0.1 * wide.delta)
        assert torch.equal(narrow.mu, wide.mu)
        assert wide.delta.abs().max() > 0.5


def test_one_category_by_its_name(stand_in):
    assert HGAD(stand_in(SHAPES), "nut", steps=1, code=4).config["categories"] == ["nut"]


def test_terms_in_double_precision():
    "Of any number of positions, whatever the precision of the centres."
    torch.manual_seed(0)
    mixture, label = HierarchicalMixture(3, 5, 2), torch.tensor([0, 1])
    for positions in (1, 4):
        z, logdet = torch.randn(2, positions, 5).double(), torch.randn(2, positions).double()
        double, single = (hgad_terms(z.to(t), logdet.to(t), label, mixture) for t in (torch.float64, torch.float32))
        for name, value in double.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.float(), single[name])


def test_affinities_take_the_higher_precision():
    "That of the centres, too."
    mixture, label = HierarchicalMixture(3, 5, 2).double(), torch.tensor([0, 1])
    for positions in (1, 4):
        z = torch.randn(2, positions, 5)
        _, main, own = affinities(z, mixture, label, True)
        assert main.dtype == own.dtype == torch.float64
        torch.testing.assert_close(main, affinities(z.double(), mixture, label, True)[1])
