"""One battery over every base distribution: mass one, forms, formulas, gradients, draws,
independence, storage, precision, memory, labels."""
import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from conftest import Largest, close
from flowrepro.bases import (
    Base, ClassMixture, DiagonalNormal, HierarchicalMixture, StandardNormal, affinity, main_centres, own_affinity
)


@dataclass(frozen=True)
class Case:
    "One kind of base, dense (P positions) or spatial (H, W)."

    kind: type
    classes: int = 0  # 0: a base without categories
    centres: int = 0
    settings: dict = field(default_factory=dict)  # of a `DiagonalNormal`
    channels: int = 5
    positions: tuple = (2, 3)

    def make(self, dim=-1, channels=None, positions=None) -> Base:
        "As the class makes it."
        channels, positions = channels or self.channels, positions or self.positions
        if self.kind is DiagonalNormal:
            at = () if self.settings.get("per") != "position" else positions if dim == 1 else (math.prod(positions),)
            return DiagonalNormal(channels, dim, **self.settings, positions=at)
        return self.kind(*((self.classes,) * (self.classes > 0)), channels, *((self.centres,) * (self.centres > 0)),
                         dim=dim)

    def build(self, dim=-1, dtype=torch.float64, seed=0, **kw) -> Base:
        "With random parameters (those that are trained)."
        torch.manual_seed(seed)
        base = self.make(dim, **kw).double()
        with torch.no_grad():
            for name, p in base.named_parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p) * (0.4 if name in ("log_scale", "phi", "psi") else 1.2))
        return base.to(dtype)

    def labels(self, n: int) -> torch.Tensor:
        return torch.arange(n).flip(0) % max(1, self.classes)

    def rows(self, n=4, dtype=torch.float64, scale=2.0, seed=1) -> torch.Tensor:
        "Inputs (n, P, D) of a dense base."
        g = torch.Generator().manual_seed(seed)
        return (torch.randn(n, math.prod(self.positions), self.channels, generator=g, dtype=torch.float64)
                * scale).to(dtype)

    def spatial(self, rows: torch.Tensor) -> torch.Tensor:
        "The same for a spatial base, (n, D, H, W)."
        return rows.transpose(1, 2).unflatten(2, self.positions)

    def each_label(self, n: int) -> list:
        "No label, and labels where there are categories."
        return [None] + [self.labels(n)] * (self.classes > 0)


CASES = {
    "standard": Case(StandardNormal),
    "diagonal": Case(DiagonalNormal),
    "diagonal scalar": Case(DiagonalNormal, settings=dict(per="scalar")),
    "diagonal position": Case(DiagonalNormal, settings=dict(per="position")),
    "diagonal mean only": Case(DiagonalNormal, settings=dict(scale=False)),
    "diagonal scalar mean only": Case(DiagonalNormal, settings=dict(per="scalar", scale=False)),
    "classes": Case(ClassMixture, classes=3),
    "one class": Case(ClassMixture, classes=1),
    "more classes than channels": Case(ClassMixture, classes=9),
    "hierarchy": Case(HierarchicalMixture, classes=3, centres=4),
    "hierarchy, one class": Case(HierarchicalMixture, classes=1, centres=3),
    "hierarchy, one centre": Case(HierarchicalMixture, classes=4, centres=1),
    "hierarchy, one of both": Case(HierarchicalMixture, classes=1, centres=1),
    "hierarchy, one position": Case(HierarchicalMixture, classes=3, centres=2, positions=(1, 1)),
    "classes, one position": Case(ClassMixture, classes=2, positions=(1, 1)),
}
MIXTURES = {k: c for k, c in CASES.items() if c.classes}


def over(cases: dict):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def grid(channels: int, half: float = 13.0, step: float = 0.1) -> tuple[torch.Tensor, float]:
    "Points (n, D) of a square grid in D = 1 or 2 dimensions, and the volume of a cell."
    axis = torch.arange(-half, half, step, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * channels).view(-1, channels), step**channels


