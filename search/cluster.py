"""The machines of a search: this one's resources, a Ray cluster joined or started, and which of its nodes are alive."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray._common.utils import get_default_system_temp_dir
from ray.exceptions import AuthenticationError

from search.plan import Node
from search.text import one_line
from trainables.contract import UserError

# The environment that Ray's processes need; Ray offers no other way to set these.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a slot without a machine waits for one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else `print` also logs each line, which would be kept twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config refer to the driver's working directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "16",  # a group is half a dozen processes, most of them asleep
    "RAY_prestart_worker_first_driver": "0",  # one process per core, of which none suits an actor started by Tune
    "RAY_worker_register_timeout_seconds": "300",  # a busy machine starts them slowly; Ray kills them after a minute
    "RAY_agent_register_timeout_ms": "300000",  # and its node, if the agent needs half a minute
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints nothing of its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the recorder writes our own files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the end of a trial carries no objective
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see Interruption
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # after Ctrl-C: do not wait for a slot in the middle of an epoch
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


HEAD_ANSWERS_S = 10.0  # for the head of a cluster to accept a connection
MACHINE_ANSWERS_S = 3.0  # for another machine of the cluster
STARTS = 3  # attempts to start Ray
SLOW_START = re.compile("timed out during startup|Timed out waiting for file")  # in the error of such an attempt
# A local Ray's longest path in the folder for temporary files, with the largest process id; Linux allows 107 bytes.
SOCKET, SOCKET_BYTES = "/ray/session_2026-12-01_12-00-00_000000_4194304/sockets/plasma_store", 107
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, "QUOTA PERIOD" in microseconds; QUOTA may be max


def this_machine() -> tuple[Node, ...]:
    """Return the resources of a local Ray; raises UserError if it could not start, or PyTorch cannot use the GPUs."""
    _check_temporary_folder()
    gpus = torch.cuda.device_count()
    if gpus and not torch.cuda.is_available():  # the count needs only the driver
        raise UserError(
            f"there are {gpus} GPUs here, and PyTorch {torch.__version__} cannot use them: {_why_no_cuda()}; install "
            "the driver that it wants, or search on the CPU with CUDA_VISIBLE_DEVICES= in the environment"
        )
    return (Node(cpus=cpus_here(), gpus=gpus),)


def _check_temporary_folder() -> None:
    """Raise UserError if Ray's sockets cannot lie in the folder for temporary files, as in one of a Slurm job."""
    folder, longest = get_default_system_temp_dir(), SOCKET_BYTES - len(SOCKET)
    if len(os.fsencode(folder)) > longest or not folder.isascii():
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"{name}={folder}: Ray's sockets cannot lie there: only in a folder of at most {longest} characters, all "
            "of them ASCII; with RAY_TMPDIR=/tmp in the environment, Ray uses that instead"
        )


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(str(error), type(error).__name__)
    return "no reason given"


def cpus_here() -> int:
    """Return the number of cores that this process may use, limited by its container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def start_ray(address: str | None) -> tuple[Node, ...]:
    """Join the cluster at `address`, or start a local one, unless that has been done; returns its nodes.

    Raises UserError if no cluster answers at `address`, or it refuses the token.
    """
    os.environ.update(RAY_ENVIRONMENT)
    # Tune complains about log files that we do not let it write, and about trials that the tables explain better.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    arguments: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    if address is None:
        # Not a cluster that somebody else has started here; with as many CPUs as the plan counts on.
        arguments |= {"address": "local", "num_cpus": cpus_here()}
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one's own machine is not preempted
    else:
        arguments |= {"address": address, "runtime_env": {"env_vars": RAY_ENVIRONMENT}}
    if not ray.is_initialized():
        heeding = signal.getsignal(signal.SIGTERM)
        # Ray's processes ignore for good what is ignored while they start; Slurm may send SIGUSR1 to all of a job.
        heeding_usr1 = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            if address is not None:
                _knock(address)
            context = init_ray(**arguments)
        except (OSError, ValueError) as error:
            if address is None:
                raise
            raise UserError(f"--address {address}: no Ray cluster answers there: {error}") from None
        except AuthenticationError as error:
            raise UserError(
                f"the Ray cluster requires a token and was given none or a wrong one: {one_line(str(error), '')}; "
                "put it into ~/.ray/auth_token and set RAY_AUTH_MODE=token, or unset that if the cluster uses no token"
            ) from None
        finally:
            signal.signal(signal.SIGUSR1, heeding_usr1)
        signal.signal(signal.SIGTERM, heeding)  # Ray has installed its own handler, under which the process aborts
        if context.dashboard_url:
            asks = os.environ.get("RAY_AUTH_MODE") == "token"
            token = " (it asks for a token: `ray get-auth-token` prints it)" if asks else ""
            print(f"dashboard: http://{context.dashboard_url}{token}", flush=True)
    return tuple(_node(entry["Resources"]) for entry in ray.nodes() if entry["Alive"])


def init_ray(**arguments: Any) -> Any:
    """Call `ray.init`, and again if Ray's processes start more slowly than the half minute that it waits for them.

    Raises UserError if they do so each time.
    """
    for _ in range(STARTS):
        try:
            return ray.init(**arguments)
        except Exception as error:
            if not SLOW_START.search(str(error)):
                raise
            ray.shutdown()
            told = one_line(str(error), type(error).__name__)
    raise UserError(
        f"Ray did not start here, {STARTS} times: {told}; end what keeps this machine busy (Ray's own logs are in "
        f"{get_default_system_temp_dir()}/ray/session_latest/logs)"
    )


def _knock(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at `address`; Ray would keep trying for minutes."""
    there = urlsplit(address if "://" in address else f"//{address}")
    if there.port is not None:
        socket.create_connection((there.hostname or "", there.port), timeout=HEAD_ANSWERS_S).close()


def _node(resources: Mapping[str, float]) -> Node:
    return Node(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


def alive() -> dict[str, str]:
    """Return the address of each machine that is alive, by the id of its Ray node."""
    return {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes() if entry["Alive"]}


def gone(nodes: Iterable[str]) -> bool:
    """Return whether one of the machines has gone. Each is contacted, because Ray takes up to a minute to be sure."""
    wanted = set(nodes)
    there = [entry for entry in ray.nodes() if entry["NodeID"] in wanted]
    return len(there) < len(wanted) or not all(
        entry["Alive"] and answers(entry["NodeManagerAddress"], entry["NodeManagerPort"]) for entry in there
    )


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), MACHINE_ANSWERS_S).close()
    except OSError:
        return False
    return True
