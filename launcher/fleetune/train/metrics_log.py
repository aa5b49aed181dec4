"""RUN/metrics.jsonl: what a run logs, always and completely, whatever becomes of wandb or of the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetune import runs

GENERATED = "eval/generated"  # [[prompt, what the model said], ...]
SHIFT = "eval/shift"  # source and target in the model's features, as a picture
SHIFT_PICTURE = "shift/shift.png"  # its path in the run's folder


class MetricsLog:
    """RUN/metrics.jsonl, one JSON object a line. Rank 0 alone opens it.

    Raises OSError where the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int, evaluated_step: int | None = None) -> None:
        """Opens the file, without what is about to be computed again: the steps after `resume_step`, and its own
        evaluation where the last one in the checkpoint is that of an earlier `evaluated_step`."""
        if path.exists():
            again = evaluated_step is not None and evaluated_step < resume_step
            kept = [
                line
                for line in runs.read_jsonl(path)
                if line["step"] < resume_step
                or (line["step"] == resume_step and not (again and any(key.startswith("eval/") for key in line)))
            ]
            runs.write_text(path, "".join(json.dumps(line) + "\n" for line in kept), sync=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._left = b""  # what a full disk has not taken yet

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line. A step may be written again with other keys; readers merge its lines.

        A float that is not finite becomes null, as JSON has no NaN. What a full disk does not take is written with the
        next line, or by `flush`.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._left += json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Raises OSError where the disk still does not take all."""
        while self._left:
            # One write call, so that a kill leaves a whole line or none.
            self._left = self._left[os.write(self._file, self._left) :]

    def sync(self) -> None:
        """Raises OSError where the disk does not take all, or cannot be synced."""
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        """Raises OSError where the disk did not take all."""
        self.flush()
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns one dictionary a step, its lines merged; torn lines are left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in runs.read_jsonl(path):
        steps.setdefault(line["step"], {}).update(line)
    return list(steps.values())
