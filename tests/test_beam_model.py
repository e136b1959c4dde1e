"""The fusion network: any subset of its modalities, what the published variants do wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, combinations
from typing import Any, Literal

import pytest
import small_beam
import torch
from small_beam import GPS_WIDTH, PUBLISHED
from torch import Tensor, nn

from trainables.beam.blocks import BiBlock, Fusion, TransformerBlock, UniBlock, legacy_init, swap_channels
from trainables.beam.config import MODALITIES, SENSORS, Data, Modality, Model
from trainables.beam.encoders import Encoder
from trainables.beam.fusion import Config, draw_missing, everywhere, loss
from trainables.beam.network import FusionNetwork, OverTime
from trainables.beam.positions import PositionTokens
from trainables.contract import UserError
from trainables.optim import Optim, undecayed

SIZE, HISTORY = 32, 2
SMALL = replace(small_beam.SMALL, dropout=0.0)
KINDS = ("weight", "bias")
SUBSETS = list(chain.from_iterable(combinations(MODALITIES, count) for count in (1, 2, 3, 4)))


def small_data(modalities: tuple[Modality, ...] = MODALITIES) -> Data:
    return Data(modalities=modalities, image_size=SIZE, history=HISTORY)


def windows(count: int, modalities: tuple[Modality, ...] = MODALITIES) -> dict[str, Tensor]:
    """A batch of noise in the types of the data."""
    return small_beam.noise(count, small_data(modalities))


def network(model: Model = SMALL, modalities: tuple[Modality, ...] = MODALITIES) -> FusionNetwork:
    return FusionNetwork(model, small_data(modalities), GPS_WIDTH)


@pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)
def test_any_subset_of_modalities_makes_a_network(modalities: tuple[Modality, ...]) -> None:
    built, batch = network(modalities=modalities), windows(3, modalities)
    logits = built(batch)
    assert logits.shape == (3, 64)
    assert logits.isfinite().all()
    assert set(built.encoders) == {sensor for sensor in SENSORS if sensor in modalities}


GRADIENT_CASES = [
    *((SMALL, subset) for subset in SUBSETS),
    *((replace(SMALL, block=block), MODALITIES) for block in ("uni", "bi", "transformer")),
    *((replace(SMALL, time_fusion=fusion), MODALITIES) for fusion in ("sum", "v1")),
    (replace(SMALL, ln_shape="plane", align_backward=False, residual=False), MODALITIES),
    (replace(SMALL, norm="batch", gps_embedding="linear", missing="zerolike"), MODALITIES),
    *((replace(SMALL, tokens="all"), subset) for subset in SUBSETS),
]


@pytest.mark.parametrize(("model", "modalities"), GRADIENT_CASES)
def test_gradient_reaches_every_parameter(model: Model, modalities: tuple[Modality, ...]) -> None:
    """Every rank then agrees on which parameters take part, and none is dead weight."""
    built = network(model, modalities)
    config = Config(data=small_data(modalities), model=model, missing_prob=0.7)
    pairs = loss(built, windows(32, modalities), config)
    torch.stack([total for total, _ in pairs.values()]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    without = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert not without


@pytest.mark.parametrize("missing", ["token", "zerolike"])
def test_a_network_for_radar_without_velocities(missing: Literal["token", "zerolike"]) -> None:
    data = replace(small_data(), radar="angle")
    config = Config(data=data, model=replace(SMALL, missing=missing), missing_prob=0.7)
    built, batch = FusionNetwork(config.model, data, GPS_WIDTH), small_beam.noise(8, data)
    pairs = loss(built, batch, config)
    torch.stack([total for total, _ in pairs.values()]).sum().backward()
    assert built.encoder("radar").resnet.config.num_channels == batch["radar"].shape[2] == 1
    gone = built.withhold(built.first_maps(batch), everywhere(["radar"], batch["beam"]))
    assert not torch.allclose(built.fuse(gone, batch["gps"]), built(batch))


def test_tokens_of_missing_sensors_take_part_even_when_nothing_is_missing() -> None:
    built = network()
    pairs = loss(built, windows(2), Config(data=small_data(), model=SMALL))
    torch.stack([total for total, _ in pairs.values()]).sum().backward()
    assert all(token.grad is not None for token in built.absent.parameters())


@pytest.mark.parametrize("missing", ["token", "zerolike", "randlike"])
def test_a_missing_sensor_tells_nothing(missing: Literal["token", "zerolike", "randlike"]) -> None:
    built = network(replace(SMALL, missing=missing)).eval()
    batch, other = windows(3), windows(3)

    def without_image(batch: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)  # of the noise in place of the image
        maps = built.withhold(built.first_maps(batch), everywhere(["image"], batch["beam"]))
        return built.fuse(maps, batch["gps"])

    torch.testing.assert_close(without_image(batch), without_image({**batch, "image": other["image"]}))
    assert not torch.allclose(without_image(batch), without_image({**batch, "lidar": other["lidar"]}))
    assert not torch.allclose(without_image(batch), built(batch))


def test_only_the_windows_that_lack_a_sensor_change() -> None:
    built, batch = network().eval(), windows(3)
    maps = built.first_maps(batch)
    lacking = built.withhold(maps, {"radar": torch.tensor([False, True, False])})
    logits, full = built.fuse(lacking, batch["gps"]), built.fuse(maps, batch["gps"])
    torch.testing.assert_close(logits[[0, 2]], full[[0, 2]])
    assert not torch.allclose(logits[1], full[1])


def test_the_share_of_windows_that_lack_a_sensor() -> None:
    gone = draw_missing(SENSORS, 6000, 0.3, torch.device("cpu"))
    lacking = torch.stack(list(gone.values()))
    assert lacking.sum(0).max() == 1  # one sensor at most
    torch.testing.assert_close(lacking.float().mean(1), torch.full((3,), 0.1), rtol=0, atol=0.02)


STAND_INS: tuple[Literal["token", "zerolike", "randlike"], ...] = ("token", "zerolike", "randlike")


def statistics(built: FusionNetwork) -> dict[str, Tensor]:
    """What batch norm has gathered of its inputs."""
    return {name: buffer.clone() for name, buffer in built.named_buffers() if "running" in name}


def test_without_missing_sensors_batch_norm_sees_the_frames_and_nothing_else() -> None:
    batch, found = windows(4), []
    for missing in STAND_INS:
        torch.manual_seed(0)
        model = replace(SMALL, norm="batch", missing=missing)
        built = network(model)
        loss(built, batch, Config(data=small_data(), model=model, missing_prob=0.0))
        found.append(statistics(built))
    assert any(mean.any() for name, mean in found[0].items() if "mean" in name)
    for other in found[1:]:
        assert all(torch.equal(other[name], numbers) for name, numbers in found[0].items())


def test_batch_norm_sees_each_window_once_with_what_stands_in_for_its_missing_sensor() -> None:
    model = replace(SMALL, norm="batch", missing="zerolike")
    torch.manual_seed(0)
    built, batch = network(model), windows(4)
    torch.manual_seed(0)
    other = network(model)
    torch.manual_seed(1)
    loss(built, batch, Config(data=small_data(), model=model, missing_prob=1.0))
    torch.manual_seed(1)
    gone = draw_missing(SENSORS, 4, 1.0, torch.device("cpu"))
    assert torch.stack(list(gone.values())).sum(0).tolist() == [1, 1, 1, 1]
    for sensor, gone_B in gone.items():
        encoder = other.encoder(sensor)
        frames = encoder.normalise(batch[sensor])
        frames[gone_B] = 0
        encoder.first(frames.flatten(0, 1))
    first = {name: x for name, x in statistics(built).items() if "embedder" in name or "encoder.stages.0" in name}
    once = statistics(other)
    for name, numbers in first.items():
        torch.testing.assert_close(numbers, once[name])
    assert first


@pytest.mark.parametrize("missing", ["zerolike", "randlike"])
def test_batch_norm_does_not_see_what_stands_in_for_a_map(missing: Literal["zerolike", "randlike"]) -> None:
    built, batch = network(replace(SMALL, norm="batch", missing=missing)), windows(3)
    maps = built.first_maps(batch)
    before = statistics(built)
    lacking = built.withhold(maps, everywhere(["image"], batch["beam"]))
    assert all(torch.equal(numbers, before[name]) for name, numbers in statistics(built).items())
    assert all(module.training for module in built.modules())
    lacking["image"].square().sum().backward()
    stem = built.encoder("image").resnet.embedder
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in stem.parameters())


@pytest.mark.parametrize("missing", STAND_INS)
@torch.no_grad()
def test_in_eval_mode_it_is_the_same_before_the_first_stage_and_after(
    missing: Literal["token", "zerolike", "randlike"],
) -> None:
    built, batch = network(replace(SMALL, norm="batch", missing=missing)), windows(3)
    built(batch)  # batch norm's statistics are then no longer those of a fresh network
    built.eval()
    gone: dict[Modality, Tensor] = {
        "image": torch.tensor([False, True, False]),
        "radar": torch.tensor([True, True, False]),
    }
    found = []
    for maps in (lambda: built.first_maps(batch, gone), lambda: built.withhold(built.first_maps(batch), gone)):
        torch.manual_seed(0)  # of the noise
        found.append(maps())
    for sensor in SENSORS:
        torch.testing.assert_close(found[0][sensor], found[1][sensor])


def test_windows_do_not_see_each_other_under_group_norm() -> None:
    built, batch = network().eval(), windows(4)
    alone = built({name: tensor[:1] for name, tensor in batch.items()})
    torch.testing.assert_close(built(batch)[:1], alone, rtol=1e-4, atol=1e-5)


def test_three_sensors_swap_the_published_thirds() -> None:
    """C = 7: the thirds are 0:2, 2:4 and 4:7."""
    image, lidar, radar = (torch.full((1, 1, 7), number) for number in (1.0, 2.0, 3.0))
    swapped = [x.flatten().tolist() for x in swap_channels([image, lidar, radar])]
    assert swapped == [[1, 1, 2, 2, 3, 3, 3], [2, 2, 3, 3, 1, 1, 1], [3, 3, 1, 1, 2, 2, 2]]


def test_two_sensors_swap_halves_and_one_keeps_its_channels() -> None:
    first, second = (torch.full((1, 1, 4), number) for number in (1.0, 2.0))
    assert [x.flatten().tolist() for x in swap_channels([first, second])] == [[1, 1, 2, 2], [2, 2, 1, 1]]
    assert swap_channels([first])[0] is first
    assert swap_channels([]) == []


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_published_bi_block_is_dead_and_the_mended_one_is_not(width: int) -> None:
    """Its product of small numbers underflows over eight blocks: neither the input nor a weight before has a say."""
    tokens = 20
    legacy = replace(PUBLISHED, block="bi", dropout=0.0)
    x = torch.randn(1, tokens, width, requires_grad=True)
    dead = Fusion(tokens, width, legacy)
    inner = dead.blocks(x)
    inner.sum().backward()
    assert not inner.any()
    assert x.grad is not None
    assert not x.grad.any()

    alive = Fusion(tokens, width, replace(legacy, mamba_init="mamba", ln_shape="channel", residual=True))
    x.grad.zero_()
    alive.blocks(x).sum().backward()
    assert x.grad.any()


def test_the_published_uni_block_shrinks_small_tokens_and_blows_up_large_ones() -> None:
    """Small ones by a constant factor per block, large ones by a factor that itself grows with every block."""
    width = 512
    blocks = [UniBlock(20, width, replace(PUBLISHED, block="uni")).apply(legacy_init) for _ in range(8)]

    def sizes(x: Tensor) -> Tensor:
        """The logarithm of the largest number before the first block and after each, up to the first overflow."""
        found = [x.abs().max()]
        with torch.no_grad():
            for block in blocks:
                x = block(x)
                found.append(x.abs().max())
        logs = torch.stack(found).double().log()
        return logs[logs.isfinite().cumprod(0).bool()]

    shrinking, growing = (sizes(spread * torch.randn(1, 20, width)).diff() for spread in (1, 30))
    assert len(shrinking) == 8
    assert (shrinking < math.log(0.1)).all()
    assert 2 <= len(growing) < 8  # the overflow is in the forward pass
    assert growing[0] > 0
    assert (growing.diff() > 0).all()


def test_an_aligned_block_treats_both_directions_alike() -> None:
    """With one set of weights for both, reversing the tokens exchanges the two branches, token by token."""
    block = BiBlock(6, 8, replace(SMALL, residual=False)).eval()
    block.backwards.load_state_dict(block.forwards.state_dict())
    x = torch.randn(1, 6, 8)
    u = block.input(block.norm(x))
    forward, backward = block.forwards(u), block.forwards(u.flip(1)).flip(1)
    gate = torch.nn.functional.leaky_relu(block.gate(u), 0.2)
    torch.testing.assert_close(block(x), backward * gate + forward * backward)


def test_the_published_block_multiplies_tokens_from_opposite_ends() -> None:
    block = BiBlock(6, 8, replace(SMALL, residual=False, align_backward=False)).eval()
    x = torch.randn(1, 6, 8)
    u = block.input(block.norm(x))
    forward, backward = block.forwards(u), block.backwards(u.flip(1))
    gate = block.gate(u.flip(1))
    gate = torch.where(gate > 0, gate, 0.2 * gate)
    torch.testing.assert_close(block(x), backward * gate + forward * backward)


class Times(nn.Module):
    """Stands for a Mamba layer whose result is known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def weighed(x_BTC: Tensor, linear: nn.Linear) -> Tensor:
    """The published weights of instants, one window after the other."""
    rows = []
    for x_TC in x_BTC:
        asked = torch.stack([row.max() + row.sum() / len(row) for row in x_TC])
        scores = (linear.weight @ asked + linear.bias).exp()
        rows.append(sum(score / scores.sum() * row for score, row in zip(scores, x_TC, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["sum", "v1", "v2"])
def test_time_fusion_by_hand(kind: Literal["sum", "v1", "v2"], residual: bool) -> None:
    over_time = OverTime(3, sensors=True, gps=True, model=replace(SMALL, time_fusion=kind, residual=residual))
    image, lidar, positions = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(2, 2, 16)
    if kind == "sum":
        expected = image.sum(1) + lidar.sum(1) + positions.sum(1)
    else:
        over_time.mamba = Times(2.0)  # type: ignore[assignment]
        image_mixed, lidar_mixed = ((3 if residual else 2) * x for x in (image, lidar))
        expected = image_mixed.sum(1) + lidar_mixed.sum(1) + positions.sum(1)
        if kind == "v2":
            frames, places = over_time.frame_weights, over_time.position_weights
            assert frames is not None
            assert places is not None
            expected = weighed(image_mixed, frames) + weighed(lidar_mixed, frames) + weighed(positions, places)
    torch.testing.assert_close(over_time([image, lidar], positions), expected)


def test_tokens_are_the_frames_of_each_sensor_row_by_row_and_then_the_positions() -> None:
    built = network(replace(SMALL, block="bi", gps_embedding="linear")).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for fusion in built.fusions:
        fusion.register_forward_hook(lambda part, args, output: seen.append((args[0], output)))
    batch = windows(2)
    maps = built.first_maps(batch)
    built.fuse(maps, batch["gps"])
    rows = [
        torch.nn.functional.adaptive_avg_pool2d(maps[sensor], 2)[2 * b + instant, :, y, x]
        for b in range(2)
        for sensor in SENSORS
        for instant in range(HISTORY)
        for y in range(2)
        for x in range(2)
    ]
    tokens = seen[0][0]
    assert built.positions is not None
    torch.testing.assert_close(tokens[:, :-2].flatten(0, 1), torch.stack(rows))
    torch.testing.assert_close(tokens[:, -2:], built.positions.tokens[0](batch["gps"]))
    for stage in (1, 2, 3):  # each Linear takes what left the stage before
        linear = built.positions.tokens[stage]
        torch.testing.assert_close(seen[stage][0][:, -2:], linear(seen[stage - 1][1][:, -2:]))


def test_sensors_that_are_left_out_may_keep_their_tokens() -> None:
    """Zeros in every stage, in the sensor's place; and what the last stage makes of them counts."""
    left_out = network(replace(SMALL, block="bi", tokens="all"), ("image", "radar", "gps")).eval()
    seen: list[Tensor] = []
    for fusion in left_out.fusions:
        fusion.register_forward_hook(lambda part, args, output: seen.append(args[0]))
    batch = windows(2)
    maps = left_out.first_maps(batch)
    left_out.fuse(maps, batch["gps"])
    for number, tokens in enumerate(seen):
        of_each = HISTORY * left_out.anchors[number] ** 2
        image, lidar, radar, positions = tokens.split([of_each, of_each, of_each, 2], dim=1)
        assert not lidar.any()
        assert all(x.any() for x in (image, radar, positions))
    taken: list[list[Tensor]] = []
    left_out.over_time.register_forward_pre_hook(lambda part, args: taken.append(args[0]))
    left_out.fuse(maps, batch["gps"])
    assert [frames.any().item() for frames in taken[0]] == [True, True, True]


def test_pictures_are_normalised_as_imagenet_s() -> None:
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    normalised = Encoder("image", 3, SMALL).normalise(white)[0, :, 0, 0]
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(normalised, torch.tensor(expected))


def test_a_transformer_block_is_the_usual_pre_norm_one() -> None:
    width = 16
    block = TransformerBlock(10, width, replace(SMALL, block="transformer"))
    usual = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, norm_first=True, batch_first=True)
    names = {
        "attend": "self_attn.in_proj_",
        "project": "self_attn.out_proj.",
        "mlp.0": "linear1.",
        "mlp.2": "linear2.",
        "norms.0": "norm1.",
        "norms.1": "norm2.",
    }
    torch.nn.init.normal_(block.attend.bias)
    state = block.state_dict()
    usual.load_state_dict({theirs + kind: state[f"{ours}.{kind}"] for ours, theirs in names.items() for kind in KINDS})
    x = 3 * torch.randn(2, 10, width)
    torch.testing.assert_close(block(x), usual(x))


def test_a_transformer_drops_out_in_training_only() -> None:
    fusion = Fusion(10, 16, replace(SMALL, block="transformer", dropout=0.5))
    x = torch.randn(1, 10, 16)
    assert not torch.equal(fusion.blocks(x), fusion.blocks(x))
    fusion.eval()
    assert torch.equal(fusion.blocks(x), fusion.blocks(x))


@pytest.mark.parametrize("init", ["mamba", "legacy"])
def test_a_transformer_starts_as_published_and_ignores_the_switches_of_mamba(init: Literal["mamba", "legacy"]) -> None:
    model = replace(SMALL, block="transformer", mamba_init=init)
    odd = replace(model, ln_shape="plane", align_backward=False, residual=False)
    torch.manual_seed(0)
    fusion = Fusion(10, 64, model)
    torch.manual_seed(0)
    same = Fusion(10, 64, odd)
    linears = [module for module in fusion.modules() if isinstance(module, nn.Linear)]
    assert all(abs(linear.weight.std().item() - 0.02) < 0.001 for linear in linears)
    assert not any(linear.bias.any() for linear in linears)
    assert fusion.position_TC.any() == (init == "mamba")
    x = torch.randn(2, 10, 64)
    assert torch.equal(fusion(x), same(x))


def test_a_transformer_keeps_its_residual_over_time_too() -> None:
    model = replace(SMALL, block="transformer", time_fusion="v1")
    over_time = [OverTime(3, sensors=True, gps=False, model=replace(model, residual=on)) for on in (True, False)]
    over_time[1].load_state_dict(over_time[0].state_dict())
    frames = torch.randn(2, 3, model.channels[-1])
    assert torch.equal(*(part([frames], None) for part in over_time))


def test_the_published_initialiser_leaves_the_positions_as_they_are() -> None:
    """It belongs to the fusion stages; the embeddings beside them start as any Linear does."""
    model = replace(SMALL, gps_embedding="linear")
    torch.manual_seed(0)
    ours = PositionTokens(2, replace(model, mamba_init="mamba"))
    torch.manual_seed(0)
    published = PositionTokens(2, replace(model, mamba_init="legacy"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), published.parameters(), strict=True))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_channels_last_is_another_layout_of_the_same_network(norm: Literal["batch", "group"]) -> None:
    """And its gradients lie as its weights do, which DDP's buckets want; at 64 pixels no map is a single value."""
    data, model = replace(small_data(), image_size=64), replace(SMALL, channels=(8, 8, 12, 16), norm=norm)
    torch.manual_seed(0)
    plain, other = (FusionNetwork(replace(model, channels_last=last), data, GPS_WIDTH) for last in (False, True))
    other.load_state_dict(plain.state_dict())
    batch = small_beam.noise(3, data)
    logits, same = plain(batch), other(batch)
    torch.testing.assert_close(same, logits, rtol=1e-3, atol=1e-4)
    names, trained = zip(*other.encoders.named_parameters(), strict=True)
    gradients = torch.autograd.grad(same.sum(), trained)
    strides = {name: (x.stride(), dx.stride()) for name, x, dx in zip(names, trained, gradients, strict=True)}
    assert all(mine == theirs for mine, theirs in strides.values()), strides
    assert strides["image.resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"][0] == (72, 1, 24, 8)


