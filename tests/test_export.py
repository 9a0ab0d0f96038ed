"""Exported programs against the detectors they are made of: every method, every kind of file, any
number of images, and what cannot be written."""
import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from flowrepro import __version__
from flowrepro import export as module
from flowrepro.cli import main
from flowrepro.data import Transform, load
from flowrepro.detectors import HGAD, CFlow, FastFlow
from flowrepro.export import check_written, export
from flowrepro.scores import PUBLISHED, Score

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn of their own internals

MAKE = {
    "fastflow": lambda b: FastFlow(b, steps=2),
    "cflow": lambda b: CFlow(b, steps=2, code=16),
    "hgad": lambda b: HGAD(b, steps=2, code=16, centres=3, class_mode="inferred"),
    "hgad known": lambda b: HGAD(b, steps=2, code=16, centres=3, class_mode="known"),
}


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    "pytest would format every line of torch's trace."
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture(scope="module")
def trained(toy, tiny_backbone):
    "A detector of each method after two epochs on one category, or on all."
    made = {}
    for name, make in MAKE.items():
        train, _ = load("toy", toy, "all" if "hgad" in name else "weave", Transform(32))
        torch.manual_seed(0)
        made[name] = make(tiny_backbone()).fit(train, epochs=2, batch=8, lr=1e-3, progress=False)
    return made


def noise(n, seed=5):
    return 0.5 + 0.1 * (torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 0.5)


def asked(name) -> str | None:
    return "bolt" if name == "hgad known" else None


def agree(written, detector, images, category=None):
    for a, b in zip(written, detector.predict(images, category=category)):
        torch.testing.assert_close(torch.as_tensor(np.asarray(a)), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_torch_program(name, trained, tmp_path):
    "As the detector, for one image and for more than the example had; each image by itself."
    detector, file = trained[name], tmp_path / "m.pt2"
    assert export(detector, file, noise(3), asked(name)) < 1e-4
    program = torch.export.load(file).module()
    for n in (1, 2, 7):
        agree(program(noise(n)), detector, noise(n), asked(name))
    torch.testing.assert_close(program(noise(7))[0][3:4], program(noise(7)[3:4])[0], rtol=1e-4, atol=1e-5)
    assert program(noise(7))[1].std() > 1e-4


@pytest.mark.parametrize("name", ["fastflow", "cflow", "hgad known"])
def test_onnx_model(name, trained, tmp_path):
    "A valid model with its weights inside, which says what it is and takes any number of images."
    detector, file = trained[name], tmp_path / "m.onnx"
    assert export(detector, file, noise(3), asked(name)) < 1e-3
    onnx.checker.check_model(onnx.load(file, load_external_data=False))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(file)
    for n in (1, 5):
        agree(session.run(["maps", "scores"], {"images": noise(n).numpy()}), detector, noise(n), asked(name))
    said = session.get_modelmeta().custom_metadata_map
    assert said["method"] == detector.method and said["category"] == (asked(name) or "") and "32, 32" in said["input"]
    assert Score(**json.loads(said["score"])) == detector.score


@pytest.mark.parametrize("change",
                         [dict(levels="linear", normalise="none", logdet=1.0, image_logdet=0.5,
                               image_criterion="likelihood"),
                                    dict(smooth=0.0, image="top", top=0.02, criterion="product",
                                         image_criterion="entropy")], ids=["linear", "product"])
def test_every_form_of_the_score(change, trained, tmp_path, monkeypatch):
    detector = trained["hgad"]
    plain = detector.predict(noise(2))
    monkeypatch.setattr(detector, "score", replace(detector.score, **change))
    export(detector, tmp_path / "m.pt2", noise(3))
    written = torch.export.load(tmp_path / "m.pt2").module()(noise(2))
    agree(written, detector, noise(2))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(written, plain))


