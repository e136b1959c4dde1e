"""The training loop that the families share: `fit(task, trial)`, a generator as `trainables.contract` asks for.

A family describes itself in a `Task` and its trainable is then

    def train(trial: Trial) -> Iterator[Report]:
        yield from fit(TASK, trial)

A family that does not fit writes its own `train(trial)` and takes what it needs from here: there are no hooks.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from trainables.contract import Diverged, Report, Trial, UserError
from trainables.optim import Ema, Optim, adamw, clip_divisor, fused_step, lr_factor, set_lr
from trainables.resume import restore, seed_everything, seed_from, state_of
from trainables.samples import Batch, Ranks, Samples, Share, epoch_shares, on_device, ranks_of, share_of

# By name: a sum over the samples of a batch, a scalar, and over how many it was taken.
Pairs = Mapping[str, tuple[Tensor, Tensor | int]]
Cast = contextlib.AbstractContextManager[None]


@dataclass(frozen=True)
class Task:
    """A family as the loop sees it: a class of settings and four functions.

    config: the class of `Trial.config`. It has the fields `optim: Optim` and `epochs: int`.
    model: builds the module, on the CPU, from the seeded global generator. A parameter with `requires_grad` False stays
        as it is, every other one takes part in every batch; a submodule left in eval mode stays in eval mode.
    data: opens the split "train" or "val", the whole of it on every rank: the loop shuffles it and divides it.
    loss: the loss terms of a batch by name, already weighted; their sum is minimised. All terms share one count: the
        same int, or the very same tensor. An int promises that every sample counts alike, so that each rank knows the
        total; a tensor (valid tokens, say) is added over the ranks, one small collective per step.
    score: what is reported of the validation split, each with its own count. The names do not depend on the batch; a
        score whose count is zero over the whole split is left out.
    lr_scale: the learning rate of a parameter, by name, as a ratio of `optim.lr`.

    `loss` and `score` get the plain module, on several ranks too; they may call any part of it, any number of times.
    """

    config: type
    model: Callable[[Any], nn.Module]
    data: Callable[[Any, str, Ranks], Samples]
    loss: Callable[[nn.Module, Batch, Any], Pairs]
    score: Callable[[nn.Module, Batch, Any], Pairs]
    lr_scale: Callable[[str], float] = lambda name: 1.0


def fit(task: Task, trial: Trial) -> Iterator[Report]:
    """Train `task` as `trial` says; yield a report per epoch.

    Raises `Diverged` for the step whose loss terms or gradient are not finite, on all ranks alike, before that step
    changes a weight. On a CPU, a trial resumed from a state goes on bit for bit as if it had not stopped.
    """
    config, optim, device, ranks = trial.config, trial.config.optim, trial.device, ranks_of(trial)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seed_everything(trial.seed, "model")
    model = task.model(config).to(device)
    train, val = (samples_of(task, config, split, ranks) for split in ("train", "val"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = adamw(trained, task.lr_scale, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
    ema = Ema(trained, optim.ema)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": ema}
    start = restore(parts, trial.resume)
    loss = over_ranks(Loss(task.loss, model, config), ranks, device)

    diverged = torch.zeros((), dtype=torch.bool, device=device)
    for epoch in range(start, config.epochs):
        seed_everything(trial.seed, epoch, ranks.rank)
        began_s = time.perf_counter()
        shares = epoch_shares(len(train), optim, ranks, seed_from(trial.seed, "order", epoch))
        batches = on_device(train, [micro for share in shares for micro in share.micros], device)
        taken, verdict = list[Taken](), None
        for index, share in enumerate(shares):
            lr = optim.lr * lr_factor(optim, epoch + (index + 0.5) / len(shares), config.epochs)
            set_lr(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            summed = backward(loss, batches, share, scaler, autocast(device, optim))
            count = everyones_count(summed, share, ranks, always_ask=scaler.is_enabled())

            # The gradients are those of the sum, over the ranks (by DDP) and over the batch's size (by `backward`).
            divisor = count / (ranks.size * share.effective)
            scaler.unscale_(optimizer)
            norm = get_total_norm([p.grad for p in trained.values() if p.grad is not None]) / divisor
            overflow = ~norm.isfinite()
            # fp16: a smaller loss scale may mend a gradient that overflows, but not a loss, whose count is NaN.
            mendable = scaler.scale(count) > count
            diverged = diverged | (overflow & ~mendable)
            fused_step(optimizer, divisor * clip_divisor(norm, optim.clip_norm), skip=overflow | diverged)
            scaler.update()
            ema.update()

            taken.append(Taken(summed.sums_T, count, norm, overflow))
            # Looked at one step late, so that the host never waits for the step it has just queued. No harm is done
            # meanwhile: once `diverged` is true, every further step is skipped on the device.
            raise_if_diverged(verdict, ranks)
            verdict = Verdict.of(diverged, epoch * len(shares) + index, lr, summed)
        raise_if_diverged(verdict, ranks)
        if not get_total_norm(trained.values()).isfinite():
            raise Diverged(f"the weights are not finite after an update at lr {lr:.3g}", (epoch + 1) * len(shares))
        epoch_s = time.perf_counter() - began_s

        speed = {"lr": lr, "samples_per_s": sum(share.effective for share in shares) / epoch_s}
        metrics = train_means(summed.terms, taken, ranks) | speed
        broadcast_buffers(model, ranks)
        with evaluating(model, ema):
            scores = evaluate(task, model, val, trial, ranks)
        if clash := metrics.keys() & scores.keys():
            raise ValueError(f"a score must not take the name of a training metric: {', '.join(sorted(clash))}")
        yield Report(metrics | scores, state=functools.partial(state_of, parts, epoch))


class Loss(nn.Module):
    """A family's loss as a module, so that DDP wraps the loss and the family gets its plain model."""

    def __init__(self, loss: Callable[[nn.Module, Batch, Any], Pairs], model: nn.Module, config: Any) -> None:
        super().__init__()
        self.loss, self.model, self.config = loss, model, config

    def forward(self, batch: Batch) -> Pairs:
        return self.loss(self.model, batch, self.config)


