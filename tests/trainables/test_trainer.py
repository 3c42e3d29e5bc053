"""The stacked trainer against a plain PyTorch loop, whatever the neighbours and wherever in the stack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.plugins import program_arguments
from flatmin.settings import model_id
from flatmin.stack import Streams, normal, permutation, stream_key
from flatmin.stack.streams import dropout_mask
from flatmin.trainables.corruption import noisy_labels
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.networks.mlp import mlp
from flatmin.trainables.trainer import StackTrainer
from flatmin.trainables.training import Recipe, training
from flatmin.trial import Execution, Model, Trial

STEPS = 50


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Return a small random classification task of 8 x 8 images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(140, 1, 8, 8, generator=generator)
    y = torch.randint(0, 10, (140,), generator=generator)
    return Dataset(x[:100], y[:100], x[100:], y[100:], x[:100].mean(0), x[:100].std(0), 10)


class Convolutional(nn.Module):
    """A small convolutional network with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.head = nn.Linear(6 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.features(x).flatten(1))
        return output


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp((1, 8, 8), 10, width=12, depth=2),
    "dropout": lambda: mlp((1, 8, 8), 10, width=12, depth=2, dropout=0.4),
    "batch norm": Convolutional,
}


def model(**changes: Any) -> Model:
    """Return a model of an MLP program in float64, 13 epochs of 4 steps."""
    names = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}
    arguments = program_arguments(names)
    defaults = {name: argument.default for name, argument in arguments.items()}
    settings = {
        **names,
        **defaults,
        "batch_size": 25,
        "epochs": 13,
        "precision": "fp64",
        "eval_every": 13,
        **changes,
    }
    for name in ("init_seed", "order_seed", "noise_seed"):
        settings[name] = settings["seed"] if settings[name] is None else settings[name]
    return Model(model_id(settings, arguments), settings)


def eight_models(optimizer: str) -> list[Model]:
    """Return eight models that differ in everything that is per model."""
    models = []
    for k in range(8):
        own = {
            "lr": 0.02 * (k + 1),
            "weight_decay": 1e-3 * k,
            "seed": k // 2,
            "label_noise": 0.1 * k,
            "data_noise": 0.05 * (k % 3),
            "schedule": ("constant", "step", "cosine", "cosine_steps")[k % 4],
            "milestones": (3, 6 + k),
            "lr_decay": 0.5,
            "optimizer": optimizer,
        }
        if optimizer.endswith("sgd"):
            own["momentum"] = 0.1 * k
        if optimizer.endswith("adam"):
            own.update(lr=0.002 * (k + 1), beta1=0.9, beta2=0.999, adam_eps=1e-8)
        if optimizer.startswith("sam"):
            own["rho"] = 0.02 * k
        models.append(model(**own))
    return models


def trained(
    models: list[Model],
    dataset: Dataset,
    build: Callable[[], nn.Module],
    steps: int,
    vectorize: Any = "vmap",
    device: str = "cpu",
) -> StackTrainer:
    execution = Execution(vectorize=vectorize, device=device)
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, build, execution)
    for step, _ in enumerate(trainer.train(), 1):
        if step == steps:
            return trainer
    raise AssertionError("the models ended before the steps were done")


