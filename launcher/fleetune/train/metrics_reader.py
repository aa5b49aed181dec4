"""Reads RUN/metrics.jsonl while it is written, on this machine or another: each step once, its lines merged.

The file is opened anew each time, because a network file system shows what others have written to who opens the file.
A resumed run cuts it back to its checkpoint: then it is read anew from its start, and the steps that were given before
are passed over. What is computed again is the same, bit for bit on CPUs in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsReader:
    def __init__(self, path: Path, after: int) -> None:
        """`after` is the last step that is not to be given."""
        self.path, self.given = path, after
        self._at, self._last = 0, b""  # where the next line begins, and the line before it
        self._step, self._values = -1, dict[str, Any]()  # the step that may still be added to

    def steps(self, all_of_them: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps that are whole since the last time: a later one has begun, or `all_of_them` says that none will.

        Raises OSError where there is no file.
        """
        for record in self._new_lines():
            step = record.pop("step")
            if step != self._step:
                yield from self._whole()
                self._step, self._values = step, {}
            self._values |= {key: value for key, value in record.items() if value is not None}
        if all_of_them:
            yield from self._whole()

    def _whole(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._step > self.given:
            self.given = self._step
            yield self._step, self._values

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._at - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._at, self._last, self._step = 0, b"", -1
                file.seek(0)
            *lines, _ = file.read().split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                return  # a hole in what another machine is writing: read again the next time
            self._at, self._last = self._at + len(line) + 1, line + b"\n"
            yield record
