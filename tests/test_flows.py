"""One battery over every flow: inverse, Jacobian, gradients, independence, conditions,
storage, precision, FrEIA; and bad input."""
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import close
from flowrepro import flows
from flowrepro.flows import (
    UNIT, Coupling, conv_flow, dense_flow, from_freia, log_scale, positional_code, positive, random_rotation, to_freia
)


@dataclass(frozen=True)
class Case:
    "One kind of flow, and how to feed it."

    channels: int
    steps: int
    kernels: tuple | None = None  # None: dense
    soft: bool = False
    c_cond: int = 0
    rule: str = "published"
    clamp: float = 2.0

    def build(self, dtype=torch.float64, seed=0, random=True) -> flows.Flow:
        "The flow; with `random`, away from its initial scale, offset and small networks."
        torch.manual_seed(seed)
        kw = dict(steps=self.steps, clamp=self.clamp, soft=self.soft, rule=self.rule, c_cond=self.c_cond)
        flow = dense_flow(self.channels, **kw) if self.dense else conv_flow(self.channels, kernels=self.kernels, **kw)
        if random:
            for name, p in flow.named_parameters():
                nn.init.normal_(p, std=0.5) if "subnet" in name else p.data.add_(torch.randn_like(p))
        return flow.to(dtype)

    @property
    def dense(self) -> bool:
        return self.kernels is None

    def inputs(self, n=3, dtype=torch.float64, seed=1) -> tuple[torch.Tensor, torch.Tensor | None]:
        "Features and, broadcast over the samples, a condition per position."
        g = torch.Generator().manual_seed(seed)
        where = (lambda c: (4, c)) if self.dense else (lambda c: (c, 3, 4))
        x = torch.randn(n, *where(self.channels), generator=g, dtype=torch.float64) * 1.5 + 0.3
        cond = torch.randn(*where(self.c_cond), generator=g, dtype=torch.float64) if self.c_cond else None
        return x.to(dtype), None if cond is None else (cond if self.dense else cond[None]).to(dtype)


CASES = {
    "conv even hard": Case(6, 4, (3, 1)),
    "conv odd hard": Case(5, 3, (3, 1)),
    "conv 1x1 one step": Case(4, 1, (1,)),
    "conv 3x3 one step": Case(5, 1, (3,), rule="unit-gain", clamp=1.9),
    "conv two channels": Case(2, 3, (3,)),
    "conv 5x5": Case(4, 2, (5,)),
    "conv even soft": Case(6, 2, (1, 3), soft=True),
    "conv odd soft unit-gain": Case(7, 3, (3, 1), soft=True, rule="unit-gain"),
    "conv hard conditional": Case(6, 3, (3, 1), c_cond=4, rule="unit-gain", clamp=1.5),
    "conv odd soft conditional": Case(5, 2, (3,), soft=True, c_cond=3),
    "dense even soft": Case(6, 4, soft=True, clamp=1.9),
    "dense odd soft": Case(7, 2, soft=True, clamp=1.9),
    "dense odd hard": Case(5, 3),
    "dense even hard unit-gain": Case(8, 1, rule="unit-gain", clamp=3.0),
    "dense two channels": Case(2, 2, soft=True),
    "dense soft conditional": Case(6, 3, soft=True, c_cond=4, clamp=1.9),
    "dense odd hard conditional": Case(5, 4, c_cond=6, rule="unit-gain", clamp=1.9),
}
every_flow = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# -- the battery ---------------------------------------------------------------------------------------------------

@every_flow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_inverse(case, dtype, tolerance):
    "Features come back from the latent, and the latent from the features; neither is the input itself."
    flow, (x, cond) = case.build(dtype), case.inputs(dtype=dtype)
    with torch.no_grad():
        z, _ = flow(x, cond)
        assert z.dtype == dtype and z.shape == x.shape and (z - x).abs().max() > 0.1
        close(flow.inverse(z, cond), x, tolerance)
        close(flow(flow.inverse(x, cond), cond)[0], x, tolerance)