class StreamDropout(nn.Module):
    """Dropout by the documented mask, for the plain loop."""

    def __init__(self, p: float, call: int) -> None:
        super().__init__()
        self.p, self.call = p, call
        self.key = torch.tensor(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * dropout_mask(self.key, self.call, x.shape, self.p) / (1 - self.p)


def plain_loop(one: Model, dataset: Dataset, build: Callable[[], nn.Module], steps: int) -> nn.Module:
    """Train one model with torch's own modules, optimizers and schedulers."""
    settings = one.settings
    recipe: Recipe = training(**{name: settings[name] for name in program_arguments({})})
    with torch.random.fork_rng():
        torch.manual_seed(stream_key("init", recipe.init_seed))
        network = build().double()
    dropouts: list[StreamDropout] = []
    for parent in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                dropouts.append(StreamDropout(child.p, len(dropouts) + 1))
                parent._modules[name] = dropouts[-1]
    z = normal(stream_key("data noise", recipe.noise_seed), dataset.train_x.shape)
    x = (dataset.train_x.double() + recipe.data_noise * z - dataset.mean) / dataset.std
    y = noisy_labels(dataset.train_y, 10, recipe)
    own = {key: settings[key] for key in ("lr", "weight_decay")}
    optimizer: torch.optim.Optimizer
    if settings["optimizer"].endswith("adam"):
        optimizer = torch.optim.Adam(network.parameters(), **own)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=settings["momentum"], **own)
    scheduler: Any = None
    if recipe.schedule == "step":
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), recipe.lr_decay)
    elif recipe.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    per_step: Any = None
    if recipe.schedule == "cosine_steps":
        total = recipe.epochs * math.ceil(len(x) / recipe.batch_size)
        per_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    done, epoch = 0, 0
    while True:
        order = permutation(stream_key("order", recipe.order_seed, epoch), len(x))
        if not recipe.shuffle:
            order = torch.arange(len(x))
        for step, index in enumerate(torch.split(order, recipe.batch_size)):
            key = Streams(torch.tensor([stream_key("training", recipe.order_seed)]), epoch * len(x) + step).keys[0]
            for dropout in dropouts:
                dropout.key = key
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(network(x[index]), y[index]))
            if settings["optimizer"].startswith("sam"):
                sam_second_pass(network, x[index], y[index], settings["rho"])
            optimizer.step()
            if per_step is not None:
                per_step.step()
            done += 1
            if done == steps:
                return network
        epoch += 1
        if scheduler is not None:
            scheduler.step()


def sam_second_pass(network: nn.Module, x: Tensor, y: Tensor, rho: float) -> None:
    """Replace the gradients by those at the ascent point; running statistics stay those of the first pass."""
    state = copy.deepcopy(network.state_dict())
    parameters = list(network.parameters())
    grads = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = torch.sqrt(sum(((grad**2).sum() for grad in grads), torch.tensor(0.0)))
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.add_(rho * grad / (norm + 1e-12))
    network.zero_grad()
    torch.autograd.backward(functional.cross_entropy(network(x), y))
    new = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    network.load_state_dict(state)
    for parameter, grad in zip(parameters, new, strict=True):
        parameter.grad = grad


@pytest.fixture(scope="module")
def plain_loops(dataset: Dataset) -> Callable[[str, str], list[nn.Module]]:
    """Return what gives the eight models of a network and an optimizer, trained each in a plain loop, once."""

    @cache
    def of(network: str, optimizer: str) -> list[nn.Module]:
        return [plain_loop(one, dataset, BUILDERS[network], STEPS) for one in eight_models(optimizer)]

    return of


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sam-sgd"])
@pytest.mark.parametrize("network", list(BUILDERS))
def test_stack_of_eight_equals_plain_loop(
    network: str,
    optimizer: str,
    vectorize: str,
    dataset: Dataset,
    plain_loops: Callable[[str, str], list[nn.Module]],
) -> None:
    """After 50 steps each of eight different models has the plain loop's weights, buffers and loss."""
    trainer = trained(eight_models(optimizer), dataset, BUILDERS[network], STEPS, vectorize)
    batch = trainer.data.test.chunks()[0]
    losses = trainer.network.losses(trainer.progress.params, trainer.progress.buffers, batch)
    for k, expected in enumerate(plain_loops(network, optimizer)):
        ours = trainer.network.module(trainer.progress.params, trainer.progress.buffers, k).state_dict()
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9)
        expected.eval()
        loss = functional.cross_entropy(expected(batch.x), batch.y[k])
        torch.testing.assert_close(losses[k], loss, rtol=0, atol=1e-9)


