"""YAML 1.2's meanings and no others: 5e-5 is a number, `no` is a word, a key twice is an error, no tag runs code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from fleetune.schema import RecipeError

_TAG = "tag:yaml.org,2002:"
_PLAIN = (  # what is written without quotes, and the characters it may begin with; an int goes before a float
    ("merge", r"<<", ["<"]),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_MOST_NODES = 100_000  # each alias counts as what it stands for


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the meanings above alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes the text that YAML 1.1 or 1.2 would take for something else."""


def _scalar(convert: Callable[[str], Any], message: str) -> Callable[[Any, Any], Any]:
    def construct(loader: Any, node: Any) -> Any:
        try:
            return convert(str(loader.construct_scalar(node)))
        except (ValueError, KeyError):
            raise ConstructorError(None, None, message, node.start_mark) from None

    return construct


def _text(dumper: Any, text: str) -> Any:
    """Breaks escaped: in other quotes PyYAML reads them back as newlines or spaces."""
    style = '"' if re.search("[\n\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _text)
_Loader.yaml_implicit_resolvers = {}
for _name, _written, _first in _PLAIN:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_written})\Z"), _first)
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (None, _TAG + "null", _TAG + "str", _TAG + "seq", _TAG + "map")  # None: any other tag, an error
}
_Loader.add_constructor(
    _TAG + "int", _scalar(lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), "this is no whole number")
)
_Loader.add_constructor(
    _TAG + "float", _scalar(lambda text: float(re.sub(r"\.(?=[iInN])", "", text)), "this is no number")
)
_Loader.add_constructor(
    _TAG + "bool", _scalar(lambda text: {"true": True, "false": False}[text.lower()], "this is neither true nor false")
)


def parse_yaml(text: str, origin: str, position: bool = True, lines: dict[str, int] | None = None) -> Any:
    """`lines` gets the line that each key, by its dotted path, stands in.

    Raises RecipeError, with line and column unless `position` is off, where the text is not such YAML.
    """
    place = origin
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {}, (), {} if lines is None else lines)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        if error.problem_mark is not None and position:
            place = f"{origin}:{error.problem_mark.line + 1}:{error.problem_mark.column + 1}"
        message = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.YAMLError as error:  # a control character
        message = str(error).splitlines()[0]
    except RecursionError:
        message = "it is nested too deeply"
    raise RecipeError(f"{place}: not valid YAML: {message}")


def _check(node: Any, path: str, sizes: dict[int, int], above: tuple[int, ...], lines: dict[str, int]) -> int:
    """How many nodes this is. Raises ConstructorError for a key that is doubled or no text, and for what never ends."""
    if id(node) in above:
        raise _fault(path, "an alias of something that it stands in", node)
    if id(node) in sizes:
        return sizes[id(node)]
    above = (*above, id(node))
    size = 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{path}.{index}"[1:]] = item.start_mark.line + 1
            size += _check(item, f"{path}.{index}", sizes, above, lines)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for index, (key, value) in enumerate(node.value):
            is_scalar = isinstance(key, yaml.ScalarNode)
            there = f"{path}.{key.value}" if is_scalar else path
            if is_scalar and key.tag == _TAG + "int" and re.fullmatch("-?(0|[1-9][0-9]*)", key.value):
                # {0: x} is {"0": x}, as in JSON; 0x10 and 007 have two readings. A copy: an alias may share the key.
                key = yaml.ScalarNode(_TAG + "str", key.value, key.start_mark, key.end_mark)
                node.value[index] = (key, value)
            if not is_scalar or key.tag not in (_TAG + "str", _TAG + "merge"):
                raise _fault(there, "a key should be text: write it in quotes", key)
            if key.value in seen and key.tag != _TAG + "merge":
                raise _fault(there, "this key stands here twice", key)
            seen.add(key.value)
            lines[there[1:]] = key.start_mark.line + 1
            size += _check(value, there, sizes, above, lines)
    if size > _MOST_NODES:
        raise _fault(path, f"its aliases make more than {_MOST_NODES} values", node)
    sizes[id(node)] = size
    return size


def _fault(path: str, message: str, node: Any) -> ConstructorError:
    return ConstructorError(None, None, f"{path[1:]}: {message}" if path else message, node.start_mark)


def dump_yaml(values: Any) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
