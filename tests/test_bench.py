"The bench checks outputs before it times anything, and writes what it measured."
import json
import time

import numpy as np
import pytest
import torch

pytest.importorskip("FrEIA"), pytest.importorskip("sklearn"), pytest.importorskip("psutil")
from flowrepro import bench as B
from flowrepro.flows import Flow

KEYS = {"benchmark", "setting", "variant", "precision", "seconds", "all_seconds", "against", "ratio", "ratio_fastest", "ratio_low", "ratio_high", "extra_mib",
        "error", "tolerance", "target", "reached", "threads", "repeats"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "The toy data set of the epoch benchmark is drawn once, small, outside of the user's cache."
    from flowrepro import data
    folder = tmp_path_factory.getbasetemp()/"bench-toy"
    data.make_toy(folder, size=32, n_train=2, n_test_good=1, n_per_defect=1)
    monkeypatch.setattr(data, "toy_root", lambda seed=0: folder)


def never(*_, **__): raise AssertionError("timed although the outputs differ")


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(B, "time_rounds", never)
    monkeypatch.setattr(B, "ExtraMemory", never)


def small(name): return B.BENCHMARKS[name](1, progress=False, **B.SMALL[name])


@pytest.mark.parametrize("name", B.BENCHMARKS)
def test_small_sizes_agree(name):
    rows = small(name)
    first = rows[0]
    assert first["error"] == 0 and first["ratio"] == 1 and len(rows) > 1
    for r in rows:
        assert r["against"] == first["variant"] and 0 <= r["error"] <= r["tolerance"] < 0.2 and r["seconds"] > 0 and r["extra_mib"] >= 0
        if r["precision"] == "float32": assert r["tolerance"] <= 1e-2
        assert r["reached"] == (None if r["target"] is None else r["ratio"] >= r["target"])


def break_fastflow(m): m.setattr(B, "from_freia", lambda flow, state: flow)  # other weights
def break_extraction(m): m.setattr(B, "load_net", lambda name, weights: (B.timm.create_model(name), ""))
def break_epoch(m): m.setattr(B, "LiveFeatures", lambda d, b: B.FeatureBank(B.Dataset(d.records[1:] + d.records[:1], d.transform), b, progress=False))
def break_metrics(m): m.setattr(B, "aupro", lambda maps, masks: 0.5)


@pytest.mark.parametrize("name", B.BENCHMARKS)
def test_unequal_outputs_are_never_timed(name, monkeypatch, untimed):
    globals()[f"break_{name}"](monkeypatch)
    with pytest.raises(B.OutputsDiffer, match="differs .* nothing was timed"): small(name)


def test_a_wrong_gradient_is_noticed(monkeypatch, untimed):
    "Equal outputs with a gradient that stops half way are not equal work."
    forward = Flow.forward
    def stop(self, x, *a, **k):
        z, j = forward(self, x, *a, **k)
        return (z - z.detach())/2 + z.detach(), j
    monkeypatch.setattr(Flow, "forward", stop)
    with pytest.raises(B.OutputsDiffer, match="gradient"): small("fastflow")


@pytest.mark.parametrize("got, want, error", [
    (torch.ones(4), torch.ones(4), 0), (1.01, 1.0, 0.01), ([torch.ones(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)], 0.5**0.5),
    (torch.ones(2), torch.ones(3), np.inf), ([torch.ones(2)], [torch.ones(2)]*2, np.inf), (np.nan, 1.0, np.inf), (1.0, np.nan, np.inf), (0.0, 0.0, 0), (0.1, 0.0, 0.1)])
def test_relative_error(got, want, error): assert B.relative_error(got, want) == pytest.approx(error)


def test_check_outputs_wants_the_same_names():
    with pytest.raises(B.OutputsDiffer, match="returns z; the first variant returns x"): B.check_outputs("b", {"z": 1.0}, {"x": 1.0}, 1.0)


def test_rounds_are_interleaved_and_rotated():
    order = []
    seconds = B.time_rounds({n: lambda n=n: order.append(n) for n in "abc"}, 4)
    assert "".join(order) == "abcbcacababc" and all(len(s) == 4 for s in seconds.values())


def test_compare_measures_time_and_memory():
    def work(seconds, mib):
        block = np.ones(mib*2**17)
        time.sleep(seconds)
        return {"one": block[0]}
    rows = B.compare({"slow": B.Variant(lambda: work(0.06, 64)), "fast": B.Variant(lambda: work(0.01, 8), target=1e6)}, 3, progress=False)
    slow, fast = rows
    assert slow["seconds"] >= 0.06 and fast["seconds"] >= 0.01 and fast["ratio"] == slow["seconds"]/fast["seconds"] > 1
    assert fast["ratio_low"] <= fast["ratio"] <= fast["ratio_high"] and len(fast["all_seconds"]) == 3
    assert 60 < slow["extra_mib"] < 90 and 6 < fast["extra_mib"] < 30 and fast["reached"] is False
    with pytest.raises(ValueError, match="repeats"): B.compare({}, 0)


def test_main_writes_json_and_a_table(tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path/"new"/"bench.json"
    rows = B.main(None, threads=1, repeats=2, out=str(out), sizes=B.SMALL, progress=False)
    saved, text = json.loads(out.read_text()), capsys.readouterr().out
    assert saved.keys() == {"environment", "load_before", "load_after", "rows"} and saved["environment"]["threads"] == 1
    assert [r["benchmark"] for r in saved["rows"]] == [r["benchmark"] for r in rows] and {r["benchmark"] for r in rows} == set(B.BENCHMARKS)
    for r in saved["rows"]: assert KEYS <= r.keys() and len(r["all_seconds"]) == r["repeats"] == 2 and r["threads"] == 1
    assert torch.get_num_threads() == threads
    for part in ("1 torch threads", "2 interleaved rounds", "load average", "bfloat16", "float32", "FrEIA 0.2", "timm features_only", "scikit-learn", "reached"):
        assert part in text, part


def test_main_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(B, "BENCHMARKS", dict.fromkeys(B.BENCHMARKS, never))
    with pytest.raises(ValueError, match="'speed'.*fastflow, extraction, epoch, metrics"): B.main(["metrics", "speed"])
    with pytest.raises(ValueError, match="threads"): B.main(["metrics"], threads=0)


@pytest.mark.parametrize("module, package, only", [("FrEIA", "FrEIA", "fastflow"), ("sklearn", "scikit-learn", "metrics"), ("psutil", "psutil", "epoch")])
def test_missing_packages_are_named_before_any_work(monkeypatch, module, package, only):
    find = B.importlib.util.find_spec
    monkeypatch.setattr(B, "BENCHMARKS", dict.fromkeys(B.BENCHMARKS, never))
    monkeypatch.setattr(B.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(RuntimeError, match=rf'{package}: pip install "flowrepro\[bench\]"'): B.main([only])
    if module != "psutil": assert B.chosen(["extraction"]) == ["extraction"]


def test_maps_are_as_described():
    maps, masks = B.make_maps(20, 64)
    assert maps.shape == masks.shape == (20, 64, 64) and maps.dtype == np.float32 and masks.dtype == bool
    assert 0.005 < masks.mean() < 0.02 and masks.any((1, 2)).sum() == 10
    again = B.make_maps(20, 64)
    assert (again[0] == maps).all() and (again[1] == masks).all()
