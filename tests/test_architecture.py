"""Who may import whom, read from the source: imports inside functions, under conditions and by name count too."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("launcher", "kernels", "recipes")
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "wandb", "submitit")


@dataclass(frozen=True)
class Rule:
    """The files that match import none of these, but for the files in `except_`."""

    files: str
    never: tuple[str, ...]
    except_: tuple[str, ...] = field(default=())


FLEETUNE = "launcher/fleetune"
RULES = (
    Rule(f"{FLEETUNE}/cluster/**/*.py", ("fleetune.train", "fleetune.cli")),
    Rule(f"{FLEETUNE}/train/**/*.py", ("fleetune.cli", "fleetune.cluster")),
    Rule("kernels/fleetune_kernels/**/*.py", ("fleetune",)),
    Rule(
        f"{FLEETUNE}/**/*.py",
        ("deepspeed",),
        tuple(f"{FLEETUNE}/train/{n}.py" for n in ("engine", "zero", "checkpoint", "reshard")),
    ),
    Rule(f"{FLEETUNE}/**/*.py", ("wandb",), (f"{FLEETUNE}/train/wandb_run.py",)),
    Rule(f"{FLEETUNE}/**/*.py", ("submitit",), (f"{FLEETUNE}/cluster/submit.py",)),
    # What is only there where its extra was installed.
    Rule(f"{FLEETUNE}/**/*.py", ("bitsandbytes",), (f"{FLEETUNE}/train/quantization.py",)),
    Rule(f"{FLEETUNE}/**/*.py", ("lm_eval",), (f"{FLEETUNE}/train/lm_evaluation.py",)),
    # The losses, the heads that are fused with theirs, and the test of two samples by one of them.
    Rule(
        f"{FLEETUNE}/**/*.py",
        ("fleetune_kernels",),
        tuple(f"{FLEETUNE}/train/{name}.py" for name in ("objectives", "teacher_terms", "domains", "model", "shift")),
    ),
    # torch and what brings it stand in train/ alone; the launcher starts it as a program.
    Rule(f"{FLEETUNE}/*.py", (*HEAVY, "fleetune.train")),
    Rule(f"{FLEETUNE}/cluster/**/*.py", tuple(name for name in HEAVY if name != "submitit")),
    Rule("kernels/fleetune_kernels/**/*.py", tuple(name for name in HEAVY if name != "torch")),
    # The ground floor: everybody may import it, and it imports nobody above.
    *(
        Rule(f"{FLEETUNE}/{name}.py", ("fleetune.cli", "fleetune.report", "fleetune.cluster", "fleetune.train", *above))
        for name, above in (
            ("sections", ("fleetune.losses", "fleetune.schema", "fleetune.recipe", "fleetune.runs")),
            ("losses", ("fleetune.schema", "fleetune.combinations", "fleetune.recipe", "fleetune.runs")),
            ("data_section", ("fleetune.losses", "fleetune.schema", "fleetune.recipe", "fleetune.runs")),
            ("model_section", ("fleetune.losses", "fleetune.schema", "fleetune.recipe", "fleetune.runs")),
            ("schema", ("fleetune.strict_yaml", "fleetune.combinations", "fleetune.recipe", "fleetune.runs")),
            ("strict_yaml", ("fleetune.combinations", "fleetune.recipe", "fleetune.runs")),
            ("combinations", ("fleetune.strict_yaml", "fleetune.recipe", "fleetune.runs")),
            ("faults", ("fleetune.combinations", "fleetune.recipe", "fleetune.runs")),
            ("batch", ("fleetune.strict_yaml", "fleetune.combinations", "fleetune.recipe", "fleetune.runs")),
            ("recipe", ("fleetune.runs",)),
            ("runs", ()),
        )
    ),
)
NAMES_THAT_SAY_NOTHING = ("utils", "util", "core", "common", "helpers", "helper", "misc")


def imports(source: str, module: str) -> Iterator[str]:
    """Each dotted name that the source imports, wherever it does; `module` is its own, for relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


@functools.cache
def _imported(source: str, module: str) -> frozenset[str]:
    return frozenset(imports(source, module))


