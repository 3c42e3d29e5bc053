"""Data sets read from small files in their true formats, and what is said of files that are not as they should be."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN

from flatmin.errors import DataError, MissingData, RequestError
from flatmin.plugins import get, listing
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.datasets.cifar import write_batch, write_pickle
from flatmin.trainables.datasets.cifar10 import cifar10
from flatmin.trainables.datasets.cifar100 import cifar100
from flatmin.trainables.datasets.digits import TRAIN_SIZE, digits
from flatmin.trainables.datasets.mnist import mnist, write_idx
from flatmin.trainables.datasets.sinusoids import sinusoids
from flatmin.trainables.datasets.svhn import svhn, write_mat
from flatmin.trainables.images import each_pixel_statistics
from flatmin.trainables.inputs import Inputs
from flatmin.trainables.training import Augmentation

Bytes = npt.NDArray[np.uint8]


def pixels(*shape: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(set(listing("dataset")) - {"digits", "quadratic", "sinusoids"}))
def test_a_data_set_says_what_to_put_where(name: str, tmp_path: Path) -> None:
    """Nothing is written, and nothing downloaded."""
    folder = tmp_path / "data"
    with pytest.raises(MissingData, match=rf"{folder}.*http"):
        get("dataset", name).load()(folder)
    assert not folder.exists()


# digits


@pytest.mark.parametrize("file", ["datasets/data/digits.csv.gz", "moved"])
def test_digits_are_scikit_learns_in_its_split(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flatmin.trainables.datasets.digits._FILE", file)
    found, bunch = digits(tmp_path), load_digits()
    split = train_test_split(
        bunch.images / 16, bunch.target, train_size=TRAIN_SIZE, random_state=0, stratify=bunch.target
    )
    expected = [torch.from_numpy(part) for part in split]
    ours = found.train_x[:, 0], found.test_x[:, 0], found.train_y, found.test_y
    for own, theirs in zip(ours, expected, strict=True):
        assert torch.equal(own, theirs.to(own.dtype))


def test_digits_are_read_without_scikit_learn() -> None:
    code = "import sys; from pathlib import Path; from flatmin.trainables.datasets.digits import digits; digits(Path())"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'sklearn' not in sys.modules"], check=True)


# MNIST


@pytest.fixture
def mnist_files(tmp_path: Path) -> tuple[Path, dict[str, Bytes]]:
    """Return a data folder with a small MNIST, and what is in it."""
    data = {
        "train-images-idx3-ubyte": pixels(30, 28, 28),
        "train-labels-idx1-ubyte": np.arange(30, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": pixels(20, 28, 28, seed=1),
        "t10k-labels-idx1-ubyte": np.arange(20, dtype=np.uint8)[::-1] % 10,
    }
    for name, content in data.items():
        write_idx(tmp_path / "MNIST" / "raw" / name, content)
    return tmp_path, data


def test_mnist(mnist_files: tuple[Path, dict[str, Bytes]]) -> None:
    root, data = mnist_files
    dataset = mnist(root)
    assert dataset.train_x.dtype == torch.uint8
    assert np.array_equal(dataset.train_x.numpy(), data["train-images-idx3-ubyte"][:, None])
    assert dataset.train_y.tolist() == data["train-labels-idx1-ubyte"].tolist()
    assert np.array_equal(dataset.test_x.numpy(), data["t10k-images-idx3-ubyte"][:, None])
    assert dataset.test_y.tolist() == data["t10k-labels-idx1-ubyte"].tolist()
    assert dataset.classes == 10
    assert dataset.mean.flatten().tolist() == pytest.approx([0.1307])
    assert dataset.std.flatten().tolist() == pytest.approx([0.3081])


def test_pixels_of_mnist_are_standardised_as_scikit_learn_does(mnist_files: tuple[Path, dict[str, Bytes]]) -> None:
    """Raw values, over all training images; a pixel that never changes there is centred alone."""
    root, data = mnist_files
    train, test = (data[f"{part}-images-idx3-ubyte"] for part in ("train", "t10k"))
    train[:, 3, 4] = 7
    write_idx(root / "MNIST" / "raw" / "train-images-idx3-ubyte", train)
    scaler = StandardScaler().fit(train.reshape(30, 784).astype(np.float64))
    dataset = mnist(root, mnist_statistics="per_pixel")
    inputs = Inputs.of(dataset.test_x, dataset, torch.device("cpu"), torch.float64)
    expected = scaler.transform(test.reshape(20, 784).astype(np.float64))
    found = inputs.normalised(dataset.test_x).flatten(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert abs(expected[:, 3 * 28 + 4]).max() > 100  # the pixel that is centred alone


def test_statistics_of_pixels_are_those_of_all_images() -> None:
    """More images than are counted at once, against float64."""
    x = torch.from_numpy(pixels(5000, 1, 2, 3))
    mean, std = each_pixel_statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean(dim=0) / 255, rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), x.double().std(dim=0, correction=0) / 255, rtol=1e-6, atol=0)


def test_mnist_is_unpacked_from_its_archives(
    mnist_files: tuple[Path, dict[str, Bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, data = mnist_files
    before, resources = mnist(root), []
    for name in data:
        file = root / "MNIST" / "raw" / name
        packed = file.with_name(f"{name}.gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(MNIST, "resources", resources)
    after = mnist(root)
    assert torch.equal(after.train_x, before.train_x)
    assert torch.equal(after.test_y, before.test_y)
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setattr(MNIST, "resources", [*resources[:3], (resources[3][0], "0" * 32)])
    with pytest.raises(DataError, match=rf"t10k-labels-idx1-ubyte.gz is damaged: its md5 is {resources[3][1]}"):
        mnist(root)


def truncated(content: bytes) -> bytes:
    return content[:-5]


def of_integers(content: bytes) -> bytes:
    return content[:2] + b"\x0c" + content[3:]


def text(_: bytes) -> bytes:
    return b"<html>404</html>"


@pytest.mark.parametrize("change", [truncated, of_integers, text])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_mnist_is_named(
    name: str, change: Callable[[bytes], bytes], mnist_files: tuple[Path, dict[str, Bytes]]
) -> None:
    root, _ = mnist_files
    file = root / "MNIST" / "raw" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{name} is damaged \([\d,]+ bytes\): .*; remove it"):
        mnist(root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            pixels(30, 28, 27),
            r"images are uint8 \[1, 28, 27\], and should be uint8 \[1, 28,",
        ),
        ("train-images-idx3-ubyte", pixels(29, 28, 28), "there are 29 images and 30 labels"),
        ("train-labels-idx1-ubyte", np.full(30, 10, np.uint8), "the label of example 0 is 10, and should be 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 8, "no example is of class 8; 2 of 10 are missing"),
    ],
)
def test_wrong_content_is_named(
    name: str, content: Bytes, message: str, mnist_files: tuple[Path, dict[str, Bytes]]
) -> None:
    root, _ = mnist_files
    write_idx(root / "MNIST" / "raw" / name, content)
    part = name.partition("-")[0]
    where = f"{part}-images-idx3-ubyte" if "images" in message else f"{part}-labels-idx1-ubyte"
    with pytest.raises(DataError, match=f"{where}: {message}"):
        mnist(root)


# CIFAR


class Cifar:
    """One of the two, written small."""

    def __init__(self, published: type[CIFAR10], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.published, self.root, self.folder = published, root, root / published.base_folder
        self.monkeypatch = monkeypatch
        self.plugin: Callable[..., Dataset] = cifar100 if published is CIFAR100 else cifar10
        self.classes = 100 if published is CIFAR100 else 10
        self.train = [name for name, _ in published.train_list]
        per_file = self.classes // len(self.train) * 2
        labels = np.random.default_rng(3).permutation(np.arange(per_file * len(self.train)) % self.classes)
        self.x, self.y = pixels(len(labels), 3072), labels.tolist()
        for place, name in enumerate(self.train):
            part = slice(place * per_file, (place + 1) * per_file)
            self.write(name, self.x[part], self.y[part])
        self.test_x, self.test_y = pixels(self.classes, 3072, seed=1), [*range(self.classes)]
        self.write(published.test_list[0][0], self.test_x, self.test_y)
        meta = {published.meta["key"]: [f"class {c}" for c in range(self.classes)]}
        write_pickle(self.folder / published.meta["filename"], meta)
        self.accept()

    def write(self, name: str, x: Bytes, y: list[int]) -> None:
        write_batch(self.folder / name, self.published, x, y)

    def accept(self) -> None:
        """Take what is written for what is published."""
        set_ = self.monkeypatch.setattr
        for table in ("train_list", "test_list"):
            names = [name for name, _ in getattr(self.published, table)]
            set_(self.published, table, [[name, md5(self.folder / name)] for name in names])
        file = self.published.meta["filename"]
        set_(self.published, "meta", {**self.published.meta, "md5": md5(self.folder / file)})


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cifar:
    return Cifar(request.param, tmp_path, monkeypatch)


def test_cifar(cifar: Cifar) -> None:
    dataset = cifar.plugin(cifar.root)
    assert np.array_equal(dataset.train_x.numpy(), cifar.x.reshape(-1, 3, 32, 32))
    assert dataset.train_x.dtype == torch.uint8
    assert dataset.train_x.is_contiguous()
    assert dataset.train_y.tolist() == cifar.y
    assert dataset.train_y.dtype == torch.int64
    assert np.array_equal(dataset.test_x.numpy(), cifar.test_x.reshape(-1, 3, 32, 32))
    assert dataset.test_y.tolist() == cifar.test_y
    assert dataset.classes == cifar.classes


def test_statistics_of_cifar(cifar: Cifar) -> None:
    colours = torch.from_numpy(cifar.x).reshape(-1, 3, 1024).double() / 255
    of_train = colours.mean(dim=(0, 2)).tolist(), colours.transpose(0, 1).flatten(1).std(dim=1).tolist()
    for which, (mean, std) in {
        "lpf": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        "vasso": ([125.3 / 255, 123 / 255, 113.9 / 255], [63 / 255, 62.1 / 255, 66.7 / 255]),
        "train": of_train,
    }.items():
        dataset = cifar.plugin(cifar.root, pixel_statistics=which)
        assert dataset.mean.flatten().tolist() == pytest.approx(mean, rel=1e-6)
        assert dataset.std.flatten().tolist() == pytest.approx(std, rel=1e-6)


def test_cifar_is_unpacked_from_its_archive(cifar: Cifar) -> None:
    archive = cifar.root / cifar.published.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar.folder, cifar.published.base_folder)
    cifar.monkeypatch.setattr(cifar.published, "tgz_md5", md5(archive))
    before = cifar.plugin(cifar.root)
    shutil.rmtree(cifar.folder)
    assert torch.equal(cifar.plugin(cifar.root).train_x, before.train_x)
    shutil.rmtree(cifar.folder)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{cifar.published.filename} is damaged: its md5 is {md5(archive)}"):
        cifar.plugin(cifar.root)


@pytest.mark.parametrize("file", ["train_list", "test_list", "meta"])
def test_a_damaged_file_of_cifar_is_named(file: str, cifar: Cifar) -> None:
    table = getattr(cifar.published, file)
    name = table["filename"] if file == "meta" else table[-1][0]
    path = cifar.folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"/{name} is damaged: its md5 is {md5(path)} and should be [0-9a-f]+; remove"):
        cifar.plugin(cifar.root)


def test_wrong_content_of_cifar_is_named(cifar: Cifar) -> None:
    n = 2 * cifar.classes // len(cifar.train)
    for y, message in (
        ([-1] * n, "the label of example 0 is -1, and should be"),
        ([*range(1, cifar.classes)] * 2, "no example is of class 0; 1 of"),
    ):
        for train in cifar.train:
            cifar.write(train, pixels(len(y), 3072), y)
        cifar.accept()
        with pytest.raises(DataError, match=f"{cifar.folder}: {message}"):
            cifar.plugin(cifar.root)


# SVHN


@pytest.fixture
def svhn_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[str, Bytes, Bytes], None]]:
    """Return a data folder with a small SVHN, and what writes a file of it."""

    def write(part: str, x: Bytes, y: Bytes) -> None:
        url, name, _ = SVHN.split_list[part]
        file = tmp_path / "SVHN" / name
        write_mat(file, x.transpose(3, 0, 1, 2), y)
        monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, part: [url, name, md5(file)]})

    for seed, (part, n) in enumerate({"train": 30, "test": 20, "extra": 10}.items()):
        write(part, pixels(32, 32, 3, n, seed=seed), np.arange(n, dtype=np.uint8) % 10 + 1)
    return tmp_path, write


def test_svhn(svhn_files: tuple[Path, Any]) -> None:
    root, _ = svhn_files
    dataset = svhn(root)
    assert np.array_equal(dataset.train_x.numpy(), pixels(32, 32, 3, 30).transpose(3, 2, 0, 1))
    assert np.array_equal(dataset.test_x.numpy(), pixels(32, 32, 3, 20, seed=1).transpose(3, 2, 0, 1))
    assert dataset.train_y.tolist() == [*range(1, 10), 0] * 3
    assert dataset.test_y.tolist() == [*range(1, 10), 0] * 2
    colours = dataset.train_x.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(dataset.mean.flatten().double(), colours.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(dataset.std.flatten().double(), colours.std(1), rtol=1e-6, atol=0)
    more = svhn(root, svhn_extra=True)
    assert torch.equal(more.train_x[:30], dataset.train_x)
    assert np.array_equal(more.train_x[30:].numpy(), pixels(32, 32, 3, 10, seed=2).transpose(3, 2, 0, 1))
    assert more.train_y.tolist() == [*range(1, 10), 0] * 4
    assert torch.equal(more.test_x, dataset.test_x)


def test_the_extra_images_are_asked_for_only_where_they_are_used(svhn_files: tuple[Path, Any]) -> None:
    root, _ = svhn_files
    (root / "SVHN" / "extra_32x32.mat").unlink()
    assert len(svhn(root).train_x) == 30
    with pytest.raises(MissingData, match=r"extra_32x32.mat \(1,329,278,602 bytes, md5"):
        svhn(root, svhn_extra=True)


def test_wrong_files_of_svhn_are_named(svhn_files: tuple[Path, Any]) -> None:
    root, write = svhn_files
    file = root / "SVHN" / "test_32x32.mat"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"test_32x32.mat is damaged: its md5 is .*; remove .*test_32x32.mat"):
        svhn(root)
    write("test", pixels(31, 32, 3, 20), np.arange(20, dtype=np.uint8) % 10 + 1)
    with pytest.raises(DataError, match=r"test_32x32.mat: images are uint8 \[3, 31, 32\]"):
        svhn(root)
    write("test", pixels(32, 32, 3, 20), np.arange(20, dtype=np.uint8) % 12)
    with pytest.raises(DataError, match=r"test_32x32.mat: the label of example 11 is 11, and should be 0 to 9"):
        svhn(root)


# Sinusoids


def test_sinusoids() -> None:
    """The Fourier coefficients of the values are the amplitudes, and nothing else (a unit sine gives 1)."""
    dataset = sinusoids(Path())
    assert dataset.train_x.flatten().tolist() == pytest.approx([i / 200 for i in range(200)])
    coefficients = np.abs(np.fft.fft(dataset.train_y[:, 0].double().numpy()))[:100] / 100
    expected = np.zeros(100)
    expected[[1, 2, 4, 8]] = 0.25, 0.5, 0.75, 1.0
    np.testing.assert_allclose(coefficients, expected, atol=1e-6)
    assert (dataset.task, dataset.classes, dataset.input_shape) == ("regression", 1, (1,))
    assert set((dataset.test_x * 400).round().int().flatten().tolist()) == set(range(1, 400, 2))
    shifted = sinusoids(
        Path(),
        sinusoid_amplitudes=(2.0,),
        sinusoid_frequencies=(3.0,),
        sinusoid_phases=(np.pi / 2,),
        sinusoid_points=12,
    )
    torch.testing.assert_close(shifted.train_y[:, 0], 2 * torch.cos(2 * np.pi * 3 * torch.arange(12) / 12))


def test_waves_that_do_not_match_are_refused() -> None:
    with pytest.raises(RequestError, match="have 2, 4 and 4 numbers; each wave needs one of each"):
        sinusoids(Path(), sinusoid_amplitudes=(1.0, 2.0))


# Documentation


def test_the_page_names_every_data_set_and_augmentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text("utf-8")
    named = [*listing("dataset"), *get_args(Augmentation)]
    assert [name for name in named if f"\n| `{name}` |" not in page] == []
