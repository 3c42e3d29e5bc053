"""Augmentation: as torchvision does it image by image, evenly drawn, by nothing but a stream and a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, functional

from flatmin.stack import stream_key, uniform
from flatmin.trainables.augmentation import cutout, draws, transform_pixels

KEYS = [stream_key("augmentation", 0, epoch) for epoch in range(3)]
NUMBERS = torch.tensor([[3, 0, 7, 12, 1], [2, 5, 3, 0, 9], [3, 3, 8, 30, 11]])


def images(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


def each(x: Tensor, change: Callable[[Tensor, list[float]], Tensor]) -> Tensor:
    """Apply a function of one image and its eleven uniform numbers, image by image."""
    rows = []
    for row, key, numbers in zip(x, KEYS, NUMBERS, strict=True):
        draws = uniform(key, (int(numbers.max()) + 1, 11))
        rows.append(
            torch.stack([change(image, draws[n].tolist()) for image, n in zip(row, numbers.tolist(), strict=True)])
        )
    return torch.stack(rows)


def cropped(image: Tensor, u: list[float]) -> Tensor:
    padded = functional.pad(image, [4])
    part = functional.crop(padded, int(u[0] * 9), int(u[1] * 9), image.shape[-2], image.shape[-1])
    return flipped(part, u)


def flipped(image: Tensor, u: list[float]) -> Tensor:
    return image.flip(-1) if u[2] < 0.5 else image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 7, 10)])
def test_crops_and_flips_are_torchvisions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, drawn = images(3, 5, *shape, dtype=dtype), draws(torch.tensor(KEYS), NUMBERS)
    assert torch.equal(transform_pixels(x, drawn, "crop_flip"), each(x, cropped))
    assert torch.equal(transform_pixels(x, drawn, "flip"), each(x, flipped))
    assert transform_pixels(x, drawn, "none") is x


@pytest.mark.parametrize("augmentation", ["crop_flip_cutout", "autoaugment_cutout"])
@pytest.mark.parametrize("size", [16, 8, 5])
def test_cutout_is_a_square_of_zeros(augmentation: str, size: int) -> None:
    x = images(3, 5, 3, 32, 24, dtype=torch.float64) + 1

    def cut(image: Tensor, u: list[float]) -> Tensor:
        top, left = int(u[9] * 32) - size // 2, int(u[10] * 24) - size // 2
        square = image.clone()
        if u[8] < 0.5:
            square[:, max(0, top) : top + size, max(0, left) : left + size] = 0
        return square

    expected = each(x, cut)
    assert torch.equal(cutout(x.clone(), draws(torch.tensor(KEYS), NUMBERS), augmentation, size), expected)
    assert 0 < (expected == 0).double().mean() < 0.5


def test_only_what_is_named_cutout_cuts() -> None:
    x = images(3, 5, 3, 8, 8, dtype=torch.float64)
    for augmentation in ("none", "flip", "crop_flip"):
        assert torch.equal(cutout(x.clone(), draws(torch.tensor(KEYS), NUMBERS), augmentation), x)


def test_autoaugment_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 25 policies, both signs, as torchvision does them to one PIL image: but for rounding, to within three levels.

    Where an image is equalised after its colours were rounded in another way, one level may become many.
    """
    n = 1500
    x, numbers, key = images(1, n, 3, 32, 32), torch.arange(n)[None], KEYS[0]
    done = transform_pixels(x, draws(torch.tensor([key]), numbers), "autoaugment_cutout")[0]
    drawn = uniform(key, (n, 11))
    torchvisions = AutoAugment(AutoAugmentPolicy.CIFAR10)
    seen, far = set(), Counter[tuple[str, str]]()
    for image, u, result in zip(x[0], drawn, done, strict=True):
        own = (int(u[3] * 25), u[4:6], (u[6:8] >= 0.5).long())
        seen.add((own[0], *own[2].tolist()))
        monkeypatch.setattr(torchvisions, "get_params", lambda _, own=own: own)
        expected = functional.pil_to_tensor(torchvisions(functional.to_pil_image(cropped(image, u.tolist()))))
        first, second = torchvisions.policies[own[0]]
        far[first[0], second[0]] += int(((result.int() - expected.int()).abs() > 3).sum())
    assert seen == set(product(range(25), range(2), range(2)))
    assert far.pop(("Color", "Equalize")) < 0.02 * 3072 * n / 25
    assert far.total() == 0


