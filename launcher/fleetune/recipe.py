"""The recipe: the way from a YAML file with overrides to one resolved, checked object.

Base (`extends`), then file, then overrides: maps merge, lists are replaced. Relative paths are taken from the file
that names them, on the command line from the working folder. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fleetune.combinations import combinations, missing_files
from fleetune.faults import Path_, dotted, fault_lines, inside, shown
from fleetune.losses import OF_A_TEACHER, OF_DOMAINS
from fleetune.schema import DATA_SUFFIXES, Recipe, RecipeError, losses_of
from fleetune.strict_yaml import dump_yaml, parse_yaml


@dataclass
class _Layers:
    """The merged recipe and, for each key, the file that set it, and the line there."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path_, str] = field(default_factory=dict)
    lines: dict[str, dict[str, int]] = field(default_factory=dict)  # of each file, by dotted key

    def origin(self, path: Path_, default: str) -> str:
        """The file that set the key, or the nearest one above it."""
        return next((self.origins[known] for known in _upwards(path) if known in self.origins), default)

    def place(self, path: Path_, default: str) -> str:
        """The same as FILE:LINE, where the line is known."""
        return self.place_in(self.origin(path, default), path)

    def place_in(self, file: str, path: Path_) -> str:
        lines = self.lines.get(file, {})
        return next((f"{file}:{lines[dotted(known)]}" for known in _upwards(path) if dotted(known) in lines), file)


def _upwards(path: Path_) -> list[Path_]:
    return [path[:depth] for depth in range(len(path), 0, -1)]


# ---------------------------------------------------------------- files, overrides, paths

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_PATH_KEYS: tuple[Path_, ...] = (
    ("output_dir",),
    ("model", "model_name_or_path"),
    ("teacher", "model_name_or_path"),
    ("teacher", "cache"),
    *(("data", split, "path") for split in ("train", "validation", "test")),
)


def _expand(value: str, where: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if _SECRET.search(name):
            raise RecipeError(
                f"{where} = {shown(value)}: ${{{name}}} looks like a secret, and the recipe is stored in plain text"
            )
        if not os.environ.get(name) and default is None:
            state = "is empty" if name in os.environ else "is not set"
            raise RecipeError(
                f"{where} = {shown(value)}: the environment variable {name} {state}; "
                f"set it, or write ${{{name}:-the path without it}}"
            )
        return os.environ.get(name) or default or ""

    if "${" in _VARIABLE.sub("", value):
        raise RecipeError(f"{where} = {shown(value)}: a variable has the form ${{NAME}} or ${{NAME:-default}}")
    return _VARIABLE.sub(replace, value)


def local_or_hub(value: str, folder: Path, is_local: bool = False) -> str:
    """Local paths become absolute; a hub name stays as it is, unless a file or folder of that name is there."""
    if value.startswith("package://"):
        return value
    path = Path(value).expanduser()
    local = (
        is_local
        or value.startswith(("./", "../", "/", "~"))
        or value in (".", "..")
        or path.suffix in DATA_SUFFIXES
        or (folder / path).exists()
    )
    return os.path.normpath(folder / path) if local else value


def _lookup(values: Any, path: Path_) -> tuple[Any, Any]:
    for part in path[:-1]:
        values = inside(values, part)
    return values, path[-1]


def _names(section: Any) -> list[Any]:
    return list(section) if isinstance(section, dict) else []


def _localise(values: dict[str, Any], place: Callable[[Path_], str], folder: Path) -> None:
    """Expands variables and makes paths absolute, in the values that one file or override set."""
    teachers = values.get("teachers")
    listed = range(len(teachers)) if isinstance(teachers, list) else ()
    data = inside(values, "data")
    domains = [(key, name) for key in ("source", "target") for name in _names(inside(data, key))]
    keys: tuple[Path_, ...] = (
        *_PATH_KEYS,
        *(("teachers", i, key) for i in listed for key in ("model_name_or_path", "cache")),
        *(("data", *domain, split, "path") for domain in domains for split in ("train", "validation", "test")),
    )
    for key in keys:
        parent, last = _lookup(values, key)
        if isinstance(parent, dict) and isinstance(parent.get(last), str):
            where = f"{place(key)}: {dotted(key)}"
            expanded = _expand(parent[last], where)
            if not expanded:
                raise RecipeError(f"{where} = {shown(parent[last])}: is empty; leave it out, or give a path")
            try:
                parent[last] = local_or_hub(expanded, folder, is_local=key[-1] in ("output_dir", "cache"))
            except RuntimeError:  # of expanduser
                raise RecipeError(f"{where} = {shown(parent[last])}: there is no such user") from None
    _inline_template(values.get("data"), place(("data", "chat_template")), folder)


def _inline_template(data: Any, origin: str, folder: Path) -> None:
    """A chat template's file gives way to what stands in it, so that the stored recipe is whole."""
    value = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(value, str) and value.endswith(".jinja"):
        try:
            data["chat_template"] = (folder / Path(value).expanduser()).read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"{origin}: data.chat_template = {shown(value)}: cannot be read: {error}") from None