def density(base: Base, points: torch.Tensor, label: int | None) -> torch.Tensor:
    "p at points (n, D); for a base with values of its own at each position, (P, n)."
    own = None if label is None else torch.tensor([label])
    if getattr(base, "mean", None) is not None and base.mean.ndim > 1:
        n = len(points)
        z = points[:, None].expand(-1, base.mean.shape[0], -1)
        return base.log_prob(z).exp().T.reshape(-1, n)
    return base.log_prob(points[None], own).exp()


def direct(base: Base, rows: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    "log p of rows (B, P, D) by `torch.distributions`."
    if isinstance(base, StandardNormal):
        return Normal(0.0, 1.0).log_prob(rows).sum(-1)
    if isinstance(base, DiagonalNormal):
        return Normal(base.mean, base.log_scale.exp()).log_prob(rows).sum(-1)
    centres, logits = base.mu[:, None], torch.zeros(base.classes, 1, dtype=rows.dtype)
    if isinstance(base, HierarchicalMixture):
        main = base.mu.detach()[:, None]
        centres, logits = torch.cat([main, main + base.delta], 1), base.psi
    inside = logits.log_softmax(-1)
    mix = lambda weights, mu: MixtureSameFamily(Categorical(logits=weights),
                                                MultivariateNormal(mu, torch.eye(rows.shape[-1], dtype=rows.dtype)))
    if label is None:
        return mix((base.phi.log_softmax(0)[:, None] + inside).flatten(), centres.flatten(0, 1)).log_prob(rows)
    return torch.stack([mix(inside[y], centres[y]).log_prob(r) for r, y in zip(rows, label)])


# -- the density ---------------------------------------------------------------------------------------------------

@over(CASES)
@pytest.mark.parametrize("channels", [1, 2])
def test_integrates_to_one(case, channels):
    "As a marginal and in each category, at each position."
    base = case.build(channels=channels)
    points, cell = grid(channels)
    with torch.no_grad():
        for label in (None, *range(case.classes)):
            mass = density(base, points, label).sum(-1) * cell
            close(mass, torch.ones_like(mass), 1e-9)


@over(CASES)
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0], ids=["near", "usual", "far"])
def test_log_prob_by_torch_distributions(case, scale):
    "Also so far away that every density is zero in floating point."
    base, rows = case.build(), case.rows(scale=scale)
    for label in case.each_label(len(rows)):
        close(base.log_prob(rows, label), direct(base, rows, label))


@over(CASES)
def test_starts_where_it_should(case):
    """A learnable normal is N(0, I) at first; mixtures weigh all alike, have the published main
    centres, and offsets about √D long."""
    torch.manual_seed(0)
    base, rows = case.make(), case.rows(dtype=torch.float32)
    if not case.classes:
        assert torch.equal(base.log_prob(rows), StandardNormal(case.channels).log_prob(rows))
        return
    assert not base.phi.any() and (not case.centres or not base.psi.any())
    if case.classes <= case.channels:
        assert torch.equal(base.mu, main_centres(case.classes, case.channels))
    if case.centres > 1:
        assert 0.3 < base.delta.std() < 2


@over(CASES)
def test_shapes(case):
    "One number a position, whatever the number of axes, contiguous or not; none of them from an image alone."
    dense, spatial, rows = case.build(), case.build(dim=1), case.rows()
    n, p, d = rows.shape
    for label in case.each_label(n):
        out = dense.log_prob(rows, label)
        assert out.shape == (n, p) and spatial.log_prob(case.spatial(rows), label).shape == (n, *case.positions)
        if case.settings.get("per") != "position":
            close(dense.log_prob(rows.unflatten(1, case.positions), label), out.unflatten(1, case.positions))
            close(dense.log_prob(rows[:, 0], label), out[:, 0])  # (B, D)
        close(spatial.log_prob(case.spatial(rows).contiguous(), label), spatial.log_prob(case.spatial(rows), label))


@over(CASES)
def test_no_images(case):
    "An empty batch has no densities, of the right shape."
    dense, spatial, rows = case.build(), case.build(dim=1), case.rows(n=0)
    for label in case.each_label(0):
        assert spatial.log_prob(case.spatial(rows), label).shape == (0, *case.positions)
        assert dense.log_prob(rows, label).shape == rows.shape[:2]


