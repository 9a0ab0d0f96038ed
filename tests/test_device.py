"Everything is computed where the model is: a GPU's tensors without their values, so that no GPU is needed."
import pytest
import torch
from conftest import moved
from torch._subclasses.fake_tensor import FakeTensorMode

from flowrepro import bases, detectors, hgad
from flowrepro.scores import PUBLISHED, Score, calibration, score_batch

METHODS = [("fastflow", dict(steps=2)),
           ("fastflow", dict(steps=2, soft=True, norm="layer", base="diagonal", per="position")),
           ("cflow", dict(steps=2, code=8)), ("cflow", dict(steps=2, code=8, fibers=16, base="diagonal")),
           ("hgad", dict(steps=2, code=8, centres=3)),
           ("hgad", dict(steps=2, code=8, base="classes", norm="layer-fixed")),
           ("hgad", dict(steps=2, code=8, base="standard"))]


@pytest.mark.parametrize("method, settings", METHODS, ids=str)
def test_everything_stays_on_the_gpu(method, settings, tiny_backbone, monkeypatch):
    """Features, losses, parts of every class mode, calibration, maps and image scores, of the
    default and of the published form."""
    for module in (bases, hgad):
        monkeypatch.setattr(module, "check_label", lambda *_: None)  # looks at values
    model = detectors.DETECTORS[method](tiny_backbone(64), **settings)
    if method == "hgad":
        model.adopt(["a", "b"])
    published = PUBLISHED[method] if method != "hgad" or model.mixture else PUBLISHED["cflow"]
    with FakeTensorMode():
        moved(model, "cuda")
        features, labels = (model.backbone(torch.zeros(4, 3, 64, 64, dtype=torch.uint8)),
                            torch.zeros(4, dtype=torch.int64, device="cuda"))
        got = [*features, *model.losses(features, labels, torch.Generator())]
        parts = model.parts(features, labels)
        stats = calibration(parts)
        for mode in detectors.CLASS_MODES if method == "hgad" and model.mixture else ():
            parts += model.parts(features, labels, mode)
        got += [t for part in parts for t in part if t is not None] + [stats]
        for score in (Score(), published):
            got += score_batch(parts[:len(stats)], 64, score, stats)
    assert {t.device.type for t in got} == {"cuda"}
