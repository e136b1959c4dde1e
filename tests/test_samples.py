"""A batch is divided over ranks and micro-batches: every sample once, and no part that is much smaller than another."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.samples import Batch, Ranks, epoch_shares, on_device, share_of


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 8, 40])
def test_micro_batches_are_as_few_as_fit_and_of_even_sizes(micro_batch: int | None, ranks: int) -> None:
    for samples in range(1, 33):
        batch = torch.randperm(samples)
        for rank in range(min(ranks, samples)):
            share = share_of(batch, Ranks(rank, ranks), micro_batch)
            mine, sizes = batch[rank::ranks], [len(micro) for micro in share.micros]
            assert torch.equal(torch.cat(share.micros), mine)
            assert len(sizes) == -(-len(mine) // (micro_batch or len(mine)))
            assert max(sizes) <= (micro_batch or len(mine))
            assert max(sizes) - min(sizes) <= 1


def test_none_is_left_over_for_a_micro_batch_of_its_own() -> None:
    (share,) = epoch_shares(9, 9, 8, Ranks(), seed=0)
    assert [len(micro) for micro in share.micros] == [5, 4]


def test_a_rank_without_a_sample_passes_another_ranks_through_and_does_not_count_it() -> None:
    share = share_of(torch.tensor([5, 3]), Ranks(2, 3), 8)
    assert ([micro.tolist() for micro in share.micros], share.weight, share.effective) == ([[5]], 0.0, 2)


def test_an_epoch_may_have_only_some_of_the_samples_and_each_has_its_own() -> None:
    epochs = [epoch_shares(40, 4, None, Ranks(), seed, 10) for seed in range(40)]
    drawn = [torch.cat([micro for share in shares for micro in share.micros]).tolist() for shares in epochs]
    assert all(len(shares) == 2 and len(set(samples)) == 8 for shares, samples in zip(epochs, drawn, strict=True))
    assert {sample for samples in drawn for sample in samples} == set(range(40))
    (share,) = epoch_shares(40, 24, None, Ranks(), 0, 10)
    assert share.effective == 10
    assert len(epoch_shares(10, 4, None, Ranks(), 0, 40)) == 2


class Busy:
    """Samples that take a while to read, and note how many threads read at once."""

    def __init__(self) -> None:
        self.readers, self.most = 0, 0
        self.counting = threading.Lock()

    def __len__(self) -> int:
        return 9

    def __getitem__(self, indices: Tensor) -> Batch:
        with self.counting:
            self.readers += 1
            self.most = max(self.most, self.readers)
        time.sleep(0.05)
        with self.counting:
            self.readers -= 1
        return {"index": indices}


def test_one_thread_reads_at_a_time_also_while_a_step_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A post-mortem reads a step's samples while the batch after it is on its way. As on a GPU, but without one."""
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("torch.Tensor.to", lambda tensor, *args, **kwargs: tensor)
    gpu: Any = SimpleNamespace(type="cuda")
    samples, micros = Busy(), torch.arange(9).split(3)
    batches = on_device(samples, micros, gpu)
    next(batches)
    again = on_device(samples, micros[:1], gpu)
    assert next(again)["index"].tolist() == [0, 1, 2]
    assert [batch["index"][0].item() for batch in batches] == [3, 6]
    assert samples.most == 1
