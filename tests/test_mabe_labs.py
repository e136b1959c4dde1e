"""What a lab did not annotate is neither learnt nor tagged in its videos; a lab's score is of its own behaviours."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exports import exported
from sklearn.metrics import f1_score
from small_mabe import challenge_csv, forget_attacks, rows_of, small_config, tag, two_labs
from torch import Tensor, nn

from trainables.contract import UserError
from trainables.mabe.config import CLASSES, FrameLoss, Simulated
from trainables.mabe.data import describe, samples, training_frames, videos_of
from trainables.mabe.metrics import derived, lab_scores, macro_f1_labs
from trainables.mabe.network import Tagger
from trainables.mabe.prepare import prepare_data
from trainables.mabe.simulator import ATTACK, simulate
from trainables.mabe.tagging import Config, build, class_weights, loss, score, scored, weighted_entropy
from trainables.mabe.video import UNLABELLED
from trainables.samples import Batch
from trainables.step import Pairs

FORGETFUL = "SimulatedFive"  # the lab that did not annotate attacks
WEIGHTS = torch.tensor([0.5, 10.0, 15.0, 12.0])

whole_root = two_labs()


@pytest.fixture
def whole(whole_root: Path, tmp_path: Path) -> Config:
    return small_config(whole_root, tmp_path / "cache")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("partial")
    simulate(folder / "root", Simulated(videos=8, seconds=9))
    forget_attacks(folder / "root", FORGETFUL)
    return small_config(folder / "root", folder / "cache")


def all_of(config: Config, split: str) -> Batch:
    side = samples(config, split)
    return side[torch.arange(len(side))]


def of_forgetful(config: Config, batch: Batch) -> Tensor:
    """Whether each window is of the lab that did not annotate attacks, (B,)."""
    prepared = prepare_data(config.data)
    video_B = np.searchsorted(prepared.start, batch["index"].numpy(), side="right") - 1
    return torch.from_numpy(np.array(prepared.lab)[video_B] == FORGETFUL)


def as_other(config: Config) -> Config:
    return replace(config, data=replace(config.data, unlabelled="other"))


def sees_attacks(config: Config) -> Tagger:
    """A tagger that takes every frame for an attack."""
    model = build(config).eval()
    head = list(model.network.head.children())[-1]
    assert isinstance(head, nn.Linear)
    nn.init.constant_(head.bias, 0.0)
    head.bias.data[ATTACK] = 1e3
    return model


def ratios(pairs: Pairs) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in pairs.items() if count}


@pytest.mark.parametrize("split", ["train", "val"])
def test_windows_know_what_their_lab_annotated(partial: Config, split: str) -> None:
    batch = all_of(partial, split)
    forgetful = of_forgetful(partial, batch)
    assert forgetful.any()
    assert not forgetful.all()
    assert batch["known"][:, :ATTACK].all()
    assert torch.equal(batch["known"][:, ATTACK], ~forgetful)
    assert torch.equal(batch["lab"][:, 0], forgetful)  # the first by name
    assert torch.equal(batch["lab"][:, 1], ~forgetful)


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_is_masked_where_all_is_annotated_or_by_wish(whole: Config, partial: Config, split: str) -> None:
    assert "known" not in all_of(whole, split)
    assert "known" not in all_of(as_other(partial), split)


def test_the_line_on_the_data_tells_who_labels_what(whole: Config, partial: Config) -> None:
    assert describe(partial).endswith("; of 8 videos, 8 label investigation, 8 label mount, 4 label attack")
    for config in (whole, as_other(partial)):
        assert "label" not in describe(config)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_over_the_known_classes(smoothing: float) -> None:
    logits, label = torch.randn(2, 10, 4), torch.randint(3, (2, 10))
    label[1, 6:] = UNLABELLED
    known = torch.tensor([[True, True, True, False]]).expand(2, 4)
    summed, count = weighted_entropy(
        logits.masked_fill(~known[:, None], -torch.inf), label, WEIGHTS, smoothing, known_BK=known
    )
    three = logits[..., :3].flatten(0, 1), label.flatten()
    loss_N = F.cross_entropy(*three, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="none")
    weight_N = torch.where(label != UNLABELLED, WEIGHTS[label.clamp(min=0)], 0.0).flatten()
    torch.testing.assert_close(summed, (loss_N * weight_N).sum())
    torch.testing.assert_close(count, weight_N.sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_usual_one_where_a_window_knows_all(smoothing: float) -> None:
    logits, label = torch.randn(2, 10, 4), torch.randint(4, (2, 10))
    usual = weighted_entropy(logits, label, WEIGHTS, smoothing)
    masked = weighted_entropy(logits, label, WEIGHTS, smoothing, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(masked, usual)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_unknown_class_gets_no_gradient(partial: Config, smoothing: float) -> None:
    config = replace(partial, loss=FrameLoss(smoothing=smoothing))
    batch = all_of(config, "train")
    forgetful = of_forgetful(config, batch)
    for windows, learns in ((forgetful, False), (~forgetful, True)):
        model = build(config)
        ((summed, _),) = loss(model, {name: x[windows] for name, x in batch.items()}, config).values()
        assert summed.isfinite()
        summed.backward()
        head = list(model.network.head.children())[-1]
        assert isinstance(head, nn.Linear)
        for gradient in (head.weight.grad, head.bias.grad):
            assert gradient is not None
            assert gradient.isfinite().all()
            assert gradient[:ATTACK].abs().amax() > 0
            assert bool((gradient[ATTACK] != 0).any()) == learns


def test_class_weights_are_of_the_frames_as_labelled(partial: Config) -> None:
    """A class that one of the labs annotated is as rare as the loss sees it."""
    _, label = training_frames(partial.data)
    weights = class_weights(FrameLoss(class_weights=None, balance=1.0), label)
    in_loss = weights * torch.bincount(label, minlength=len(CLASSES))
    torch.testing.assert_close(in_loss, in_loss[:1].expand(len(CLASSES)))


def test_a_guess_is_among_the_known_classes(partial: Config) -> None:
    batch = all_of(partial, "val")
    model, forgetful = sees_attacks(partial), of_forgetful(partial, batch)
    with torch.no_grad():
        guess_BT = scored(model, batch, 0)[0].argmax(-1)
        free_BTK = model(batch)
        pairs, as_before = score(model, batch, partial), score(model, batch, as_other(partial))
    assert torch.equal(guess_BT[forgetful], free_BTK[forgetful][..., :ATTACK].argmax(-1))
    assert (guess_BT[~forgetful] == ATTACK).all()
    frames_B = (batch["label"] != UNLABELLED).sum(1)
    assert int(pairs["precision_attack"][1]) == int(frames_B[~forgetful].sum())
    assert torch.equal(as_before["recall_attack"][0], pairs["recall_attack"][0])
    assert float(pairs["val_ce"][0]) < torch.inf


def test_where_no_behaviour_was_annotated_nothing_is_scored(partial: Config) -> None:
    """There "other" is all there is, and would be a hit in every frame."""
    batch = all_of(partial, "val")
    bare = of_forgetful(partial, batch)
    batch["known"][bare] = torch.tensor([True, False, False, False])
    model, rest = sees_attacks(partial), {name: x[~bare] for name, x in batch.items()}
    with torch.no_grad():
        assert ratios(score(model, batch, partial)) == pytest.approx(ratios(score(model, rest, partial)))


def test_where_no_behaviour_was_annotated_nothing_is_learnt(partial: Config) -> None:
    prepared = prepare_data(partial.data)
    known = [("other",) if lab == FORGETFUL else prepared.known[v] for v, lab in enumerate(prepared.lab)]
    bare = replace(prepared, known=known)
    left = videos_of(bare, partial.data, "train")
    assert left
    assert all(prepared.lab[v] != FORGETFUL for v in left)
    assert set(videos_of(bare, as_other(partial).data, "train")) == set(videos_of(prepared, partial.data, "train"))
    nothing = replace(prepared, known=[("other",)] * len(prepared.known))
    with pytest.raises(UserError, match="no lab annotated a behaviour"):
        videos_of(nothing, partial.data, "train")


def test_all_is_other_by_wish(partial: Config) -> None:
    """As it was before: whatever is not annotated is other, and a wrong guess counts."""
    config = as_other(partial)
    batch = all_of(config, "val")
    pairs = score(sees_attacks(config), batch, config)
    assert int(pairs["precision_attack"][1]) == int((batch["label"] != UNLABELLED).sum())


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Guesses and labels of three labs: one knows no mounts, and in one nothing happens."""
    lab = torch.arange(12) % 3
    label = torch.randint(4, (12, 40))
    guess = torch.where(torch.rand(12, 40) < 0.7, label, torch.randint(4, (12, 40)))
    label[lab == 1], guess[lab == 1] = (x[lab == 1].where(x[lab == 1] != 2, 0) for x in (label, guess))
    label[lab == 2] = 0
    label[0, 20:] = UNLABELLED
    return guess, label, F.one_hot(lab).bool()


