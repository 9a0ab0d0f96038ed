"""The numbers of the public implementations: outputs, losses, gradients and scores from the weights in a
reference file.

Sizes are read off the tensors, so a file of the same keys and other sizes is checked the same way.
"""
import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from flowrepro.bases import LOG_2PI
from flowrepro.data import DataError
from flowrepro.detectors import HGAD, OFFICIAL, CFlow, DenseDetector, FastFlow, from_official, to_official
from flowrepro.flows import FREIA_NAMES, Flow, from_freia, log_scale, positive, to_freia
from flowrepro.hgad import hgad_loss, hgad_terms
from flowrepro.runs import configure
from flowrepro.scores import PUBLISHED, combine, gaussian

GOLDEN = Path(os.environ.get("FLOWREPRO_GOLDEN") or Path(__file__).resolve().parents[1] / ".." / "shared" / "golden")
FLOW = "nf_flows.{}.module_list."


def reference(name: str) -> dict[str, torch.Tensor]:
    "The tensors of a reference file; the test is skipped where it is absent."
    if not (GOLDEN / name).is_file():
        pytest.skip(f"{GOLDEN / name} is absent; set FLOWREPRO_GOLDEN")
    return load_file(GOLDEN / name)


def agree(name: str, ours, theirs, tolerance: float, rounding: float = 0.0) -> None:
    "The largest difference is within `tolerance` of the largest value, or within the reference's own `rounding`."
    assert tuple(ours.shape) == tuple(theirs.shape), (
        f"{name}: shape {tuple(ours.shape)}, reference {tuple(theirs.shape)}")
    if not theirs.numel():
        return
    theirs = theirs.to(torch.float64)
    error, largest = (ours.detach().to(torch.float64) - theirs).abs().max(), theirs.abs().max()
    assert error <= max(tolerance * largest, rounding), (
        f"{name}: off by {error:.2e}, {error / largest:.1e} of its largest value, allowed {tolerance:.0e}")


def count(ref: dict, prefix: str) -> int:
    "How many numbers 0, 1, … follow `prefix` in the keys."
    return len({k.removeprefix(prefix).split(".")[0] for k in ref if k.startswith(prefix)})


# -- FastFlow ------------------------------------------------------------------------------------------------------

def settings(ref: dict, levels: int) -> dict:
    "The arguments of `FastFlow` that a file's tensors have the shapes of."
    key = "model." + FLOW
    steps = count(ref, key.format(0))
    first = [[ref[f"{key.format(i)}{k}.subnet.0.weight"] for k in range(steps)] for i in range(levels)]
    widths = [(w.shape[1], w.shape[0]) for flow in first for w in flow]  # passive channels, hidden channels
    low, high = max(h / c for c, h in widths), min((h + 1) / c for c, h in widths)
    perm = ref[key.format(0) + "0.w_perm"].flatten(1)
    return dict(steps=steps, kernels=tuple(w.shape[-1] for w in first[0]), ratio=(low + high) / 2, clamp=2.0,
                rule="published", soft=not torch.equal(perm, torch.eye(len(perm))[perm.argmax(1)]),
                norm="layer" if "model.norms.0.weight" in ref else "none", score=PUBLISHED["fastflow"])


def build(ref: dict, stand_in, dtype: torch.dtype) -> FastFlow:
    "The detector of a reference file, its weights loaded."
    levels = count(ref, "features.")
    backbone = stand_in([ref[f"features.{i}"].shape[1:] for i in range(levels)], tuple(ref["anomaly_map"].shape[-2:]))
    model = FastFlow(backbone, **settings(ref, levels)).to(dtype)
    for i in range(levels):
        from_freia(model.flows[i], ref, "model." + FLOW.format(i))
        if (weight := ref.get(f"model.norms.{i}.weight")) is not None:
            model.norms[i].load_state_dict({"weight": weight, "bias": ref[f"model.norms.{i}.bias"]})
    return model


def gradients(model: FastFlow) -> dict[str, torch.Tensor]:
    "The gradients under the names of the public code, flat."
    out = {f"norms.{i}.{n}": p.grad for i, norm in enumerate(model.norms) for n, p in norm.named_parameters()}
    for i, flow in enumerate(model.flows):
        for k, step in enumerate(flow.steps):
            own = dict(step.named_parameters())
            out |= {f"{FLOW.format(i)}{k}.{theirs}": own[ours].grad for ours, theirs in FREIA_NAMES.items()}
    return {k: g.flatten() for k, g in out.items()}


@torch.no_grad()
def rounding(flow: Flow, x: torch.Tensor, cond: torch.Tensor | None = None) -> float:
    """How far float32 may be off in a log-determinant: its terms have both signs, so the error is measured by the
    sum of their sizes.

    In float32 both sides make the same error in log g (g near 1), in float64 only the reference does.
    """
    size, over, positions = 0.0, *((-1, 1) if flow.steps[0].dim == -1 else ((1, 2, 3), x[0, 0].numel()))
    for step in flow.steps:
        raw = step.coupling.subnet(x.split(step.coupling.sizes, step.dim)[0], cond).chunk(2, step.dim)[0]
        size = (size + log_scale(raw, step.coupling.clamp, step.coupling.rule).abs().sum(over) + positions
                * positive(step.mixing.gamma).log().abs().sum())
        x = step(x, cond)[0]
    return size.max().item() * torch.finfo(torch.float32).eps * (2 if x.dtype == torch.float32 else 10)


