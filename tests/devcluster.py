"""The development cluster as the tests use it: its own commands and Slurm's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
COMMAND = Path(__file__).parents[1] / "slurm" / "devcluster"


def devcluster(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one of its commands, with the standard library alone; says nothing of how it ended."""
    command, *rest = arguments
    return subprocess.run(
        [sys.executable, "-S", str(COMMAND), command, "--folder", str(folder), *rest],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


def eventually(look: Callable[[], T], seconds: float, meanwhile: Callable[[], object] = lambda: None) -> T:
    """What it sees as soon as that is true, or at the end."""
    end = time.monotonic() + seconds
    while not (seen := look()) and time.monotonic() < end:
        meanwhile()
        time.sleep(0.2)
    return seen


@dataclass(frozen=True)
class DevCluster:
    folder: Path

    def __call__(self, *arguments: str) -> str:
        """The output of one of its commands, which must succeed."""
        result = devcluster(self.folder, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that submits to this cluster."""
        of_another = {name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        kept = {name: value for name, value in os.environ.items() if name not in of_another}
        return {**kept, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def slurm(self, *command: str, timeout: float = 60) -> str:
        """The output of one of Slurm's commands, which must succeed."""
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def submit(self, script: str, *options: str) -> str:
        """The job's id; the script is bash, and what it prints goes nowhere unless an option says where."""
        return self.slurm("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job that it has not forgotten yet: JobState, Restarts, NodeList, ..."""
        fields = self.slurm("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def node_states(self) -> dict[str, str]:
        return dict(line.split() for line in self.slurm("sinfo", "-hNo", "%N %T").splitlines())
