"""Losses and scores of every task against torch's own and plain loops, in batches, over sets and while training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import RequestError
from flatmin.plugins import program_arguments
from flatmin.settings import model_id
from flatmin.sharpness import Engine, measure_stack
from flatmin.sharpness.losses import cross_entropy
from flatmin.stack import permutation, stream_key
from flatmin.trainables.dataset import Dataset, Task
from flatmin.trainables.tasks import Objective, check_measure, check_outputs, dice, objective
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Execution, Model, Trial

WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


def drawn(task: Task, n: int = 30, weights: Tensor | None = None) -> Dataset:
    """Return examples of a task: classes of vectors, values of vectors, or classes of pixels, one hardly there."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 6, 6) if task == "segmentation" else (5,)
    x = torch.rand(n + 12, *shape, generator=generator)
    y = {
        "classification": torch.randint(0, 3, (len(x),), generator=generator),
        "regression": torch.randn(len(x), 3, generator=generator),
        "segmentation": (torch.rand(len(x), 6, 6, generator=generator) * 2.1).to(torch.uint8),
    }[task]
    train, test = slice(0, n), slice(n, None)
    return Dataset(x[train], y[train], x[test], y[test], x.mean(0), x.std(0), 3, task, weights)


def build(task: Task) -> Callable[[], nn.Module]:
    if task == "segmentation":
        return lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def models(count: int = 3, **changes: Any) -> tuple[Model, ...]:
    names = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}
    arguments = program_arguments(names)
    members = []
    for k in range(count):
        settings = {**names, **{name: argument.default for name, argument in arguments.items()}}
        settings |= {"seed": k, "lr": 0.1 * (k + 1), "precision": "fp64", "batch_size": 8, "epochs": 2, "momentum": 0.5}
        settings |= {name: value[k] if isinstance(value, list) else value for name, value in changes.items()}
        settings.update({name: settings["seed"] for name in ("init_seed", "order_seed", "noise_seed")})
        members.append(Model(model_id(settings, arguments), settings))
    return tuple(members)


def torch_loss(task: Task, weights: Tensor | None, smoothing: float = 0.0) -> nn.Module:
    if task == "regression":
        return nn.MSELoss()
    return nn.CrossEntropyLoss(None if weights is None else weights.double(), label_smoothing=smoothing)


def target(y: Tensor) -> Tensor:
    return y.double() if y.is_floating_point() else y.long()


CASES = [
    ("classification", None, [0.0, 0.1, 0.4]),
    ("classification", WEIGHTS, [0.0, 0.1, 0.4]),
    ("regression", None, 0.0),
    ("segmentation", None, 0.0),
    ("segmentation", WEIGHTS, [0.0, 0.1, 0.4]),
]


