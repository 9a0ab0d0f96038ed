"The bench checks outputs before it times anything, and writes what it measured."
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import moved
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("FrEIA"), pytest.importorskip("sklearn"), pytest.importorskip("psutil")
from flowrepro import bench as B
from flowrepro import cli
from flowrepro.flows import Flow

KEYS = {"benchmark", "setting", "variant", "precision", "seconds", "all_seconds", "device", "against", "ratio",
        "ratio_fastest", "ratio_low", "ratio_high", "extra_mib",
        "extra_ratio", "error", "tolerance", "target", "reached", "memory_target", "memory_reached", "threads",
        "repeats"}


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
    assert sum(r["variant"] == r["against"] for r in rows) == len({r["setting"] for r in rows}), (
        "each setting has its own reference")
    for r in rows:
        assert r["against"] == first["variant"]
        assert 0 <= r["error"] <= r["tolerance"] < 0.2
        assert r["seconds"] > 0
        assert r["extra_mib"] >= 0
        if r["precision"] == "float32": assert r["tolerance"] <= 1e-2
        assert r["reached"] == (None if r["target"] is None else r["ratio"] >= r["target"])
        assert r["memory_reached"] == (None if r["memory_target"] is None else r["extra_ratio"] >= r["memory_target"])


def break_fastflow(m): m.setattr(B, "from_freia", lambda flow, state: flow)  # other weights
def break_cflow(m): break_fastflow(m)
def break_hgad_loss(m): m.setattr(B, "hgad_terms", lambda *a, terms=B.hgad_terms: terms(*a, smoothing=0.1))
def break_hgad_step(m): break_fastflow(m)
def break_extraction(m): m.setattr(B, "load_net", lambda name, weights: (timm.create_model(name), ""))
def break_epoch(m):
    m.setattr(B, "LiveFeatures",
              lambda d, b, device: B.FeatureBank(B.Dataset(d.records[1:] + d.records[:1], d.transform), b,
                                                 progress=False))
def break_metrics(m): m.setattr(B, "aupro", lambda maps, masks: 0.5)


@pytest.mark.parametrize("build", (lambda: B.freia_dense(6, 2, 4), lambda: B.freia_conv(6, 4, 2)),
                         ids=("dense", "conv"))
def test_the_drawn_flows_are_the_same_in_every_run(build):
    "Rotations and permutations come from NumPy's global state; it is seeded, and left as it was."
    np.random.seed(1); first = build().state_dict()
    np.random.seed(2); again = build().state_dict(); after = np.random.random()
    assert all(torch.equal(first[k], again[k]) for k in first)
    np.random.seed(2); assert after == np.random.random()


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


def test_every_gradient_of_the_loss_is_compared(monkeypatch, untimed):
    "Each term is right, and the gradient of one leaf at a time is off by a factor."
    def spoilt(leaf):
        def terms(z, logdet, label, mixture, terms=B.hgad_terms):
            off = lambda t, name: t.detach() + 1.01*(t - t.detach()) if name == leaf else t
            own = {n: off(p, n) for n, p in mixture.named_parameters()}
            return torch.func.functional_call(Terms(mixture, terms), {f"mixture.{n}": p for n, p in own.items()},
                                              (off(z, "z"), off(logdet, "logdet"), label))
        return terms
    for leaf in ("z", "logdet", "mu", "phi", "delta", "psi"):
        with monkeypatch.context() as m:
            m.setattr(B, "hgad_terms", spoilt(leaf))
            with pytest.raises(B.OutputsDiffer, match=f"gradient of {leaf} differs"): small("hgad_loss")


class Terms(torch.nn.Module):
    def __init__(self, mixture, terms):
        super().__init__()
        self.mixture, self.terms = mixture, terms
    def forward(self, z, logdet, label): return self.terms(z, logdet, label, self.mixture)


@pytest.mark.parametrize("term", ["L_g", "L_mi", "L_e", "L_in", "L_z", "total"])
def test_every_term_of_the_loss_is_compared(term, monkeypatch, untimed):
    ours = B.our_hgad
    def spoilt(*a):
        out = ours(*a)
        return out | {term: out[term].detach()*1e-3 + out[term]}
    monkeypatch.setattr(B, "our_hgad", spoilt)
    with pytest.raises(B.OutputsDiffer, match=f"flowrepro: {term} differs"): small("hgad_loss")