def to_spatial(case: Case, dense: Base) -> Base:
    "The spatial base of the same values."
    spatial = case.make(dim=1).to(torch.float64)
    move = lambda v, w: v.T.reshape(w.shape) if v.ndim == 2 and w.ndim == 3 else v.reshape(w.shape)
    spatial.load_state_dict({k: move(v, spatial.state_dict()[k]) for k, v in dense.state_dict().items()})
    return spatial


@over(CASES)
def test_dense_is_spatial(case):
    "The same numbers and gradients for the same values, channels last or second."
    dense, rows = case.build(), case.rows().requires_grad_()
    spatial = to_spatial(case, dense)
    for label in case.each_label(len(rows)):
        out = [base.log_prob(z, label) for base, z in ((dense, rows), (spatial, case.spatial(rows)))]
        close(out[1].flatten(1), out[0])
        weights = torch.randn_like(out[0])
        gradients = []
        for base, o in zip((dense, spatial), out):
            base.zero_grad(), setattr(rows, "grad", None)
            (o.flatten(1) * weights).sum().backward()
            gradients.append({k: p.grad for k, p in base.named_parameters()} | {"z": rows.grad})
        for name, g in gradients[0].items():
            assert (g is None) == (gradients[1][name] is None), name
            if g is not None:
                other = gradients[1][name]
                close(other.flatten(1).T if (g.ndim, other.ndim) == (2, 3) else other.reshape(g.shape), g)


@over(MIXTURES)
def test_marginal_is_the_weighted_sum_over_categories(case):
    base, rows = case.build(), case.rows()
    each = torch.stack([base.log_prob(rows, torch.full((len(rows),), y)) for y in range(case.classes)])
    weights = base.phi.softmax(0)
    close(base.log_prob(rows).exp(), (each.exp() * weights[:, None, None]).sum(0))
    close(base.class_log_prob(rows) - rows.square().sum(-1, keepdim=True) / 2 - case.channels * math.log(2 * math.pi)
          / 2, each.movedim(0, -1))


@over({k: c for k, c in CASES.items() if not c.classes})
def test_labels_are_ignored_without_categories(case):
    base, rows = case.build(), case.rows()
    assert torch.equal(base.log_prob(rows, torch.tensor([7, -3, 0, 1])), base.log_prob(rows))


@over(MIXTURES)
def test_posterior_for_the_entropy(case):
    "Of the main centres with equal weights, whatever the weights are."
    base, rows = case.build(), case.rows()
    q = base.log_posterior(rows)
    close(q.exp().sum(-1), torch.ones(rows.shape[:2], dtype=rows.dtype))
    close(q, (-(rows[:, :, None] - base.mu).square().sum(-1) / 2).log_softmax(-1))
    close(to_spatial(case, base).log_posterior(case.spatial(rows)), q)


@over(CASES)
def test_per_dimension(case):
    "log p over D without its constant: −‖z‖²/2D for N(0, I)."
    base, rows = case.build(), case.rows()
    for label in case.each_label(len(rows)):
        close(base.per_dimension(rows, label), base.log_prob(rows, label) / case.channels + math.log(2 * math.pi) / 2)
    close(StandardNormal(case.channels).per_dimension(rows), -rows.square().mean(-1) / 2)


def test_a_hierarchy_of_one_centre_is_a_class_mixture():
    "In every number; only that its main centres do not move."
    case = CASES["hierarchy, one centre"]
    base, rows = case.build(), case.rows()
    plain = Case(ClassMixture, classes=case.classes).build()
    plain.load_state_dict({k: v for k, v in base.state_dict().items() if k in ("mu", "phi")})
    for label in case.each_label(len(rows)):
        close(base.log_prob(rows, label), plain.log_prob(rows, label))
    assert base.delta.shape == (case.classes, 0, case.channels)


def test_a_mixture_of_one_is_a_normal():
    base, rows = CASES["hierarchy, one of both"].build(), CASES["standard"].rows()
    for label in (None, torch.zeros(len(rows), dtype=torch.long)):
        close(base.log_prob(rows, label), StandardNormal(5).log_prob(rows - base.mu.detach()[0]))


