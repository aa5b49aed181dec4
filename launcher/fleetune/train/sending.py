"""Gives the server what it lacks of runs, after they have ended or while nodes that cannot reach it write them.

The program behind `fleetune sync`, which knows which runs are over and tells so: RUN/metrics.jsonl is read and nothing
on the nodes is asked. Where to go on is the server's to say, each time that a run is opened on it, and every step after
that is given once (`metrics_reader.py`): one that is computed again after a resume is passed over, as it is the same.
With `watch` a run stays open on the server as long as it goes on; whatever fails is done again, from what the server
has, after a pause that grows.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.train import wandb_run
from fleetune.train.metrics_reader import MetricsReader
from fleetune.train.wandb_run import BeingSent, WandbRun

SECONDS = 3.0  # between two looks
LONGEST_PAUSE = 300.0
FINISH_SECONDS = {True: 60.0, False: 600.0}  # for the upload of what is left: watching, it is tried again


class NotSent(Exception):
    """Nothing to do about it for now; carries why."""


@dataclass
class _Sender:
    """One run on its way to the server."""

    run: Path
    over: bool
    files: Path  # for what wandb writes beside
    opened: WandbRun | None = None
    reader: MetricsReader | None = None
    told: str = ""  # the run's address, once it was said
    trouble: str = ""  # why the last turn came to nothing
    pause: float = 0.0  # after it
    due: float = 0.0  # when the next turn is
    done: bool = False

    def turn(self, watch: bool) -> None:
        """Sends what is new; the rest and the end, where the run is over or nobody watches.

        Raises NotSent, or whatever wandb raises.
        """
        if not (self.run / "metrics.jsonl").exists() or not (self.run / "wandb" / "feeder.json").exists():
            self.done = self.over or not watch
            if self.done:
                say(f"{self.run.name}: nothing to send yet")
            return
        if self.over:
            self.close()  # what follows ends the run on the server, too
        if self.opened is None:
            self._open(watch)
        self._give()
        if self.over or not watch:
            reader = self.reader
            self.close()
            assert reader is not None
            say(f"{self.run.name}: {'all sent' if self.over else 'sent'}, up to step {max(reader.given, 0)}")
            self.done = True

    def _open(self, watch: bool) -> None:
        stored = runs.read_json(self.run / "wandb" / "feeder.json")
        options = {**stored, "config_path": str(self.run / "recipe.yaml")}  # the folder may have moved
        self.opened = wandb_run.open_online(
            self.run,
            options,
            folder=self.files,
            ends=self.over,
            finish_timeout=FINISH_SECONDS[watch],
            lock_seconds=1.0 if watch else 30.0,
        )
        self.reader = MetricsReader(self.run / "metrics.jsonl", after=self.opened.first - 1)
        if self.told != self.opened.url:
            self.told = self.opened.url
            say(f"{self.run.name}: {self.told}")

    def _give(self) -> None:
        assert self.opened is not None
        assert self.reader is not None
        for step, values in self.reader.steps(self.over):
            self.opened.log(step, values)
        if self.opened.refused.is_set():
            raise NotSent("the server takes no more of it")

    def close(self) -> None:
        """Raises NotSent where the server has not taken all."""
        if self.opened is not None:
            opened, self.opened = self.opened, None
            finished = self.over and (self.run / "eval.json").exists()
            if not opened.finish(0 if finished else 1):
                raise NotSent("the server has not taken all of it")

    def drop(self) -> None:
        """Without sending what is left."""
        if self.opened is not None:
            self.opened.release()
            self.opened = None


@dataclass
class _Sending:
    senders: list[_Sender]
    watch: bool
    failures: list[str] = field(default_factory=list)

    def round(self) -> None:
        """A turn for every run that is due."""
        due = [sender for sender in self._left() if sender.due <= time.monotonic()]
        if not due:
            return None
        if (problem := wandb_run.key_problem()) is not None:
            return self._fail(due, problem)
        if (problem := wandb_run.server_problem(4.0)) is not None:
            return self._later(due, problem, "server")
        for sender in due:
            try:
                sender.turn(self.watch)
                sender.trouble, sender.pause = "", 0.0
            except BeingSent as error:
                self._later([sender], f"{sender.run.name}: {error}", str(error))
            except Exception as error:
                traceback.print_exc()
                self._start_over()
                line = f"{sender.run.name}: {error or type(error).__name__}"
                if wandb_run.will_last(error):
                    self._fail([sender], str(error))
                else:
                    self._later([sender], line, line)
        return None

    def _start_over(self) -> None:
        """Nothing stays open: the server is asked what it has when a run is opened again."""
        for sender in self.senders:
            sender.drop()
        wandb_run.close_all(at_once=True)

    def _left(self) -> list[_Sender]:
        return [sender for sender in self.senders if not sender.done]

    @property
    def is_done(self) -> bool:
        return not self._left()

    def _fail(self, senders: list[_Sender], reason: str) -> None:
        if reason == wandb_run.NO_KEY:
            reason += "; wandb login, or set WANDB_API_KEY"
        for sender in senders:
            sender.done = True
            self.failures.append(f"{sender.run}: not sent: {reason}".replace("\n", "\n  "))

    def _later(self, senders: list[_Sender], reason: str, trouble: str) -> None:
        """Says the reason once, as long as the trouble is the same: a server fails in many words."""
        if not self.watch:
            return self._fail(senders, reason)
        if all(sender.trouble != trouble for sender in self.senders):
            say(f"{reason}; trying again until it works")
        for sender in senders:
            sender.trouble, sender.pause = trouble, min(max(2 * sender.pause, 2 * SECONDS), LONGEST_PAUSE)
            sender.due = time.monotonic() + sender.pause
        return None

    def stop(self) -> None:
        """Sends what wandb has been given, where the server answers, and leaves the rest to the next `sync`."""
        if wandb_run.server_problem(4.0) is None:
            for sender in self._left():
                try:
                    sender.close()
                except Exception:
                    traceback.print_exc()


def say(line: str) -> None:
    print(f"wandb: {line}", flush=True)


def told_within(seconds: float) -> Iterator[str]:
    """The runs that `fleetune sync` says are over, as lines on stdin, within this time. Raises EOFError at its end."""
    end, rest = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0 or rest:
        if select.select([0], [], [], max(left, 0.1))[0]:
            if not (read := os.read(0, 65536)):
                raise EOFError
            *lines, rest = (rest + read).split(b"\n")
            yield from (line.decode() for line in lines)


def main() -> None:
    """`python -m fleetune.train.sending FILE` of `{"watch": ..., "runs": {PATH: is it over}}`; ends when stdin does."""
    asked: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fleetune-sync-") as files:
        senders = {path: _Sender(Path(path), over, Path(files)) for path, over in asked["runs"].items()}
        sending = _Sending(list(senders.values()), asked["watch"])
        try:
            while True:
                sending.round()
                if sending.is_done:
                    break
                for path in told_within(SECONDS):
                    senders[path].over = True
        except EOFError:
            sending.stop()
    if sending.failures:
        print("fleetune: error: " + "\n".join(sending.failures), file=sys.stderr, flush=True)
    sys.stderr.flush()
    os._exit(runs.FAILED if sending.failures else runs.DONE if sending.is_done else runs.SAVED)


if __name__ == "__main__":
    main()
