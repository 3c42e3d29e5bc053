"""Every optimizer in the stacked trainer: against the torch door, BatchNorm's statistics, micro-batches, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import FlatminError
from flatmin.optimizers import TorchOptimizer
from flatmin.plugins import get, optimizer_names, optimizer_parts, program_arguments
from flatmin.results import Results
from flatmin.settings import model_id
from flatmin.stack import permutation, stream_key
from flatmin.trainables import passes
from flatmin.trainables.checkpoint import Checkpoints
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Execution, Model, Trial

EXAMPLES, BATCH = 56, 12
SECOND_ORDER = ("adahessian", "scrn")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(80, 6, generator=generator)
    y = torch.randint(0, 3, (80,), generator=generator)
    return Dataset(x[:EXAMPLES], y[:EXAMPLES], x[EXAMPLES:], y[EXAMPLES:], x.mean(0), x.std(0), 3)


class Normalised(nn.Module):
    """A smooth network with BatchNorm, so that Hessian-vector products are not zero almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        # a bias in front of BatchNorm has no gradient but rounding errors, which Adam would divide by themselves
        self.hidden = nn.Linear(6, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.norm(self.hidden(x))))
        return output


class PartlyFrozen(Normalised):
    """The same with a first layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.hidden.parameters():
            parameter.requires_grad_(False)


def three_models(optimizer: str, **changes: Any) -> list[Model]:
    """Return models that differ in every number that may differ within a stack."""
    names = {"dataset": "digits", "network": "mlp", "optimizer": optimizer}
    arguments = program_arguments(names)
    defaults = {name: argument.default for name, argument in arguments.items()}
    own = {key for part in optimizer_parts(optimizer) for key in part.arguments}
    models = []
    for k in range(3):
        settings = {**names, **defaults, "batch_size": BATCH, "epochs": 6 + k, "precision": "fp64", "seed": k}
        varied = {key: (0.6 + 0.2 * k) * defaults[key] for key in own if arguments[key].setting.per_model}
        varied.update({"lpf_increase": 1.0 + k, "lpf_gamma": 0.02 * k, "lr": 0.01 * (k + 1), "weight_decay": 0.01 * k})
        varied.update({"lpf_batches": 3, "entropy_steps": 2, "hessian_samples": 2, "hessian_every": 2, "scrn_steps": 4})
        varied.update({"scrn_penalty": 5.0 + k, "scrn_smoothness": 0.3 + k})  # of which one takes Cauchy points
        settings.update({key: value for key, value in {**varied, **changes}.items() if key in settings})
        for name in ("init_seed", "order_seed", "noise_seed"):
            settings[name] = k
        models.append(Model(model_id(settings, arguments), settings))
    return models


def trainer_of(models: list[Model], dataset: Dataset, build: Callable[[], nn.Module] = Normalised) -> StackTrainer:
    return StackTrainer(Trial("s", tuple(models)), dataset, build, Execution(vectorize="vmap"))


def after(trainer: StackTrainer, steps: int) -> StackTrainer:
    for step, _ in enumerate(trainer.train(), 1):
        if step == steps:
            return trainer
    raise AssertionError("the models ended before the steps were done")


def batches_of(one: Model, optimizer: TorchOptimizer, epochs: int) -> Iterator[list[Tensor]]:
    """Yield the examples of each batch of each step, as the documentation says they are drawn."""
    rule = optimizer._composed().rule
    for epoch in range(epochs):
        order = permutation(stream_key("order", one.settings["order_seed"], epoch), EXAMPLES)
        for step in torch.split(order, BATCH if rule.splits else BATCH * rule.batches):
            pieces = max(1, len(step) * rule.batches // BATCH)
            yield list(step.tensor_split(pieces) if rule.splits else torch.split(step, BATCH))


def torch_door(one: Model, dataset: Dataset, build: Callable[[], nn.Module], steps: int) -> nn.Module:
    """Train one model in a plain loop with `TorchOptimizer`."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_key("init", one.settings["init_seed"]))
        network = build().double()
    x, y = (dataset.train_x.double() - dataset.mean) / dataset.std, dataset.train_y
    name = str(one.settings["optimizer"])
    own = {key: one.settings[key] for part in optimizer_parts(name) for key in part.arguments}
    optimizer = TorchOptimizer(name, network, seed=one.settings["order_seed"], total_steps=None, **own)
    per_step = BATCH if optimizer._composed().rule.splits else BATCH * optimizer._composed().rule.batches
    optimizer.total_steps = one.settings["epochs"] * -(-EXAMPLES // per_step)

    def closure_of(index: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = functional.cross_entropy(network(x[index]), y[index])
            if not name.endswith(SECOND_ORDER):
                torch.autograd.backward(loss)
            return loss

        return closure

    for done, step in enumerate(batches_of(one, optimizer, one.settings["epochs"])):
        if done == steps:
            break
        closures = [closure_of(index) for index in step]
        several = optimizer._composed().rule.batches > 1
        optimizer.step(closures if several else closures[0], weights=[len(index) for index in step])
    return network


@pytest.mark.parametrize("build", [Normalised, PartlyFrozen])
@pytest.mark.parametrize("name", optimizer_names())
def test_both_doors_give_the_same_trajectory(name: str, build: Callable[[], nn.Module], dataset: Dataset) -> None:
    """Over two epochs, with short last batches, weights and buffers of each model are those of its own plain loop."""
    # several micro-batches over a second-order base are for the stacked trainer alone
    changes = {"lpf_batches": 1} if name.endswith(SECOND_ORDER) else {}
    models, steps = three_models(name, **changes), 6 if name.startswith("entropy") else 10
    trainer = after(trainer_of(models, dataset, build), steps)
    for k, one in enumerate(models):
        ours = trainer.network.module(trainer.progress.params, trainer.progress.buffers, k).state_dict()
        for key, tensor in torch_door(one, dataset, build, steps).state_dict().items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["lpf-adahessian", "lpf-scrn"])
def test_products_over_micro_batches_are_those_of_their_mean(name: str, dataset: Dataset) -> None:
    """Without noise, several micro-batches of a network without BatchNorm are the whole batch."""
    several = trainer_of(three_models(name, lpf_gamma=0.0, lpf_batches=4), dataset, lambda: nn.Linear(6, 3))
    whole = trainer_of(three_models(name, lpf_gamma=0.0, lpf_batches=1), dataset, lambda: nn.Linear(6, 3))
    after(several, 4), after(whole, 4)
    torch.testing.assert_close(several.progress.params, whole.progress.params, rtol=0, atol=1e-9)


def reference_statistics(
    one: Model, dataset: Dataset, points: list[Tensor], batches: list[Tensor]
) -> dict[str, Tensor]:
    """Return BatchNorm's buffers after a module has seen batches in training mode, each at its own weights."""
    trainer = trainer_of([one], dataset)
    x = trainer.data.train.inputs.x
    assert isinstance(x, Tensor)
    buffers = dict(trainer.progress.buffers)
    for point, batch in zip(points, batches, strict=True):
        module = trainer.network.module(point, buffers, 0).train()
        module(x[batch])
        buffers = {name: buffer[None] for name, buffer in module.named_buffers()}
    return {name: buffer[0] for name, buffer in buffers.items()}


@pytest.mark.parametrize("policy", ["once", "all", "none"])
@pytest.mark.parametrize("name", ["sgd", "sam-sgd", "asam-adam", "vasso-sgd", "smoothout-sgd"])
def test_batch_norm_statistics_follow_the_policy(
    name: str, policy: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's buffers are those of the passes that the policy lets update them, but for the order of sums."""
    seen: list[Tensor] = []
    real = passes.Passes._evaluate

    def recording(self: passes.Passes, ask: Any, batch: int) -> Any:
        seen.append(ask.at(batch).clone())
        return real(self, ask, batch)

    monkeypatch.setattr(passes.Passes, "_evaluate", recording)
    models = three_models(name, bn_updates=policy)
    trainer = StackTrainer(Trial("s", tuple(models)), dataset, Normalised, Execution(vectorize="loop"))
    orders = trainer._orders()[:, :BATCH]
    after(trainer, 1)
    passed = {"once": seen[:1], "all": seen, "none": []}[policy]
    for k, one in enumerate(models):
        expected = reference_statistics(one, dataset, [point[k : k + 1] for point in passed], [orders[k]] * len(passed))
        for key, buffer in trainer.progress.buffers.items():
            torch.testing.assert_close(buffer[k], expected[key], rtol=1e-12, atol=1e-15, msg=key)


@pytest.mark.parametrize("policy", ["once", "all", "none"])
def test_micro_batches_side_by_side_are_as_one_after_another(
    policy: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharing a pass changes neither weights nor the order of BatchNorm's updates."""
    models = three_models("lpf-sgd", lpf_batches=4, bn_updates=policy)
    together = after(trainer_of(models, dataset), 6).progress
    monkeypatch.setattr(passes, "_SIDE_BY_SIDE_BYTES", 0)
    monkeypatch.setattr(passes.Passes, "_evaluate_side_by_side", lambda *_: pytest.fail("went side by side"))
    in_turn = after(trainer_of(models, dataset), 6).progress
    torch.testing.assert_close(together.params, in_turn.params, rtol=0, atol=1e-12)
    updates = 0 if policy == "none" else 5 * 4 + 2  # the short last batch of an epoch has two micro-batches
    assert in_turn.buffers["norm.num_batches_tracked"].tolist() == [updates] * 3
    for key, buffer in in_turn.buffers.items():
        torch.testing.assert_close(together.buffers[key], buffer, rtol=0, atol=1e-13)


def test_micro_batches_do_go_side_by_side(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.Passes, "_evaluate", lambda *_: pytest.fail("went one after another"))
    after(trainer_of(three_models("lpf-sgd", lpf_batches=4), dataset), 4)


def test_more_micro_batches_than_examples_are_refused(dataset: Dataset) -> None:
    with pytest.raises(FlatminError, match=r"batch_size = 12 cannot be split into 13 micro-batches"):
        trainer_of(three_models("lpf-sgd", lpf_batches=13), dataset)


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(43, 21), (12, 5), (30, 15), (55, 27)])
def test_no_micro_batch_of_a_short_batch_is_smaller_than_usual(
    batch_size: int, micro_batches: int, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm refuses a batch of one, and an epoch's last batch may have any size."""
    sizes: list[int] = []
    real = passes.Passes.answer

    def recording(self: passes.Passes, ask: Any) -> Any:
        sizes.extend(batch.shape[1] for batch in self.batches)
        return real(self, ask)

    monkeypatch.setattr(passes.Passes, "answer", recording)
    models = three_models("lpf-sgd", lpf_batches=micro_batches, batch_size=batch_size)
    trainer = trainer_of(models, dataset, lambda: nn.Linear(6, 3))
    after(trainer, trainer.steps_per_epoch)
    assert min(sizes) >= min(batch_size // micro_batches, EXAMPLES % batch_size)


def test_an_epoch_is_one_pass_over_the_data(dataset: Dataset) -> None:
    """Entropy-SGD takes fresh batches for its inner steps, so it takes fewer outer ones."""
    assert trainer_of(three_models("sgd"), dataset).steps_per_epoch == 5
    assert trainer_of(three_models("lpf-sgd", lpf_batches=4), dataset).steps_per_epoch == 5
    assert trainer_of(three_models("entropy-sgd", entropy_steps=2), dataset).steps_per_epoch == 3


def save(results: Results, trainer: StackTrainer) -> None:
    checkpoints = Checkpoints(results, trainer)
    checkpoints.save()
    checkpoints.close()


@pytest.mark.parametrize("name", optimizer_names())
def test_resuming_from_a_checkpoint_changes_no_bit(name: str, dataset: Dataset, tmp_path: Path) -> None:
    """A stack that is saved in the middle of an epoch and restored elsewhere ends with the same weights and rows."""
    models = three_models(name)
    undisturbed = trainer_of(models, dataset)
    list(undisturbed.train())
    results = Results(tmp_path)
    first = after(trainer_of(models, dataset), 4)
    save(results, first)
    second = trainer_of(models, dataset)
    assert Checkpoints(results, second).restore()
    list(second.train())
    for ours, expected in zip(second.outcomes, undisturbed.outcomes, strict=True):
        assert ours.params is not None
        assert expected.params is not None
        assert torch.equal(ours.params, expected.params)
        assert all(torch.equal(ours.buffers[key], buffer) for key, buffer in expected.buffers.items())
        assert ours.row is not None
        assert expected.row is not None
        assert {**ours.row, "seconds": 0} == {**expected.row, "seconds": 0}


def test_a_checkpoint_of_another_optimizer_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    """As after an upgrade that changed what an optimizer keeps: the trial starts again."""
    results = Results(tmp_path)
    trainer = after(trainer_of(three_models("sgd"), dataset), 2)
    trainer.progress.optimizer = {"velocity": trainer.progress.optimizer["sgd/velocity"]}
    save(results, trainer)
    assert not Checkpoints(results, trainer_of(three_models("sgd"), dataset)).restore()


def test_frozen_parameters_are_left_alone(dataset: Dataset) -> None:
    """They are no columns of the stacked weights, and no decay or noise reaches them."""
    for name in ("sgd", "sam-adamw", "lpf-sgd"):
        trainer = trainer_of(three_models(name), dataset, PartlyFrozen)
        start = {key: buffer.clone() for key, buffer in trainer.progress.buffers.items() if key.startswith("hidden")}
        assert set(start) == {"hidden.weight"}
        assert trainer.network.n_params == 2 * 5 + 5 * 3 + 3
        after(trainer, 5)
        assert all(torch.equal(trainer.progress.buffers[key], buffer) for key, buffer in start.items())


def test_the_schedule_does_not_act_on_scrn(dataset: Dataset) -> None:
    with_schedule = after(trainer_of(three_models("scrn", schedule="cosine"), dataset), 12).progress.params
    without = after(trainer_of(three_models("scrn"), dataset), 12).progress.params
    assert torch.equal(with_schedule, without)
    assert "lr" not in get("optimizer", "scrn").arguments


@pytest.mark.gpu
@pytest.mark.parametrize("name", optimizer_names())
def test_cuda_equals_the_cpu(name: str, dataset: Dataset) -> None:
    """Noise included: the streams are the same on any device."""
    models = three_models(name)
    on_cuda = StackTrainer(Trial("s", tuple(models)), dataset, Normalised, Execution(device="cuda"))
    expected = after(trainer_of(models, dataset), 5).progress.params
    torch.testing.assert_close(after(on_cuda, 5).progress.params.cpu(), expected, rtol=0, atol=1e-9)