@pytest.mark.parametrize("network", list(BUILDERS))
def test_neighbours_and_place_change_nothing(network: str, dataset: Dataset) -> None:
    """A model alone, among eight, and among eight in another order has the same weights."""
    models, build = eight_models("sgd"), BUILDERS[network]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    together = trained(models, dataset, build, STEPS).progress.params
    shuffled = trained([models[k] for k in order], dataset, build, STEPS).progress.params
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-9)
    for k in (0, 4, 7):
        alone = trained([models[k]], dataset, build, STEPS).progress.params
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-9)


def test_streams_are_paired(dataset: Dataset) -> None:
    """Models that differ in other settings share what their seeds say; each seed moves its own stream alone."""
    models = [
        model(seed=3),
        model(seed=3, lr=0.5, weight_decay=1e-3, label_noise=0.4, data_noise=0.2, epochs=20),
        model(seed=3, init_seed=9),
        model(seed=3, order_seed=9),
        model(seed=3, noise_seed=9, label_noise=0.4),
    ]
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, BUILDERS["mlp"], Execution())
    weights, orders, labels = trainer.progress.params, trainer._orders(), trainer.data.train.y
    assert [torch.equal(row, weights[0]) for row in weights] == [True, True, False, True, True]
    assert [torch.equal(row, orders[0]) for row in orders] == [True, True, True, False, True]
    assert not torch.equal(labels[1], labels[4])
    assert torch.equal(labels[0], labels[2])


@pytest.mark.gpu
@pytest.mark.parametrize("network", list(BUILDERS))
def test_cuda_equals_the_cpu(network: str, dataset: Dataset) -> None:
    models, build = eight_models("sgd"), BUILDERS[network]
    on_cpu = trained(models, dataset, build, STEPS).progress.params
    on_cuda = trained(models, dataset, build, STEPS, device="cuda").progress.params
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=1e-9)


def test_models_end_each_at_its_own_time(dataset: Dataset) -> None:
    """Finished, converged and diverged models are frozen as they end; the others train on as if alone."""
    models = [
        model(lr=0.05, epochs=3),
        model(lr=0.05, epochs=9, seed=1),
        model(lr=0.2, epochs=200, stop_loss=0.7, seed=2),
        model(lr=1e6, epochs=9, seed=3),
    ]
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, BUILDERS["mlp"], Execution())
    list(trainer.train())
    rows = [outcome.row for outcome in trainer.outcomes]
    assert [row and row["status"] for row in rows] == ["finished", "finished", "converged", "diverged"]
    assert rows[0] is not None and rows[0]["epochs_run"] == 3
    assert rows[1] is not None and rows[1]["epochs_run"] == 9
    assert rows[2] is not None and rows[2]["train_loss"] <= 0.7 and rows[2]["epochs_run"] < 200
    for k, one in enumerate(models):
        single = StackTrainer(Trial("s", (one,)), dataset, BUILDERS["mlp"], Execution())
        list(single.train())
        alone, among = single.outcomes[0], trainer.outcomes[k]
        assert alone.params is not None and among.params is not None
        assert alone.row is not None and among.row is not None
        torch.testing.assert_close(alone.params, among.params, rtol=0, atol=1e-9)
        assert alone.row["status"] == among.row["status"]
        assert torch.isfinite(among.params).all()


def test_diverged_model_keeps_the_weights_from_before(dataset: Dataset) -> None:
    """The kept weights are those of the last step whose batch loss was under `max_loss`."""
    one = model(lr=1e6, epochs=2)
    trainer = StackTrainer(Trial("s", (one,)), dataset, BUILDERS["mlp"], Execution())
    initial = trainer.progress.params.clone()
    list(trainer.train())
    assert trainer.outcomes[0].row is not None and trainer.outcomes[0].params is not None
    assert trainer.outcomes[0].row["status"] == "diverged"
    # lr = 1e6 leaves the bounds with its first step, so what is kept is the initialisation.
    assert torch.equal(trainer.outcomes[0].params, initial[0])


