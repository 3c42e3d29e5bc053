"""Stand-ins: every data set has one, in its true format, written once; and none is ever taken for the data set."""

from __future__ import annotations

import csv
import json
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from tests.trainables.conftest import Install
from torchvision.datasets import MNIST, ImageFolder

from flatmin.errors import DataError, RequestError
from flatmin.lease import Lease
from flatmin.orchestrator.estimate import estimate
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.plugins import get, listing
from flatmin.results import Results
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import downloads_allowed
from flatmin.trainables.job import load_dataset, run
from flatmin.trainables.stand_ins import stand_in_root
from flatmin.trial import Job

SIZES = {
    "cifar10": (300, 100, 10),
    "cifar100": (300, 100, 100),
    "hc18": (21, 9, 2),
    "imagenet": (40, 20, 4),
    "mnist": (300, 100, 10),
    "svhn": (300, 100, 10),
    "tiny_imagenet": (400, 200, 200),
}
"""Training and test examples, and classes, of those that write files."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data folder, which is not there yet."""
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a data set's stand-in."""
    root = tmp_path_factory.mktemp("data")

    def folder(name: str) -> Path:
        with downloads_allowed():
            return stand_in_root(get("dataset", name), root)

    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_stand_in_is_read_by_the_loading_code(name: str, written: Callable[[str], Path]) -> None:
    dataset: Dataset = get("dataset", name).load()(written(name))
    train, test, classes = SIZES[name]
    assert (len(dataset.train_x), len(dataset.test_x), dataset.classes) == (train, test, classes)
    for y in (dataset.train_y, dataset.test_y):
        assert torch.bincount(y.flatten().long(), minlength=classes).min() > 0
    if isinstance(dataset.train_x, torch.Tensor):
        images = {image.numpy().tobytes() for x in (dataset.train_x, dataset.test_x) for image in x}
        assert len(images) == train + test  # no image is in both sets


@pytest.mark.parametrize("name", sorted(set(listing("dataset")) - set(SIZES)))
def test_what_needs_no_files_is_read_as_it_is(name: str, data: Path) -> None:
    plain, other = (load_dataset((("dataset", name),), stand_in=stand_in) for stand_in in (False, True))
    assert torch.equal(plain.train_x, other.train_x) and torch.equal(plain.test_y, other.test_y)
    assert not data.exists()


