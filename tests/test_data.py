"""Readers, transforms, toy drawing and checks of flowrepro.data, with bad input;
real images through FLOWREPRO_TEST_DATA."""
import hashlib, shutil, struct, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from conftest import real_images
from flowrepro import data as D
from flowrepro.data import (
    DataError, Dataset, Record, Transform, check, check_report, cropped_defects, load, make_toy, open_image, read
)

def put(path, size=(8, 8), value=100, spot=None, mode="RGB"):
    "A flat image at `path`; `spot` = (x, y) set to 255."
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.new(mode, size, value if mode != "RGB" else (value,)*3)
    if spot: im.putpixel(spot, 255 if mode != "RGB" else (255,)*3)
    im.save(path)
    return path

def mvtec(root, cat="nut", good="good", bad="bent", ext="png", mask="{}_mask.png"):
    for i in range(3): put(root/cat/"train"/good/f"{i:03}.{ext}")
    for i in range(2):
        for kind in (good, bad): put(root/cat/"test"/kind/f"{i:03}.{ext}", value=150)
        put(root/cat/"ground_truth"/bad/mask.format(f"{i:03}"), value=0, spot=(3, 3), mode="L")
    return root

def mvtec3d(root, cat="bagel"):
    for part, defect, n in (("train", "good", 3), ("validation", "good", 2), ("test", "good", 2), ("test", "hole", 2)):
        for i in range(n):
            put(root/cat/part/defect/"rgb"/f"{i:03}.png")
            if part == "test":
                put(root/cat/part/defect/"gt"/f"{i:03}.png", value=0, spot=(2, 2) if defect == "hole" else None,
                    mode="L")
    return root

def flat(root, masks="masks", n=7):
    for i in range(n): put(root/"good"/f"{i}.JPG")
    for i in range(2):
        put(root/"dent"/f"{i}.png")
        if masks: put(root/masks/"dent"/f"{i}.png", value=0, spot=(3, 3), mode="L")
    return root

def counts(records):
    return tuple(sum(r.split == s and r.label == y for r in records)
                 for s, y in (("train", 0), ("test", 0), ("test", 1)))

def says(call, *words):
    with pytest.raises(DataError) as e: call()
    for w in words: assert str(w) in str(e.value), f"{w!r} not in {e.value}"

# -- official layouts ---------------------------------------------------------------------------------------------

def test_mvtec(tmp_path):
    mvtec(tmp_path); mvtec(tmp_path, "screw")
    (tmp_path/"nut"/"test"/"bent"/"Thumbs.db").touch()
    (tmp_path/"nut"/"test"/".hidden").mkdir()
    (tmp_path/"nut"/"train"/"good"/"._0.png").touch(); (tmp_path/"license.txt").touch()
    r = read("mvtec", tmp_path)
    assert counts(r) == (6, 4, 4)
    assert {x.category for x in r} == {"nut", "screw"}
    assert {x.defect for x in r} == {"good", "bent"}
    assert counts(read("mvtec", tmp_path, "nut")) == counts(read("mvtec", str(tmp_path), ["screw"])) == (3, 2, 2)
    assert all((x.mask is not None) == bool(x.label) for x in r)
    assert r == read("mvtec", tmp_path)

def test_btad_bmp_and_png(tmp_path):
    mvtec(tmp_path, "01", "ok", "ko", "bmp", "{}.png")
    mvtec(tmp_path, "02", "ok", "ko", "png", "{}.png"); mvtec(tmp_path, "03", "ok", "ko", "bmp", "{}.bmp")
    r = read("btad", tmp_path)
    assert counts(r) == (9, 6, 6) and {x.defect for x in r} == {"good", "ko"}
    assert ({(x.image.suffix, x.mask.suffix) for x in r if x.label}
            == {(".bmp", ".png"), (".png", ".png"), (".bmp", ".bmp")})
    train, test = load("btad", tmp_path, "03", Transform(8))
    assert test[len(test) - 1].mask.sum() == 1 and test.masks().shape == (4, 8, 8)

def test_mvtec3d(tmp_path):
    mvtec3d(tmp_path); mvtec3d(tmp_path, "tire")
    r = read("mvtec3d", tmp_path)
    assert counts(r) == (6, 4, 4) and all((x.split == "validation") == ("validation" in x.image.parts) for x in r)
    assert [len(d) for d in load("mvtec3d", tmp_path)] == [6, 8]        # validation is in neither
    assert counts(read("mvtec3d", tmp_path, validation=True)) == (10, 4, 4)
    _, test = load("mvtec3d", tmp_path, "tire", Transform(8))
    assert test.masks().any((1, 2)).tolist() == [bool(y) for y in test.labels]
    put(tmp_path/"tire"/"test"/"good"/"gt"/"000.png", value=0, spot=(1, 1), mode="L")
    says(lambda: load("mvtec3d", tmp_path, "tire")[1].masks(), "000.png", "labeled normal", "empty the mask")

def visa(root):
    body = []
    for i in range(3): body.append(("cashew", "train", "normal", f"cashew/Data/Images/Normal/{i}.JPG", ""))
    for i in range(2):
        body.append(("cashew", "test", "normal", f"cashew/Data/Images/Normal/{i + 3}.JPG", ""))
        body.append(("cashew", "test", "anomaly", f"cashew/Data/Images/Anomaly/{i}.JPG",
                     f"cashew/Data/Masks/Anomaly/{i}.png"))
    for *_, image, mask in body:
        put(root/image)
        if mask:
            put(root/mask, value=0, mode="L"); im = Image.open(root/mask); im.putpixel((2, 2), 7); im.save(root/mask)
    body.append(("pcb1", "train", "normal", "pcb1/Data/Images/Normal/0.JPG", ""))         # a category that is not here
    (root/"split_csv").mkdir()
    (root/"split_csv"/"1cls.csv").write_text("object,split,label,image,mask\n"
                                             + "".join(",".join(b) + "\n" for b in body))
    return root

def test_visa_synthetic(tmp_path):
    r = read("visa", visa(tmp_path))
    assert counts(r) == (3, 2, 2)
    assert Dataset([r[-1]], Transform(8))[0].mask.sum() == 1            # a class id of 7 is a defect

