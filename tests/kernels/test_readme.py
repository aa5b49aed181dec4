"""The examples of kernels/README.md run as they stand there, and its signatures are the functions' own."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fleetune_kernels

TEXT = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", [block for block in BLOCKS if block.startswith("import torch")])
def test_an_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, "kernels/README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
    assert "nan" not in capsys.readouterr().out


def test_the_signatures_are_those_of_the_functions() -> None:
    (shown,) = (block for block in BLOCKS if not block.startswith("import torch"))
    found = re.findall(r"^(\w+)\((.*?)\)$", shown, re.DOTALL | re.MULTILINE)
    assert len(found) == 9
    for name, arguments in found:
        parameters = inspect.signature(getattr(fleetune_kernels, name)).parameters
        for argument in re.split(r",\s+", arguments):
            key, _, default = argument.partition("=")
            if key not in ("*", "..."):
                assert key in parameters, (name, key)
                assert not default or repr(parameters[key].default) == default.replace('"', "'"), (name, argument)