def check_fastflow(ref: dict, stand_in, dtype: torch.dtype = torch.float32) -> None:
    "Everything that a FastFlow reference file holds, against the detector."
    model = build(ref, stand_in, dtype)
    features = [ref[f"features.{i}"].to(dtype) for i in range(len(model.flows))]
    error = [rounding(flow, norm(x)) for x, norm, flow in zip(features, model.norms, model.flows)]
    for i, (x, norm, flow) in enumerate(zip(features, model.norms, model.flows)):
        z, logdet = flow(norm(x))
        agree(f"z.{i}", z, ref[f"z.{i}"], 1e-5)
        agree(f"logdet.{i}", logdet, ref[f"logdet.{i}"], 1e-5, error[i])
        agree(f"inverse.{i}", flow.inverse(z), norm(x), 1e-4)
    loss = model.loss(features)
    agree("loss", loss, ref["loss"], 1e-5)
    loss.backward()
    ours, theirs = gradients(model), {k.removeprefix("grad."): v for k, v in ref.items() if k.startswith("grad.")}
    assert ours.keys() == theirs.keys(), f"gradients of different parameters: {sorted(ours.keys() ^ theirs.keys())}"
    for name, grad in theirs.items():
        agree(f"grad.{name}", ours[name], grad.flatten(), 1e-4)
    with torch.no_grad():
        parts = model.parts(features)
        maps, images = model.score_parts(parts)
    agree("anomaly_map", maps[:, None], ref["anomaly_map"], 1e-5)
    agree("image score", images, ref["anomaly_map"].flatten(1).max(1).values, 1e-5)
    for i, part in enumerate(parts):
        channels = features[i].shape[1]
        agree(f"local logdet of level {i}", (part.logdet * channels).sum((1, 2)), ref[f"logdet.{i}"], 1e-5,
              2 * error[i])
        agree(f"base density of level {i}", part.base * channels, -ref[f"z.{i}"].square().sum(1) / 2, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fastflow(dtype, stand_in):
    check_fastflow(reference("fastflow.safetensors"), stand_in, dtype)


def test_weights_go_back(stand_in):
    "Loaded and written again, the flows' weights are those of the file."
    ref = reference("fastflow.safetensors")
    model = build(ref, stand_in, torch.float32)
    back = {k: v for i, flow in enumerate(model.flows) for k, v in to_freia(flow, "model." + FLOW.format(i)).items()}
    assert back.keys() == {k for k in ref if k.startswith("model.nf_flows.")}
    assert all(torch.equal(v, ref[k]) for k, v in back.items())


# -- other sizes, made here by FrEIA 0.2 ---------------------------------------------------------------------------

class PublicFastFlow(nn.Module):
    "FastFlow over FrEIA's blocks, as the public code has it."

    def __init__(self, shapes, steps, kernels, ratio, soft=False):
        super().__init__()
        inn = pytest.importorskip("FrEIA.framework").SequenceINN
        block = pytest.importorskip("FrEIA.modules").AllInOneBlock
        self.norms = nn.ModuleList(nn.LayerNorm(s) for s in shapes)
        self.nf_flows = nn.ModuleList()
        for shape in shapes:
            flow = inn(*shape)
            for k in range(steps):
                flow.append(block, subnet_constructor=self.subnet(kernels[k % len(kernels)], ratio),
                            affine_clamping=2.0, permute_soft=soft)
            self.nf_flows.append(flow)

    def subnet(self, kernel, ratio):
        def make(c_in, c_out):
            hidden = int(c_in * ratio)
            return nn.Sequential(nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2), nn.ReLU(),
                                 nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2))
        return make

    def forward(self, features):
        return [flow(norm(x)) for x, norm, flow in zip(features, self.norms, self.nf_flows)]


def make_reference(shapes, batch, size, seed, **kw) -> dict[str, torch.Tensor]:
    "A reference in the format of the files, of a randomised `PublicFastFlow`."
    np.random.seed(seed), torch.manual_seed(seed)
    model = PublicFastFlow(shapes, **kw)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.15)
    features = [torch.randn(batch, *s) * 2 + 0.5 for s in shapes]
    out = model(features)
    loss = sum((z.square().sum((1, 2, 3)) / 2 - logdet).mean() for z, logdet in out)
    loss.backward()
    maps = [-F.interpolate(torch.exp(-z.square().mean(1, keepdim=True) / 2), size, mode="bilinear", align_corners=False)
            for z, _ in out]
    ref = ({f"features.{i}": x for i, x in enumerate(features)}
           | {f"model.{k}": v for k, v in model.state_dict().items()})
    ref |= {f"z.{i}": z for i, (z, _) in enumerate(out)} | {f"logdet.{i}": j for i, (_, j) in enumerate(out)}
    ref |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    ref |= {"loss": loss, "anomaly_map": torch.stack(maps).mean(0)}
    return {k: v.detach().clone().contiguous() for k, v in ref.items()}


