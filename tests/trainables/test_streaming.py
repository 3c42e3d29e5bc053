"""Streamed images: read as torchvision reads them, the same as if they were resident, and bad files named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from flatmin.errors import DataError, RequestError
from flatmin.lease import Lease
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.stack import stream_key, uniform
from flatmin.trainables.data import StackData, stack_data
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.datasets.imagenet import MEAN, STD, imagenet, write_tree
from flatmin.trainables.job import run
from flatmin.trainables.streaming import Images, _Reads
from flatmin.trainables.training import training
from flatmin.trainables.views import random_window
from flatmin.trial import Job

SIZES = {"RGB": (300, 231), "L": (40, 400), "CMYK": (257, 500)}
"""Width and height, by mode, of what the three images of each folder are."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with a tiny ImageNet: two classes of three training images and one validation image."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for part, modes in (("train", SIZES), ("val", {"RGB": (224, 224)})):
        images: dict[str, list[Image.Image]] = {"n01440764": [], "n02102040": []}
        for own, (mode, (width, height)) in product(images.values(), modes.items()):
            coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, len(mode)), dtype=np.uint8)
            own.append(Image.frombytes(mode, coarse.shape[1::-1], coarse.tobytes()).resize((width, height)))
        write_tree(root / "imagenet" / part, images)
    return root


def published(file: Path) -> Tensor:
    """Return an image as the published code reads it: the shorter side to 256, the centre, RGB."""
    with Image.open(file) as image:
        read: Tensor = functional.pil_to_tensor(
            functional.center_crop(functional.resize(image.convert("RGB"), 256), 224)
        )
    return read


def stack(dataset: Dataset, **changes: Any) -> StackData:
    recipes = [training(seed=seed, **{"batch_size": 2, **changes}) for seed in (0, 0, 1)]
    return stack_data(dataset, recipes, torch.device("cpu"), torch.float64)


def test_images_of_any_size_and_mode_are_read_as_published(root: Path) -> None:
    dataset = imagenet(root)
    files = sorted((root / "imagenet" / "train").rglob("*.JPEG"))
    assert dataset.input_shape == (3, 224, 224) and dataset.classes == 2
    assert dataset.train_y.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test_y.tolist() == [0, 1]
    assert torch.equal(dataset.train_x[torch.arange(6)], torch.stack([published(file) for file in files]))


def test_a_streamed_set_trains_and_evaluates_as_a_resident_one(root: Path) -> None:
    """The same batches, targets, noise and chunks, whatever reads ahead."""
    dataset = imagenet(root)
    resident = replace(dataset, train_x=dataset.train_x[torch.arange(6)], test_x=dataset.test_x[torch.arange(2)])
    order = torch.tensor([[4, 1, 0], [4, 1, 0], [2, 0, 3]])
    orders = list(torch.split(order, 2, dim=1))
    batches = []
    for own in (dataset, resident):
        data = stack(own, label_noise=0.5, data_noise=0.2, val_size=1)
        assert data.train.streamed is (own is dataset)
        steps = [split.gather(order) for order, split in zip(orders, data.train.steps(3, orders), strict=True)]
        assert data.val is not None
        batches.append([*steps, *data.train.chunks(), *data.val.chunks(), *data.test.chunks()])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and one.shared == other.shared


def test_random_parts_are_torchvisions_of_the_same_window(root: Path) -> None:
    """Each order seed has its own part of an image in each epoch, whatever the other models and the place in a step."""
    dataset = imagenet(root)
    order = torch.tensor([[4, 1], [4, 1], [1, 4]])

    def pixels(epoch: int, rows: list[int], order: Tensor = order) -> Tensor:
        data = stack(dataset, augmentation="random_resized_crop_flip")
        index = torch.tensor(rows)
        (split,) = data.train.select(index).steps(epoch, [order[index]])
        mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (MEAN, STD))
        return (split.gather(order[index]).x * std + mean) * 255

    first = pixels(0, [0, 1, 2])
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0].flip(0), first[2])
    torch.testing.assert_close(pixels(0, [2, 0]), first[[2, 0]], rtol=0, atol=1e-9)
    torch.testing.assert_close(pixels(0, [0], order.flip(1)), first[:1].flip(1), rtol=0, atol=1e-9)
    assert not torch.equal(pixels(1, [0]), first[:1])


def test_a_random_part_is_its_draws_through_torchvision(root: Path) -> None:
    file = sorted((root / "imagenet" / "train").rglob("*.JPEG"))[0]
    with Image.open(file) as image:
        whole = image.convert("RGB")
    flips = 0
    for seed in range(30):
        key = stream_key("augmentation", seed, 0)
        draws = uniform(key, (23,)).tolist()
        part = functional.resized_crop(whole, *random_window(whole.height, whole.width, draws), [224, 224])
        flips += draws[-1] < 0.5
        expected = functional.hflip(part) if draws[-1] < 0.5 else part
        assert torch.equal(Images([file]).read(0, [key])[0], functional.pil_to_tensor(expected))
    assert stats.binomtest(flips, 30).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 500)])