@every_flow
@pytest.mark.parametrize("random", [True, False], ids=["random", "initial"])
def test_logdet_is_that_of_the_jacobian(case, random):
    "Against the determinant of autograd's Jacobian, for one position (dense) or one image (convolutional)."
    flow, (x, cond) = case.build(random=random), case.inputs(n=2)
    _, logdet = flow(x, cond)
    assert logdet.shape == ((2, 4) if case.dense else (2,))
    places = [(n, p) for n in range(2) for p in range(4)] if case.dense else [(0,), (1,)]
    for place in places:
        own, c = x[place], None if cond is None else cond[place[1]] if case.dense else cond[0]
        one = ((lambda v: flow(v, c)[0]) if case.dense
               else (lambda v: flow(v[None], None if c is None else c[None])[0][0]))
        jacobian = torch.autograd.functional.jacobian(one, own).reshape(own.numel(), own.numel())
        # rotations are kept in float32
        close(logdet[place], torch.linalg.slogdet(jacobian).logabsdet, 5e-6 if case.soft else 1e-9)
    if random:
        assert logdet.abs().max() > 0.05, "a log-determinant of zero shows nothing"


@every_flow
def test_gradient_of_every_parameter(case):
    "None is missing, zero or not finite; at the start as well as later."
    for random in (True, False):
        flow, (x, cond) = case.build(random=random), case.inputs()
        z, logdet = flow(x, cond)
        (z.square().sum() / 2 - logdet.sum()).backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert all(p.requires_grad for p in flow.parameters())


@every_flow
def test_gradients_by_finite_differences(case):
    "Of z and logdet, by features, condition and every parameter."
    flow, (x, cond) = case.build(), case.inputs(n=1)
    x = x[:, :2] if case.dense else x[..., :2, :2]
    cond = cond if cond is None else cond[:2] if case.dense else cond[..., :2, :2]
    names, values = zip(*flow.named_parameters())
    variables = [v.detach().clone().requires_grad_() for v in (x, *([] if cond is None else [cond]), *values)]

    def run(x, *rest):
        c, weights = (rest[0], rest[1:]) if cond is not None else (None, rest)
        return torch.func.functional_call(flow, dict(zip(names, weights)), (x, c))

    assert torch.autograd.gradcheck(run, variables, fast_mode=True, eps=1e-6, atol=1e-5)


@every_flow
def test_samples_do_not_see_each_other(case):
    "Each alone gives what it gives in the batch; nor do the positions of a dense flow."
    flow, (x, cond) = case.build(), case.inputs(n=4)
    z, logdet = flow(x, cond)
    for i in range(4):
        alone, j = flow(x[i:i + 1], cond)
        close(alone[0], z[i], 1e-12), close(j[0], logdet[i], 1e-12)
    if case.dense:
        alone, j = flow(x[0, 2], None if cond is None else cond[2])
        close(alone, z[0, 2], 1e-12), close(j, logdet[0, 2], 1e-12)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.c_cond], ids=[n for n, c in CASES.items() if c.c_cond])
def test_condition_once_or_for_every_sample(case):
    """A condition per position gives what the same one repeated for every sample gives, and
    another one gives something else."""
    flow, (x, cond) = case.build(), case.inputs()
    full = cond.expand(len(x), *cond.shape[-2:] if case.dense else cond.shape[1:]).clone()
    for a, b in zip(flow(x, cond), flow(x, full)):
        close(a, b, 1e-12)
    close(flow.inverse(x, cond), flow.inverse(x, full), 1e-12)
    full[1] += 1.0
    z, changed = flow(x, cond)[0], flow(x, full)[0]
    close(changed[[0, 2]], z[[0, 2]], 1e-12)
    assert (changed[1] - z[1]).abs().max() > 1e-3


@every_flow
def test_local_logdet(case):
    "Per position it sums to the whole, and with 1×1 kernels it is each position's own."
    flow, (x, cond) = case.build(), case.inputs()
    (z, logdet), (same, local) = flow(x, cond), flow(x, cond, local=True)
    assert torch.equal(z, same) and local.shape == ((3, 4) if case.dense else (3, 3, 4))
    close(local if case.dense else local.sum((1, 2)), logdet, 1e-12)
    if case.kernels == (1,):
        pixel = flow(x[:, :, 1:2, 2:3])[1]
        close(pixel, local[:, 1, 2], 1e-12)


