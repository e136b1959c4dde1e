"""The stability edge searched by this project's ledger, samplers and ASHA, without a cluster."""

from __future__ import annotations

import math
from pathlib import Path

from bare_space import space_of
from divergence_edge import EPOCHS, RANGES, REDUCTION, Budget
from optuna.storages import InMemoryStorage
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from search.ledger import Ledger
from search.sampler import sampler_maker
from search.scheduler import make_scheduler
from search.space.domain import Parameter, Real
from search.space.sections import Scheduler, Search, section
from search.study import new_study
from search.trial import EPOCH, OBJECTIVE


def search(budget: Budget, sampler: str, survival: bool = True) -> None:
    """Spend the budget, one trial at a time, with events in the order of Tune's controller and our recorder."""
    wanted = {"sampler": sampler, "trials": budget.left, "seed": budget.seed, "survival": survival}
    parameters = [Parameter(name, Real(*RANGES[name], log=True)) for name in RANGES]
    halving = Scheduler(name="asha", grace_epochs=budget.grace, reduction=REDUCTION)
    space = space_of(parameters, EPOCHS, section(Search, wanted, "search"), halving)
    ledger = Ledger(space, new_study(InMemoryStorage(), space), sampler_maker(space), Path("no results"))
    scheduler = make_scheduler(space)
    while budget.left:
        opened = ledger.ask("slot")
        assert opened is not None
        trial = Trial("edge", stub=True, config={"values": opened.values}, trial_id=f"trial-{opened.number}")
        scheduler.on_trial_add(None, trial)
        status = _run(budget, ledger, scheduler, trial)
        if status is not None:
            ledger.end("slot", status, "")


def _run(budget: Budget, ledger: Ledger, scheduler: TrialScheduler, trial: Trial) -> str | None:
    """Train one trial; return its status, or None if the budget ended first."""
    result: dict[str, object] = {}
    for epoch, loss in budget.train(ledger.open["slot"].values):
        if math.isnan(loss):
            scheduler.on_trial_complete(None, trial, {EPOCH: epoch - 1})
            return "diverged"
        ledger.report("slot", epoch, {"loss": loss})
        result = {EPOCH: epoch, OBJECTIVE: budget.compared(loss)}
        if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            scheduler.on_trial_complete(None, trial, result)
            return "stopped"
        if epoch == EPOCHS:
            scheduler.on_trial_complete(None, trial, result)
            return "finished"
    return None