OTHERS = {
    "two odd levels": dict(shapes=[(5, 6, 6), (9, 3, 3)], batch=2, size=(24, 24), seed=1, steps=3, kernels=(5, 1, 1),
                           ratio=0.5),
    "one level, no square": dict(shapes=[(7, 4, 9)], batch=5, size=(20, 33), seed=2, steps=2, kernels=(1,), ratio=2.0),
    "four levels, narrow": dict(shapes=[(26, 4, 4), (13, 4, 4), (40, 2, 2), (2, 3, 3)], batch=1, size=(16, 16), seed=3,
                                steps=5, kernels=(3, 1), ratio=1.0),
    "hidden ratio 0.16": dict(shapes=[(51, 4, 4), (30, 2, 2)], batch=3, size=(16, 16), seed=4, steps=4, kernels=(3, 1),
                              ratio=0.16),
    "rotations": dict(shapes=[(6, 5, 5), (11, 3, 3)], batch=3, size=(12, 12), seed=5, steps=4, kernels=(3,), ratio=1.0,
                      soft=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_fastflow_of_other_sizes(name, dtype, tmp_path, stand_in):
    "FrEIA 0.2's own blocks, through a file of the same keys."
    save_file(make_reference(**OTHERS[name]), tmp_path / "fastflow.safetensors")
    check_fastflow(load_file(tmp_path / "fastflow.safetensors"), stand_in, dtype)


@pytest.mark.parametrize("spoil",
                         ["features.0", "model.norms.0.weight", "model.nf_flows.1.module_list.2.subnet.2.weight", "z.1",
                          "logdet.0", "loss",
                                   "grad.norms.1.bias", "grad.nf_flows.0.module_list.1.global_scale", "anomaly_map"])
def test_the_check_can_fail(spoil, stand_in):
    "One value off by a thousandth of the largest is found, whichever tensor it is in."
    ref = copy.deepcopy(make_reference(**OTHERS["two odd levels"]))
    flat = ref[spoil].view(-1)
    flat[flat.abs().argmax()] *= 1.001 if "features" not in spoil else 1.01
    with pytest.raises(AssertionError, match="off by"):
        check_fastflow(ref, stand_in)


# -- dense flows: CFLOW-AD and HGAD --------------------------------------------------------------------------------

def dense_settings(method: str, ref: dict, pos: torch.Tensor) -> dict:
    "Preset `paper` of a method, of the depth and the code that a file's tensors have."
    return (configure(method=method, preset="paper").settings["detector"]
            | dict(steps=count(ref, "flow.0.module_list."), code=len(pos)))


def dense_gradients(model: DenseDetector) -> dict[str, torch.Tensor]:
    "The flows' gradients under the names of the public code, `LEVEL.flow.module_list…`, flat."
    steps = [(l, k, dict(step.named_parameters())) for l, flow in enumerate(model.flows)
             for k, step in enumerate(flow.steps)]
    return {f"{l}.flow.module_list.{k}.{theirs}": own[ours].grad.flatten() for l, k, own in steps
            for ours, theirs in FREIA_NAMES.items()}


def under(ref: dict, prefix: str) -> dict[str, torch.Tensor]:
    "The tensors whose names begin so, under what follows."
    return {k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)}


def compare(prefix: str, ours: dict, theirs: dict, tolerance: float) -> None:
    "The same names, and each tensor agrees (flat)."
    assert ours.keys() == theirs.keys(), f"different names under {prefix}: {sorted(ours.keys() ^ theirs.keys())}"
    for name, value in theirs.items():
        agree(prefix + name, ours[name].flatten(), value.flatten(), tolerance)


def check_dense(model: DenseDetector, ref: dict, features: list[torch.Tensor],
                pos: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    "Weights, position codes, latents and log-determinants of every level; returns what `latents` gives."
    for l, (z, logdet) in enumerate(latents := list(model.latents(features))):
        compare(f"flow.{l}.", to_freia(model.flows[l]), under(ref, f"flow.{l}."), 1e-6)
        agree(f"pos.{l}", model.code(l).T, pos[l].flatten(1), 1e-6)
        agree(f"z.{l}", z.flatten(0, 1), ref[f"z.{l}"], 1e-5)
        agree(f"logdet.{l}", logdet.flatten(), ref[f"logdet.{l}"], 1e-5,
              rounding(model.flows[l], model.rows(l, features[l]), model.code(l)))
        agree(f"inverse.{l}", model.flows[l].inverse(z, model.code(l)), model.rows(l, features[l]), 1e-4)
    return latents


def size_of(maps: torch.Tensor) -> tuple[int, int]:
    return tuple(maps.shape[-2:])


def float32_noise(levels: int) -> float:
    "What is left in float32 of `levels` numbers up to one that should cancel."
    return 4 * levels * torch.finfo(torch.float32).eps


# -- CFLOW-AD ------------------------------------------------------------------------------------------------------

def check_cflow(ref: dict, stand_in, dtype: torch.dtype = torch.float32) -> None:
    "Everything that a CFLOW-AD reference file holds, against the detector."
    levels = count(ref, "features.")
    features, pos = ([ref[f"{name}.{l}"].to(dtype) for l in range(levels)] for name in ("features", "pos"))
    model = CFlow(stand_in([x.shape[1:] for x in features], size_of(ref["score"])), score=PUBLISHED["cflow"],
                  **dense_settings("cflow", ref, pos[0]) | dict(fibers=None))
    for l in range(levels):
        from_freia(model.flows[l], ref, f"flow.{l}.module_list.")
    model.to(dtype)
    for l, (z, logdet) in enumerate(check_dense(model, ref, features, pos)):
        agree(f"logp.{l}", ((model.bases[l].log_prob(z) + logdet) / z.shape[-1]).flatten(), ref[f"logp.{l}"], 1e-5)
    losses = list(model.losses(features))
    compare("loss.", {str(l): loss for l, loss in enumerate(losses)}, under(ref, "loss."), 1e-5)
    sum(losses).backward()
    compare("grad.", dense_gradients(model), under(ref, "grad."), 1e-4)
    with torch.no_grad():
        parts = model.parts(features)
        maps, images = model.score_parts(parts)
    for l, part in enumerate(parts):
        agree(f"logp of part {l}", part.loglik().flatten() - LOG_2PI / 2, ref[f"logp.{l}"], 1e-5)
    lowest = maps.min()  # theirs is max(sum over levels) - sum, ours minus the mean over levels
    agree("score", levels * (maps - lowest), ref["score"], 1e-5, float32_noise(levels))
    agree("image_score", levels * (images - lowest), ref["image_score"], 1e-5, float32_noise(levels))


both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both
def test_cflow(dtype, stand_in):
    check_cflow(reference("cflow.safetensors"), stand_in, dtype)


# -- HGAD ----------------------------------------------------------------------------------------------------------

STAGES = {"inter": 0, "intra": 1}  # of the public code; here an epoch of two that lies in it
TERMS = {"L_g": "L_g", "L_mi": "L_mi", "L_e": "L_e", "L_in": "L_g_intra", "L_z": "L_z"}


def hgad_of(ref: dict, shapes: list, size: tuple, stand_in, dtype: torch.dtype) -> HGAD:
    "The detector of a reference file for features of these shapes, its weights not loaded."
    classes, centres = ref["phi_intras.0"].shape
    sigma = 4 * 256 / size[1]  # 4 pixels of the file's map
    model = HGAD(stand_in(shapes, size), categories=[f"category {y}" for y in range(classes)],
                 **dense_settings("hgad", ref, ref["pos"]) | dict(centres=centres)).to(dtype)
    # of one category, too, where the product is zero
    model.score = replace(PUBLISHED["hgad"], smooth=sigma, image_smooth=sigma)
    return model


def check_first(model: HGAD, ref: dict) -> None:
    """The parameters as they are initialised: equal, the random offsets both N(0, 1) by
    mean, variance and largest value."""
    for l, base in enumerate(model.bases):
        for theirs, ours in OFFICIAL.items():
            own, value = getattr(base, ours).detach(), ref[f"init.{theirs}.{l}"]
            if ours != "delta":
                agree(f"init.{theirs}.{l}", own, value, 1e-6)
            for kind, v in (("ours", own), ("reference", value)) if ours == "delta" and value.numel() else ():
                n = v.numel()
                assert (abs(v.mean()) < 5 / n**0.5 and abs(v.square().mean() - 1) < 5 * (2 / n) ** 0.5
                        and v.abs().max() < (2 * math.log(n)) ** 0.5 + 3), \
                    f"init.{theirs}.{l} of {kind}: off by more than chance from N(0, 1)"


def hgad_gradients(model: HGAD) -> dict[str, torch.Tensor]:
    "All gradients under the names of the public code; what has none is left out."
    own = {f"{l}.{theirs}": getattr(base, ours).grad for l, base in enumerate(model.bases)
           for theirs, ours in OFFICIAL.items()}
    return dense_gradients(model) | {k: g for k, g in own.items() if g is not None}


def check_hgad(ref: dict, stand_in, dtype: torch.dtype = torch.float32) -> None:
    "Everything that an HGAD reference file holds, against the detector."
    levels, labels = count(ref, "features."), ref["labels"]
    features = [ref[f"features.{l}"].to(dtype) for l in range(levels)]
    torch.manual_seed(0)
    model = hgad_of(ref, [x.shape[1:] for x in features], size_of(ref["test.score"]), stand_in, dtype)
    check_first(model, ref)
    from_official(model, {"nfs": [under(ref, f"flow.{l}.") for l in range(levels)]}
                  | {k: {str(l): ref[f"{k}.{l}"] for l in range(levels)} for k in OFFICIAL})
    latents = check_dense(model, ref, features, [ref["pos"]] * levels)
    for stage, epoch in STAGES.items():
        model.begin(epoch, len(STAGES))
        model.zero_grad()
        for l, (z, logdet) in enumerate(latents):
            terms = hgad_terms(z, logdet, labels, model.bases[l], stage == "intra")
            own = {TERMS[k]: v for k, v in terms.items()} | {"total": hgad_loss(terms)}
            compare(f"loss.{l}.{stage}.", own, under(ref, f"loss.{l}.{stage}."), 1e-5)
        losses = list(model.losses(features, labels))
        for l, loss in enumerate(losses):
            agree(f"loss.{l}.{stage}.total of the detector", loss, ref[f"loss.{l}.{stage}.total"], 1e-5)
        sum(losses).backward()
        for l in range(levels):
            compare(f"grad.{l}.{stage}.", under(hgad_gradients(model), f"{l}."), under(ref, f"grad.{l}.{stage}."), 1e-4)
    check_hgad_scores(model, ref, stand_in, dtype)


@torch.no_grad()
def check_hgad_scores(trained: HGAD, ref: dict, stand_in, dtype: torch.dtype) -> None:
    "The test images of a reference file, whose category is known: likelihood, entropy, and the maps made of them."
    levels, size = len(trained.flows), size_of(ref["test.score"])
    features = [ref[f"test.features.{l}"].to(dtype) for l in range(levels)]
    model = hgad_of(ref, [x.shape[1:] for x in features], size, stand_in, dtype)
    model.load_state_dict(trained.state_dict())
    parts = model.parts(features, ref["test.class_id"].expand(len(features[0])))
    for l, part in enumerate(parts):
        agree(f"test.logp.{l}", part.loglik() - LOG_2PI / 2, ref[f"test.logp.{l}"], 1e-5)
        agree(f"test.neg_entropy.{l}", part.entropy, ref[f"test.neg_entropy.{l}"], 1e-5)
    for name, criterion in (("logp", "likelihood"), ("entropy", "entropy")):
        raw = combine(parts, size, replace(model.score, criterion=criterion, smooth=0.0))
        agree(f"test.score_{name}", gaussian(levels * (raw - raw.min()), 4.0), ref[f"test.score_{name}"], 1e-5,
              float32_noise(levels))
    maps, images = model.score_parts(parts)  # means over levels, theirs are sums
    noise = levels * float32_noise(levels)
    agree("test.score", levels**2 * maps, ref["test.score"], 1e-5, noise)
    agree("test.image_score", levels**2 * images, ref["test.image_score"], 1e-5, noise)


@both
def test_hgad(dtype, stand_in):
    check_hgad(reference("hgad.safetensors"), stand_in, dtype)


# -- other sizes of dense flows, made here by FrEIA 0.2 and from the formulas --------------------------------------

def public_flow(channels: int, code: int, steps: int, seed: int) -> nn.Module:
    "A conditional FrEIA flow as in both public codes, its weights randomised, in float64."
    inn, block = pytest.importorskip("FrEIA.framework").SequenceINN, pytest.importorskip("FrEIA.modules").AllInOneBlock
    np.random.seed(seed), torch.manual_seed(seed)
    subnet = lambda i, o: nn.Sequential(nn.Linear(i, 2 * i), nn.ReLU(), nn.Linear(2 * i, o))
    flow = inn(channels)
    for _ in range(steps):
        flow.append(block, cond=0, cond_shape=(code,), subnet_constructor=subnet, affine_clamping=1.9,
                    global_affine_type="SOFTPLUS", permute_soft=True)
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.15)
    return flow.double()


def public_code(channels: int, height: int, width: int) -> torch.Tensor:
    "Sines and cosines: of columns in the first half, of rows in the second."
    pos, half = torch.zeros(channels, height, width), channels // 2
    for i in range(0, half, 2):
        rate = math.exp(-math.log(1e4) * i / half)
        for x in range(width):
            pos[i, :, x], pos[i + 1, :, x] = math.sin(x * rate), math.cos(x * rate)
        for y in range(height):
            pos[half + i, y], pos[half + i + 1, y] = math.sin(y * rate), math.cos(y * rate)
    return pos


def public_rows(flow: nn.Module, x: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Latent and log-determinant of every (image, position)."
    rows = x.double().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return flow(rows, [pos.double().flatten(1).T.repeat(len(x), 1)])


def public_maps(values: list[torch.Tensor], size: tuple) -> torch.Tensor:
    "max(sum) - sum over levels of exp(value - its maximum over all images)."
    up = lambda v: F.interpolate((v - v.max()).exp()[:, None], size, mode="bilinear", align_corners=True)[:, 0]
    total = sum(map(up, values))
    return total.max() - total


def as_reference(ref: dict) -> dict[str, torch.Tensor]:
    "Tensors as in the files: float32 or whole numbers."
    return {k: (v.detach().float() if v.is_floating_point() else v).clone().contiguous() for k, v in ref.items()}


def weights_and_gradients(flows: list[nn.Module], stage: str = "") -> dict[str, torch.Tensor]:
    ref = {f"flow.{l}.{k}": v for l, flow in enumerate(flows) for k, v in flow.state_dict().items()}
    return (ref
            | {f"grad.{l}.{stage}flow.{k}": p.grad for l, flow in enumerate(flows) for k, p in flow.named_parameters()
               if p.grad is not None})


def make_cflow(shapes, batch, size, seed, steps, code) -> dict[str, torch.Tensor]:
    "A reference in the format of `cflow.safetensors`."
    flows = [public_flow(c, code, steps, seed + l) for l, (c, _, _) in enumerate(shapes)]
    features, pos = ([torch.randn(batch, *s) * 1.3 + 0.2 for s in shapes],
                     [public_code(code, h, w) for _, h, w in shapes])
    ref, values = {}, []
    for l, (flow, x, p) in enumerate(zip(flows, features, pos)):
        z, logdet = public_rows(flow, x, p)
        logp = (-z.shape[1] / 2 * math.log(2 * math.pi) - z.square().sum(1) / 2 + logdet) / z.shape[1]
        loss = (1 + (-logp).exp()).log().mean()
        loss.backward()
        values.append(logp.view(batch, *x.shape[2:]))
        ref |= {f"features.{l}": x, f"pos.{l}": p, f"z.{l}": z, f"logdet.{l}": logdet, f"logp.{l}": logp,
                f"loss.{l}": loss}
    maps = public_maps(values, size)
    return as_reference(ref | weights_and_gradients(flows) | {"score": maps, "image_score": maps.flatten(1).amax(1)})


CFLOWS = {
    "three levels, odd": dict(shapes=[(5, 6, 4), (9, 3, 3), (2, 2, 2)], batch=3, size=(12, 20), seed=1, steps=3,
                              code=8),
    "one level, one image": dict(shapes=[(11, 4, 5)], batch=1, size=(17, 16), seed=2, steps=5, code=4),
    # a seed that leaves no ReLU input within rounding of 0 (seed 3: 2e-7 of their mean), where float32 may fall
    # on either side
    "one position, deep": dict(shapes=[(16, 1, 1), (24, 5, 5)], batch=6, size=(9, 9), seed=7, steps=8, code=20),
}


@both
@pytest.mark.parametrize("name", CFLOWS)
def test_cflow_of_other_sizes(name, dtype, tmp_path, stand_in):
    save_file(make_cflow(**CFLOWS[name]), tmp_path / "cflow.safetensors")
    check_cflow(load_file(tmp_path / "cflow.safetensors"), stand_in, dtype)


def public_terms(z, logdet, y, mus, deltas, phi, psi) -> dict[str, torch.Tensor]:
    """HGAD's terms from their formulas, with an (N, M, D) array of each row's own centres; and what
    the maps are made of, row by row."""
    D, K = z.shape[1], len(mus)
    exponent = -(z[:, None] - mus).square().sum(-1) / 2  # (N, K)
    c, soft = phi.log_softmax(0), torch.full((len(z), K), 0.02 / K, dtype=z.dtype)
    soft[torch.arange(len(z)), y] += 0.98
    posterior, joint = exponent.softmax(1), exponent + c.detach()
    neg_entropy = torch.special.xlogy(posterior, posterior).sum(1)
    main = mus.detach()[:, None]
    own = torch.cat([main, main + deltas], 1)[y]  # (N, M, D)
    logp = ((-(z[:, None] - own).square().sum(-1) / 2) + psi[y].log_softmax(1)).logsumexp(1) + logdet
    per_dimension = logp / D - math.log(2 * math.pi) / 2
    return {"L_g": (-(exponent + c).logsumexp(1) - logdet).mean() / D,
            "L_mi": (soft * (joint - joint.logsumexp(1, keepdim=True) - c.detach())).sum(1).mean(),
            "L_e": -neg_entropy.mean(), "L_g_intra": -logp.mean() / D, "L_z": (1 + (-per_dimension).exp()).log().mean(),
            "logp": per_dimension, "neg_entropy": neg_entropy}


def public_first(classes: int, centres: int, channels: int) -> dict[str, torch.Tensor]:
    "HGAD's parameters as initialised."
    copies, mus = channels // classes, torch.zeros(classes, channels)
    for y in range(classes):
        mus[y, [y + i * classes for i in range(copies)]] = 5 / math.sqrt(2 * channels // classes)
    return {"mus": mus, "mu_deltas": torch.randn(classes, centres - 1, channels), "phi_inters": torch.zeros(classes),
            "phi_intras": torch.zeros(classes, centres)}


def make_hgad(channels, map_size, classes, centres, batch, test_sizes, size, seed, steps,
              code) -> dict[str, torch.Tensor]:
    """A reference in the format of `hgad.safetensors`: `channels` and `test_sizes` (of the test images'
    features) have an entry a level."""
    flows = [public_flow(c, code, steps, seed + l) for l, c in enumerate(channels)]
    labels, test_class = torch.randint(classes, (batch,)), torch.tensor(classes - 1)
    labels[0], pos = classes - 1, public_code(code, *map_size)
    ref, logps, entropies = {"labels": labels, "pos": pos, "test.class_id": test_class}, [], []
    per_row = lambda y, z: y.repeat_interleave(len(z) // len(y))
    for l, (flow, c) in enumerate(zip(flows, channels)):
        first = public_first(classes, centres, c)
        own = {k: (v + 0.2 * torch.randn_like(v)).double().requires_grad_() for k, v in first.items()}
        x, tests = torch.randn(batch, c, *map_size) * 1.3, torch.randn(4, c, *test_sizes[l]) * 1.5
        ref |= ({f"features.{l}": x} | {f"init.{k}.{l}": v for k, v in first.items()}
                | {f"{k}.{l}": v for k, v in own.items()})
        for stage in STAGES:
            for p in (*flow.parameters(), *own.values()):
                p.grad = None
            z, logdet = public_rows(flow, x, pos)
            terms = public_terms(z, logdet, per_row(labels, z), *own.values())
            shown = ["L_g", "L_mi", "L_e"] + (["L_g_intra", "L_z"] if stage == "intra" else [])
            total = terms["L_g"] - 100 * terms["L_mi"] + sum(terms[k] for k in shown[2:])
            total.backward()
            ref |= {f"loss.{l}.{stage}.{k}": terms[k] for k in shown} | {f"loss.{l}.{stage}.total": total}
            ref |= {f"grad.{l}.{stage}.{k}": p.grad.clone() for k, p in own.items() if p.grad is not None}
            ref |= {k.replace("grad.0", f"grad.{l}"): v.clone()
                    for k, v in weights_and_gradients([flow], f"{stage}.").items() if "grad" in k}
        z_test, logdet_test = public_rows(flow, tests, public_code(code, *test_sizes[l]))
        terms = public_terms(z_test, logdet_test, per_row(test_class.expand(4), z_test), *own.values())
        for values, kind in ((logps, "logp"), (entropies, "neg_entropy")):
            values.append(terms[kind].detach().view(4, *test_sizes[l]))
        ref |= {f"z.{l}": z, f"logdet.{l}": logdet, f"test.features.{l}": tests, f"test.logp.{l}": logps[l],
                f"test.neg_entropy.{l}": entropies[l]}
    smooth = lambda maps: torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 4)) for m in maps])
    a, b = (smooth(public_maps(v, size)) for v in (logps, entropies))
    ref |= {"test.score_logp": a, "test.score_entropy": b, "test.score": a * b,
            "test.image_score": (a * b).flatten(1).amax(1)}
    return as_reference(ref | {k: v for k, v in weights_and_gradients(flows).items() if k.startswith("flow")})