@pytest.mark.parametrize("block", ["bi", "transformer"])
def test_half_precision_gives_nearly_the_same_logits(block: Literal["bi", "transformer"]) -> None:
    data = replace(small_data(), steps=3)
    built, batch = FusionNetwork(replace(SMALL, block=block), data, GPS_WIDTH).eval(), small_beam.noise(2, data)
    with torch.autocast("cpu", torch.bfloat16):
        half = built(batch)
    assert half.dtype is torch.float32
    full = built(batch)
    assert (half - full).abs().mean() < 0.1 * full.std()
    assert not torch.equal(half, half.bfloat16().float()), "logits that coarse would tie, and top-k depends on ties"


SPARED: dict[Literal["channel", "plane"], set[str]] = {"channel": set(), "plane": {"norm.weight", "norm.bias"}}


def test_weight_decay_may_spare_norms_positions_and_what_mamba_ssm_spares() -> None:
    for shape, more in SPARED.items():
        net = FusionNetwork(replace(SMALL, ln_shape=shape), small_data(), GPS_WIDTH)
        spared = undecayed(net)
        of_matrices = [name for name, parameter in net.named_parameters() if parameter in spared and parameter.ndim > 1]
        assert {name.rsplit(".", 1)[1] for name in of_matrices if ".norm." not in name} == {"A_log", "position_TC"}
        assert {".".join(name.split(".")[-2:]) for name in of_matrices if ".norm." in name} == more


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, r"model\.n_layer = 0 must be at least 1"),
        ({"anchors": 0}, r"model\.anchors = 0"),
        ({"sensor_depths": (1, 0, 1, 1)}, r"model\.sensor_depths = \[1, 0, 1, 1\]"),
        ({"dropout": 1.0}, r"model\.dropout = 1\.0 must lie in \[0, 1\)"),
        ({"block": "transformer", "channels": (4, 8, 12, 18)}, r"model\.channels = .* must be multiples of 4"),
        ({"channels_last": True, "channels": (4, 8, 16, 32)}, r"model\.channels = .* must be at least 8 each"),
    ],
)
def test_models_that_cannot_be_built_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Model(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"missing_prob": 1.5}, "missing_prob = 1.5"),
        ({"score_without": ("gps",)}, "score_without names gps"),
        ({"score_without": ("radar",), "data": Data(modalities=("image",))}, "score_without names radar"),
    ],
)
def test_settings_that_clash_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(optim=Optim(), **settings)  # type: ignore[arg-type]
