"""The stability edge searched by Optuna alone: TPE, successive halving, and its rule that a NaN fails the trial."""

from __future__ import annotations

import math

import optuna
from divergence_edge import RANGES, REDUCTION, Budget


def search(budget: Budget) -> None:
    """Spend the budget. The objective returns at the first NaN, which Optuna does not require."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=budget.grace, reduction_factor=REDUCTION)
    sampler = optuna.samplers.TPESampler(seed=budget.seed)
    study = optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner)

    def objective(trial: optuna.Trial) -> float:
        setting = {name: trial.suggest_float(name, *RANGES[name], log=True) for name in RANGES}
        loss = math.nan
        for epoch, loss in budget.train(setting):
            if math.isnan(loss):
                return loss
            trial.report(loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    while budget.left:
        study.optimize(objective, n_trials=1)
