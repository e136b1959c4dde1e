"""The guard of the training loop: ends a trial in the step in which its training blows up, and says why.

The verdict is computed on the device before a weight changes, from values that all ranks share after the gradients'
all-reduce. The host reads it one step late, so that it never waits for the step it has just queued; this is safe,
because once `diverged` is true the device skips every further step.

Shape suffixes: S the newest steps, at most KEPT; U as in `trainables.step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainables.contract import Diverged, UserError, memory_error
from trainables.optim import Optim
from trainables.postmortem import Findings, Witness, examine
from trainables.resume import Generators, set_generators
from trainables.samples import Batch, Ranks, Samples, Share, everyones, on_device
from trainables.step import Loss, Pairs, Summed, autocast, backward, divisor_of

KEPT = 50  # steps in the running median, and in a post-mortem's history of losses and gradient norms
SETTLED = 10  # steps before the running median is meaningful


@dataclass(frozen=True)
class Step:
    """All that is needed to run a step again. `number` counts from the start of the trial.

    scale: the fp16 loss scale, a scalar tensor; 1 in other precisions.
    """

    number: int
    epoch: int
    lr: float
    scale: Tensor
    share: Share
    generators: Generators


class Asked(NamedTuple):
    """A step whose verdict is being copied to the host, with its loss, and the losses and gradient norms up to it."""

    step: Step
    summed: Summed
    diverged: Tensor  # on the host, once `ready`
    spiked: Tensor  # whether the spike rule caused it
    ready: torch.cuda.Event | None
    losses: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]


class NoCollectives(TorchDispatchMode):
    """Raises RuntimeError at a collective, which might wait for ever: other ranks are elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} needs the other ranks")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Replay:
    """Runs a step again with the current weights, on each rank independently."""

    loss: Loss
    samples: Samples
    optim: Optim
    device: torch.device
    ranks: Ranks

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, as in fp16."""
        return self.optim.precision == "fp16"

    def findings(self, step: Step, alone: bool = False) -> Findings:
        """Return what is found in the step. alone: not on all ranks, so it ends at a collective."""

        def again(witness: Witness) -> None:
            set_generators(step.generators, self.device)
            batches = on_device(self.samples, step.share.micros, self.device)
            scaler = torch.amp.GradScaler(self.device.type, init_scale=float(step.scale), enabled=self.scales)
            before = self.loss.register_forward_pre_hook(lambda loss, args: witness.see_batch(*args))
            after = self.loss.register_forward_hook(lambda loss, args, result: witness.see_loss(result[1].detach()))
            try:
                backward(self.loss, batches, step.share, scaler, autocast(self.device, self.optim))
            finally:
                before.remove()
                after.remove()

        return self.findings_of(again, alone)

    def findings_of(self, again: Callable[[Witness], object], alone: bool) -> Findings:
        """Return what is found in whatever `again` runs; see `postmortem.examine`, and `findings`."""
        try:
            with NoCollectives() if alone else contextlib.nullcontext():
                return examine(self.loss.model, again, whole=self.ranks.size > 1)
        except Exception as error:  # perhaps on one rank only, while the others wait for its findings
            return Findings(f"running the step again raised {type(error).__name__}: {error}", None, None, None, False)


class Guard:
    """Watches every step. Its state is part of a checkpoint, so that a resumed trial is judged as if uninterrupted.

    names: `trainables.loop.Task.names`, bound to the trial's config.
    """

    def __init__(self, replay: Replay, names: Callable[[Sequence[int]], list[str]]) -> None:
        self._spike = replay.optim.spike
        self._replay, self._names = replay, names
        self._ranks = replay.ranks
        self._settings = repr(settings_of_loss(replay.loss.config))
        self._diverged = torch.zeros((), dtype=torch.bool, device=replay.device)
        self._spiked = torch.zeros((), dtype=torch.bool, device=replay.device)
        self._streak = torch.zeros((), dtype=torch.int64, device=replay.device)  # steps above the median, in a row
        self._losses: deque[Tensor] = deque(maxlen=KEPT)
        self._norms: deque[Tensor] = deque(maxlen=KEPT)
        self._asked: Asked | None = None
        self._latest: Asked | None = None

    def judge(self, loss: Tensor, norm: Tensor, scale: Tensor, next_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether to skip the step, and whether it is an fp16 overflow that a smaller loss scale may cure.

        loss, norm: the whole batch's loss and gradient norm, the same on every rank.
        scale, next_scale: the loss scale of this step and of the next, which is smaller if any element of the gradient
            was not finite; both 1 without fp16.
        """
        # A loss that is not finite may still have a finite gradient, where `clamp` or `where` cuts the gradient off.
        bad = ~(norm.isfinite() & loss.isfinite())
        overflow = bad & loss.isfinite() & (scale > 1) & (next_scale < scale)
        blown_up = bad & ~overflow
        self._diverged = self._diverged | blown_up
        if self._spike is not None and len(self._losses) >= SETTLED:
            usual = usual_loss(torch.stack(tuple(self._losses)), self._streak)
            self._streak = (self._streak + 1) * (loss > self._spike.factor * usual)
            self._spiked = (self._streak >= self._spike.patience) & ~blown_up
            self._diverged = self._diverged | self._spiked
        self._losses.append(loss)
        # Record an overflow as inf, even if it produced NaN.
        self._norms.append(torch.where(overflow, math.inf, norm))
        return self._diverged | bad, overflow

    def follow(self, step: Step, summed: Summed) -> None:
        """Start copying the verdict on `step` to the host, where `check` reads it."""
        on_host = self._diverged.to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if self._diverged.is_cuda else None
        if ready is not None:
            ready.record()
        history = tuple(self._losses), tuple(self._norms)
        self._asked = self._latest = Asked(step, summed, on_host, self._spiked, ready, *history)

    def check(self) -> None:
        """Raise `Diverged`, with the same reason and post-mortem on every rank, if the followed step diverged."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if asked.ready is not None:
            asked.ready.synchronize()
        if asked.diverged:
            raise self._post_mortem(asked)

    def explain(self, error: Exception, step: Step) -> None:
        """Raise `Diverged` if a step raised `error` after something in it was not finite.

        A loss may refuse NaN itself, as a distribution or a matching does. With several ranks this calls no collective,
        because others may be waiting in one that is part of the step.
        """
        if speaks_for_itself(error):
            return
        if self._ranks.size == 1:
            self.check()
        findings = self._replay.findings(step, alone=self._ranks.size > 1)
        if findings.reproduced:
            raise self._refused("loss", error, step, findings, self._told(sample_indices(step))) from error

    def watched(self, score: Callable[[nn.Module, Batch, Any], Pairs]) -> Callable[[nn.Module, Batch, Any], Pairs]:
        """Return `score` as a function that raises `Diverged` where `explain` would: after an epoch's last step."""

        def watching(model: nn.Module, batch: Batch, config: Any) -> Pairs:
            def again(witness: Witness) -> None:
                witness.see_batch(batch)
                score(model, batch, config)

            try:
                return score(model, batch, config)
            except Exception as error:
                if not speaks_for_itself(error):
                    assert self._latest is not None, "a step comes first"
                    findings = self._replay.findings_of(again, alone=self._ranks.size > 1)
                    if findings.reproduced:
                        raise self._refused("score", error, self._latest.step, findings, {}) from error
                raise

        return watching

    def _refused(
        self, what: str, error: Exception, step: Step, findings: Findings, batch: Mapping[str, Any]
    ) -> Diverged:
        details = self._circumstances(step, self._losses, self._norms)
        said, *_ = str(error).splitlines() or [""]
        details["raised"] = f"{type(error).__name__}: {said}"
        details |= {"found": dataclasses.asdict(findings), "rank": self._ranks.rank, **batch}
        reason = f"the {what} raised {type(error).__name__} at lr {step.lr:.3g}; {findings.sentence}"
        return Diverged(reason, step.number, details)

    def weights_blown_up(self, names: Sequence[str]) -> Diverged:
        """Return the error to raise if the last followed step, itself healthy, left weights that are not finite.

        names: the parameters that are not finite; none if only the norm of all weights is not.
        """
        assert self._latest is not None, "a step comes first"
        step, details = self._latest.step, self._details(self._latest)
        details |= {"parameter": names[0] if names else None, **self._told(self._everyones_samples(step))}
        first = names[0] if names else "the norm of the weights"
        what = f"{first} and {len(names) - 1} more parameters are" if names[1:] else f"{first} is"
        return Diverged(f"{what} not finite after an update at lr {step.lr:.3g}", step.number, details)

    def _post_mortem(self, asked: Asked) -> Diverged:
        step, details = asked.step, self._details(asked)
        if asked.spiked:
            details |= self._told(self._everyones_samples(step))
            return Diverged(f"{self._spike_in_words(details['losses'][-1])} at lr {step.lr:.3g}", step.number, details)
        wrong = [f"loss_{name}" for name, value in details["terms"].items() if isinstance(value, str)]
        what = f"{' and '.join(wrong)} {'are' if wrong[1:] else 'is'}" if wrong else "the gradient norm is"
        rank, findings, batch = self._culprit(step)
        details |= {"found": dataclasses.asdict(findings), "rank": rank, **self._told(batch)}
        return Diverged(f"{what} not finite at lr {step.lr:.3g}; {findings.sentence}", step.number, details)

    def _details(self, asked: Asked) -> dict[str, Any]:
        """Return what is known of a step without running it again. A collective: every rank must call it."""
        sums_U = asked.summed.sums_U.clone()
        if self._ranks.size > 1:
            dist.all_reduce(sums_U)
        terms = zip(asked.summed.terms, (sums_U[:-1] / divisor_of(sums_U[-1])).tolist(), strict=True)
        details = self._circumstances(asked.step, asked.losses, asked.norms)
        return details | {"terms": {name: readable(value) for name, value in terms}}

    def _circumstances(self, step: Step, losses: Iterable[Tensor], norms: Iterable[Tensor]) -> dict[str, Any]:
        return {
            "epoch": step.epoch,
            "lr": step.lr,
            "losses": [readable(float(value)) for value in losses],
            "grad_norms": [readable(float(value)) for value in norms],
            "loss_scale": float(step.scale) if self._replay.scales else None,
        }

    def _spike_in_words(self, loss: float) -> str:
        assert self._spike is not None
        rule = f"above {self._spike.factor:g} times its running median for {self._spike.patience} steps"
        return f"the loss was {rule}, {loss:.4g} at last,"

    def _culprit(self, step: Step) -> tuple[int, Findings, list[int]]:
        """Run the step again; return the first rank on which it fails, that rank's findings and its sample indices."""
        mine = self._ranks.rank, self._replay.findings(step), sample_indices(step)
        everyone = everyones(mine, self._ranks)
        return next((item for item in everyone if item[1].reproduced), everyone[0])

    def _told(self, batch: list[int]) -> dict[str, Any]:
        """Return the samples' indices in the training split and, where the family names them, their names."""
        try:
            names = self._names(batch)
        except Exception as error:  # the family's code failed, but the divergence must still be reported
            names = [f"naming them raised {type(error).__name__}: {error}"]
        return {"batch": batch, "names": names} if names else {"batch": batch}

    def _everyones_samples(self, step: Step) -> list[int]:
        return [index for samples in everyones(sample_indices(step), self._ranks) for index in samples]

    def state_dict(self) -> dict[str, Any]:
        # Numbers, not tensors: a norm that was infinite once does not mean that the state has blown up.
        losses, norms = ([float(value) for value in kept] for kept in (self._losses, self._norms))
        return {"losses": losses, "norms": norms, "streak": self._streak, "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the history, unless its settings differ: another weight of a loss term changes the loss's scale."""
        if state.get("settings") != self._settings:
            return
        device = self._replay.device
        for kept, saved in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            kept.extend(torch.as_tensor(value, dtype=torch.float32, device=device) for value in saved)
        self._streak = state["streak"].to(device)


def speaks_for_itself(error: Exception) -> bool:
    """Return whether an exception says what it means: a mistake, a divergence, or that memory ran out."""
    told = UserError, Diverged, torch.OutOfMemoryError, MemoryError
    return isinstance(error, told) or memory_error(str(error)) is not None


def usual_loss(losses_S: Tensor, streak: Tensor) -> Tensor:
    """Return the median of all losses but the last `streak`, as `Tensor.median` does; infinity if one is not positive.

    Where losses change their sign, as a likelihood may, no multiple of one is a measure of another.
    """
    before = len(losses_S) - streak  # stays on the device: the host does not wait for it
    numbers_S = torch.arange(len(losses_S), device=losses_S.device)
    sorted_S = torch.where(numbers_S < before, losses_S, math.inf).sort().values
    median = sorted_S.gather(0, (before.view(1) - 1) // 2)[0]
    return torch.where((losses_S > 0).all(), median, math.inf)


def settings_of_loss(config: Any) -> dict[str, Any]:
    """Return by name the settings that a loss may depend on: all but `optim` and `epochs`."""
    return {name: value for name, value in vars(config).items() if name not in ("optim", "epochs")}


def sample_indices(step: Step) -> list[int]:
    """Return the indices of this rank's samples in the training split."""
    indices: list[int] = torch.cat(step.share.micros).tolist()
    return indices


def readable(value: float) -> float | str:
    """Return `value`, or its text if it is not finite: JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)