HGADS = {
    "one category, one centre, one image": dict(channels=[10], map_size=(3, 3), classes=1, centres=1, batch=1,
                                                test_sizes=[(4, 4)], size=(16, 16), seed=1, steps=2, code=8),
    "odd, three levels, not square": dict(channels=[7, 9, 13], map_size=(2, 5), classes=3, centres=4, batch=4,
                                          test_sizes=[(6, 4), (3, 2), (2, 2)], size=(20, 24), seed=2, steps=3, code=12),
    "one position, no offsets": dict(channels=[11, 8], map_size=(1, 1), classes=5, centres=1, batch=9,
                                     test_sizes=[(4, 4), (1, 1)], size=(32, 32), seed=3, steps=4, code=4),
    "one category, many centres": dict(channels=[12, 6], map_size=(4, 2), classes=1, centres=7, batch=3,
                                       test_sizes=[(3, 5), (5, 3)], size=(18, 30), seed=4, steps=2, code=16),
    "many categories, one level": dict(channels=[15], map_size=(2, 2), classes=15, centres=2, batch=8,
                                       test_sizes=[(5, 5)], size=(24, 24), seed=5, steps=3, code=8),
}


@both
@pytest.mark.parametrize("name", HGADS)
def test_hgad_of_other_sizes(name, dtype, tmp_path, stand_in):
    save_file(make_hgad(**HGADS[name]), tmp_path / "hgad.safetensors")
    check_hgad(load_file(tmp_path / "hgad.safetensors"), stand_in, dtype)


