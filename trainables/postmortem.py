"""The post-mortem of a training step: which module's output or gradient was first not finite.

A step that failed is run once more under hooks, so that the steps that do not fail pay nothing.
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
    """What was first not finite in a step. Modules are named as `nn.Module.named_modules` does: "" is the model itself.

    sentence: the findings in words, for a person.
    module: the innermost one in whose forward pass such a value first appeared, from nothing but finite ones. None if
        there is none, or if it comes from outside the model: from the batch or from the loss function.
    gradient_module: the same for the backward pass. None after a bad forward pass, which spoils gradients anywhere.
    parameter: the first whose gradient was not finite, in the order in which gradients arrive; where all are finite and
        too large to be squared for their norm, the one with the largest.
    reproduced: whether anything was not finite.
    """

    sentence: str
    module: str | None
    gradient_module: str | None
    parameter: str | None
    reproduced: bool


def examine(module: nn.Module, replay: Callable[[Witness], object], whole: bool = False) -> Findings:
    """Run a step again, as far as is needed, and return what in it was first not finite.

    replay: runs forward and backward through `module` or through any of its submodules, in any order, for one or for
        several micro-batches. It sets the random generators itself, and shows the witness each batch before anything is
        computed from it, and each loss before it goes backward from it. It is broken off, by an exception of ours, when
        what is sought has been found.
    whole: it is not broken off. Other ranks, where nothing may be found, run it too, and may wait for this one in it.

    Gradients are cleared before and after; buffers are put back. What `replay` raises is raised. A constant made of 0
    and -inf is a mask and counts as finite; so does an -inf that a module takes in and turns into something finite.
    """
    witness = Witness(module, whole)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.zero_grad(set_to_none=True)
    try:
        witness.watch()
        with contextlib.suppress(_Found):
            replay(witness)
            witness.see_gradients()
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
    """Both an event and a parameter have been seen: nothing that is still to come can change the findings."""


class _Event(NamedTuple):
    module: str | None  # None: outside the model
    sentence: str
    backward: bool = False
    masking: bool = False  # nothing but -inf, perhaps on purpose


class Witness:
    """Sees a step as it runs.

    Gradients are watched at the nodes of the autograd graph. A hook on a tensor sees the sum of what all its consumers
    send back, and so would accuse every module that shares an input with the one to blame.
    """

    def __init__(self, model: nn.Module, whole: bool) -> None:
        self.model, self.whole = model, whole
        self.handles: list[RemovableHandle] = []
        self.running: list[tuple[str, _Event | None]] = []  # each with what was known when its forward began
        self.nodes: set[Node] = set()
        self.outermost: set[Node] = set()  # those that gradients reach from outside the model
        self.not_finite: list[str] = []  # of the batch at hand
        self.first: _Event | None = None
        self.parameter: str | None = None

    def watch(self) -> None:
        for name, part in self.model.named_modules():
            # First of the hooks before and last of those after: what others do counts as done by the module.
            on_enter, on_exit = partial(self.on_enter, name), partial(self.on_exit, name)
            self.handles.append(part.register_forward_pre_hook(on_enter, prepend=True, with_kwargs=True))
            # Always: a call that raises has ended too. Activation checkpointing ends its calls like that.
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
        """Of gradients that are all finite while their norm is not, name the largest."""
        gradients = {name: x.grad for name, x in self.model.named_parameters() if x.grad is not None}
        if self.first is None and self.parameter is None and not get_total_norm(gradients.values()).isfinite():
            self.parameter = max(gradients, key=lambda name: float(gradients[name].abs().max()))
            sentence = f"the largest gradient, that of {self.parameter}, was finite but too large for a norm"
            self.first = _Event(None, sentence)

    def note(self, module: str | None, subject: str, backward: bool = False, masking: bool = False) -> None:
        """Keep what was first not finite; of what is so outside the model, the batch itself may have been before it."""
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
        """Watch the nodes behind these tensors; those not yet known were made by `module`."""
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
        # What is sent to an input that needs no gradient goes nowhere.
        used = [x for x, (behind, _) in zip(sent, node.next_functions, strict=False) if behind]
        if came_finite and _all_finite(used):
            return
        subject = f"the gradient in {self.spoken(module or '')}"
        # A watched node that sent it would have been seen to: it is from outside, or a sum, or of a tensor's own hook.
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
    """The tensors that can be other than finite, in nested containers and dataclasses."""
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
    """Those that are not finite, but for constant masks."""
    return [x for x in tensors if not _all_finite([x]) and (x.requires_grad or not _is_mask(x))]


def _is_mask(x: Tensor) -> bool:
    return bool(((x == 0) | (x == -math.inf)).all() and (x == 0).any())
