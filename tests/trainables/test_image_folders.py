"""TinyImageNet and HC18 read from small trees of images in their true formats, and what is said of wrong ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flatmin.errors import DataError
from flatmin.trainables.datasets.hc18 import hc18
from flatmin.trainables.datasets.hc18 import write_files as write_hc18
from flatmin.trainables.datasets.tiny_imagenet import tiny_imagenet
from flatmin.trainables.datasets.tiny_imagenet import write_files as write_tiny_imagenet


def pixels(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# TinyImageNet

WNIDS = ["n02124075", "n01443537", "n04067472"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a data folder with a TinyImageNet of three classes; the first image of each is grey."""
    train: dict[str, list[Image.Image]] = {}
    for c, wnid in enumerate(WNIDS):
        images = [Image.fromarray(pixels(64, 64, 3, seed=10 * c + number)) for number in range(3)]
        train[wnid] = [images[0].convert("L"), *images[1:]]
    val = [WNIDS[1], WNIDS[2], WNIDS[0], WNIDS[1]]
    write_tiny_imagenet(
        tmp_path / "tiny-imagenet-200",
        train,
        [(wnid, Image.fromarray(pixels(64, 64, 3, seed=50 + number))) for number, wnid in enumerate(val)],
    )
    return tmp_path


def opened(file: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)


def test_tiny_imagenet(tiny: Path) -> None:
    dataset = tiny_imagenet(tiny)
    folder = tiny / "tiny-imagenet-200"
    files = [folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(3)]
    assert torch.equal(dataset.train_x, torch.stack([opened(file) for file in files]))
    assert torch.equal(dataset.train_x[0, 0], dataset.train_x[0, 2])  # grey
    assert dataset.train_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    tests = [opened(folder / "val" / "images" / f"val_{number}.JPEG") for number in range(4)]
    assert torch.equal(dataset.test_x, torch.stack(tests))
    assert dataset.test_y.tolist() == [1, 2, 0, 1]
    assert dataset.classes == 3
    assert dataset.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    assert torch.equal(tiny_imagenet(tiny).train_x, dataset.train_x)  # decoded once


def test_wrong_files_of_tiny_imagenet_are_named(tiny: Path) -> None:
    folder = tiny / "tiny-imagenet-200"
    file = folder / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_2.JPEG"
    whole = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=f"{message}.*; remove .*tiny-imagenet-200, and `flatmin-sweep launch`"):
            tiny_imagenet(tiny)
        assert not (folder / "decoded.safetensors").exists()

    file.write_bytes(whole[:-200])
    refused(rf"{file} cannot be read as an image: ")
    Image.fromarray(pixels(64, 32, 3)).save(file)
    refused(rf"{file} has 32 x 64 pixels, and should have 64 x 64")
    Image.new("CMYK", (64, 64)).save(file)
    refused(rf"{file} is of mode CMYK, and should be RGB or L")
    file.write_bytes(whole)
    test = folder / "val" / "images" / "val_2.JPEG"
    kept = test.read_bytes()
    test.unlink()
    refused(rf"there is no {test}")
    test.write_bytes(kept)
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines.replace(WNIDS[0], "n99999999"))
    refused(rf"{annotations}, line 3: 'n99999999' is not in .*wnids.txt")
    annotations.write_text("".join(lines.splitlines(keepends=True)[:2]))
    refused(rf"{annotations} has 2 lines, and there are 4 images beside it")
    annotations.write_text(lines + lines.splitlines(keepends=True)[0])
    refused(rf"{annotations} has 5 lines, and there are 4 images beside it")
    annotations.write_bytes(b"\xff" + lines.encode())
    refused(rf"{annotations} is no text in UTF-8")
    annotations.write_text(lines)
    file.unlink()
    refused(r"train: classes have 2 to 3 images, and should be alike")
    file.write_bytes(whole)
    for image in (folder / "train" / WNIDS[2] / "images").iterdir():
        image.unlink()
    refused(rf"there is no image in .*{WNIDS[2]}")


def test_a_class_missing_from_the_test_set_is_named(tiny: Path) -> None:
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(WNIDS[0], WNIDS[1]))
    with pytest.raises(DataError, match=r"val: no example is of class 0; 1 of 3 are missing"):
        tiny_imagenet(tiny)


# HC18

PIXEL = 0.14


