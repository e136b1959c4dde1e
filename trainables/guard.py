"""The guard of the training loop: ends a trial in the step in which its training blows up, and says why.

Everything is decided on the device, from values that all ranks share after the gradients' all-reduce, before a weight
is changed. The host learns of it one step late, so that it never waits for the step it has just queued; no harm is done
meanwhile, because once `diverged` is true every further step is skipped on the device.

Shape suffixes: S the newest steps, at most KEPT of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainables.contract import Diverged
from trainables.optim import Optim
from trainables.postmortem import Findings, Witness, examine
from trainables.resume import Generators, set_generators
from trainables.samples import Ranks, Samples, Share, on_device
from trainables.step import Loss, Summed, autocast, backward, divisor_of

KEPT = 50  # steps whose loss and gradient norm a post-mortem shows, and over which the running median is taken
SETTLED = 10  # steps before the running median means anything
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What identifies a step, so that it can be run again. `number` counts from the start of the trial.

    scale: what fp16 multiplied the loss with, a scalar; 1 elsewhere.
    """

    number: int
    epoch: int
    lr: float
    scale: Tensor
    share: Share
    generators: Generators
    summed: Summed
    count: Tensor


class Asked(NamedTuple):
    """A step whose verdict is on its way to the host, with the losses and gradient norms up to it."""

    step: Step
    diverged: Tensor  # on the host, once `ready`
    spiked: Tensor  # whether that was by the spike rule
    ready: torch.cuda.Event | None
    losses: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]


@dataclass(frozen=True)
class Replay:
    """Runs a step again on the weights as they are, on every rank for itself."""

    loss: Loss
    samples: Samples
    optim: Optim
    device: torch.device
    ranks: Ranks

    @property
    def scales(self) -> bool:
        """Whether losses are scaled."""
        return self.optim.precision == "fp16"

    def findings(self, step: Step) -> Findings:
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

        try:
            return examine(self.loss.model, again, whole=self.ranks.size > 1)
        except Exception as error:  # on one rank perhaps, and the others wait for what it found
            return Findings(f"running the step again raised {type(error).__name__}: {error}", None, None, None, False)


