"""Corruptions: which examples are left, nested label noise, noise of any machine; against formulas and frozen draws."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.stack import normal, stream_key
from flatmin.stack.streams import bits_at
from flatmin.trainables.corruption import check_recipe, choose, data_noise, missing_classes, noisy_labels
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.training import Recipe, training

FROZEN = {
    "uniform labels": "ee4c1f1fb6172304",
    "symmetric labels": "b114b90eafddb7a0",
    "data noise": "f18928e2a0e25571",
    "held out": "1a5e8a525880aacf",
    "held out, seed 2": "d58f97cb43a3ea60",
    "part": "cd79c350a7d153aa",
    "long tail": "116213751e5d2c8e",
}
"""Hashes of draws, as they are on every machine."""


def recipe(**changes: Any) -> Recipe:
    return training(**{"seed": 0, "batch_size": 10, **changes})


def labelled(y: Tensor, **changes: Any) -> Dataset:
    """Return a classification of 10 classes with these labels, whose inputs do not matter."""
    x = torch.zeros(len(y), 1)
    fields: dict[str, Any] = {"mean": torch.zeros(1), "std": torch.ones(1), "classes": 10, **changes}
    return Dataset(x, y, x, y, **fields)


@pytest.fixture
def dataset() -> Dataset:
    return labelled(torch.arange(600) % 10)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("kind", ["uniform", "symmetric"])
def test_label_noise_is_nested(dataset: Dataset, kind: str) -> None:
    """What a lower level replaces, every higher level replaces too, by the same class."""
    levels = [
        noisy_labels(dataset.train_y, 10, recipe(label_noise=level / 10, label_noise_kind=kind)) for level in range(11)
    ]
    assert torch.equal(levels[0], dataset.train_y)
    for lower, higher in pairwise(levels):
        changed = lower != dataset.train_y
        assert torch.equal(higher[changed], lower[changed])


def test_label_noise_depends_on_its_seed_alone(dataset: Dataset) -> None:
    first = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=4, seed=1, batch_size=7, epochs=3))
    second = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=4, seed=2))
    third = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=5, seed=1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(("kind", "rate"), [("uniform", 0.6 * 9 / 10), ("symmetric", 0.6)])
def test_labels_flip_at_the_rate_of_their_kind_to_every_class_alike(kind: str, rate: float) -> None:
    y = torch.arange(100_000) % 10
    noisy = noisy_labels(y, 10, recipe(label_noise=0.6, label_noise_kind=kind))
    wrong = noisy != y
    assert float(wrong.double().mean()) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(y)))
    shifts = torch.bincount((noisy - y)[wrong] % 10, minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:].numpy()).pvalue > 1e-3


def test_symmetric_noise_of_two_classes_is_the_other_one() -> None:
    y = torch.arange(50) % 2
    assert torch.equal(noisy_labels(y, 2, recipe(label_noise=1.0, label_noise_kind="symmetric")), 1 - y)


def test_a_smaller_training_set_is_part_of_a_larger_one(dataset: Dataset) -> None:
    kept = [set(choose(dataset, recipe(train_size=size, val_size=60))[0].tolist()) for size in (100, 300, 540)]
    assert [len(each) for each in kept] == [100, 300, 540]
    assert kept[0] < kept[1] < kept[2]


def test_held_out_examples_do_not_depend_on_what_is_left(dataset: Dataset) -> None:
    whole, val = choose(dataset, recipe(val_size=60))
    thin, same = choose(dataset, recipe(val_size=60, train_size=70, imbalance=3.0))
    assert torch.equal(val, same)
    assert set(thin.tolist()) < set(whole.tolist())
    assert sorted([*whole.tolist(), *val.tolist()]) == list(range(600))


def test_the_split_seed_changes_every_choice_and_0_is_the_fixed_one(dataset: Dataset) -> None:
    fixed = choose(dataset, recipe(val_size=60, seed=5))
    assert torch.equal(fixed[1], choose(dataset, recipe(val_size=60, split_seed=0))[1])
    choices = ({"val_size": 60}, {"train_size": 200}, {"imbalance": 4.0})
    for changes in choices:
        one, other = (choose(dataset, recipe(split_seed=seed, **changes)) for seed in (1, 2))
        assert not torch.equal(one[0], other[0])


def test_the_long_tail_has_the_published_sizes() -> None:
    """CIFAR-10-LT of ratio 100 (Cui et al. 2019); what is kept at a higher ratio is kept at a lower one."""
    dataset = labelled(torch.arange(50_000) % 10)
    kept = choose(dataset, recipe(imbalance=100.0))[0]
    published = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert torch.bincount(dataset.train_y[kept]).tolist() == published
    assert set(kept.tolist()) < set(choose(dataset, recipe(imbalance=10.0))[0].tolist())


def test_a_part_of_a_long_tail_keeps_its_shape() -> None:
    """The choice of a part is not the choice of the tail again, which would favour the small classes."""
    dataset = labelled(torch.arange(50_000) % 10)
    tail, part = (choose(dataset, recipe(imbalance=20.0, train_size=size))[0] for size in (None, 4000))
    of_tail, of_part = (torch.bincount(dataset.train_y[kept]).numpy() for kept in (tail, part))
    assert stats.chisquare(of_part, of_tail * len(part) / len(tail)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_size": 600}, "val_size = 600 leaves nothing of 600 training examples"),
        ({"val_size": 100, "train_size": 501}, "train_size = 501 is more than the 500 of 600 .* at most 500"),
        (
            {"train_size": 100, "imbalance": 50.0, "batch_size": 1, "split_seed": 3},
            "is of class [0-9], .* raise train_size = 100, lower imbalance = 50, or",
        ),
        ({"train_size": 50, "batch_size": 51}, "batch_size = 51 is more than the 50 training examples"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(dataset: Dataset, changes: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        choose(dataset, recipe(**changes))


def test_the_whole_set_in_every_step_is_allowed(dataset: Dataset) -> None:
    assert len(choose(dataset, recipe(batch_size=600))[0]) == 600


def test_missing_classes_are_those_of_the_training_set() -> None:
    dataset = labelled(torch.tensor([0, 0, 2, 2, 5]))
    assert missing_classes(dataset, torch.tensor([0, 4])) == [2]


@pytest.mark.parametrize(
    ("fields", "changes", "said"),
    [
        ({"task": "regression"}, {"label_noise": 0.1}, "label_noise is about the classes .* is a regression"),
        ({"task": "segmentation"}, {"imbalance": 2.0}, "imbalance is about the classes .* is a segmentation"),
        ({}, {"augmentation": "crop_flip"}, r"augmentation = crop_flip works on images .*float32 of shape .1."),
    ],
)
def test_what_a_data_set_has_not_is_not_corrupted(fields: Any, changes: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_recipe(labelled(torch.zeros(4, dtype=torch.int64), **fields), recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augmentation": "random_resized_crop_flip"}, "is for images that are read from files"),
        ({"augmentation": "autoaugment_cutout", "data_noise": 0.1}, "autoaugment_cutout .* data_noise = 0.1 makes"),
    ],
)
def test_augmentations_that_do_not_fit_the_images_are_refused(changes: Any, said: str) -> None:
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)
    dataset = Dataset(x, y, x, y, torch.zeros(1), torch.ones(1), 4)
    check_recipe(dataset, recipe(augmentation="crop_flip_cutout", data_noise=0.1))
    with pytest.raises(RequestError, match=said):
        check_recipe(dataset, recipe(**changes))


def test_data_noise_is_the_stream_of_normals(dataset: Dataset) -> None:
    """Box and Muller by basic arithmetic, of any examples in any order, is the library's to the last bits."""
    for n, shape in ((101, (3, 5)), (40, (1, 8, 8)), (7, (1,))):
        key = torch.tensor(stream_key("data noise", 3))
        order = torch.tensor([[6, 0, 3], [n - 1, 1, 0]])
        whole = normal(int(key), (n, *shape))
        drawn = data_noise(key, order, shape, n, torch.float64)
        torch.testing.assert_close(drawn, whole[order], rtol=0, atol=1e-14)
        assert torch.equal(data_noise(key, order, shape, n, torch.float32), drawn.float())