def test_visa_errors(tmp_path):
    visa(tmp_path/"v")
    says(lambda: read("visa", tmp_path/"v"/"cashew"), "too low", tmp_path/"v")
    says(lambda: read("visa", tmp_path), "too high", tmp_path/"v")
    says(lambda: read("visa", tmp_path/"v", "pcb1"), "pcb1", "available: cashew")
    put(tmp_path/"v"/"cashew"/"Data"/"Images"/"Normal"/"99.JPG")
    says(lambda: read("visa", tmp_path/"v"), "99.JPG", "without a label")
    (tmp_path/"v"/"cashew"/"Data"/"Images"/"Normal"/"99.JPG").unlink()
    put(tmp_path/"v"/"cashew"/"Data"/"Masks"/"Anomaly"/"1.png", (4, 4), 0, (1, 1), "L")
    says(lambda: read("visa", tmp_path/"v"), "1.png", "4×4", "8×8")
    (tmp_path/"v"/"cashew"/"Data"/"Masks"/"Anomaly"/"1.png").unlink()
    says(lambda: read("visa", tmp_path/"v"), "1.png", "missing", "restore")
    (tmp_path/"v"/"cashew"/"Data"/"Images"/"Normal"/"1.JPG").unlink()
    says(lambda: read("visa", tmp_path/"v"), "1.JPG", "1cls.csv line 3", "restore")
    (tmp_path/"v"/"split_csv"/"1cls.csv").unlink()
    says(lambda: read("visa", tmp_path/"v"), "1cls.csv", "missing")
    mvtec(tmp_path/"converted")
    says(lambda: read("visa", tmp_path/"converted"), "dataset mvtec")

def test_mvtec3d_leaves_no_image_out(tmp_path):
    d = mvtec3d(tmp_path)/"bagel"
    for n, x in (("train/good/xyz", "000.tiff"), ("test/hole/xyz", "000.tiff"),
                 ("calibration", "camera_parameters.json")):
        (d/n).mkdir(); (d/n/x).touch()
    assert counts(read("mvtec3d", tmp_path)) == (3, 2, 2)
    (d/"validation/good/rgb/001.png").write_bytes(b"no image")
    assert counts(read("mvtec3d", tmp_path)) == (3, 2, 2)               # a run does not use it
    c, p = check(tmp_path, "mvtec3d", progress=False)
    assert any("validation" in x and "001.png" in x and "cannot be decoded" in x for x in p)
    assert c.set_index("split").normal.to_dict() == {"train": 3, "validation": 2, "test": 2}
    for n in ("bagel/stray.png", "bagel/train/good/stray3.png", "bagel/validation/good/stray4.png",
              "bagel/test/hole/stray5.png", "bagel/tests/hole/rgb/6.png"):
        put(tmp_path/n); words = (d/"tests", "not read") if "tests" in n else (n, "without a label")
        says(lambda: read("mvtec3d", tmp_path), *words)
        assert any(all(str(w) in x for w in words) for x in check(tmp_path, "mvtec3d", progress=False)[1])
        (tmp_path/n).unlink()
    shutil.rmtree(d/"validation")
    assert counts(read("mvtec3d", tmp_path)) == (3, 2, 2)
    says(lambda: read("mvtec3d", tmp_path, validation=True), d/"validation", "missing")

def test_mvtec3d_read_as_another_data_set(tmp_path):
    mvtec3d(tmp_path)
    for d, root in (("mvtec", tmp_path), ("folder", tmp_path/"bagel")):
        says(lambda: read(d, root), f"read {tmp_path} with dataset mvtec3d")
    assert (check(tmp_path, "mvtec", progress=False)[1]
            == [f"{tmp_path/'bagel'}: the layout of MVTec 3D-AD; read {tmp_path} with dataset mvtec3d"])

@pytest.mark.parametrize("stray,words",
                         [("stray.png", "without a label"), ("cashew/0.png", "without a label"),
                          ("cashew/Data/1.JPG", "without a label"), ("cashew/Data/Image/2.JPG", "not read"),
                                         ("cashew/more/3.JPG", "not read"),
                                         ("cashew/Data/Masks/Anomaly/77.png", "a mask without an image")])
def test_visa_leaves_no_image_out(tmp_path, stray, words):
    put(visa(tmp_path)/stray)
    named = tmp_path/stray if words != "not read" else (tmp_path/stray).parent
    says(lambda: read("visa", tmp_path), named, words)
    c, p = check(tmp_path, "visa", progress=False)
    assert any(str(named) in x and words in x for x in p) and c.normal.sum() == 5

def test_visa_broken_rows(tmp_path):
    """A row that ends early, one that is there twice, an anomaly without a mask: each is named by its line; a
    line too long or empty is none."""
    table = visa(tmp_path)/"split_csv"/"1cls.csv"
    head, *body = table.read_text().splitlines()
    assert body[-2].startswith("cashew,test,anomaly") and len(body) == 8
    body = [body[0] + ",more", "", "cashew,train", "cashew,train,normal", body[3], body[3], *body[4:6],
            ",".join(body[6].split(",")[:4])]
    table.write_text("\n".join([head, *body]) + "\n")
    problems = check(tmp_path, "visa", progress=False)[1]
    for words in (("line 4", "image ''"), ("line 5", "label 'normal', image ''"), ("line 7", "3.JPG", "already"),
                  ("line 10", "1.JPG", "no mask")):
        assert [x for x in problems if all(w in x for w in words)], words
    assert not [x for x in problems if "line 2" in x or "line 3" in x]

def test_visa_folder_without_rows(tmp_path):
    put(visa(tmp_path)/"extra"/"Data"/"Images"/"Normal"/"0.JPG")
    (tmp_path/"cashew"/"Data"/"Masks"/"Anomaly"/"1.png").unlink()
    says(lambda: read("visa", tmp_path), tmp_path/"extra", "no rows")
    c, p = check(tmp_path, "visa", progress=False)
    assert list(zip(c.normal, c.anomalous)) == [(3, 0), (2, 2)]
    assert any("extra" in x and "no rows" in x for x in p)
    assert any("1.png" in x and "missing" in x for x in p)

def test_visa_csv_encodings(tmp_path):
    csv = visa(tmp_path)/"split_csv"/"1cls.csv"; text = csv.read_text(); r = read("visa", tmp_path)
    csv.write_text(text, encoding="utf-8-sig")
    assert read("visa", tmp_path) == r
    csv.write_text(text, encoding="utf-16")
    says(lambda: read("visa", tmp_path), csv, "expected columns")

# -- any folder, union --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masks", ["masks", "ground_truth", None])
def test_folder_flat(tmp_path, masks):
    r = read("folder", flat(tmp_path/"screws", masks, 11))
    # by name: 0 1 10 2 3 | 4 5 6 7 8 | 9
    assert counts(r) == (9, 2, 2)
    assert [x.image.name for x in r if x.split == "test" and not x.label] == ["3.JPG", "8.JPG"]
    assert {x.category for x in r} == {"screws"}
    _, test = load("folder", tmp_path/"screws", transform=Transform(8))
    assert test.has_masks == bool(masks)
    if masks: assert test.masks().any((1, 2)).tolist() == [False, False, True, True]
    else:
        assert test[len(test) - 1].mask is None and test[0].mask.sum() == 0
        says(test.masks, "0.png", "image metrics only")

