"""What is said of a file that does not fit its schema: the file, the key's path, the value, and what would be right.

Recipes and cluster profiles alike: `root` is the schema that the file is of. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fleetune.schema import Recipe, RecipeError
from fleetune.sections import Section
from fleetune.strict_yaml import parse_yaml

Path_ = tuple[str | int, ...]


def dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """As it stands in a recipe, shortened; ... where it would be too much."""
    if value is ...:
        return "..."
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


def inside(values: Any, part: str | int) -> Any:
    """What stands at a key or an index; None where nothing does."""
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None


def _sections_at(path: Path_, values: Any, root: type[Section]) -> list[type[Section]]:
    """The schema classes that may stand at a path of the file."""
    found: list[type[Section]] = [root]
    is_name = False  # of a map of names, whose sections are told by no key
    for part in path:
        values = inside(values, part)
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        annotations = [_fields(section)[part].annotation for section in found if part in _fields(section)]
        found = [m for annotation in annotations for m in _models(annotation)]
        is_name = any(get_origin(annotation) is dict for annotation in annotations)
    kind = values.get("kind") if isinstance(values, dict) else None
    if len(found) > 1:  # a union by kind
        found = [m for m in found if kind in get_args(m.model_fields["kind"].annotation)] or found
    return found


def _all_names(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in _fields(section).items():
        yield name, prefix + name
        first = "0." if get_origin(info.annotation) is list else ""
        for inner in _models(info.annotation):
            yield from _all_names(inner, f"{prefix}{name}.{first}")


def _unknown_key(path: Path_, values: Any, root: type[Section]) -> str:
    key = str(path[-1])
    legal = sorted({name for section in _sections_at(path[:-1], values, root) for name in _fields(section)})
    if len(path) == 1 and root is Recipe:
        legal.append("extends")
    places: dict[str, str] = {}
    for name, place in sorted(_all_names(root), key=lambda named: named[1].count(".")):  # the nearest to the top
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


def _is_misspelt(required: Path_, unknown: set[Path_]) -> bool:
    """Whether a key beside it is what was meant by this one, and says so in a line of its own."""
    beside = [str(path[-1]) for path in unknown if path[:-1] == required[:-1]]
    return bool(difflib.get_close_matches(str(required[-1]), beside, n=1, cutoff=0.6))


def fault_lines(error: ValidationError, values: Any, root: type[Section], origin: Callable[[Path_], str]) -> list[str]:
    """A line for each fault; `origin` says which file set a key."""
    lines = []
    errors = error.errors(include_url=False)
    unknown = {fault["loc"] for fault in errors if fault["type"] == "extra_forbidden"}
    secret = [fault["loc"][:-1] for fault in errors if fault["type"] == "secret"]
    for fault in errors:
        kind = fault["type"]
        path: Path_ = ()
        value: Any = values
        for part in fault["loc"]:  # the tag of a union by kind is no key of the recipe: leave it out
            if isinstance(value, dict) and part not in value and value.get("kind") == part:
                continue
            if part == "[key]":  # it is the key itself that is wrong; an option's value says more than its name again
                value = value if kind == "option" else path[-1]
                continue
            path, value = (*path, part), inside(value, part)
        if kind == "extra_forbidden":
            message = _unknown_key(path, values, root)
        elif kind == "missing":
            if _is_misspelt(fault["loc"], unknown):
                continue
            message = "this key is required"
        elif kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
            if kind == "literal_error":
                legal = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
            else:
                legal = [
                    name
                    for m in _sections_at(path, values, root)
                    for name in get_args(m.model_fields["kind"].annotation)
                ]
                path, value = (*path, "kind"), value.get("kind")
            message = f"legal values: {', '.join(legal)}" + _nearest(value, legal)
        elif kind == "string_pattern_mismatch":
            message = "letters, digits, '.', '_' and '-' only, at most 100 of them, a letter or digit first"
        else:
            message = _wrong_type(kind, value) or re.sub(r"^Input should be", "should be", fault["msg"])
        is_there = kind not in ("missing", "union_tag_not_found", "secret", "variable") and fault["loc"] not in secret
        if kind == "union_tag_not_found":
            message = f"this key is required; {message}"
        lines.append(f"{origin(path)}: {dotted(path)}{f' = {shown(value)}' if is_there else ''}: {message}")
    return list(dict.fromkeys(lines))