# -- gradients -----------------------------------------------------------------------------------------------------

@over(CASES)
@pytest.mark.parametrize("dim", [-1, 1], ids=["dense", "spatial"])
def test_gradients_by_finite_differences(case, dim):
    "Of the input and every trained parameter; the main centres of a hierarchy are not moved by its densities."
    base, rows = case.build(dim), case.rows(n=3)
    z = (case.spatial(rows) if dim == 1 else rows).detach().requires_grad_()
    trained = {k: p for k, p in base.named_parameters()
               if p.requires_grad and p.numel() and not (case.centres and k == "mu")}
    for label in case.each_label(len(z)):
        def f(z, *values):
            return torch.func.functional_call(base, dict(zip(trained, values)), (z, label))
        base.forward = base.log_prob
        assert torch.autograd.gradcheck(f, (z, *(p.detach().clone().requires_grad_() for p in trained.values())))


USED = {StandardNormal: (set(), set()), DiagonalNormal: ({"mean", "log_scale"}, set()),
        ClassMixture: ({"mu", "phi"}, {"mu"}), HierarchicalMixture: ({"delta", "phi", "psi"}, {"delta", "psi"})}


@over(CASES)
def test_what_learns(case):
    """The marginal trains everything but a hierarchy's main centres, the density of a category its own centres and
    weights; 'mean only' no scale."""
    base, rows = case.build(), case.rows()
    for label in case.each_label(len(rows)):
        base.zero_grad(set_to_none=True)
        if not list(base.parameters()):
            continue
        base.log_prob(rows, label).sum().backward()
        expected = (USED[case.kind][label is not None]
                    - ({"log_scale"} if not case.settings.get("scale", True) else set()))
        assert {k for k, p in base.named_parameters() if p.grad is not None} == expected
        for k in expected:
            g = dict(base.named_parameters())[k].grad
            alone = k in ("phi", "psi") and g.shape[-1] == 1  # the weight of a single one is always 1
            assert g.isfinite().all() and (not g.numel() or bool(g.any()) != alone), k


@over(MIXTURES)
def test_a_category_that_is_absent_does_not_move(case):
    base, rows = case.build(), case.rows()
    base.log_prob(rows, torch.zeros(len(rows), dtype=torch.long)).sum().backward()
    for name in ("mu", "delta", "psi"):
        p = getattr(base, name, None)
        if p is not None and p.grad is not None:
            assert not p.grad[1:].any(), name


# -- drawing -------------------------------------------------------------------------------------------------------

def drawable(case: Case) -> bool:
    return case.settings.get("per") != "position"


@over({k: c for k, c in CASES.items() if drawable(c)})
def test_draws_follow_the_density(case):
    """In two dimensions, E[cos t·z] and E[sin t·z] of 40000 draws against the integral over the grid: within 4.5
    standard errors, of the marginal and each category."""
    n, base = 40_000, case.build(channels=2)
    points, cell = grid(2, step=0.2)
    g = torch.Generator().manual_seed(5)
    t = torch.tensor([[0.3, 0], [0, 0.3], [0.8, 0.5], [-0.5, 0.9], [1.5, -0.2], [0.1, -1.8]], dtype=torch.float64)
    waves = lambda x: torch.cat([(x @ t.T).cos(), (x @ t.T).sin()], dim=1)
    with torch.no_grad():
        for label in (None, *range(case.classes)):
            own = None if label is None else torch.full((n,), label)
            z = base.sample(n, own, g).double()
            assert z.shape == (n, 2) and not z.requires_grad
            exact = (density(base, points, label)[0, :, None] * waves(points)).sum(0) * cell
            drawn = waves(z)
            error = (drawn.mean(0) - exact).abs() / drawn.std(0) * math.sqrt(n)
            assert error.max() < 4.5, f"label {label}: {error.max():.1f} standard errors"