@pytest.mark.parametrize(("task", "weights", "smoothing"), CASES)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_training_is_a_plain_loop_with_torchs_own_loss(
    task: Task, weights: Tensor | None, smoothing: Any, micro_batch: int | None
) -> None:
    """Class weights are normalised in each batch, the short last one too; every model has its own smoothing."""
    dataset, members = drawn(task, weights=weights), models(label_smoothing=smoothing)
    trainer = StackTrainer(Trial("s", members), dataset, build(task), Execution(micro_batch=micro_batch))
    list(trainer.train())
    for k, one in enumerate(members):
        with torch.random.fork_rng():
            torch.manual_seed(stream_key("init", k))
            network = build(task)().double()
        optimizer = torch.optim.SGD(network.parameters(), lr=one.settings["lr"], momentum=0.5)
        loss = torch_loss(task, weights, one.settings["label_smoothing"])
        x = (dataset.train_x.double() - dataset.mean) / dataset.std
        for epoch in range(2):
            for index in torch.split(permutation(stream_key("order", k, epoch), len(x)), 8):
                optimizer.zero_grad()
                loss(network(x[index]), target(dataset.train_y[index])).backward()
                optimizer.step()
        expected = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        ours = trainer.outcomes[k].params
        assert ours is not None
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("task", "weights", "smoothing"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("few", [32, 0])
def test_slopes_are_autograds(
    task: Task, weights: Tensor | None, smoothing: Any, dtype: torch.dtype, few: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("flatmin.sharpness.losses._FEW_CLASSES", few)
    dataset = drawn(task, weights=weights)
    own = objective(dataset, torch.device("cpu"))
    y = torch.stack([target(dataset.train_y).to(dtype) if task == "regression" else dataset.train_y.long()] * 3)
    outputs = 3 * torch.randn(*y.shape[:2], 3, *y.shape[2 if task == "segmentation" else 3 :], dtype=dtype)
    share = torch.tensor(smoothing, dtype=dtype) if isinstance(smoothing, list) else None
    losses, slopes = own.slopes(outputs, y, share)
    leaf = outputs.clone().requires_grad_()
    expected = own.losses(leaf, y, share)
    (derivatives,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(slopes, derivatives)
    assert not losses.requires_grad


@pytest.mark.parametrize(("task", "weights", "smoothing"), CASES)
def test_scores_of_whole_sets(task: Task, weights: Tensor | None, smoothing: Any, monkeypatch: Any) -> None:
    """The training loss is torch's over the whole set; the test loss is the mean of the same function of an example."""
    monkeypatch.setattr("flatmin.trainables.data._EVALUATION_ROWS", 3 * 7)  # several chunks
    dataset, members = drawn(task, weights=weights), models(label_smoothing=smoothing)
    trainer = StackTrainer(Trial("s", members), dataset, build(task), Execution())
    list(trainer.train())
    for outcome in trainer.outcomes:
        row = outcome.row
        assert row is not None and outcome.params is not None
        network = trainer.network.module(outcome.params[None], {}, 0).eval()
        for part, x, y in (("train", dataset.train_x, dataset.train_y), ("test", dataset.test_x, dataset.test_y)):
            with torch.no_grad():
                outputs = network((x.double() - dataset.mean) / dataset.std)
            expected = float(torch_loss(task, weights)(outputs, target(y)))
            if weights is not None and part == "test":  # the weights' mean is that of the training set
                mean = {
                    key: weights[own.long()].double().mean() for key, own in (("train", dataset.train_y), (part, y))
                }
                expected *= float(mean[part] / mean["train"])
            assert row[f"{part}_loss"] == pytest.approx(expected, abs=1e-12)
            if task == "regression":
                assert (row[f"{part}_acc"], row[f"{part}_dice"]) == (None, None)
                continue
            predicted = outputs.argmax(dim=1)
            assert row[f"{part}_acc"] == pytest.approx(float((predicted == y).double().mean()), abs=1e-12)
            expected_dice = None if task == "classification" else plain_dice(predicted, y)
            assert row[f"{part}_dice"] == (None if expected_dice is None else pytest.approx(expected_dice, abs=1e-12))
    rows = [outcome.row for outcome in trainer.outcomes if outcome.row is not None]
    of_task = {
        "classification": {"train_dice", "test_dice"},
        "regression": {
            "train_dice",
            "test_dice",
            "train_acc",
            "test_acc",
            "train_acc_clean",
            "best_test_acc",
            "gen_gap",
        },
        "segmentation": set[str](),
    }[task]
    if task != "classification":
        of_task.add("label_flip_rate")
    undefined = of_task | {"val_loss", "val_acc", "val_dice"}
    assert {name for name, value in rows[0].items() if value is None} == undefined


def plain_dice(predicted: Tensor, y: Tensor) -> float:
    """Return the Dice coefficient, pixel by pixel."""
    images = []
    for p, t in zip(predicted.tolist(), y.tolist(), strict=True):
        pairs = [(a, b) for row, other in zip(p, t, strict=True) for a, b in zip(row, other, strict=True)]
        of_class = []
        for own in (1, 2):
            size = sum(a == own for a, _ in pairs) + sum(b == own for _, b in pairs)
            of_class.append(2 * sum(a == b == own for a, b in pairs) / size if size else 1.0)
        images.append(sum(of_class) / 2)
    return sum(images) / len(images)


def test_dice_of_known_masks() -> None:
    y = torch.tensor([[[[1, 1], [0, 0]], [[0, 0], [0, 0]]]])
    predicted = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 0]]]])
    assert dice(predicted, y, 2).tolist() == [[pytest.approx(2 / 3), 1.0]]


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_the_best_epoch_is_by_the_score_of_the_task(task: Task) -> None:
    """The lowest test loss of a regression, which climbs here in the end; the highest test accuracy elsewhere."""
    trainer = StackTrainer(Trial("s", models(1, lr=0.6, epochs=40)), drawn(task), build(task), Execution())
    list(trainer.train())
    outcome = trainer.outcomes[0]
    assert outcome.row is not None
    values = [epoch["test_loss"] if task == "regression" else -epoch["test_acc"] for epoch in outcome.epochs]
    assert outcome.row["best_test_epoch"] == 1 + values.index(min(values)) < 40
    assert outcome.row["best_test_acc"] == (None if task == "regression" else -min(values))