@every_flow
def test_state_dict(case):
    "A flow of other draws, loaded, is the same flow; the permutation is part of it."
    a, b, (x, cond) = case.build(seed=0), case.build(seed=7), case.inputs()
    assert (a(x, cond)[0] - b(x, cond)[0]).abs().max() > 1e-3
    b.load_state_dict(a.state_dict(), strict=True)
    assert all(torch.equal(p, q) for p, q in zip(a(x, cond), b(x, cond)))
    assert sum(".perm" in k for k in a.state_dict()) == case.steps


@every_flow
def test_bfloat16_networks(case):
    "Under autocast the networks run in bfloat16; latent and log-determinant stay float32, and close."
    flow, (x, cond) = case.build(torch.float32, random=False), case.inputs(n=8, dtype=torch.float32)
    for p in flow.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    z, logdet = flow(x, cond)
    with torch.autocast("cpu", torch.bfloat16):
        z16, logdet16 = flow(x, cond)
        assert flow.inverse(z16, cond).dtype == torch.float32
    assert z16.dtype == logdet16.dtype == torch.float32
    assert not torch.equal(z, z16), "the networks were not in bfloat16"
    close(z16, z, 0.02), close(logdet16, logdet, 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_rotates_the_gradient_alone(dtype):
    "Forward the stream is rotated in its own precision; of float32, bfloat16 takes the way back, and of float64 nothing."
    torch.manual_seed(0)
    y, g, o = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((64, 6), (6,), (6,)))
    perm, weight, out = flows.random_rotation(6).to(dtype), torch.randn(64, 6, dtype=dtype), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = flows.Rotation.apply(y, g, o, perm)
        out.append((z, *torch.autograd.grad((z * weight).sum(), (y, g, o))))
    (z, dy, dg, do), (z16, dy16, dg16, do16) = out
    assert torch.equal(z, z16) and torch.equal(do, do16)
    assert torch.equal(dy, dy16) == torch.equal(dg, dg16) == (dtype == torch.float64)
    assert dy16.dtype == dg16.dtype == dtype
    close(dy16, dy, 0.02), torch.testing.assert_close(dg16, dg, rtol=0.02, atol=0.02)


