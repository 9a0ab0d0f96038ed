"The feature bank: right numbers wherever it lives, never an old or half-written one."
import errno
import json
import multiprocessing as mp
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flowrepro
from flowrepro import features as ft
from flowrepro import data
from flowrepro.data import Dataset, load
from flowrepro.features import FeatureBank, LiveFeatures, channel_stats


@dataclass(frozen=True)
class Transform:
    size: int = 16
    rotate: float = 0.0
    @property
    def random(self): return self.rotate > 0


class Data:
    "A folder of images; `delay` seconds for each."
    def __init__(self, folder, transform=Transform(), delay=0.0):
        self.records, self.transform, self.delay = (
            tuple(SimpleNamespace(image=p) for p in sorted(Path(folder).glob("*.png"))), transform, delay)
        self.opened = 0
    def __len__(self): return len(self.records)
    def __getitem__(self, i):
        time.sleep(self.delay); self.opened += 1
        im = Image.open(self.records[i].image).resize((self.transform.size,)*2)
        if self.transform.random: im = im.rotate((2*torch.rand(()).item() - 1)*self.transform.rotate)
        return SimpleNamespace(image=torch.from_numpy(np.array(im)).permute(2, 0, 1).contiguous(),
                               path=self.records[i].image)


class Net(nn.Module):
    "Two levels of a small convolution."
    def __init__(self, seed=0, gain=1.0):
        super().__init__()
        self.shapes, self.seed, self.gain = [(4, 8, 8), (6, 4, 4)], seed, gain
        g = torch.Generator().manual_seed(seed)
        self.w = [torch.randn(4, 3, 2, 2, generator=g), torch.randn(6, 3, 4, 4, generator=g)]
    def config(self): return dict(name="net", seed=self.seed, gain=self.gain)
    @torch.no_grad()
    def forward(self, x): return [self.gain*torch.nn.functional.conv2d(x/255, w, stride=w.shape[-1]) for w in self.w]


@pytest.fixture
def folder(tmp_path):
    f = tmp_path/"images"; f.mkdir(); rng = np.random.default_rng(0)
    for i in range(11): Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f/f"{i:02}.png")
    return f


