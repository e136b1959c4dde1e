"""The post-mortem names the module where a value or a gradient was first not finite, and leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from toy_task import SpoilGradient

from trainables.postmortem import Findings, Witness, examine

WIDTH = 8
# Modules of `Net` as they are entered, with one used twice, one that returns its input and the whole model.
NAMES = [
    "",
    "stem",
    "stem.conv",
    "stem.norm",
    "stem.act",
    "blocks",
    "blocks.0",
    "blocks.0.gate",
    "blocks.1",
    "blocks.1.0",
    "recurrent",
    "same",
    "attention",
    "shared",
    "heads.far",
]


class Block(nn.Module):
    """A gated residual block: two branches share an input, and its own code works before, between and after them."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.value, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.value(self.spoil(y)) * self.gate(y).sigmoid()


class Out(NamedTuple):
    near: Tensor
    rest: dict[str, Any]


@dataclass
class Batch:
    x: Tensor
    valid: Tensor


class Net(nn.Module):
    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3, 1))
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv1d(3, WIDTH, 3, padding=1))
        self.stem.add_module("norm", nn.BatchNorm1d(WIDTH))
        self.stem.add_module("act", nn.ReLU())
        self.blocks = nn.Sequential(Block(spoil), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.same, self.off = nn.Identity(), nn.Dropout(0.5).eval()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.heads = nn.ModuleDict({"near": nn.Linear(WIDTH, 2), "far": nn.Linear(WIDTH, 2)})

    def forward(self, batch: Batch) -> Out:
        x = self.stem(batch.x + self.offset).transpose(1, 2)
        x = self.off(self.same(self.recurrent(self.blocks(x))[0]))
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.frozen(x)
        x = self.shared(self.shared(x).relu())
        with torch.no_grad():
            target = self.frozen(x)
        return Out(self.heads["near"](x), {"features": x, "valid": batch.valid, "target": [target]})


def batch_of(seed: int = 1) -> Batch:
    return Batch(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed)), torch.ones(4, dtype=torch.int64))


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """Calls the model and then, outside of it, one of its parts."""
    out = net(batch)
    return out.near.square().mean() + net.get_submodule("heads.far")(out.rest["features"]).square().mean()


def examined(net: nn.Module, *batches: Batch, loss: Callable[[nn.Module, Batch], Tensor] = loss_of) -> Findings:
    """The findings on a step with these micro-batches."""

    def replay(witness: Witness) -> None:
        for batch in batches or [batch_of()]:
            witness.see_batch(vars(batch))
            total = loss(net, batch)
            witness.see_loss(total.detach())
            total.backward()

    findings = examine(net, replay)
    json.dumps(dataclasses.asdict(findings), allow_nan=False)
    return findings


def in_words(name: str) -> str:
    return name or "the model itself (Net)"


def spoiled(x: Any, value: float) -> Any:
    """Nested tensors with one number replaced."""

    def spoil(tensor: Tensor) -> Tensor:
        return tensor.flatten().index_fill(0, torch.tensor(5), value).view_as(tensor)

    return tree_map_only(Tensor, lambda tensor: spoil(tensor) if tensor.is_floating_point() else tensor, x)


def spoiled_gradient(x: Any) -> Any:
    """The same nested tensors; their gradient is NaN."""
    spoil = torch.tensor(True)
    return tree_map_only(
        Tensor, lambda tensor: SpoilGradient.apply(tensor, spoil) if tensor.requires_grad else tensor, x
    )


def test_nothing_is_found_in_a_healthy_step() -> None:
    findings = examined(Net(), batch_of(1), batch_of(2))
    assert findings == Findings(findings.sentence, None, None, None, reproduced=False)
    assert findings.sentence == "what was not finite could not be reproduced by running the step again"


