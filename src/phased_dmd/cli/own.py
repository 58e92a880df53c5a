"""`--own MODULE:FUNCTION` runs code of the user's, which is asked for by name, and takes the model that it makes.

No configuration and no run folder can name such a function: a file of others must not make code run.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phased_dmd.config import Config
from phased_dmd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from phased_dmd.networks.build import Own

OwnModel = Annotated[
    str | None,
    typer.Option(
        "--own",
        metavar="MODULE:FUNCTION",
        help="Function of yours that returns (model, codec), as my_model:build or my_model.py:build; it is run. For "
        "the recipe own, or teacher.kind=own.",
        show_default=False,
    ),
]


def own_of(config: Config, named: str | None) -> "Own | None":
    """Returns the model and codec of a run: None without `--own`, else what the function that it names returns.

    Raises UserError where the run's teacher is of another kind, or of the user's own and no function is named; for the
    rest see `call_own`.
    """
    from phased_dmd.networks.build import check_own

    check_own(config, named is not None)
    return None if named is None else call_own(named)


def call_own(named: str) -> "Own":
    """Imports the module and calls the function, which returns a model and its codec.

    A module's name is looked up as Python does, in the working folder first; a file is read with its own folder first.
    Raises UserError where there is no such module or function, and where it raises or returns something else.
    """
    place, _, name = named.rpartition(":")
    path = Path(place)
    if not name.isidentifier() or not (path.suffix == ".py" or all(map(str.isidentifier, place.split(".")))):
        raise UserError(f"--own: {named!r} is not of the form module:function or file.py:function")
    module = _file(path, named) if path.suffix == ".py" else _module(place, named)
    function, known = vars(module).get(name), [each for each, value in vars(module).items() if callable(value)]
    if not callable(function):
        raise UserError(f"--own: {place} has no function {name}{did_you_mean(name, known) if known else ''}")
    return _checked(_run(function, named), named)


def _file(path: Path, named: str) -> ModuleType:
    """Imports a file as a module of its own name."""
    if not path.is_file():
        raise UserError(f"--own: {path}: there is no such file")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None  # of a .py there are both
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[path.stem] = module  # as an import does: dataclasses look their module up
    _run(lambda: loader.exec_module(module), named)
    return module


def _module(place: str, named: str) -> ModuleType:
    """Imports a module by its name."""
    sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return _run(lambda: importlib.import_module(place), named)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{place}.".startswith(f"{cause.name}."):
            raise UserError(f"--own: there is no module {cause.name} here, or among those installed") from cause
        raise


def _run(function: Callable[[], Any], named: str) -> Any:
    """Calls code of the user's; what it raises becomes a UserError with the line of their file."""
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            frames.append((error.filename, error.lineno))
        theirs = [each for each in frames if each[0] != __file__ and not each[0].startswith("<")]
        theirs = [each for each in theirs if "site-packages" not in Path(each[0]).parts] or theirs
        where = f" ({Path(theirs[-1][0]).name}, line {theirs[-1][1]})" if theirs else ""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"--own: {named} raised {text}{where}") from error


def _checked(found: Any, named: str) -> "Own":
    """Returns what a function returned if it is a model and a codec, by the members that the protocols ask for."""
    from phased_dmd.models.protocol import Codec, VelocityModel

    if not (isinstance(found, tuple) and len(found) == 2):
        given = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise UserError(f"--own: {named} returned {given}, where (model, codec) is needed; see docs/extending.md")
    for part, protocol, value in (("model", VelocityModel, found[0]), ("codec", Codec, found[1])):
        needed = [name for name in vars(protocol) if not name.startswith("_")]
        if missing := [name for name in needed if not hasattr(value, name)]:
            kind = type(value).__name__
            raise UserError(f"--own: {named} returned a {kind} as its {part}, which lacks {', '.join(missing)}")
    return found