def test_folder_structured(tmp_path):
    mvtec(tmp_path)
    assert counts(read("folder", tmp_path/"nut")) == (3, 2, 2)
    shutil.rmtree(tmp_path/"nut"/"ground_truth")
    assert all(r.mask is None for r in read("folder", tmp_path/"nut"))
    says(lambda: read("mvtec", tmp_path), "000.png", "mask is missing")

def test_folder_of_good_images_alone(tmp_path):
    "Trains without a test part, if told; an official layout without one is not whole."
    for i in range(3): put(tmp_path/"nut"/"train"/"good"/f"{i}.png")
    train, test = load("folder", tmp_path/"nut", test=False)
    assert len(train) == 3 and len(test) == 0 and check(tmp_path/"nut", "folder", progress=False)[1] == []
    says(lambda: load("folder", tmp_path/"nut"), tmp_path/"nut", "no test images", "test=False")
    says(lambda: load("mvtec", tmp_path, test=False), tmp_path/"nut"/"test"/"good", "missing")

def test_folder_errors(tmp_path):
    flat(tmp_path/"screws")
    says(lambda: read("folder", tmp_path), "too high", tmp_path/"screws")
    says(lambda: read("folder", tmp_path/"screws"/"good"), "too low", tmp_path/"screws")
    (tmp_path/"screws"/"masks"/"dent"/"1.png").unlink()
    says(lambda: read("folder", tmp_path/"screws"), "1.png", "mask is missing")
    put(tmp_path/"screws"/"stray.png")
    says(lambda: read("folder", tmp_path/"screws"), "stray.png", "without a label")
    says(lambda: read("folder", flat(tmp_path/"few", None, 4)), "4 images", "at least 5", "train/good")
    (tmp_path/"none").mkdir()
    says(lambda: read("folder", tmp_path/"none"), "no folder good")

def test_union(tmp_path):
    a, b = mvtec(tmp_path/"a"), mvtec(tmp_path/"b", "01", "ok", "ko", "bmp", "{}.png")
    r = read("union", f"mvtec={a}, btad={b}")
    assert r == read("union", {"mvtec": a, "btad": b}) and {x.category for x in r} == {"mvtec/nut", "btad/01"}
    assert counts(r) == (6, 4, 4) and counts(read("union", f"mvtec={a},btad={b}", "btad/01")) == (3, 2, 2)
    says(lambda: read("union", f"mvtec={a}", "mvtec/none"), "mvtec/none", "available: mvtec/nut")
    says(lambda: read("union", f"mvtek={a}"), "mvtek", "allowed", "btad")
    for bad in (str(a), None, "", f"mvtec={a},mvtec={b}"): says(lambda: read("union", bad), "mvtec=PATH,visa=PATH")
    c, p = check(f"mvtec={a},btad={b}", "union", progress=False)
    assert set(c.category) == {"mvtec/nut", "btad/01"} and any("btad/01 train" in x and "400" in x for x in p)
    c, p = check(f"mvtec={a},btad={tmp_path/'nope'}", "union", progress=False)
    assert list(zip(c.category, c.normal, c.anomalous)) == [("mvtec/nut", 3, 0), ("mvtec/nut", 2, 2)]
    assert len(p) == 1
    assert str(tmp_path/"nope") in p[0]
    assert "no such folder" in p[0]
    says(lambda: read("union", f"mvtec={a},btad={tmp_path/'nope'}"), "nope", "no such folder")

# -- errors -------------------------------------------------------------------------------------------------------

def test_unknown_and_missing_root(tmp_path):
    says(lambda: read("mvtek", tmp_path), "mvtek", "allowed", "mvtec3d", "union")
    says(lambda: read("mvtec", mvtec(tmp_path), "nuts"), "nuts", "available: nut")
    for d in ("mvtec", "btad", "visa", "mvtec3d", "folder", "toy"):
        says(lambda: read(d, tmp_path/"absent"), tmp_path/"absent", "no such folder")
    for d in ("mvtec", "visa", "folder"): says(lambda: read(d), "needs a root")

@pytest.mark.parametrize("dataset,make,low",
                         [("mvtec", mvtec, "nut"), ("mvtec", mvtec, "nut/train"), ("mvtec", mvtec, "nut/train/good"),
                          ("mvtec3d", mvtec3d, "bagel"), ("mvtec3d", mvtec3d, "bagel/test/hole")])
def test_wrong_level(tmp_path, dataset, make, low):
    root = make(tmp_path/"x"/"set")
    says(lambda: read(dataset, root/low), "too low", f"use root {root.resolve()} ", low.split("/")[0])
    says(lambda: read(dataset, tmp_path/"x"), "too high", f"use root {root}")
    says(lambda: read(dataset, tmp_path), "no category")

def test_empty_category_and_folders(tmp_path):
    mvtec(tmp_path); (tmp_path/"empty").mkdir()
    says(lambda: read("mvtec", tmp_path), tmp_path/"empty"/"train"/"good", "missing")
    assert read("mvtec", tmp_path, "nut")
    (tmp_path/"empty").rmdir(); (tmp_path/"nut"/"test"/"scratch").mkdir()
    says(lambda: read("mvtec", tmp_path), "scratch", "no images")
    (tmp_path/"nut"/"test"/"scratch").rmdir(); shutil.rmtree(tmp_path/"nut"/"test"/"good")
    says(lambda: read("mvtec", tmp_path), tmp_path/"nut"/"test"/"good", "restore")

def broken(tmp_path, change):
    root = mvtec(tmp_path); change(root/"nut"); return root

@pytest.mark.parametrize("change,words", [
    (lambda d: (d/"ground_truth/bent/001_mask.png").unlink(), ("001.png", "mask is missing", "001_mask.png")),
    (lambda d: (d/"test/bent/001.png").unlink(), ("001_mask.png", "without an image")),
    (lambda d: put(d/"ground_truth/bent/001_mask.png", (8, 9), 0, (1, 1), "L"),
     ("001_mask.png", "8×9", "8×8", "resize")),
    (lambda d: put(d/"test/stray.png"), ("stray.png", "without a label", "move")),
    (lambda d: put(d/"tests/bent/0.png"), ("nut/tests", "not read", "train, test, ground_truth", "rename")),
    (lambda d: (d/"train/good/9.png").symlink_to("gone.png"),
     ("9.png", "link that leads nowhere (gone.png)", "restore its target")),
    (lambda d: (d/"test/scratch").symlink_to("gone"), ("test/scratch", "link that leads nowhere")),
    (lambda d: (d.parent/"bolt").symlink_to("gone"), ("bolt", "link that leads nowhere")),
    (lambda d: put(d/"stray.JPG"), ("stray.JPG", "without a label")),
    (lambda d: put(d/"train/bent/0.png"), ("bent", "normal images in good only")),
    (lambda d: put(d/"test/bent/sub/0.png"), ("sub", "only images are expected")),
    (lambda d: (d/"train/good/1.heic").touch(), ("1.heic", "not an image format")),
    (lambda d: put(d/"test/bent/001.bmp"), ("same name", "rename")),
    (lambda d: put(d/"ground_truth/bent/001.jpg"), ("001.jpg", "JPEG", "PNG")),
    (lambda d: put(d/"ground_truth/bent/001.JPG"), ("001.JPG", "JPEG")),
    (lambda d: put(d/"ground_truth/dent/000_mask.png", mode="L"), ("dent", "restore")),
    (lambda d: (d/"test/bent/001.png").write_bytes(b"no image"), ("001.png", "not a readable image")),
])
def test_broken_layout(tmp_path, change, words):
    root = broken(tmp_path, change)
    says(lambda: read("mvtec", root), *words)
    assert any(all(w in p for w in words) for p in check(root, "mvtec", progress=False)[1])

