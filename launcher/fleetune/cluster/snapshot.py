"""The code of a run as it stands when the run is sent: what is edited afterwards changes nothing.

The sources of `fleetune` and `fleetune_kernels`, uncommitted changes too, and nothing else of the user's folders.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

PACKAGES = ("fleetune", "fleetune_kernels")


def take(folder: Path) -> tuple[str, Path]:
    """Copies the sources to FOLDER/HASH, unless they are there. Returns the hash of their content and the copy."""
    files = {f"{package}/{name}": path for package in PACKAGES for name, path in _sources(package).items()}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    found = digest.hexdigest()[:16]
    copy = folder / found
    if not copy.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for name, path in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
        try:
            beside.rename(copy)
        except OSError:  # another was faster
            shutil.rmtree(beside)
    return found, copy


def _sources(package: str) -> dict[str, Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    return {str(path.relative_to(root)): path for path in root.rglob("*.py")}
