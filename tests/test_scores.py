"""Maps and image scores against formulas written out here: every switch, the published forms, calibration, bad settings."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowrepro.scores import PUBLISHED, Parts, Score, calibration, combine, gaussian, image_scores, join, score_batch

SHAPES = [(6, 6), (3, 5)]  # of the levels


def make(n=4, seed=0, shapes=SHAPES, dtype=torch.float32) -> list[Parts]:
    "Parts of n images, levels of different scale."
    g = torch.Generator().manual_seed(seed)
    draw = lambda s, k: torch.randn(n, *s, generator=g).to(dtype) * (k + 1)
    return [Parts(-draw(s, k).square() / 2, draw(s, k) * 0.3 - k) for k, s in enumerate(shapes)]


def of(parts, index) -> list[Parts]:
    return [Parts(*(t[index] for t in p)) for p in parts]


def up(x, size, align_corners=False):
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


PLAIN = Score(logdet=0.0, image_logdet=0.0, levels="linear", normalise="none", smooth=0, image="max")


# -- the published forms -------------------------------------------------------------------------------------------

def test_fastflow_as_published():
    "The mean over levels of -exp(-mean of z²/2), interpolated; the maximum of the map. The log-determinant plays no part."
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
    maps = combine(parts, 24, PUBLISHED["cflow"], align_corners=True)
    torch.testing.assert_close(maps, -total / 2)
    torch.testing.assert_close(total.max() - total, 2 * (maps - maps.min()))


def test_published_settings_are_fixed():
    "A change of the default does not change them."
    form = dict(levels="probability", temperature=1.0, smooth=0.0, image="max", image_smooth=0.0)
    own = {"fastflow": dict(logdet=0.0, image_logdet=0.0, normalise="none"), "cflow": dict(logdet=1.0, image_logdet=1.0, normalise="paper")}
    assert {name: {k: v for k, v in asdict(s).items() if k != "top"} for name, s in PUBLISHED.items()} == {name: form | o for name, o in own.items()}


# -- each switch ---------------------------------------------------------------------------------------------------

def test_loglik():
    p = Parts(torch.full((1, 2, 2), -3.0), torch.full((1, 2, 2), 0.5))
    assert torch.equal(p.loglik(), torch.full((1, 2, 2), -2.5)) and torch.equal(p.loglik(0.0), p.base) and torch.equal(p.loglik(0.5), torch.full((1, 2, 2), -2.75))


def test_join():
    a, b = make(2, 1), make(3, 2)
    joined = join([a, b])
    assert [p.base.shape for p in joined] == [(5, *s) for s in SHAPES]
    assert all(torch.equal(j.logdet, torch.cat([p.logdet, q.logdet])) for j, p, q in zip(joined, a, b))
    assert all(torch.equal(j.base[2:], q.base) for j, q in zip(joined, b))


@pytest.mark.parametrize("shift", [0.0, 3e4])
def test_calibration(shift):
    "The means of a and j of each level; far from zero as well."
    parts = [Parts(p.base.double() + shift, p.logdet.double()) for p in make(6)]
    stats = calibration(parts)
    assert stats.shape == (2, 2) and stats.dtype == torch.float32
    np.testing.assert_allclose(stats, [[p.base.numpy().mean(), p.logdet.numpy().mean()] for p in parts], rtol=1e-5)
    assert len(set(stats.flatten().tolist())) == 4


def test_calibration_levels_the_levels():
    "On the training images each level's ℓ has mean zero, whatever the share of the log-determinant; a constant of a level is gone."
    parts = make(6)
    shifted = [Parts(p.base + 5 * l, p.logdet - 3 * l) for l, p in enumerate(parts)]
    for share in (0.0, 0.5, 1.0):
        score = replace(PLAIN, logdet=share, normalise="train")
        one = [combine([p], p.base.shape[1:], score, calibration([p])) for p in parts]
        assert all(abs(m.mean()) < 1e-5 for m in one)
        torch.testing.assert_close(combine(shifted, 8, score, calibration(shifted)), combine(parts, 8, score, calibration(parts)), rtol=1e-4, atol=1e-4)


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
        total = total - up(torch.from_numpy(tau * np.exp(ell / tau) if levels == "probability" else ell), (16, 20)).numpy()
    score = Score(logdet=logdet, levels=levels, normalise=normalise, temperature=tau, smooth=0)
    np.testing.assert_allclose(combine(parts, (16, 20), score, calibration(train)).numpy(), total / 2, rtol=2e-5, atol=2e-5)


def test_high_temperature_is_linear():
    "τ·exp(ℓ/τ) - τ goes to ℓ, and the ranking with it."
    parts = make(dtype=torch.float64)
    linear = combine(parts, 12, PLAIN)
    error = [(combine(parts, 12, replace(PLAIN, levels="probability", temperature=t)) + t - linear).abs().max() for t in (10.0, 1e3, 1e5)]
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


@pytest.mark.parametrize("score", [Score(), PLAIN, PUBLISHED["fastflow"], Score(levels="linear"), Score(image_logdet=True, image="max")])
def test_images_do_not_see_each_other(score):
    "Each alone scores as it does in the batch."
    parts, stats = make(5), calibration(make(6, 3))
    maps, images = score_batch(parts, 20, score, stats)
    for i in range(5):
        alone, own = score_batch(of(parts, slice(i, i + 1)), 20, score, stats)
        torch.testing.assert_close(alone[0], maps[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own[0], images[i], rtol=1e-6, atol=1e-6)


def test_paper_normalisation_sees_the_test_set():
    "What makes it unfit for single images: another image changes the scores."
    parts, score = make(5), PUBLISHED["cflow"]
    few, all_ = combine(of(parts, slice(0, 2)), 12, score), combine(parts, 12, score)
    assert not torch.allclose(few, all_[:2])


def test_train_needs_calibration():
    with pytest.raises(ValueError, match="call fit first"):
        combine(make(), 8, Score())
    combine(make(), 8, replace(Score(), normalise="none"))


# -- smoothing -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 4.0])
def test_gaussian_is_scipys(sigma):
    from scipy.ndimage import gaussian_filter

    maps = torch.randn(2, 40, 47, dtype=torch.float64)
    expected = np.stack([gaussian_filter(m, sigma, mode="mirror", truncate=4.0) for m in maps.numpy()])
    np.testing.assert_allclose(gaussian(maps, sigma).numpy(), expected, atol=1e-12)


def test_gaussian_at_the_limits():
    "Sigma 0 changes nothing; a kernel wider than the map is cut; a constant stays."
    maps = torch.randn(2, 9, 9)
    assert gaussian(maps, 0) is maps
    for shape in ((1, 3, 5), (1, 9, 9), (1, 2, 2)):
        torch.testing.assert_close(gaussian(torch.full(shape, 2.5), 10.0), torch.full(shape, 2.5))


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
    np.testing.assert_allclose(image_scores(maps, Score(top=top)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_maximum():
    maps = torch.randn(3, 20, 20)
    assert torch.equal(image_scores(maps, Score(image="max", top=0.5)), maps.flatten(1).amax(1))


@pytest.mark.parametrize("logdet, smooth", [(0.0, 0.0), (0.5, 0.0), (0.5, 9.0)])
@pytest.mark.parametrize("image_logdet, image_smooth", [(0.0, 0.0), (1.0, 0.0), (0.5, 5.0)])
def test_image_score_has_its_own_likelihood(logdet, smooth, image_logdet, image_smooth):
    "The map shows one likelihood, the image score may stand on another, smoothed otherwise."
    parts, stats = make(), calibration(make(6, 2))
    score = Score(logdet=logdet, smooth=smooth, image_logdet=image_logdet, image_smooth=image_smooth, top=0.02)
    maps, images = score_batch(parts, 48, score, stats)
    torch.testing.assert_close(maps, combine(parts, 48, score, stats))
    behind = combine(parts, 48, Score(logdet=image_logdet, smooth=image_smooth), stats)
    torch.testing.assert_close(images, image_scores(behind, score))
    if (logdet, smooth) != (image_logdet, image_smooth):
        assert not torch.allclose(images, image_scores(maps, score), rtol=1e-4)


# -- bad settings --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value, allowed", [
    ("levels", "sum", "linear, probability"), ("normalise", "test", "train, paper, none"), ("image", "mean", "max, top"),
    ("top", 0.0, "(0, 1]"), ("top", 1.5, "(0, 1]"), ("top", float("nan"), "(0, 1]"), ("temperature", -2.0, "positive"), ("temperature", 0.0, "positive"),
])
def test_impossible_settings(field, value, allowed):
    "Named, with what is allowed."
    with pytest.raises(ValueError) as error:
        Score(**{field: value})
    assert field in str(error.value) and str(value) in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize("field", ["smooth", "image_smooth"])
def test_negative_smoothing(field):
    with pytest.raises(ValueError, match="smooth.* must not be negative"):
        Score(**{field: -1.0})