def test_folders_without_images_may_lie_in_a_category(tmp_path):
    d = mvtec(tmp_path)/"nut"
    for n in ("notes/2020/readme.txt", "license.txt", "LICENSE", "notes/.cache/0.png", "notes/__MACOSX/1.png",
              ".thumbs/2.png", "notes/._3.png"):
        (d/n).parent.mkdir(parents=True, exist_ok=True); (d/n).touch()
    (d/"readme.md").symlink_to("gone.md")
    assert counts(read("mvtec", tmp_path)) == counts(read("folder", d)) == (3, 2, 2)

def test_links_that_lead_nowhere(tmp_path):
    (tmp_path/"root").symlink_to(tmp_path/"gone")
    says(lambda: read("mvtec", tmp_path/"root"), tmp_path/"root", "link that leads nowhere", tmp_path/"gone")
    for call in (lambda: D.open_image(tmp_path/"root"), lambda: D.open_mask(tmp_path/"root"),
                 lambda: D._header(tmp_path/"root")):
        says(call, tmp_path/"root", "link that leads nowhere")
    for n, words in (("Masks/Anomaly/1.png", "its mask"), ("Images/Normal/1.JPG", "1cls.csv line 3")):
        if not (tmp_path/"v").is_dir(): visa(tmp_path/"v")
        p = tmp_path/"v"/"cashew"/"Data"/n; p.unlink(); p.symlink_to("gone")
        says(lambda: read("visa", tmp_path/"v"), p, "link that leads nowhere (gone)", words)

@pytest.mark.parametrize("ext", ["png", "jpg", "bmp"])
def test_truncated_image(tmp_path, ext):
    p = put(tmp_path/f"a.{ext}", (64, 64))
    a = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8); Image.fromarray(a).save(p)
    p.write_bytes(p.read_bytes()[:-400])
    says(lambda: Dataset([Record(p, 0, None, "c", "good", "train")])[0], f"a.{ext}", "truncated", "restore")

def test_bad_items(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path/"deep.png")
    says(lambda: D.open_image(tmp_path/"deep.png"), "deep.png", "8 bits")
    says(lambda: D.open_image(tmp_path/"gone.png"), "gone.png", "missing")
    im, m = put(tmp_path/"i.png"), put(tmp_path/"m.png", (9, 8), 0, (1, 1), "L")
    says(lambda: Dataset([Record(im, 1, m, "c", "d", "test")])[0], "m.png", "9×8", "8×8")

def deep_png(a):
    "16-bit png of uint16 (h, w) or (h, w, channels), which Pillow cannot write in color."
    h, w, c = (*a.shape, 1)[:3]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    chunk = lambda tag, d: struct.pack(">I", len(d)) + tag + d + struct.pack(">I", zlib.crc32(tag + d))
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))

def deep_tiff(a):
    "Uncompressed 16-bit RGB tiff."
    h, w, _ = a.shape
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
            (277, 3, 1, 3), (278, 4, 1, h), (279, 4, 1, a.nbytes)]
    return (struct.pack("<2sHI3H", b"II", 42, 14 + a.nbytes, 16, 16, 16) + a.astype("<u2").tobytes()
            + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4))

