"""The stability edge searched by Ray Tune's OptunaSearch and ASHA as documented; for ray 2.60.

https://docs.ray.io/en/latest/tune/api/suggestion.html, https://docs.ray.io/en/latest/tune/api/schedulers.html
"""

from __future__ import annotations

import logging

from divergence_edge import EPOCHS, RANGES, REDUCTION, Budget
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch, optuna_search


def search(budget: Budget) -> None:
    """Spend the budget, one trial at a time, with events in the order of Tune's `_process_trial_result`."""
    optuna_search.logger.setLevel(logging.ERROR)  # it warns of every NaN that it cannot pass to Optuna
    searcher = OptunaSearch(metric="loss", mode="min", seed=budget.seed)
    searcher.set_search_properties("loss", "min", {name: tune.loguniform(*RANGES[name]) for name in RANGES})
    scheduler = ASHAScheduler(
        time_attr="training_iteration",
        metric="loss",
        mode="min",
        max_t=EPOCHS,
        grace_period=budget.grace,
        reduction_factor=REDUCTION,
    )
    while budget.left:
        trial = Trial("edge", stub=True, trial_id=f"trial-{len(budget.trials)}")
        scheduler.on_trial_add(None, trial)
        for epoch, loss in budget.train(searcher.suggest(trial.trial_id)):
            result = {"loss": loss, "training_iteration": epoch}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                scheduler.on_trial_complete(None, trial, result)
                searcher.on_trial_complete(trial.trial_id, result)
                break
            searcher.on_trial_result(trial.trial_id, result)