def test_the_score_over_labs_is_scikit_learns_in_each() -> None:
    guess, label, lab = drawn()
    wanted = []
    for number, behaviours in ((0, [1, 2, 3]), (1, [1, 3])):
        here = lab[:, number, None] & (label != UNLABELLED)
        wanted.append(f1_score(label[here].numpy(), guess[here].numpy(), labels=behaviours, average="macro"))
    assert macro_f1_labs(ratios(lab_scores(guess, label, lab))) == {"macro_f1_labs": pytest.approx(np.mean(wanted))}


def test_scores_of_labs_add_up_and_are_not_reported_one_by_one() -> None:
    guess, label, lab = drawn()
    whole = lab_scores(guess, label, lab)
    parts = [lab_scores(guess[i : i + 1], label[i : i + 1], lab[i : i + 1]) for i in range(len(lab))]
    for name, pair in whole.items():
        assert [sum(int(part[name][i]) for part in parts) for i in (0, 1)] == [int(value) for value in pair]
    scores = ratios(whole)
    reported = {**scores, **derived(scores)}
    assert "macro_f1_labs" in {name for name, value in reported.items() if value is not None}
    assert not [name for name in scores if reported[name] is not None]


def test_a_single_lab_has_no_score_over_labs() -> None:
    guess, label, _ = drawn()
    assert lab_scores(guess, label, None) == {}
    assert "macro_f1_labs" not in derived({})