def test_references_made_here_are_of_the_same_form():
    "The same kinds of keys as in the files, shapes of as many axes, the same types."
    kind = lambda ref: {k.replace(".1.", ".0.").replace(".2.", ".0.").replace(".3.", ".0."): (v.ndim, v.dtype)
                        for k, v in ref.items() if k[-2:] != ".1"}
    assert kind(make_cflow(**CFLOWS["one position, deep"] | dict(steps=2))) == kind(reference("cflow.safetensors"))
    assert (kind(make_hgad(**HGADS["one category, many centres"] | dict(classes=2)))
            == kind(reference("hgad.safetensors")))


def spoiled(ref: dict, key: str) -> dict:
    """A copy with one value changed: the largest by a thousandth (of what is only read, by a
    hundredth), whole numbers to another."""
    ref = copy.deepcopy(ref)
    flat = ref[key].view(-1)
    if not flat.is_floating_point():
        flat[0] = (flat[0] + 1) % len(ref["mus.0"])
    elif key.startswith("init.mu_deltas"):
        flat[0] = 9.0  # random: only chance is checked
    else:
        i = flat.abs().argmax()
        flat[i] = (flat[i]
                   * (1.01 if key.startswith(("features", "test.features", "flow", "mu", "phi", "pos")) else 1.001)
                   if flat[i] else 0.001)
    return ref