def ellipse(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    ImageDraw.Draw(image).ellipse(box, outline=255, width=1)


@pytest.fixture
def hc18_files(tmp_path: Path) -> Path:
    """Return a data folder with ten images of seven fetuses, 400 x 300, each with an ellipse."""
    names = [f"00{fetus}_HC.png" for fetus in range(7)] + ["002_2HC.png", "002_3HC.png", "005_2HC.png"]
    images = {}
    for seed, name in enumerate(names):
        contour = Image.new("L", (400, 300))
        ellipse(contour, (60 + seed, 50, 300, 220))
        images[name] = Image.fromarray(pixels(300, 400, seed=seed) // 2 + 40), contour
    write_hc18(tmp_path / "HC18", images, PIXEL)
    return tmp_path


def bilinear(image: npt.NDArray[np.float64], row: int, column: int) -> float:
    """Return one resampled pixel: the value at (row, column) x 0.35 mm of an image with a given pixel size."""
    y, x = row * 0.35 / PIXEL, column * 0.35 / PIXEL
    height, width = image.shape
    if y > height - 0.5 or x > width - 0.5:
        return 0.0
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def test_hc18(hc18_files: Path) -> None:
    dataset = hc18(hc18_files)
    names = sorted(path.name for path in (hc18_files / "HC18" / "training_set").glob("*HC.png"))
    order = np.arange(10)
    np.random.RandomState(0).shuffle(order)
    assert dataset.test_x.shape == (3, 1, 256, 256)
    assert dataset.train_x.shape == (7, 1, 256, 256)
    assert dataset.train_y.dtype == torch.uint8
    assert dataset.task == "segmentation"
    x, y = torch.cat([dataset.test_x, dataset.train_x]), torch.cat([dataset.test_y, dataset.train_y])
    for place in (0, 4):
        file = hc18_files / "HC18" / "training_set" / names[order[place]]
        image = np.asarray(Image.open(file), dtype=np.float64)
        contour = np.asarray(Image.open(file.with_name(f"{file.stem}_Annotation.png")))
        left = int(np.flatnonzero(contour.any(axis=0))[0])
        filled = Image.new("L", (400, 300))
        ImageDraw.Draw(filled).ellipse((left, 50, 300, 220), fill=255, outline=255)
        head = np.asarray(filled, dtype=np.float64)
        small = np.array([[bilinear(image, i, j) for j in range(256)] for i in range(256)])
        small = np.floor(small + 1e-9)
        assert np.array_equal(x[place, 0].numpy(), np.rint(small / small.max() * 255))
        mask = np.array([[bilinear(head, i, j) >= 1 for j in range(256)] for i in range(256)])
        assert np.array_equal(y[place].numpy(), mask)
    share = dataset.train_y.double().mean()
    assert dataset.class_weights is not None
    torch.testing.assert_close(dataset.class_weights.double(), 1 / torch.stack([1 - share, share]), rtol=1e-6, atol=0)
    again = hc18(hc18_files, hc18_seed=1)
    assert not torch.equal(again.test_x, dataset.test_x)
    assert int(torch.cat([again.test_y, again.train_y]).sum()) == int(y.sum())


def test_a_fetus_can_be_kept_in_one_set(hc18_files: Path) -> None:
    """Images of one fetus are made equal, and are then looked for in both sets."""
    folder = hc18_files / "HC18" / "training_set"
    for name in ("002_2HC", "002_3HC", "005_2HC"):
        for end in (".png", "_Annotation.png"):
            shutil.copy(folder / f"{name[:3]}_HC{end}", folder / f"{name}{end}")
    divided = 0
    for seed in range(12):
        for by_fetus in (False, True):
            dataset = hc18(hc18_files, hc18_seed=seed, hc18_by_fetus=by_fetus)
            train, test = ({image.numpy().tobytes() for image in x} for x in (dataset.train_x, dataset.test_x))
            assert len(dataset.train_x) + len(dataset.test_x) == 10
            if by_fetus:
                assert not train & test
                assert 3 <= len(dataset.test_x) <= 5
            else:
                divided += bool(train & test)
    assert divided > 0


def test_a_head_cut_off_by_the_image_is_whole(hc18_files: Path) -> None:
    file = hc18_files / "HC18" / "training_set" / "000_HC_Annotation.png"
    contour = Image.new("L", (400, 300))
    ellipse(contour, (60, 100, 300, 380))
    contour.save(file)
    dataset = hc18(hc18_files)
    y = torch.cat([dataset.test_y, dataset.train_y]).double().flatten(1).sum(1)
    assert float(y.max()) == pytest.approx(np.pi * 120 * 140 * 0.75 * (PIXEL / 0.35) ** 2, rel=0.08)


def test_wrong_files_of_hc18_are_named(hc18_files: Path) -> None:
    folder = hc18_files / "HC18" / "training_set"
    table = folder.parent / "training_set_pixel_size_and_HC.csv"
    image, contour = folder / "003_HC.png", folder / "003_HC_Annotation.png"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=rf"{message}.*; remove .*, and `flatmin-sweep launch`"):
            hc18(hc18_files)

    def changed(file: Path, write: Callable[[], object], message: str) -> None:
        content = file.read_bytes()
        write()
        refused(message)
        file.write_bytes(content)

    changed(image, lambda: image.write_bytes(image.read_bytes()[:5000]), f"{image} cannot be read as an image")
    changed(image, lambda: Image.new("RGB", (400, 300)).save(image), f"{image} is of mode RGB, and should be L")
    small = Image.new("L", (399, 300))
    changed(contour, lambda: small.save(contour), f"{contour} has 399 x 300 pixels, and should have 400 x 300")
    empty = Image.new("L", (400, 300))
    changed(contour, lambda: empty.save(contour), f"{contour}: the contour encloses nothing")
    changed(contour, contour.unlink, f"there is no {contour}")
    changed(image, image.unlink, rf"{table} and {folder} differ: 003_HC.png is in one of them \(1 such\)")
    rows = table.read_text()
    changed(table, lambda: table.write_text(rows.replace("0.14", "", 1)), f"{table}: a row has no column 'filename' or")
    changed(
        table, lambda: table.write_text(rows.replace("0.14", "0", 1)), f"{table}: the pixel size of 000_HC.png is 0"
    )
    changed(table, lambda: table.write_text(rows.replace("pixel size", "size")), f"{table}: a row has no column")
    changed(table, lambda: table.write_bytes(b"\xff" + rows.encode()), f"{table} is no table in UTF-8")


def test_what_was_resampled_is_made_again_when_the_images_are_others(hc18_files: Path) -> None:
    hc18(hc18_files)
    folder = hc18_files / "HC18"
    for file in (folder / "training_set").glob("002_2HC*.png"):
        file.unlink()
    table = folder / "training_set_pixel_size_and_HC.csv"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(row for row in rows if not row.startswith("002_2HC")))
    changed = hc18(hc18_files)
    for file in folder.glob("resampled*"):
        file.unlink()
    anew = hc18(hc18_files)
    assert len(changed.train_x) + len(changed.test_x) == 9
    assert torch.equal(changed.train_x, anew.train_x)
    assert torch.equal(changed.test_y, anew.test_y)