@pytest.mark.parametrize(("weight", "status"), [(3e38, "finished"), (math.inf, "diverged"), (math.nan, "diverged")])
def test_large_weights_are_finite_though_their_sum_is_not(dataset: Dataset, weight: float, status: str) -> None:
    def build() -> nn.Module:
        network = mlp((1, 8, 8), 10)
        network.register_parameter("idle", nn.Parameter(torch.full((4,), weight)))
        return network

    trainer = StackTrainer(Trial("s", (model(precision="fp32", epochs=1),)), dataset, build, Execution())
    initial = trainer.progress.params.clone()
    list(trainer.train())
    (outcome,) = trainer.outcomes
    assert outcome.row is not None and outcome.params is not None
    assert outcome.row["status"] == status
    kept = torch.allclose(outcome.params, initial[0], rtol=0, atol=0, equal_nan=True)
    assert kept == (status == "diverged")


def test_a_last_step_out_of_bounds_is_a_divergence_too(dataset: Dataset) -> None:
    """One step in all, so that no batch ever sees the weights it leads to."""
    one = model(lr=1e30, epochs=1, batch_size=100)
    trainer = StackTrainer(Trial("s", (one,)), dataset, BUILDERS["mlp"], Execution())
    initial = trainer.progress.params.clone()
    list(trainer.train())
    outcome = trainer.outcomes[0]
    assert outcome.row is not None
    assert outcome.params is not None
    assert outcome.row["status"] == "diverged"
    assert torch.equal(outcome.params, initial[0])
    assert outcome.row["train_loss"] < 10


def test_converged_means_the_training_loss_in_eval_mode(dataset: Dataset) -> None:
    """The stop uses the whole training set without dropout, at every epoch, and is what the row says."""
    one = model(lr=0.02, epochs=300, stop_loss=1.9, eval_every=100)
    trainer = StackTrainer(Trial("s", (one,)), dataset, BUILDERS["dropout"], Execution())
    list(trainer.train())
    outcome = trainer.outcomes[0]
    assert outcome.row is not None and outcome.params is not None
    module = trainer.network.module(outcome.params[None], {}, 0).eval()
    split = trainer.data.train
    loss = functional.cross_entropy(module(split.between(0, len(split)).x), split.y[0]).detach()
    assert outcome.row["train_loss"] == pytest.approx(float(loss), abs=1e-12)
    assert outcome.row["status"] == "converged"
    assert outcome.row["epochs_run"] % 100 != 0


def test_the_learning_rate_of_the_table_is_that_of_the_last_step(dataset: Dataset) -> None:
    """Four steps in each of three epochs; a cosine by steps comes to 0 one step after the last."""
    models = [model(lr=0.2, epochs=3, eval_every=1, schedule=schedule) for schedule in ("cosine", "cosine_steps")]
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, BUILDERS["mlp"], Execution())
    list(trainer.train())
    by_epoch, by_step = ([row["lr"] for row in outcome.epochs] for outcome in trainer.outcomes)
    assert by_epoch == pytest.approx([0.2, 0.15, 0.05], rel=1e-12)
    assert by_step == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 12)) for t in (3, 7, 11)], rel=1e-12)


def test_without_shuffling_examples_come_as_they_lie(dataset: Dataset) -> None:
    one = model(shuffle=False, seed=2)
    ours = trained([one], dataset, BUILDERS["mlp"], STEPS)
    expected = nn.utils.parameters_to_vector(plain_loop(one, dataset, BUILDERS["mlp"], STEPS).parameters())
    torch.testing.assert_close(ours.progress.params[0], expected.detach(), rtol=0, atol=1e-9)
    shuffled = trained([model(seed=2)], dataset, BUILDERS["mlp"], STEPS)
    assert not torch.allclose(ours.progress.params, shuffled.progress.params, atol=1e-3)