@pytest.fixture(scope="module")
def cflow_reference() -> dict:
    return make_cflow(**CFLOWS["three levels, odd"])


@pytest.fixture(scope="module")
def hgad_reference() -> dict:
    return make_hgad(**HGADS["odd, three levels, not square"])


BLOCK = ("global_scale", "global_offset", "subnet.0.weight", "subnet.0.bias", "subnet.2.weight", "subnet.2.bias")
SPOILED_CFLOW = ["features.1", "pos.2", "z.0", "logdet.1", "logp.2", "loss.1", "score", "image_score",
                 *(f"flow.1.module_list.2.{k}" for k in (*BLOCK, "w_perm", "w_perm_inv")),
                 *(f"grad.0.flow.module_list.1.{k}" for k in BLOCK)]
SPOILED_HGAD = ["features.2", "pos", "labels", "z.1", "logdet.2",
                *(f"{i}{k}.1" for i in ("", "init.") for k in OFFICIAL),
                *(f"loss.2.inter.{k}" for k in ("L_g", "L_mi", "L_e", "total")),
                *(f"loss.0.intra.{k}" for k in (*TERMS.values(), "total")),
                *(f"flow.2.module_list.0.{k}" for k in (*BLOCK, "w_perm", "w_perm_inv")),
                *(f"grad.1.inter.{k}" for k in ("mus", "phi_inters")), *(f"grad.1.intra.{k}" for k in OFFICIAL),
                *(f"grad.2.{stage}.flow.module_list.1.{k}" for stage in STAGES for k in BLOCK),
                "test.features.1", "test.class_id", "test.logp.2", "test.neg_entropy.0", "test.score_logp",
                "test.score_entropy", "test.score", "test.image_score"]