def test_rotation_tag_is_told(tmp_path):
    "EXIF: the pixels as stored, as masks have them, with a word, once a folder."
    import warnings
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    exif = Image.Exif(); exif[0x0112] = 6
    for i in range(2): Image.fromarray(pixels).save(tmp_path/f"{i}.jpg", exif=exif)
    Image.fromarray(pixels).save(tmp_path/"plain.jpg")
    Image.fromarray(pixels).save(tmp_path/"bad tag.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30))
    with pytest.warns(UserWarning, match="EXIF rotation is not applied"): assert open_image(tmp_path/"0.jpg").size == (12, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for name in ("0.jpg", "1.jpg", "plain.jpg", "bad tag.jpg"): open_image(tmp_path/name)
    assert sum("EXIF rotation" in str(w.message) for w in told) == 1


@pytest.mark.parametrize("name, told", [("a.tif", 1), ("a.webp", 1), ("a.png", 1), ("a.mpo", 0), ("one.tif", 0)])
def test_a_file_of_several_images(tmp_path, recwarn, name, told):
    "Only the first is read, and that is said; who gives an open one chose it."
    first, other = Image.new("RGB", (12, 8), (200, 0, 0)), Image.new("RGB", (12, 8))
    first.save(tmp_path/name, **({} if name == "one.tif" else dict(save_all=True, append_images=[other])))
    assert open_image(tmp_path/name).getpixel((3, 3))[0] > 190
    assert sum("only the first is read" in str(w.message) for w in recwarn) == told
    with Image.open(tmp_path/name) as im: open_image(im)
    assert sum("only the first is read" in str(w.message) for w in recwarn) == told


def test_very_large_image(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path/"line.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="line.png: .*cut it into smaller images"): open_image(tmp_path/"line.png")


def test_masks_in_the_wrong_place_or_inverted(parts_folder, tmp_path):
    "A mask beside its image is no image; one that marks nearly everything is inverted."
    root = tmp_path/"parts"; shutil.copytree(parts_folder, root)
    Image.new("L", (40, 48), 255).save(root/"spot/00_mask.png")
    with pytest.raises(DataError, match="00_mask.png: looks like the mask of an image beside it; move it.*masks/spot"):
        read("folder", root)
    (root/"masks/spot").mkdir(parents=True)
    for p in sorted((root/"spot").glob("0?.*")):
        mask = np.full(np.array(Image.open(p)).shape[:2], 255, np.uint8); mask[16:20, 10:20] = 0
        Image.fromarray(mask).save(root/"masks/spot"/f"{p.stem}.png")
    (root/"spot/00_mask.png").unlink()
    problems = check(root, "folder", progress=False)[1]
    assert len(problems) == 3 and all("of its image; what is above 0 is the defect: invert the mask" in p for p in problems)


def test_names_of_folders(tmp_path):
    (tmp_path/"Good").mkdir()
    with pytest.raises(DataError, match="no folder good.*rename Good to good"): read("folder", tmp_path)
    with pytest.raises(DataError, match="a file; give a folder"): read("folder", Path(__file__))


def test_image_alone(parts_folder):
    "The image of a sample, of a subclass its own; a category named twice is read once."
    class Dark(Dataset):
        def __getitem__(self, i): return replace(super().__getitem__(i), image=torch.zeros(3, 8, 8))
    data = Dataset(read("folder", parts_folder), Transform(16))
    assert all(torch.equal(data.image(i), data[i].image) for i in range(len(data)))
    assert not Dark(data.records, Transform(16)).filter(label=1).image(0).any()
    one, two = (load("toy", None, c, Transform(16))[0] for c in (["bolt"], ["bolt", "bolt"]))
    assert len(one) == len(two)


def test_an_angle_of_your_own():
    "Without rotation none is drawn: a detector so sees new images."
    class Quarters(Transform):
        def angle(self, generator=None): return 90.0*int(torch.randint(1, 4, (), generator=generator))
    im = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    still, turned = Transform(8).image(im), Quarters(8, rotate=270.).image(im)
    assert torch.equal(replace(Quarters(8, rotate=270.), rotate=0.).image(im), still) and not torch.equal(turned, still)
    assert {Quarters(8).turn(), Transform(8).turn()} == {0.} and Quarters(8, rotate=1.).turn() in (90., 180., 270.)


def test_masks_of_a_reader_of_your_own(toy):
    "Where it moves images and masks, `masks` are the moved ones, without rotation."
    class Moved(Dataset):
        def __getitem__(self, i):
            s = super().__getitem__(i)
            return replace(s, image=s.image.roll(9, 2), mask=s.mask.roll(9, 1))
    plain = load("toy", toy, "bolt", Transform(32, rotate=5.))[1]
    class Turned(Transform):
        def angle(self, generator=None): return 90.
    for transform in (Transform(32, rotate=5.), Turned(32, rotate=5.)):
        own = Moved(plain.records, transform)
        assert np.array_equal(own.masks(), np.roll(plain.masks(), 9, 2)) and own.transform.rotate == 5

    class Elsewhere(Dataset):
        def __getitem__(self, i): return replace(super().__getitem__(i), mask=torch.zeros(32, 32, dtype=torch.bool))
    assert not Elsewhere([replace(r, mask=None) for r in plain.records], Transform(32)).masks().any()


def test_sixteen_bits_in_color(tmp_path):
    a = np.full((6, 8, 3), 40000, np.uint16)
    for name, content in (("rgb.png", deep_png(a)), ("rgba.png", deep_png(np.dstack([a, a])[..., :4])),
                          ("la.png", deep_png(a[..., :2])), ("rgb.tif", deep_tiff(a))):
        (tmp_path/name).write_bytes(content)
        assert np.asarray(Image.open(tmp_path/name)).max() == 156           # what Pillow makes of it
        for call in (D.open_image, D.open_mask):
            says(lambda: call(tmp_path/name), name, "more than 8 bits per channel", "convert")
        with Image.open(tmp_path/name) as im:
            for _ in range(2): says(lambda: D.open_image(im), name, "more than 8 bits per channel")
    m = np.zeros((6, 8), np.uint16); m[2, 3] = 1; (tmp_path/"gray.png").write_bytes(deep_png(m))
    says(lambda: D.open_image(Image.fromarray(m)), "PIL image of 8×6", "more than 8 bits per channel")
    assert (np.asarray(D.open_mask(tmp_path/"gray.png")) > 0).sum() == 1    # nothing is lost of a gray mask
    root = mvtec(tmp_path/"set"); (root/"nut/train/good/001.png").write_bytes(deep_png(a))
    assert [x for x in check(root, "mvtec", progress=False)[1] if "001.png" in x and "8 bits" in x]
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path/"ok.tif"); assert D.open_image(tmp_path/"ok.tif").size == (8, 6)

# -- masks and transforms -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_mask_modes(tmp_path, mode):
    a = np.zeros((6, 8), np.uint8); a[2, 3] = 1
    im = Image.fromarray(a.astype(np.uint16)) if mode == "I;16" else Image.fromarray(a)
    if mode == "1": im = Image.fromarray(a > 0)
    elif mode == "P": im.putpalette([0, 0, 0, 0, 0, 0]*128)
    elif mode in ("LA", "RGB", "RGBA"): im = im.convert(mode)
    im.save(tmp_path/"m.png")
    m = np.asarray(D.open_mask(tmp_path/"m.png")) > 0
    assert m.sum() == 1 and m[2, 3]

@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_masks_whose_black_is_not_zero(tmp_path, mode):
    a = np.zeros((6, 8), np.uint8); a[2, 3] = 255
    Image.fromarray(a).convert("RGB").convert(mode).save(tmp_path/"m.tif")
    assert np.array_equal(np.asarray(D.open_mask(tmp_path/"m.tif")), a)

@pytest.mark.parametrize("shape", [(50, 101), (101, 50), (64, 64), (33, 47), (32, 35)])
@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_crop_equals_torchvision(shape, interpolation):
    from torchvision import transforms as T
    a = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*shape, 3)).astype(np.uint8))
    mode = getattr(T.InterpolationMode, interpolation.upper())
    want = T.CenterCrop(32)(T.Resize(32, mode)(a))
    got = Transform(32, "crop", interpolation).image(a)
    assert got.dtype == torch.uint8 and np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(want))
    assert np.array_equal(Transform(32, "squash", interpolation).image(a).permute(1, 2, 0).numpy(),
                          np.asarray(T.Resize((32, 32), mode)(a)))

def test_transform_options():
    for bad in (dict(policy="pad"), dict(interpolation="cubic"), dict(size=0), dict(rotate=-1), dict(mask_size=0)):
        with pytest.raises(ValueError): Transform(**bad)
    m = Image.fromarray(np.eye(40, dtype=np.uint8)*255)
    assert Transform(32, mask_size=20).mask(m).shape == (20, 20) and Transform(32).mask(m).shape == (32, 32)

def test_rotation_is_reproducible_and_shared_with_the_mask(tmp_path):
    a = np.zeros((64, 64), np.uint8); a[8:20, 40:56] = 255
    im, m = tmp_path/"i.png", tmp_path/"m.png"
    Image.fromarray(np.repeat(a[..., None], 3, 2)).save(im); Image.fromarray(a).save(m)
    ds = Dataset([Record(im, 1, m, "c", "d", "test")], Transform(64, rotate=30.), torch.Generator().manual_seed(3))
    samples = [ds[0] for _ in range(4)]
    again = Dataset(ds.records, ds.transform, torch.Generator().manual_seed(3))
    assert all(torch.equal(s.image, again[0].image) for s in samples)
    assert len({s.image.numpy().tobytes() for s in samples}) == 4
    assert all(torch.equal(s.image[0] > 0, s.mask) for s in samples) and samples[0].mask.any()
    torch.manual_seed(1); x = Dataset(ds.records, ds.transform)[0].image; torch.manual_seed(1)
    assert torch.equal(x, Dataset(ds.records, ds.transform)[0].image)