def bank(data, net=None, **kw): return FeatureBank(data, net or Net(), progress=False, **kw)
def direct(data): return Net()(torch.stack([data[i].image for i in range(len(data))]))
def close(a, b, tol=1e-5):
    return all(p.shape == q.shape and torch.allclose(p, q, rtol=tol, atol=tol) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype, eps", [("float32", 1e-6), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_same_features_everywhere(folder, tmp_path, dtype, eps, cached):
    data, i = Data(folder), torch.tensor([10, 3, 3, 0])
    want = [w[i] for w in direct(data)]
    for where in ("device", "ram", "disk"):
        b = bank(data, where=where, dtype=dtype, cache=tmp_path/where if cached else None, batch=4)
        got = b[i]
        assert all(g.dtype == torch.float32 and ((g - w).abs() <= eps*w.abs() + 1e-6).all()
                   for g, w in zip(got, want, strict=True))
        assert b.nbytes == 11*(256 + 96)*(4 if dtype == "float32" else 2)
        assert len(b) == 11
        assert b.shapes == Net().shapes
        assert b.seconds > 0


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_indices(folder, where):
    data = Data(folder); b, want = bank(data, where=where), direct(Data(folder))
    mask = np.zeros(11, bool); mask[[1, 4]] = True
    for idx, rows in ((2, [2]), (-1, [10]), (np.int64(3), [3]), (slice(1, 9, 3), [1, 4, 7]),
                      (slice(None, None, -5), [10, 5, 0]), ([5, 0, -1], [5, 0, 10]),
                      (np.array([2, 2]), [2, 2]), (torch.tensor([9], dtype=torch.int32), [9]), (mask, [1, 4]), ([], []),
                      (torch.randperm(11), None)):
        rows = idx if rows is None else rows
        assert close(b[idx], [w[rows] for w in want])
    for bad in (11, [-12], [0.5], np.zeros(10, bool)):
        with pytest.raises(IndexError): b[bad]


def test_batch_is_the_callers_own(folder, tmp_path):
    "Writing into features that were given out changes neither the bank nor its file."
    for where in ("ram", "disk"):
        b = bank(Data(folder), where=where, cache=tmp_path)
        for y in b[:]: y.zero_()
        assert close(b[:], direct(Data(folder)))
        assert close(bank(Data(folder), where=where, cache=tmp_path)[:], direct(Data(folder)))


def test_found_again_unless_anything_changes(folder, tmp_path):
    data = Data(folder); first = bank(data, cache=tmp_path/"c"); opened = data.opened
    for where in ("ram", "disk", "auto"):
        again = bank(data, where=where, cache=tmp_path/"c")
        assert again.found
        assert again.seconds == 0.0
        assert again.key == first.key
        assert close(again[:], first[:], 0)
        assert data.opened == opened
    others = [bank(Data(folder, Transform(17)), Small(), cache=tmp_path/"c"),
              bank(data, dtype="bfloat16", cache=tmp_path/"c"),
              bank(data, Net(seed=1), cache=tmp_path/"c"), bank(data, Net(gain=2.), cache=tmp_path/"c")]
    p = sorted(folder.glob("*"))[5]; raw = bytearray(p.read_bytes())
    p.write_bytes(bytes(raw) + b"\0")                                              # one byte after the image's end
    others.append(bank(data, cache=tmp_path/"c"))
    p.unlink(); others.append(bank(Data(folder), cache=tmp_path/"c"))
    rows = Data(folder); rows.records = rows.records[::-1]; others.append(bank(rows, cache=tmp_path/"c"))
    assert not any(o.found for o in others) and len({o.key for o in (first, *others)}) == 8


@pytest.mark.parametrize("module", ["backbones", "data", "features", "flows"])
def test_the_code_that_makes_features_is_in_the_key(folder, tmp_path, monkeypatch, module):
    "After an edit of it a bank is filled anew; other code changes nothing, and neither does another clone."
    first = bank(Data(folder), cache=tmp_path/"c")
    shutil.copytree(Path(flowrepro.__file__).parent, tmp_path/"clone", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(flowrepro, "__file__", str(tmp_path/"clone/__init__.py"))
    assert bank(Data(folder), cache=tmp_path/"c").found
    with open(tmp_path/f"clone/{module}.py", "a") as f: f.write("\n")
    again = bank(Data(folder), cache=tmp_path/"c")
    assert again.found == (again.key == first.key) == (module == "flows")


class Small(Net):
    def forward(self, x): return super().forward(x[..., :16, :16])


def test_weights_and_levels_of_a_real_backbone_are_in_the_key(folder):
    from flowrepro.backbones import Backbone
    make = lambda **kw: ft.bank_key(Data(folder),
                                    Backbone(**dict(name="resnet18", levels=(1,), weights="random", size=64) | kw),
                                    "float32")
    keys = [make(), make(weights="random:1"), make(levels=(2,)), make(pyramid=(.5,)), make(dtype="bfloat16")]
    assert len(set(keys)) == 5 and make() == keys[0]


# ---- files that must not be believed ----
def files(cache): return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("damage",
                         ["truncate", "grow", "zero", "first", "last", "no data", "no header", "half header",
                          "list header", "other key", "other shapes"])
def test_damaged_files_are_refilled(folder, tmp_path, damage):
    data, cache = Data(folder), tmp_path/"c"
    key = bank(data, cache=cache).key[:32]; raw, head = cache/f"{key}.bin", cache/f"{key}.json"
    assert files(cache) == [raw.name, head.name]
    content, header = bytearray(raw.read_bytes()), json.loads(head.read_text())
    if damage == "truncate": raw.write_bytes(content[:-100])
    elif damage == "grow": raw.write_bytes(content + b"\0"*100)
    elif damage == "zero": raw.write_bytes(bytes(len(content)))
    elif damage in ("first", "last"): content[0 if damage == "first" else -1] ^= 1; raw.write_bytes(content)
    elif damage == "no data": raw.unlink()
    elif damage == "no header": head.unlink()
    elif damage == "half header": head.write_text(head.read_text()[:20])
    elif damage == "list header": head.write_text("[]")
    elif damage == "other key": head.write_text(json.dumps(header | {"key": "0"}))
    elif damage == "other shapes": head.write_text(json.dumps(header | {"shapes": [[1, 2, 3]]}))
    for where in ("disk", "ram"):
        b = bank(data, where=where, cache=cache)
        assert b.found == (where == "ram") and close(b[:], direct(data)) and files(cache) == [raw.name, head.name]


def test_failed_fill_leaves_nothing(folder, tmp_path):
    bad = sorted(folder.glob("*"))[7]; good = bad.read_bytes(); bad.write_bytes(good[:40])
    with pytest.raises(OSError): bank(Data(folder), cache=tmp_path/"c")
    assert files(tmp_path/"c") == []
    bad.write_bytes(good)
    assert close(bank(Data(folder), cache=tmp_path/"c")[:], direct(Data(folder)))


def worker(folder, cache, delay, out, start=None):
    torch.set_num_threads(1)
    if start is not None: start.wait()
    b = FeatureBank(Data(folder, delay=delay), Net(), "disk", cache=cache, progress=False, batch=2)
    torch.save(dict(found=b.found, opened=b.levels is not None, features=b[:]), out)


def test_a_killed_fill_leaves_nothing_that_is_believed(folder, tmp_path, capfd):
    cache = tmp_path/"c"; cache.mkdir()
    p = mp.get_context("spawn").Process(target=worker, args=(folder, cache, 0.3, tmp_path/"out"))
    p.start(); until = time.time() + 60
    while not list(cache.glob("*.bin.tmp")) and time.time() < until: time.sleep(0.01)
    time.sleep(0.4); os.kill(p.pid, signal.SIGKILL); p.join()
    left = list(cache.glob("*.bin.tmp"))
    assert p.exitcode == -signal.SIGKILL
    assert len(left) == 1
    assert not list(cache.glob("*.json"))
    assert not (tmp_path/"out").exists()
    # a fill of another bank clears the remains too
    other = bank(Data(folder), Net(seed=9), cache=cache)
    assert not left[0].exists() and not other.found
    left[0].write_bytes(b"remains")
    b = bank(Data(folder), cache=cache, where="disk")
    assert not b.found
    assert close(b[:], direct(Data(folder)))
    assert not list(cache.glob("*.tmp"))
    assert bank(Data(folder), cache=cache).found


def test_two_processes_fill_one_bank(folder, tmp_path, capfd):
    ctx, cache = mp.get_context("spawn"), tmp_path/"c"
    start = ctx.Barrier(2)
    ps = [ctx.Process(target=worker, args=(folder, cache, 0.05, tmp_path/f"out{i}", start)) for i in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps] == [0, 0]
    a, b = (torch.load(tmp_path/f"out{i}") for i in range(2))
    assert sorted((a["found"], b["found"])) == [False, True]
    assert close(a["features"], b["features"], 0)
    assert close(a["features"], direct(Data(folder)))
    assert [Path(n).suffix for n in files(cache)] == [".bin", ".json"]
    assert "another process computes these features" in capfd.readouterr().err


# ---- refusals ----
def test_random_transform_is_refused_or_fixed(folder, tmp_path):
    data = Data(folder, Transform(rotate=45.))
    with pytest.raises(ValueError, match="LiveFeatures.*copies=k"): bank(data)
    with pytest.raises(ValueError, match="not random"): bank(Data(folder), copies=2)
    with pytest.raises(ValueError, match="copies=0"): bank(data, copies=0)
    torch.manual_seed(3); state = torch.get_rng_state()
    a = bank(data, copies=3, seed=1, cache=tmp_path/"c", batch=4)
    assert torch.equal(torch.get_rng_state(), state) and len(a) == 33
    torch.rand(7); b, c = bank(data, copies=3, seed=1, batch=7), bank(data, copies=3, seed=2)
    assert close(a[:], b[:]) and a.key == b.key != c.key and not close(a[:], c[:]) and not close(a[0], a[11])
    assert bank(data, copies=3, seed=1, cache=tmp_path/"c").found


def test_live_features(folder):
    data = Data(folder, Transform(rotate=45.)); live = LiveFeatures(data, Net(), batch=2)
    assert len(live) == 11
    assert live.shapes == Net().shapes
    assert not close(live[0], live[0])
    assert [len(y) for y in live[[]]] == [0, 0]
    assert close(LiveFeatures(Data(folder), Net(), batch=2)[[3, -1, 0]], [w[[3, 10, 0]] for w in direct(Data(folder))])


@pytest.mark.parametrize("kw", [dict(where="tape"), dict(dtype="int8")])
def test_bad_arguments(folder, kw):
    with pytest.raises(ValueError, match="allowed"): bank(Data(folder), **kw)


def test_empty_data_and_wrong_size(folder, tmp_path):
    (tmp_path/"none").mkdir()
    with pytest.raises(ValueError, match="empty"): bank(Data(tmp_path/"none"))
    with pytest.raises(ValueError, match=r"Backbone\(size=32\)"): bank(Data(folder, Transform(32)))


def test_values_beyond_float16(folder):
    with pytest.raises(ValueError, match="00.png.*float16.*bfloat16"):
        bank(Data(folder), Net(gain=1e5), dtype="float16")
    assert bank(Data(folder), Net(gain=1e5), dtype="bfloat16")[0][0].isfinite().all()


def test_full_disk_is_known_before_the_fill(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ft.shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    data = Data(folder)
    with pytest.raises(OSError, match=r"need 0.0 MiB, 0.0 MiB are free") as e: bank(data, cache=tmp_path/"c")
    assert e.value.errno == errno.ENOSPC and data.opened == 0 and files(tmp_path/"c") == []


def test_place_by_size(folder, monkeypatch):
    monkeypatch.setattr(ft, "free_ram", lambda: 10_000)
    assert bank(Data(folder)).place == "disk"
    with pytest.raises(MemoryError, match="where='disk'"): bank(Data(folder), where="ram")
    monkeypatch.setattr(ft, "free_ram", lambda: 10**6)
    assert bank(Data(folder)).place == "ram"


@pytest.mark.parametrize("line, tree, names", [
    ("0::/slurm/job_1/step", "", ("memory.max", "memory.current", "inactive_file")),
    ("4:cpu,memory:/slurm/job_1/step", "memory",
     ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))])
def test_limit_of_a_job(tmp_path, line, tree, names):
    "The limit may be that of a group around the process's own; what only caches files is free."
    (own := tmp_path/"cgroup").write_text(f"3:cpuset:/\n{line}\n")
    job, step = (tmp_path/tree/p for p in ("slurm/job_1", "slurm/job_1/step"))
    step.mkdir(parents=True)
    for group, limit, used, cached in ((job, "16000", "9000", "5000"), (step, "max", "9000", "5000")):
        for name, text in zip((*names[:2], "memory.stat"), (limit, used, f"anon 1\n{names[2]} {cached}\n")):
            (group/name).write_text(text)
    assert ft.group_free(own, tmp_path) == [12000] and ft.group_free(tmp_path/"none", tmp_path) == []


def test_temporary_folder_goes_with_the_bank(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ft.tempfile, "tempdir", str(tmp_path))
    b = bank(Data(folder), where="disk")
    assert list(tmp_path.glob("flowrepro-*/*.bin"))
    del b
    assert not list(tmp_path.glob("flowrepro-*"))


def test_cache_that_cannot_be_written_is_still_read(folder, tmp_path):
    bank(Data(folder), cache=tmp_path/"c"); (tmp_path/"c").chmod(0o555)
    try: assert bank(Data(folder), cache=tmp_path/"c", where="disk").found
    finally: (tmp_path/"c").chmod(0o755)


def test_channel_stats(folder):
    data = Data(folder); b = bank(data); y = direct(data)
    for (m, s), v in zip(channel_stats(b, chunk=4), y, strict=True):
        assert torch.allclose(m, v.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(s, v.std((0, 2, 3), correction=0), rtol=1e-4)
    part = channel_stats(b, [0, 5])[0][0]
    assert torch.allclose(part, y[0][[0, 5]].mean((0, 2, 3)), atol=1e-5)
    with pytest.raises(ValueError): channel_stats(b, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(folder, tmp_path):
    class Moving(Net):
        def forward(self, x): self.w = [w.to(x.device) for w in self.w]; return super().forward(x)
    for where in ("auto", "device", "ram", "disk"):
        b = bank(Data(folder), Moving(), where=where, device="cuda", cache=tmp_path/where)
        assert b.place == ("device" if where == "auto" else where) and all(y.is_cuda for y in b[[1, 2]])
        assert close([y.cpu() for y in b[:]], direct(Data(folder)), 1e-3)


class Inverted(Dataset):
    "Shows the negative of each image."

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        sample.image = 255 - sample.image
        return sample


def test_a_data_set_of_ones_own(toy, tmp_path):
    "A subclass that makes other images of the same files has features of its own, in training as well."
    train, _ = load("toy", toy, "bolt", data.Transform(16))
    other = Inverted(train.records, train.transform)
    assert isinstance(other.filter(label=0), Inverted)
    first, second, again = (bank(d, cache=tmp_path) for d in (train, other, Inverted(train.records, train.transform)))
    assert not second.found and again.found
    assert not any(torch.equal(a, b) for a, b in zip(first[slice(None)], second[slice(None)], strict=True))


def test_network_of_your_own(folder):
    "Its parameters may be trainable: features need no gradient."
    class Own(Net):
        def __init__(self): super().__init__(); self.own = nn.Conv2d(3, 8, 4, 4)
        def forward(self, x): return [self.own(x/255)] + super().forward(x)[1:]
    net = Own(); net.shapes = [tuple(y.shape[1:]) for y in net(Data(folder)[0].image[None])]
    b = bank(Data(folder), net)
    assert not any(level.requires_grad for level in b[0:2])


def test_other_features_of_the_same_weights(folder):
    "The same settings in a class of your own: features of their own in a cache."
    from flowrepro.backbones import Backbone
    b = Backbone("resnet18", (1,), weights="random", size=16)
    plain, b.__class__ = ft.bank_key(Data(folder), b, "float32"), type("Pooled", (Backbone,), {})
    assert ft.bank_key(Data(folder), b, "float32") != plain


def test_floats_beyond_one(folder):
    "Images of 0 to 255 are told from such of 0 to 1 before they are features."
    class Floats(Data):
        def __getitem__(self, i): return SimpleNamespace(image=super().__getitem__(i).image.float())
    with pytest.raises(ValueError, match=r"divide by 255"): bank(Floats(folder))


def test_what_the_key_knows_of_copies(folder):
    "Their number and their seed; the seed of nothing random is of no account."
    turned = Data(folder, Transform(rotate=45.))
    assert bank(turned, copies=2).key != bank(turned, copies=3).key
    assert bank(Data(folder), seed=1).key == bank(Data(folder), seed=2).key


def test_auto_leaves_half_of_the_memory(folder, monkeypatch):
    need = bank(Data(folder)).nbytes
    for free, place in ((1.9*need, "disk"), (2.1*need, "ram")):
        monkeypatch.setattr(ft, "free_ram", lambda: int(free))
        assert bank(Data(folder)).place == place and bank(Data(folder), where="ram").place == "ram"


def test_each_image_of_each_copy_is_turned_by_itself(folder, toy):
    "Not all images alike; and whatever a generator of the data set has drawn before."
    seen = []
    class Angles(Data):
        def __getitem__(self, i): seen.append(torch.rand(()).item()); return super().__getitem__(i)
    bank(Angles(folder, Transform(rotate=45.)), copies=2)
    assert len(set(seen)) == len(seen) == 22
    own = Dataset(load("toy", toy, "bolt")[0].records[:2], data.Transform(16, rotate=45.), torch.Generator())
    a = ft.fixed_image(own, 0, 0, seed=1); torch.rand(3, generator=own.generator)
    assert torch.equal(a, ft.fixed_image(own, 0, 0, seed=1))


@pytest.mark.parametrize("rotate, copies, bad", [(0., 1, 7), (45., 3, 18)])
def test_the_image_that_is_not_finite_is_named(folder, rotate, copies, bad):
    "In any batch, of any copy."
    class Late(Net):
        calls = 0
        def forward(self, x):
            out = super().forward(x)
            for k in range(len(x)):
                if self.calls + k == bad: out[1][k, 0, 0, 0] = float("nan")
            self.calls += len(x)
            return out
    with pytest.raises(ValueError, match="07.png: features not finite in float32"):
        bank(Data(folder, Transform(rotate=rotate)), Late(), copies=copies, batch=4)


def test_a_mapped_file_is_not_written(tmp_path):
    path = tmp_path/"a.bin"; path.write_bytes(bytes(16))
    ft.map_file(path, 16, "float32").fill_(1.0)
    assert path.read_bytes() == bytes(16)
    ft.map_file(path, 16, "float32", write=True).fill_(1.0)
    assert path.read_bytes() != bytes(16)


def test_index_out_of_range_is_refused_before_the_device():
    for bad in (11, -12):
        with pytest.raises(IndexError, match="outside of the 11 images"): ft.as_index(bad, 11)
    assert ft.as_index([10, -11], 11).tolist() == [10, 0]


def test_statistics_far_from_zero(bank_of):
    "A small deviation about a large mean; none at all is 0, not NaN."
    x = 1000 + 0.01*torch.randn(40, 3, 8, 8, dtype=torch.float64).float(); x[:, 1] = 0.1; x[:, 2] = 1000.3
    (m, s), = channel_stats(bank_of(x))
    assert s[0].item() == pytest.approx(x[:, 0].double().std().item(), rel=0.01)
    assert m[0].item() == pytest.approx(1000, abs=1e-3)
    for v in np.linspace(0.1, 9.7, 60):
        (_, still), = channel_stats(bank_of(torch.full((13, 1, 3, 3), v)))
        assert 0 <= still.item() < 1e-3


def test_normalized_images(folder):
    "Are the business of a network of your own."
    class Floats(Data):
        def __getitem__(self, i): return SimpleNamespace(image=(super().__getitem__(i).image/255 - 0.45)/0.22)
    assert len(bank(Floats(folder))) == 11


def test_nothing_is_left_of_a_file_that_did_not_fit(tmp_path, monkeypatch):
    "And the one that was there stays."
    ft.write_atomic(tmp_path/"a.json", "old")
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError): ft.write_atomic(tmp_path/"a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path/"a.json").read_text() == "old"
