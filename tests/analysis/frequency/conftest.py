"""Tables of a frequency study that nobody had to train: every coefficient rises to 1 by a known law."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest


@dataclass(frozen=True)
class Made:
    models: pd.DataFrame
    epochs: pd.DataFrame
    spectra: pd.DataFrame


def curve(model: str, part: str, k: float, points: Mapping[int, float], **settings: object) -> pd.DataFrame:
    """Rows of `spectra/` of one frequency: value by epoch."""
    text = json.dumps({"label": "fourier", "part": part, **settings}, sort_keys=True)
    frame = pd.DataFrame({"epoch": list(points), "x": k, "y": np.nan, "value": list(points.values())})
    return frame.assign(model_id=model, trial_id=f"t{model}", kind="fourier", settings=text)


class Maker:
    """Makes tables: the coefficient of frequency k is 1 - 2^(-epoch / t), t = scale k^exponent e^(noise z)."""

    curve = staticmethod(curve)

    def __call__(
        self,
        *,
        exponents: Mapping[str, float],
        seeds: int = 4,
        ks: Sequence[float] = (0, 1, 2, 4, 8),
        epochs: Sequence[int] = range(1, 61),
        scale: float = 2.0,
        noise: float = 0.1,
        study: str = "somebody's",
        **settings: object,
    ) -> Made:
        rng, models, curves, losses = np.random.default_rng(0), [], [], []
        at = np.array(epochs)
        for optimizer, exponent in exponents.items():
            for seed in range(seeds):
                name = f"{optimizer}-{seed}"
                times = scale * np.maximum(ks, 1) ** exponent * np.exp(noise * rng.normal(size=len(ks)))
                ratio = 1 - 2 ** (-at[:, None] / times)
                for place, k in enumerate(ks):
                    for part, value in (("ratio", ratio), ("error", 1 - ratio), ("amplitude", ratio / 2)):
                        points = dict(zip(at.tolist(), value[:, place].tolist(), strict=True))
                        curves.append(curve(name, part, k, points, **settings))
                models.append({"model_id": name, "trial_id": f"t{name}", "optimizer": optimizer, "seed": seed})
                loss = ((1 - ratio) ** 2).mean(axis=1)
                accuracy = 0.99 - 0.2 * (1 - ratio[:, -1]) + 0.001 * rng.normal(size=len(at))
                losses.append(
                    pd.DataFrame({"epoch": at, "train_loss": loss, "val_acc": accuracy}).assign(
                        model_id=name, trial_id=f"t{name}"
                    )
                )
        table = pd.DataFrame(models).assign(
            study=study, status="finished", epochs_run=int(at[-1]), gen_gap=0.01, loss_gap=0.02
        )
        return Made(table, pd.concat(losses, ignore_index=True), pd.concat(curves, ignore_index=True))


@pytest.fixture(scope="session")
def make() -> Maker:
    """What makes tables."""
    return Maker()


@pytest.fixture(scope="session")
def made(make: Maker) -> Made:
    """Two optimizers, one with twice the exponent of the other."""
    return make(exponents={"adam": 1.0, "sgd": 2.0})