@pytest.mark.parametrize("name", ["cflow", "hgad_step"])
def test_another_position_code_is_noticed(name, monkeypatch, untimed):
    "The flow is conditional in earnest: with the code of other positions its output differs."
    forward = Flow.forward
    roll = lambda cond: (cond[0].roll(1, 0), cond[1]) if isinstance(cond, tuple) else cond.roll(1, 0)
    monkeypatch.setattr(Flow, "forward", lambda self, x, cond: forward(self, x, roll(cond)))
    with pytest.raises(B.OutputsDiffer, match="differs"): small(name)


def test_hgad_step_compares_the_gradients_of_the_mixture(monkeypatch, untimed):
    "The loss is the same number; only the gradient of the centres is off."
    ours = B.our_hgad
    def spoilt(z, logdet, label, mixture):
        out, mu = ours(z, logdet, label, mixture), mixture.mu.sum()
        return out | {"total": out["total"] + mu - mu.detach()}
    monkeypatch.setattr(B, "our_hgad", spoilt)
    with pytest.raises(B.OutputsDiffer, match="gradient differs"): small("hgad_step")


def test_bfloat16_has_its_own_rows_where_the_cpu_has_none():
    for native, precisions in ((False, ["float32"]*4 + ["bfloat16"]*2), (True, ["float32"]*2 + ["bfloat16"]*2)):
        rows = B.bench_hgad_step(1, progress=False, **B.SMALL["hgad_step"] | dict(native=native))
        assert [r["precision"] for r in rows] == precisions
        assert ("no bfloat16" in rows[-1]["setting"]) is not native and "no bfloat16" not in rows[0]["setting"]
        assert {r["against"] for r in rows} == {"FrEIA 0.2"} and rows[-1]["target"] == 4.5 and rows[1]["target"] == 1.4


def test_fiber_rows_have_their_own_positions(monkeypatch):
    "Shuffled over images and positions, as in training."
    seen, forward = [], Flow.forward
    def look(self, x, cond):
        seen.append((x.shape, *cond))
        return forward(self, x, cond)
    monkeypatch.setattr(Flow, "forward", look)
    B.bench_cflow(1, rows=(24,), channels=8, code=8, steps=1, grid=(3, 4), images=4, progress=False)
    shape, table, index = seen[0]
    assert shape == (24, 8) and torch.equal(table, B.code_rows(8, (3, 4))) and len(table) == 12
    counts = index.bincount(minlength=12)
    assert counts.sum() == 24
    assert counts.max() <= 4
    assert not (index.diff() == 1).all()
    assert len(counts) == 12
    assert (counts > 1).any()


@pytest.mark.parametrize("got, want, error", [
    (torch.ones(4), torch.ones(4), 0), (1.01, 1.0, 0.01),
    ([torch.ones(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)], 0.5**0.5),
    (torch.ones(2), torch.ones(3), np.inf), ([torch.ones(2)], [torch.ones(2)]*2, np.inf), (np.nan, 1.0, np.inf),
    (1.0, np.nan, np.inf), (0.0, 0.0, 0), (0.1, 0.0, 0.1)])
def test_relative_error(got, want, error): assert B.relative_error(got, want) == pytest.approx(error)


def test_check_outputs_wants_the_same_names():
    with pytest.raises(B.OutputsDiffer, match="returns z; the first variant returns x"):
        B.check_outputs("b", {"z": 1.0}, {"x": 1.0}, 1.0)


def test_rounds_are_interleaved_and_rotated():
    order = []
    seconds = B.time_rounds({n: lambda n=n: order.append(n) for n in "abc"}, 4)
    assert "".join(order) == "aabbcc" "bbccaa" "ccaabb" "aabbcc" and all(len(s) == 4 for s in seconds.values())


def test_only_the_second_run_of_a_turn_is_timed():
    waits = iter([0.2, 0.0] * 2)
    assert all(s < 0.15 for s in B.time_rounds({"a": lambda: time.sleep(next(waits))}, 2)["a"])


def test_compare_measures_time_and_memory():
    def work(seconds, mib):
        block = np.ones(mib*2**17)
        time.sleep(seconds)
        return {"one": block[0]}
    rows = B.compare({"slow": B.Variant(lambda: work(0.06, 64)), "fast": B.Variant(lambda: work(0.01, 8), target=1e6)},
                     3, progress=False)
    slow, fast = rows
    assert slow["seconds"] >= 0.06 and fast["seconds"] >= 0.01 and fast["ratio"] == slow["seconds"]/fast["seconds"] > 1
    assert fast["ratio_low"] <= fast["ratio"] <= fast["ratio_high"] and len(fast["all_seconds"]) == 3
    assert 60 < slow["extra_mib"] < 90 and 6 < fast["extra_mib"] < 30 and fast["reached"] is False
    assert slow["memory_target"] is None and slow["memory_reached"] is None
    with pytest.raises(ValueError, match="repeats"): B.compare({}, 0)


