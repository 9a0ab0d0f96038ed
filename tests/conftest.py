"""What several test files share: one thread, a cache of their own, a small toy set, small backbones."""
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

TEST_DATA = Path(os.environ.get("FLOWREPRO_TEST_DATA") or Path(__file__).resolve().parents[1] / ".." / "shared"
                 / "data")


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
    root = TEST_DATA / "tiny_visa_fryum"
    if not root.is_dir():
        pytest.skip(f"{root} is absent; set FLOWREPRO_TEST_DATA")
    return root


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
