"""Maps and image scores against formulas written out here: every switch, the
published forms, calibration, bad settings."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowrepro.scores import (
    PUBLISHED, Parts, Score, calibration, combine, gaussian, highest, image_scores, join, logdet_share, score_batch
)

SHAPES = [(6, 6), (3, 5)]  # of the levels


def make(n=4, seed=0, shapes=SHAPES, dtype=torch.float32, classes=0) -> list[Parts]:
    "Parts of n images, levels of different scale; with the entropy over some classes."
    g = torch.Generator().manual_seed(seed)
    draw = lambda s, k: torch.randn(n, *s, generator=g).to(dtype) * (k + 1)
    q = lambda s, k: torch.stack([draw(s, k) for _ in range(classes)]).log_softmax(0)
    sure = lambda log_q: (log_q.exp() * log_q).sum(0)
    return [Parts(-draw(s, k).square() / 2, draw(s, k) * 0.3 - k, sure(q(s, k)) if classes else None)
            for k, s in enumerate(shapes)]


def of(parts, *images) -> list[Parts]:
    return [p.at(torch.tensor(images)) for p in parts]


def up(x, size, align_corners=False):
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


def aligned(x, size) -> np.ndarray:
    "Bilinear interpolation of maps (B, h, w) with aligned corners, in numpy."
    for axis, n in ((1, size[0]), (2, size[1])):
        x = np.apply_along_axis(lambda v: np.interp(np.linspace(0, len(v) - 1, n), np.arange(len(v)), v), axis, x)
    return x


PLAIN = Score(logdet=0.0, image_logdet=0.0, levels="linear", normalise="none", smooth=0, image="max")


# -- the published forms -------------------------------------------------------------------------------------------

def test_fastflow_as_published():
    """The mean over levels of -exp(-mean of z²/2), interpolated; the maximum of the map. The
    log-determinant plays no part."""
    z = [torch.randn(3, c, h, w) for c, h, w in ((5, 8, 8), (7, 4, 4))]
    parts = [Parts(-x.square().mean(1) / 2, torch.randn(3, *x.shape[2:])) for x in z]
    maps, images = score_batch(parts, 32, PUBLISHED["fastflow"])
    expected = torch.stack([up(-(-0.5 * (x**2).mean(1)).exp(), (32, 32)) for x in z]).mean(0)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(images, expected.flatten(1).amax(1))


def test_cflow_as_published():
    "Σ exp(ℓ - max ℓ over the test set), the maximum minus that: the same maps up to a factor and a constant."
    parts = make(5)
    total = sum(up((p.base + p.logdet - (p.base + p.logdet).max()).exp(), (24, 24), align_corners=True) for p in parts)
    maps = combine(parts, 24, PUBLISHED["cflow"])
    torch.testing.assert_close(maps, -total / 2)
    torch.testing.assert_close(total.max() - total, 2 * (maps - maps.min()))


def test_hgad_as_published():
    """In numpy and scipy: likelihood and entropy each Σ exp(· - its maximum over the test set), the maximum minus
    that, smoothed; their product; its maximum."""
    from scipy.ndimage import gaussian_filter

    parts, size = make(5, dtype=torch.float64, classes=3), (32, 48)
    factors = []
    for values in ([(p.base + p.logdet).numpy() for p in parts], [p.entropy.numpy() for p in parts]):
        total = sum(aligned(np.exp(v - v.max()), size) for v in values)
        factors.append(np.stack([gaussian_filter(m, 4.0 * 48 / 256) for m in total.max() - total]))
    expected = factors[0] * factors[1]
    maps, images = score_batch(parts, size, PUBLISHED["hgad"])
    np.testing.assert_allclose(maps.numpy(), expected / 4, rtol=1e-9, atol=1e-12)  # the mean over two levels, twice
    np.testing.assert_allclose(images.numpy(), expected.max((1, 2)) / 4, rtol=1e-9)
    assert expected.std() > 0.05


def test_published_settings_are_fixed():
    "A change of the default does not change them."
    form = dict(levels="probability", temperature=1.0, image_temperature=1.0, image="max")
    likelihood = dict(criterion="likelihood", image_criterion="likelihood", smooth=0.0, image_smooth=0.0)
    product = dict(criterion="product", image_criterion="product", smooth=4.0, image_smooth=4.0)
    maxima = dict(logdet=1.0, image_logdet=1.0, normalise="paper", align_corners=True)
    own = {"fastflow": dict(logdet=0.0, image_logdet=0.0, normalise="none", align_corners=False) | likelihood,
           "cflow": maxima | likelihood, "hgad": maxima | product}
    assert ({name: {k: v for k, v in asdict(s).items() if k != "top"} for name, s in PUBLISHED.items()}
            == {name: form | o for name, o in own.items()})


# -- each switch ---------------------------------------------------------------------------------------------------

def test_loglik():
    p = Parts(torch.full((1, 2, 2), -3.0), torch.full((1, 2, 2), 0.5))
    assert torch.equal(p.loglik(), torch.full((1, 2, 2), -2.5))
    assert torch.equal(p.loglik(0.0), p.base)
    assert torch.equal(p.loglik(0.5), torch.full((1, 2, 2), -2.75))


def test_join():
    a, b = make(2, 1), make(3, 2)
    joined = join([a, b])
    assert [p.base.shape for p in joined] == [(5, *s) for s in SHAPES]
    assert all(torch.equal(j.logdet, torch.cat([p.logdet, q.logdet])) for j, p, q in zip(joined, a, b))
    assert all(torch.equal(j.base[2:], q.base) and j.entropy is None for j, q in zip(joined, b))
    c, d = make(2, 1, classes=2), make(3, 2, classes=2)
    assert all(torch.equal(j.entropy, torch.cat([p.entropy, q.entropy])) for j, p, q in zip(join([c, d]), c, d))


@pytest.mark.parametrize("classes", [0, 3])
def test_some_images(classes):
    "In the order asked for, every part."
    for whole, some in zip(make(classes=classes), of(make(classes=classes), 3, 0)):
        assert all((t is None and s is None) or torch.equal(s, torch.stack([t[3], t[0]])) for t, s in zip(whole, some))
        assert (whole.entropy is None) == (classes == 0)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shift", [0.0, 3e4])
def test_calibration(shift, classes):
    """Of each level the means of a, j and e, the deviations of a and j, and the maxima of a, a + j/2
    and a + j; far from zero as well."""
    parts = [Parts(p.base.double() + shift, p.logdet.double(), p.entropy) for p in make(6, classes=classes)]
    stats, expected = calibration(parts), []
    for p in parts:
        a, j, e = (t.double().numpy() for t in (p.base, p.logdet, p.entropy if classes else torch.zeros(1)))
        expected.append([a.mean(), j.mean(), e.mean(), a.std(), j.std(), a.max(), (a + j / 2).max(), (a + j).max()])
    assert stats.dtype == torch.float32
    np.testing.assert_allclose(stats, expected, rtol=1e-5)
    assert len(set(stats.flatten().tolist())) >= (15 if classes else 14)  # far from zero two maxima may be one float32


def test_calibration_of_one_position():
    assert calibration(make(1, shapes=[(1, 1)])).isfinite().all()


def test_share_that_the_training_images_suggest():
    """r - 2 within [0, 1], r how much more j varies than a, each level for itself; and it is
    the share behind `logdet=None`."""
    parts = make(7, seed=5)
    r = [float(p.logdet.double().std() / p.base.double().std()) for p in parts]
    for ratios, shares in (((1.5, 2.5), (0.0, 0.5)), ((9.0, 2.25), (1.0, 0.25)), ((2.0, 3.0), (0.0, 1.0))):
        train, test = ([p._replace(logdet=p.logdet * f / x) for p, f, x in zip(some, ratios, r)]
                       for some in (parts, make()))
        assert logdet_share(calibration(train)).tolist() == pytest.approx(shares, abs=1e-4)
        shared = [[p._replace(logdet=p.logdet * share) for p, share in zip(some, shares)] for some in (train, test)]
        given = combine(shared[1], 12, Score(logdet=1.0, smooth=0), calibration(shared[0]))
        torch.testing.assert_close(combine(test, 12, Score(smooth=0), calibration(train)), given, rtol=1e-3, atol=1e-3)


def test_highest_over_training_positions():
    "Between the shares whose maximum is kept it is their chord, never below the true maximum; exact where one is kept."
    part = make(6, seed=3)[0]
    level = calibration([part])[0]
    for share in (0.0, 0.1, 0.25, 0.5, 0.7, 1.0):
        chord = np.interp(share, [0.0, 0.5, 1.0], level[5:])
        true = float(part.loglik(share).max())
        for given in (share, torch.tensor(share)):
            assert float(highest(level, given)) == pytest.approx(chord, abs=1e-5)
            assert float(highest(level, given)) >= true - 1e-5


def test_calibration_levels_the_levels():
    """On the training images each level's ℓ has mean zero, whatever the share of the log-determinant;
    a constant of a level is gone."""
    parts = make(6)
    shifted = [Parts(p.base + 5 * l, p.logdet - 3 * l) for l, p in enumerate(parts)]
    for share in (0.0, 0.5, 1.0):
        score = replace(PLAIN, logdet=share, normalise="train")
        one = [combine([p], p.base.shape[1:], score, calibration([p])) for p in parts]
        assert all(abs(m.mean()) < 1e-5 for m in one)
        torch.testing.assert_close(combine(shifted, 8, score, calibration(shifted)),
                                   combine(parts, 8, score, calibration(parts)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logdet", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", ["linear", "probability"])
@pytest.mark.parametrize("normalise", ["none", "train", "paper"])
def test_combine(logdet, levels, normalise):
    "Every combination against the formula, in numpy up to the interpolation."
    parts, train, tau = make(), make(7, seed=5), 1.7
    total = 0
    for p, q in zip(parts, train):
        ell, seen = ((x.base + logdet * x.logdet).numpy().astype(float) for x in (p, q))
        if normalise == "train":
            ell = ell - seen.mean()
        if normalise == "paper":
            ell = ell - ell.max()
        total = (total
                 - up(torch.from_numpy(tau * np.exp(ell / tau) if levels == "probability" else ell), (16, 20)).numpy())
    score = Score(logdet=logdet, levels=levels, normalise=normalise, temperature=tau, smooth=0)
    np.testing.assert_allclose(combine(parts, (16, 20), score, calibration(train)).numpy(), total / 2, rtol=2e-5,
                               atol=2e-5)


def test_high_temperature_is_linear():
    "τ·exp(ℓ/τ) - τ goes to ℓ, and the ranking with it."
    parts = make(dtype=torch.float64)
    linear = combine(parts, 12, PLAIN)
    error = [(combine(parts, 12, replace(PLAIN, levels="probability", temperature=t)) + t - linear).abs().max()
             for t in (10.0, 1e3, 1e5)]
    assert error[0] > 50 * error[1] > 2500 * error[2] and error[2] < 1e-3


def test_unlikely_is_anomalous():
    "Where the likelihood falls, and nowhere else, the map rises."
    for score in (PLAIN, Score(smooth=0), PUBLISHED["fastflow"]):
        parts = make(1)
        stats = calibration(make(5, 9))
        before = combine(parts, 6, score, stats)
        parts[0].base[0, 2, 3] -= 2.0
        change = combine(parts, 6, score, stats) - before
        assert change[0, 2, 3] > 0 and (change != 0).sum() == 1


def levelled(parts, train, size, tau, share, entropy) -> np.ndarray:
    "How far each pixel is below the training images' ceiling, in numpy up to the interpolation; entropy or likelihood."
    total = ceiling = 0
    for p, q in zip(parts, train):
        value, seen = ((x.entropy if entropy else x.base + share * x.logdet).double().numpy() for x in (p, q))
        highest = 0.0 if entropy else seen.max()  # entropy 0: sure of the category
        total = total + tau * up(torch.from_numpy(np.exp((value - seen.mean()) / tau)), size).numpy()
        ceiling += tau * np.exp((highest - seen.mean()) / tau)
    return (ceiling - total) / len(parts)


CRITERIA = ("likelihood", "entropy", "product")


@pytest.mark.parametrize("criterion, share", [(c, s) for c in CRITERIA for s in (0.0, 0.5, 1.0)])
def test_criteria(criterion, share):
    """Each against the formula: the map of one, or the product of how far both are below their ceilings
    on training images, cut at zero."""
    parts, train, tau, size = make(classes=3), make(9, seed=5, classes=3), 1.3, (12, 20)
    parts[0].base[0] += 9.0  # likelier than any training position
    score = Score(logdet=share, temperature=tau, criterion=criterion, smooth=0)
    likelihood, entropy = (levelled(parts, train, size, tau, share, e) for e in (False, True))
    maps = combine(parts, size, score, calibration(train)).numpy()
    if criterion == "product":
        np.testing.assert_allclose(maps, likelihood.clip(0) * entropy.clip(0), rtol=2e-4, atol=2e-5)
        assert (likelihood < 0).any() and (entropy > 0.1).any()
    else:
        one = likelihood if criterion == "likelihood" else entropy
        np.testing.assert_allclose(maps - maps.mean(), one - one.mean(), rtol=2e-4, atol=2e-5)


def test_image_score_has_its_own_criterion():
    parts, stats = make(classes=3), calibration(make(6, 2, classes=3))
    score = Score(criterion="entropy", image_criterion="product", smooth=0)
    maps, images = score_batch(parts, 24, score, stats)
    torch.testing.assert_close(maps, combine(parts, 24, score, stats))
    behind = replace(score, criterion="product", logdet=score.image_logdet, temperature=score.image_temperature)
    torch.testing.assert_close(images, image_scores(combine(parts, 24, behind, stats), score))
    assert not torch.allclose(images, image_scores(maps, score), rtol=1e-3)


@pytest.mark.parametrize("criterion", ["entropy", "product"])
def test_unsure_is_anomalous(criterion):
    "Where the entropy rises, and nowhere else, the map rises; the log-determinant is in the product alone."
    parts, score = make(1, classes=3), Score(criterion=criterion, logdet=0.5, smooth=0)
    stats = calibration(make(5, 9, classes=3))
    parts[0].base[0, 2, 3] = -1.0
    before = combine(parts, 6, score, stats)
    parts[0].entropy[0, 2, 3] -= 0.5
    change = combine(parts, 6, score, stats) - before
    assert change[0, 2, 3] > 0 and (change != 0).sum() == 1
    parts[0].logdet[0, 4, 4] -= 1.0
    assert ((combine(parts, 6, score, stats) - before)[0, 4, 4] > 0) == (criterion == "product")


@pytest.mark.parametrize("align_corners", [True, False])
def test_aligned_corners(align_corners):
    "The corners of the map are those of the level, or not."
    parts, score = make(3, shapes=[(5, 4)]), replace(PLAIN, align_corners=align_corners)
    maps = combine(parts, (13, 9), score).numpy()
    expected = aligned(-parts[0].base.numpy(), (13, 9))
    assert np.allclose(maps, expected, atol=1e-5) == align_corners
    rows = [0, 3, 6, 9, 12]
    assert np.allclose(maps[:, rows][:, :, [0, -1]], -parts[0].base[:, :, [0, -1]].numpy(), atol=1e-5) == align_corners


@pytest.mark.parametrize("score",
                         [Score(), PLAIN, PUBLISHED["fastflow"], Score(levels="linear"),
                          Score(image_logdet=1.0, image="max"), Score(image="top", top=0.1)]
                         + [Score(criterion=c, image_criterion=i) for c in CRITERIA for i in CRITERIA])
def test_images_do_not_see_each_other(score):
    "Each alone scores as it does in the batch."
    parts, stats = make(5, classes=3), calibration(make(6, 3, classes=3))
    maps, images = score_batch(parts, 20, score, stats)
    for i in range(5):
        alone, own = score_batch(of(parts, i), 20, score, stats)
        torch.testing.assert_close(alone[0], maps[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own[0], images[i], rtol=1e-6, atol=1e-6)


def test_paper_normalisation_sees_the_test_set():
    "What makes it unfit for single images: another image changes the scores."
    parts, score = make(5), PUBLISHED["cflow"]
    few, all_ = combine(of(parts, 0, 1), 12, score), combine(parts, 12, score)
    assert not torch.allclose(few, all_[:2])


def test_train_needs_calibration():
    with pytest.raises(ValueError, match="call fit first"):
        combine(make(), 8, Score())
    combine(make(), 8, Score(logdet=0.5, normalise="none"))


@pytest.mark.parametrize("criterion", ["entropy", "product"])
def test_only_mixtures_have_an_entropy(criterion):
    "Without one, map and image score by it are refused, with the remedy."
    stats = calibration(make())
    for score in (Score(criterion=criterion), Score(image_criterion=criterion)):
        with pytest.raises(ValueError, match=f"'{criterion}' needs the entropy.*criterion='likelihood'"):
            score_batch(make(), 8, score, stats)


# -- smoothing -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma, shape",
                         [(0.4, (40, 47)), (1.0, (40, 47)), (2.5, (40, 47)), (4.0, (40, 47)), (2.0, (3, 5)),
                          (10.0, (3, 5)), (3.0, (1, 2))])
def test_gaussian_is_scipys(sigma, shape):
    "As by default there, also where the kernel is wider than the map."
    from scipy.ndimage import gaussian_filter

    maps = torch.randn(2, *shape, dtype=torch.float64)
    expected = np.stack([gaussian_filter(m, sigma) for m in maps.numpy()])
    np.testing.assert_allclose(gaussian(maps, sigma).numpy(), expected, atol=1e-12)


def test_gaussian_at_the_limits():
    "Sigma 0 changes nothing; a constant stays, and so does the sum."
    maps = torch.randn(2, 9, 9)
    assert gaussian(maps, 0) is maps
    for shape in ((1, 3, 5), (1, 9, 9), (1, 2, 2)):
        torch.testing.assert_close(gaussian(torch.full(shape, 2.5), 10.0), torch.full(shape, 2.5))
        noise = torch.randn(shape)
        torch.testing.assert_close(gaussian(noise, 1.5).sum(), noise.sum())


def test_smoothing_scales_with_the_map():
    "`smooth` counts pixels of a map 256 wide."
    parts, size = make(1, shapes=[(8, 8)]), 64
    rough = combine(parts, size, PLAIN)
    torch.testing.assert_close(combine(parts, size, replace(PLAIN, smooth=8.0)), gaussian(rough, 2.0))
    assert not torch.allclose(gaussian(rough, 2.0), gaussian(rough, 2.3))


# -- image scores --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("top, pixels", [(0.01, 4), (0.1, 40), (1.0, 400), (1e-6, 1), (0.0063, 3)])
def test_top_share(top, pixels):
    "The mean of the highest share of pixels, at least one of them."
    maps = torch.randn(3, 20, 20)
    expected = np.sort(maps.flatten(1).numpy(), 1)[:, -pixels:].mean(1)
    np.testing.assert_allclose(image_scores(maps, Score(image="top", top=top)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_maximum():
    maps = torch.randn(3, 20, 20)
    assert torch.equal(image_scores(maps, Score(image="max", top=0.5)), maps.flatten(1).amax(1))


@pytest.mark.parametrize("logdet, smooth", [(0.0, 0.0), (0.5, 0.0), (0.5, 9.0)])
@pytest.mark.parametrize("image_logdet, image_smooth, tau",
                         [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.5, 5.0, 1.0), (0.5, 0.0, 2.0)])
def test_image_score_has_its_own_likelihood(logdet, smooth, image_logdet, image_smooth, tau):
    "The map shows one likelihood, the image score may stand on another, at another temperature, smoothed otherwise."
    parts, stats = make(), calibration(make(6, 2))
    score = Score(logdet=logdet, smooth=smooth, temperature=1.0, image_logdet=image_logdet, image_smooth=image_smooth,
                  image_temperature=tau, image="top", top=0.02)
    maps, images = score_batch(parts, 48, score, stats)
    torch.testing.assert_close(maps, combine(parts, 48, score, stats))
    behind = combine(parts, 48, Score(logdet=image_logdet, smooth=image_smooth, temperature=tau), stats)
    torch.testing.assert_close(images, image_scores(behind, score))
    if (logdet, smooth, 1.0) != (image_logdet, image_smooth, tau):
        assert not torch.allclose(images, image_scores(maps, score), rtol=1e-4)


# -- bad settings --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value, allowed", [
    ("levels", "sum", "linear, probability"), ("normalise", "test", "train, paper, none"),
    ("image", "mean", "max, top"),
    ("top", 0.0, "(0, 1]"), ("top", 1.5, "(0, 1]"), ("top", float("nan"), "(0, 1]"), ("temperature", -2.0, "positive"),
    ("temperature", 0.0, "positive"),
    ("temperature", float("nan"), "positive"), ("image_temperature", 0.0, "positive"),
    ("image_temperature", float("nan"), "positive"),
    ("logdet", -0.1, "[0, 1]"), ("logdet", 1.5, "[0, 1]"), ("logdet", float("nan"), "[0, 1]"),
    ("image_logdet", 2.0, "[0, 1]"), ("criterion", "sum", "likelihood, entropy, product"),
    ("image_criterion", "max", "likelihood, entropy, product"),
])
def test_impossible_settings(field, value, allowed):
    "Named, with what is allowed."
    with pytest.raises(ValueError) as error:
        Score(**{field: value})
    assert field.removeprefix("image_temp") in str(error.value)
    assert str(value) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize("field", ["smooth", "image_smooth"])
def test_negative_smoothing(field):
    with pytest.raises(ValueError, match="smooth.* must not be negative"):
        Score(**{field: -1.0})


@pytest.mark.parametrize("field", ["criterion", "image_criterion"])
@pytest.mark.parametrize("bad", [dict(normalise="none"), dict(levels="linear")], ids=str)
def test_product_of_maps_that_change_sign(field, bad):
    with pytest.raises(ValueError, match="'product' multiplies maps that must not change sign"):
        Score(**{field: "product", "logdet": 1.0} | bad)
    Score(**{field: "entropy", "logdet": 1.0} | bad)


@pytest.mark.parametrize("field", ["logdet", "image_logdet"])
@pytest.mark.parametrize("normalise", ["none", "paper"])
def test_share_chosen_without_training_images(field, normalise):
    with pytest.raises(ValueError, match=f"logdet None.*normalise='{normalise}'"):
        Score(**dict(logdet=0.5, image_logdet=0.5, normalise=normalise) | {field: None})


def test_every_level_has_its_calibration():
    "A calibration of other levels is refused, instead of leaving some out."
    parts = make()
    for stats in (calibration(make(6, 2))[:1], calibration(make(6, 2))[[0, 1, 0, 1]]):
        with pytest.raises(ValueError, match="argument"):
            combine(parts, 32, Score(), stats)


def test_share_of_a_level_that_never_changes():
    "No deviation at all says nothing: latent only, never NaN."
    still = calibration(make(1, shapes=[(1, 1)]))
    assert logdet_share(still).tolist() == [0.0]


def test_default_settings_are_fixed():
    "Numbers in the docs and in people's tables are under these; whoever changes one says so."
    assert asdict(Score()) == dict(
        logdet=None, criterion="likelihood", levels="probability", temperature=0.7, normalise="train",
        align_corners=False, smooth=3.0, image="max", top=0.001, image_logdet=0.0, image_temperature=1.0,
        image_criterion="likelihood", image_smooth=0.0)