def test_load_rotates_training_only(tmp_path):
    train, test = load("mvtec", mvtec(tmp_path), transform=Transform(8, rotate=5.))
    assert train.transform.random and not test.transform.random

def test_cropped_defects_are_counted(tmp_path):
    def record(name, x0, x1):
        m = np.zeros((10, 30), np.uint8); m[:, x0:x1] = 255
        Image.fromarray(m).save(tmp_path/f"{name}_mask.png")
        return Record(put(tmp_path/f"{name}.png", (30, 10)), 1, tmp_path/f"{name}_mask.png", "c", "d", "test")
    rs = [record("gone", 0, 4), record("half", 8, 12), record("kept", 12, 18)]
    t = cropped_defects(Dataset(rs)).set_index(cropped_defects(rs).path.map(lambda p: Path(p).stem))
    assert t.lost.to_dict() == {"gone": 1.0, "half": 0.5} and t.wholly.to_dict() == {"gone": True, "half": False}
    with pytest.warns(UserWarning, match=r"1 of 3 anomalous images.*gone\.png"):
        Dataset(rs, Transform(10, "crop")).masks()
    assert Dataset(rs, Transform(10, "squash")).masks().any((1, 2)).all()
    with pytest.warns(UserWarning) as said: Dataset([*rs, record("void", 0, 0)], Transform(10, "crop")).masks()
    for w, (name, why) in zip(said, (("void", "empty in its file"), ("gone", "after policy 'crop'")), strict=True):
        assert f"1 of 4 anomalous images, first {tmp_path/name}.png" in str(w.message) and why in str(w.message)
    (tmp_path/"kept_mask.png").write_bytes(b"no image"); problems = []
    says(lambda: cropped_defects(rs), "kept_mask.png", "cannot be decoded")
    assert len(cropped_defects(rs, problems.append)) == 2 and "kept_mask.png" in problems[0]
    assert "2 defects cut, 1 of them wholly" in check_report(*check_empty(), t)

def check_empty(): return D.pd.DataFrame(columns=["category", "split", "normal", "anomalous"]), []

def test_dataset_views(tmp_path):
    mvtec(tmp_path); mvtec(tmp_path, "screw")
    ds = Dataset(read("mvtec", tmp_path), Transform(8))
    assert ds.categories == ["nut", "screw"] and ds.labels.sum() == 4 and len(ds) == 14
    f = ds.filter("nut", "test", 1)
    assert len(f) == 2
    assert f.transform == ds.transform
    assert f[0].defect == "bent"
    assert f[0].image.dtype == torch.uint8
    assert f[0].mask.dtype == torch.bool
    assert len(ds.filter("none")) == 0

# -- check --------------------------------------------------------------------------------------------------------

def test_check_finds_everything(tmp_path):
    mvtec(tmp_path, "bottle"); d = tmp_path/"bottle"
    (d/"train/good/002.png").write_bytes((d/"train/good/002.png").read_bytes()[:-30])
    (d/"ground_truth/bent/001_mask.png").unlink()
    put(d/"test/stray.png"); put(d/"ground_truth/bent/000_mask.png", value=0, mode="L")
    c, p = check(tmp_path, "mvtec", progress=False)
    for words in (("002.png", "cannot be decoded"), ("001.png", "mask is missing"), ("stray.png",),
                  ("000_mask.png", "empty"), ("bottle train", "officially 209"), ("bottle test", "20 and 63")):
        assert any(all(w in x for w in words) for x in p), words
    assert len(p) == 6 and c.set_index("split").official_normal.to_dict() == {"train": 209, "test": 20}
    text = check_report(c, p, None, "mvtec")
    assert "6 problems" in text and "14 of 15 official" in text and "stray.png" in text
    c, p = check(tmp_path/"absent", "mvtec", progress=False)
    assert len(c) == 0 and "no such folder" in p[0] and "1 problem:" in check_report(c, p)

def test_official_totals():
    total = lambda d: tuple(map(sum, zip(*D.OFFICIAL[d].values())))
    assert total("mvtec") == (3629, 467, 1258)
    assert total("mvtec3d") == (2656, 249, 948)
    assert total("btad") == (1799, 451, 290)
    assert total("visa") == (8659, 962, 1200)
    assert [len(D.OFFICIAL[d]) for d in ("mvtec", "btad", "visa", "mvtec3d")] == [15, 3, 12, 10]

# -- toy ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy")/"t", seed=0, size=64, n_train=3, n_test_good=2, n_per_defect=2)

def digest(root, pixels):
    h = hashlib.sha256()
    for p in sorted(root.rglob("*.png")):
        h.update(str(p.relative_to(root).as_posix()).encode())
        h.update(np.asarray(Image.open(p)).tobytes() if pixels else p.read_bytes())
    return h.hexdigest()

def test_toy_is_the_same_everywhere(toy, tmp_path):
    assert digest(toy, True) == "fe120aba60882d34c6cd4067c6c1f3c3d8a8a1c2fd6ae51bf56c4d8964227b7a"
    assert digest(toy, False) == "0384b8facd15b0babfd2f4fed508e42d83236800b7b0e9c7454e6d3dff1b5b58"
    other = make_toy(tmp_path/"o", seed=1, size=64, n_train=3, n_test_good=2, n_per_defect=2)
    assert digest(other, True) != digest(toy, True)

def test_toy_default_size_pixels():
    h = hashlib.sha256()
    for c, (_, kinds) in D.TOY.items():
        for k in ("good", *kinds): h.update(b"".join(a.tobytes() for a in D.toy_image(c, k, 0)))
    assert h.hexdigest() == "3ef9258c5b55b98fb9a319730d615fe07a8f3cff8475059c566a34c23289a518"

def test_toy_reads(toy):
    r = read("toy", toy)
    assert counts(r) == (12, 8, 24) and len({x.category for x in r}) == 4
    for c in D.TOY: assert len({x.defect for x in r if x.category == c and x.label}) >= 3
    assert counts(read("mvtec", toy)) == (12, 8, 24)

@pytest.mark.parametrize("category", list(D.TOY))
def test_toy_masks_are_exact(category):
    for k in D.TOY[category][1]:
        for i in range(4):
            image, twin, mask = D.toy_image(category, k, i, size=64)
            assert np.array_equal(mask, (image != twin).any(-1)) and 0 < mask.sum() < mask.size//4
    image, twin, mask = D.toy_image(category, "good", 0, size=64)
    assert np.array_equal(image, twin) and not mask.any()

