"""Samples per second into the model: batches gathered and augmented as tensors, against a DataLoader, in the same run.

Images of CIFAR's shape with random crop, flip and Cutout, batches of 128. Peers, with two worker processes that start
before the clock does: `PIL`, the structure of the published codes, whose transforms take one PIL image at a time;
`tensors`, torchvision's transforms of uint8 tensors, one image at a time as well. Ours, on one thread, as a trial has
it unless it asks for more: one model; eight of one stack whose batches differ; eight that share a seed, and so their
batches. The sum of every batch is taken, as a model would read it. Prints the median over repetitions, its spread,
and the ratio to `PIL`.

    python benchmarks/data.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from _figures import show
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToPILImage, ToTensor, v2

from flatmin.stack import permutation, stream_key
from flatmin.trainables.data import stack_data
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.training import training

IMAGES, BATCH, REPETITIONS, WORKERS = 12_800, 128, 7, 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIZE, CHANCE = 16, 0.5


class Cutout(nn.Module):
    """The published Cutout: with probability 1/2 a window is set to zero, its corner uniform in [-s/2, 32 - s/2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the image `[C, 32, 32]`, changed in place."""
        if torch.rand(1) >= CHANCE:
            return x
        top, left = torch.randint(-SIZE // 2, x.shape[-1] - SIZE // 2, (2,)).tolist()
        x[..., max(0, top) : top + SIZE, max(0, left) : left + SIZE] = 0
        return x


class PerImage(TorchDataset[tuple[Tensor, int]]):
    """Images of which each is transformed when it is asked for."""

    def __init__(self, images: list[object] | Tensor, y: Tensor, transform: Callable[[object], Tensor]) -> None:
        self.images, self.y, self.transform = images, y.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(self.images[number]), self.y[number]


def published(dataset: Dataset) -> Callable[[], Iterable[Tensor]]:
    """Return the batches of an epoch as the published codes make them."""
    changes = [RandomCrop(32, 4), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD), Cutout()]
    return loaded([ToPILImage()(image) for image in dataset.train_x], dataset, Compose(changes))


def tensors(dataset: Dataset) -> Callable[[], Iterable[Tensor]]:
    """Return the batches of an epoch as torchvision makes them of tensors."""
    changes = [RandomCrop(32, 4), RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), Normalize(MEAN, STD)]
    return loaded(dataset.train_x, dataset, Compose([*changes, Cutout()]))


def loaded(
    images: list[object] | Tensor, dataset: Dataset, transform: Callable[[object], Tensor]
) -> Callable[[], Iterable[Tensor]]:
    loader = DataLoader(
        PerImage(images, dataset.train_y, transform),
        BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    return lambda: (x for x, _ in loader)


def ours(dataset: Dataset, seeds: list[int]) -> Callable[[], Iterable[Tensor]]:
    """Return the batches of an epoch of a stack."""
    recipes = [training(seed=seed, batch_size=BATCH, augmentation="crop_flip_cutout") for seed in seeds]
    split = stack_data(dataset, recipes, torch.device("cpu"), torch.float32).train

    def batches() -> Iterable[Tensor]:
        orders = torch.stack([permutation(stream_key("order", seed, 0), len(split)) for seed in seeds])
        parts = torch.split(orders, BATCH, dim=1)
        for order, step in zip(parts, split.steps(0, parts), strict=True):
            yield step.gather(order).x

    return batches


def rate(batches: Callable[[], Iterable[Tensor]]) -> float:
    """Return the samples of a second, over an epoch."""
    start, samples = time.perf_counter(), 0
    for x in batches():
        x.sum()
        samples += x.shape[:-3].numel()
    return samples / (time.perf_counter() - start)


def main() -> None:
    """Run ours and the peers in turn and print the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    dataset = Dataset(x, torch.arange(IMAGES) % 10, x[:BATCH], torch.zeros(BATCH, dtype=torch.int64), mean, std, 10)
    runs = {
        "PIL, DataLoader": published(dataset),
        "tensors, DataLoader": tensors(dataset),
        "ours, 1 model": ours(dataset, [0]),
        "ours, 8 models": ours(dataset, list(range(8))),
        "ours, 8 models of one seed": ours(dataset, [0] * 8),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for batches in runs.values():
        rate(batches)
    for _ in range(REPETITIONS):
        for name, batches in runs.items():
            rates[name].append(rate(batches))
    title = "Samples per second into the model: batches of tensors against a DataLoader"
    table = Table("who", "samples per second", "spread", "times PIL", title=title)
    base = statistics.median(rates["PIL, DataLoader"])
    for name, values in rates.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:,.0f}", f"{min(values):,.0f} to {max(values):,.0f}", f"{median / base:.1f}")
    about = f"DataLoaders have {WORKERS} workers; {REPETITIONS} repetitions of {IMAGES:,} images, batches of {BATCH}"
    show(table, "data", ("torch", "torchvision", "flatmin-sweep"), about=about)


if __name__ == "__main__":
    main()