@every_flow
def test_bfloat16_gradients(case):
    "Gradients under autocast point where those of float32 point."
    flow, (x, cond) = case.build(torch.float32, random=False), case.inputs(n=8, dtype=torch.float32)
    grads = []
    for enabled in (False, True):
        flow.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, logdet = flow(x, cond)
            (z.square().sum() / 2 - logdet.sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    assert grads[1].dtype == torch.float32 and torch.cosine_similarity(*grads, dim=0) > 0.999


# -- FrEIA 0.2 -----------------------------------------------------------------------------------------------------

def freia_twin(case: Case) -> nn.Module:
    "FrEIA's blocks of the same sizes, randomised."
    inn, block = pytest.importorskip("FrEIA.framework").SequenceINN, pytest.importorskip("FrEIA.modules").AllInOneBlock
    np.random.seed(5), torch.manual_seed(5)
    ours = case.build()
    place = () if case.dense else (3, 4)
    twin = inn(case.channels, *place)
    for step in ours.steps:
        def subnet(c_in, c_out, kernel=getattr(step.coupling.subnet.first, "kernel_size", None)):
            hidden = 2 * c_in if case.dense else case.channels - case.channels // 2
            layer = nn.Linear if case.dense else lambda i, o: nn.Conv2d(i, o, kernel, padding=kernel[0] // 2)
            return nn.Sequential(layer(c_in, hidden), nn.ReLU(), layer(hidden, c_out))
        given = dict(cond=0, cond_shape=(case.c_cond, *place)) if case.c_cond else {}
        twin.append(block, subnet_constructor=subnet, affine_clamping=case.clamp, permute_soft=case.soft, **given)
    for p in twin.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    return twin.double()


def rows(case: Case, x, cond):
    "The features as FrEIA takes them: rows of positions for dense flows, the condition repeated."
    if case.dense:
        return x.reshape(-1, case.channels), None if cond is None else [cond.repeat(len(x), 1)]
    return x, None if cond is None else [cond.expand(len(x), -1, -1, -1)]


published = pytest.mark.parametrize("case", [c for c in CASES.values() if c.rule == "published"],
                                    ids=[n for n, c in CASES.items() if c.rule == "published"])


@published
def test_freia_weights_give_freia_numbers(case):
    "z, logdet and their gradients by the input."
    twin, flow, (x, cond) = freia_twin(case), case.build(seed=9), case.inputs()
    from_freia(flow, twin.state_dict())
    x.requires_grad_()
    z, logdet = flow(x, cond)
    theirs_z, theirs_logdet = twin(*rows(case, x, cond))
    close(z, theirs_z.view_as(z), 1e-10), close(logdet, theirs_logdet.view_as(logdet), 1e-10)
    ours, theirs = (torch.autograd.grad(a.square().sum() - b.sum(), x)[0]
                    for a, b in ((z, logdet), (theirs_z, theirs_logdet)))
    close(ours, theirs, 1e-9)


@published
def test_our_weights_in_freia(case):
    "The exported state dict fits FrEIA strictly, comes back unchanged, and FrEIA's inverse undoes our flow."
    twin, flow, (x, cond) = freia_twin(case), case.build(), case.inputs()
    twin.load_state_dict(to_freia(flow), strict=True)
    assert twin.state_dict().keys() == to_freia(flow).keys()
    z, logdet = flow(x, cond)
    theirs_z, theirs_logdet = twin(*rows(case, x, cond))
    close(z, theirs_z.view_as(z), 1e-6), close(logdet, theirs_logdet.view_as(logdet), 1e-6)
    close(twin(rows(case, z, None)[0], rows(case, x, cond)[1], rev=True)[0].view_as(x), x, 1e-5)
    again = from_freia(case.build(seed=4), to_freia(flow))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in flow.state_dict().items())


@published
def test_freia_dict_goes_into_a_file(case, tmp_path):
    "No two of its tensors share memory."
    save_file(to_freia(case.build()), tmp_path / "flow.safetensors")


@every_flow
def test_freia_dict_of_another_flow(case):
    "A missing key, another shape, too few steps, a rotation where channels are shuffled: ValueError names the key."
    flow, last = case.build(), case.steps - 1
    good = to_freia(flow, "net.")
    for key in (f"net.{last}.global_scale", "net.0.subnet.2.bias", f"net.{last}.w_perm"):
        with pytest.raises(ValueError, match=key.replace(".", r"\.") + " is missing"):
            from_freia(flow, {k: v for k, v in good.items() if k != key}, "net.")
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            from_freia(flow, good | {key: good[key][:-1]}, "net.")
    with pytest.raises(ValueError, match=r"module_list\.0\..* is missing"):
        from_freia(flow, good)
    if not case.soft:
        turned = random_rotation(case.channels).double().view_as(good["net.0.w_perm"])
        before = {k: v.clone() for k, v in flow.state_dict().items()}
        with pytest.raises(ValueError, match=r"net\.0\.w_perm is a rotation"):
            from_freia(flow, good | {"net.0.w_perm": turned}, "net.")
        assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    more = Case(**{**vars(case), "steps": case.steps + 1}).build()
    for target, held in ((more, flow), (flow, more)):
        before, n, own = {k: v.clone() for k, v in target.state_dict().items()}, len(held.steps), len(target.steps)
        with pytest.raises(ValueError, match=rf"net\.: {n} steps in the file, {own} steps in the flow"):
            from_freia(target, to_freia(held, "net."), "net.")
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


# -- the pieces ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [0, 1])
def test_too_few_channels(channels):
    for make in (lambda: conv_flow(channels, steps=1), lambda: dense_flow(channels, steps=1),
                 lambda: Coupling(channels, 4, None, 0, 2.0, "published")):
        with pytest.raises(ValueError, match="too few"):
            make()


def test_log_scale_rules():
    "Bounded by the clamp; slopes at zero 0.1·c (published) and 0.1 (unit-gain); the published one against its formula."
    a = torch.linspace(-300, 300, 601, dtype=torch.float64, requires_grad=True)
    for clamp in (1.9, 3.0):
        for rule, slope in (("published", 0.1 * clamp), ("unit-gain", 0.1)):
            s = log_scale(a, clamp, rule)
            assert s.abs().max() <= clamp and s[0].item() == pytest.approx(-clamp) and (s.diff() >= 0).all()
            assert torch.autograd.grad(s[300], a)[0][300].item() == pytest.approx(slope)
        assert log_scale(torch.tensor(5.0), clamp).item() == pytest.approx(clamp * 0.46211715726)


def test_global_scale():
    "Starts at one, stays positive, and is FrEIA's 0.1·softplus with β = 0.5."
    assert positive(torch.tensor(UNIT)).item() == pytest.approx(1.0, abs=1e-6)
    g = torch.linspace(-20, 20, 41, dtype=torch.float64)
    assert (positive(g) > 0).all()
    close(positive(g), 0.1 * torch.log1p(torch.exp(0.5 * g)) / 0.5, 1e-12)


@pytest.mark.parametrize("channels, height, width", [(4, 3, 5), (8, 1, 1), (16, 7, 2), (128, 14, 20)])
def test_position_code(channels, height, width):
    """Sines and cosines, in turn, of the column in the first half of the channels and of the row in the
    second, at rates from 1 to near 1e-4."""
    code = positional_code(channels, height, width)
    assert code.shape == (channels, height, width) and code.dtype == torch.float32
    half, expected = channels // 2, torch.empty(channels, height, width, dtype=torch.float64)
    for k in range(half):
        wave = math.cos if k % 2 else math.sin
        for y in range(height):
            for x in range(width):
                rate = 1e4 ** (-(k - k % 2) / half)
                expected[k, y, x], expected[half + k, y, x] = wave(x * rate), wave(y * rate)
    close(code.double(), expected, 1e-5)


@pytest.mark.parametrize("rows", [3, 40], ids=["fewer than positions", "more than positions"])
def test_codes_looked_up(rows):
    "A table of codes and the position of each row are the same as a code a row: values, gradients and inverse."
    flow, table = dense_flow(6, 2, c_cond=4).double(), positional_code(4, 2, 5).flatten(1).T.double()
    index, x, out = torch.randint(len(table), (rows,)), torch.randn(rows, 6, dtype=torch.float64), {}
    for key, cond in (("looked up", (table, index)), ("given", table[index])):
        v = x.clone().requires_grad_()
        z, logdet = flow(v, cond)
        flow.zero_grad()
        (z.square().sum() - logdet.sum()).backward()
        out[key] = z, logdet, v.grad, *(p.grad.clone() for p in flow.parameters())
        close(flow.inverse(z, cond), v, 1e-5)
    for a, b in zip(out["looked up"], out["given"]):
        close(a, b, 1e-10)


def test_position_codes_differ():
    "No two positions have the same."
    rows = positional_code(16, 24, 24).flatten(1).T
    assert (torch.cdist(rows, rows) + 9 * torch.eye(len(rows))).min() > 0.1


@pytest.mark.parametrize("soft", [False, True])
def test_freia_dict_whose_last_permutation_is_none(soft):
    "A matrix that doubles a channel is no invertible map; the flow stays as it was to its first step."
    flow, state = dense_flow(5, 2, soft=soft), to_freia(dense_flow(5, 2, soft=soft))
    state["module_list.1.w_perm"] = torch.eye(5)[[0, 0, 1, 2, 3]]
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    with pytest.raises(ValueError, match="module_list.1.w_perm is neither a rotation nor a shuffle"):
        from_freia(flow, state)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize("channels", [0, -4, 1, 2, 6, 127])
def test_position_code_of_impossible_width(channels):
    with pytest.raises(ValueError, match=f"code of {channels} channels: .* multiple of four"):
        positional_code(channels, 3, 3)


def test_a_condition_of_other_positions():
    "A single code would meet the padding of the convolution at every position, and give another flow."
    flow = conv_flow(6, 2, c_cond=4)
    with pytest.raises(ValueError, match=r"condition of \(1, 1\) positions for features of \(3, 3\)"):
        flow(torch.randn(2, 6, 3, 3), torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("n", [2, 3, 8, 33])
def test_rotation(n):
    "Orthogonal with determinant one, another for every draw, the same for the same generator."
    draw = lambda seed: random_rotation(n, torch.Generator().manual_seed(seed))
    close(draw(0) @ draw(0).T, torch.eye(n), 1e-5)
    assert all(torch.linalg.det(draw(s).double()) == pytest.approx(1, abs=1e-5) for s in range(8))
    assert torch.equal(draw(1), draw(1)) and not torch.allclose(draw(1), draw(2), atol=1e-3)


def test_rotations_are_uniform():
    "Every entry of a uniform rotation has mean 0 and variance 1/n."
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(3, g) for _ in range(3000)])
    assert drawn.mean(0).abs().max() < 0.04 and (drawn.var(0) - 1 / 3).abs().max() < 0.03


