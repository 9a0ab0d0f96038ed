"""What several test files share: one thread, a cache of their own, a small toy set, small backbones."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("FLOWREPRO_TEST_DATA") or ROOT / "../shared/data")


def real_images(name: str) -> Path:
    "A folder of real images; the test is skipped where it is absent."
    if not (TEST_DATA / name).is_dir():
        pytest.skip(f"{TEST_DATA / name} is absent; set FLOWREPRO_TEST_DATA")
    return TEST_DATA / name


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory):
    "One thread (the tensors are small), and a cache that no other session sees."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWREPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_draws():
    "Every test starts from the same seeds, alone or after others."
    torch.manual_seed(0), np.random.seed(0)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    "The root of a small toy set: 4 categories of 10 + 4 normal and 6 anomalous images of 64 pixels."
    from flowrepro.data import make_toy

    return make_toy(tmp_path_factory.mktemp("data") / "toy", size=64, n_train=10, n_test_good=4, n_per_defect=2)


@pytest.fixture(scope="session")
def tiny_visa() -> Path:
    "The root of the tiny VisA sample."
    return real_images("tiny_visa_fryum")


@pytest.fixture(scope="session")
def parts_folder(tmp_path_factory) -> Path:
    "Somebody's own images, without masks: 12 good ones, 3 with a dark spot, of two sizes and formats."
    root, rng = tmp_path_factory.mktemp("own") / "my_parts", np.random.default_rng(0)
    for kind, n in (("good", 12), ("spot", 3)):
        (root / kind).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(120, 160, (48, 40 + 8 * (i % 2), 3), dtype=np.uint8)
            if kind == "spot":
                pixels[16:30, 10:26] = 10
            Image.fromarray(pixels).save(root / kind / f"{i:02}.{'png' if i % 2 else 'bmp'}")
    return root


@pytest.fixture(scope="session")
def tiny_backbone():
    "`tiny_backbone(size=32, **kw)`: a real backbone of two levels with random weights, made in milliseconds."
    from flowrepro.backbones import Backbone

    return lambda size=32, **kw: Backbone(**{"name": "test_resnet.r160_in1k", "levels": (1, 2), "weights": "random",
                                             "size": size} | kw)


class StandIn(nn.Module):
    "The attributes of a backbone of any shapes, without a network."

    def __init__(self, shapes, size=32):
        super().__init__()
        self.shapes, self.size, self.weight_id = [tuple(s) for s in shapes], size, "stand-in"

    def config(self) -> dict:
        return dict(name="stand-in", size=self.size)


@pytest.fixture(scope="session")
def stand_in():
    "`stand_in(shapes, size)`: a backbone to be fed with features instead of images."
    return StandIn


class Bank:
    "The interface of a `FeatureBank` over tensors given: one (N, C, H, W) a level."

    copies = 1

    def __init__(self, *levels):
        self.levels, self.device = levels, levels[0].device
        self.shapes = [tuple(x.shape[1:]) for x in levels]

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, index) -> list[torch.Tensor]:
        return [x[index] for x in self.levels]


@pytest.fixture(scope="session")
def bank_of():
    "`bank_of(*levels)`: a bank of tensors that are there already."
    return Bank


@pytest.fixture
def features() -> SimpleNamespace:
    "Random features of 14 images: shapes and a bank, not standardised, one channel dead."
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(14, 4, 6, 6, generator=g) * 3 + 5, torch.randn(14, 5, 3, 3, generator=g) * 0.2 - 1
    a[:, 2] = 7.0
    return SimpleNamespace(shapes=[(4, 6, 6), (5, 3, 3)], bank=Bank(a, b))


def moved(module, device=None, **_):
    "`Module.to` for tensors without values, within FakeTensorMode."
    for m in module.modules():
        for held in (m._parameters, m._buffers):
            for k, t in held.items():
                if t is not None:
                    empty = torch.empty(t.shape, dtype=t.dtype, device=device or t.device)
                    held[k] = nn.Parameter(empty, t.requires_grad) if held is m._parameters else empty
    return module


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    "Equal up to `tolerance` of the largest value of b (at least 1)."
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    assert not b.numel() or (error := (a - b).abs().max().item()) <= tolerance * max(1.0, b.abs().max().item()), (
        f"off by {error:.1e}")


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, backward included (views without
    storage of their own count as well)."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def run_experiment(notebook: str, runs: Path, out: Path) -> None:
    "Run the code cells of an experiment notebook here, as papermill would over the runs of a folder."
    scope = {}
    for cell in json.loads((ROOT / f"nbs/experiments/{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
            if "parameters" in cell["metadata"].get("tags", []):
                scope |= {"runs": str(runs), "out_dir": str(out)}
