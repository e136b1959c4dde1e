"""One training step up to its gradient: a family's loss over the micro-batches of a share, on one or several ranks."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainables.optim import Optim
from trainables.samples import Batch, Ranks, Share

# By name: a sum over the samples of a batch, a scalar, and over how many it was taken.
Pairs = Mapping[str, tuple[Tensor, Tensor | int]]
Cast = contextlib.AbstractContextManager[None]


class Loss(nn.Module):
    """A family's loss as a module, so that DDP wraps the loss and the family gets its plain model.

    carried: a parameter that is always 0 and never trained. Its gradient is the loss itself, so that the loss reaches
        every rank with the gradients, and costs no collective of its own.
    """

    def __init__(self, loss: Callable[[nn.Module, Batch, Any], Pairs], model: nn.Module, config: Any) -> None:
        super().__init__()
        self.loss, self.model, self.config = loss, model, config
        self.carried = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> tuple[Pairs, Tensor]:
        """The loss terms of a batch, and what is to be minimised: their sum."""
        pairs = {
            name: (term_sum.to(torch.promote_types(term_sum.dtype, torch.float32)), count)
            for name, (term_sum, count) in self.loss(self.model, batch, self.config).items()
        }
        total = functools.reduce(operator.add, [term_sum for term_sum, _ in pairs.values()])
        return pairs, total + self.carried * total.detach()

    def global_loss(self) -> Tensor:
        """The loss of the step that was last taken back, summed and averaged over the ranks as its gradients are."""
        assert self.carried.grad is not None, "backward comes first"
        return self.carried.grad


def compiled(loss: Loss) -> nn.Module:
    """`loss` as torch.compile makes it, of the same weights and with the same random numbers.

    What must see into the model, or runs a step or two, keeps to the plain one: post-mortem, memory probe and scores.
    """
    torch._dynamo.reset()  # what earlier trials compiled counts against a limit, beyond which nothing more is
    module = torch.compile(loss, options={"fallback_random": True})
    assert isinstance(module, nn.Module), "of a module it makes a module"
    return module


def over_ranks(loss: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """`loss`, with its gradients averaged over the ranks."""
    if ranks.size == 1:
        return loss
    # Buffers are shared once an epoch, not in every step: see `trainables.loop.broadcast_buffers`.
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
                pairs, total = loss(next(batches))
            total.backward(scaler.scale(0 * total.detach() + share.weight / share.effective))
        sums_T = torch.stack([term_sum.detach() for term_sum, _ in pairs.values()]) * share.weight
        parts.append(Summed(tuple(pairs), sums_T, shared_count(pairs)))
    return functools.reduce(operator.add, parts)


def shared_count(pairs: Pairs) -> Tensor | int:
    first, *others = (count for _, count in pairs.values())
    # Tensors are compared by identity: to compare their values would make the host wait for the GPU.
    if any(not (other is first or (isinstance(other, int) and other == first)) for other in others):
        raise ValueError(f"the loss terms {', '.join(pairs)} must share one count: one int, or the very same tensor")
    return first


def global_count(summed: Summed, share: Share, ranks: Ranks) -> Tensor:
    """The count of the batch over all ranks. A count by the sample is known without asking."""
    if isinstance(summed.count, int):
        if not summed.count or summed.count % share.size:
            raise ValueError(f"a loss counts {summed.count} for {share.size} samples: return such a count as a tensor")
        return summed.sums_T.new_full((), summed.count // share.size * share.effective)
    count = summed.count * share.weight
    if ranks.size > 1:
        dist.all_reduce(count)
    return count


def divisor_of(count: Tensor) -> Tensor:
    """What a sum over so many is divided by: 1 where nothing counts. A NaN stays one, and ends the trial."""
    return torch.where(count <= 0, torch.ones_like(count), count)


def autocast(device: torch.device, optim: Optim) -> Cast:
    """The precision of a forward pass."""
    if optim.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if optim.precision == "fp16" else torch.bfloat16)
