"""Corruptions: nested label noise, paired streams, data noise before normalisation, validation held out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from flatmin.stack import normal, stream_key
from flatmin.trainables.data import noisy_labels, stack_data
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.training import Recipe, training


def recipe(**changes: Any) -> Recipe:
    return training(**{"seed": 0, **changes})


@pytest.fixture
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(600, 1, 4, 4, generator=generator), torch.randint(0, 10, (600,), generator=generator)
    return Dataset(x[:500], y[:500], x[500:], y[500:], x[:500].mean(0), x[:500].std(0), 10)


def data(dataset: Dataset, *recipes: Recipe) -> Any:
    return stack_data(dataset, recipes, torch.device("cpu"), torch.float64)


def test_label_noise_is_nested(dataset: Dataset) -> None:
    """What a lower level replaces, every higher level replaces too, by the same class."""
    levels = [noisy_labels(dataset.train_y, 10, recipe(label_noise=level / 10)) for level in range(11)]
    assert torch.equal(levels[0], dataset.train_y)
    for lower, higher in pairwise(levels):
        changed = lower != dataset.train_y
        assert torch.equal(higher[changed], lower[changed])
    # All classes, the true one included: a tenth of the replaced labels stays right.
    assert float((levels[10] != dataset.train_y).double().mean()) == pytest.approx(0.9, abs=0.05)


def test_label_noise_depends_on_its_seed_alone(dataset: Dataset) -> None:
    first = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=4, seed=1, batch_size=7, epochs=3))
    second = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=4, seed=2))
    third = noisy_labels(dataset.train_y, 10, recipe(label_noise=0.5, noise_seed=5, seed=1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_flip_rate_is_the_true_share(dataset: Dataset) -> None:
    stack = data(dataset, recipe(label_noise=0.0), recipe(label_noise=0.4))
    expected = (noisy_labels(dataset.train_y, 10, recipe(label_noise=0.4)) != dataset.train_y).double().mean()
    assert stack.label_flip_rate.tolist() == [0.0, float(expected)]


def test_data_noise_is_sigma_z_before_normalisation(dataset: Dataset) -> None:
    """One z per noise seed, scaled by each model's sigma; the test set stays clean."""
    stack = data(
        dataset,
        recipe(data_noise=0.5, noise_seed=3),
        recipe(data_noise=0.0),
        recipe(data_noise=2.0, noise_seed=3),
    )
    order = torch.tensor([[7, 1, 7]]).expand(3, -1)
    batch = stack.train.gather(order)
    z = normal(stream_key("data noise", 3), dataset.train_x.shape)
    for k, sigma in enumerate((0.5, 0.0, 2.0)):
        expected = (dataset.train_x.double() + sigma * z - dataset.mean.double()) / dataset.std.double()
        torch.testing.assert_close(batch.x[k], expected[order[k]], rtol=0, atol=1e-12)
    clean = (dataset.test_x.double() - dataset.mean.double()) / dataset.std.double()
    torch.testing.assert_close(stack.test.x, clean, rtol=0, atol=1e-12)


def test_chunks_cover_the_set_once_in_order(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmin.trainables.data._EVALUATION_ROWS", 2 * 128)
    for noise in (0.0, 0.3):
        stack = data(dataset, recipe(data_noise=noise), recipe(seed=1, label_noise=0.5))
        chunks = stack.train.chunks()
        assert [chunk.y.shape[1] for chunk in chunks] == [128, 128, 128, 116]
        whole = stack.train.gather(torch.arange(500).expand(2, -1))
        x = torch.cat([chunk.x.expand(2, *chunk.x.shape) if chunk.shared else chunk.x for chunk in chunks], dim=1)
        assert torch.equal(x, whole.x)
        assert torch.equal(torch.cat([chunk.y for chunk in chunks], dim=1), whole.y)


def test_validation_examples_are_not_trained_on(dataset: Dataset) -> None:
    stack = data(dataset, recipe(val_size=120, label_noise=1.0))
    assert len(stack.train) == 380
    assert stack.val is not None and len(stack.val) == 120
    together = torch.cat([stack.train.x, stack.val.x]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 500
    assert torch.equal(stack.val.y[0], stack.val.true_y)


def test_holding_everything_out_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="val_size = 500 leaves nothing of 500"):
        data(dataset, recipe(val_size=500))


def test_selecting_models_selects_their_labels_and_noise(dataset: Dataset) -> None:
    recipes = [recipe(seed=k, label_noise=0.3 * k, data_noise=0.1 * k) for k in range(3)]
    stack = data(dataset, *recipes)
    chosen = stack.select(torch.tensor([2, 0]))
    order = torch.arange(20).expand(2, -1)
    whole = stack.train.gather(torch.arange(20).expand(3, -1))
    assert torch.equal(chosen.train.gather(order).x, whole.x[[2, 0]])
    assert torch.equal(chosen.train.gather(order).y, whole.y[[2, 0]])
