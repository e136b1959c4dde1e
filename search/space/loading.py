"""Finds the trainable that a space names by import path."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import inspect
import operator
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import search
import trainables
from search.space.decode import decode, did_you_mean
from search.text import where
from trainables.contract import UserError

_FOLDERS: dict[str, str] = {}  # the working directory after a module's first import
_JOBS_COPIES = "working_dir_files"  # where Ray unpacks the folder of `ray job submit --working-dir`


@dataclass(frozen=True)
class Trainable:
    """A trainable and what else its module defines: the one that a space names, or else the one it is imported from.

    config_class: the module's `Config` dataclass, or None for plain dicts.
    prepare: the module's `prepare(config)`, or None; it returns a description of the data, or None.
    memory_need: the module's `memory_need(trial)`, or None.
    folder: the working directory that its import left, where `prepare` is called.
    """

    train: Callable[[Any], Any]
    config_class: type | None
    prepare: Callable[[Any], str | None] | None
    memory_need: Callable[[Any], int] | None
    folder: str

    def config(self, tree: dict[str, Any]) -> Any:
        """Return `tree` in the form that `train` takes; raises UserError for what does not fit."""
        return tree if self.config_class is None else decode(self.config_class, tree)


def load(name: str, paths: Sequence[str]) -> Trainable:
    """Import `package.module:function`, searching `paths` before the rest of sys.path.

    A module may change the working directory as it is imported. A worker stays there.
    Raises UserError if it cannot be imported, with the reason and the line that failed, and for a `Config` class that
    is not a dataclass.
    """
    module_name, separator, function = name.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        told = f"{Path(module_name).stem}:{function or 'train'}"
        raise UserError(
            f"trainable: {module_name} is a file; write {told}, and put the space beside it or start in its folder"
        )
    if not separator or not module_name or not function or module_name.startswith("."):
        raise UserError(f"trainable: {name!r} is not an import path; write package.module:function")
    _look_in(paths, module_name.split(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"trainable: no module {error.name!r} in {', '.join(paths)} or on sys.path") from None
        raise UserError(f"trainable: {module_name} cannot be imported: {where(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit: a script that parses its command line when imported
        raise UserError(f"trainable: {module_name} cannot be imported: {where(error)}") from None
    train = _named(module, function)
    if not callable(train):
        _check_meant(module, paths)
        functions = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise UserError(f"trainable: {module_name} has no function {function!r}; {did_you_mean(function, functions)}")
    if isinstance(train, type):
        raise UserError(f"trainable: {name} is a class; name a function that yields a report after every epoch")
    if _takes_one_argument(train, follow_wrapped=False) is False:
        written = f"def {function.rpartition('.')[2]}(trial)"
        raise UserError(f"trainable: {name} would be called with one argument, the trial; write {written}")
    folder = _FOLDERS.setdefault(module_name, os.getcwd())
    home = _home(train, module, function)
    return Trainable(
        train,
        _config_class(module) or _config_class(home),
        _of_one_argument(module, "prepare") or _of_one_argument(home, "prepare"),
        _of_one_argument(module, "memory_need") or _of_one_argument(home, "memory_need"),
        folder,
    )


def _look_in(paths: Sequence[str], package: str) -> None:
    """Let imports search `paths` first, in the same order in every process, whatever Ray has put before them.

    A folder with the name of a package that is already imported, such as `trainables`, adds its modules to that
    package.
    """
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    places = getattr(sys.modules.get(package), "__path__", None)
    for path in paths:
        folder = os.path.join(path, package)
        if places is not None and os.path.isdir(folder) and folder not in places:
            places.append(folder)


def _check_meant(module: types.ModuleType, paths: Sequence[str]) -> None:
    """Raise UserError if one of the paths has another module of this name: Python already knew this one."""
    origin, name = getattr(module, "__file__", None), module.__name__
    spec = importlib.machinery.PathFinder.find_spec(name, list(paths)) if "." not in name else None
    if spec is None or spec.origin is None or origin is None or os.path.samefile(spec.origin, origin):
        return
    raise UserError(f"trainable: {name} is another module, {origin}; give {spec.origin} a name of its own")


def _home(train: Any, module: types.ModuleType, name: str) -> types.ModuleType:
    """Return the module that defines a trainable, from which `module` may have imported it."""
    home = sys.modules.get(getattr(train, "__module__", None) or "", module)
    return home if _named(home, getattr(train, "__qualname__", name)) is train else module


def _named(module: types.ModuleType, name: str) -> Any:
    """Return a module's attribute, dotted perhaps, or None; raises UserError if the module fails to look it up."""
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None
    except Exception as error:  # raised by the module's own `__getattr__`
        raise UserError(f"trainable: looking up {name!r} in {module.__name__} failed: {where(error)}") from None


def _config_class(module: types.ModuleType) -> type | None:
    """Return the module's `Config` dataclass, or None; raises UserError if the module's own `Config` is another class.

    An imported class that is not a dataclass is ignored: it may mean something else.
    """
    found = _named(module, "Config")
    if not isinstance(found, type):
        return None
    if dataclasses.is_dataclass(found):
        return found
    if found.__module__ == module.__name__:
        raise UserError(
            f"trainable: the class Config of {module.__name__} is no dataclass, so that no config can be checked "
            "against it; decorate it with @dataclass(frozen=True), or give it another name"
        )
    return None


def _of_one_argument(module: types.ModuleType, name: str) -> Callable[[Any], Any] | None:
    """Return the module's function of that name if it takes one argument, else None: others only share the name."""
    function = _named(module, name)
    return function if callable(function) and _takes_one_argument(function, follow_wrapped=True) else None


def _takes_one_argument(function: Callable[..., Any], follow_wrapped: bool) -> bool | None:
    """Return whether a function can be called with one argument; None if it does not say, as some builtins do not.

    follow_wrapped: whether a decorated function is judged as written, rather than as its decorator left it.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def check_not_hidden() -> None:
    """Raise UserError if a module in the working directory would hide a package of this platform from workers."""
    for package in (search, trainables):
        found = importlib.machinery.PathFinder.find_spec(package.__name__, [str(Path.cwd())])
        if found is not None and found.origin is not None and not os.path.samefile(found.origin, str(package.__file__)):
            raise UserError(f"trainable: {found.origin} hides a package of this platform; give it another name")


def search_paths(space_file: Path, earlier: Sequence[str]) -> tuple[str, ...]:
    """Return where a space's trainable may be: the working directory and the folder of the space file.

    earlier: where it was when the search began. These folders go first, so that a search goes on with its own code,
    unless they are gone or a job's copy of a folder, in whose place the next job has another.
    """
    here = [str(Path.cwd()), str(space_file.resolve().parent)]
    own = [path for path in earlier if os.path.isdir(path) and _JOBS_COPIES not in Path(path).parts]
    return tuple(dict.fromkeys([*own, *here, *earlier]))
