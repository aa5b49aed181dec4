"""On what a path stands: whether other nodes see it, and whether caches are safe there."""

from __future__ import annotations

import re
from pathlib import Path

OF_ONE_NODE = {"tmpfs", "ramfs", "overlay", "aufs"}
NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "wekafs", "panfs", "pvfs2", "9p"}
NODE_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - looked at, not written to


def kind_of(path: Path) -> str:
    """The kind of file system that a path stands on, or would: ext4, nfs4, tmpfs, ...; "" where that is not known."""
    mounts = Path("/proc/mounts")
    place, best, kind = path.resolve(), "", ""
    for line in mounts.read_text(errors="replace").splitlines() if mounts.exists() else ():
        _, mount, mounted, *_ = line.split()
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)  # a blank is \040
        if place.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, mounted
    return kind


def is_network(kind: str) -> bool:
    return kind in NETWORK or kind.startswith("fuse.")


def why_unshared(path: Path) -> str | None:
    """Why other nodes hardly see this path; None where nothing speaks against it."""
    place, kind = path.resolve(), kind_of(path)
    if (folder := next((folder for folder in NODE_FOLDERS if place.is_relative_to(folder)), None)) is not None:
        return f"stands in {folder}, which mostly is each machine's own"
    return f"stands on {kind}, which is this machine's own" if kind in OF_ONE_NODE else None


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
