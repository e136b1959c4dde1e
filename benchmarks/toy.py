"""The training loop that the benchmarks tune: so small that they measure everything around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from trainables.contract import Trial

EPOCHS = 5


def linear_regression(lr: float) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's metrics; `sent_at` is when they leave the loop, in seconds since the Unix epoch."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    targets = inputs.sum(dim=1, keepdim=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(EPOCHS):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"loss": loss.item(), "sent_at": time.time()}


def train(trial: Trial) -> Iterator[dict[str, float]]:
    config: dict[str, Any] = trial.config
    yield from linear_regression(config["lr"])