def test_toy_is_written_once_and_never_over_other_files(toy, tmp_path):
    p = next(toy.rglob("*.png")); before = p.stat().st_mtime_ns
    assert make_toy(toy, seed=0, size=64, n_train=3, n_test_good=2, n_per_defect=2) == toy
    assert p.stat().st_mtime_ns == before
    says(lambda: make_toy(toy, seed=1), toy, "empty or a new folder")
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"a.txt").touch()
    says(lambda: make_toy(tmp_path/"mine"), "mine")

def test_toy_with_a_file_missing_is_an_error(toy, tmp_path):
    shutil.copytree(toy, tmp_path/"t"); (tmp_path/"t"/"bolt"/"train"/"good"/"001.png").unlink()
    says(lambda: read("toy", tmp_path/"t"), tmp_path/"t", "remove this folder")

def test_toy_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/"file").touch(); monkeypatch.setenv("FLOWREPRO_CACHE", str(tmp_path/"file"))
    says(lambda: read("toy"), "FLOWREPRO_CACHE", "writable")

def test_toy_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fall(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(D, "png", fall)
    with pytest.raises(KeyboardInterrupt): make_toy(tmp_path/"t")
    assert not list(tmp_path.iterdir())

def test_toy_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWREPRO_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(D.make_toy, "__defaults__", (0, 16, 2, 1, 1))
    train, test = load("toy")
    assert (len(train), len(test)) == (8, 16) and (tmp_path/"cache"/f"toy-{D.TOY_VERSION}-0").is_dir()

def test_contact_sheet(toy):
    import matplotlib; matplotlib.use("Agg")
    fig = D.contact_sheet(load("toy", toy, transform=Transform(32))[1])
    assert len(fig.axes) == 16 and "good" in fig.axes[0].get_title()

# -- real images --------------------------------------------------------------------------------------------------

def test_real_bottle():
    root = real_images("mvtec_ad")
    r = read("mvtec", root, "bottle")
    assert counts(r) == (209, 20, 63)
    assert {x.defect for x in r} == {"good", "broken_large", "broken_small", "contamination"}
    assert counts(read("folder", root/"bottle")) == (209, 20, 63)
    says(lambda: read("mvtec", root/"bottle"), "too low", "category=bottle")
    says(lambda: read("mvtec", root.parent), "too high", root)
    _, test = load("mvtec", root, "bottle", Transform(64))
    assert test.masks()[20:].any((1, 2)).all() and cropped_defects(test).empty

def test_real_visa():
    root = real_images("visa")
    r = read("visa", root)
    assert counts(r) == (450, 50, 100) and {x.category for x in r} == {"fryum"}
    s = Dataset([x for x in r if x.label][:1], Transform(128, "crop"))[0]
    assert s.image.shape == (3, 128, 128) and s.mask.any()
    says(lambda: read("visa", root/"fryum"), "too low", root.resolve())
    import csv
    from collections import Counter
    n = Counter((x["object"], x["split"], x["label"]) for x in csv.DictReader(open(root/"split_csv"/"1cls.csv")))
    assert (D.OFFICIAL["visa"] == {c: (n[c, "train", "normal"], n[c, "test", "normal"], n[c, "test", "anomaly"])
                                   for c in D.OFFICIAL["visa"]})

def test_real_tiny_visa(tiny_visa):
    r = read("visa", tiny_visa)
    assert len(r) == 23
    c, p = check(tiny_visa, "visa", progress=False)
    assert len(p) == 2 and all("officially" in x for x in p)            # only the counts of this sample differ
    _, test = load("visa", tiny_visa, transform=Transform(64, "crop"))
    assert test.masks().shape == (len(test), 64, 64)


def test_absent_categories():
    assert D.absent_categories("btad", ["01", "03"]) == ["02"]
    assert D.absent_categories("toy", []) == []
    assert len(D.absent_categories("mvtec", ["bottle"])) == 14
    here = ["toy/weave", *(f"btad/{c}" for c in ("01", "03")), *(f"mvtec/{c}" for c in D.OFFICIAL["mvtec"])]
    assert D.absent_categories("union", here) == ["btad/02"] and D.absent_categories("union", ["toy/bolt"]) == []
    counts = pd.DataFrame([(c, "test", 1, 1, np.nan, np.nan) for c in here],
                          columns=["category", "split", "normal", "anomalous", "official_normal", "official_anomalous"])
    assert "not here: btad/02 (1 of 18 official categories)" in check_report(counts, [], None, "union")


def test_counts_are_whole_numbers():
    "Of a set with official counts and without."
    here = [D.Record(Path("a.png"), 0, None, c, "good", s) for c in ("bagel", "own") for s in ("train", "validation")]
    text = check_report(D.check_records(here, "mvtec3d", [], False)[0], [])
    assert "244" in text and ".0" not in text and "NA>" not in text


def test_many_problems():
    text = check_report(D.check_records([], "visa", [], False)[0], [f"{i}.JPG: missing" for i in range(2000)])
    assert "2000 problems:" in text
    assert "49.JPG" in text
    assert "50.JPG" not in text
    assert text.endswith("and 1950 more; mend these first")


@pytest.mark.parametrize("tag, told", [(1, False), (2, True), (8, True)])
def test_rotation_tags(tmp_path, recwarn, tag, told):
    "1 is upright, as most cameras write it, and nothing to be told; 2 to 8 are not."
    exif = Image.Exif(); exif[0x0112] = tag
    Image.new("RGB", (8, 6)).save(tmp_path/"a.jpg", exif=exif)
    open_image(tmp_path/"a.jpg")
    assert [str(w.message).endswith("if other images of these parts have no such tag") for w in recwarn] == [True]*told

def test_views_of_a_split_and_of_normal_images(tmp_path):
    ds = Dataset(read("mvtec", mvtec(tmp_path)), Transform(8))
    assert [len(ds.filter(split=s)) for s in ("train", "test")] == [3, 4]
    assert [len(ds.filter(label=y)) for y in (0, 1)] == [5, 2]

def test_image_alone_is_turned_by_the_generator(tmp_path):
    put(tmp_path/"i.png", (64, 64), spot=(50, 9))
    ds = Dataset([Record(tmp_path/"i.png", 0, None, "c", "good", "train")], Transform(64, rotate=30.),
                 torch.Generator().manual_seed(3))
    one = ds.image(0); ds.generator.manual_seed(3)
    assert torch.equal(one, ds[0].image)

def test_mask_of_another_size_is_found_without_a_reader(tmp_path):
    "By all masks at once, as by one sample."
    r = Record(put(tmp_path/"i.png", (8, 8)), 1, put(tmp_path/"m.png", (8, 9), 0, (1, 1), "L"), "c", "d", "test")
    ds = Dataset([r], Transform(8))
    for call in (ds.masks, lambda: ds[0]): says(call, "m.png", "8×9", "8×8")

def test_two_masks_for_one_image(tmp_path):
    gt = mvtec(tmp_path)/"nut"/"ground_truth"/"bent"
    put(gt/"001.png", value=0, spot=(1, 1), mode="L")
    says(lambda: read("mvtec", tmp_path), "two masks for one image", gt/"001.png", "001_mask.png", "remove one")

def test_visa_anomalies_in_train(tmp_path):
    "Of another split than the one-class one, which would be trained on as normal."
    table = visa(tmp_path)/"split_csv"/"1cls.csv"
    table.write_text(table.read_text().replace("cashew,test,anomaly", "cashew,train,anomaly", 1))
    says(lambda: read("visa", tmp_path), "Anomaly/0.JPG is anomalous and in train", "1cls.csv")

def test_union_reads_the_parts_asked_for(tmp_path):
    "A data set whose name begins like another's stays closed."
    b = mvtec3d(tmp_path/"b")
    assert len(read("union", f"mvtec={tmp_path/'absent'},mvtec3d={b}", "mvtec3d/bagel")) > 0

def test_nothing_to_train_on(tmp_path, monkeypatch):
    "Told even where no test images are asked for."
    monkeypatch.setitem(D.READERS, "folder", lambda *_, **__: [])
    for test in (True, False): says(lambda: load("folder", tmp_path, test=test), "no train images in folder")

def test_check_finds_images_that_are_trained_on_and_tested(tmp_path, monkeypatch):
    "By their bytes, whatever they are called; the same size is not enough."
    mvtec(tmp_path); test = tmp_path/"nut"/"test"
    assert not [p for p in check(tmp_path, "mvtec", progress=False)[1] if "trained on" in p]
    put(test/"bent"/"001.png")  # as in train/good
    found = [p for p in check(tmp_path, "mvtec", progress=False)[1] if "trained on" in p]
    assert len(found) == 1 and str(test/"bent"/"001.png") in found[0] and "train/good/00" in found[0]
    def broken(path): raise OSError("Input/output error")
    monkeypatch.setattr(D, "sha256", broken)
    assert D.twins(read("mvtec", tmp_path)) == []  # a problem of its own

def test_check_compares_both_counts(tmp_path, monkeypatch):
    mvtec(tmp_path)
    for official, n in (((3, 2, 2), 0), ((3, 2, 5), 1), ((3, 9, 2), 1), ((4, 2, 2), 1)):
        monkeypatch.setitem(D.OFFICIAL, "mvtec", {"nut": official})
        assert len(check(tmp_path, "mvtec", progress=False)[1]) == n, official

def test_check_of_a_mask_that_contradicts_its_label(tmp_path):
    "Both ways."
    root, gt = mvtec3d(tmp_path), tmp_path/"bagel"/"test"
    put(gt/"good"/"gt"/"000.png", value=0, spot=(1, 1), mode="L"); put(gt/"hole"/"gt"/"001.png", value=0, mode="L")
    problems = check(root, "mvtec3d", progress=False)[1]
    for words in (("good/gt/000.png", "marks a defect, but its image is labeled normal"),
                  ("hole/gt/001.png", "is empty, but its image is labeled anomalous")):
        assert [p for p in problems if all(w in p for w in words)], words


def test_palette_mask_whose_first_color_is_white(tmp_path):
    a = np.zeros((32, 40), np.uint8)
    a[4:16, 5:35] = 255
    Image.fromarray(a).quantize(2).save(tmp_path / "m.png")  # index 0 is white
    assert (np.asarray(D.open_mask(tmp_path / "m.png")) == a).all()


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))
    (tmp_path / "a/train/good").mkdir(parents=True)
    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    with pytest.raises(DataError, match="chmod"):
        D.read("mvtec", tmp_path)


