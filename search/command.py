"""The steps of `launch.py`: resolve the space, check the data, plan, start Ray, run, report."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from search import cluster, yaml_file
from search import run as engine
from search.export import BEST_TRIAL, export, export_trial
from search.files import is_there
from search.interruption import Interruption
from search.options import Options, results_folder
from search.packing import cannot_share, measure
from search.plan import AT_THE_START, Node, Plan, Unmeasured, estimate, make_plan
from search.records.folder import SPACE, STUDY, TrialFolder, running
from search.records.journal import drop_lock
from search.records.mirror import Mirror, above, below
from search.records.provenance import how_it_ran, write_space
from search.records.record import Record, left_to_run, unmended
from search.results import as_of_now, describe, read_results, summary, why, write_results
from search.retry import retry_failed
from search.sampler import grid_size, sampler_maker, unlearned
from search.scheduler import make_scheduler, unheeded
from search.space import Space
from search.space import tree as trees
from search.space.file import load_space, read_space
from search.space.loading import Trainable
from search.study import is_begun, open_study
from search.tables import MARKDOWN
from search.text import where
from search.warm_start import check_comparable, read_earlier, take_over
from trainables.contract import UserError

REREADINGS = 3  # of a search that goes on while it is reported


class Resolved(NamedTuple):
    """A fully resolved search, before anything has been started."""

    space: Space
    trainable: Trainable
    unshared: Unmeasured | None  # why the slots cannot share a GPU; None if they can
    plan: Plan


def report(folder: str, trial: str | None, exported: Sequence[str] | None = None) -> str:
    """Rewrite the tables of a results folder, explain why `trial` ended as it did, or export a trial.

    exported: the trial to export and the destination folder. Raises UserError when both `trial` and `exported` are
    given.
    """
    if exported is not None:
        if trial is not None:
            raise UserError("--why cannot be combined with --export; ask one thing at a time")
        return export(folder, *exported)
    results = results_folder(folder)
    if trial is not None:
        return why(results, trial)
    for _ in range(REREADINGS):
        size = os.path.getsize(results / STUDY) if os.path.exists(results / STUDY) else None
        space, found = read_results(results)
        found = as_of_now(results, found)
        told = summary(results, space, found)
        try:
            write_results(results, space, found)
        except (OSError, UserError) as error:  # another user's search can be read, though not written to
            return told + f"\nthe tables in {results} were not updated: {error}"
        if os.path.getsize(results / STUDY) == size:  # else a search that has just ended may have written newer ones
            break
    return told


def nodes_for(options: Options) -> tuple[Node, ...]:
    """Return the machines available to the search, joining the cluster first when an address is given."""
    return cluster.start_ray(options.address) if options.address else cluster.this_machine()


def resolve(options: Options, nodes: Sequence[Node]) -> Resolved:
    """Resolve the space, trainable and plan without changing anything; raises UserError for any mistake in them."""
    with contextlib.chdir(os.curdir):  # to return here, where the command's paths begin
        space, trainable = load_space(
            options.file, options.overrides, options.profile, has_gpu=any(node.gpus for node in nodes)
        )
    check_folders(options, space)
    unshared = cannot_share(space, trainable, nodes)
    try:
        space = cap_to_grid(space)
        sampler_maker(space)
        make_scheduler(space)
        plan = make_plan(space, nodes, unshared or AT_THE_START)
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from None
    return Resolved(space, trainable, unshared, plan)


def search(
    options: Options, mirror_of_all: Mirror | None = None, interruption: Interruption | None = None
) -> engine.Outcome | None:
    """Run a search to its end; returns None after a dry run. Raises UserError for every mistake before any trial runs.

    mirror_of_all: mirror of a folder that holds this search along with others. interruption: tells the caller of a
    signal that came too late to interrupt this search.
    """
    nodes = nodes_for(options)
    space, trainable, unshared, plan = resolve(options, nodes)
    told = [
        f"{space.name}: {describe(space)}",
        *space.left_out,
        *untried(space),
        *unlearned(space),
        *unheeded(space),
        f"plan: {plan}",
        f"estimate: {estimate_of(options, space, plan)}",
    ]
    print("\n".join(told), flush=True)
    if options.dry_run:
        print(f"\n{yaml_file.dump(space.document())}", end="")
        return None
    space = prepared(space, trainable)
    interruption = interruption or Interruption()
    with interruption.heeded(), contextlib.ExitStack() as held:  # from here on there is a folder to resume from
        results = folder_of(options, space)
        mirror = None if mirror_of_all is not None else open_mirror(options, results)
        open_results(options, space, results, held, mirror)
        if mirror is not None:
            mirror.begin()
        if not options.address:
            with interruption.kept():
                cluster.start_ray(None)
        if space.resources.gpus_per_worker == "auto" and unshared is None and not interruption.came:
            plan = make_plan(space, nodes, measure(space, nodes, interruption))
            print(f"plan: {plan}", flush=True)
        outcome = engine.run(space, plan, results, options.cold, mirror or mirror_of_all, interruption)
        if outcome.records or outcome.reason is None:  # else there was nothing, or it can no longer be read
            print(summary(results, space, outcome.records))
    if mirror is not None:
        print(f"kept at: {mirror.uri}")
    if outcome.overtaken:
        print(f"ended: {outcome.reason}; what ran here since then is in {results}")
    elif outcome.interrupted:
        kept = str(results) if mirror is None or options.uri is None else mirror.uri
        again = [sys.argv[0], "--resume", kept, *(["--cold"] if options.cold else [])]
        again += ["--retry-failed"] if outcome.hopeless else []
        if options.address and options.address != os.environ.get("RAY_ADDRESS"):
            again += ["--address", options.address]
        if options.export is not None:
            again += ["--export", BEST_TRIAL, str(options.export)]
        because = "" if outcome.reason is None else f": {outcome.reason}"
        print(f"interrupted{because}; go on with: python {shlex.join(again)}")
    elif options.export is not None and outcome.best:
        try:
            print(export_trial(results, BEST_TRIAL, options.export))
        except (UserError, OSError) as error:  # the search itself ended well and nothing is lost
            print(f"error: not exported: {error}", file=sys.stderr)
    return outcome


def prepared(space: Space, trainable: Trainable) -> Space:
    """Have the trainable check its data before any trial runs; returns the space with its description of them."""
    described = prepare(space, trainable)
    if described is None:
        return space
    print(described, flush=True)
    return replace(space, data=described)


def prepare(space: Space, trainable: Trainable) -> str | None:
    """Return the trainable's description of its data, or None; raises UserError if the data are unusable."""
    if trainable.prepare is None:
        return None
    try:
        with contextlib.chdir(trainable.folder):
            described = trainable.prepare(trainable.config(space.config(space.draw(random.Random(0)))))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{space.trainable}: its module's `prepare` failed: {where(error)}. It is called with the config, "
            "before a search (trainables/contract.py); rename a helper that happens to be called so"
        ) from error
    return None if described is None else str(described)


