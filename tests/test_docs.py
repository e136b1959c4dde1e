"""The pages that say how to bring one's own code, followed word for word; and every link leads somewhere.

A page holds files (a block of code after a line that ends in the file's name and a colon), commands (a block `sh`), and
what they print (a block `text`), in which a line `...` stands for any lines and every number for any number.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from search.lookout import BLOCKED
from trainables.contract import Diverged, Trial
from trainables.optim import Optim

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "docs/bring-a-model.md"
PAGES = sorted((ROOT / "docs").glob("bring-*.md"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:`(?P<name>[^`\n]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
WAITS = re.compile(rf"\d+ slots? waits? for room in the cluster: |{re.escape(BLOCKED)}")  # on a busy machine


class Block(NamedTuple):
    name: str | None
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(match["name"], match["kind"], match["text"]) for match in BLOCK.finditer(page.read_text())]


def normal(line: str) -> str:
    """A line in which numbers and the width of columns no longer tell."""
    return " ".join(NUMBER.sub("#", line).split())


def write(block: Block, folder: Path) -> None:
    assert block.name, f"this block is no file, no command and no output:\n{block.text}"
    (folder / block.name).parent.mkdir(exist_ok=True)
    (folder / block.name).write_text(block.text)


def is_what_was_printed(said: str, printed: str) -> bool:
    lines = [r"(.*\n)*" if line == "..." else re.escape(normal(line)) + r"\n" for line in said.splitlines()]
    told = [f"{normal(line)}\n" for line in printed.splitlines() if not WAITS.match(line)]
    return re.fullmatch("".join(lines), "".join(told)) is not None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which `python launch.py` can be typed, as in a checkout."""
    (tmp_path / "launch.py").symlink_to(ROOT / "launch.py")
    return tmp_path


