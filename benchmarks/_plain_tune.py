"""`digits-sharpness` as plain Ray Tune has it: one model per trial, an ordinary training loop, the published measures.

Run by `end_to_end.py` with a JSON list of settings on the standard input; prints the seconds of each trial, from
within, and those of all of them by the clock, with the processes that Ray starts for them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def train(given: dict[str, Any]) -> None:
    """Train one model until its loss on the training set is low enough, and measure it."""
    import torch
    from ray import tune
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    sys.path.insert(0, str(Path(__file__).parent))
    from _published import Published

    config, started = given["model"], time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    bunch = load_digits()
    split = train_test_split(bunch.data / 16, bunch.target, train_size=1000, random_state=0, stratify=bunch.target)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32) for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    noisy = torch.rand(len(train_y)) < config["label_noise"]
    train_y = torch.where(noisy, torch.randint(0, 10, train_y.shape), train_y)
    loaders = {
        "train": DataLoader(TensorDataset(train_x, train_y), config["batch_size"], shuffle=True),
        "test": DataLoader(TensorDataset(test_x, test_y), config["batch_size"]),
    }
    width = config["width"]
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    rates = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **rates)

    def mean_loss(loader: DataLoader[Any]) -> float:
        with torch.no_grad():
            return sum(float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in loader) / len(
                loader.dataset
            )

    losses = {}
    for epoch in range(1, config["epochs"] + 1):
        for x, y in loaders["train"]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        losses["train"] = mean_loss(loaders["train"])
        stops = losses["train"] <= config["stop_loss"]
        if stops or epoch % config["eval_every"] == 0:
            losses["test"] = mean_loss(loaders["test"])
        if stops:
            break
    parts = Published(model, train_x, train_y).parts
    found = {name: parts[name].run(parts[name].units) for name in ("lpf", "eps_sharpness", "Lanczos")}
    tune.report({**losses, **found, "trial_seconds": time.perf_counter() - started})


def main() -> None:
    """Run the trials, and print the seconds of each, and of all, as JSON."""
    import ray
    from ray import tune

    settings = json.load(sys.stdin)
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"model": tune.grid_search(settings)},
        run_config=tune.RunConfig(verbose=0),
    )
    started = time.perf_counter()
    found = tuner.fit()
    seconds = time.perf_counter() - started
    print(json.dumps({"trials": [result.metrics["trial_seconds"] for result in found], "all": seconds}))


if __name__ == "__main__":
    main()
