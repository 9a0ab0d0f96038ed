"""The numbers of the public implementations: outputs, losses, gradients and scores from the weights in a reference file.

Sizes are read off the tensors, so a file of the same keys and other sizes is checked the same way.
"""
import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from flowrepro.detectors import FastFlow
from flowrepro.flows import FREIA_NAMES, Flow, from_freia, positive, to_freia
from flowrepro.scores import PUBLISHED

GOLDEN = Path(os.environ.get("FLOWREPRO_GOLDEN") or Path(__file__).resolve().parents[1] / ".." / "shared" / "golden")
FLOW = "nf_flows.{}.module_list."


def reference(name: str) -> dict[str, torch.Tensor]:
    "The tensors of a reference file; the test is skipped where it is absent."
    if not (GOLDEN / name).is_file():
        pytest.skip(f"{GOLDEN / name} is absent; set FLOWREPRO_GOLDEN")
    return load_file(GOLDEN / name)


def agree(name: str, ours, theirs, tolerance: float, rounding: float = 0.0) -> None:
    "The largest difference is within `tolerance` of the largest value, or within the reference's own `rounding`."
    assert tuple(ours.shape) == tuple(theirs.shape), f"{name}: shape {tuple(ours.shape)}, reference {tuple(theirs.shape)}"
    theirs = theirs.to(torch.float64)
    error, largest = (ours.detach().to(torch.float64) - theirs).abs().max(), theirs.abs().max()
    assert error <= max(tolerance * largest, rounding), f"{name}: off by {error:.2e}, {error / largest:.1e} of its largest value, allowed {tolerance:.0e}"


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
    return dict(steps=steps, kernels=tuple(w.shape[-1] for w in first[0]), ratio=(low + high) / 2, clamp=2.0, rule="published",
                soft=not torch.equal(perm, torch.eye(len(perm))[perm.argmax(1)]),
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
def rounding(flow: Flow, x: torch.Tensor) -> float:
    """How far float32 may be off in a log-determinant: its terms have both signs, so the error is measured by the sum of their sizes.

    In float32 both sides make the same error in log g (g near 1), in float64 only the reference does.
    """
    size = torch.zeros(len(x), dtype=x.dtype)
    for step in flow.steps:
        s, _ = step.coupling.scale_shift(x.split(step.coupling.sizes, step.dim)[0], None)
        size += s.abs().sum((1, 2, 3)) + x[0, 0].numel() * positive(step.mixing.gamma).log().abs().sum()
        x = step(x)[0]
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
        agree(f"local logdet of level {i}", (part.logdet * channels).sum((1, 2)), ref[f"logdet.{i}"], 1e-5, 2 * error[i])
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
                flow.append(block, subnet_constructor=self.subnet(kernels[k % len(kernels)], ratio), affine_clamping=2.0, permute_soft=soft)
            self.nf_flows.append(flow)

    def subnet(self, kernel, ratio):
        def make(c_in, c_out):
            hidden = int(c_in * ratio)
            return nn.Sequential(nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2))
        return make

    def forward(self, features):
        return [flow(norm(x)) for x, norm, flow in zip(features, self.norms, self.nf_flows)]


def make_reference(shapes, batch, size, seed, **kw) -> dict[str, torch.Tensor]:
    "A reference in the format of the files, of a randomised `PublicFastFlow`."
    torch.manual_seed(seed)
    model = PublicFastFlow(shapes, **kw)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.15)
    features = [torch.randn(batch, *s) * 2 + 0.5 for s in shapes]
    out = model(features)
    loss = sum((z.square().sum((1, 2, 3)) / 2 - logdet).mean() for z, logdet in out)
    loss.backward()
    maps = [-F.interpolate(torch.exp(-z.square().mean(1, keepdim=True) / 2), size, mode="bilinear", align_corners=False) for z, _ in out]
    ref = {f"features.{i}": x for i, x in enumerate(features)} | {f"model.{k}": v for k, v in model.state_dict().items()}
    ref |= {f"z.{i}": z for i, (z, _) in enumerate(out)} | {f"logdet.{i}": j for i, (_, j) in enumerate(out)}
    ref |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    ref |= {"loss": loss, "anomaly_map": torch.stack(maps).mean(0)}
    return {k: v.detach().clone().contiguous() for k, v in ref.items()}


OTHERS = {
    "two odd levels": dict(shapes=[(5, 6, 6), (9, 3, 3)], batch=2, size=(24, 24), seed=1, steps=3, kernels=(5, 1, 1), ratio=0.5),
    "one level, no square": dict(shapes=[(7, 4, 9)], batch=5, size=(20, 33), seed=2, steps=2, kernels=(1,), ratio=2.0),
    "four levels, narrow": dict(shapes=[(26, 4, 4), (13, 4, 4), (40, 2, 2), (2, 3, 3)], batch=1, size=(16, 16), seed=3, steps=5, kernels=(3, 1), ratio=1.0),
    "hidden ratio 0.16": dict(shapes=[(51, 4, 4), (30, 2, 2)], batch=3, size=(16, 16), seed=4, steps=4, kernels=(3, 1), ratio=0.16),
    "rotations": dict(shapes=[(6, 5, 5), (11, 3, 3)], batch=3, size=(12, 12), seed=5, steps=4, kernels=(3,), ratio=1.0, soft=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_fastflow_of_other_sizes(name, dtype, tmp_path, stand_in):
    "FrEIA 0.2's own blocks, through a file of the same keys."
    save_file(make_reference(**OTHERS[name]), tmp_path / "fastflow.safetensors")
    check_fastflow(load_file(tmp_path / "fastflow.safetensors"), stand_in, dtype)


@pytest.mark.parametrize("spoil", ["features.0", "model.norms.0.weight", "model.nf_flows.1.module_list.2.subnet.2.weight", "z.1", "logdet.0", "loss",
                                   "grad.norms.1.bias", "grad.nf_flows.0.module_list.1.global_scale", "anomaly_map"])
def test_the_check_can_fail(spoil, stand_in):
    "One value off by a thousandth of the largest is found, whichever tensor it is in."
    ref = copy.deepcopy(make_reference(**OTHERS["two odd levels"]))
    flat = ref[spoil].view(-1)
    flat[flat.abs().argmax()] *= 1.001 if "features" not in spoil else 1.01
    with pytest.raises(AssertionError, match="off by"):
        check_fastflow(ref, stand_in)