def assert_even(found: list[Hashable], values: set[Any]) -> None:
    """Check that all values occur, and their numbers are within five deviations of even."""
    counts = Counter(found)
    assert set(counts) == values
    even = len(found) / len(values)
    assert max(abs(count - even) for count in counts.values()) < 5 * even**0.5


def test_every_window_and_mirror_image_is_as_likely() -> None:
    n = 40_000
    places = torch.arange(1, 122, dtype=torch.int32).reshape(11, 11).expand(1, n, 1, 11, 11)
    moved = transform_pixels(places, draws(torch.tensor([KEYS[0]]), torch.arange(n)[None]), "crop_flip")[0, :, 0]
    row, column = (moved[:, 5, 5] - 1) // 11, (moved[:, 5, 5] - 1) % 11
    mirrored = moved[:, 5, 6] < moved[:, 5, 5]
    assert_even(
        [*zip(row.tolist(), column.tolist(), mirrored.tolist(), strict=True)],
        set(product(range(1, 10), range(1, 10), (False, True))),
    )


def test_every_square_is_as_likely_and_half_of_the_images_have_one() -> None:
    n = 40_000
    drawn = draws(torch.tensor([KEYS[1]]), torch.arange(n)[None])
    left = cutout(torch.ones(1, n, 1, 8, 8), drawn, "crop_flip_cutout", size=4)
    cut = (left[0, :, 0] == 0).flatten(1).any(1)
    assert abs(float(cut.double().mean()) - 0.5) < 5 * 0.5 / n**0.5
    squares = (left[0, cut, 0] == 0).double()
    whole = torch.zeros(8, 12, 12)
    for first in range(8):
        whole[first, first : first + 4] = 1
    sides = whole[:, 2:10, 0]  # what each of the eight windows covers of a side
    every = {tuple(torch.outer(a, b).flatten().tolist()) for a in sides for b in sides}
    assert len(every) == 64
    assert_even([tuple(square.flatten().tolist()) for square in squares], every)


@pytest.mark.parametrize("augmentation", ["crop_flip_cutout", "autoaugment_cutout"])
def test_an_image_depends_on_its_stream_and_number_alone(augmentation: str) -> None:
    whole, keys = images(40, 3, 32, 32), torch.tensor(KEYS)

    def made(numbers: Tensor, keys: Tensor) -> Tensor:
        drawn = draws(keys, numbers)
        return cutout(transform_pixels(whole[numbers], drawn, augmentation).double() + 1, drawn, augmentation)

    together = made(NUMBERS, keys)
    shuffled, order = torch.tensor([2, 0, 1]), torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(made(NUMBERS[shuffled][:, order], keys[shuffled]), together[shuffled][:, order])
    for g in range(3):
        assert torch.equal(made(NUMBERS[g : g + 1, 1:3], keys[g : g + 1])[0], together[g, 1:3])
    assert not torch.equal(together[0, 0], together[1, 2])  # the same example in another epoch


@pytest.mark.gpu
def test_a_gpu_changes_images_as_a_cpu_does() -> None:
    x = images(3, 5, 3, 32, 32)

    def made(device: str) -> Tensor:
        drawn = draws(torch.tensor(KEYS, device=device), NUMBERS.to(device))
        moved = transform_pixels(x.to(device), drawn, "crop_flip_cutout").double() + 1
        return cutout(moved, drawn, "crop_flip_cutout").cpu()

    assert torch.equal(made("cuda"), made("cpu"))
