"""Passes in pieces, compiled or with other memory layouts: the step is that of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.plugins import program_arguments
from flatmin.settings import model_id
from flatmin.stack import StackedNetwork
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.passes import MicroBatch
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Execution, Model, Trial

BATCH, EXAMPLES = 12, 40
"""Three whole batches and a short one of 4 in an epoch."""

OPTIMIZERS = ("sgd", "sam-sgd", "lpf-sgd", "adahessian", "sam-scrn", "entropy-sgd")


def models(optimizer: str, **changes: Any) -> tuple[Model, ...]:
    """Return two models in float64 that differ in their learning rate, seed and label smoothing."""
    names = {"dataset": "digits", "network": "mlp", "optimizer": optimizer}
    arguments = program_arguments(names)
    members = []
    for k in range(2):
        settings = {**names, **{name: argument.default for name, argument in arguments.items()}}
        own = {"seed": k, "lr": 0.05 * (k + 1), "label_smoothing": 0.1 * k, "precision": "fp64", "lpf_gamma": 0.05}
        own |= {"batch_size": BATCH, "epochs": 3, "lpf_batches": 3, "entropy_steps": 2, "scrn_steps": 3, **changes}
        settings.update({name: value for name, value in own.items() if name in settings})
        settings.update({name: settings["seed"] for name in ("init_seed", "order_seed", "noise_seed")})
        members.append(Model(model_id(settings, arguments), settings))
    return tuple(members)


def images(class_weights: Tensor | None = None) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(EXAMPLES + 10, 1, 8, 8, generator=generator)
    y = torch.randint(0, 4, (len(x),), generator=generator)
    train, test = slice(0, EXAMPLES), slice(EXAMPLES, None)
    return Dataset(x[train], y[train], x[test], y[test], x.mean(0), x.std(0), 4, class_weights=class_weights)


def dropped() -> nn.Module:
    """Return an MLP that is smooth, so that products are not zero almost everywhere, with dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Dropout2d(0.3), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


def trained(
    members: tuple[Model, ...], dataset: Dataset, build: Callable[[], nn.Module], steps: int, **execution: Any
) -> StackTrainer:
    trainer = StackTrainer(Trial("s", members), dataset, build, Execution(**execution))
    for step, _ in enumerate(trainer.train(), 1):
        if step == steps:
            return trainer
    raise AssertionError("the models ended before the steps were done")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pieces_of_a_batch_give_the_step_of_the_whole(optimizer: str) -> None:
    """Five of twelve examples at a time, a last piece of two, and dropout that draws what it draws in the whole."""
    members, dataset = models(optimizer), images(torch.tensor([1.0, 2.0, 0.5, 0.0]))
    whole = trained(members, dataset, dropped, 6)
    pieces = trained(members, dataset, dropped, 6, micro_batch=5)
    torch.testing.assert_close(pieces.progress.params, whole.progress.params, rtol=0, atol=1e-9)
    assert not torch.equal(whole.progress.params, trained(members, dataset, dropped, 5).progress.params)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_pieces_of_images_with_whole_channels_dropped(vectorize: str) -> None:
    members, dataset = models("sam-sgd"), images()
    whole = trained(members, dataset, convolutional, 5, vectorize=vectorize)
    pieces = trained(members, dataset, convolutional, 5, vectorize=vectorize, micro_batch=1)
    torch.testing.assert_close(pieces.progress.params, whole.progress.params, rtol=0, atol=1e-9)