def violations(root: Path, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """`FILE imports NAME`, for each import that a rule forbids."""
    found = []
    for rule in rules:
        for file in sorted(root.glob(rule.files)):
            name = str(file.relative_to(root))
            if name in rule.except_:
                continue
            module = ".".join(file.relative_to(root).with_suffix("").parts[1:])
            imported = _imported(file.read_text(encoding="utf-8"), module)
            found += [
                f"{name} imports {wrong}"
                for wrong in rule.never
                if any(one == wrong or one.startswith(f"{wrong}.") for one in imported)
            ]
    return found


# ---------------------------------------------------------------- the source as it is


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.files}-{rule.never[0]}")
def test_nobody_imports_what_he_may_not(rule: Rule) -> None:
    assert violations(ROOT, (rule,)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.files}-{rule.never[0]}")
def test_a_rule_is_about_files_that_exist(rule: Rule) -> None:
    assert [file for file in ROOT.glob(rule.files) if str(file.relative_to(ROOT)) not in rule.except_]


def test_no_file_has_a_name_that_says_nothing() -> None:
    files = [
        file for folder in (*SOURCES, "tests") for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts
    ]
    assert len(files) > 20
    assert [file for file in files if file.stem in NAMES_THAT_SAY_NOTHING] == []


@pytest.mark.parametrize("folder", SOURCES)
def test_a_source_root_is_no_package(folder: str) -> None:
    """A top-level package `kernels` would shadow the one that Transformers imports."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", ["launcher/fleetune", "launcher/fleetune/cluster", "launcher/fleetune/train"])
def test_a_package_runs_nothing_when_it_is_imported(package: str) -> None:
    """What stood in an __init__.py would be loaded for help and completion too."""
    assert ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body == []


# ---------------------------------------------------------------- the reader itself


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "import deepspeed.comm as dist, os",
        "from deepspeed import zero",
        "from deepspeed.utils import logger as log",
        "def run():\n    import deepspeed",
        "class A:\n    def f(self):\n        if self:\n            from deepspeed import zero",
        "try:\n    import deepspeed\nexcept ImportError:\n    deepspeed = None",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deepspeed",
        "import importlib\nimportlib.import_module('deepspeed.comm')",
        "from importlib import import_module\nf = lambda: import_module('deepspeed')",
        "__import__('deepspeed')",
    ],
)
def test_an_import_is_seen_wherever_it_stands(source: str) -> None:
    assert any(name.partition(".")[0] == "deepspeed" for name in imports(source, "fleetune.train.loop"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from . import cli", "fleetune.train.cli"),
        ("from .. import cli", "fleetune.cli"),
        ("from ..cluster import local", "fleetune.cluster.local"),
        ("from fleetune import cluster", "fleetune.cluster"),
    ],
)
def test_a_relative_import_is_resolved(source: str, name: str) -> None:
    assert name in set(imports(source, "fleetune.train.loop"))


@pytest.mark.parametrize("source", ["'import deepspeed'", "# import deepspeed", "import deepspeeds", "deepspeed = 1"])
def test_what_is_no_import_is_not_seen(source: str, tmp_path: Path) -> None:
    file = tmp_path / FLEETUNE / "train" / "loop.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("cluster/planted.py", "def f():\n    from fleetune.train import loop", "fleetune.train"),
        ("cluster/planted.py", "def f():\n    import torch", "torch"),
        ("train/planted.py", "from fleetune import cli", "fleetune.cli"),
        ("train/planted.py", "from ..cluster.local import prepare", "fleetune.cluster"),
        ("train/planted.py", "import deepspeed", "deepspeed"),
        ("train/deeper/planted.py", "import wandb", "wandb"),
        ("train/planted.py", "from fleetune_kernels import cross_entropy", "fleetune_kernels"),
        ("planted.py", "def f():\n    import submitit", "submitit"),
        ("planted.py", "def f():\n    import fleetune.train.loop", "fleetune.train"),
        ("runs.py", "from fleetune.cluster import local", "fleetune.cluster"),
        ("recipe.py", "def f():\n    from fleetune import runs", "fleetune.runs"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, found: str) -> None:
    shutil.copytree(ROOT / FLEETUNE, tmp_path / FLEETUNE)
    assert violations(tmp_path) == []
    planted = tmp_path / FLEETUNE / file
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(source)
    assert set(violations(tmp_path)) == {f"{FLEETUNE}/{file} imports {found}"}


def test_a_kernel_that_knows_the_launcher_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "kernels" / "fleetune_kernels" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text("from fleetune_kernels import reference\nfrom fleetune.schema import Recipe\n")
    assert violations(tmp_path) == ["kernels/fleetune_kernels/planted.py imports fleetune"]