def test_the_largest_gradient_is_named_where_only_the_norm_is_not_finite() -> None:
    findings = examined(Net(), loss=lambda net, batch: 1e25 * loss_of(net, batch))
    assert (findings.module, findings.gradient_module, findings.parameter) == (None, None, "heads.far.bias")
    assert findings.reproduced
    assert findings.sentence == "the largest gradient, that of heads.far.bias, was finite but too large for a norm"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_the_module_with_the_first_bad_output_is_named(name: str, value: float) -> None:
    net = Net()
    net.get_submodule(name).register_forward_hook(lambda module, args, output: spoiled(output, value))
    findings = examined(net)
    assert findings.module == name
    assert findings.reproduced
    assert findings.sentence == f"the output of {in_words(name)} was first not finite"


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_gradient_of_an_output_is_the_modules_own(name: str) -> None:
    net = Net()
    net.get_submodule(name).register_forward_hook(lambda module, args, output: spoiled_gradient(output))
    findings = examined(net)
    assert (findings.module, findings.gradient_module) == (None, name)
    assert findings.reproduced
    assert findings.sentence == f"the gradient in {in_words(name)} was first not finite"


@pytest.mark.parametrize("name", NAMES[1:])  # what goes into the whole model needs no gradient
def test_a_spoiled_gradient_of_an_input_is_the_modules_own(name: str) -> None:
    net = Net()
    net.get_submodule(name).register_forward_pre_hook(lambda module, args: spoiled_gradient(args))
    findings = examined(net)
    assert (findings.module, findings.gradient_module) == (None, name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_backward_hook_of_a_module_counts_as_the_module(name: str, value: float) -> None:
    def spoil(module: nn.Module, sent: Any, received: Any) -> Any:
        return tuple(None if gradient is None else torch.full_like(gradient, value) for gradient in sent)

    net = Net()
    net.get_submodule(name).register_full_backward_hook(spoil)
    findings = examined(net)
    assert (findings.module, findings.gradient_module) == (None, name)


def test_the_first_bad_parameter_gradient_is_the_one_nearest_to_the_culprit() -> None:
    net = Net()
    net.blocks.register_forward_hook(lambda module, args, output: spoiled_gradient(output))
    assert examined(net).parameter in {"blocks.1.1.weight", "blocks.1.1.bias"}
    net = Net()
    net.heads["near"].requires_grad_(False)
    net.stem[0].register_forward_hook(lambda module, args, output: spoiled_gradient(output))
    assert examined(net).parameter in {"stem.conv.weight", "stem.conv.bias"}


def test_a_hook_of_a_parameter_counts_as_its_module() -> None:
    net = Net()
    net.shared.weight.register_hook(lambda gradient: gradient * math.nan)
    findings = examined(net)
    assert (findings.gradient_module, findings.parameter) == ("shared", "shared.weight")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("culprit", ["value", "gate"])
def test_a_branch_is_not_accused_for_its_neighbours_gradient(culprit: str, first: bool) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = x.expand(3, WIDTH)
            one, other = (self.value(y), self.gate(y)) if first else (self.gate(y), self.value(y))
            return one + other + y

    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Branches())
    net.get_submodule(f"1.{culprit}").register_forward_pre_hook(lambda module, args: spoiled_gradient(args))
    findings = examined(net, loss=lambda net, batch: net(torch.ones(1, WIDTH)).square().sum())
    assert findings.gradient_module == f"1.{culprit}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_modules_own_code_between_its_parts_is_the_module(value: float) -> None:
    findings = examined(Net(spoil=lambda x: spoiled(x, value)))
    assert findings.module == "blocks.0"
    assert findings.sentence == "a value that blocks.0 passed to blocks.0.value was first not finite"


def test_a_modules_own_code_between_its_parts_is_the_module_on_the_way_back_too() -> None:
    findings = examined(Net(spoil=lambda x: x + (x - x).abs().sqrt()))  # a zero's root: its slope is not finite
    assert (findings.module, findings.gradient_module) == (None, "blocks.0")


