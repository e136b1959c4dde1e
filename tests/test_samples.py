"""A batch is divided over ranks and micro-batches: every sample once, and no part that is much smaller than another."""

from __future__ import annotations

import pytest
import torch

from trainables.samples import Ranks, epoch_shares, share_of


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