@over({k: c for k, c in CASES.items() if drawable(c)})
def test_moments_of_draws(case):
    "Mean and covariance in five dimensions, by the law of total variance, within 5 standard errors."
    n, base = 30_000, case.build()
    z = base.sample(n, generator=torch.Generator().manual_seed(7)).double()
    with torch.no_grad():
        if case.classes:
            inside = base.psi.softmax(-1) if case.centres else torch.ones(case.classes, 1, dtype=torch.float64)
            weights = (base.phi.softmax(0)[:, None] * inside).flatten()
            centres = (base.all_centres() if case.centres else base.mu[:, None]).flatten(0, 1)
            mean = weights @ centres
            cov = torch.eye(case.channels) + (centres - mean).T @ (weights[:, None] * (centres - mean))
        else:
            mean = getattr(base, "mean", torch.zeros(1)).expand(case.channels).double()
            cov = getattr(base, "log_scale", torch.zeros(1)).exp().square().expand(case.channels).diag().double()
        centred = z - mean
        products = centred[:, :, None] * centred[:, None]
        assert ((z.mean(0) - mean).abs() < 5 * z.std(0) / n**0.5).all()
        assert ((products.mean(0) - cov).abs() < 5 * products.std(0) / n**0.5).all()


@over({k: c for k, c in CASES.items() if drawable(c)})
def test_draws_are_seeded(case):
    base = case.build(dtype=torch.float32)
    draw = lambda seed: base.sample(6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2)) and draw(1).dtype == torch.float32
    assert base.sample(0).shape == (0, case.channels)


def test_draws_of_mixed_labels():
    "Each row is drawn from its own category."
    base = ClassMixture(3, 6).double()
    with torch.no_grad():
        base.mu.mul_(20)
    y = torch.tensor([2, 0, 1, 1, 0, 2] * 20)
    z = base.sample(len(y), y).double()
    assert torch.equal(base.class_log_prob(z[None]).argmax(-1)[0], y)


def test_no_draws_from_many_distributions():
    with pytest.raises(ValueError, match="each position"):
        CASES["diagonal position"].build().sample(3)


# -- independence, storage, precision ------------------------------------------------------------------------------

@over(CASES)
def test_images_do_not_see_each_other(case):
    "Alone, in another order, or beside something else: the same number."
    base, rows = case.build(), case.rows(n=5)
    for label in case.each_label(5):
        out, own = base.log_prob(rows, label), (lambda i: None if label is None else label[i])
        for i in range(5):
            close(base.log_prob(rows[i:i + 1], own(slice(i, i + 1))), out[i:i + 1])
        order = torch.tensor([3, 1, 4, 0, 2])
        close(base.log_prob(rows[order], own(order)), out[order])
        changed = rows.clone()
        changed[2] += 1.0
        again = base.log_prob(changed, label)
        close(again[[0, 1, 3, 4]], out[[0, 1, 3, 4]])
        assert (again[2] != out[2]).all()


@over({k: c for k, c in CASES.items() if drawable(c)})
def test_positions_do_not_see_each_other(case):
    "A position alone in its image (another way to its centres) gives what it gives among others."
    base, rows = case.build(), case.rows()
    for label in case.each_label(len(rows)):
        alone = torch.cat([base.log_prob(rows[:, p:p + 1], label) for p in range(rows.shape[1])], dim=1)
        close(alone, base.log_prob(rows, label))


@over(CASES)
@pytest.mark.parametrize("dim", [-1, 1], ids=["dense", "spatial"])
def test_save_and_load(case, dim, tmp_path):
    "Through a file of tensors alone; names and shapes of another seed's base fit."
    base, other, rows = case.build(dim), case.build(dim, seed=9), case.rows()
    z = case.spatial(rows) if dim == 1 else rows
    torch.save(base.state_dict(), tmp_path / "base.pt")
    other.load_state_dict(torch.load(tmp_path / "base.pt", weights_only=True))
    for label in case.each_label(len(z)):
        assert torch.equal(base.log_prob(z, label), other.log_prob(z, label))


