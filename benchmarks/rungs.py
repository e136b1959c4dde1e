"""After which epoch a scheduler may judge: how soon a search's trials are ranked as after their last epoch.

    python launch.py --space rebuild --set search.sampler=random --set scheduler.name=none --set 'try_first=[]' \\
        --trials 24 --name whole
    PYTHONPATH=. python benchmarks/rungs.py results/whole

For each epoch of the trials that ran to the end: Spearman's rank correlation of their objective with that of the last
epoch, the same among the better half (by the last epoch), and how many of the best third would have been kept by
keeping the better half. If the second correlation is near or below zero, halving after that epoch sorts out bad
settings, but among the good ones, to which a sampler soon keeps, it does harm: set a later `scheduler.grace_epochs`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from whole_trials import whole_trials

from search.learning.features import Array


def table(value_TE: Array) -> str:
    """Return the Markdown table of T trials by E epochs; larger is better."""
    last_T, third, half = value_TE[:, -1], len(value_TE) // 3, (len(value_TE) + 1) // 2
    order = np.argsort(-last_T)
    lines = [
        "| epoch | rank correlation with the last | among the better half | of the best third in the better half |",
        "|---|---|---|---|",
    ]
    for epoch, value_T in enumerate(value_TE.T, 1):
        told = [spearmanr(value_T[kind], last_T[kind]).statistic for kind in (order, order[:half])]
        kept = {*order[:third]} & {*np.argsort(-value_T)[: len(value_TE) // 2]}
        lines.append(f"| {epoch} | {told[0]:.2f} | {told[1]:.2f} | {len(kept)} of {third} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results folder whose trials ran to the end")
    _, _, score_TE = whole_trials([parser.parse_args().results])
    if len(score_TE) < 3:
        parser.error("fewer than three trials ran to the end; the order of those says nothing")
    print(f"{len(score_TE)} trials of {len(score_TE[0])} epochs\n\n{table(-score_TE)}")


if __name__ == "__main__":
    main()