@pytest.mark.parametrize("key", SPOILED_CFLOW)
def test_the_check_of_cflow_can_fail(key, cflow_reference, stand_in):
    with pytest.raises(AssertionError, match="off by"):
        check_cflow(spoiled(cflow_reference, key), stand_in)


@pytest.mark.parametrize("key", SPOILED_HGAD)
def test_the_check_of_hgad_can_fail(key, hgad_reference, stand_in):
    with pytest.raises(AssertionError, match="off by"):
        check_hgad(spoiled(hgad_reference, key), stand_in)


@pytest.mark.parametrize("method", ["cflow", "hgad"])
def test_a_missing_or_surplus_tensor_is_found(method, cflow_reference, hgad_reference, stand_in):
    "A gradient or a loss that one side alone has."
    ref, check = (cflow_reference, check_cflow) if method == "cflow" else (hgad_reference, check_hgad)
    check(ref, stand_in)
    for key in (k for k in ref
                if k in ("loss.1", "loss.1.intra.L_z", "grad.1.intra.mu_deltas",
                         "grad.1.flow.module_list.0.global_offset")):
        with pytest.raises(AssertionError, match="different names"):
            check({k: v for k, v in ref.items() if k != key}, stand_in)
    if method == "hgad":
        with pytest.raises(AssertionError, match="different names"):
            check(ref | {"grad.1.inter.mu_deltas": torch.zeros_like(ref["mu_deltas.1"])}, stand_in)


# -- HGAD's own checkpoints ----------------------------------------------------------------------------------------

