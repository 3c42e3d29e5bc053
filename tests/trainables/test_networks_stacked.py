"""Every network trains in a stack as it does alone and in a plain loop; so does a module of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tests.trainables.conftest import Install
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import RequestError
from flatmin.plugins import listing, program_arguments
from flatmin.settings import model_id
from flatmin.stack import Streams, permutation, stream_key
from flatmin.stack.streams import draws_from
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Model, Trial

Smallest = Callable[[str], tuple[tuple[int, ...], dict[str, Any]]]
EXAMPLES, BATCH, STEPS = 32, 8, 3


def dataset_of(shape: tuple[int, ...], *, pixels: bool = False) -> Dataset:
    """Return random images of three classes, or of three classes of pixels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(EXAMPLES + 4, *shape, generator=generator)
    y = torch.randint(0, 3, (len(x), *shape[1:]) if pixels else (len(x),), generator=generator)
    y = y.to(torch.uint8) if pixels else y
    train, test = slice(0, EXAMPLES), slice(EXAMPLES, None)
    mean, std = torch.tensor(0.5), torch.tensor(0.3)
    task: Any = "segmentation" if pixels else "classification"
    return Dataset(x[train], y[train], x[test], y[test], mean, std, 3, task=task)


def models_of(network: str, changes: Mapping[str, Any], count: int = 3) -> list[Model]:
    """Return models of a network that differ in their seeds and learning rates."""
    names = {"dataset": "digits", "network": network, "optimizer": "sgd"}
    arguments = program_arguments(names)
    settings = {**names, **{name: argument.default for name, argument in arguments.items()}}
    settings.update(changes, batch_size=BATCH, precision="fp64", momentum=0.9)
    models = []
    for k in range(count):
        own = {**settings, "lr": 0.001 * (k + 1)}
        own.update(dict.fromkeys(("seed", "init_seed", "order_seed", "noise_seed"), k))
        models.append(Model(model_id(own, arguments), own))
    return models


def stacked(models: list[Model], dataset: Dataset, vectorize: Any) -> list[dict[str, Tensor]]:
    """Return weights and buffers by name of models that were trained in one stack."""
    build = network_builder(models[0].settings, dataset.input_shape, dataset.classes)
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, build, Execution(vectorize=vectorize))
    for step, _ in enumerate(trainer.train(), 1):
        if step == STEPS:
            break
    now = trainer.progress
    tensors = {**trainer.network.views(now.params), **now.buffers}
    return [{name: tensor[k] for name, tensor in tensors.items()} for k in range(len(models))]


def plain(one: Model, dataset: Dataset) -> dict[str, Tensor]:
    """Return weights and buffers by name after a plain loop over the module and `torch.optim.SGD`."""
    settings = one.settings
    build: Callable[[], nn.Module] = network_builder(settings, dataset.input_shape, dataset.classes)
    with torch.random.fork_rng():
        torch.manual_seed(stream_key("init", settings["seed"]))
        network = build().double().train()
    x = (dataset.train_x.double() - dataset.mean) / dataset.std
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["lr"], momentum=settings["momentum"])
    order = permutation(stream_key("order", settings["seed"], 0), EXAMPLES)
    for step, index in enumerate(torch.split(order, BATCH)[:STEPS]):
        keys = Streams(torch.tensor([stream_key("training", settings["seed"])]), step).keys
        optimizer.zero_grad()
        with draws_from(keys[0]):
            out = network(x[index])
        torch.autograd.backward(functional.cross_entropy(out, dataset.train_y[index].long()))
        optimizer.step()
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=f"{name} differs")


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", sorted(listing("network")))
def test_a_stack_trains_as_its_models_alone_and_as_a_plain_loop(name: str, vectorize: Any, smallest: Smallest) -> None:
    shape, settings = smallest(name)
    dataset, models = dataset_of(shape, pixels=name == "unet"), models_of(name, settings)
    together = stacked(models, dataset, vectorize)
    assert_same(together[1], stacked([models[1]], dataset, vectorize)[0])
    for ours, one in zip(together, models, strict=True):
        assert_same(ours, plain(one, dataset))


@pytest.mark.parametrize("name", ["lenet", "shake_shake"])
def test_what_random_layers_draw_follows_the_model_wherever_it_is(name: str, smallest: Smallest) -> None:
    shape, settings = smallest(name)
    dataset, models = dataset_of(shape), models_of(name, settings)
    together = stacked(models, dataset, "vmap")
    elsewhere = [*stacked([models[2], models[0]], dataset, "vmap"), *stacked([models[1]], dataset, "loop")]
    for place, k in enumerate((2, 0, 1)):
        assert_same(elsewhere[place], together[k])


MINE = '''
"""A convolutional network of somebody else's package."""
import torch
from torch import nn


def mine(input_shape, classes, *, width: int = 4) -> nn.Module:
    """Build my network."""
    return Mine(input_shape, classes, width)


class Mine(nn.Module):
    def __init__(self, input_shape, classes, width):
        super().__init__()
        self.convolution = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.register_buffer("centre", torch.zeros(width))
        self.head = nn.Linear(width, classes)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        x = torch.tanh(self.norm(self.convolution(x))).amax(dim=(2, 3))
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(dim=0)
            x = x + 0.1 * torch.rand_like(x)
        return self.head(self.scale * (x - self.centre))


def lazy(input_shape, classes) -> nn.Module:
    """Build a network that does not know its shapes."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(x.shape, dtype=x.dtype)


def noisy(input_shape, classes) -> nn.Module:
    """Build a network that draws from the global generator."""
    return nn.Sequential(nn.Conv2d(input_shape[0], 2, 3), _Noise(), nn.Flatten(), nn.Linear(72, classes))
'''


@pytest.fixture
def _my_package(install: Install) -> None:
    """Install a package whose networks are plug-ins through entry points."""
    install("my_networks", MINE, {"flatmin.networks": ["mine", "lazy", "noisy"]})


@pytest.mark.usefixtures("_my_package")
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_module_of_the_users_own_trains_stacked_with_its_buffers(vectorize: Any) -> None:
    """BatchNorm, a buffer that is assigned anew, noise from `torch.rand_like`, a parameter that is not trained."""
    dataset, models = dataset_of((1, 8, 8)), models_of("mine", {"width": 3})
    for ours, one in zip(stacked(models, dataset, vectorize), models, strict=True):
        theirs = plain(one, dataset)
        assert_same(ours, theirs)
        assert float(ours["centre"].abs().sum()) > 0
        assert int(ours["norm.num_batches_tracked"]) == STEPS


@pytest.mark.usefixtures("_my_package")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("lazy", r"'1\.weight' of the network is lazy"), ("noisy", "draws random numbers other than through dropout")],
)
def test_a_module_that_cannot_be_stacked_is_refused(name: str, message: str, vectorize: Any) -> None:
    with pytest.raises(RequestError, match=message):
        stacked(models_of(name, {}), dataset_of((1, 8, 8)), vectorize)