def test_visa_row_of_another_category(tmp_path):
    rows = ["object,split,label,image,mask"]
    for c in ("candle", "pcb1"):
        (tmp_path / c / "Data/Images/Normal").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / c / "Data/Images/Normal/0.JPG")
        rows.append(f"candle,train,normal,{c}/Data/Images/Normal/0.JPG,")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join([*rows, "pcb1,test,normal,,"]))
    told = []
    D.read("visa", tmp_path, fail=told.append)
    assert any("line 3" in t and "is not of candle" in t for t in told)


def test_check_counts_the_validation_images_of_mvtec_3d():
    "Beside the official number, and too few are a problem."
    assert D.VALIDATION["mvtec3d"].keys() == D.OFFICIAL["mvtec3d"].keys() and sum(D.VALIDATION["mvtec3d"].values()) == 294
    records = [D.Record(Path("x.png"), 0, None, "bagel", "good", "validation")] * 2
    counts, problems = D.check_records(records, "mvtec3d", [], progress=False)
    assert counts.set_index("split").loc["validation", "official_normal"] == 22
    assert any(p.startswith("bagel validation: 2 normal and 0 anomalous images, officially 22 and 0") for p in problems)


@pytest.mark.parametrize("palette", [[0, 0, 0, 0, 0, 0, 255, 0, 0], [255, 255, 255, 255, 0, 0, 0, 0, 255]], ids=["classes", "no black"])
def test_palette_masks_count_by_index(tmp_path, palette):
    a = np.zeros((6, 8), np.uint8); a[2, 3], a[4, 5] = 1, 2
    im = Image.fromarray(a); im.putpalette(palette); im.save(tmp_path/"m.png")
    assert ((np.asarray(D.open_mask(tmp_path/"m.png")) > 0) == (a > 0)).all()


def test_an_image_whose_own_name_ends_as_a_mask(tmp_path):
    image, mask = put(tmp_path/"bent/a_mask.png"), put(tmp_path/"masks/a_mask.png", spot=(1, 1), mode="L", value=0)
    assert D.pair_masks([image], tmp_path/"masks") == {image: mask}


def test_mask_of_another_size_is_a_problem_of_its_record(tmp_path):
    record = Record(put(tmp_path/"a.png"), 1, put(tmp_path/"m.png", (8, 9), 0, (1, 1), "L"), "nut", "bent", "test")
    assert ["8×9" in p for p in D.inspect_record(record)] == [True]


def test_contact_sheet_is_evenly_chosen_and_outlined_where_the_defect_is(toy):
    from matplotlib import pyplot as plt
    whole = load("toy", toy, "weave", Transform(64, mask_size=16))[1]
    fig = D.contact_sheet(whole, n=2)
    good, shown = [i for i, r in enumerate(whole.records) if not r.label], [ax for ax in fig.axes if ax.images]
    for ax, i in zip(shown, (good[0], good[len(good)//2])):
        assert np.array_equal(ax.images[0].get_array(), whole[i].image.permute(1, 2, 0).numpy())
    (y, x), line = np.nonzero(whole[next(i for i, r in enumerate(whole.records) if r.label)].mask.numpy()), shown[2].collections
    corners = np.concatenate([p.vertices for p in line[0].get_paths()])
    assert np.allclose([*corners.min(0), *corners.max(0)], [4*x.min(), 4*y.min(), 4*x.max() + 4, 4*y.max() + 4])
    plt.close(fig)