def test_memory_has_a_target():
    def work(mib):
        block = np.ones(mib*2**17)
        time.sleep(0.02)
        return {"one": block[0]}
    rows = B.compare({"all": B.Variant(lambda: work(96)), "less": B.Variant(lambda: work(16), target=1e9, memory=3),
                      "hardly": B.Variant(lambda: work(80), memory=3)}, 1, progress=False)
    assert [r["memory_reached"] for r in rows] == [None, True, False]
    assert 4 < rows[1]["extra_ratio"] < 8
    assert 1 < rows[2]["extra_ratio"] < 1.5
    text = B.table([r | {"setting": "three"} for r in rows])
    assert "1e+09: not reached; memory 1/3: reached" in text and "  memory 1/3: not reached" in text


def test_main_writes_json_and_a_table(tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path/"new"/"bench.json"
    rows = B.main(None, threads=1, repeats=2, out=str(out), sizes=B.SMALL, progress=False)
    saved, text = json.loads(out.read_text()), capsys.readouterr().out
    assert saved.keys() == {"environment", "load_before", "load_after", "failed", "rows"}
    assert saved["failed"] == {}
    assert saved["environment"]["threads"] == 1
    assert [r["benchmark"] for r in saved["rows"]] == [r["benchmark"] for r in rows]
    assert {r["benchmark"] for r in rows} == set(B.BENCHMARKS)
    for r in saved["rows"]: assert KEYS <= r.keys() and len(r["all_seconds"]) == r["repeats"] == 2 and r["threads"] == 1
    assert torch.get_num_threads() == threads
    for part in ("1 torch threads", "2 interleaved rounds", "load average", "bfloat16", "float32", "FrEIA 0.2",
                 "timm features_only", "scikit-learn", "reached"):
        assert part in text, part


def test_a_benchmark_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    "It is named on the screen, in the file and in the error; the file is there before the next one starts."
    out, seen, metrics = tmp_path/"bench.json", [], B.bench_metrics
    def look(*a, **k):
        seen.append(json.loads(out.read_text())["failed"])
        return metrics(*a, **k)
    break_cflow(monkeypatch)
    monkeypatch.setitem(B.BENCHMARKS, "metrics", look)
    monkeypatch.setitem(B.BENCHMARKS, "hgad_loss", lambda *a, **k: 1/0)
    with pytest.raises(RuntimeError, match="cflow, hgad_loss failed.*bench.json"):
        B.main(["cflow", "hgad_loss", "metrics"], threads=1, repeats=1, out=out, sizes=B.SMALL, progress=False)
    saved, (text, errors) = json.loads(out.read_text()), capsys.readouterr()
    assert seen == [saved["failed"]]
    assert list(saved["failed"]) == ["cflow", "hgad_loss"]
    assert {r["benchmark"] for r in saved["rows"]} == {"metrics"}
    assert "cflow failed: OutputsDiffer: flowrepro: " in text and "hgad_loss failed: ZeroDivisionError" in text
    assert "Traceback" in errors and "OutputsDiffer" not in errors, "only what is not understood needs a traceback"
    with pytest.raises(RuntimeError, match="cflow failed, see above$"):
        B.main(["cflow"], repeats=1, out=out, sizes=B.SMALL, progress=False)


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(B, "BENCHMARKS", dict.fromkeys(B.BENCHMARKS, never))
    assert cli.main(["bench", "--device", "cuda", "--out", str(tmp_path/"x.json")]) == 2
    assert not list(tmp_path.iterdir())
    assert "device='cuda': no CUDA device is available here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'gpu': one of cpu, cuda"): B.main(["metrics"], device="gpu")


def test_a_turn_on_the_gpu_starts_and_ends_with_waiting_for_it(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("w"))
    B.time_rounds({n: lambda n=n: order.append(n) for n in "ab"}, 1, device="cuda")
    assert "".join(order) == "awaw" "bwbw"
    B.wait("cpu")
    assert len(order) == 8


def test_memory_of_the_gpu_is_the_peak_less_what_was_there(monkeypatch):
    order, calls = ([],
                    {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 2**20,
                     "max_memory_allocated": 5*2**20})
    for name, value in calls.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: order.append(name) or value)
    with B.ExtraGpuMemory() as m: order.append("work")
    assert m.mib == 4
    assert (order == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "work", "synchronize",
                      "max_memory_allocated"])