class Guard:
    """Watches every step. Its state is part of a checkpoint, so that a resumed trial is judged as if uninterrupted.

    names: as in `trainables.loop.Task`, of the trial's config.
    """

    def __init__(self, replay: Replay, names: Callable[[Sequence[int]], list[str]]) -> None:
        self._spike = replay.optim.spike
        self._replay, self._names = replay, names
        self._ranks = replay.ranks
        self._settings = _settings_of_loss(replay.loss.config)
        self._diverged = torch.zeros((), dtype=torch.bool, device=replay.device)
        self._spiked = torch.zeros((), dtype=torch.bool, device=replay.device)
        self._streak = torch.zeros((), dtype=torch.int64, device=replay.device)  # steps above the median, in a row
        self._losses: deque[Tensor] = deque(maxlen=KEPT)
        self._norms: deque[Tensor] = deque(maxlen=KEPT)
        self._asked: Asked | None = None
        self._latest: Asked | None = None

    def judge(self, loss: Tensor, norm: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a step must be skipped, and whether it is an overflow of fp16, which a smaller scale may mend.

        loss, norm: of the whole batch, the same on every rank. scale: the loss scale, 1 where there is none.
        """
        # A loss that is not finite leaves the gradient finite where `clamp` or `where` have cut it off.
        bad = ~(norm.isfinite() & loss.isfinite())
        overflow = bad & loss.isfinite() & (scale > 1)
        blown_up = bad & ~overflow
        self._diverged = self._diverged | blown_up
        if self._spike is not None and len(self._losses) >= SETTLED:
            median = _nanmedian(torch.stack(tuple(self._losses)))
            above = (median > 0) & (loss > self._spike.factor * median)
            self._streak = (self._streak + 1) * above
            self._spiked = (self._streak >= self._spike.patience) & ~blown_up
            self._diverged = self._diverged | self._spiked
        self._losses.append(loss)
        # A mended overflow shows as one, also where it left a NaN.
        self._norms.append(torch.where(overflow, math.inf, norm))
        return self._diverged | bad, overflow

    def follow(self, step: Step) -> None:
        """Let the verdict on `step` travel to the host; `check` looks at it."""
        on_host = self._diverged.to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if self._diverged.is_cuda else None
        if ready is not None:
            ready.record()
        self._asked = self._latest = Asked(step, on_host, self._spiked, ready, tuple(self._losses), tuple(self._norms))

    def check(self) -> None:
        """Raise `Diverged`, with the same reason and post-mortem on every rank, if that was the verdict."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if asked.ready is not None:
            asked.ready.synchronize()
        if asked.diverged:
            raise self._post_mortem(asked)

    def weights_blown_up(self) -> Diverged:
        """What to raise where the step that was followed last, healthy itself, has left weights that are not finite."""
        assert self._latest is not None, "a step comes first"
        step, details = self._latest.step, self._details(self._latest)
        details |= self._told(self._everyones_samples(step))
        return Diverged(f"the weights are not finite after an update at lr {step.lr:.3g}", step.number, details)

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
        """What is known of a step without running it again. Every rank must ask."""
        step, sums_T = asked.step, asked.step.summed.sums_T.clone()
        if self._ranks.size > 1:
            dist.all_reduce(sums_T)
        terms = dict(zip(step.summed.terms, (sums_T / divisor_of(step.count)).tolist(), strict=True))
        return {
            "epoch": step.epoch,
            "lr": step.lr,
            "terms": {name: readable(value) for name, value in terms.items()},
            "losses": [readable(value) for value in torch.stack(asked.losses).tolist()],
            "grad_norms": [readable(value) for value in torch.stack(asked.norms).tolist()],
            "loss_scale": float(step.scale) if self._replay.scales else None,
        }

    def _spike_in_words(self, loss: float) -> str:
        assert self._spike is not None
        rule = f"above {self._spike.factor:g} times its running median for {self._spike.patience} steps"
        return f"the loss was {rule}, {loss:.4g} at last,"

    def _culprit(self, step: Step) -> tuple[int, Findings, list[int]]:
        """The first rank on which the step fails when it is run again, what was found there, and its samples."""
        everyone = self._everyones((self._ranks.rank, self._replay.findings(step), sample_indices(step)))
        return next((item for item in everyone if item[1].reproduced), everyone[0])

    def _told(self, batch: list[int]) -> dict[str, Any]:
        """Samples by their numbers in the training split and, where the family has names for them, by name."""
        try:
            names = self._names(batch)
        except Exception as error:  # a family's, and the trial has diverged whatever its samples are called
            names = [f"naming them raised {type(error).__name__}: {error}"]
        return {"batch": batch, "names": names} if names else {"batch": batch}

    def _everyones_samples(self, step: Step) -> list[int]:
        return [index for samples in self._everyones(sample_indices(step)) for index in samples]

    def _everyones(self, own: T) -> list[T]:
        """What every rank has, in their order."""
        if self._ranks.size == 1:
            return [own]
        everyone: list[Any] = [None] * self._ranks.size
        dist.all_gather_object(everyone, own)
        return everyone

    def state_dict(self) -> dict[str, Any]:
        # Numbers and no tensors: that a norm was infinite once is no sign of a state that has blown up.
        losses, norms = ([float(value) for value in kept] for kept in (self._losses, self._norms))
        return {"losses": losses, "norms": norms, "streak": self._streak, "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what came before, unless under other settings: another weight of a term is another scale."""
        if state.get("settings") != self._settings:
            return
        device = self._replay.device
        for kept, saved in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            kept.extend(torch.as_tensor(value, dtype=torch.float32, device=device) for value in saved)
        self._streak = state["streak"].to(device)


def _nanmedian(values_S: Tensor) -> Tensor:
    """As `Tensor.nanmedian`, for which the host would wait."""
    sorted_S = values_S.sort().values  # NaN comes last
    middle = ((~sorted_S.isnan()).sum() - 1).clamp(min=0) // 2
    return sorted_S.gather(0, middle.view(1))[0]


def _settings_of_loss(config: Any) -> str:
    """What losses are measured under: all settings but how, and for how long, the weights are optimised."""
    return repr({name: value for name, value in vars(config).items() if name not in ("optim", "epochs")})


def sample_indices(step: Step) -> list[int]:
    """The numbers of this rank's samples."""
    indices: list[int] = torch.cat(step.share.micros).tolist()
    return indices


def readable(value: float) -> float | str:
    """JSON knows no number that is not finite."""
    return value if math.isfinite(value) else str(value)
