"""A stack's data: normalised, noisy and augmented as gathered, whatever is shared, kept or made again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flatmin.plugins import program_arguments
from flatmin.stack import normal, permutation, stream_key
from flatmin.trainables.augmentation import cutout, draws, transform_pixels
from flatmin.trainables.corruption import data_noise, noisy_labels
from flatmin.trainables.data import stack_data
from flatmin.trainables.dataset import Dataset, Task
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trainables.training import Recipe, training
from flatmin.trial import Execution, Model, Trial


def recipe(**changes: Any) -> Recipe:
    return training(**{"seed": 0, **changes})


@pytest.fixture
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(600, 1, 4, 4, generator=generator), torch.randint(0, 10, (600,), generator=generator)
    return Dataset(x[:500], y[:500], x[500:], y[500:], x[:500].mean(0), x[:500].std(0), 10)


def data(dataset: Dataset, *recipes: Recipe) -> Any:
    return stack_data(dataset, recipes, torch.device("cpu"), torch.float64)


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
    torch.testing.assert_close(stack.test.between(0, 100).x, clean, rtol=0, atol=1e-12)


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
    together = torch.cat([part.between(0, len(part)).x for part in (stack.train, stack.val)]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 500
    assert torch.equal(stack.val.y[0], stack.val.true_y)


def test_selecting_models_selects_their_labels_and_noise(dataset: Dataset) -> None:
    recipes = [recipe(seed=k, label_noise=0.3 * k, data_noise=0.1 * k) for k in range(3)]
    stack = data(dataset, *recipes)
    chosen = stack.select(torch.tensor([2, 0]))
    order = torch.arange(20).expand(2, -1)
    whole = stack.train.gather(torch.arange(20).expand(3, -1))
    assert torch.equal(chosen.train.gather(order).x, whole.x[[2, 0]])
    assert torch.equal(chosen.train.gather(order).y, whole.y[[2, 0]])


@pytest.fixture
def images() -> Dataset:
    """Return 80 small colour images of 8 bits."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (80, 3, 6, 6), dtype=torch.uint8, generator=generator)
    y = torch.arange(80) % 4
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    return Dataset(x[:60], y[:60], x[60:], y[60:], mean[:, None, None], std[:, None, None], 4)


def seen(images: Dataset, x: Tensor) -> Tensor:
    """Return images or floats in the range of [0, 1] as a network sees them."""
    scaled = x.double() / 255 if x.dtype == torch.uint8 else x
    return (scaled - images.mean.double()) / images.std.double()


def test_images_stay_bytes_held_once_and_are_normalised_as_gathered(images: Dataset) -> None:
    stack = data(images, *[recipe(seed=k, batch_size=10, val_size=20) for k in range(3)])
    parts = {"train": stack.train, "val": stack.val, "test": stack.test}
    chosen = stack.select(torch.tensor([2, 0]))
    assert chosen.train.y.shape == (2, 40) and chosen.train.y.data_ptr() == stack.train.true_y.data_ptr()
    pointers = {name: part.inputs.x.data_ptr() for name, part in parts.items()}
    assert pointers["train"] == pointers["val"] == images.train_x.data_ptr()
    assert pointers["test"] == images.test_x.data_ptr()
    order = torch.tensor([[3, 3, 0], [19, 1, 2], [0, 0, 0]])
    for name, part in parts.items():
        source, y = (images.test_x, images.test_y) if name == "test" else (images.train_x, images.train_y)
        batch = part.gather(order)
        torch.testing.assert_close(batch.x, seen(images, source[part.numbers[order]]), rtol=0, atol=1e-12)
        assert torch.equal(batch.y, y[part.numbers[order]])


