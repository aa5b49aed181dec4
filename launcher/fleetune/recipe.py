"""The recipe: the way from a YAML file with overrides to one resolved, checked object.

Base (`extends`), then file, then overrides: maps merge, lists are replaced. Relative paths are taken from the file
that names them, on the command line from the working folder. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fleetune.combinations import combinations, missing_files
from fleetune.schema import DATA_SUFFIXES, Recipe, RecipeError, Section
from fleetune.strict_yaml import dump_yaml, parse_yaml

Path_ = tuple[str | int, ...]


# ---------------------------------------------------------------- faults


@dataclass
class _Layers:
    """The merged recipe and, for each key, the file that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path_, str] = field(default_factory=dict)

    def origin(self, path: Path_, default: str) -> str:
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return default


def dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)


def _shown(value: Any) -> str:
    """As it stands in a recipe, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _models(annotation: Any) -> Iterator[type[Section]]:
    """Every Section inside an annotation: the type itself, or those in its unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """By the names they have in a recipe."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _inside(values: Any, part: str | int) -> Any:
    """What stands at a key or an index; None where nothing does."""
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None


def _sections_at(path: Path_, values: Any) -> list[type[Section]]:
    """The schema classes that may stand at a path of the recipe."""
    found: list[type[Section]] = [Recipe]
    for part in path:
        values = _inside(values, part)
        if isinstance(part, int):
            continue
        found = [m for section in found if part in _fields(section) for m in _models(_fields(section)[part].annotation)]
    kind = values.get("kind") if isinstance(values, dict) else None
    if len(found) > 1:  # a union by kind
        found = [m for m in found if kind in get_args(m.model_fields["kind"].annotation)] or found
    return found


def _all_names(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in _fields(section).items():
        yield name, prefix + name
        first = "0." if get_origin(info.annotation) is list else ""
        for inner in _models(info.annotation):
            yield from _all_names(inner, f"{prefix}{name}.{first}")


def _unknown_key(path: Path_, values: Any) -> str:
    key = str(path[-1])
    legal = sorted({name for section in _sections_at(path[:-1], values) for name in _fields(section)})
    if len(path) == 1:
        legal.append("extends")
    places: dict[str, str] = {}
    for name, place in _all_names():
        places.setdefault(name, place)
    if key in places:
        if places[key] != dotted(tuple(0 if isinstance(part, int) else part for part in path)):
            return f"unknown key here; did you mean `{places[key]}`?"
        return f"not a key of this kind; legal here: {', '.join(legal)}"
    near = difflib.get_close_matches(key, legal, n=1, cutoff=0.6)
    if not near and (elsewhere := difflib.get_close_matches(key, places, n=1, cutoff=0.8)):
        return f"unknown key; did you mean `{places[elsewhere[0]]}`?"
    return "unknown key; " + (f"did you mean `{near[0]}`?" if near else f"legal here: {', '.join(legal)}")


def _nearest(value: Any, legal: list[str]) -> str:
    near = difflib.get_close_matches(str(value), legal, n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def _wrong_type(kind: str, value: Any) -> str | None:
    """In a recipe's words, where pydantic's are Python's."""
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a map of keys" + (", a `kind` among them" if kind == "model_attributes_type" else "")
    if kind == "list_type":
        return "should be a list, each item after a `- ` or all in [ ]"
    if kind == "string_type":
        return "should be text" + ("; write it in quotes" if isinstance(value, bool | int | float) else "")
    if kind == "bool_type":
        return "should be true or false"
    if kind in ("int_type", "float_type"):
        what = "a whole number" if kind == "int_type" else "a number"
        if kind == "int_type" and isinstance(value, float) and value.is_integer():
            return f"should be {what}: {int(value)}"
        with contextlib.suppress(RecipeError):
            if isinstance(value, str) and type(parse_yaml(value, "")) in (int, float):
                return f"should be {what}, without quotes"
        return f"should be {what}"
    return None