IN_X = "the batch itself, in its x, was first not finite, and then "


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_is_no_modules_fault(value: float) -> None:
    batch = batch_of()
    findings = examined(Net(), batch_of(2), Batch(spoiled(batch.x, value), batch.valid), batch_of(3))
    assert (findings.module, findings.gradient_module) == (None, None)
    assert findings.reproduced
    assert findings.sentence == IN_X + "a value that the loss function passed to the model itself (Net)"


# What a loss function may spoil, whatever the batch holds: before the model, between its parts, after it, and backward.
OUTSIDE: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "a value that the loss function passed to the model itself (Net)": lambda net, batch: loss_of(
        net, Batch(batch.x * math.nan, batch.valid)
    ),
    "a value that the loss function passed to shared": lambda net, batch: net.get_submodule("shared")(
        net(batch_of()).rest["features"].detach() * math.nan
    ).sum(),
    "the loss, outside the model,": lambda net, batch: loss_of(net, batch_of()) * math.nan,
    "the gradient that the loss function passed to the model": lambda net, batch: spoiled_gradient(
        loss_of(net, batch_of())
    ),
}


@pytest.mark.parametrize("subject", OUTSIDE)
def test_a_batch_is_blamed_for_what_the_loss_function_spoils_only_where_it_is_bad_itself(subject: str) -> None:
    good, bad = batch_of(), Batch(batch_of().x * math.nan, batch_of().valid)
    for batch, sentence in ((good, f"{subject} was first not finite"), (bad, IN_X + subject.removesuffix(","))):
        findings = examined(Net(), batch, loss=OUTSIDE[subject])
        assert (findings.module, findings.gradient_module) == (None, None)
        assert findings.reproduced
        assert findings.sentence == sentence


def test_a_bad_batch_that_the_model_never_saw_excuses_no_module() -> None:
    net = Net()
    net.stem.register_forward_hook(lambda module, args, output: spoiled(output, math.nan))
    bad = Batch(batch_of().x * math.nan, batch_of().valid)
    assert examined(net, bad, loss=lambda net, batch: loss_of(net, batch_of())).module == "stem"


def test_a_bad_gradient_of_a_good_loss_is_no_modules_fault() -> None:
    findings = examined(Net(), loss=lambda net, batch: spoiled_gradient(loss_of(net, batch)))
    assert (findings.module, findings.gradient_module) == (None, None)
    assert findings.sentence == "the gradient that the loss function passed to the model was first not finite"


def test_a_loss_function_that_spoils_what_goes_from_part_to_part_is_no_modules_fault() -> None:
    def far_of(spoil: Callable[[Any], Any]) -> Callable[[nn.Module, Batch], Tensor]:
        return lambda net, batch: net.get_submodule("heads.far")(spoil(net(batch).rest["features"])).sum()

    forward = examined(Net(), loss=far_of(lambda x: spoiled(x, math.nan)))
    assert (forward.module, forward.gradient_module) == (None, None)
    assert forward.sentence == "a value that the loss function passed to heads.far was first not finite"
    backward = examined(Net(), loss=far_of(spoiled_gradient))
    assert (backward.module, backward.gradient_module) == (None, None)
    assert backward.sentence == "the gradient that the loss function passed to the model was first not finite"


@pytest.mark.parametrize("name", ["stem.conv.weight", "frozen.bias", "attention.in_proj_weight"])
def test_a_bad_parameter_is_told_with_its_module(name: str) -> None:
    net = Net()
    with torch.no_grad():
        net.get_parameter(name).flatten()[-1] = math.nan
    module, _, parameter = name.rpartition(".")
    findings = examined(net)
    assert findings.module == module
    assert findings.sentence == f"the output of {module}, like its {parameter}, was first not finite"