def test_windows_are_spread_as_torchvisions(height: int, width: int) -> None:
    """Areas, shapes and places; of the flat image, most tries fail and some end in the centre."""
    count = 1500
    draws = uniform(stream_key("test"), (count, 23)).tolist()
    ours = np.array([random_window(height, width, own) for own in draws])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blank = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"not an image", lambda data: b""]
)
def test_a_bad_file_is_named_wherever_it_is_read(root: Path, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Also by a worker process, whose error arrives as what it was."""
    shutil.copytree(root / "imagenet", tmp_path / "imagenet")
    bad = tmp_path / "imagenet" / "train" / "n02102040" / "n02102040_1.JPEG"
    bad.write_bytes(damage(bad.read_bytes()))
    data = stack(imagenet(tmp_path))
    order = torch.tensor([[0, 4], [0, 4], [4, 1]])
    with pytest.raises(DataError, match=f"^{re.escape(str(bad))} cannot be read as an image"):
        list(data.train.steps(0, [order]))
    with pytest.raises(DataError, match=f"^{re.escape(str(bad))} cannot be read as an image"):
        data.train.gather(order)


def test_missing_folders_say_what_goes_where(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ImageNet is not at .*imagenet.*ILSVRC2012_img_train.tar"):
        imagenet(tmp_path)
    shutil.copytree(root / "imagenet", tmp_path / "imagenet")
    shutil.rmtree(tmp_path / "imagenet" / "val" / "n02102040")
    with pytest.raises(DataError, match=r"train and val differ in 1 class folders, n02102040"):
        imagenet(tmp_path)
    (tmp_path / "imagenet" / "val" / "n02102040").mkdir()
    with pytest.raises(DataError, match=r"val/n02102040 has no images"):
        imagenet(tmp_path)


def test_a_step_reads_each_file_once_whatever_the_models_and_views(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = Images.read

    def counted(self: Images, number: int, keys: Any = (None,)) -> list[Tensor]:
        read.append(number)
        return whole(self, number, keys)

    monkeypatch.setattr(Images, "read", counted)
    images = Images(sorted((root / "imagenet" / "train").rglob("*.JPEG")))
    views = 6 * torch.arange(3).repeat_interleave(2) + torch.tensor([1, 5]).repeat(3)
    found = _Reads(images, (1, 2, 3)).__getitems__(views.tolist())
    assert read == [1, 5] and isinstance(found, Tensor)
    assert torch.equal(found, torch.stack([whole(images, int(v) % 6, [1 + int(v) // 6])[0] for v in views]))


STUDY = """\
study: photographs
settings:
  {dataset: imagenet, network: mlp, width: 1, optimizer: sgd, batch_size: 40, epochs: 2, eval_every: 2,
   augmentation: random_resized_crop_flip}
axes: {lr: [0.001, 0.002]}
measures: [%s]
"""


def carried_out(root: Path, folder: Path, measures: str) -> Results:
    """Return the results of a trial on the ImageNet of a folder."""
    (folder / "study.yaml").write_text(STUDY % measures)
    (trial,) = make_plan(read_study(str(folder / "study.yaml"))).trials
    results = Results.create(folder / "results", "photographs")
    with Lease(results) as lease:
        list(run(Job(trial, str(results.path), lease.token)))
    return results


def test_a_trial_trains_and_measures_what_it_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    random = np.random.default_rng(1)
    for part, count in (("train", 40), ("val", 3)):
        images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2 * count)]
        small = [image.resize((60, 50)) for image in images]
        write_tree(tmp_path / "imagenet" / part, {"n01440764": small[:count], "n02102040": small[count:]})
    for measure, why in (
        ("lpf", "'lpf': the images of this data set are read from files"),
        ("lpf(subset=64, subset_stratified=true)", "read from files, and subset_stratified=true needs the loss of all"),
    ):
        with pytest.raises(RequestError, match=why):
            carried_out(tmp_path, tmp_path, measure)
        shutil.rmtree(tmp_path / "results")
    results = carried_out(tmp_path, tmp_path, "shannon_entropy(subset=64), l2_norm")
    rows = results.table("models").to_pylist()
    assert {row["status"] for row in rows} == {"finished"} and len(rows) == 2
    assert json.loads(rows[0]["execution"])["data"] == "streamed"
    measured = {(row["measure"], row["model_id"]): row for row in results.table("sharpness").to_pylist()}
    assert len(measured) == 4
    entropies = [row for (name, _), row in measured.items() if name == "shannon_entropy"]
    assert all(0 < row["value"] < np.log(2) and row["stderr"] > 0 for row in entropies)


def test_no_images_are_an_empty_batch() -> None:
    """A process that shares a short last batch may have none of it."""
    read = _Reads(Images([]), ()).__getitems__([])
    assert isinstance(read, Tensor)
    assert read.shape == (0, 3, 224, 224)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part / "n01440764").mkdir(parents=True)
        Image.new("RGB", (300, 260)).save(tmp_path / "imagenet" / part / "n01440764" / "1.JPEG")
    (tmp_path / "imagenet" / "train" / ".ipynb_checkpoints").mkdir()
    assert imagenet(tmp_path).classes == 1