def _merge(base: Any, over: Any, origin: str, origins: dict[Path_, str], path: Path_ = ()) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = _merge(base.get(key), value, origin, origins, (*path, key))
        return merged
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = origin
    if isinstance(over, dict):
        return {key: _merge(None, value, origin, origins, (*path, key)) for key, value in over.items()}
    return over


def _read(file: Path, layers: _Layers, seen: tuple[Path, ...] = ()) -> None:
    file = Path(os.path.normpath(file.absolute()))
    if file in seen:
        raise RecipeError(f"{file}: extends: a circle: {' -> '.join(str(f) for f in (*seen, file))}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        place = f"{layers.place_in(str(seen[-1]), ('extends',))}: extends: {file}" if seen else str(file)
        raise RecipeError(f"{place}: cannot read the recipe: {reason}") from None
    values = parse_yaml(text, str(file), lines=layers.lines.setdefault(str(file), {}))
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a map of keys, this is {'empty' if values is None else shown(values)}")
    base = values.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            place = layers.place_in(str(file), ("extends",))
            raise RecipeError(f"{place}: extends = {shown(base)}: should be the path of another recipe")
        _read(file.parent / base, layers, (*seen, file))
    _localise(values, lambda path: layers.place_in(str(file), path), file.parent)
    layers.values = _merge(layers.values, values, str(file), layers.origins)


COMMAND_LINE = "command line"


def _override(layers: _Layers, assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals or not all(name.split(".")):
        raise RecipeError(f"{COMMAND_LINE}: {assignment!r}: an override has the form key.path=value")
    if name == "extends":
        raise RecipeError(f"{COMMAND_LINE}: {assignment!r}: extends stands in recipe files only")
    value = parse_yaml(text, f"{COMMAND_LINE}: {name} = {text!r}", position=False)
    path = _path_of(name, layers.values)
    changed: dict[Path_, str] = {}
    over = _with(layers.values, path, value, changed)
    _localise(over, lambda _: COMMAND_LINE, Path.cwd())
    index = next((depth for depth, part in enumerate(path) if isinstance(part, int)), 0)
    origin = layers.origin(path[:index], COMMAND_LINE)  # of the list's other items
    layers.values = _merge(layers.values, over, COMMAND_LINE, layers.origins)
    if index:
        layers.origins |= {path[:index]: origin, **changed}


def _path_of(name: str, values: Any) -> Path_:
    """The parts of a dotted name, those of lists as numbers. Raises RecipeError for an item that is not there."""
    path: Path_ = ()
    for part in name.split("."):
        number = int(part) if part.isascii() and part.isdigit() else None
        where = f"{COMMAND_LINE}: {dotted((*path, part))}: `{dotted(path)}`"
        if isinstance(values, list):
            if number is None or number >= len(values):
                there = f"its items are 0 to {len(values) - 1}" if values else "it is empty"
                raise RecipeError(f"{where} is a list of {len(values)}; {there}")
        elif number is not None and not isinstance(values, dict):
            hint = f"; give it whole, as {dotted(path)}=[...]" if values is None else ""
            raise RecipeError(f"{where} is no list in this recipe{hint}")
        path = (*path, number if isinstance(values, list) and number is not None else part)
        values = inside(values, path[-1])
    return path


def _with(base: Any, path: Path_, value: Any, changed: dict[Path_, str], done: Path_ = ()) -> Any:
    """What merges over `base` to give `path` its value: maps with that key alone, a list whole, one item changed."""
    if not path:
        return value
    part, here = path[0], (*done, path[0])
    over = _with(inside(base, part), path[1:], value, changed, here)
    if isinstance(part, str):
        return {part: over}
    items = list(base)
    items[part] = _merge(base[part] if path[1:] else None, over, COMMAND_LINE, changed, here)
    return items


# ---------------------------------------------------------------- the way in and out


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, merges, expands and checks a recipe, and that the files it names are there.

    Raises:
        RecipeError: with a line for each fault.
    """
    layers = _Layers()
    _read(Path(file), layers)
    for assignment in overrides or ():
        _override(layers, assignment)
    if "output_dir" not in layers.values:
        layers.values["output_dir"] = str(Path.cwd() / "runs")
    file = os.path.normpath(Path(file).absolute())
    recipe = _validate(layers, file)
    _refuse((*_no_losses(layers.values), *missing_files(recipe)), layers, file)
    return recipe


def _no_losses(values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """A list that was written out and is empty: what it should mean can only be guessed."""
    if values.get("losses") == []:
        yield "losses", [], "an empty list; leave the key out for the task's own loss"


def parse_recipe(text: str, origin: str) -> Recipe:
    """A recipe that is resolved already, as stored in a run folder; the files it names need not be there."""
    values = parse_yaml(text, origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a map of keys")
    return _validate(_Layers(values), origin)


def _validate(layers: _Layers, file: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(layers.values)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(fault_lines(error, layers.values, Recipe, lambda path: layers.place(path, file)))
        ) from None
    _refuse(combinations(recipe), layers, file)
    return recipe


def _refuse(faults: Iterable[tuple[str, Any, str]], layers: _Layers, file: str) -> None:
    lines = []
    for name, value, message in faults:
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        lines.append(f"{layers.place(path, file)}: {name} = {shown(value)}: {message}")
    if lines:
        raise RecipeError("\n".join(lines))


def baseline_of(recipe: Recipe) -> Recipe:
    """The same model from scratch, by itself: without a teacher and what is learnt from one."""
    losses = [loss for loss in recipe.losses if loss.kind not in OF_A_TEACHER]
    if losses and all(loss.kind.endswith("_penalty") or loss.kind in OF_DOMAINS for loss in losses):
        losses = [*losses_of(recipe.model_copy(update={"losses": []})), *losses]
    model = recipe.model.model_copy(update={"from_scratch": True, "lora": None})
    return recipe.model_copy(update={"model": model, "losses": losses, "teacher": None, "teachers": []})


def in_this_machines_precision(recipe: Recipe, report: dict[str, Any]) -> Recipe:
    """The recipe in fp32 where it asks for bf16 and the machine has none: the same recipe runs on any laptop.

    It is what the run folder stores: a run goes on in the precision it began with, and is refused in another.
    """
    if not recipe.training.bf16 or report["has_fast_bf16"]:
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"bf16": False})})


def dump_recipe(recipe: Recipe) -> str:
    """As a recipe that can be read again: without `losses` where it names none."""
    values = recipe.model_dump(mode="json")
    return dump_yaml({key: value for key, value in values.items() if key != "losses" or value})


def flatten(values: Any, path: Path_ = ()) -> Iterator[tuple[str, Any]]:
    """Each value with its dotted path; the items of a list one by one where they are maps."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flatten(value, (*path, key))
    elif isinstance(values, list) and any(isinstance(item, dict) for item in values):
        for index, item in enumerate(values):
            yield from flatten(item, (*path, index))
    else:
        yield dotted(path), values