def test_runs_without_flowrepro(trained, tmp_path):
    "A process that has PyTorch alone reads the program, and what it is."
    export(trained["cflow"], tmp_path / "m.pt2", noise(3))
    torch.save(noise(2), tmp_path / "x.pt")
    code = """if True:
        import sys, torch
        sys.modules["flowrepro"] = None  # an import of it fails
        extra = {"flowrepro.json": ""}
        maps, scores = torch.export.load("m.pt2", extra_files=extra).module()(torch.load("x.pt"))
        torch.save([maps, scores], "y.pt"), print(extra["flowrepro.json"])
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["method"] == "cflow" and Score(**said["score"]) == trained["cflow"].score
    agree(torch.load(tmp_path / "y.pt"), trained["cflow"], noise(2))


def test_leaves_the_detector_alone(trained, tmp_path):
    detector = trained["fastflow"].train()
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    export(detector, tmp_path / "m.pt2", noise(3))
    assert detector.training and all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert any(p.requires_grad for p in detector.flows.parameters())


def test_scores_of_your_own(trained, tiny_backbone, tmp_path):
    "A detector that makes its own of the parts is written with it."
    class Mine(FastFlow):
        def score_parts(self, parts, score=None):
            maps, _ = super().score_parts(parts, score)
            return 2 * maps, maps.flatten(1).mean(1)
    mine = Mine(tiny_backbone(), steps=2).eval()
    mine.load_state_dict(trained["fastflow"].state_dict())
    export(mine, tmp_path / "m.pt2", noise(3))
    agree(module.run_pt2(tmp_path / "m.pt2", noise(3)), mine, noise(3))


def test_a_file_that_says_something_else(trained, tmp_path):
    "It is refused: another detector's, or one that gives NaN."
    file, program = tmp_path / "m.pt2", module.Program(trained["fastflow"])
    export(trained["fastflow"], file, noise(3))
    assert check_written(module.run_pt2, file, program, noise(3)) < 1e-4
    for wrong in (lambda path, x: tuple(1.01 * t for t in program(x)),
                  lambda path, x: tuple(t * float("nan") for t in program(x)),
                  lambda path, x: (program(x)[0], program(x)[1] + (len(x) == 1))):
        with pytest.raises(RuntimeError, match="differs from the detector"):
            check_written(wrong, file, program, noise(3))


def test_a_file_is_as_far_as_its_largest_output_says():
    "Whatever the scale; on all images as well as on one."
    images, ours = torch.ones(3, 1), lambda x: (1000 * x, 1e-4 * x)
    assert check_written(lambda path, x: (1000 * x + 0.5, 1e-4 * x), "m", ours, images) == pytest.approx(5e-4)
    for wrong in (lambda path, x: (1000 * x, 1.1e-4 * x), lambda path, x: (1000 * x + 9 * (len(x) > 1), 1e-4 * x)):
        with pytest.raises(RuntimeError, match="differs from the detector"):
            check_written(wrong, "m", ours, images)


@pytest.mark.parametrize("given, compared", [(2, 2), (9, 4)])
def test_four_images_are_compared(given, compared, trained, tmp_path, monkeypatch):
    "Or as many as there are; a category is of no use to a detector that asks for none."
    program, seen = module.Program(trained["fastflow"], "bolt"), []
    agree(program(noise(2)), trained["fastflow"], noise(2))
    monkeypatch.setitem(module.FORMATS, ".pt2", (lambda program, images, path, about: path.write_bytes(b""),
                                                 lambda path, x: seen.append(len(x)) or program(x), ()))
    assert export(trained["fastflow"], tmp_path / "m.pt2", noise(given), "bolt") == 0 and seen == [compared, 1]


def test_whole_numbers_are_compared_as_the_detector_sees_them(trained, tmp_path, monkeypatch):
    program, seen = module.Program(trained["fastflow"]), []
    monkeypatch.setitem(module.FORMATS, ".pt2", (lambda program, images, path, about: path.write_bytes(b""),
                                                 lambda path, x: seen.append(x) or program(x), ()))
    images = (255 * noise(2)).to(torch.uint8)
    export(trained["fastflow"], tmp_path / "m.pt2", images)
    assert torch.equal(seen[0], images / 255)


def test_what_a_file_says_of_itself(trained):
    "Version, weights and how its images are made, so that it can be used without the detector."
    detector = trained["fastflow"]
    said = module.about(detector, None)
    assert (said["flowrepro"], said["weight_id"], said["category"]) == (__version__, detector.backbone.weight_id, "")
    assert str(detector.seen_through()) in said["input"] and "32, 32" in said["output"]


@pytest.mark.parametrize("fault", [OSError(28, "no space left"), None])
def test_a_failed_export_leaves_what_was_there(trained, tmp_path, monkeypatch, fault):
    "A full disk, or a program that is not the detector: the file from before stays, and nothing beside it."
    (file := tmp_path / "m.pt2").write_bytes(b"before")

    def write(program, images, path, about):
        path.write_bytes(b"half")
        if fault:
            raise fault

    other = lambda path, x: (torch.rand(len(x), 32, 32), torch.rand(len(x)))
    monkeypatch.setitem(module.FORMATS, ".pt2", (write, other, ()))
    with pytest.raises((OSError, RuntimeError), match="no space left|is not kept"):
        export(trained["fastflow"], file, noise(3))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"] and file.read_bytes() == b"before"


@pytest.mark.parametrize("name, ending, category, words", [
    ("fastflow", ".bin", None, "onnx, .pt2"), ("fastflow", "", None, "onnx, .pt2"),
    ("hgad known", ".pt2", None, "must be given"), ("hgad known", ".pt2", "spoon", "bolt"),
])
def test_what_cannot_be_written(name, ending, category, words, trained, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(trained[name], tmp_path / f"m{ending}", noise(3), category)
    assert not list(tmp_path.iterdir())


def test_detectors_that_cannot_be_written(trained, tiny_backbone, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has not been trained"):
        export(FastFlow(tiny_backbone(), steps=1), tmp_path / "m.pt2", noise(3))
    for same in (noise(1), noise(1).expand(3, -1, -1, -1)):
        with pytest.raises(ValueError, match="two or more of its own"):
            export(trained["fastflow"], tmp_path / "m.pt2", same)
    monkeypatch.setattr(trained["cflow"], "score", PUBLISHED["cflow"])
    with pytest.raises(ValueError, match="normalise='train'"):
        export(trained["cflow"], tmp_path / "m.pt2", noise(3))


@pytest.mark.parametrize("given, words",
                         [(255 * noise(3), "divide by 255"), (noise(3)[..., :16], "this detector takes"),
                          (noise(3) - 0.5, r"lie in \[0, 1\]")])
def test_images_that_predict_refuses(given, words, trained, tmp_path):
    "A program traced for another size, or compared on no image at all, would be of no use."
    with pytest.raises(ValueError, match=words):
        export(trained["fastflow"], tmp_path / "m.pt2", given)
    assert not list(tmp_path.iterdir())


def test_images_of_double_precision(trained, tmp_path):
    "What is written takes float32, whatever it was compared on."
    export(trained["fastflow"], tmp_path / "m.pt2", noise(3).double())
    agree(torch.export.load(tmp_path / "m.pt2").module()(noise(2)), trained["fastflow"], noise(2))


def test_without_onnx(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"flowrepro\[onnx\]"):
        export(trained["fastflow"], tmp_path / "m.onnx", noise(3))
    export(trained["fastflow"], tmp_path / "m.pt2", noise(3))


def test_command(trained, toy, tmp_path, capsys):
    "The file, its size, how far it is from the detector; a wrong name or model ends with 2."
    trained["hgad known"].save(tmp_path / "m.safetensors")
    call, own = ["export", str(tmp_path / "m.safetensors")], str(toy / "bolt/train")
    assert main([*call, own, "--out", str(tmp_path / "new/m.pt2"), "--category", "bolt"]) == 0
    assert "MiB, differs from the detector by" in (out := capsys.readouterr().out)
    assert str(tmp_path / "new/m.pt2") in out
    agree(torch.export.load(tmp_path / "new/m.pt2").module()(noise(1)), trained["hgad known"], noise(1), "bolt")
    wrong = {".onnx, .pt2": [*call, own, "--out", str(tmp_path / "m.txt")],
             "no detector": ["export", str(tmp_path / "none"), own, "--out", "m.pt2"],
             "no image": [*call, str(tmp_path / "new"), "--out", str(tmp_path / "m.pt2"), "--category", "bolt"]}
    for words, arguments in wrong.items():
        assert main(arguments) == 2 and words in capsys.readouterr().err


def test_no_onnx_in_bfloat16(toy, tiny_backbone, tmp_path):
    "ONNX Runtime cannot read such a file: the remedy is told."
    train, test = load("toy", toy, "bolt", Transform(32))
    model = FastFlow(tiny_backbone(dtype="bfloat16"), steps=1).fit(train, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"m\.onnx: .*bfloat16: write a \.pt2 file"):
        export(model, tmp_path / "m.onnx", test)
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "m.pt2", test) < 1e-3