def test_files_are_the_same_whenever_they_are_written(written: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("cifar10", "hc18", "mnist"):
        with downloads_allowed():
            again = stand_in_root(get("dataset", name), tmp_path)
        before, after = contents(written(name)), contents(again)
        assert {file: before[file] for file in after if "resampled" not in file} == after


def test_other_readers_read_the_files(written: Callable[[str], Path]) -> None:
    """Torchvision, scipy, pickle and csv, of what is published."""
    ours = get("dataset", "mnist").load()(written("mnist"))
    theirs = MNIST(written("mnist"), train=True)
    assert torch.equal(theirs.data, ours.train_x[:, 0]) and torch.equal(theirs.targets, ours.train_y)
    ours = get("dataset", "cifar100").load()(written("cifar100"))
    file = written("cifar100") / "cifar-100-python" / "train"
    with warnings.catch_warnings():  # some versions of numpy warn of pickles of 2009
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        batch = pickle.loads(file.read_bytes(), encoding="latin1")
    assert batch["data"].shape == (300, 3072) and batch["fine_labels"] == ours.train_y.tolist()
    ours = get("dataset", "svhn").load()(written("svhn"))
    read = scipy.io.loadmat(written("svhn") / "SVHN" / "train_32x32.mat")
    assert read["X"].shape == (32, 32, 3, 300) and set(read["y"].flatten()) == set(range(1, 11))
    assert np.array_equal(read["X"].transpose(3, 2, 0, 1), ours.train_x.numpy())
    ours = get("dataset", "imagenet").load()(written("imagenet"))
    assert ImageFolder(written("imagenet") / "imagenet" / "train").targets == ours.train_y.tolist()
    folder = written("tiny_imagenet") / "tiny-imagenet-200"
    assert len(ImageFolder(folder / "train").classes) == len((folder / "wnids.txt").read_text().split()) == 200
    folder = written("hc18") / "HC18"
    with (folder / "training_set_pixel_size_and_HC.csv").open(newline="") as table:
        names = [row["filename"] for row in csv.DictReader(table)]
    images = [np.asarray(Image.open(folder / "training_set" / name)) for name in names]
    assert len(names) == 30 and {image.shape for image in images} == {(270, 400)}


@pytest.mark.parametrize(
    ("name", "file"), [("cifar10", "cifar-10-batches-py/data_batch_3"), ("svhn", "SVHN/test_32x32.mat")]
)
def test_a_damaged_file_is_named_and_one_that_is_not_there_written_again(name: str, file: str, data: Path) -> None:
    settings = (("dataset", name), *((key, value.default) for key, value in get("dataset", name).arguments.items()))
    with downloads_allowed():
        before = load_dataset(settings, stand_in=True).test_x
        place = data / "stand-in" / name / file
        place.write_bytes(place.read_bytes()[:-3] + b"...")
        with pytest.raises(DataError, match=rf"{file} is damaged: its md5 is .*; remove "):
            get("dataset", name).load()(data / "stand-in" / name)
        place.unlink()
        stand_in_root(get("dataset", name), data)
        assert torch.equal(get("dataset", name).load()(data / "stand-in" / name).test_x, before)


def test_what_another_version_wrote_is_written_anew(data: Path) -> None:
    with downloads_allowed():
        folder = stand_in_root(get("dataset", "mnist"), data)
        before = contents(folder)
        for left in ({"version": 0, "md5": {}}, "cut of"):
            (folder / "older").touch()
            (folder / "stand-in.json").write_text(json.dumps(left)[:-1] if left == "cut of" else json.dumps(left))
            assert contents(stand_in_root(get("dataset", "mnist"), data)) == before


MINE = """
import os, pathlib, time
from flatmin.trainables.datasets.digits import digits

def slow(root):
    "Digits."
    assert (root / "here").exists()
    return digits(root)

def write_stand_in(root):
    with (pathlib.Path(__file__).parent / "log").open("a") as log:
        log.write(f"{os.getpid()} ")
    time.sleep(0.3)
    (root / "here").touch()
"""


def _load(start: Any) -> None:
    start.wait()
    with downloads_allowed():
        load_dataset((("dataset", "slow"),), stand_in=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_processes_that_start_together_write_once(install: Install, data: Path) -> None:
    """With a user's own data set, which brings its stand-in."""
    folder = install("my_data", MINE, {"flatmin.datasets": ["slow"]}).parent
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_load, args=(start,)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((folder / "log").read_text().split()) == 1
    assert {file.name for file in (data / "stand-in" / "slow").iterdir()} == {"here", "stand-in.json"}


STUDY = """\
study: twin
settings:
  {dataset: %s, network: mlp, width: 32, optimizer: sgd, lr: 0.05, batch_size: 50, epochs: 12, eval_every: 12,
   stand_in: %s}
seeds: 2
"""


def study(folder: Path, dataset: str, stand_in: str = "true") -> Path:
    file = folder / "twin.yaml"
    file.write_text(STUDY % (dataset, stand_in))
    return file


def test_a_data_set_without_one_is_refused(install: Install, data: Path, tmp_path: Path) -> None:
    install("my_data", MINE.replace("write_stand_in", "write"), {"flatmin.datasets": ["slow"]})
    with pytest.raises(RequestError, match=r"'slow' has no stand-in: my_data has no function .*of: cifar10, "):
        load_dataset((("dataset", "slow"),), stand_in=True)
    with pytest.raises(RequestError, match="the data set 'slow' has no stand-in"):
        estimate(make_plan(read_study(str(study(tmp_path, "slow")))).trials)


def test_a_folder_that_cannot_be_written_is_named(data: Path) -> None:
    data.touch()
    with downloads_allowed(), pytest.raises(DataError, match=r"stand-in of mnist .* make room, or change FLATMIN_DATA"):
        load_dataset((("dataset", "mnist"), ("mnist_statistics", "published")), stand_in=True)


def test_a_plan_makes_no_data_and_knows_the_cost(data: Path, tmp_path: Path) -> None:
    found = estimate(make_plan(read_study(str(study(tmp_path, "cifar10")))).trials)
    assert found.problem == ""
    assert found.seconds[0] is not None
    assert [folder.name for folder in data.iterdir()] == ["costs"]


def test_a_twin_trains_and_cannot_be_taken_for_its_study(data: Path, tmp_path: Path) -> None:
    """Other ids, `stand_in` in every row; and digits are learned: far above chance, on images it has not seen."""
    plans = {word: make_plan(read_study(str(study(tmp_path, "cifar10", word)))) for word in ("false", "true")}
    ids = {word: {model.model_id for trial in plan.trials for model in trial.models} for word, plan in plans.items()}
    assert not ids["false"] & ids["true"]
    results = Results.create(tmp_path / "results", "twin")
    with Lease(results) as lease:
        for trial in plans["true"].trials:
            list(run(Job(trial, str(results.path), lease.token)))
    rows: list[Mapping[str, Any]] = results.table("models").to_pylist()
    assert {row["model_id"] for row in rows} == ids["true"]
    assert [row["stand_in"] for row in rows] == [True, True]
    assert min(row["test_acc"] for row in rows) > 0.6
    assert {folder.name for folder in data.iterdir()} == {"stand-in"}