def largest_pass(monkeypatch: pytest.MonkeyPatch, limit: float = math.inf) -> list[int]:
    """Note how many examples training passes take, over all models, and run out of memory above a limit."""
    seen: list[int] = []
    real = StackedNetwork.logits

    def logits(self: StackedNetwork, params: Tensor, buffers: Any, batch: Any, **options: Any) -> Tensor:
        if options.get("train"):
            if batch.y.numel() > limit:
                raise torch.OutOfMemoryError("out of memory, as a device would say")
            seen.append(batch.y.numel())
        return real(self, params, buffers, batch, **options)

    monkeypatch.setattr(StackedNetwork, "logits", logits)
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "lpf-sgd", "adahessian"])
def test_no_pass_takes_more_than_was_asked(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = largest_pass(monkeypatch)
    trained(models(optimizer), images(), dropped, 4, micro_batch=3)
    assert max(seen) == 2 * 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_auto_takes_less_where_memory_runs_out(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members, dataset = models(optimizer), images()
    whole = trained(members, dataset, dropped, 5)
    seen = largest_pass(monkeypatch, limit=2 * 7)
    pieces = trained(members, dataset, dropped, 5, micro_batch="auto")
    assert max(seen) <= 2 * 7
    assert pieces.micro_batch.size in {3, 6, 4}
    torch.testing.assert_close(pieces.progress.params, whole.progress.params, rtol=0, atol=1e-9)


def test_memory_that_runs_out_in_a_product_is_made_do_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a whole batch fits and its product does not: products are then made from pieces."""
    members, dataset = models("adahessian"), images()
    whole = trained(members, dataset, dropped, 3)
    real, failed = torch.autograd.grad, list[int]()

    def grad(outputs: Any, inputs: Any, **options: Any) -> Any:
        if options.get("retain_graph") and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory, as a device would say")
        return real(outputs, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    pieces = trained(members, dataset, dropped, 3, micro_batch="auto")
    assert failed and pieces.micro_batch.size is not None
    torch.testing.assert_close(pieces.progress.params, whole.progress.params, rtol=0, atol=1e-9)


def test_what_was_not_asked_to_adapt_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    largest_pass(monkeypatch, limit=5)
    with pytest.raises(torch.OutOfMemoryError):
        trained(models("sgd"), images(), dropped, 1)
    largest_pass(monkeypatch, limit=1)
    with pytest.raises(torch.OutOfMemoryError):  # a single example of each model does not fit
        trained(models("sgd"), images(), dropped, 1, micro_batch="auto")


def test_layers_that_mix_examples_are_not_split() -> None:
    with pytest.raises(RequestError, match=r"--micro-batch 4: the layer '1' normalises by the examples of a batch"):
        trained(models("sgd"), images(), normalised, 1, micro_batch=4)
    network = StackedNetwork(normalised())
    assert not MicroBatch.of(Execution(micro_batch="auto"), network).adapts
    kept = StackedNetwork(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(3, 2)))
    with pytest.raises(RequestError, match="the layer '0'"):
        MicroBatch.of(Execution(micro_batch=4), kept)
    free = StackedNetwork(nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 2)))
    assert MicroBatch.of(Execution(micro_batch=4), free).size == 4


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("build", [convolutional, normalised])
def test_channels_last_is_another_layout_of_the_same(
    build: Callable[[], nn.Module], vectorize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, dataset = models("sam-sgd"), images()
    plain = trained(members, dataset, build, 5, vectorize=vectorize)
    inputs: list[Tensor] = []
    network_of = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        if vectorize == "loop" and x.shape[1] == 1:
            inputs.append(x)
        return network_of(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    other = trained(members, dataset, build, 5, vectorize=vectorize, channels_last=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    torch.testing.assert_close(other.progress.params, plain.progress.params, rtol=0, atol=1e-9)
    for name, buffer in other.progress.buffers.items():
        torch.testing.assert_close(buffer, plain.progress.buffers[name], rtol=0, atol=1e-9)


def compiled_with(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("build", "vectorize"),
    [(dropped, "vmap"), pytest.param(normalised, "vmap", marks=pytest.mark.slow), (normalised, "loop")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_compiled_pass_is_the_same_pass(
    build: Callable[[], nn.Module], vectorize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated ahead of time, without the minutes that code generation takes."""
    compiled_with(monkeypatch, "aot_eager")
    members, dataset = models("sam-sgd"), images()
    eager = trained(members, dataset, build, 5, vectorize=vectorize)
    compiled = trained(members, dataset, build, 5, vectorize=vectorize, compile=True)
    torch.testing.assert_close(compiled.progress.params, eager.progress.params, rtol=0, atol=1e-9)
    for name, buffer in compiled.progress.buffers.items():
        torch.testing.assert_close(buffer, eager.progress.buffers[name], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "vectorize"),
    [(dropped, "vmap"), (normalised, "loop")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("optimizer", ["sam-sgd", "adahessian"])
def test_generated_code_is_the_same_pass(optimizer: str, build: Callable[[], nn.Module], vectorize: str) -> None:
    torch._dynamo.reset()
    members, dataset = models(optimizer), images()
    eager = trained(members, dataset, build, 5, vectorize=vectorize)
    compiled = trained(members, dataset, build, 5, vectorize=vectorize, compile=True)
    torch.testing.assert_close(compiled.progress.params, eager.progress.params, rtol=0, atol=1e-9)


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RequestError, match=r"--compile: torch.compile needs a C\+\+ compiler, .*no-such-compiler"):
        trained(models("sgd"), images(), dropped, 1, compile=True)


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(RequestError, match="--cuda-graphs: the trials run on a CPU"):
        trained(models("sgd"), images(), dropped, 1, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("build", [dropped, normalised])
@pytest.mark.parametrize("optimizer", ["sgd", "sam-sgd", "lpf-sgd", "adahessian"])
def test_a_cuda_graph_is_the_same_pass(optimizer: str, build: Callable[[], nn.Module], compiled: bool) -> None:
    """With a short last batch, and with models that end at different times."""
    members = tuple(
        replace(member, settings={**member.settings, "epochs": 2 + k}) for k, member in enumerate(models(optimizer))
    )
    ended = []
    for graphs in (False, True):
        execution = Execution(device="cuda", cuda_graphs=graphs, compile=compiled)
        trainer = StackTrainer(Trial("s", members), images(), build, execution)
        list(trainer.train())
        ended.append(torch.stack([outcome.params for outcome in trainer.outcomes if outcome.params is not None]))
    torch.testing.assert_close(ended[1], ended[0], rtol=0, atol=1e-9)