@over(CASES)
@pytest.mark.parametrize("dim", [-1, 1], ids=["dense", "spatial"])
def test_autocast_keeps_float32(case, dim):
    "Under bfloat16 autocast, numbers, gradients and posteriors are those of float32, to the bit."
    base, rows = case.build(dim, dtype=torch.float32), case.rows(dtype=torch.float32)
    z = (case.spatial(rows) if dim == 1 else rows).requires_grad_()
    for label in case.each_label(len(z)):
        results = []
        for enabled in (False, True):
            base.zero_grad(), setattr(z, "grad", None)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = base.log_prob(z, label)
                extra = base.log_posterior(z) if case.classes else out
            out.sum().backward()
            assert out.dtype == extra.dtype == z.grad.dtype == torch.float32
            results.append(
                [out.detach(), extra.detach(), z.grad, *(p.grad for p in base.parameters() if p.grad is not None)])
        for plain, cast in zip(*results, strict=True):
            assert torch.equal(plain, cast)


@over(CASES)
def test_float32_is_near_float64(case):
    base, rows = case.build(), case.rows()
    for label in case.each_label(len(rows)):
        exact = base.double().log_prob(rows, label)
        close(base.float().log_prob(rows.float(), label).double(), exact, 2e-6)


# -- memory --------------------------------------------------------------------------------------------------------

