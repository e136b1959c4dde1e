"""What is reported of the fusion stages: what leaves them, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from small_beam import SMALL, simulated
from torch import Tensor, nn

from trainables.beam import fusion, rebuild
from trainables.beam.blocks import Fusion
from trainables.beam.config import Rebuild
from trainables.beam.data import gps_width, samples
from trainables.beam.health import STAGES, fusion_part, stage_spreads
from trainables.beam.network import FusionNetwork
from trainables.contract import Trial
from trainables.loop import evaluate, fit
from trainables.optim import Optim


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> fusion.Config:
    made = fusion.Config(data=simulated(tmp_path_factory.mktemp("cache")), model=SMALL, optim=Optim(batch_size=8))
    fusion.prepare(made)
    return made


def leaving(network: FusionNetwork, batch: dict[str, Tensor]) -> list[Tensor]:
    """What leaves the four stages."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        found.append(out)

    hooks = [stage.register_forward_hook(keep) for stage in network.fusions]
    network(batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_spread_of_what_leaves_a_stage_is_that_of_all_its_values(
    config: fusion.Config, micro_batch: int | None
) -> None:
    network, val = FusionNetwork(config.model, config.data, gps_width(config)).eval(), samples(config, "val")
    for norm in (module.norm for module in network.fusions if isinstance(module, Fusion)):
        nn.init.uniform_(norm.weight, 0.1, 2.0)
        nn.init.normal_(norm.bias, 30.0)  # so that a mean square is nothing like a variance
    scores = evaluate(fusion.task_for(config), network, val, Trial(config), micro_batch)
    everything = leaving(network, val[torch.arange(len(val))])
    for stage, out in zip(STAGES, everything, strict=True):
        assert scores[f"std_{stage}"] == pytest.approx(float(out.double().std(correction=0)), rel=1e-5)
    assert not [name for name in scores if name.startswith(("mean_", "square_"))]


def test_a_spread_that_is_not_finite_is_left_out_and_one_of_nothing_is_zero() -> None:
    scores = {f"{name}_{stage}": 0.5 for name in ("mean", "square") for stage in STAGES}
    scores |= {"square_1": math.inf, "mean_2": math.nan, "square_3": 0.25 - 1e-17, "square_4": 0.5}
    spreads = stage_spreads(scores)
    assert [spreads[f"std_{stage}"] for stage in STAGES] == [None, None, 0.0, 0.5]


def rebuilding(config: fusion.Config, fusion_lr_ratio: float) -> rebuild.Config:
    settings = Rebuild(fusion_lr_ratio=fusion_lr_ratio)
    return rebuild.Config(data=config.data, model=SMALL, optim=config.optim, rebuild=settings, epochs=1)


def test_every_parameter_of_a_stage_and_no_other_is_of_its_part(config: fusion.Config) -> None:
    inside = rebuild.build(rebuilding(config, 1.0), fusion.build(config).state_dict())
    for model, network in ((inside.fusion, inside.fusion), (inside, inside.fusion)):
        stage_of = {id(x): f"fusion_{i}" for i in STAGES for x in network.fusions[i - 1].parameters()}
        for name, parameter in model.named_parameters():
            assert fusion_part(name) == stage_of.get(id(parameter)), name


@pytest.mark.parametrize(("ratio", "trained"), [(0.5, True), (0.0, False)])
def test_a_rebuild_reports_the_gradients_of_the_stages_that_it_trains(
    config: fusion.Config, ratio: float, trained: bool
) -> None:
    settings = rebuilding(config, ratio)
    (report,) = fit(rebuild.task_for(settings, fusion.build(config).state_dict(), {}), Trial(settings))
    norms = {name for name in report.metrics if name.startswith("grad_norm_")}
    assert norms == ({f"grad_norm_fusion_{stage}" for stage in STAGES} if trained else set())
    assert {f"std_{stage}" for stage in STAGES} <= report.metrics.keys()
