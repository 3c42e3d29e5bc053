"""Counter-based streams: known values, moments, independence of everything but (seed, stream, step, index)."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from flatmin.stack import Streams, normal, permutation, rademacher, stream_key, uniform
from flatmin.stack.streams import bits_at, draws_from, dropout_mask, layer_uniform


def splitmix64(seed: int, count: int) -> list[int]:
    """Return the reference generator's numbers, in plain Python integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    return [mix((mix(seed) + (index + 1) * 0x9E3779B97F4A7C15) & mask) for index in range(count)]


def test_bits_are_splitmix64() -> None:
    ours = bits_at(torch.tensor(12345), torch.arange(20)) & 0x7FFFFFFFFFFFFFFF
    assert ours.tolist() == [number & 0x7FFFFFFFFFFFFFFF for number in splitmix64(12345, 20)]


def test_frozen_numbers() -> None:
    """The streams of this version; a change would retrain every model that anybody has."""
    assert stream_key("order", 3) == 3898695566207217952
    assert permutation(stream_key("order", 3), 8).tolist() == [2, 3, 1, 6, 4, 0, 5, 7]
    assert uniform(stream_key("label noise", 0), (3,)).tolist() == pytest.approx(
        [0.15859200474349233, 0.3004030580641691, 0.8973683122605147], abs=1e-15
    )


@pytest.mark.parametrize("seed", range(3))
def test_distributions(seed: int) -> None:
    """Kolmogorov-Smirnov and moments on 50,000 numbers of each kind."""
    assert stats.kstest(uniform(stream_key("u", seed), (50_000,)).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(stream_key("n", seed), (50_001,)).numpy(), "norm").pvalue > 1e-3
    signs = rademacher(stream_key("r", seed), (50_000,))
    assert set(torch.unique(signs).tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / 50_000**0.5
    for apart in (1, 8, 63, 64):  # of one word of the stream and of its neighbours
        assert abs(float((signs[apart:] * signs[:-apart]).mean())) < 4 / 49_000**0.5


def test_streams_do_not_correlate() -> None:
    """Neighbouring seeds, steps and streams give unrelated numbers."""
    a = normal(stream_key("n", 0), (20_000,))
    for other in (stream_key("n", 1), stream_key("m", 0), stream_key("n", 0, 1)):
        assert abs(float((a * normal(other, (20_000,))).mean())) < 4 / 20_000**0.5


def test_permutation_is_one_and_uniform() -> None:
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        order = permutation(stream_key("order", seed), 5)
        assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
        counts[torch.arange(5), order] += 1
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-4


def test_keys_depend_on_the_model_alone() -> None:
    keys = torch.tensor([stream_key("training", seed) for seed in range(4)])
    together = Streams(keys, step=7).keys
    assert torch.equal(Streams(keys[2:], step=7).keys, together[2:])
    assert not torch.equal(Streams(keys, step=8).keys, together)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    key = Streams(torch.tensor([stream_key("training", 0)]), 3).keys[0]
    x = torch.ones(200, 100, dtype=torch.float64)
    with draws_from(key):
        first, second = functional.dropout(x, p), functional.dropout(x, p)
        evaluated = functional.dropout(x, p, training=False)
    assert abs(float((first == 0).double().mean()) - p) < 0.02
    assert torch.equal(first, x * dropout_mask(key, 1, x.shape, p) / (1 - p))
    assert not torch.equal(first, second)
    assert torch.equal(evaluated, x)


def test_whole_channels_are_dropped_together() -> None:
    with draws_from(torch.tensor(5)):
        out = functional.dropout2d(torch.ones(8, 6, 4, 4), 0.5)
    per_channel = out.flatten(2)
    assert torch.equal(per_channel.amin(2), per_channel.amax(2))
    assert 0 < int((per_channel[..., 0] == 0).sum()) < 48


def test_rand_like_draws_uniform_numbers_from_the_models_stream() -> None:
    key = Streams(torch.tensor([stream_key("training", 0)]), 3).keys[0]
    with draws_from(key):
        first = torch.rand_like(torch.empty(500, 40, dtype=torch.float64))
        kept = functional.dropout(torch.ones(7, 5), 0.5) > 0
        second = torch.rand_like(torch.empty(500, 1, 1, 1))
    assert stats.kstest(first.flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(first, layer_uniform(key, 1, (500, 40)))
    assert torch.equal(kept, dropout_mask(key, 2, (7, 5), 0.5))
    assert torch.equal(second, layer_uniform(key, 3, (500, 1, 1, 1)).float())
    assert abs(float(torch.corrcoef(torch.stack([first[:, 0], second[:, 0, 0, 0].double()]))[0, 1])) < 0.15


def test_rand_like_of_a_part_of_a_batch_is_that_part_of_the_whole() -> None:
    key = torch.tensor(5)
    whole = torch.empty(10, 3, 2, dtype=torch.float64)
    with draws_from(key):
        expected = torch.rand_like(whole)
    with draws_from(key, first=4):
        assert torch.equal(torch.rand_like(whole[4:7]), expected[4:7])


def test_rand_like_under_vmap_is_each_models_own() -> None:
    keys = Streams(torch.arange(3)).keys

    def draw(key: Tensor, x: Tensor) -> Tensor:
        with draws_from(key):
            return x + torch.rand_like(x)

    x = torch.zeros(4, 2, dtype=torch.float64)
    together = torch.func.vmap(draw, in_dims=(0, None))(keys, x)
    assert torch.equal(together, torch.stack([draw(key, x) for key in keys]))
    assert len(torch.unique(together)) == together.numel()


def test_rand_like_outside_of_a_stack_is_torchs_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ours = torch.rand_like(torch.empty(4))
        torch.manual_seed(3)
        assert torch.equal(ours, torch.rand(4))
