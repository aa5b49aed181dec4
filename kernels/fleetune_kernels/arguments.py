"""Whether arguments are of the kinds that a function's annotations name: a tensor, a number, text, a list of some."""

from __future__ import annotations

import functools
import numbers
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

WORDS = {
    "torch.Tensor": "a tensor",
    "Sequence": "a list",
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "bool": "True or False",
    "None": "None",
}
_ALIASES = {"Bandwidth": "float | torch.Tensor", "Sizes": "Sequence[Sequence]"}
_TYPES: dict[type, set[str]] = {  # the kinds that a value of exactly this type is of
    torch.Tensor: {"torch.Tensor"},
    torch.nn.Parameter: {"torch.Tensor"},
    float: {"float"},
    int: {"int", "float"},
    str: {"str"},
    bool: {"bool"},
    type(None): {"None"},
}


class Kinds(NamedTuple):
    of: set[str]  # some of WORDS; empty where the function itself says what it takes
    items: set[str]  # where it is a list
    types: frozenset[type]  # a value of one of these is right without another look


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which first raises ValueError for an argument of another kind: its name and what it should be.

    Under torch.compile nothing is looked at, since the check would be traced with the call.
    """
    kinds = {name: _kinds(text) for name, text in function.__annotations__.items() if name != "return"}
    names = tuple(kinds)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if name in kinds and type(value) not in kinds[name].types:
                    _check(name, value, kinds[name])
        return function(*args, **kwargs)

    return call


def _kinds(annotation: str) -> Kinds:
    for alias, meaning in _ALIASES.items():
        annotation = annotation.replace(alias, meaning)
    found = re.search(r"Sequence\[(.*?)\]", annotation)
    of = set(re.sub(r"\[.*?\]", "", annotation).split(" | "))
    items = set(found[1].split(" | ")) if found else set()
    types = frozenset(one for one, kinds in _TYPES.items() if kinds & of)
    return Kinds(of if of <= WORDS.keys() else set(), items, types)


def _check(name: str, value: object, kinds: Kinds) -> None:
    if kinds.of and not kinds.of & _kinds_of(value):
        words = [word for kind, word in WORDS.items() if kind in kinds.of]
        should = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
        raise ValueError(f"{name}: {type(value).__name__}; should be {should}")
    if kinds.items and isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            _check(f"{name}[{index}]", item, Kinds(kinds.items, set(), frozenset()))


def _kinds_of(value: object) -> set[str]:
    if isinstance(value, torch.Tensor):
        return {"torch.Tensor"}
    if type(value) in _TYPES:
        return _TYPES[type(value)]
    if isinstance(value, numbers.Real):  # numpy's too
        return {"int", "float"} if isinstance(value, numbers.Integral) else {"float"}
    return {"Sequence"} if isinstance(value, Sequence) and not isinstance(value, str) else set()