def _fault_lines(error: ValidationError, layers: _Layers, file: str) -> list[str]:
    lines = []
    for fault in error.errors(include_url=False):
        kind = fault["type"]
        path: Path_ = ()
        value: Any = layers.values
        for part in fault["loc"]:  # the tag of a union by kind is no key of the recipe: leave it out
            if isinstance(value, dict) and part not in value and value.get("kind") == part:
                continue
            path, value = (*path, part), _inside(value, part)
        if kind == "extra_forbidden":
            message = _unknown_key(path, layers.values)
        elif kind == "missing":
            message = "this key is required"
        elif kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
            if kind == "literal_error":
                legal = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
            else:
                legal = [
                    name
                    for m in _sections_at(path, layers.values)
                    for name in get_args(m.model_fields["kind"].annotation)
                ]
                path, value = (*path, "kind"), value.get("kind")
            message = f"legal values: {', '.join(legal)}" + _nearest(value, legal)
        elif kind == "string_pattern_mismatch":
            message = "letters, digits, '.', '_' and '-' only, at most 100 of them, a letter or digit first"
        else:
            message = _wrong_type(kind, value) or re.sub(r"^Input should be", "should be", fault["msg"])
        is_there = kind not in ("missing", "union_tag_not_found")
        if kind == "union_tag_not_found":
            message = f"this key is required; {message}"
        lines.append(
            f"{layers.origin(path, file)}: {dotted(path)}{f' = {_shown(value)}' if is_there else ''}: {message}"
        )
    return list(dict.fromkeys(lines))


# ---------------------------------------------------------------- files, overrides, paths

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_PATH_KEYS: tuple[Path_, ...] = (
    ("output_dir",),
    ("model", "model_name_or_path"),
    *(("data", split, "path") for split in ("train", "validation", "test")),
)


def _expand(value: str, where: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if _SECRET.search(name):
            raise RecipeError(
                f"{where} = {_shown(value)}: ${{{name}}} looks like a secret, and the recipe is stored in plain text"
            )
        if not os.environ.get(name) and default is None:
            state = "is empty" if name in os.environ else "is not set"
            raise RecipeError(
                f"{where} = {_shown(value)}: the environment variable {name} {state}; "
                f"set it, or write ${{{name}:-the path without it}}"
            )
        return os.environ.get(name) or default or ""

    if "${" in _VARIABLE.sub("", value):
        raise RecipeError(f"{where} = {_shown(value)}: a variable has the form ${{NAME}} or ${{NAME:-default}}")
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
        values = values.get(part) if isinstance(values, dict) else None
    return values, path[-1]


def _localise(values: dict[str, Any], origin: str, folder: Path) -> None:
    """Expands variables and makes paths absolute, in the values that one file or override set."""
    for key in _PATH_KEYS:
        parent, last = _lookup(values, key)
        if isinstance(parent, dict) and isinstance(parent.get(last), str):
            where = f"{origin}: {dotted(key)}"
            expanded = _expand(parent[last], where)
            if not expanded:
                raise RecipeError(f"{where} = {_shown(parent[last])}: is empty; leave it out, or give a path")
            try:
                parent[last] = local_or_hub(expanded, folder, is_local=key == ("output_dir",))
            except RuntimeError:  # of expanduser
                raise RecipeError(f"{where} = {_shown(parent[last])}: there is no such user") from None


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
        place = f"{seen[-1]}: extends: {file}" if seen else str(file)
        raise RecipeError(f"{place}: cannot read the recipe: {reason}") from None
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a map of keys, this is {'empty' if values is None else _shown(values)}")
    base = values.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"{file}: extends = {_shown(base)}: should be the path of another recipe")
        _read(file.parent / base, layers, (*seen, file))
    _localise(values, str(file), file.parent)
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
    _localise(over, COMMAND_LINE, Path.cwd())
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
        values = _inside(values, path[-1])
    return path


def _with(base: Any, path: Path_, value: Any, changed: dict[Path_, str], done: Path_ = ()) -> Any:
    """What merges over `base` to give `path` its value: maps with that key alone, a list whole, one item changed."""
    if not path:
        return value
    part, here = path[0], (*done, path[0])
    over = _with(_inside(base, part), path[1:], value, changed, here)
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
    _refuse(missing_files(recipe), layers, file)
    return recipe


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
        raise RecipeError("\n".join(_fault_lines(error, layers, file))) from None
    _refuse(combinations(recipe), layers, file)
    return recipe


def _refuse(faults: Iterable[tuple[str, Any, str]], layers: _Layers, file: str) -> None:
    lines = []
    for name, value, message in faults:
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        lines.append(f"{layers.origin(path, file)}: {name} = {_shown(value)}: {message}")
    if lines:
        raise RecipeError("\n".join(lines))


def dump_recipe(recipe: Recipe) -> str:
    return dump_yaml(recipe.model_dump(mode="json"))


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
