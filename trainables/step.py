"""One training step up to its gradient: forward and backward over a share's micro-batches, on one or several ranks.

Shape suffixes: U the sums of the loss terms and, at last, their common count.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainables.contract import UserError
from trainables.optim import Optim
from trainables.samples import Batch, Ranks, Share

# By name: a scalar, summed over the samples of a batch, and the count that it was summed over.
Pairs = Mapping[str, tuple[Tensor, Tensor | int]]
Cast = contextlib.AbstractContextManager[None]

UNUSED = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")  # DDP's words


class Loss(nn.Module):
    """A family's loss as a module, so that DDP wraps the loss while the family gets its plain model.

    carried_2: a parameter that stays 0 and is never trained. Its gradient is the loss itself and its count, so that
        both reach every rank with the gradients and need no collective of their own.
    """

    def __init__(self, loss: Callable[[nn.Module, Batch, Any], Pairs], model: nn.Module, config: Any) -> None:
        super().__init__()
        self.loss, self.model, self.config = loss, model, config
        self.carried_2 = nn.Parameter(torch.zeros(2))

    def forward(self, batch: Batch) -> tuple[Pairs, Tensor]:
        """Return the loss terms of a batch and their sum, a scalar, which is minimised."""
        pairs = {
            name: (term_sum.to(torch.promote_types(term_sum.dtype, torch.float32)), count)
            for name, (term_sum, count) in checked(self.loss(self.model, batch, self.config), "loss").items()
        }
        total = functools.reduce(operator.add, [term_sum for term_sum, _ in pairs.values()])
        known_2 = torch.stack([total, torch.ones_like(total) * shared_count(pairs)]).detach()
        return pairs, total + (self.carried_2 * known_2).sum()

    def global_loss(self) -> tuple[Tensor, Tensor]:
        """Return loss and count of the last backward pass, accumulated and averaged over ranks as its gradients are."""
        assert self.carried_2.grad is not None, "backward comes first"
        loss, count = self.carried_2.grad
        return loss, count


def compiled(loss: Loss) -> nn.Module:
    """Return `loss` under torch.compile, with the same weights and the same random numbers.

    Post-mortem, memory probe and scores use the plain loss: they must see into the model or run only a step or two.
    """
    torch._dynamo.reset()  # earlier trials' graphs count towards dynamo's limit, beyond which it compiles nothing more
    module = torch.compile(loss, options={"fallback_random": True})
    assert isinstance(module, nn.Module), "of a module it makes a module"
    return module


def over_ranks(loss: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Return `loss` wrapped in DDP, which averages its gradients over the ranks; with one rank, `loss` itself."""
    if ranks.size == 1:
        return loss
    # Buffers are synchronised once per epoch, not in every step: see `trainables.loop.broadcast_buffers`.
    return DistributedDataParallel(
        loss,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def without_gradient(loss: Loss, error: Exception) -> list[str]:
    """Return the parameters of `loss` that DDP's `error` is about: they had no gradient in the micro-batch before."""
    found = UNUSED.search(str(error))
    trained = [name.removeprefix("model.") for name, part in loss.named_parameters() if part.requires_grad]
    return [trained[int(number)] for number in found[1].split()] if found else []


@dataclass(frozen=True)
class Summed:
    """The loss terms of a batch, in alphabetical order, and their common count, summed over this rank's samples."""

    terms: tuple[str, ...]
    sums_U: Tensor

    def __add__(self, other: Summed) -> Summed:
        other.require(self.terms)
        return Summed(self.terms, self.sums_U + other.sums_U)

    def require(self, terms: tuple[str, ...]) -> None:
        """Raise UserError unless its terms are these, which another batch had."""
        if self.terms != terms:
            raise UserError(
                f"the loss terms of a batch are {', '.join(self.terms)}, and of another {', '.join(terms)}: they must "
                "be the same in every batch; a term that has nothing to add returns a sum of zero"
            )


def backward(
    loss: nn.Module, batches: Iterator[Batch], share: Share, scaler: torch.amp.GradScaler, cast: Cast
) -> Summed:
    """Accumulate in `.grad` the gradient of the summed loss divided by the effective batch size; return the loss.

    Dividing by a constant keeps fp16 in range.
    """
    parts: list[Summed] = []
    for last in [False] * (len(share.micros) - 1) + [True]:
        with contextlib.ExitStack() as stack:
            if isinstance(loss, DistributedDataParallel) and not last:
                stack.enter_context(loss.no_sync())
            batch = next(batches)  # outside autocast, as in the thread that gathers it for a GPU
            with cast:
                pairs, total = loss(batch)
            total.backward(scaler.scale(torch.full_like(total, share.weight / share.effective)))
        terms = tuple(sorted(pairs))
        sums = [*(pairs[term][0] for term in terms), torch.ones_like(total) * shared_count(pairs)]
        parts.append(Summed(terms, torch.stack(sums).detach() * share.weight))
    return functools.reduce(operator.add, parts)


def checked(returned: Any, function: str) -> Pairs:
    """Return what a task's `function`, its loss or its score, returned; raises UserError if that is no `Pairs`."""
    rule = f"{function} must return, by name, pairs of a sum and the count it was taken over, both scalar"
    if not isinstance(returned, Mapping) or (function == "loss" and not returned):
        raise UserError(f"{rule}, and returned {'none' if isinstance(returned, Mapping) else described(returned)}")
    for name, pair in returned.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"{rule}, and {name!r} is {described(pair)}")
        for part in pair:
            if isinstance(part, Tensor) and part.ndim > 0:
                raise UserError(f"{rule}, and in {name!r} there is {described(part)}")
        if function == "loss" and not isinstance(pair[0], Tensor):
            raise UserError(f"{rule}, and in {name!r} the sum is {described(pair[0])}, not a tensor")
    return returned


def described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def shared_count(pairs: Pairs) -> Tensor | int:
    """Return the count of all terms; raises UserError if they have several, or one that is no int or tensor."""
    first, *others = (count for _, count in pairs.values())
    if not isinstance(first, int | Tensor):
        found = type(first).__name__
        raise UserError(f"the loss terms {', '.join(pairs)} must count in an int or a scalar tensor, not {found}")
    # Tensors are compared by identity: comparing their values would make the host wait for the GPU.
    if any(not (other is first or (isinstance(other, int) and other == first)) for other in others):
        raise UserError(f"the loss terms {', '.join(pairs)} must share one count: one int, or the very same tensor")
    return first


def divisor_of(count: Tensor) -> Tensor:
    """Return the divisor for a sum over `count`: 1 where the count is 0. NaN stays NaN, and ends the trial."""
    return torch.where(count <= 0, torch.ones_like(count), count)


def autocast(device: torch.device, optim: Optim) -> Cast:
    """Return the context for a forward pass in `optim.precision`."""
    if optim.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if optim.precision == "fp16" else torch.bfloat16)
