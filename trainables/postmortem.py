"""The post-mortem of a training step: finds the module whose output or gradient was first not finite.

A failed step is run again under hooks, so that healthy steps cost nothing extra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Findings:
    """What was first not finite in a step. Modules are named as in `nn.Module.named_modules`: "" is the model itself.

    sentence: the findings in words, for people to read.
    module: the innermost module whose forward pass first produced a value that is not finite, from finite inputs. None
        if there is none, or if the value came from outside the model: from the batch or the loss function.
    gradient_module: the same for the backward pass. None after a bad forward pass, which spoils gradients everywhere.
    parameter: the first whose gradient was not finite, in the order in which gradients arrive; if all are finite but
        their norm overflows, the one with the largest gradient.
    reproduced: whether running the step again gave anything that is not finite.
    """

    sentence: str
    module: str | None
    gradient_module: str | None
    parameter: str | None
    reproduced: bool


def examine(module: nn.Module, replay: Callable[[Witness], object], whole: bool = False) -> Findings:
    """Run a step, or a score, again, as far as needed, and return what in it was first not finite.

    replay: runs forward and, in a step, backward through `module` or any of its submodules, in any order, for one or
        more micro-batches. It sets the random generators itself if it needs to, and shows the witness each batch before
        computing with it and each loss before its backward pass. An internal exception interrupts it once nothing more
        can be learnt.
    whole: never interrupt `replay`. Needed with several ranks: others run it too, may find nothing in it, and may wait
        for this one inside it.

    Gradients are cleared before and after, and buffers restored. An exception raised by `replay` propagates unless
    something was not finite before it. A constant of only 0 and -inf is a mask and counts as finite; so does a -inf
    input that a module turns into finite output.
    """
    witness = Witness(module, whole)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.zero_grad(set_to_none=True)
    try:
        witness.watch()
        with contextlib.suppress(_Found):
            replay(witness)
            witness.see_gradients()
    except Exception:
        if not witness.findings().reproduced:
            raise
    finally:
        for handle in witness.handles:
            handle.remove()
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    return witness.findings()


class _Found(Exception):
    """An event and a parameter have both been found: nothing later in the step can change the findings."""


class _Event(NamedTuple):
    module: str | None  # None: outside the model
    sentence: str
    backward: bool = False
    masking: bool = False  # only -inf was seen, perhaps a mask


class Witness:
    """Watches a step as it runs, through hooks on modules, parameters and autograd nodes.

    Gradients are watched at autograd nodes because a tensor hook sees the sum of the gradients from all consumers, and
    so would blame every module that shares an input with the culprit.
    """

    def __init__(self, model: nn.Module, whole: bool) -> None:
        self.model, self.whole = model, whole
        self.handles: list[RemovableHandle] = []
        self.running: list[tuple[str, _Event | None]] = []  # modules in their forward, each with `first` as it began
        self.nodes: set[Node] = set()
        self.outermost: set[Node] = set()  # nodes that gradients reach from outside the model
        self.not_finite: list[str] = []  # names of the current batch's tensors that are not finite
        self.first: _Event | None = None
        self.parameter: str | None = None

    def watch(self) -> None:
        for name, part in self.model.named_modules():
            # Run first of the pre-hooks and last of the forward hooks: what other hooks do counts as the module's.
            on_enter, on_exit = partial(self.on_enter, name), partial(self.on_exit, name)
            self.handles.append(part.register_forward_pre_hook(on_enter, prepend=True, with_kwargs=True))
            # always_call, because a call that raises has ended too. Activation checkpointing ends its calls like that.
            self.handles.append(part.register_forward_hook(on_exit, always_call=True))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook = partial(self.on_parameter, name)
                self.handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def see_batch(self, batch: Mapping[str, Tensor]) -> None:
        self.not_finite = [name for name, x in batch.items() if _wrong([x])]

    def see_loss(self, loss: Tensor) -> None:
        if not _all_finite([loss]):
            self.note(None, "the loss, outside the model,")

    def see_gradients(self) -> None:
        """If all gradients are finite but their norm is not, name the parameter with the largest gradient."""
        gradients = {name: x.grad for name, x in self.model.named_parameters() if x.grad is not None}
        if self.first is None and self.parameter is None and not get_total_norm(gradients.values()).isfinite():
            self.parameter = max(gradients, key=lambda name: float(gradients[name].abs().max()))
            sentence = f"the largest gradient, that of {self.parameter}, was finite but too large for a norm"
            self.first = _Event(None, sentence)

    def note(self, module: str | None, subject: str, backward: bool = False, masking: bool = False) -> None:
        """Keep the first event; one from outside the model is put down to the batch if that is not finite."""
        sentence = f"{subject} was first not finite"
        if module is None and self.not_finite:
            names = " and ".join(self.not_finite)
            sentence = f"the batch itself, in its {names}, was first not finite, and then {subject.removesuffix(',')}"
        self.first = self.first or _Event(module, sentence, backward, masking)

    def findings(self) -> Findings:
        event = self.first
        if event is None and self.parameter is not None:
            event = _Event(None, f"the gradient of {self.parameter} was first not finite")
        if event is None:
            unseen = "what was not finite could not be reproduced by running the step again"
            return Findings(unseen, None, None, None, reproduced=False)
        module, gradient_module = (None, event.module) if event.backward else (event.module, None)
        return Findings(event.sentence, module, gradient_module, self.parameter, True)

    def on_enter(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caller = self.running[-1][0] if self.running else None
        self.running.append((name, self.first))
        inputs = _tensors((args, kwargs))
        self.own(caller, inputs)
        wrong = _wrong(inputs)
        masking = all(bool((x.isfinite() | (x == -math.inf)).all()) for x in map(Tensor.detach, wrong))
        sender = "the loss function" if caller is None else self.spoken(caller)
        if wrong:
            self.note(caller, f"a value that {sender} passed to {self.spoken(name)}", masking=masking)

    def on_exit(self, name: str, part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        _, before = self.running.pop()
        outputs = _tensors(output)
        self.own(name, outputs)
        if not self.running:
            self.outermost.update(_nodes(outputs))
        wrong = _wrong(outputs)
        if wrong:
            state = [key for key, x in [*part.named_parameters(), *part.named_buffers()] if _wrong([x])]
            likewise = f", like its {' and '.join(state)}," if state else ""
            self.note(name, f"the output of {self.spoken(name)}{likewise}")
        elif self.first and self.first.masking:
            self.first = before

    def own(self, module: str | None, tensors: Iterable[Tensor]) -> None:
        """Hook the autograd nodes behind these tensors; nodes not yet seen are attributed to `module`."""
        nodes = _nodes(tensors)
        while nodes:
            node = nodes.pop()
            if node not in self.nodes:
                self.nodes.add(node)
                self.handles.append(node.register_hook(partial(self.on_gradient, module, node)))
                nodes.extend(behind for behind, _ in node.next_functions if behind is not None)

    def on_gradient(self, module: str | None, node: Node, sent: tuple[Any, ...], received: tuple[Any, ...]) -> None:
        if self.first:
            return
        came_finite = _all_finite(received)
        # A gradient sent to an input that needs none is discarded.
        used = [x for x, (behind, _) in zip(sent, node.next_functions, strict=False) if behind]
        if came_finite and _all_finite(used):
            return
        subject = f"the gradient in {self.spoken(module or '')}"
        # Had a watched node sent it, the event would be noted: it is from outside, a sum, or from a tensor's own hook.
        if module is None or (not came_finite and node in self.outermost):
            module, subject = None, "the gradient that the loss function passed to the model"
        self.note(module, subject, backward=True)
        self.leave()

    def on_parameter(self, name: str, parameter: Tensor) -> None:
        if self.parameter is None and not _all_finite([parameter.grad]):
            self.parameter = name
            self.leave()

    def leave(self) -> None:
        if self.first and self.parameter is not None and not self.whole:
            raise _Found

    def spoken(self, name: str) -> str:
        return name or f"the model itself ({type(self.model).__name__})"


def _tensors(value: object) -> list[Tensor]:
    """Return the floating-point and complex tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _nodes(tensors: Iterable[Tensor]) -> list[Node]:
    return [get_gradient_edge(x).node for x in tensors if x.requires_grad]


def _all_finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(bool(x.detach().isfinite().all()) for x in tensors if x is not None)


def _wrong(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that are not finite, except constant masks."""
    return [x for x in tensors if not _all_finite([x]) and (x.requires_grad or not _is_mask(x))]


def _is_mask(x: Tensor) -> bool:
    return bool(((x == 0) | (x == -math.inf)).all() and (x == 0).any())
