"""A step that goes through torch.compile: the same training, and the same post-mortem."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_task import CPU, SEED, TOY, Config, order

from trainables.contract import Diverged, Trial
from trainables.loop import fit
from trainables.optim import Optim

CONFIG = Config(Optim(lr=0.01, batch_size=8, ema=0.9), dropout=0.2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_trains_and_fails_as_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch goes well, dropout included, and the next one meets a bad sample: one compilation tells both."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for a few kernels
    first, second = (torch.cat(order(CONFIG, epoch)) for epoch in (0, 1))
    bad = next(sample for sample in second.tolist() if sample not in first)  # a ragged batch was left out
    metrics, weights, found = [], [], []
    for compiled in (False, True):
        optim = replace(CONFIG.optim, compile=compiled)
        reports = fit(TOY, Trial(replace(CONFIG, optim=optim, nan_loss_of=bad), seed=SEED, device=CPU))
        report = next(reports)
        assert report.state is not None
        weights.append(report.state()["model"])
        metrics.append({name: value for name, value in report.metrics.items() if name != "samples_per_s"})
        with pytest.raises(Diverged, match=r"loss_square is not finite at lr 0\.01; ") as raised:
            next(reports)
        found.append((raised.value.reason, raised.value.step, raised.value.details["found"]))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)  # under the same names
    assert found[1] == found[0]