def test_starts_near_the_identity():
    "At the start each step keeps volume but for the small networks, and shuffles: the sorted channels come back."
    flow = Case(6, 1, (1,)).build(random=False)
    nn.init.zeros_(flow.steps[0].coupling.subnet.last.weight), nn.init.zeros_(flow.steps[0].coupling.subnet.last.bias)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    z, logdet = flow(x)
    close(z, x[:, flow.steps[0].mixing.perm], 1e-6), close(logdet, torch.zeros(2, dtype=torch.float64), 1e-5)


def test_same_seed_same_flow():
    "Every draw comes from torch's generator, or from the one given."
    for case in (CASES["conv even soft"], CASES["dense odd hard"]):
        a, b, c = (case.build(seed=s).state_dict() for s in (3, 3, 4))
        assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a if "perm" in k)
    perms = [conv_flow(16, 2, generator=torch.Generator().manual_seed(s)).steps[1].mixing.perm for s in (0, 0, 1)]
    assert torch.equal(perms[0], perms[1]) and not torch.equal(perms[0], perms[2])


def test_hidden_widths():
    "FastFlow: ratio times the passive half; CFLOW-AD and HGAD: twice the network's input."
    first = lambda flow: flow.steps[0].coupling.subnet.first.weight.shape
    assert first(conv_flow(101, 1, ratio=0.16)) == (8, 51, 3, 3) and first(dense_flow(9, 1, c_cond=4)) == (18, 9)
    assert [s.coupling.subnet.first.kernel_size[0] for s in conv_flow(4, 5).steps] == [3, 1, 3, 1, 3]
    assert len(dense_flow(4, 12).steps) == 12