def test_the_first_of_several_micro_batches_counts() -> None:
    calls: list[str] = []

    def spoil(name: str, call: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            calls.append(name)
            return spoiled(output, math.nan) if calls.count(name) == call else output

        return hook

    net = Net()
    net.get_submodule("heads.near").register_forward_hook(spoil("heads.near", 2))
    net.get_submodule("stem.conv").register_forward_hook(spoil("stem.conv", 3))
    assert examined(net, *(batch_of(seed) for seed in range(4))).module == "heads.near"


def test_nothing_but_minus_infinity_is_no_mask() -> None:
    model, x = nn.Linear(2, 1), torch.full((3, 2), -math.inf)

    def replay(witness: Witness) -> None:
        witness.see_batch({"x": x})
        model(x).sum().backward()

    assert examine(model, replay).sentence.startswith("the batch itself, in its x, was first not finite")


def test_a_mask_is_as_it_should_be() -> None:
    class Masked(nn.Module):
        """Attention by hand: a softmax over scores of which some are -inf, and torch's own layer with a float mask."""

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.softmax, self.last = nn.Linear(WIDTH, 5), nn.Softmax(dim=-1), nn.Linear(5, WIDTH)
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
            mask = nn.Transformer.generate_square_subsequent_mask(5)
            self.register_buffer("mask", mask.expand(2 * 2, 5, 5))  # by sample and head: one memory for all

        def forward(self, x: Tensor) -> Tensor:
            scores = self.scores(x).masked_fill(torch.arange(5) > 2, -math.inf)
            return self.layer(self.last(self.softmax(scores)), src_mask=self.mask)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return net(torch.ones(2, 5, WIDTH)).square().sum()

    net = Masked()
    assert not examined(net, loss=loss).reproduced
    net.layer.linear1.register_forward_hook(lambda module, args, output: spoiled(output, math.nan))
    assert examined(net, loss=loss).module == "layer.linear1"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpoints_are_seen_through(use_reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.spoil: Callable[[Tensor], Tensor] = lambda x: x

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            return self.last(
                checkpoint(lambda x: self.middle(self.spoil(x)).tanh(), first, use_reentrant=use_reentrant)
            )

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return net(torch.ones(2, WIDTH)).square().sum()

    net = Saving()
    assert not examined(net, batch_of(), batch_of(), loss=loss).reproduced
    hook = net.middle.register_forward_hook(lambda module, args, output: spoiled(output, math.nan))
    assert examined(net, loss=loss).module == "middle"
    hook.remove()
    net.middle.register_forward_hook(lambda module, args, output: spoiled_gradient(output))
    assert examined(net, loss=loss).gradient_module == "middle"
    net.spoil = lambda x: spoiled(x, math.nan)
    assert examined(net, loss=loss).module == ""


def test_a_gradient_that_goes_nowhere_is_no_finding() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            return gradient, torch.tensor(math.nan)

    assert examined(Net(spoil=lambda x: Scaled.apply(x, torch.tensor(2.0)))).gradient_module is None
    assert examined(Net(spoil=lambda x: Scaled.apply(x, nn.Parameter(torch.tensor(2.0))))).gradient_module == "blocks.0"


def test_a_call_that_failed_and_was_caught_has_ended() -> None:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        with pytest.raises(RuntimeError, match="size of tensor a"):
            net(Batch(batch.x[:, :0], batch.valid))
        return loss_of(net, Batch(batch.x * math.nan, batch.valid))

    assert examined(Net(), loss=loss).module is None


def hooks_of(net: nn.Module) -> list[Any]:
    kinds = [name for name in vars(net) if "hook" in name]
    assert {"_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"} <= set(kinds)
    of_modules = [list(getattr(module, kind)) for module in net.modules() for kind in kinds if getattr(module, kind)]
    of_parameters = [list(p._post_accumulate_grad_hooks or ()) for p in net.parameters()]
    return of_modules + [hooks for hooks in of_parameters if hooks]


def test_a_step_afterwards_is_that_of_a_model_never_examined() -> None:
    def stepped(net: Net) -> list[Tensor]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        loss_of(net, batch_of(2)).backward()
        optimizer.step()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        assert len(gradients) > 20
        return [*net.state_dict().values(), *gradients]

    net = Net()
    twin = copy.deepcopy(net)
    loss_of(net, batch_of(3)).backward()  # gradients from before: those of the step that failed
    buffers = [buffer.clone() for buffer in twin.buffers()]
    for buffer, before in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(before)
    batch = batch_of()
    assert examined(net, Batch(batch.x * math.nan, batch.valid)).reproduced
    assert hooks_of(net) == []
    assert all(p.grad is None for p in net.parameters())
    for mine, its in zip(stepped(net), stepped(twin), strict=True):
        assert torch.equal(mine, its)


def test_the_gradient_under_examination_is_that_of_the_step() -> None:
    def gradients(net: Net) -> list[Tensor]:
        for seed in (1, 2):
            loss_of(net, batch_of(seed)).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    net = Net()
    twin = copy.deepcopy(net)
    loss_of(net, batch_of()).backward()
    found: list[Tensor] = []
    examine(net, lambda witness: found.extend(gradients(net)))
    for mine, its in zip(found, gradients(twin), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_the_step_is_broken_off_once_nothing_more_can_be_found(where: str, whole: bool) -> None:
    net = Net()
    reached: list[str] = []
    for name in ("heads.far", "stem.conv"):  # the last and the first of the forward pass
        weight = net.get_parameter(f"{name}.weight")
        weight.register_post_accumulate_grad_hook(lambda _, name=name: reached.append(name))
    if where == "forward":
        net.heads["far"].register_forward_hook(lambda part, args, output: output * math.nan)

    def replay(witness: Witness) -> None:
        for seed in (1, 2):
            loss = loss_of(net, batch_of(seed)) * (math.nan if where == "loss" else 1.0)
            witness.see_loss(loss.detach())
            (spoiled_gradient(loss) if where == "backward" else loss).backward()
            reached.append("the next")

    findings = examine(net, replay, whole)
    sentences = {
        "forward": "the output of heads.far was first not finite",
        "loss": "the loss, outside the model, was first not finite",
        "backward": "the gradient that the loss function passed to the model was first not finite",
    }
    assert findings.sentence == sentences[where]
    assert findings.parameter is not None
    assert ("stem.conv" in reached) == whole
    assert reached.count("the next") == 2 * whole


def test_what_the_step_raises_is_raised_and_no_hook_stays() -> None:
    net = Net()

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("the disk is full")

    def replay(witness: Witness) -> None:
        loss_of(net, batch_of()).backward()
        handle = net.shared.register_forward_pre_hook(fail)
        try:
            loss_of(net, batch_of())
        finally:
            handle.remove()

    with pytest.raises(RuntimeError, match="the disk is full"):
        examine(net, replay)
    assert hooks_of(net) == []
    assert all(p.grad is None for p in net.parameters())


def test_what_was_not_finite_before_the_step_raised_is_found() -> None:
    net = Net()

    def replay(witness: Witness) -> None:
        with torch.no_grad():
            net.get_parameter("stem.conv.weight")[0] = math.nan
        loss_of(net, batch_of())
        raise ValueError("refused")

    assert examine(net, replay).module == "stem.conv"
    assert hooks_of(net) == []


def test_nothing_of_the_step_is_kept_alive() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    kept: list[weakref.ref[Any]] = []

    def replay(witness: Witness) -> None:
        y = spoiled_gradient(net(torch.ones(1, WIDTH)))
        y = net(y)

        def held_by_a_node(sent: Any, received: Any) -> None:
            kept.append(weakref.ref(held_by_a_node))

        y.grad_fn.register_hook(held_by_a_node)
        y.sum().backward()

    assert examine(net, replay).reproduced
    gc.collect()
    assert [ref() for ref in kept] == [None]