def over_ranks(loss: Loss, ranks: Ranks, device: torch.device) -> nn.Module:
    if ranks.size == 1:
        return loss
    # Buffers are shared once an epoch, not in every step: see broadcast_buffers.
    return DistributedDataParallel(
        loss,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


@dataclass(frozen=True)
class Summed:
    """The loss terms of a batch, summed over this rank's samples, and their common count."""

    terms: tuple[str, ...]
    sums_T: Tensor
    count: Tensor | int

    def __add__(self, other: Summed) -> Summed:
        return Summed(self.terms, self.sums_T + other.sums_T, self.count + other.count)


def shared_count(pairs: Pairs) -> Tensor | int:
    first, *others = (count for _, count in pairs.values())
    # Tensors are compared by identity: to compare their values would make the host wait for the GPU.
    if any(not (other is first or (isinstance(other, int) and other == first)) for other in others):
        raise ValueError(f"the loss terms {', '.join(pairs)} must share one count: one int, or the very same tensor")
    return first


def backward(
    loss: nn.Module, batches: Iterator[Batch], share: Share, scaler: torch.amp.GradScaler, cast: Cast
) -> Summed:
    """Leave in the parameters the gradient of the summed loss over the batch's size, and return the loss.

    The size is a constant that keeps fp16 in range. Where a loss is not finite its gradient starts from NaN, so that
    no rank's gradient stays finite, by way of the all-reduce.
    """
    parts: list[Summed] = []
    for last in [False] * (len(share.micros) - 1) + [True]:
        with contextlib.ExitStack() as stack:
            if isinstance(loss, DistributedDataParallel) and not last:
                stack.enter_context(loss.no_sync())
            with cast:
                pairs = loss(next(batches))
            sums = [term_sum.to(torch.promote_types(term_sum.dtype, torch.float32)) for term_sum, _ in pairs.values()]
            total = functools.reduce(operator.add, sums)
            total.backward(scaler.scale(0 * total.detach() + share.weight / share.effective))
        sums_T = torch.stack([term_sum.detach() for term_sum in sums]) * share.weight
        parts.append(Summed(tuple(pairs), sums_T, shared_count(pairs)))
    return functools.reduce(operator.add, parts)


def everyones_count(summed: Summed, share: Share, ranks: Ranks, always_ask: bool) -> Tensor:
    """Return the count of the batch over all ranks; where the ranks ask each other, NaN if a loss is not finite.

    A count by the sample is known without asking. fp16 asks always, to tell a loss that is not finite from a gradient
    that overflowed.
    """
    if isinstance(summed.count, int) and not always_ask:
        if summed.count % share.size:
            raise ValueError(f"a loss counts {summed.count} for {share.size} samples: return such a count as a tensor")
        return summed.sums_T.new_full((), summed.count // share.size * share.effective)
    count = summed.count * share.weight * (1 + 0 * summed.sums_T.sum())
    if ranks.size > 1:
        dist.all_reduce(count)
    return count.clamp(min=1e-30)  # where nothing counts, the gradient is zero and not 0 / 0


@dataclass(frozen=True)
class Verdict:
    """Whether training had diverged by a step, on its way from the device to the host."""

    step: int
    lr: float
    summed: Summed
    diverged: Tensor  # on the host, once `ready`
    ready: torch.cuda.Event | None

    @staticmethod
    def of(diverged: Tensor, step: int, lr: float, summed: Summed) -> Verdict:
        on_host = diverged.to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if diverged.is_cuda else None
        if ready is not None:
            ready.record()
        return Verdict(step, lr, summed, on_host, ready)


def raise_if_diverged(verdict: Verdict | None, ranks: Ranks) -> None:
    """Raise `Diverged`, with the same reason on every rank, if that is the verdict."""
    if verdict is None:
        return
    if verdict.ready is not None:
        verdict.ready.synchronize()
    if not verdict.diverged:
        return
    ranks_wrong_T = (~verdict.summed.sums_T.isfinite()).float()
    if ranks.size > 1:
        dist.all_reduce(ranks_wrong_T)
    wrong = [
        f"loss_{term}" for term, several in zip(verdict.summed.terms, ranks_wrong_T.tolist(), strict=True) if several
    ]
    what = f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'}" if wrong else "the gradient norm is"
    raise Diverged(f"{what} not finite at lr {verdict.lr:.3g}", verdict.step)


class Taken(NamedTuple):
    """What an epoch's means need of a step."""

    sums_T: Tensor
    counted: Tensor
    norm: Tensor
    overflow: Tensor


def train_means(terms: Sequence[str], taken: Sequence[Taken], ranks: Ranks) -> dict[str, float]:
    """Return the means over samples and steps; none where fp16 has skipped every step of a short epoch."""
    sums_ST, count_S, norm_S, overflow_S = (torch.stack(column) for column in zip(*taken, strict=True))
    if overflow_S.all():
        return {}
    sums_T = sums_ST[~overflow_S].double().sum(0)
    if ranks.size > 1:
        dist.all_reduce(sums_T)
    means_T = sums_T / count_S[~overflow_S].double().sum()
    means = {f"loss_{term}": mean for term, mean in zip(terms, means_T.tolist(), strict=True)}
    return {"loss": float(means_T.sum()), **means, "grad_norm": float(norm_S[~overflow_S].double().mean())}


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the buffers of rank 0 (batch norm's statistics): all score, and resume, the same model."""
    if ranks.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def evaluating(model: nn.Module, ema: Ema) -> Iterator[None]:
    """In eval mode, without gradients, with the shadow for parameters; afterwards each module in its own mode again."""
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


def evaluate(task: Task, model: nn.Module, samples: Samples, trial: Trial, ranks: Ranks) -> dict[str, float]:
    """Return the scores over all samples of all ranks; one that nothing counts towards is left out."""
    optim, device = trial.config.optim, trial.device
    micro_batch = optim.micro_batch or -(-optim.batch_size // ranks.size)
    share = share_of(torch.arange(len(samples)), ranks, micro_batch)
    totals: dict[str, Tensor] = {}
    for batch in on_device(samples, share.micros, device):
        with autocast(device, optim):
            pairs = task.score(model, batch, trial.config)
        for name, pair in pairs.items():
            pair_2 = torch.stack([torch.as_tensor(part, dtype=torch.float64, device=device) for part in pair])
            totals[name] = totals.get(name, 0) + share.weight * pair_2
    if not totals:
        return {}
    table_N2 = torch.stack(list(totals.values()))
    if ranks.size > 1:
        dist.all_reduce(table_N2)
    return {name: total / count for name, (total, count) in zip(totals, table_N2.tolist(), strict=True) if count}


def autocast(device: torch.device, optim: Optim) -> Cast:
    if optim.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if optim.precision == "fp16" else torch.bfloat16)


def samples_of(task: Task, config: Any, split: str, ranks: Ranks) -> Samples:
    samples = task.data(config, split, ranks)
    if not len(samples):
        raise UserError(f"the split {split!r} holds no sample; it must hold at least one")
    return samples