# -- products of their own -----------------------------------------------------------------------------------------

def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["alone", "with code"])
def test_gradients_of_the_products(lead, coded):
    """The network's two layers, the rotation and the shuffle, against finite differences; a second
    derivative is refused, not wrong."""
    torch.manual_seed(0)
    perm, shuffle = flows.random_rotation(5).double(), torch.randperm(5)
    scale = (torch.rand(5, dtype=torch.double) + 0.5).requires_grad_()
    code, wide = (doubles(*lead, 2), 5) if coded else (None, 3)
    layers = [
        (flows.Layers.apply,
         (doubles(*lead, 3), code, doubles(*lead[k:], 6), doubles(6, wide), doubles(4, 6), doubles(4)))
         for k in range(len(lead) + 1)]
    def shuffled(d):  # over axis d of `lead` and the channels
        wide = lambda v: v if d == -1 else v.view(-1, *[1] * (len(lead) - d))
        return lambda y, g, o: flows.Shuffle.apply(y.transpose(-1, d), wide(g), wide(o), shuffle, d)
    mixings = [lambda *a: flows.Rotation.apply(*a, perm), *map(shuffled, [-1, *range(len(lead))])]
    for product, given in (*layers, *((m, (doubles(*lead, 5), scale, doubles(5))) for m in mixings)):
        assert torch.autograd.gradcheck(product, given)
        for loss in (product(*given).square().sum(), product(*given).sum()):
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(loss, given[0], create_graph=True)


