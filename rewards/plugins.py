"""Where rewards are found: the table of this package, installed packages, and the user's own files.

A name with a colon is an import string, ``module:attribute`` or ``path/to/file.py:attribute``. Any other name is normalised (lower case, ``-`` to ``_``) and
looked for in ``rewards.table.REWARDS`` and among the entry points of the group ``flowrl.rewards``, so that a plug-in needs no line of ours::

    [project.entry-points."flowrl.rewards"]
    sharpness = "my_package.rewards:Sharpness"

Listing executes nothing: entry points are read from the metadata of the installed packages, the files of a folder as syntax trees. Code runs only when it is
named.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import operator
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from flowrl.types import UserError
from rewards.table import REWARDS

__all__ = ["BUILT_IN", "GROUP", "YOURS", "Source", "describe_error", "find", "import_target", "installed_plugins", "normalize", "rewards_in_folder", "suggest"]

GROUP = "flowrl.rewards"
BUILT_IN = "built in"
YOURS = "yours"
_DISTRIBUTION = "flowrl-diffusion"
_LARGEST_FILE = 2**20  # bytes; what is larger is data


@dataclass(frozen=True, slots=True)
class Source:
    """A reward that can be named, and where it comes from; nothing of it has been imported.

    Attributes:
        name: what a config says.
        target: ``module:attribute``, or ``path/to/file.py:attribute``.
        origin: ``BUILT_IN``, ``YOURS``, or the distribution that brings it, such as "flowrl-sharpness 0.1".
        description: first line of its docstring, where that is known without an import.
        problem: why it cannot be used; empty = nothing known.
    """

    name: str
    target: str
    origin: str
    description: str = ""
    problem: str = ""


def normalize(name: str) -> str:
    """A name as the table and the lookup see it: lower case, with ``_`` for ``-``."""
    return name.strip().casefold().replace("-", "_")


def find(name: str) -> Source:
    """The reward of this name.

    Raises:
        UserError: no reward has the name, or more than one distribution brings it.
    """
    if ":" in name:
        return Source(name, name, YOURS)
    wanted = normalize(name)
    plugins = [plugin for plugin in installed_plugins() if plugin.name == wanted]
    found = _built_in().get(wanted) or (plugins[0] if plugins else None)
    if found is None:
        known = [*_built_in(), *(plugin.name for plugin in installed_plugins())]
        raise UserError(f"unknown reward '{name}'{suggest(wanted, known)}; see `flowrl rewards`, or give your own as module:attribute")
    problem = next((plugin.problem for plugin in plugins if plugin.problem), "")
    if problem:
        raise UserError(f"reward '{name}' {problem}")
    return found


def installed_plugins() -> list[Source]:
    """The entry points of the group ``flowrl.rewards`` by name. None is loaded; one that clashes or is malformed says so in ``problem``."""
    return list(_discover(tuple(sys.path)))


def rewards_in_folder(folder: Path) -> list[Source]:
    """What looks like a reward in the Python files of a folder (not of those below it), found without executing them.

    That is: a function on the module's level whose first parameter is called ``batch`` or annotated ``SampleBatch``, and a class that has ``load`` and
    ``score`` and sets ``info``. Names that begin with ``_`` are private. A file that cannot be parsed is passed over.
    """
    found: list[Source] = []
    for file in sorted(folder.glob("*.py")):
        try:
            if file.stat().st_size > _LARGEST_FILE:
                continue
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and _looks_like_reward(node):
                lines = (ast.get_docstring(node) or "").splitlines()
                name = f"{_module_or_file(file)}:{node.name}"
                found.append(Source(name, name, YOURS, lines[0] if lines else ""))
    return found


def import_target(name: str, source: Source) -> object:
    """The object that a source names. This runs the module's code.

    A module is looked for among the installed packages and then, for an import string, in the current folder, which is appended to ``sys.path`` for good,
    so that the module's own imports work later too; so is the folder of a file that is given by its path.

    Raises:
        UserError: the target is malformed or not there, or its import fails.
    """
    place, _, attribute = source.target.rpartition(":")
    is_file = source.origin == YOURS and place.endswith(".py") and ":" not in Path(place).name
    if not all(part.isidentifier() for part in [*([] if is_file else place.split(".")), *attribute.split(".")]):
        raise UserError(f"reward '{name}' is no import string; write module:attribute, such as my_rewards:sharpness, or path/to/my_rewards.py:sharpness")
    module = _import_file(name, place) if is_file else _import_module(name, place, source)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        where = getattr(module, "__file__", None) or "built in"
        hint = suggest(attribute, (key for key in vars(module) if not key.startswith("_")))
        raise UserError(f"reward '{name}': module '{place}' ({where}) has no attribute '{attribute}'{hint}") from error


def describe_error(error: BaseException) -> str:
    """``Type: message`` on one line of at most 300 characters."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else line[:297] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'NAME'?)`` where a known name is near, else nothing."""
    nearest = difflib.get_close_matches(normalize(word), known, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


@functools.cache
def _built_in() -> dict[str, Source]:
    return {normalize(name): Source(name, target, BUILT_IN) for name, target in REWARDS.items()}


@functools.lru_cache(maxsize=4)
def _discover(path: tuple[str, ...]) -> tuple[Source, ...]:
    """The installed plug-ins; ``path`` is that of the interpreter, on which the answer depends."""
    found = [
        Source(
            normalize(entry.name), entry.value.partition("[")[0].strip(), " ".join(filter(None, (entry.dist.name, entry.dist.version))) if entry.dist else "?"
        )
        for entry in importlib.metadata.entry_points(group=GROUP)
    ]
    found.sort(key=lambda source: (source.name, source.origin))
    owners: dict[str, list[str]] = {name: [_DISTRIBUTION] for name in _built_in()}
    for source in found:
        owners.setdefault(source.name, []).append(source.origin)

    def problem(source: Source) -> str:
        if len(owners[source.name]) > 1:
            return f"is given by {' and by '.join(owners[source.name])}; uninstall one, or name what you mean as module:attribute, such as {source.target}"
        module, _, attribute = source.target.partition(":")
        if ":" in source.name or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
            return f"of {source.origin} is declared as '{source.name} = {source.target}'; its author must write name = module:attribute"
        return ""

    return tuple(Source(source.name, source.target, source.origin, problem=problem(source)) for source in found)


def _looks_like_reward(node: ast.FunctionDef | ast.ClassDef) -> bool:
    if isinstance(node, ast.FunctionDef):
        parameters = [*node.args.posonlyargs, *node.args.args]
        if not parameters:
            return False
        annotation = ast.unparse(parameters[0].annotation).strip("'\"") if parameters[0].annotation else ""
        return parameters[0].arg == "batch" or annotation.rpartition(".")[2] == "SampleBatch"
    members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    assigned = {
        ast.unparse(item).removeprefix("self.") for item in ast.walk(node) if isinstance(item, ast.Name | ast.Attribute) and isinstance(item.ctx, ast.Store)
    }
    inherited = {"load", "score"} if any(ast.unparse(base).rpartition(".")[2] == "NetworkReward" for base in node.bases) else set()
    return {"info", "load", "score"} <= members | assigned | inherited


def _module_or_file(file: Path) -> str:
    """The module's name, or the file's where that is no name or belongs to an installed module, which would be found first."""
    if not file.stem.isidentifier():
        return file.name
    try:
        spec = importlib.util.find_spec(file.stem)
    except ValueError:  # a module without a spec, such as __main__
        return file.name
    return file.stem if spec is None or (spec.origin and Path(spec.origin).resolve() == file.resolve()) else file.name


def _import_module(name: str, module_name: str, source: Source) -> ModuleType:
    where = "among the installed packages"
    if source.origin == YOURS:
        where += f" or in {_append_to_path(Path.cwd())}"
    by = "" if source.origin in (YOURS, BUILT_IN) else f" (plug-in of {source.origin})"
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise UserError(f"reward '{name}'{by}: importing module '{module_name}' failed with {describe_error(error)}") from error
        raise UserError(f"reward '{name}'{by}: no module '{missing}' {where}") from error


def _import_file(name: str, place: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    module_name = f"flowrl_file_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"  # one module a file, however the path is written
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"reward '{name}': there is no file {file}")
    _append_to_path(file.parent)
    sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"reward '{name}': importing {file} failed with {describe_error(error)}") from error
    return module


def _append_to_path(folder: Path) -> str:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return str(folder)
