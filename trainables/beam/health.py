"""Diagnostics of fusion stages that stay useless although the loss falls, and the DBA of guessing.

Shape suffixes: B batch, T tokens, C width, N windows or their steps, K the 64 beams, R ranks of a guess.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trainables.beam.blocks import Fusion
from trainables.beam.data import HasData, samples
from trainables.beam.files import BEAMS
from trainables.beam.metrics import RANKS, guess_scores
from trainables.beam.network import FusionNetwork

STAGES = range(1, 5)  # numbers of a network's fusion stages


@contextlib.contextmanager
def fusion_signs(network: FusionNetwork) -> Iterator[dict[str, tuple[Tensor, Tensor | int]]]:
    """Yield a dict that each forward pass in this context fills with sums and counts, for fusion stages 1 to 4.

    zeros_<stage>: share of exact zeros in what the stage's blocks add to the tokens or, without a residual, replace
        them with. With the published initialiser it can be all zeros; such a stage gets no gradient either.
    size_<stage>: mean absolute output of the blocks, before the LayerNorm hides it.
    mean_<stage>, square_<stage>: mean and mean square of the stage's output, from which `stage_spreads` computes
        std_<stage>.
    """
    signs: dict[str, tuple[Tensor, Tensor | int]] = {}

    def look(stage: int, residual: bool, blocks: nn.Module, given: tuple[Tensor, ...], out_BTC: Tensor) -> None:
        added_BTC = out_BTC - given[0] if residual else out_BTC
        signs[f"zeros_{stage}"] = (added_BTC == 0).sum(), out_BTC.numel()
        signs[f"size_{stage}"] = out_BTC.abs().sum(dtype=torch.float32), out_BTC.numel()

    def look_after(stage: int, module: nn.Module, given: tuple[Tensor, ...], out_BTC: Tensor) -> None:
        # In double precision, for the difference of two large numbers in the variance.
        signs[f"mean_{stage}"] = out_BTC.sum(dtype=torch.float64), out_BTC.numel()
        squares = torch.linalg.vector_norm(out_BTC, dtype=torch.float64).square()
        signs[f"square_{stage}"] = squares, out_BTC.numel()

    hooks = []
    try:
        for stage, fusion in zip(STAGES, network.fusions, strict=True):
            assert isinstance(fusion, Fusion)
            hooks.append(fusion.blocks.register_forward_hook(functools.partial(look, stage, fusion.residual)))
            hooks.append(fusion.register_forward_hook(functools.partial(look_after, stage)))
        yield signs
    finally:
        for hook in hooks:
            hook.remove()


def stage_spreads(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Return std_<stage>, the standard deviation of each fusion stage's output, and None for mean_ and square_<stage>.

    std_<stage> is None if its variance is not finite.
    """
    spreads: dict[str, float | None] = {}
    for stage in STAGES:
        variance = scores[f"square_{stage}"] - scores[f"mean_{stage}"] ** 2
        spreads[f"std_{stage}"] = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else None
        spreads |= {f"mean_{stage}": None, f"square_{stage}": None}
    return spreads


def fusion_part(name: str) -> str | None:
    """Return the fusion stage, fusion_1 to fusion_4, of the named parameter; None if it belongs to none.

    The name may be of a fusion network or of one that contains it.
    """
    found = re.search(r"(?:^|\.)fusions\.(\d+)\.", name)
    return f"fusion_{int(found.group(1)) + 1}" if found else None


def dba_of_guessing(config: HasData) -> float:
    """Return the DBA on held-out samples, except those scored apart, of always guessing the same three beams.

    The beams are chosen greedily to maximise DBA on the training samples, one set for all steps.
    """
    train, val = (samples(config, split) for split in ("train", "val"))
    pooled = val.side.take(~val.apart_N[val.windows])
    seen_N, held_out_N = (torch.from_numpy(val.beams(side)).flatten() for side in (train.side, pooled))
    guesses: list[int] = []
    for _ in range(RANKS):  # greedily: there are 40 000 sets of three
        dbas = [_dba([*guesses, beam], seen_N) if beam not in guesses else -1.0 for beam in range(BEAMS)]
        guesses.append(max(range(BEAMS), key=dbas.__getitem__))
    return _dba(guesses, held_out_N)


def _dba(guesses: list[int], beam_N: Tensor) -> float:
    """Return the DBA of these guesses in this order; ranks not filled yet repeat the last guess."""
    guess_R = torch.tensor([*guesses, *guesses[-1:] * (RANKS - len(guesses))])
    dba_K = guess_scores(guess_R.expand(BEAMS, -1), torch.arange(BEAMS))["dba"].double()
    return float(dba_K @ torch.bincount(beam_N, minlength=BEAMS).double()) / len(beam_N)