@pytest.mark.parametrize("shape, to",
                         [((3, 4, 5), (5,)), ((3, 4, 5), (4, 5)), ((3, 4, 5), (3, 4, 5)), ((3, 4, 5), (1, 4, 5)),
                          ((3, 4, 5), (3, 1, 5)), ((200, 5), (5,)), ((1, 5), (5,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_sum_of_what_was_shared(shape, to, dtype):
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = flows.summed(t, torch.Size(to)), t.double().sum_to_size(to)
    assert got.dtype == dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [5, 40])
def test_codes_by_position_and_by_row_give_the_same(rows):
    "Latent, log-determinant and every gradient, the table's too, with fewer and with more rows than positions."
    torch.manual_seed(0)
    flow, table, index, x = (flows.dense_flow(7, 3, 4).double(), doubles(12, 4), torch.randint(12, (rows,)),
                             doubles(rows, 7))
    def all_of(cond):
        z, logdet = flow(x, cond)
        return z, logdet, *torch.autograd.grad(z.square().sum() / 2 - logdet.sum(), [x, table, *flow.parameters()])
    for a, b in zip(all_of(table[index]), all_of((table, index))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# -- operations ------------------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    "Counts the operations that do work; views and empty tensors do none."
    VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "split", "split_with_sizes", "slice", "select",
             "unsqueeze", "squeeze", "detach", "permute", "unbind", "_reshape_alias"}
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        self.count += name not in self.VIEWS and not name.startswith("empty")
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_fewer_operations_than_freia(kind):
    "What a training step costs where each operation costs its launch, as small ones do on a GPU."
    pytest.importorskip("FrEIA")
    from flowrepro.bench import dense_pair, flow_pair, freia_conv, training_step
    if kind == "conv":
        pairs, given = flow_pair(freia_conv(16, 8, 8), conv_flow(16, 8)), 2 * [(torch.randn(4, 16, 8, 8),)]
    else:
        x, code = torch.randn(40, 16), torch.randn(40, 8)
        pairs, given = dense_pair(16, 8, 8), [(x, [code]), (x, code)]
    counted = []
    for (flow, parameters), inputs in zip(pairs, given):
        with Operations() as operations:
            training_step(lambda: flow(*inputs), parameters, lambda z, logdet: z.square().sum() - logdet.sum())
        counted.append(operations.count)
    assert counted[1] < 0.9 * counted[0], counted


COMPILED = {
    "conv": lambda: (conv_flow(6, 3), torch.randn(2, 6, 5, 5)),
    "conv, rotations": lambda: (conv_flow(6, 3, soft=True), torch.randn(2, 6, 5, 5)),
    "dense": lambda: (dense_flow(6, 3), torch.randn(20, 6)),
    "dense, codes of each row": lambda: (dense_flow(6, 3, 4), torch.randn(20, 6), torch.randn(20, 4)),
    "dense, table of codes": lambda: (dense_flow(6, 3, 4), torch.randn(20, 6),
                                      (torch.randn(7, 4), torch.arange(20) % 7)),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiles_in_one_piece(kind):
    "`torch.compile` takes forward and backward without a break, and gives the same."
    flow, *given = COMPILED[kind]()
    def gradients(f):
        z, logdet = f(*given)
        return [z, *torch.autograd.grad(z.square().sum() - logdet.sum(), list(flow.parameters()))]
    torch._dynamo.reset()
    for got, want in zip(gradients(torch.compile(flow, backend="aot_eager", fullgraph=True)), gradients(flow),
                         strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("make, x", [(flows.dense_flow, torch.randn(4)), (flows.conv_flow, torch.randn(1, 4, 1, 1))])
def test_a_hessian_is_refused(make, x):
    "Not zero, which it is not."
    flow = make(4, 2)
    for loss in (lambda v: flow(v)[0].square().sum(), lambda v: flow(v)[1].sum()):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.functional.hessian(loss, x)


def test_steps_of_your_own():
    "A flow runs them as they are, forth and back."
    class Twice(flows.Step):
        def forward(self, x, cond=None):
            y, j = super().forward(x, cond)
            return 2 * y, j + 4 * torch.tensor(2.0).log()

        def inverse(self, z, cond=None): return super().inverse(z / 2, cond)
    flow, x = flows.Flow(Twice(4, 8) for _ in range(2)), torch.randn(3, 4)
    z, logdet = flow(x)
    assert torch.allclose(flow.inverse(z), x, atol=1e-5)
    exact = torch.stack([torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row).slogdet()[1] for row in x])
    assert torch.allclose(logdet, exact, atol=1e-5)


@pytest.mark.parametrize("j, total", [(0.0, 0), (torch.zeros(()), 0), (torch.ones(4, 4, 4), 16), (torch.ones(4), None)])
def test_log_determinants_of_a_step_of_your_own(j, total):
    "One for each position, or a number for all; one for each image would be broadcast over positions, and is refused."
    class Reversed(torch.nn.Module):
        dim = 1
        def forward(self, x, cond=None): return x.flip(1), j
    flow = flows.Flow([Reversed()])
    if total is None:
        with pytest.raises(ValueError, match=r"Reversed gives .* shape \(4,\): a step gives .* position, \(4, 4, 4\)"):
            flow(torch.randn(4, 6, 4, 4))
    else:
        assert flow(torch.randn(4, 6, 4, 4))[1].tolist() == [total] * 4


def test_default_dtype():
    "A flow made under float64 is float64 in all its parts."
    torch.set_default_dtype(torch.float64)
    try:
        assert flows.dense_flow(6, 2)(torch.randn(5, 6))[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_freia_networks_of_three_layers():
    "Are refused, not cut."
    state = flows.to_freia(flows.dense_flow(6, 1)) | {"module_list.0.subnet.4.weight": torch.zeros(6, 6)}
    with pytest.raises(ValueError, match="subnet.4.weight"):
        flows.from_freia(flows.dense_flow(6, 1), state)


def test_a_condition_shared_by_the_images():
    "One code for each position, (1, P, c), is that of every image."
    flow = dense_flow(5, 2, c_cond=4)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, cond = torch.randn(3, 6, 5), torch.randn(1, 6, 4)
    for a, b in zip(flow(x, cond), flow(x, cond.expand(3, -1, -1).contiguous())):
        torch.testing.assert_close(a, b)


def test_rotations_favour_no_direction():
    "QR alone gives a first entry of one sign."
    first = torch.stack([random_rotation(4, torch.Generator().manual_seed(i))[0, 0] for i in range(200)])
    assert 70 < (first > 0).sum() < 130


@pytest.mark.parametrize("soft", [True, False])
def test_inverse_under_autocast(soft):
    "The networks run in bfloat16 both ways, the stream in float32: the features come back."
    flow = dense_flow(6, 3, soft=soft)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(32, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z, _ = flow(x)
        again = flow.inverse(z)
    assert z.dtype == again.dtype == torch.float32
    torch.testing.assert_close(again, x, rtol=0, atol=2e-3)


def test_defaults_of_the_flows():
    "Both papers' clamp, rotations in dense flows, shuffles and kernels in turn in convolutional ones."
    dense, conv = dense_flow(6), conv_flow(6)
    assert {(s.coupling.clamp, s.mixing.soft, s.coupling.rule) for s in dense.steps} == {(1.9, True, "published")}
    assert {(s.coupling.clamp, s.mixing.soft, s.coupling.rule) for s in conv.steps} == {(2.0, False, "published")}
    assert [s.coupling.subnet.first.kernel_size[0] for s in conv.steps] == [3, 1] * 4 and len(dense.steps) == 8


def test_sizes_at_the_limits():
    "A ratio however small leaves one channel; zero, and a width below none, are refused."
    assert conv_flow(4, 1, ratio=1e-3).steps[0].coupling.subnet.first.out_channels == 1
    for build in (lambda: conv_flow(4, 1, ratio=0.0), lambda: conv_flow(4, 1, ratio=-0.5)):
        with pytest.raises(ValueError, match="ratio .*: positive"):
            build()
    with pytest.raises(ValueError, match="c_cond -1: a whole number, 0 for none"):
        dense_flow(4, 1, c_cond=-1)
