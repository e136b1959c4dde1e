"""A Ray Train worker group that stays up and runs one trial after another.

The group is a single `TorchTrainer` whose loop serves commands. Both directions use a small mailbox actor instead of
Ray Train's reporting, which is polled every two seconds: an answer arrives in milliseconds. Every rank takes its
commands from its own queue, so an idle group does not wait in a collective that could time out.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.cluster import alive, gone
from search.text import LONGEST_REASON, short_line
from search.workers.mailbox import Mailbox
from search.workers.messages import Answer, Blew, Broke, Command, GroupSpec, Leave, Quit, RanOut
from search.workers.printed import Printed
from search.workers.ranks import RankLoop
from search.workers.watchdog import answered_within

POLL_S = 1.0  # how often a waiting slot checks that the group is alive
GRACE_S = 20.0  # for the other ranks to answer after one has failed
LAST_WORK_S = 600.0  # the same after one has ended: another may still be saving or scoring
FAILURES = (Broke, RanOut, Blew)
QUIT_S = 10.0  # for a group to quit by itself
STARTS = 10  # attempts to start the ranks once there is room for them


class GroupDied(RuntimeError):
    """The worker group is gone, or its ranks no longer all answer; the message says why.

    with_machine: a machine that it ran on is lost, too.
    """

    def __init__(self, reason: str, with_machine: bool = False) -> None:
        super().__init__(reason)
        self.with_machine = with_machine


def worst_of(answers: Mapping[int, Answer], ranks: int) -> Answer:
    """Return the answer that decides for the group: a rank that broke, ran out of memory or blew up precedes rank 0.

    It is clean only if all `ranks` have answered cleanly, and always carries the output of rank 0, whichever rank
    decides.
    """
    worst = _deciding(answers, ranks)
    clean = len(answers) == ranks and all(answer.clean for answer in (worst, *answers.values()))
    return replace(worst, clean=clean, printed=answers[0].printed if 0 in answers else "")


def _deciding(answers: Mapping[int, Answer], ranks: int) -> Answer:
    broke = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, Broke)}
    if broke:  # a person must judge which of several made the others break
        reason = _by_rank({rank: answer.reason for rank, answer in broke.items()}, ": ", "; ")
        trace = _by_rank({rank: answer.trace for rank, answer in broke.items()}, ":\n", "\n")
        final = any(answer.final for answer in broke.values())
        return replace(min(broke.items())[1], reason=short_line(reason, "", LONGEST_REASON), trace=trace, final=final)
    for kind in (RanOut, Blew):
        for _, answer in sorted(answers.items()):
            if isinstance(answer, kind):
                return answer
    ended = sorted(rank for rank, answer in answers.items() if answer.ends)
    if 0 < len(ended) < ranks:
        told = f"rank {ended[0]} has ended and others have not; every rank must yield the same number of reports"
        return Broke(clean=False, reason=told, final=True)
    return min(answers.items())[1]


def _by_rank(told: Mapping[int, str], colon: str, between: str) -> str:
    """Join the texts of all ranks, labelled by rank; identical texts appear once."""
    ranks: dict[str, list[str]] = {}
    for rank, text in told.items():
        ranks.setdefault(text, []).append(str(rank))
    if len(ranks) == 1:
        return next(iter(ranks))
    return between.join(f"rank {', '.join(same)}{colon}{text}" for text, same in ranks.items())


def _serve(job: Mapping[str, Any]) -> None:
    """The `train_loop_per_worker`: answer commands until `Quit`."""
    context = ray.train.get_context()
    # A worker sees all the group's GPUs on its node; Ray knows which are its own.
    device = ray.train.torch.get_device() if job["spec"].gpus_per_worker else None
    mailbox, machine = job["mailbox"], context.get_node_rank()
    here = ray.get_runtime_context()
    # As bytes: to have the handle itself, the mailbox's process would import all of Ray Train before it could answer.
    handle = ray.cloudpickle.dumps(here.current_actor)
    machines = ray.get(mailbox.enlist.remote(handle, here.get_node_id()))
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ.update(_more_of_torchrun(rank, world_size, machine, machines, job["name"]))
    loop, printed = RankLoop(job["spec"], rank, world_size, device), Printed()
    if rank == 0:
        printed.listen()

    def say(answer: Answer) -> None:
        answer = replace(answer, printed=printed.take(answer.ends))
        ray.get(mailbox.answer.remote(rank, _with_state(answer, ray.put)))

    while not isinstance(command := ray.get(mailbox.take.remote(rank)), Quit):
        with answered_within(job["spec"].report_timeout_s, say):
            answer = loop.handle(_with_state(command, ray.get))
        say(answer)


def _more_of_torchrun(rank: int, world_size: int, machine: int, machines: int, name: str) -> dict[str, str]:
    """Return the environment variables that torchrun sets for its ranks and Ray Train does not.

    Libraries use them to detect that a launcher started all ranks, and on which machine each rank runs.
    """
    said = {
        "GROUP_RANK": machine,
        "GROUP_WORLD_SIZE": machines,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world_size,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": name,
        "TORCHELASTIC_USE_AGENT_STORE": False,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", 1),
    }
    return {key: str(value) for key, value in said.items()}


def _with_state(message: Any, move: Callable[[Any], Any]) -> Any:
    """Return a message with its state moved: states are large, and go through the object store, not the mailbox."""
    for name in ("resume", "state"):
        if getattr(message, name, None) is not None:
            return replace(message, **{name: move(getattr(message, name))})
    return message


class Group:
    """A running worker group, as seen by its slot."""

    def __init__(self, spec: GroupSpec) -> None:
        self._workers = spec.workers
        # Pinned to the slot's machine: if that is lost, the slot is lost anyway; any other could be lost on its own.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = Mailbox.options(scheduling_strategy=here).remote(spec.workers)  # type: ignore[attr-defined]
        self._error: BaseException | None = None
        self._ranks: list[bytes] = []  # the handles of their actors, once all have answered
        self._around = alive()
        # Ray Train requires a run folder that every node sees; nothing of ours is stored in it.
        self._folder = Path(spec.scratch) / f"group-{uuid.uuid4().hex[:12]}"
        self._thread = threading.Thread(target=self._fit, args=(spec,), daemon=True, name="group")
        self._thread.start()

    def ask(self, command: Command) -> Answer:
        """Send `command` to every rank and return the deciding answer: the worst one, or else rank 0's.

        If one rank fails and another has not answered within `GRACE_S`, the answer is marked not clean: the silent rank
        is stuck in a collective that no other rank joins. Raises GroupDied when the group ends.
        """
        try:
            return self._ask(command)
        except RayActorError as error:
            raise GroupDied(f"the group's mailbox died: {_last_lines(str(error), 1)}") from None
        except ObjectLostError:  # rank 0 answered, but its machine was lost before its state was fetched
            raise GroupDied("the state that rank 0 reported is lost", self._has_lost_a_machine()) from None

    def _ask(self, command: Command) -> Answer:
        ray.get(self._mailbox.post.remote(_with_state(command, ray.put)))
        answers: dict[int, Answer] = {}
        polls = math.inf  # that may yet bring nothing; a clock would also count a pause of the whole machine
        while len(answers) < self._workers and polls > 0:
            if not self._thread.is_alive():
                raise GroupDied(self._why(), with_machine=self._has_lost_a_machine())
            received = ray.get(self._mailbox.wait.remote(POLL_S))
            if received is None:
                polls -= 1
                continue
            rank, answer = received
            answers[rank] = _with_state(answer, ray.get)
            if answer.ends:
                grace_s = GRACE_S if isinstance(answer, FAILURES) or isinstance(command, Leave) else LAST_WORK_S
                polls = min(polls, grace_s / POLL_S)
        if len(answers) < self._workers and self._has_lost_a_machine():
            raise GroupDied("a machine of the worker group was lost, and a rank with it", with_machine=True)
        if len(answers) == self._workers and not self._ranks:
            self._ranks = ray.get(self._mailbox.members.remote())
        return worst_of(answers, self._workers)

    def _has_lost_a_machine(self) -> bool:
        """Return whether a machine of its ranks is lost; until all have begun, any that was alive at the start."""
        if isinstance(self._error, ray.train.PreemptionError):  # announced in advance; the machine may still be up
            return True
        nodes = ray.get(self._mailbox.nodes.remote())
        return gone(nodes if len(nodes) == self._workers else self._around)

    def stop(self) -> None:
        """End the group, killing ranks that do not quit by themselves."""
        with suppress(RayActorError):  # without a mailbox the ranks end as soon as they turn to it
            ray.get(self._mailbox.post.remote(Quit()))
        self._thread.join(QUIT_S)
        if self._thread.is_alive():
            for member in self._members():
                ray.kill(ray.cloudpickle.loads(member))
            self._thread.join(QUIT_S)
        ray.kill(self._mailbox)

    def _members(self) -> list[bytes]:
        try:
            return ray.get(self._mailbox.members.remote())
        except RayActorError:
            return self._ranks

    def _fit(self, spec: GroupSpec) -> None:
        resources: dict[str, float] = {"CPU": spec.cpus_per_worker}
        if spec.gpus_per_worker:
            resources["GPU"] = spec.gpus_per_worker
        try:
            ray.train.torch.TorchTrainer(
                _serve,
                train_loop_config={"spec": spec, "mailbox": self._mailbox, "name": self._folder.name},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=spec.workers,
                    use_gpu=spec.gpus_per_worker > 0,
                    resources_per_worker=resources,
                ),
                run_config=ray.train.RunConfig(
                    name="group",
                    storage_path=str(self._folder),
                    # Ray Train would replace preempted ranks with new ones that know nothing of the trial.
                    failure_config=ray.train.FailureConfig(
                        max_failures=0, max_preemption_failures=0, controller_failure_limit=STARTS
                    ),
                ),
            ).fit()
        except BaseException as error:  # kept for the thread that waits on this group
            self._error = error
        finally:  # not in `stop`, which may be over before this has written its last
            shutil.rmtree(self._folder, ignore_errors=True)

    def _why(self) -> str:
        if self._error is None:
            return "the worker group ended without being told to"
        return f"the worker group died: {type(self._error).__name__}: {_last_lines(str(self._error), 3)}"


def _last_lines(text: str, count: int) -> str:
    """Return the last lines, but for those with an address and those of carets, which point at the one above."""
    lines: Sequence[str] = [
        line.strip()
        for line in text.splitlines()
        if line.strip(" \t^~") and not line.strip().startswith(("namespace: ", "ip: "))
    ]
    return " | ".join(lines[-count:])
