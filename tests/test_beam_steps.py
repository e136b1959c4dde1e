"""Several beams per window, and windows of any history: the network, its loss, its scores and its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from small_beam import GPS_WIDTH, SMALL, noise
from test_beam_losses import brute_force_dba
from torch import Tensor

from trainables.beam.config import SENSORS, BeamLoss, Data, Modality, Model
from trainables.beam.fusion import Config, beam_loss, by_scenario, draw_missing, everywhere, loss, score
from trainables.beam.metrics import beam_scores
from trainables.beam.network import Ahead, FusionNetwork
from trainables.contract import UserError

BLOCKS: tuple[Literal["uni", "bi", "cs_bi", "transformer"], ...] = ("uni", "bi", "cs_bi", "transformer")
NAMED = {"5to1": (5, 1), "10to5": (10, 5), "20to5": (20, 5)}


def data_of(history: int, steps: int) -> Data:
    return Data(root="nowhere", history=history, steps=steps, image_size=32)


def held_out(count: int, data: Data) -> dict[str, Tensor]:
    """Windows of noise, none of which is kept apart."""
    return {**noise(count, data), "apart": torch.zeros(count, dtype=torch.bool)}


def network(model: Model, data: Data) -> FusionNetwork:
    return FusionNetwork(model, data, GPS_WIDTH)


MODELS = [replace(SMALL, block=block) for block in BLOCKS] + [replace(SMALL, block="bi", ln_shape="plane")]


@pytest.mark.parametrize("model", MODELS, ids=[*BLOCKS, "plane"])
@pytest.mark.parametrize("name", NAMED)
def test_every_block_trains_on_every_history(model: Model, name: str) -> None:
    history, steps = NAMED[name]
    data = data_of(history, steps)
    built, batch = network(model, data), noise(2, data)
    assert built(batch).shape == ((2, 64) if steps == 1 else (2, steps, 64))
    ((summed, windows),) = loss(built, batch, Config(data=data, model=model, missing_prob=0.5)).values()
    summed.backward()
    assert windows == 2
    without = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_gradient_reaches_the_memory_and_every_step_changes_the_logits() -> None:
    data = data_of(2, 3)
    built, batch = network(SMALL, data).eval(), noise(4, data)
    logits = built(batch)
    assert (logits.diff(dim=1).abs().amax(2) > 1e-3).all()
    logits[:, -1].sum().backward()
    gradients = [parameter.grad for part in (built.ahead, built.head) if part for parameter in part.parameters()]
    assert len(gradients) == 6 + 6
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_the_steps_follow_the_published_equations() -> None:
    ahead, head = Ahead(4), torch.randn(2, 64)
    memory, weights = head, dict(ahead.memory.named_parameters())
    logits, expected = torch.zeros(2, 64), []
    for _ in range(4):
        given = F.linear(logits, weights["weight_ih"], weights["bias_ih"]).chunk(3, 1)
        kept = F.linear(memory, weights["weight_hh"], weights["bias_hh"]).chunk(3, 1)
        reset, update = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
        memory = (1 - update) * (given[2] + reset * kept[2]).tanh() + update * memory
        logits = logits + ahead.change(memory)
        expected.append(logits)
    torch.testing.assert_close(ahead(head), torch.stack(expected, 1))


@pytest.mark.parametrize("kind", ["focal", "ce"])
def test_the_loss_of_a_window_is_the_mean_over_its_steps(kind: Literal["focal", "ce"]) -> None:
    logits, beam, settings = torch.randn(3, 5, 64), torch.randint(64, (3, 5)), BeamLoss(kind)
    each = torch.stack([beam_loss(logits[:, p], beam[:, p], settings) for p in range(5)])
    torch.testing.assert_close(beam_loss(logits, beam, settings), each.mean(0))


def test_scores_of_several_steps_equal_the_definition_with_the_steps_flattened() -> None:
    beam = torch.randint(64, (40, 5))
    near = (beam + torch.randint(-6, 7, beam.shape)).clamp(0, 63)
    logits = torch.randn(40, 5, 64) + 3 * F.one_hot(near, 64)
    means = {name: values.mean().item() for name, values in beam_scores(logits, beam).items()}
    assert means == pytest.approx(brute_force_dba(logits.flatten(0, 1).tolist(), beam.flatten().tolist()), abs=1e-6)


def test_a_step_that_is_not_finite_costs_only_itself() -> None:
    logits = torch.zeros(1, 2, 64)
    logits[0, :, 7] = 1.0
    logits[0, 1, 3] = torch.nan
    assert beam_scores(logits, torch.tensor([[7, 7]]))["top1"].tolist() == [[100.0, 0.0]]


def flat_dba(logits: Tensor, beam: Tensor) -> float:
    return brute_force_dba(logits.reshape(-1, 64).tolist(), beam.flatten().tolist())["dba"]


@torch.no_grad()
def test_a_score_counts_every_step_and_batches_of_any_size_add_up() -> None:
    data = data_of(2, 3)
    config = Config(data=data, model=SMALL, score_without=("image", "lidar"), score_each=True)
    built, batch = network(SMALL, data).eval(), held_out(7, data)
    sums: dict[str, list[float]] = {}
    for rows in (slice(0, 2), slice(2, 7)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        for name, (summed, count) in score(built, part, config, ("scenario31", "scenario32")).items():
            before = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [before[0] + float(summed), before[1] + float(count)]

    logits, beam = built(batch), batch["beam"]
    maps = built.first_maps(batch)
    gone: dict[str, list[Modality]] = {"missing": ["image", "lidar"], **{f"without_{x}": [x] for x in built.sensors}}
    less = {
        name: built.fuse(built.withhold(maps, everywhere(sensors, beam)), batch["gps"])
        for name, sensors in gone.items()
    }
    assert less.keys() == {"missing", "without_image", "without_lidar", "without_radar"}
    expected = {
        "dba": (flat_dba(logits, beam), 21),
        **{f"dba_{name}": (flat_dba(without, beam), 21) for name, without in less.items()},
        **{f"dba_step{p + 1}": (flat_dba(logits[:, p], beam[:, p]), 7) for p in range(3)},
        "dba_31": (flat_dba(logits[::2], beam[::2]), 12),
        "dba_32": (flat_dba(logits[1::2], beam[1::2]), 9),
    }
    assert {name: count for name, (_, count) in expected.items()} == {name: sums[name][1] for name in expected}
    for name, (dba, count) in expected.items():
        assert sums[name][0] / count == pytest.approx(dba, abs=1e-5), name


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_windows_that_are_kept_apart_count_towards_their_own_scenario_alone(steps: int) -> None:
    data = data_of(2, steps)
    config = Config(data=data, model=SMALL, score_without=("image",), score_each=True)
    built, batch = network(SMALL, data).eval(), noise(6, data)
    batch["apart"] = torch.tensor([False, True, True, False, False, True])
    batch["scenario"] = batch["apart"].long()
    pooled = {name: tensor[~batch["apart"]] for name, tensor in batch.items()}
    both, alone = (score(built, part, config, ("scenario31", "adaptation_31")) for part in (batch, pooled))
    of_windows = {name for name in both if not name.startswith(("zeros", "size", "mean", "square"))}
    assert {"dba", "top1", "top2", "top3", "dba_missing", "dba_without_radar", "dba_31"} <= of_windows
    for name in of_windows - {"dba_adaptation_31"}:
        for with_others, without in zip(both[name], alone[name], strict=True):
            torch.testing.assert_close(with_others, without)
    assert both["dba_adaptation_31"][1] == 3 * steps
    assert alone["dba_adaptation_31"][1] == 0


def test_windows_of_one_step_have_no_score_per_step() -> None:
    data = data_of(2, 1)
    names = score(network(SMALL, data).eval(), held_out(3, data), Config(data=data, model=SMALL)).keys()
    assert not [name for name in names if "step" in name]


def test_scenarios_of_one_step_and_of_several_are_counted_alike() -> None:
    dba, scenario = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 1])
    one = by_scenario(dba, scenario, ("scenario31", "scenario32"))
    twice = by_scenario(torch.stack([dba, dba], 1), scenario, ("scenario31", "scenario32"))
    assert {name: (float(a), int(b)) for name, (a, b) in one.items()} == {"dba_31": (1.0, 1), "dba_32": (0.5, 2)}
    assert {name: (float(a), int(b)) for name, (a, b) in twice.items()} == {"dba_31": (2.0, 2), "dba_32": (1.0, 4)}


def test_what_is_missing_is_missing_from_a_window_not_from_a_step() -> None:
    beam = torch.zeros(6, 5, dtype=torch.int64)
    assert everywhere(["radar"], beam)["radar"].tolist() == [True] * 6
    assert {gone.shape for gone in draw_missing(SENSORS, len(beam), 0.5, beam.device).values()} == {(6,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (data_of(3, 1), r"fusions\.0\.position_TC is \[26, 4\], and \[38, 4\] here; .*data\.history"),
        (data_of(2, 3), r"ahead\.memory\.weight_ih is not among them, and \[192, 64\] here"),
        (replace(data_of(2, 1), modalities=("image", "lidar", "gps")), r"position_TC is \[26, 4\], and \[18, 4\] here"),
    ],
)
def test_weights_of_another_network_are_refused(change: Data, message: str) -> None:
    model = replace(SMALL, ln_shape="plane", align_backward=False, residual=False)
    weights = network(model, data_of(2, 1)).state_dict()
    with pytest.raises(UserError, match=message):
        network(model, change).load_state_dict(weights)


def test_weights_of_the_same_network_are_taken() -> None:
    data = data_of(2, 3)
    built, other = (network(SMALL, data).eval() for _ in range(2))
    other.load_state_dict(built.state_dict())
    batch = noise(2, data)
    assert torch.equal(built(batch), other(batch))
