"""What the selective scan costs on a CPU: ours and mamba-ssm's reference, at the size of the published network.

    PYTHONPATH=. python benchmarks/scan.py [--repeats 20]

A forward and a backward pass over the same inputs, each implementation in its own process, on one thread. The reference
runs once, for one or more minutes; ours runs before and after it, so that other load on the machine affects both. Peak
memory is the process's growth beyond its inputs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from mamba_reference import HOW_TO_GET_IT, load_reference
from torch import Tensor

from trainables.beam.mamba import selective_scan

BATCH, TOKENS, WIDTH, STATES = 8, 962, 128, 16


@dataclass(frozen=True)
class Cost:
    """Wall seconds of every run, and the peak memory of them all in MiB."""

    forward_s: list[float]
    backward_s: list[float]
    peak_mb: float

    @property
    def both_s(self) -> list[float]:
        return [forward + backward for forward, backward in zip(self.forward_s, self.backward_s, strict=True)]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = [
        normal(BATCH, WIDTH, TOKENS),
        F.softplus(normal(BATCH, WIDTH, TOKENS) - 3),
        -torch.arange(1.0, STATES + 1).repeat(WIDTH, 1),
        normal(BATCH, STATES, TOKENS),
        normal(BATCH, STATES, TOKENS),
        torch.ones(WIDTH),
    ]
    return [x.requires_grad_() for x in made]


def cost(reference: bool, repeats: int) -> Cost:
    torch.set_num_threads(1)
    scan: Callable[..., Tensor] = selective_scan
    if reference:
        found = load_reference()
        assert found is not None
        scan = found.scan
    x, forward_s, backward_s = inputs(), [], []
    before_mb = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak
    for _ in range(repeats):
        began = time.perf_counter()
        y = scan(*x)
        halfway = time.perf_counter()
        torch.autograd.grad(y, x, torch.ones_like(y))
        forward_s.append(halfway - began)
        backward_s.append(time.perf_counter() - halfway)
    return Cost(forward_s, backward_s, memory_mb("VmHWM") - before_mb)


def memory_mb(entry: str) -> float:
    """Return this process's VmRSS, its current memory, or VmHWM, its peak, in MiB."""
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def row(name: str, cost: Cost) -> str:
    medians = (statistics.median(times_s) for times_s in (cost.forward_s, cost.backward_s, cost.both_s))
    return f"| {name} | {' | '.join(f'{median_s:.3f}' for median_s in medians)} | {cost.peak_mb:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="of ours, before the reference and after")
    repeats = parser.parse_args().repeats
    if load_reference() is None:
        raise SystemExit(HOW_TO_GET_IT)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        before = pool.apply(cost, (False, repeats))
        theirs = pool.apply(cost, (True, 1))
        after = pool.apply(cost, (False, repeats))
    print(f"B={BATCH}, L={TOKENS}, D={WIDTH}, N={STATES}; medians where there is more than one run")
    print("| scan | forward s | backward s | both s | peak MB |")
    print("|---|---|---|---|---|")
    print(row("mamba-ssm's `selective_scan_ref`", theirs))
    print(row("ours, before it", before))
    print(row("ours, after it", after))
    ratios = sorted(theirs.both_s[0] / both_s for both_s in before.both_s + after.both_s)
    low, middle, high = (ratios[0], statistics.median(ratios), ratios[-1])
    print(f"ours is {middle:.0f} times faster, {low:.0f} to {high:.0f} over {len(ratios)} runs")


if __name__ == "__main__":
    main()