def test_the_tags_of_a_video_are_among_the_known_classes(
    partial: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the CSV alone, with labels and without; and the scores are those of the search."""
    metrics = exported(tmp_path / "model", partial)
    assert partial.data.root is not None
    every = rows_of(Path(partial.data.root))
    rows = [every[v] for v in videos_of(prepare_data(partial.data), partial.data, "val")]
    tags = {}
    for labelled in (True, False):
        given = challenge_csv(Path(partial.data.root), tmp_path / f"given{labelled}", rows, labelled)
        capsys.readouterr()
        assert tag(tmp_path / "model", given, tmp_path / f"out{labelled}") == 0
        if labelled:
            printed = capsys.readouterr().out
            for name in ("macro_f1", "macro_f1_labs", "f1_attack"):
                assert f"{name} {metrics[name]:.4f}" in printed
        for file in sorted((tmp_path / f"out{labelled}").rglob("*.csv")):
            with file.open(newline="") as opened:
                tags[labelled, file.parent.name, file.name] = {row["behaviour"] for row in csv.DictReader(opened)}
    assert [kinds for (_, lab, _), kinds in tags.items() if lab == FORGETFUL]
    assert not [kinds for (_, lab, _), kinds in tags.items() if lab == FORGETFUL and "attack" in kinds]
    for (labelled, lab, name), kinds in tags.items():
        assert kinds == tags[not labelled, lab, name]