@pytest.fixture
def environment(ray_cluster: None) -> dict[str, str]:
    """One in which `python` is this one, and in which a Ray runs already, since each start of it takes long."""
    import ray

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.mark.ray
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_whoever_follows_a_page_sees_what_it_says(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    printed: str | None = None
    for block in blocks(page):
        if block.kind == "sh":
            ran = subprocess.run(
                ["bash", "-e"],
                input=block.text,
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert ran.returncode == 0, f"{block.text}{ran.stdout}{ran.stderr}"
            printed = ran.stdout
        elif block.kind == "text":
            assert printed is not None, "the page tells of output before it tells of a command"
            assert is_what_was_printed(block.text, printed), f"the page says\n{block.text}\nand there was\n{printed}"
        else:
            write(block, checkout)


def test_there_are_pages_to_follow() -> None:
    for page in PAGES:
        assert {"python", "yaml", "sh", "text"} <= {block.kind for block in blocks(page)}, page
    assert len(PAGES) == 4


def module_of(page: Path, name: str, folder: Path) -> types.ModuleType:
    """The file `name` of a page, written into the folder and imported."""
    write(next(block for block in blocks(page) if block.name == name), folder)
    spec = importlib.util.spec_from_file_location(Path(name).stem, folder / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def last_metrics(swing: types.ModuleType, optim: Optim, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    config = swing.Config(optim, epochs=2)
    *_, last = swing.train(Trial(config, rank=rank, world_size=world_size, device=torch.device("cpu")))
    return {name: value for name, value in last.metrics.items() if name not in ("samples_per_s", "micro_batch")}


def test_the_generator_of_the_readme_goes_on_where_it_was() -> None:
    code = next(block.text for block in blocks(ROOT / "README.md") if block.name == "my_loop.py")

    def build(lr: float, device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(1, 1, bias=False, device=device)
        torch.nn.init.constant_(model.weight, 5.0)
        return model, torch.optim.Adam(model.parameters(), lr)

    def train_one_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).square().sum()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    scope: dict[str, Any] = {"build": build, "train_one_epoch": train_one_epoch}
    exec(code, scope)
    config = {"lr": 0.5, "epochs": 4}
    whole, states = [], []
    for report in scope["train"](Trial(config)):
        whole.append(report.metrics)
        states.append(copy.deepcopy(report.state()))
    for epoch, state in enumerate(states):
        assert [report.metrics for report in scope["train"](Trial(config, resume=state))] == whole[epoch + 1 :]


SWING_OPTIM = Optim(lr=0.01, batch_size=32)


@pytest.fixture
def swing(tmp_path: Path) -> types.ModuleType:
    return module_of(MODEL, "mine/swing.py", tmp_path)


def test_the_model_of_its_page_learns_in_every_part_of_a_recording(swing: types.ModuleType) -> None:
    splits = [swing.swings(split) for split in ("train", "val")]
    speed, counts = (splits[1].tensors[name] for name in ("speed", "counts"))
    of_no_idea = (speed.square() * counts).sum() / counts.sum()
    metrics = last_metrics(swing, SWING_OPTIM)
    assert metrics["mse"] < 0.3 * of_no_idea
    assert metrics["mse_later"] < metrics["mse_start"] < of_no_idea


def test_padding_counts_neither_in_its_loss_nor_in_its_scores(swing: types.ModuleType) -> None:
    model, config = swing.Speed(8), swing.Config(SWING_OPTIM)
    batch = swing.swings("val")[torch.arange(9)]
    spoiled = {name: batch[name] + 1e3 * ~batch["counts"] for name in ("place", "speed")} | {"counts": batch["counts"]}
    for pairs in (swing.loss, swing.score):
        assert pairs(model, spoiled, config) == pairs(model, batch, config)


def test_it_scores_the_same_in_parts_as_the_page_says(swing: types.ModuleType) -> None:
    whole = last_metrics(swing, SWING_OPTIM)
    in_parts = last_metrics(swing, Optim(lr=0.01, batch_size=32, micro_batch=5))
    assert in_parts == pytest.approx(whole, rel=1e-3)


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = last_metrics(module_of(MODEL, "mine/swing.py", folder / str(rank)), SWING_OPTIM, rank, 2)
    torch.save(mine, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_it_scores_the_same_on_two_ranks_as_the_page_says(swing: types.ModuleType, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    spawn(one_of_two, args=(tmp_path,), nprocs=2)
    rank0, rank1 = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert rank0 == rank1
    assert rank0 == pytest.approx(last_metrics(swing, SWING_OPTIM), rel=1e-3)


def test_a_rate_that_is_too_high_ends_it_by_the_name_of_a_module(swing: types.ModuleType) -> None:
    with pytest.raises(Diverged, match="the output of memory was first not finite") as caught:
        last_metrics(swing, Optim(lr=1.0, batch_size=32))
    assert caught.value.details["found"]["module"] == "memory"


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("best: trial 3\n", "best: trial 12\n", True),
        ("loss 0.25  3 epochs\n", "loss -1e-05   4 epochs\n", True),
        ("best: trial 3\n", "worst: trial 3\n", False),
        ("one\n", "one\ntwo\n", False),
        ("one\n...\n", "one\n", True),
        ("...\ntwo\n", "one\nzero\ntwo\n", True),
        ("...\ntwo\n", "two\none\n", False),
        ("loss is nan\n", "loss is 3\n", False),
        ("one\n", "1 slot waits for room in the cluster: 2 x (1 CPU)\none\n", True),
    ],
)
def test_words_are_compared_and_numbers_are_not(said: str, printed: str, same: bool) -> None:
    assert is_what_was_printed(said, printed) is same


def headings(page: Path) -> set[str]:
    """The anchors of a page, as its viewers make them from its headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> Iterator[tuple[Path, str, str]]:
    for page in PROSE:
        for match in LINK.finditer(page.read_text()):
            if "://" not in match["file"]:
                yield page, match["file"], match["heading"] or ""


@pytest.mark.parametrize(("page", "file", "heading"), list(links()), ids=lambda value: getattr(value, "name", value))
def test_every_link_leads_somewhere(page: Path, file: str, heading: str) -> None:
    target = page.parent / file if file else page
    assert target.exists(), f"{page.name} links to {file}, which does not exist"
    if heading:
        assert heading in headings(target), f"{page.name} links to {file}#{heading}, a heading that does not exist"