def test_chunks_are_made_when_they_are_asked_for(images: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """No floats of the whole set are kept; a chunk is of a bounded number of input numbers, over all models."""
    monkeypatch.setattr("flatmin.trainables.data._EVALUATION_NUMBERS", {"cpu": 2 * 25 * 108})
    chunks = data(images, recipe(batch_size=10), recipe(seed=1, batch_size=10)).train.chunks()
    assert [len(chunk.y[0]) for chunk in chunks] == [25, 25, 10]
    assert chunks[0].x is not chunks[0].x
    assert torch.equal(
        torch.cat([chunk.x for chunk in chunks]), data(images, recipe(batch_size=10)).train.between(0, 60).x
    )
    odd = chunks[1::2]
    assert len(odd) == 1 and torch.equal(odd[0].x, chunks[1].x)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("floats", [False, True])
def test_noise_is_added_before_normalisation_and_clipped_if_asked(images: Dataset, floats: bool, clip: bool) -> None:
    if floats:
        images = replace(images, train_x=images.train_x / 255, test_x=images.test_x / 255)
    recipes = [recipe(data_noise=sigma, batch_size=10, data_noise_clip=clip) for sigma in (0.7, 0.0)]
    order = torch.tensor([[5, 59, 0], [0, 1, 5]])
    batch = data(images, *recipes).train.gather(order)
    z = normal(stream_key("data noise", 0), (60, 3, 6, 6))
    whole = images.train_x.double() / (1 if floats else 255)
    for k, sigma in enumerate((0.7, 0.0)):
        noisy = whole + sigma * z
        noisy = noisy.clamp(0, 1) if clip else noisy
        torch.testing.assert_close(batch.x[k], seen(images, noisy)[order[k]], rtol=0, atol=1e-6 if floats else 1e-12)


@pytest.mark.parametrize("floats", [False, True])
def test_noise_is_the_same_kept_or_drawn_anew(images: Dataset, floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if floats:
        images = replace(images, train_x=images.train_x / 255, test_x=images.test_x / 255)
    recipes = [recipe(data_noise=0.1 * k, noise_seed=k % 2, batch_size=10) for k in range(4)]
    kept = data(images, *recipes)
    monkeypatch.setattr("flatmin.trainables.inputs._KEPT_NUMBERS", 0)
    anew = data(images, *recipes)
    assert kept.train.noise.kept and not anew.train.noise.kept
    order = torch.arange(12).reshape(4, 3)
    assert torch.equal(kept.train.gather(order).x, anew.train.gather(order).x)
    for one, other in zip(kept.train.chunks(), anew.train.chunks(), strict=True):
        assert torch.equal(one.x, other.x)


def test_models_of_one_seed_share_images_and_noise(images: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn once for all levels of a seed, in a step and in an evaluation; nobody's batch changes."""
    monkeypatch.setattr("flatmin.trainables.inputs._KEPT_NUMBERS", 0)
    rows: list[int] = []

    def counted(keys: Tensor, numbers: Tensor, *rest: Any) -> Tensor:
        rows.append(len(numbers))
        return data_noise(keys, numbers, *rest)

    recipes = [recipe(data_noise=0.1 * k, seed=k // 4, batch_size=10) for k in range(8)]
    stack = data(images, *recipes)
    order = torch.stack([torch.arange(10) + 10 * (k // 4) for k in range(8)])
    alone = torch.cat([data(images, own).train.gather(order[k : k + 1]).x for k, own in enumerate(recipes)])
    monkeypatch.setattr("flatmin.trainables.inputs.data_noise", counted)
    (split,) = stack.train.steps(0, [order])
    assert torch.equal(split.gather(order).x, alone)
    assert rows == [2]
    stack.train.between(0, 10)
    assert rows == [2, 2]


def test_selecting_models_selects_all_that_is_theirs(images: Dataset) -> None:
    recipes = [recipe(seed=k, data_noise=0.1 * k, data_noise_clip=k == 2, batch_size=10) for k in range(3)]
    stack = data(images, *recipes)
    order = torch.arange(6).reshape(3, 2)
    (whole,) = stack.train.steps(0, [order])
    (chosen,) = stack.train.select(torch.tensor([2, 0])).steps(0, [order[[2, 0]]])
    assert torch.equal(chosen.gather(order[[2, 0]]).x, whole.gather(order).x[[2, 0]])


def test_targets_may_have_any_shape(images: Dataset) -> None:
    masks = torch.randint(0, 2, (60, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    values = torch.rand(60, 2)
    order = torch.tensor([[1, 2, 2], [5, 6, 7]])
    targets: dict[Task, Tensor] = {"segmentation": masks, "regression": values}
    for task, y in targets.items():
        learned = replace(images, train_y=y, test_y=y[:20], task=task)
        stack = data(learned, *[recipe(seed=k, batch_size=9) for k in (0, 1)])
        assert torch.equal(stack.train.gather(order).y, y[order])
        assert torch.equal(stack.train.between(3, 9).y[1], y[3:9])


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_training_images_are_augmented_in_the_documented_order(images: Dataset, sigma: float) -> None:
    """Noise belongs to the image and moves with it; pixels change before normalisation, and cutout comes after it."""
    seeds = (3, 3, 4)
    recipes = [
        recipe(seed=k, data_noise=sigma, batch_size=5, augmentation="crop_flip_cutout", cutout_size=4) for k in seeds
    ]
    train = data(images, *recipes).train
    order = torch.stack([permutation(stream_key("order", seed, 2), 60)[:5] for seed in seeds])
    (split,) = train.steps(2, [order])
    drawn = draws(torch.tensor([stream_key("augmentation", seed, 2) for seed in seeds]), order)
    pixels = images.train_x[order]
    if sigma:
        z = torch.stack([normal(stream_key("data noise", seed), (60, 3, 6, 6)) for seed in seeds])
        pixels = pixels.double() + 255 * sigma * z[torch.arange(3)[:, None], order]
    moved = transform_pixels(pixels, drawn, "crop_flip_cutout").double()
    expected = cutout(seen(images, moved / 255), drawn, "crop_flip_cutout", 4)
    made = split.gather(order).x
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], train.gather(order).x[0])
    torch.testing.assert_close(split.between(0, 60).x, train.between(0, 60).x, rtol=0, atol=0)


def test_an_image_is_augmented_by_its_seed_epoch_and_number_alone(images: Dataset) -> None:
    """Other models, other batches, parts of a batch and the rest of the data set change nothing."""
    recipes = [recipe(seed=k, batch_size=10, augmentation="crop_flip_cutout", val_size=20) for k in range(3)]
    train = data(images, *recipes).train
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(k))[:10] for k in range(3)])

    def made(epoch: int, index: list[int], order: Tensor) -> Tensor:
        chosen = order[torch.tensor(index)]
        (split,) = train.select(torch.tensor(index)).steps(epoch, [chosen])
        parts = [split.gather(part).x for part in torch.split(chosen, 4, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), split.gather(chosen).x)
        first: Tensor = parts[0]
        return first

    whole = made(0, [0, 1, 2], order)
    assert torch.equal(made(0, [2, 0], order), whole[[2, 0]])
    assert torch.equal(made(0, [1], order[:, [1, 0, 3, 2]]), whole[1:2, [1, 0, 3, 2]])
    assert not torch.equal(made(1, [0], order), whole[:1])
    numbers = train.numbers[order[0]]
    fewer = data(images, replace(recipes[0], val_size=0)).train
    (split,) = fewer.steps(0, [numbers[None]])
    assert torch.equal(split.gather(numbers[None]).x[0, :4], whole[0])


def stacked(images: Dataset, seeds: Sequence[int]) -> StackTrainer:
    """Return a trainer of small MLPs on augmented, noisy images, of two levels of noise."""
    names = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}
    defaults = {name: argument.default for name, argument in program_arguments(names).items()}
    models = []
    for seed in seeds:
        own = {"seed": seed, "init_seed": seed, "order_seed": seed, "noise_seed": seed, "data_noise": 0.1 * (seed % 2)}
        fixed = {
            "batch_size": 16,
            "epochs": 3,
            "precision": "fp64",
            "augmentation": "crop_flip_cutout",
            "cutout_size": 3,
        }
        models.append(Model(str(seed), {**names, **defaults, **fixed, **own}))
    build = network_builder({**models[0].settings, "width": 8}, images.input_shape, images.classes)
    return StackTrainer(Trial("s", tuple(models)), images, build, Execution())


def test_augmented_training_does_not_depend_on_the_stack_nor_on_interruptions(images: Dataset) -> None:
    whole, alone, resumed = stacked(images, [0, 1, 2]), stacked(images, [1]), stacked(images, [0, 1, 2])
    for number, progress in enumerate(whole.train()):
        if number == 5:  # in the middle of the second epoch
            kept = copy.deepcopy(progress)
            outcomes = copy.deepcopy(whole.outcomes)
    list(alone.train())
    resumed.restore(kept, outcomes)
    list(resumed.train())
    for one, other in zip(resumed.outcomes, whole.outcomes, strict=True):
        assert one.params is not None and other.params is not None and torch.equal(one.params, other.params)
    torch.testing.assert_close(alone.outcomes[0].params, whole.outcomes[1].params, rtol=0, atol=1e-9)