def hgad_model(stand_in, seed=0, shapes=((6, 3, 3), (9, 2, 2)), classes=3, **kw) -> HGAD:
    "A small HGAD, all its parameters random."
    torch.manual_seed(seed)
    model = HGAD(stand_in(shapes), [f"category {y}" for y in range(classes)],
                 **dict(steps=2, code=4, centres=3, norm="none") | kw)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def as_public(model: HGAD) -> dict:
    "What the public code saves: state dicts of its flows in a list, and of its `ParameterList`s."
    lists = {theirs: nn.ParameterList(getattr(b, ours).detach().clone() for b in model.bases).state_dict()
             for theirs, ours in OFFICIAL.items()}
    return {"nfs": [to_freia(flow) for flow in model.flows], **lists}


def state_of(model: HGAD) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items() if k != "calibration"}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_our_checkpoint_has_the_official_form(stand_in):
    model = hgad_model(stand_in)
    own, public = to_official(model), as_public(model)
    assert own.keys() == public.keys() and all(equal(a, b) for a, b in zip(own["nfs"], public["nfs"], strict=True))
    assert all(equal(own[k], public[k]) for k in OFFICIAL)


@pytest.mark.parametrize("write",
                         [to_official, as_public,
                          lambda m: as_public(m) | {k: list(as_public(m)[k].values()) for k in OFFICIAL},
                          lambda m: as_public(m) | {"nfs": dict(zip("01", as_public(m)["nfs"]))}],
                          ids=["ours", "ParameterList", "lists", "flows by name"])
def test_official_checkpoint_comes_back(write, stand_in, tmp_path):
    "Through a file of tensors alone, to the bit; the same latents and losses; the other model's own weights are gone."
    model, other = hgad_model(stand_in), hgad_model(stand_in, seed=1)
    torch.save(write(model), tmp_path / "checkpoint.pt")
    assert from_official(other, torch.load(tmp_path / "checkpoint.pt", weights_only=True)) is other
    assert equal(state_of(model), state_of(other)) and equal(*(to_official(m)["nfs"][1] for m in (model, other)))
    x, y = [torch.randn(4, *s) for s in model.backbone.shapes], torch.tensor([0, 2, 1, 1])
    assert [v.item() for v in model.losses(x, y)] == [v.item() for v in other.losses(x, y)]
    with torch.no_grad():
        other.bases[0].mu.zero_(), other.flows[0].steps[0].mixing.gamma.zero_()
    assert model.bases[0].mu.abs().max() > 0 and model.flows[0].steps[0].mixing.gamma.abs().max() > 0, (
        "the checkpoint shares memory with the model")


@pytest.mark.parametrize("other, sizes", [
    (dict(classes=4), ("mus of level 0", "(3, 6)", "(4, 6)")),
    (dict(classes=1), ("mus of level 0", "(3, 6)", "(1, 6)")),
    (dict(centres=5), ("mu_deltas of level 0", "(3, 2, 6)", "(3, 4, 6)")),
    (dict(shapes=((6, 3, 3),)), ("2 levels", "detector 1")),
    (dict(shapes=((6, 3, 3), (9, 2, 2), (9, 2, 2))), ("2 levels", "detector 3")),
    (dict(shapes=((6, 3, 3), (10, 2, 2))), ("9", "10")),
    (dict(shapes=((4, 3, 3), (9, 2, 2))), ("6", "4")),
    (dict(code=8), ("14", "22")),
], ids=lambda v: ", ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_official_checkpoint_of_other_sizes(other, sizes, stand_in, tmp_path):
    "A DataError that names both sizes."
    torch.save(as_public(hgad_model(stand_in)), tmp_path / "checkpoint.pt")
    with pytest.raises(DataError) as error:
        from_official(hgad_model(stand_in, seed=1, **other), torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert all(s in str(error.value) for s in sizes), str(error.value)


@pytest.mark.parametrize("steps", [1, 3])
def test_official_checkpoint_of_other_depth(steps, stand_in):
    "A flow of 2 steps is neither cut off nor completed."
    with pytest.raises(DataError, match="steps"):
        from_official(hgad_model(stand_in, seed=1, steps=steps), as_public(hgad_model(stand_in)))


def test_official_checkpoint_loads_whole_or_not_at_all(stand_in):
    "After the error the detector is as it was."
    state, model = as_public(hgad_model(stand_in)), hgad_model(stand_in, seed=1)
    before = state_of(model)
    with pytest.raises(DataError):
        from_official(model, state | {"phi_intras": {"0": state["phi_intras"]["0"], "1": torch.zeros(3, 2)}})
    assert equal(state_of(model), before)


def test_official_checkpoint_of_something_else(stand_in):
    "Without one of its lists."
    state = as_public(hgad_model(stand_in))
    for key in state:
        with pytest.raises(DataError, match=f"{key} missing"):
            from_official(hgad_model(stand_in), {k: v for k, v in state.items() if k != key})


def test_official_checkpoint_with_a_short_list(stand_in):
    state = as_public(hgad_model(stand_in))
    for short in ({"0": state["phi_inters"]["0"]}, [state["phi_inters"]["0"]]):
        with pytest.raises(DataError, match="phi_inters"):
            from_official(hgad_model(stand_in), state | {"phi_inters": short})


@pytest.mark.parametrize("base", ["classes", "standard", "diagonal"])
def test_official_checkpoint_needs_the_hierarchy(base, stand_in):
    "Centres have nowhere to go in another base."
    with pytest.raises(DataError, match="hierarch"):
        from_official(hgad_model(stand_in, base=base), as_public(hgad_model(stand_in)))


def test_official_checkpoint_needs_categories(stand_in):
    "A detector that has not been told its categories has no centres yet."
    with pytest.raises(DataError, match="categories"):
        from_official(HGAD(stand_in([(6, 3, 3), (9, 2, 2)]), steps=2, code=4, centres=3, norm="none"),
                      as_public(hgad_model(stand_in)))