def untried(space: Space) -> list[str]:
    """Return a warning line if the search has fewer trials than known settings."""
    known, trials = len(space.try_first), space.search.trials
    return (
        [f"search.trials: {trials}, so only the first {trials} of {known} known settings run"] if trials < known else []
    )


def cap_to_grid(space: Space) -> Space:
    """Limit a grid search to the grid's cells plus the known settings, which are not cells; others are unchanged."""
    if space.search.sampler != "grid":
        return space
    return space.with_trials(min(space.search.trials, grid_size(space) + len(space.try_first)))


def check_folders(options: Options, space: Space) -> None:
    """Check, without changing them, that the command's folders fit this search; raises UserError where they do not."""
    if options.resume is not None:
        check_same(read_space(options.resume / SPACE), space, options.resume)
        open_study(options.resume / STUDY, space, create=False)  # raises UserError if the study is unreadable
    if options.warm_start is not None:
        check_comparable(read_earlier(options.warm_start), space)
    if options.resume is None and is_there(options.results) and not options.results.is_dir():
        raise UserError(f"--results {options.results}: it is a file; name a folder")
    if options.resume is None and options.name is not None:
        check_unused(options.results / options.name)
        if is_there(options.results / options.name / MARKDOWN):
            raise UserError(f"{options.results / options.name} holds tables; choose another --name")


def check_unused(results: Path) -> None:
    """Raise UserError if a new search would replace another one there, or a space file that is not of one."""
    if is_begun(results / STUDY):
        raise UserError(f"{results} holds a search already; go on with it by --resume, or choose another --name")
    if is_there(results / SPACE) and "command" not in how_it_ran(results):
        raise UserError(f"{results / SPACE} is not of a search, and would be replaced; choose another --name")


def folder_of(options: Options, space: Space) -> Path:
    """Return the results folder. One that `--name` names may not exist yet; raises UserError if none can be made."""
    if options.resume is not None:
        return options.resume
    folder = named_folder(options, space.name)
    return folder if options.name is not None else made_anew(folder)


