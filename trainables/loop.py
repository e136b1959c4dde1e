"""The training loop that the families share: `fit(task, trial)`, a generator that satisfies `trainables.contract`.

A family describes itself in a `Task`; its trainable is then

    def train(trial: Trial) -> Iterator[Report]:
        yield from fit(TASK, trial)

docs/bring-a-model.md has a complete example. There are no hooks: a family that this loop does not suit writes its own
`train(trial)` and reuses functions from here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trainables.contract import Report, Trial, UserError
from trainables.guard import Guard, Replay, Step, settings_of_loss
from trainables.memory import MIB, Memory, Tried, fitting_micro_batch, shape_key, switches, try_step
from trainables.optim import Ema, Patience, adamw, clip_divisor, fused_step, lr_factor, set_lr
from trainables.resume import Best, StoredModel, generators, restore, seed_everything, seed_from, state_of
from trainables.samples import (
    Batch,
    Ranks,
    Samples,
    Share,
    epoch_shares,
    everyones,
    gathered,
    on_device,
    ranks_of,
    share_of,
)
from trainables.step import Loss, Pairs, autocast, backward, checked, compiled, divisor_of, over_ranks, without_gradient


@dataclass(frozen=True)
class Task:
    """A family as the loop sees it: a config class, four required functions and six optional ones.

    config: the class of `Trial.config`, a frozen dataclass with the fields `optim: Optim` and `epochs: int`. A search
        looks for it under the name `Config` in the trainable's module.
    model: builds the module on the CPU, drawing from the seeded global generator; a frozen part may be on the device
        already. A parameter with `requires_grad` False is not trained; with several ranks, the loss of every
        micro-batch must use every other one. A submodule left in eval mode stays in it.
    data: opens the whole split "train" or "val" on every rank; the loop shuffles and divides it. Called in every trial:
        cache slow loading yourself, with `functools.cache` or on disk. `TensorSamples` suits tensors in memory.
    loss: returns the weighted loss terms of a batch by name; their sum is minimised. All terms share one count: the
        same int, such as the number of samples, or the very same scalar tensor, such as that of the valid tokens. It is
        added up over micro-batches and ranks. If the count of a whole batch is zero, the sum itself is minimised. The
        names must be the same in every batch.
    score: returns the validation scores of a batch by name, each with its own count. A batch need not have every
        score; one whose count is zero over the whole split is omitted.
    lr_scale: the learning rate of the named parameter, as a ratio of `optim.lr`.
    derived: metrics computed from the whole split's scores, e.g. macro F1. Called on every rank after the last batch.
        Map a score's name to None to drop it from the report.
    part: the part of the model that the named parameter belongs to, or None. The gradient norm of each part in the
        last step of an epoch is reported as grad_norm_<part>, unless fp16 skipped that step.
    annealed: the config that the loss gets in an epoch, counted from 0, for what changes as training proceeds: teacher
        forcing, a term's weight. Everything else gets the trial's own, and memory is probed with it. `optim.compile`
        compiles anew for each that differs in more than floats, and after eight no more.
    names: describes where the training samples with these indices come from, for the post-mortem of a step.
    saved: whether a checkpoint holds the named parameter or buffer. The others must never change, and `model` must
        build them identically in every trial: a frozen backbone need not be in every checkpoint.

    `loss` and `score` get the plain module, even with several ranks; they may call any part of it any number of times.
    """

    config: type
    model: Callable[[Any], nn.Module]
    data: Callable[[Any, str, Ranks], Samples]
    loss: Callable[[nn.Module, Batch, Any], Pairs]
    score: Callable[[nn.Module, Batch, Any], Pairs]
    lr_scale: Callable[[str], float] = lambda name: 1.0
    derived: Callable[[Mapping[str, float]], Mapping[str, float | None]] = lambda scores: {}
    part: Callable[[str], str | None] = lambda name: None
    annealed: Callable[[Any, int], Any] = lambda config, epoch: config
    names: Callable[[Any, Sequence[int]], list[str]] = lambda config, indices: []
    saved: Callable[[str], bool] = lambda name: True


def fit(task: Task, trial: Trial) -> Iterator[Report]:
    """Train `task` with the settings of `trial`; yield one report per epoch.

    Raises `Diverged` on all ranks if a step's loss or gradient is not finite, before that step changes a weight; also
    if weights are not finite at the end of an epoch, or by the rule `optim.spike`. If the loss or a score refuses what
    is not finite by raising, only the ranks where it does raise `Diverged`. Raises torch.OutOfMemoryError if not even
    one sample fits. On a CPU, a trial resumed from a state continues bit for bit as if uninterrupted.
    """
    config, device, ranks = config_of(task, trial), trial.device, ranks_of(trial)
    optim = config.optim
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seed_everything(trial.seed, "model")
    model = task.model(config).to(device)
    train, val = (open_split(task, config, split, ranks) for split in ("train", "val"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = StoredModel(model, task.saved)
    plain = Loss(task.loss, model, config).to(device)
    micro_batch = micro_batch_that_fits(plain, train, trial)
    optimizer = adamw(model, task.lr_scale, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
    ema = Ema(model, optim)
    guard = Guard(Replay(plain, train, optim, device, ranks), functools.partial(task.names, config))
    watched = replace(task, score=guard.watched(task.score))
    patience, best = Patience(optim), Best({"model": kept, "ema": ema})
    parts = {"model": kept, "optimizer": optimizer, "scaler": scaler, "ema": ema, "guard": guard, "patience": patience}
    parts |= {"best": best} if optim.early_stop is not None else {}
    start = restore(parts, trial.resume)
    loss = over_ranks(compiled(plain) if optim.compile else plain, ranks, device)

    for epoch in range(start, config.epochs):
        if patience.over:
            return
        seed_everything(trial.seed, epoch, ranks.rank)
        plain.config = task.annealed(config, epoch)
        began_s = time.perf_counter()
        order = seed_from(trial.seed, "order", epoch)
        shares = epoch_shares(len(train), optim.batch_size, micro_batch, ranks, order, optim.epoch_samples)
        batches = on_device(train, [micro for share in shares for micro in share.micros], device)
        records, terms = list[StepRecord](), tuple[str, ...]()
        for index, share in enumerate(shares):
            lr = patience.lr_ratio * optim.lr * lr_factor(optim, epoch + (index + 0.5) / len(shares), config.epochs)
            scale = scaler.scale(torch.ones((), device=device))
            step = Step(epoch * len(shares) + index, epoch, lr, scale, share, generators(device))
            set_lr(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            plain.carried_2.grad = None
            with explained(step, guard, plain, trained, ranks):
                summed = backward(loss, batches, share, scaler, autocast(device, optim))
            summed.require(terms or summed.terms)
            terms = summed.terms

            # Gradients are of the summed loss, divided by the number of ranks (DDP) and the batch size (`backward`).
            pieces = ranks.size * share.effective
            total, count = (value / scale * pieces for value in plain.global_loss())
            divisor = divisor_of(count) / pieces
            scaler.unscale_(optimizer)
            scaler.update()
            norm = get_total_norm([p.grad for p in trained.values() if p.grad is not None]) / divisor
            next_scale = scaler.scale(torch.ones_like(scale))
            skip, overflow = guard.judge(total / divisor_of(count), norm, scale, next_scale)
            if index == len(shares) - 1:
                before = [parameter.detach().clone() for parameter in trained.values()]
                by_part = part_norms(task.part, trained, divisor)
            fused_step(optimizer, divisor * clip_divisor(norm, optim.clip_norm), skip)
            ema.update(step.number)

            records.append(StepRecord(summed.sums_U, norm, overflow))
            guard.check()  # the previous step's verdict
            guard.follow(step, summed)
        guard.check()
        if not get_total_norm(trained.values()).isfinite():
            raise guard.weights_blown_up([name for name, x in trained.items() if not x.isfinite().all()])
        speed = {"samples_per_s": sum(share.effective for share in shares) / (time.perf_counter() - began_s)}

        for theirs in everyones(terms, ranks):  # before their sums are added
            summed.require(theirs)
        metrics = train_means(terms, records, ranks) | {"update_ratio": update_ratio(before, trained)}
        del before  # or there would be two copies of the weights at the end of the next epoch
        metrics |= {} if overflow else {name: float(part_norm) for name, part_norm in by_part.items()}
        metrics |= {"lr": lr, "micro_batch": micro_batch}
        broadcast_buffers(model, ranks)
        with evaluating(model, ema):
            scores = evaluate(watched, model, val, trial, micro_batch)
        metrics = joined({**metrics, **speed}, scores)
        # Without the speed: everything else is the same on every rank.
        patience.look({name: value for name, value in metrics.items() if name not in speed})
        if patience.improved:
            best.keep(metrics, epoch)
        report = Report(metrics, state=functools.partial(state_of, parts, epoch))
        ends = patience.over or epoch + 1 == config.epochs
        yield best.in_place_of(report) if ends else report


def micro_batch_that_fits(loss: Loss, samples: Samples, trial: Trial) -> int:
    """Return the micro-batch: the most samples a rank passes through the model at once, limited by memory.

    Probed once per process for each shape of model and batch. Raises torch.OutOfMemoryError if not even one sample
    fits.
    """
    limit_bytes = None if trial.memory_limit_mb is None else int(trial.memory_limit_mb * MIB)
    if limit_bytes is None and trial.device.type != "cuda":
        return wanted_share(samples, trial)
    probe = probe_of(loss, samples, trial, limit_bytes)
    return fitting_micro_batch(loss, probe.step, probe.share, probe.memory, ranks_of(trial), probe.tried)


def step_memory(task: Task, trial: Trial) -> int:
    """Return the peak memory of training in bytes, with a rank's whole share of a batch passed at once.

    If the GPU runs out of memory, returns at least what it had available. Measured on one rank, which stands for all.
    """
    plain = Loss(task.loss, task.model(trial.config), trial.config).to(trial.device)
    samples = open_split(task, trial.config, "train", ranks_of(trial))
    probe = probe_of(plain, samples, trial, None if trial.device.type == "cuda" else sys.maxsize)
    if probe.share not in probe.tried:
        probe.tried[probe.share] = try_step(plain, probe.step, probe.share, probe.memory)
    found = probe.tried[probe.share]
    return found.need_bytes if found.fits else max(found.need_bytes, found.limit_bytes)


class Probe(NamedTuple):
    """A training step whose memory use is to be probed."""

    step: Callable[[int], object]  # runs forward and backward on this many samples
    share: int  # samples that a rank would pass through the model at once if memory allowed
    memory: Memory
    tried: dict[int, Tried]  # outcomes so far for this shape of model and batch, by number of samples


def probe_of(loss: Loss, samples: Samples, trial: Trial, limit_bytes: int | None) -> Probe:
    optim, ranks = trial.config.optim, ranks_of(trial)
    trained_bytes = sum(parameter.nbytes for parameter in loss.parameters() if parameter.requires_grad)
    # AdamW's two moments and the copy for `update_ratio`; the EMA shadow; with several ranks DDP's buckets, beside the
    # gradients of all micro-batches but the last.
    copies = 3 + (optim.ema is not None) + (ranks.size > 1)
    memory = Memory(trial.device, limit_bytes, copies * trained_bytes)
    shape = shape_key(loss, gathered(samples, torch.arange(1)), optim.precision, memory, ranks)
    key = shape, tuple((name, switches(value)) for name, value in settings_of_loss(trial.config).items())

    def step(size: int) -> None:
        indices = torch.arange(size)
        batches = on_device(samples, [indices], trial.device)
        unscaled = torch.amp.GradScaler(trial.device.type, enabled=False)
        backward(loss, batches, Share((indices,), size, 1.0), unscaled, autocast(trial.device, optim))

    return Probe(step, wanted_share(samples, trial), memory, trial.cache.setdefault(("micro_batch", key), {}))


def wanted_share(samples: Samples, trial: Trial) -> int:
    optim = trial.config.optim
    share = -(-optim.largest_batch(len(samples)) // trial.world_size)
    return min(share, optim.micro_batch or share)


class StepRecord(NamedTuple):
    """What one step contributes to the means of its epoch."""

    sums_U: Tensor
    norm: Tensor
    overflow: Tensor


def train_means(terms: Sequence[str], records: Sequence[StepRecord], ranks: Ranks) -> dict[str, float]:
    """Return an epoch's mean losses (sums over counts) and its mean gradient norm, over the steps not skipped.

    If fp16 skipped every step of a short epoch, the losses, which are finite, are averaged over all of them and the
    gradient norm is omitted.
    """
    sums_SU, norm_S, overflow_S = (torch.stack(column) for column in zip(*records, strict=True))
    none_taken = bool(overflow_S.all())
    counts_S = overflow_S if none_taken else ~overflow_S
    sums_U = sums_SU[counts_S].double().sum(0)
    if ranks.size > 1:
        dist.all_reduce(sums_U)
    means_T = sums_U[:-1] / divisor_of(sums_U[-1])
    means = {f"loss_{term}": mean for term, mean in zip(terms, means_T.tolist(), strict=True)}
    norm = {} if none_taken else {"grad_norm": float(norm_S[counts_S].double().mean())}
    return {"loss": float(means_T.sum()), **means, **norm}


@contextlib.contextmanager
def explained(step: Step, guard: Guard, loss: Loss, trained: Mapping[str, Tensor], ranks: Ranks) -> Iterator[None]:
    """Raise what an exception in a step's passes means; with several ranks, also if a parameter had no part in them."""
    try:
        yield
    except Exception as error:
        if names := without_gradient(loss, error):
            raise unused(names, step.number - 1) from error
        guard.explain(error, step)
        raise
    # Told at once: DDP tells in the next step, and after an epoch's last the ranks' collectives are mixed up.
    if ranks.size > 1 and (names := [name for name, parameter in trained.items() if parameter.grad is None]):
        raise unused(names, step.number)


