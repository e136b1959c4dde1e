"""cluster.yaml is what Ray's cluster launcher takes, and speaks of files that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
START = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    with pytest.raises(Exception, match="max_wokers"):  # and not whatever it is given
        validate_config({**prepared, "max_wokers": 3})


def test_every_worker_is_kept_up(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == prepared["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_it_says_who_logs_in_and_with_what(cluster: dict[str, Any]) -> None:
    assert set(cluster["auth"]) == {"ssh_user", "ssh_private_key"}


def test_mounted_files_are_in_the_checkout(cluster: dict[str, Any]) -> None:
    mounted = [local for local in cluster["file_mounts"].values() if not local.startswith("~")]
    assert [local for local in mounted if not (ROOT / local).exists()] == []


def test_the_mounted_packages_are_all_there_are(cluster: dict[str, Any]) -> None:
    packages = {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(cluster["file_mounts"].values())


@pytest.mark.parametrize("key", ["setup_commands", *START])
def test_commands_are_strings(cluster: dict[str, Any], key: str) -> None:
    assert [command for command in cluster[key] if not isinstance(command, str)] == []


@pytest.mark.parametrize("key", START)
def test_ray_starts_with_a_token_and_only_after_the_old_one_stopped(cluster: dict[str, Any], key: str) -> None:
    stop, start = cluster[key]
    assert stop == "~/hyperparameter-search/.venv/bin/ray stop"
    assert "RAY_AUTH_MODE=token" in start
    assert "~/hyperparameter-search/.venv/bin/ray start" in start
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_head_starts_the_workers(cluster: dict[str, Any]) -> None:
    # Autoscaler v2 never does so for provider type local, and `ray up` asks for it unless the command says otherwise.
    _, start = cluster["head_start_ray_commands"]
    assert "RAY_enable_autoscaler_v2=0" in start