@pytest.mark.parametrize(("task", "weights", "smoothing"), CASES)
def test_measures_take_the_loss_of_the_task(task: Task, weights: Tensor | None, smoothing: Any) -> None:
    """At no distance the smoothed loss is the training loss; the gradient's norm is that of torch's loss of the set."""
    dataset = drawn(task, weights=weights)
    trainer = StackTrainer(Trial("s", models(2, lr=0.0)), dataset, build(task), Execution())
    engine = Engine(
        trainer.network, trainer.progress.params, {}, trainer.data.train.chunks(), torch.arange(2),
        loss=trainer.objective.of_example,
    )  # fmt: skip
    at_centre, gradient = measure_stack(engine, ["lpf(sigma=1e-12)", "gradient_norm"])
    for k in range(2):
        network = trainer.network.module(trainer.progress.params, {}, k)
        x = (dataset.train_x.double() - dataset.mean) / dataset.std
        loss = torch_loss(task, weights)(network(x), target(dataset.train_y))
        grads = torch.autograd.grad(loss, list(network.parameters()))
        assert at_centre[k]["value"] == pytest.approx(float(loss.detach()), abs=1e-9)
        norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
        assert gradient[k]["value"] == pytest.approx(norm, rel=1e-9)


def test_plain_classification_is_the_loss_that_measures_know() -> None:
    assert Objective("classification").of_example is cross_entropy


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        ("regression", "margin", "needs a class for each example, and this is a regression"),
        ("segmentation", "margin", "needs a class for each example, and this is a segmentation"),
        ("regression", "shannon_entropy", "needs outputs by class"),
        ("regression", "average_sharpness(normalise_logits=true)", "needs outputs by class"),
        ("regression", "lpf(loss=cross_entropy)", "a cross-entropy needs classes"),
        ("regression", "lpf(label_smoothing=0.1)", "needs classes"),
        ("segmentation", "lpf(loss=squared_error)", "the loss of a segmentation is its own"),
        ("segmentation", "lpf(label_smoothing=0.1)", "the loss of a segmentation is its own"),
    ],
)
def test_measures_that_a_task_has_no_meaning_for_are_refused(task: Task, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_measure(task, text)


def test_measures_that_a_task_has_a_meaning_for() -> None:
    for text in ("margin", "shannon_entropy", "lpf(loss=squared_error)", "lpf(label_smoothing=0.1)"):
        check_measure("classification", text)
    for text in ("lpf", "lambda_max", "shannon_entropy"):
        check_measure("segmentation", text)
    check_measure("regression", "lpf(loss=squared_error)")


def test_smoothing_without_classes_is_refused() -> None:
    with pytest.raises(RequestError, match=r"label_smoothing = 0.1: a regression has no classes"):
        StackTrainer(Trial("s", models(1, label_smoothing=0.1)), drawn("regression"), build("regression"), Execution())


@pytest.mark.parametrize(
    "weights", [torch.ones(2), torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3)], ids=["two", "negative", "zeros"]
)
def test_wrong_class_weights_are_refused(weights: Tensor) -> None:
    with pytest.raises(RequestError, match="class_weights"):
        objective(drawn("classification", weights=weights), torch.device("cpu"))


def test_weights_of_a_regression_are_refused() -> None:
    with pytest.raises(RequestError, match="class_weights"):
        objective(replace(drawn("regression"), class_weights=WEIGHTS), torch.device("cpu"))


def test_losses_are_taken_in_fp32_at_least() -> None:
    outputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    for own in (Objective("classification"), Objective("segmentation", WEIGHTS.double())):
        assert own.losses(outputs, y, torch.tensor([0.0, 0.1])).dtype == torch.float32
    expected = functional.cross_entropy(outputs.float().flatten(0, 1), y.flatten(), reduction="none").reshape(2, 4)
    assert torch.equal(Objective("classification").losses(outputs, y), expected)


@pytest.mark.parametrize(
    ("task", "outputs", "said"),
    [
        ("segmentation", (2,), r"makes outputs \[2\] of an example, and this segmentation needs \[2, 8, 8\]; .* unet"),
        ("classification", (2, 8, 8), r"makes outputs \[2, 8, 8\] of an example, and this classification needs \[2\]"),
    ],
)
def test_a_network_of_another_task_is_refused(task: Task, outputs: tuple[int, ...], said: str) -> None:
    x, y = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    dataset = Dataset(x, y, x, y, torch.zeros(1), torch.ones(1), 2, task=task)
    with pytest.raises(RequestError, match=said):
        check_outputs(dataset, "any", outputs)