def unused(names: Sequence[str], step: int) -> UserError:
    """Return the error for parameters without a gradient: DDP then leaves the ranks with different ones for others."""
    these = f"{names[0]} and {len(names) - 1} more parameters" if names[1:] else names[0]
    return UserError(
        f"{these} had no part in the loss of step {step}: with several ranks, each that is trained must have a "
        "part in every micro-batch; add it times zero where it has none, or let it require no gradient"
    )


def joined(metrics: Mapping[str, float], scores: Mapping[str, float]) -> dict[str, float]:
    if clash := metrics.keys() & scores.keys():
        raise UserError(f"a score must not take the name of a training metric: {', '.join(sorted(clash))}")
    return {**metrics, **scores}


def update_ratio(before: Sequence[Tensor], trained: Mapping[str, Tensor]) -> float:
    """Return the norm of a step's weight update relative to the weights' norm; about 1e-3 in healthy training.

    before: the weights before the step; overwritten, because memory may have no room for another copy.
    """
    size = get_total_norm(before).clamp(min=1e-30)
    for then, now in zip(before, trained.values(), strict=True):
        then.sub_(now.detach())
    return float(get_total_norm(before) / size)


def part_norms(part: Callable[[str], str | None], trained: Mapping[str, Tensor], divisor: Tensor) -> dict[str, Tensor]:
    """Return each part's gradient norm, divided by `divisor`, by the name under which it is reported."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in trained.items():
        if parameter.grad is not None and (of := part(name)) is not None:
            gradients.setdefault(of, []).append(parameter.grad)
    return {f"grad_norm_{of}": get_total_norm(found) / divisor for of, found in gradients.items()}


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's buffers (batch-norm statistics) to every rank, so that all score and resume the same model."""
    if ranks.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def evaluating(model: nn.Module, ema: Ema) -> Iterator[None]:
    """Evaluate under eval mode, no_grad and the EMA weights; restore the weights and each module's mode on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    ema.swap()
    try:
        with torch.no_grad():
            yield
    finally:
        ema.swap()
        for module in training:
            module.training = True


def evaluate(
    task: Task, model: nn.Module, samples: Samples, trial: Trial, micro_batch: int | None = None
) -> dict[str, float]:
    """Return the scores over all samples of all ranks, and the derived metrics; scores with a zero count are omitted.

    micro_batch: samples that a rank passes through the model at once unless `optim.eval_batch` says; None:
        `optim.micro_batch`, or without one its share of an effective batch.
    """
    optim, device, ranks = trial.config.optim, trial.device, ranks_of(trial)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL has `everyones` gather
    micro_batch = optim.eval_batch or micro_batch or optim.micro_batch or -(-optim.batch_size // ranks.size)
    share = share_of(torch.arange(len(samples)), ranks, None)
    (mine,) = share.micros  # split unevenly below, which does no harm in eval mode
    totals: dict[str, Tensor] = {}
    for batch in on_device(samples, mine.split(micro_batch), device):
        with autocast(device, optim):
            pairs = checked(task.score(model, batch, trial.config), "score")
        for name, pair in pairs.items():
            pair_2 = torch.stack([as_float64(part, device) for part in pair])
            totals[name] = totals.get(name, 0) + share.weight * pair_2
    names = list(dict.fromkeys(name for theirs in everyones(list(totals), ranks) for name in theirs))
    table_N2 = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for row, name in enumerate(names):
        table_N2[row] += totals.get(name, 0)
    if ranks.size > 1 and names:
        dist.all_reduce(table_N2)
    scores = {name: total / count for name, (total, count) in zip(names, table_N2.tolist(), strict=True) if count}
    reported = {**scores, **task.derived(scores)}
    return {name: value for name, value in reported.items() if value is not None}


def as_float64(part: Tensor | float, device: torch.device) -> Tensor:
    """Return `part` as a float64 tensor on the device; a number is filled in there, as copying it would sync."""
    if isinstance(part, Tensor):
        return part.to(device, torch.float64)
    return torch.full((), part, dtype=torch.float64, device=device)


def config_of(task: Task, trial: Trial) -> Any:
    if not isinstance(trial.config, task.config):
        raise UserError(
            f"trial.config is of the class {type(trial.config).__name__} and must be of {task.config.__name__}, which "
            "the task names; a search makes it of the dataclass that the trainable's module has as `Config`, or a dict"
        )
    return trial.config


def open_split(task: Task, config: Any, split: str, ranks: Ranks) -> Samples:
    samples = task.data(config, split, ranks)
    if not len(samples):
        raise UserError(f"the split {split!r} holds no sample; it must hold at least one")
    return samples
