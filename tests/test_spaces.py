"""One contract for every space under search_spaces/, with and without each of its profiles."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_beam_rebuild import NOTES

from search import yaml_file
from search.plan import Node, make_plan
from search.sampler import sampler_maker
from search.scheduler import make_scheduler
from search.space import Space
from search.space import tree as trees
from search.space.file import load_space
from search.tables import cells_of, read_tables

SPACES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
PUBLISHED = "published"  # the profile in which nothing is searched
CASES = [(file, profile) for file in SPACES for profile in [None, *(yaml_file.read(file).get("profiles") or {})]]
GPU_NODE = Node(cpus=64, gpus=8)
LAPTOP = Node(cpus=2, gpus=0)


@pytest.mark.parametrize(("file", "profile"), CASES, ids=[f"{file.stem}-{profile}" for file, profile in CASES])
class TestEverySpace:
    @pytest.fixture
    def space(self, file: Path, profile: str | None) -> Space:
        space, _ = load_space(file, profile=profile, has_gpu=True)
        return space

    def test_reads_back_as_it_was_resolved(self, space: Space, tmp_path: Path) -> None:
        yaml_file.write(tmp_path / f"{space.name}.yaml", space.document())
        again, _ = load_space(tmp_path / f"{space.name}.yaml")
        assert again.document() == space.document()
        assert again.parameters == space.parameters

    def test_fits_the_machine_it_is_for(self, space: Space, profile: str | None) -> None:
        node = LAPTOP if profile == "laptop" else GPU_NODE
        assert make_plan(space, [node]).slots >= 1

    def test_has_a_sampler_and_a_scheduler(self, space: Space) -> None:
        assert sampler_maker(space)(0)
        assert make_scheduler(space)

    def test_known_settings_come_first_and_leave_room_to_search(self, space: Space, profile: str | None) -> None:
        if profile == PUBLISHED:
            assert (space.try_first, space.parameters, space.search.trials) == ((), (), 1)
            return
        assert space.try_first
        assert all(setting.name for setting in space.try_first)
        assert len(space.try_first) < space.search.trials

    def test_every_draw_is_a_config_of_its_own(self, space: Space, file: Path, profile: str | None) -> None:
        _, trainable = load_space(file, profile=profile, has_gpu=True)
        assert trainable.config_class is not None
        rng = random.Random(1)
        configs = [trainable.config(space.config(space.draw(rng))) for _ in range(20)]
        assert len({repr(config) for config in configs}) == (1 if profile == PUBLISHED else 20)


def test_the_laptop_profile_is_taken_without_a_gpu() -> None:
    assert SPACES
    for file in SPACES:
        space, _ = load_space(file, has_gpu=False)
        assert space.profile == "laptop"
        assert space.resources.gpus_per_worker == 0


def test_rebuild_searches_what_the_project_promises() -> None:
    space, _ = load_space(next(file for file in SPACES if file.stem == "rebuild"), has_gpu=False)
    assert {
        "optim.lr",
        "optim.clip_norm",
        "optim.batch_size",
        "loss.alpha_contrast",
        "loss.alpha_trans",
        "loss.alpha_distance",
    } <= {item.name for item in space.parameters}


@pytest.mark.slow
def test_every_cell_of_every_table_is_a_search(subtests: pytest.Subtests) -> None:
    for file, profile in CASES:
        if not yaml_file.read(file).get("tables"):
            continue
        for cell in cells_of(read_tables(file, profile, has_gpu=True)):
            with subtests.test(f"{file.stem}, {profile}: {cell.table}, {cell.row}, {cell.column}"):
                space, _ = load_space(file, cell.overrides, profile, has_gpu=True)
                for key, _, value in (override.partition("=") for override in cell.overrides):
                    assert trees.get(space.document(), key) == yaml_file.parse(value, key)


@pytest.mark.parametrize("profile", [None, "laptop"])
def test_the_notes_chain_stands_in_the_table_as_the_notes_had_it(profile: str | None) -> None:
    """But for the sensors of its first steps, which rebuilt the lidar."""
    file = next(file for file in SPACES if file.stem == "rebuild")
    rates = {"R-P1": 1e-4, "R-S1": 1e-3, "R-S2": 1e-4, "R-S3": 1e-3, "R-S4": 1e-4, "R-S5": 1e-4, "R-S6": 1e-4}
    batches = {"R-S4": 2, "R-S5": 8, "R-S6": 8}
    chain = {}
    for cell in cells_of({"chain": read_tables(file, profile, has_gpu=True)["chain"]}):
        space, trainable = load_space(file, cell.overrides, profile, has_gpu=True)
        if not space.parameters:
            chain[cell.row.split()[0]] = trainable.config(space.config({}))
    assert list(chain) == list(rates)
    for name, config in chain.items():
        rebuild, loss, pretrain = NOTES["R-P1" if name == "R-S1" else name]
        dropout, beam = config.rebuild.dropout, config.loss.beam  # which a profile scales to its small network
        assert config.rebuild == replace(rebuild, source=("lidar", "radar"), target=("image",), dropout=dropout)
        assert config.loss == replace(loss, beam=beam)
        assert (config.pretrain.epochs == 0) == (pretrain.epochs == 0)
        assert (config.optim.lr, config.optim.batch_size) == (rates[name], batches.get(name, 24))
