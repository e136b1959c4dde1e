"""What several test files share: a fixed seed, one Ray, a bucket, the data sets beside the checkout."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import s3
import torch

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Ray reads this as it is imported, here and in the processes that tests start: how long it waits for its own to start.
os.environ |= {"RAY_raylet_start_wait_time_s": "120"}

# A shell's `make test &` ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # One thread: the tests' tensors are tiny, and reductions then add up in one order on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing tell how far it is, however slow the machine: what is printed is compared."""
    if decode := sys.modules.get("trainables.beam.decode"):
        monkeypatch.setattr(decode, "QUIET_S", math.inf)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for all tests marked `ray`, started by the first of them. Its three CPUs need not exist."""
    import ray

    from search.cluster import RAY_ENVIRONMENT, init_ray

    os.environ.update({**RAY_ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})
    init_ray(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; the test is skipped where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no disk may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Store]:
    """An S3 server with the bucket `bucket`, which s3:// means for this test."""
    (tmp_path / "store/bucket").mkdir(parents=True)
    with s3.serving(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Where a real data set lies, `shared_data("deepsense6g")`; the test is skipped where it does not."""

    def folder(name: str) -> Path:
        found = SHARED_DATA / name
        if not found.is_dir():
            pytest.skip(f"no {name} in {SHARED_DATA}")
        return found

    return folder
