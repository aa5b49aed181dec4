"""The code of a run: its sources alone, by their content."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fleetune.cluster import snapshot


def test_the_sources_are_copied_and_nothing_else(tmp_path: Path) -> None:
    found, copy = snapshot.take(tmp_path / "code")
    assert copy == tmp_path / "code" / found
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert {"fleetune/cli.py", "fleetune/train/loop.py", "fleetune_kernels/triton/cross_entropy.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not any("__pycache__" in name for name in names)
    original = importlib.util.find_spec("fleetune.cli")
    assert original is not None
    assert (copy / "fleetune/cli.py").read_bytes() == Path(str(original.origin)).read_bytes()


def test_the_same_sources_are_copied_once(tmp_path: Path) -> None:
    first, copy = snapshot.take(tmp_path / "code")
    before = (copy / "fleetune" / "cli.py").stat().st_mtime_ns
    assert snapshot.take(tmp_path / "code") == (first, copy)
    assert (copy / "fleetune" / "cli.py").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "code").iterdir()] == [first]


def test_an_edit_is_another_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, copy = snapshot.take(tmp_path / "code")
    sources = snapshot._sources
    edited = tmp_path / "cli.py"
    edited.write_text("# edited\n", encoding="utf-8")
    monkeypatch.setattr(
        snapshot, "_sources", lambda package: sources(package) | ({"cli.py": edited} if package == "fleetune" else {})
    )
    second, other = snapshot.take(tmp_path / "code")
    assert second != first
    assert (other / "fleetune" / "cli.py").read_text(encoding="utf-8") == "# edited\n"
    assert (copy / "fleetune" / "cli.py").read_text(encoding="utf-8") != "# edited\n"
