"""The recipe: the way from a YAML file with overrides to one resolved, checked object.

Base (`extends`), then file, then overrides: maps merge, lists are replaced. Relative paths are taken from the file
that names them, on the command line from the working folder. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from fleetune.schema import DATA_SUFFIXES, Recipe, RecipeError, Section, combinations

Path_ = tuple[str | int, ...]


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML as people mean it: 5e-5 is a number, `no` is a word, and a key written twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key, (key_node, _) in zip(keys, node.value, strict=True):
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key `{key}` stands here twice", key_node.start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, origin: str) -> Any:
    """Raises RecipeError with the line and column where the text is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


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
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _models(annotation: Any) -> Iterator[type[Section]]:
    """Every Section inside an annotation: the type itself, or those in its unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _sections_at(path: Path_, values: Any) -> list[type[Section]]:
    """The schema classes that may stand at a path of the recipe."""
    found: list[type[Section]] = [Recipe]
    for part in path:
        values = values[part] if isinstance(values, dict | list) else None
        if isinstance(part, int):
            continue
        found = [
            m
            for section in found
            if part in section.model_fields
            for m in _models(section.model_fields[part].annotation)
        ]
    kind = values.get("kind") if isinstance(values, dict) else None
    if len(found) > 1:  # a union by kind
        found = [m for m in found if kind in get_args(m.model_fields["kind"].annotation)] or found
    return found


def _all_names(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in section.model_fields.items():
        yield name, prefix + name
        for inner in _models(info.annotation):
            yield from _all_names(inner, f"{prefix}{name}.")


def _unknown_key(path: Path_, values: Any) -> str:
    key = str(path[-1])
    legal = sorted({name for section in _sections_at(path[:-1], values) for name in section.model_fields})
    near = difflib.get_close_matches(key, legal, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    elsewhere = [name for short, name in _all_names() if short == key]
    if elsewhere:
        return f"unknown key here; did you mean `{elsewhere[0]}`?"
    return f"unknown key; legal here: {', '.join(legal)}"


def _nearest(value: Any, legal: list[str]) -> str:
    near = difflib.get_close_matches(str(value), legal, n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def _fault_lines(error: ValidationError, layers: _Layers, file: str) -> list[str]:
    lines = []
    for fault in error.errors(include_url=False):
        path: Path_ = ()
        values: Any = layers.values
        for part in fault["loc"]:  # the tag of a union by kind is no key of the recipe: leave it out
            if isinstance(values, dict) and part not in values and values.get("kind") == part:
                continue
            path = (*path, part)
            values = (
                values[part] if isinstance(values, dict | list) and (isinstance(part, int) or part in values) else None
            )
        if fault["type"] == "extra_forbidden":
            message = _unknown_key(path, layers.values)
        elif fault["type"] == "missing":
            message = "this key is required"
        elif fault["type"] in ("literal_error", "union_tag_invalid"):
            context = fault["ctx"]
            legal = re.findall(r"'([^']+)'", str(context.get("expected") or context["expected_tags"]))
            wrong = values.get("kind") if fault["type"] == "union_tag_invalid" else values
            if fault["type"] == "union_tag_invalid":
                path, values = (*path, "kind"), wrong
            message = f"legal values: {', '.join(legal)}" + _nearest(wrong, legal)
        elif fault["type"] == "union_tag_not_found":
            path, message = (*path, "kind"), "this key is required"
        elif fault["type"] == "string_pattern_mismatch":
            message = "letters, digits, '.', '_' and '-' only, at most 100 of them, a letter or digit first"
        else:
            message = re.sub(r"^Input should be", "should be", fault["msg"])
        value = "" if fault["type"] in ("missing", "union_tag_not_found") else f" = {_shown(values)}"
        lines.append(f"{layers.origin(path, file)}: {dotted(path)}{value}: {message}")
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
        if name not in os.environ and default is None:
            raise RecipeError(f"{where} = {_shown(value)}: the environment variable {name} is not set")
        return os.environ.get(name) or default or ""

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
            expanded = _expand(parent[last], f"{origin}: {dotted(key)}")
            parent[last] = local_or_hub(expanded, folder, is_local=key == ("output_dir",))


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
    file = Path(os.path.abspath(file))
    if file in seen:
        raise RecipeError(f"{file}: extends: a circle: {' -> '.join(str(f) for f in (*seen, file))}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{file}: cannot read the recipe: {reason}") from None
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
    if not equals or not name or any(not part for part in name.split(".")):
        raise RecipeError(f"{COMMAND_LINE}: {assignment!r}: an override has the form key.path=value")
    value = parse_yaml(text, f"{COMMAND_LINE}: {name}")
    path: Path_ = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    nested: dict[str, Any] = {}
    if not any(isinstance(part, int) for part in path):
        place = nested
        for part in path[:-1]:
            place = place.setdefault(str(part), {})
        place[str(path[-1])] = value
        _localise(nested, COMMAND_LINE, Path.cwd())
        layers.values = _merge(layers.values, nested, COMMAND_LINE, layers.origins)
        return
    place_: Any = layers.values
    for depth, part in enumerate(path):
        there = path[: depth + 1]
        if isinstance(part, int):
            if not isinstance(place_, list) or part >= len(place_):
                size = f"a list of {len(place_)}" if isinstance(place_, list) else "no list"
                raise RecipeError(
                    f"{COMMAND_LINE}: {dotted(there)}: `{dotted(path[:depth])}` is {size}, counted from 0"
                )
        elif not isinstance(place_, dict):
            raise RecipeError(f"{COMMAND_LINE}: {dotted(there)}: `{dotted(path[:depth])}` is no map")
        if depth == len(path) - 1:
            place_[part] = value
        else:
            place_ = place_.setdefault(part, {}) if isinstance(place_, dict) else place_[part]
    layers.origins[path] = COMMAND_LINE


# ---------------------------------------------------------------- the way in and out


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, merges, expands and checks a recipe.

    Raises:
        RecipeError: with a line for each fault.
    """
    layers = _Layers()
    _read(Path(file), layers)
    for assignment in overrides or ():
        _override(layers, assignment)
    if "output_dir" not in layers.values:
        layers.values["output_dir"] = str(Path.cwd() / "runs")
    return _validate(layers, str(file))


def parse_recipe(text: str, origin: str) -> Recipe:
    """A recipe that is resolved already, as stored in a run folder."""
    values = parse_yaml(text, origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a map of keys")
    return _validate(_Layers(values), origin)


def _validate(layers: _Layers, file: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(layers.values)
    except ValidationError as error:
        raise RecipeError("\n".join(_fault_lines(error, layers, file))) from None
    faults = [
        f"{layers.origin(tuple(int(p) if p.isdigit() else p for p in path.split('.')), file)}: "
        f"{path} = {_shown(value)}: {message}"
        for path, value, message in combinations(recipe)
    ]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(values: Any, path: Path_ = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flatten(value, (*path, key))
    else:
        yield dotted(path), values