def test_data_noise_is_right_where_its_series_are_worst() -> None:
    """Counters whose uniforms are nearly 0 or 1, and angles of every octant, against the C library."""
    key, n = torch.tensor(stream_key("data noise", 1)), 2**20
    bits = bits_at(key, torch.arange(n)).numpy().astype(np.uint64)
    u = ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    angle = 2 * np.pi * (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    extreme = np.concatenate([u.argsort()[:200], u.argsort()[-200:], np.arange(200)])
    drawn = data_noise(key, torch.from_numpy(extreme), (1,), 2 * n, torch.float64)[:, 0].numpy()
    expected = (np.sqrt(-2 * np.log(u)) * np.cos(angle))[extreme]
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=4e-15)


def test_frozen_draws(dataset: Dataset) -> None:
    """What a machine draws; integers, exact comparisons and basic arithmetic leave it no freedom."""
    uniform, symmetric = (
        noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=7, label_noise_kind=kind))
        for kind in ("uniform", "symmetric")
    )
    found = {
        "uniform labels": digest(uniform),
        "symmetric labels": digest(symmetric),
        "data noise": digest(
            data_noise(torch.tensor(stream_key("data noise", 7)), torch.arange(600), (5,), 600, torch.float64)
        ),
        "held out": digest(choose(dataset, recipe(val_size=60))[1]),
        "held out, seed 2": digest(choose(dataset, recipe(val_size=60, split_seed=2))[1]),
        "part": digest(choose(dataset, recipe(train_size=100))[0]),
        "long tail": digest(choose(dataset, recipe(imbalance=5.0, split_seed=2))[0]),
    }
    assert found == FROZEN