def test_nothing_runs_in_tf32_and_the_settings_come_back(monkeypatch):
    now = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    seen, before = [], now()
    monkeypatch.setattr(B, "FeatureBank", lambda *a, bank=B.FeatureBank, **k: seen.append(now()) or bank(*a, **k))
    small("epoch")
    B.compare({"one": B.Variant(lambda: seen.append(now()) or {"x": 1.0})}, 1, progress=False)
    assert set(seen) == {(False, False)} and len(seen) == 5 and now() == before


class Pair:
    "The indices of two images, where tensors have no values."
    def __len__(self): return 2
    def tolist(self): return [0, 1]
    def split(self, chunk): return [self]
    def to(self, device, **_): return torch.arange(2, device=device)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("name", [n for n in B.BENCHMARKS if n != "metrics"])
def test_everything_is_on_the_device_asked_for(name, monkeypatch):
    "Forward passes of tensors without values on a GPU that is not there; one that was left on the CPU is an error."
    seen = set()
    def run_once(variants, repeats, progress, device):
        assert device == "cuda"
        for v in variants.values():
            seen.update(t.device.type for o in v.run().values() for t in (o if isinstance(o, list) else [o]))
        return []
    def losses(model, source, *a, **k):
        total = sum(model.losses(source[Pair()]))
        return [{"loss": total + 0*sum(p.sum() for p in model.flows.parameters())}]
    same, none = lambda flow, state: flow, lambda *a, **k: None  # what looks at values
    for place, new in (("torch.nn.Module.to", moved),
                       ("torch.autograd.grad", lambda value, leaves: [torch.zeros_like(p) for p in leaves]),
                       ("torch.cuda.mem_get_info", lambda device: (2**30, 2**30)),
                       ("torch.Tensor.isfinite", lambda t: torch.Tensor.new_ones),
                       ("flowrepro.hgad.check_label", none), ("flowrepro.bases.check_label", none),
                       ("flowrepro.backbones.fold_norms", none),
                       ("flowrepro.flows.random_rotation", lambda n, generator: torch.eye(n)),
                       ("flowrepro.backbones.state_hash", lambda net: ""),
                       ("flowrepro.features.fill", none), ("flowrepro.features.bank_key", none),
                       ("flowrepro.features.as_index", lambda i, n: i if isinstance(i, Pair) else Pair())):
        monkeypatch.setattr(place, new)
    for place, new in (("compare", run_once), ("from_freia", same), ("has_bf16", lambda device: True), ("fit", losses),
                       ("copy", SimpleNamespace(deepcopy=lambda m: m))):
        monkeypatch.setattr(B, place, new)
    with FakeTensorMode(): B.BENCHMARKS[name](1, progress=False, device="cuda", **B.SMALL[name])
    assert seen == {"cuda"}


def test_main_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(B, "BENCHMARKS", dict.fromkeys(B.BENCHMARKS, never))
    with pytest.raises(ValueError, match="'speed'.*fastflow, cflow, hgad_loss, hgad_step, extraction, epoch, metrics"):
        B.main(["metrics", "speed"])
    with pytest.raises(ValueError, match="threads"): B.main(["metrics"], threads=0)


@pytest.mark.parametrize("module, package, only",
                         [("FrEIA", "FrEIA", "fastflow"), ("FrEIA", "FrEIA", "cflow"), ("FrEIA", "FrEIA", "hgad_step"),
                          ("sklearn", "scikit-learn", "metrics"), ("psutil", "psutil", "epoch")])
def test_missing_packages_are_named_before_any_work(monkeypatch, module, package, only):
    find = B.importlib.util.find_spec
    monkeypatch.setattr(B, "BENCHMARKS", dict.fromkeys(B.BENCHMARKS, never))
    monkeypatch.setattr(B.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(RuntimeError, match=rf'{package}: pip install "flowrepro\[bench\]"'): B.main([only])
    if module != "psutil": assert B.chosen(["extraction", "hgad_loss"]) == ["extraction", "hgad_loss"]


def test_maps_are_as_described():
    maps, masks = B.make_maps(20, 64)
    assert maps.shape == masks.shape == (20, 64, 64) and maps.dtype == np.float32 and masks.dtype == bool
    assert 0.005 < masks.mean() < 0.02 and masks.any((1, 2)).sum() == 10
    again = B.make_maps(20, 64)
    assert (again[0] == maps).all() and (again[1] == masks).all()