def gathered(base: HierarchicalMixture, rows: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    "The straightforward form, which gathers each row's own centres, (N, M, D)."
    z, y = rows.flatten(0, 1), label.repeat_interleave(rows.shape[1])
    squares = (z[:, None] - base.all_centres()[y]).square().sum(-1)
    return ((base.psi[y].log_softmax(-1) - squares / 2).logsumexp(-1).view(rows.shape[:2]) - rows.shape[-1]
            * math.log(2 * math.pi) / 2)


@pytest.mark.parametrize("images, positions", [(6, (5, 4)), (120, (1, 1)), (2, (9, 7)), (1, (10, 12))])
@pytest.mark.parametrize("dim", [-1, 1], ids=["dense", "spatial"])
def test_no_gather_of_centres(images, positions, dim):
    "With labels no tensor of N·M·D elements appears, forward or backward; the straightforward form makes one."
    case = Case(HierarchicalMixture, classes=4, centres=8, channels=24, positions=positions)
    base, rows, label = case.build(dim), case.rows(n=images), case.labels(images)
    n, m, d = images * math.prod(positions), case.centres, case.channels
    with Largest() as largest:
        out = base.log_prob(case.spatial(rows).requires_grad_() if dim == 1 else rows.requires_grad_(), label)
        out.sum().backward()
    assert 4 * largest.elements < n * m * d
    with Largest() as naive:
        slow = gathered(case.build(), rows, label)
    assert naive.elements == n * m * d
    close(out.detach().flatten(1), slow.detach())


# -- parts of it ---------------------------------------------------------------------------------------------------

def test_affinity():
    "−‖z − μ‖²/2 + ‖z‖²/2, for common centres and for those of each image."
    g = torch.Generator().manual_seed(0)
    z, mu = torch.randn(3, 4, 5, generator=g, dtype=torch.float64), torch.randn(6, 5, generator=g, dtype=torch.float64)
    expected = (z.square().sum(-1, keepdim=True) - (z[:, :, None] - mu).square().sum(-1)) / 2
    close(affinity(z, mu), expected), close(affinity(z, mu.expand(3, 6, 5)), expected)
    own = own_affinity(z, mu.view(3, 2, 5), torch.tensor([2, 0, 2]))
    close(own, expected.unflatten(-1, (3, 2))[torch.arange(3), :, torch.tensor([2, 0, 2])])


@pytest.mark.parametrize("classes, channels",
                         [(15, 200), (3, 200), (10, 200), (12, 200), (40, 200), (1, 7), (7, 7), (3, 24), (4, 7)])
def test_main_centres(classes, channels):
    "Copies of the identity times 5/√⌊2D/K⌋, the rest zero; so about 5 apart for the published sizes."
    mu, copies = main_centres(classes, channels), channels // classes
    expected = torch.zeros(classes, channels)
    for i in range(copies * classes):
        expected[i % classes, i] = 5 / math.sqrt(2 * channels // classes)
    torch.testing.assert_close(mu, expected)
    if channels == 200:
        assert (torch.pdist(mu) - 5).abs().max() < 0.1


def test_main_centres_of_many_categories():
    "More categories than channels: drawn, by the generator given, about 5 apart in the mean square."
    draw = lambda seed: main_centres(60, 40, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert abs(torch.pdist(draw(1)).square().mean().sqrt() - 5) < 0.3


def test_same_generator_same_mixture():
    make = lambda seed: HierarchicalMixture(9, 4, 3, generator=torch.Generator().manual_seed(seed))
    a, b, c = make(3), make(3), make(4)
    assert torch.equal(a.delta, b.delta)
    assert torch.equal(a.mu, b.mu)
    assert not torch.equal(a.delta, c.delta)
    assert not torch.equal(a.mu, c.mu)


# -- what makes no sense -------------------------------------------------------------------------------------------

WRONG_LABELS = {
    "too high": lambda k: torch.tensor([0, 0, k]),
    "negative": lambda k: torch.tensor([0, -1, 0]),
    "too few": lambda k: torch.tensor([0, 0]),
    "too many": lambda k: torch.tensor([0, 0, 0, 0]),
    "one for all": lambda k: torch.tensor(0),
    "of each position": lambda k: torch.zeros(3, 6, dtype=torch.long),
    "float": lambda k: torch.zeros(3),
    "half": lambda k: torch.zeros(3, dtype=torch.bfloat16),
    "bool": lambda k: torch.tensor([False, False, False]),
}


@over(MIXTURES)
@pytest.mark.parametrize("wrong", WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_labels_that_make_no_sense(case, wrong):
    "A ValueError that says what is needed, dense and spatial."
    rows = case.rows(n=3)
    for dim, z in ((-1, rows), (1, case.spatial(rows))):
        with pytest.raises(ValueError, match="label"):
            case.build(dim).log_prob(z, wrong(case.classes))


@over({k: MIXTURES[k] for k in ("hierarchy", "classes, one position")})
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.int8], ids=str)
def test_labels_of_other_whole_number_types(case, dtype):
    "Whole numbers of another type are the same numbers, or refused; never another thing."
    base, rows = case.build(), case.rows(n=3)
    label = case.labels(3)
    try:
        out = base.log_prob(rows, label.to(dtype))
    except ValueError:
        return
    close(out, base.log_prob(rows, label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("positions", [1, 4])
def test_labels_that_torch_takes_for_a_mask(dtype, positions):
    "As many labels as categories, none of them zero: torch would pick categories 0, 1, 2 instead of 1, 1, 1."
    base, label = CASES["hierarchy"].build(), torch.ones(3, dtype=torch.long)
    rows = CASES["hierarchy"].rows(n=3)[:, :positions]
    try:
        out = base.log_prob(rows, label.to(dtype))
    except ValueError:
        return
    close(out, base.log_prob(rows, label))


@pytest.mark.parametrize("make", [
    lambda: StandardNormal(0), lambda: StandardNormal(3, dim=0), lambda: StandardNormal(2.0),
    lambda: DiagonalNormal(-1), lambda: DiagonalNormal(3, per="image"),
    lambda: DiagonalNormal(3, per="position"), lambda: DiagonalNormal(3, positions=(4,)),
    lambda: DiagonalNormal(3, per="scalar", positions=(4,)),
    lambda: ClassMixture(0, 3), lambda: ClassMixture(2.0, 3), lambda: ClassMixture(2, 0),
    lambda: HierarchicalMixture(2, 3, 0), lambda: HierarchicalMixture(2, 3, 1.5),
    lambda: HierarchicalMixture(0, 3, 2), lambda: HierarchicalMixture(2, 3, 2, spread=0.0)])
def test_sizes_that_make_no_sense(make):
    with pytest.raises(ValueError):
        make()


def test_base_class_asks_for_a_density():
    base = Base(3)
    with pytest.raises(NotImplementedError, match="Base defines no density"):
        base.log_prob(torch.zeros(1, 3))
    with pytest.raises(NotImplementedError, match="Base cannot be drawn from"):
        base.sample(1)


@over(CASES)
def test_says_what_it_is(case):
    shown = repr(case.make(dim=1))
    assert f"channels={case.channels}" in shown and "dim=1" in shown and isinstance(case.make(), nn.Module)
    assert f"classes={case.classes}" in shown if case.classes else "classes" not in shown
    assert f"centres={case.centres}" in shown if case.centres else "centres" not in shown


@pytest.mark.parametrize("label",
                         [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
@pytest.mark.parametrize("base", [ClassMixture(3, 4), HierarchicalMixture(3, 4, 2)])
def test_sample_refuses_labels_it_does_not_have(base, label):
    with pytest.raises(ValueError, match="labels"):
        base.sample(2, label)


@pytest.mark.parametrize("make",
                         [lambda: StandardNormal(3), lambda: DiagonalNormal(3), lambda: ClassMixture(4, 3),
                          lambda: HierarchicalMixture(4, 3, centres=2)])
def test_draws_are_where_the_base_is(make):
    "On its device and in its precision."
    label = torch.arange(4)
    for base in (make(), make().double()):
        drawn = base.sample(4, label)
        assert drawn.dtype == base.zero.dtype
        assert (drawn.float().double() != drawn.double()).any() == (base.zero.dtype == torch.float64)
    base = make().to("meta")
    assert base.noise(5).device.type == "meta" and "zero" not in base.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [lambda: ClassMixture(4, 3), lambda: HierarchicalMixture(4, 3, centres=2)])
def test_rows_of_another_precision(make, dtype):
    "The affinity is computed in the higher of the two."
    base, z = make(), torch.randn(2, 5, 3).to(dtype)
    wide = copy.deepcopy(base).double()
    for label in (None, torch.tensor([3, 1])):
        assert torch.allclose(base.log_prob(z, label).double(), wide.log_prob(z.double(), label),
                              rtol=0.02 if dtype != torch.float64 else 1e-6)


@pytest.mark.parametrize("base", [StandardNormal(3), DiagonalNormal(3, per="scalar"), DiagonalNormal(3, dim=1)])
def test_another_number_of_channels(base):
    with pytest.raises(ValueError, match="has 4 channels on axis .*this base 3"):
        base.log_prob(torch.randn(2, 4, 4, 4))


@pytest.mark.parametrize("base, shape", [
    (DiagonalNormal(5, dim=1), (2, 5)), (DiagonalNormal(5, dim=1, per="scalar"), (3, 5)),
    (DiagonalNormal(5, dim=1, per="position", positions=(4, 3)), (2, 5, 1, 1)),
    (DiagonalNormal(5, dim=1, per="position", positions=(4, 3)), (2, 5, 1, 3)),
    (DiagonalNormal(5, per="position", positions=(4,)), (2, 1, 5))])
def test_latents_that_would_be_broadcast(base, shape):
    "To the size of the parameters, and summed over other axes than the channels."
    with pytest.raises(ValueError, match="does not fit this base's mean"):
        base.log_prob(torch.randn(shape))


def test_spatial_positions_have_two_axes():
    with pytest.raises(ValueError, match=r"positions \(3,\).*\(H, W\) if spatial"):
        DiagonalNormal(5, dim=1, per="position", positions=(3,))


def test_affinity_takes_the_higher_precision():
    "Of rows and centres, whichever it is."
    z, mu = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for rows, centres in ((z.float(), mu), (z, mu.float()), (z.bfloat16(), mu.float())):
        for c in (centres, centres.expand(2, -1, -1)):
            out = affinity(rows, c)
            assert out.dtype == torch.promote_types(rows.dtype, c.dtype)
            torch.testing.assert_close(out, affinity(rows.to(out.dtype), c.to(out.dtype)))


def test_draws_carry_no_gradient():
    for base in (StandardNormal(3), DiagonalNormal(3), ClassMixture(2, 3), HierarchicalMixture(2, 3, 2)):
        assert not base.sample(5).requires_grad


@pytest.mark.parametrize("base", [ClassMixture(3, 4), HierarchicalMixture(3, 4, 2), ClassMixture(3, 4, dim=1)])
def test_mixtures_name_both_widths(base):
    z = torch.randn(2, 5, 2, 2) if base.dim == 1 else torch.randn(2, 5)
    with pytest.raises(ValueError, match="has 5 channels on axis .*, this base 4"):
        base.log_prob(z)