def named_folder(options: Options, kind: str) -> Path:
    """Return the folder that `--name` names; without it, one named after `kind` and the time, for `made_anew`."""
    return options.results / (options.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")


def made_anew(folder: Path) -> Path:
    """Make a folder, or the next one that does not exist: another search may have begun in the same second."""
    made, count = folder, 1
    while True:
        try:
            made.mkdir(parents=True)
            return made
        except OSError as error:
            if not os.path.lexists(made):
                raise UserError(f"--results {folder}: cannot make a folder here: {error.strerror}") from None
        count += 1
        made = folder.with_name(f"{folder.name}-{count}")


def open_mirror(options: Options, results: Path) -> Mirror | None:
    """Return the mirror of the results folder, including one set up before a resume; None if it has no mirror.

    Call this while a new folder does not exist or is empty. Raises UserError, and removes such a folder, if the mirror
    cannot be used.
    """
    if options.uri is not None:
        try:
            mirror = Mirror(results, below(options.uri, results.name))
            mirror.check()
        except UserError:
            with contextlib.suppress(OSError):
                results.rmdir()
            raise
        return mirror
    before = how_it_ran(results).get("mirror") if options.resume is not None else None
    if before is None:
        return None
    if below(above(before), results.resolve().name) != before:
        print(f"not mirrored to {before}, which belongs to another folder", flush=True)
        return None
    try:
        mirror = Mirror(results, before)
        mirror.check()
    except UserError as error:
        raise UserError(f"{error}; without `mirror` in {results / SPACE} it goes on here alone") from None
    print(f"mirrored to {before}, as before", flush=True)
    return mirror


def open_results(
    options: Options, space: Space, results: Path, held: contextlib.ExitStack, mirror: Mirror | None = None
) -> None:
    """Write the resolved space and the study to the results folder, locked for other processes while `held` is open.

    Call `check_folders` first: it reports the mistakes that are not expected here.
    """
    uri = None if mirror is None else mirror.uri
    if options.resume is not None:
        _take(results, held)
        write_space(results, space, uri)
        if options.retry_failed:
            try:
                print(retry_failed(results, space))
            except OSError as error:
                raise UserError(f"--retry-failed {results}: cannot be written to: {error.strerror}") from None
        return
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {results}: cannot make a folder here: {error.strerror}") from None
    _take(results, held)
    check_unused(results)  # another process may have been faster
    write_space(results, space, uri)
    if options.warm_start is None:
        open_study(results / STUDY, space, create=True)
        return
    begun = results / f".{STUDY}"  # renamed when all is in it: a search that is resumed takes over nothing
    try:
        begun.unlink(missing_ok=True)
        drop_lock(begun)
        study = open_study(begun, space, create=True)
        print(f"warm start: {take_over(study, space, read_earlier(options.warm_start))}")
        begun.rename(results / STUDY)
    except OSError as error:
        raise UserError(f"--warm-start: {results}: cannot be written to: {error.strerror}") from None


def _take(results: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder: two searches in it would run the same trials and overwrite each other's files."""
    try:
        alone = held.enter_context(running(results))
    except BlockingIOError:
        raise UserError(f"{results}: another process is running this search; wait for it, or end it first") from None
    if alone:
        drop_lock(results / STUDY)


def check_same(earlier: Space, space: Space, folder: Path) -> None:
    """Raise UserError if resuming would change the search: its tables pair every trial with the config of `space`."""
    before, now = (
        {key: item.document()[key] for key in ("trainable", "objective", "config", "try_first")}
        for item in (earlier, space)
    )
    names = dict.fromkeys([*trees.leaves(before), *trees.leaves(now)])
    pairs = {name: (trees.get(before, name), trees.get(now, name)) for name in names}
    changed = [name for name, (a, b) in pairs.items() if a != b and repr(a) != repr(b)]  # NaN != NaN
    if changed:
        raise UserError(
            f"--resume {folder}: {', '.join(changed)} cannot change, because its trials have run with it; leave it, or "
            f"begin a search that learns from them, with --warm-start {folder}"
        )


def estimate_of(options: Options, space: Space, plan: Plan) -> str:
    """Return the estimated cost as text; a resumed search is estimated from its own epochs and remaining trials."""
    if options.resume is None:
        return estimate(space, plan, measured_before(options.results, space))
    _, found = read_results(options.resume)
    left = left_to_run(found, space.search.trials) + (len(unmended(found)) if options.retry_failed else 0)
    if left == 0:
        return "no trial is left to run; a larger --trials would continue the search"
    epoch_s = seconds_per_epoch(options.resume, found) or measured_before(options.resume.parent, space)
    return estimate(space.with_trials(left), plan, epoch_s)


def seconds_per_epoch(results: Path, found: Sequence[Record]) -> float | None:
    """Return the mean seconds per epoch over the trials of a search; None before their first epoch.

    First epochs count only if there are no others: their time includes the start of a group and any pre-training.
    """
    firsts, later = list[tuple[int, float]](), list[tuple[int, float]]()
    for record in found:
        first = TrialFolder(results, record.number).row(1)
        if first is not None:
            before = first.get("seconds", 0.0)
            firsts.append((1, before))
            later += [(record.epochs - 1, record.seconds - before)] if record.epochs > 1 else []
    timed = later or firsts
    return sum(seconds for _, seconds in timed) / sum(epochs for epochs, _ in timed) if timed else None


def measured_before(results: Path, space: Space) -> float | None:
    """Return seconds per epoch of the newest search under `results` with the same trainable and profile, or None."""
    measured = (space.trainable, space.profile)
    folders = sorted(results.glob(f"*/{SPACE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in folders:
        try:
            document = yaml_file.read(file)
        except UserError:
            continue  # not a results folder
        document = document if isinstance(document, dict) else {}
        ran = document.get("ran")
        if (document.get("trainable"), ran.get("profile") if isinstance(ran, dict) else None) != measured:
            continue
        try:
            _, found = read_results(file.parent)
            epoch_s = seconds_per_epoch(file.parent, found)
        except UserError:
            continue
        if epoch_s is not None:
            return epoch_s
    return None
