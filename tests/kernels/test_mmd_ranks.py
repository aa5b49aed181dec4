"""MMD and its kin over several ranks: `mmd_ranks.py` run as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ranks_with_unequal_rows_give_what_one_process_gives() -> None:
    roots = [str(ROOT / "kernels"), str(ROOT / "launcher")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(roots),
    }
    program = ROOT / "tests" / "kernels" / "mmd_ranks.py"
    ran = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-4000:]
