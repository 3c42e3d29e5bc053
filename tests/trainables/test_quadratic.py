"""Measures of a quadratic at its minimum, taken by a study, against the closed forms of its Hessian."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from scipy.stats import ks_1samp, uniform
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.runner import RunOptions
from flatmin.trainables.datasets.quadratic import quadratic

STUDY = """\
study: quadratics
settings: {dataset: quadratic, network: linear_at_zero, optimizer: sgd, epochs: 1, batch_size: 100, precision: fp64}
cases:
  - axes: {quadratic_flat: [0, 50]}
  - axes: {quadratic_curvature: [7]}
measures:
  - lpf(sigma=1, metric=identity)
  - lambda_max(metric=identity, tolerance=1e-6)
  - hessian_trace(metric=identity)
  - hessian_frobenius(metric=identity)
  - effective_dimension(metric=identity)
  - eps_sharpness(direction=top_eigenvector, epsilon=0.01, metric=identity)
  - eps_sharpness(metric=identity)
"""

CASES = [(0, None), (50, None), (0, 7.0)]


def spectrum(**settings: Any) -> Tensor:
    """Return the eigenvalues of the Hessian 2 X^T X / n of the mean squared error."""
    x = quadratic(Path(), **settings).train_x
    eigenvalues: Tensor = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    return eigenvalues


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Return the rows of `sharpness/`, with the settings that tell the models apart."""
    folder = tmp_path_factory.mktemp("quadratics")
    (folder / "study.yaml").write_text(STUDY)
    options = LaunchOptions(run=RunOptions(gpus_per_trial=0), inline=True)
    results = launch(str(folder / "study.yaml"), folder / "r", (), options).results
    models = results.models()
    assert (models["train_loss"] == 0).all(), "a step at the minimum leads nowhere"
    columns = ["model_id", "quadratic_flat", "quadratic_curvature"]
    return results.sharpness().merge(models[columns], on="model_id")


@pytest.mark.parametrize(("flat", "curvature"), CASES)
def test_measures_at_the_minimum(measured: pd.DataFrame, flat: int, curvature: float | None) -> None:
    given = measured["quadratic_curvature"].eq(curvature) if curvature else measured["quadratic_curvature"].isna()
    own = measured[(measured["quadratic_flat"] == flat) & given].set_index("measure")
    h = spectrum(quadratic_flat=flat, quadratic_curvature=curvature)
    exact = own[own["label"] != "eps_sharpness(metric=identity)"]
    expected = {
        "lpf": h.sum() / 2,
        "lambda_max": h.max(),
        "hessian_trace": h.sum(),
        "hessian_frobenius": h.square().sum().sqrt(),
        "effective_dimension": (h / (h + 1)).sum(),
        "eps_sharpness": (h.max() / 0.02).sqrt(),
    }
    assert len(exact) == len(expected)
    assert exact["converged"].all()
    for name, value in expected.items():
        row = exact.loc[name]
        assert abs(row["value"] - float(value)) <= max(4 * row["stderr"], 1e-4 * float(value)), name
        assert row["stderr"] <= 0.05 * float(value), name
    (along_the_gradient,) = own[own["label"] == "eps_sharpness(metric=identity)"]["value"]
    assert math.isnan(along_the_gradient), "there is no gradient"


def test_the_smallest_eigenvalues_are_drawn_again() -> None:
    plain, some, more = (spectrum(quadratic_flat=flat) for flat in (0, 40, 60))
    assert plain.min() > 1e-3
    assert ((some[:40] > 0.99e-5) & (some[:40] < 1e-3)).all()
    torch.testing.assert_close(some[40:], plain[40:], rtol=1e-9, atol=0)
    torch.testing.assert_close(more[60:], plain[60:], rtol=1e-9, atol=0)
    assert torch.isclose(more[:60, None], some[None, :40], rtol=1e-6).any(dim=0).all(), "others stay as they are"
    flat = spectrum(quadratic_flat=100)
    assert ks_1samp((flat - 1e-5) / (1e-3 - 1e-5), uniform.cdf).pvalue > 0.01


def test_a_curvature_scales_every_eigenvalue() -> None:
    small, large = spectrum(quadratic_curvature=1.0), spectrum(quadratic_curvature=50.0)
    torch.testing.assert_close(large, 50 * small)
    assert ks_1samp((small - 0.9) / 0.2, uniform.cdf).pvalue > 0.01


def test_the_eigenvalues_of_gram_matrices() -> None:
    """Those of G^T G / 2 with G [100, 100] reach from about 0 to 2 x 100, with a mean of 50 (Marchenko and Pastur)."""
    h = torch.stack([spectrum(quadratic_seed=seed) for seed in range(20)])
    assert h.max(dim=1).values.mean().item() == pytest.approx(4 * 100 / 2, rel=0.05)
    assert h.mean().item() == pytest.approx(50, rel=4 * math.sqrt(2 / (20 * 100 * 100)))
    assert not torch.equal(h[0], h[1])


def test_both_ways_to_draw_eigenvalues_are_refused() -> None:
    with pytest.raises(RequestError, match="quadratic_flat = 5 and quadratic_curvature = 3: the second draws every"):
        quadratic(Path(), quadratic_flat=5, quadratic_curvature=3.0)
