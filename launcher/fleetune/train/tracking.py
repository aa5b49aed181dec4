"""What a run logs: RUN/metrics.jsonl, always and completely, and Weights & Biases beside it.

Rank 0 appends to metrics.jsonl (`metrics_log.py`) and knows nothing of wandb. A process of its own, the feeder,
follows that file and logs each step to wandb once. Training never imports wandb, never waits for it, and may kill the
feeder at any moment:

    log = MetricsLog(run / "metrics.jsonl", resume_step)      # first: the feeder follows the file this opens
    feeder = start_feeder(run, project="fleetune", run_id="...", mode="auto", ...)
    log.write(10, {"train/loss": 0.5})
    status(run)                                               # a line for the user, once there is one
    line = stop_feeder(feeder, run)                           # after eval.json is written

Where the feeder goes on after an interruption, on whatever node, is asked of whoever holds the steps. Online that is
the server: it is given everything after the last step that it has. Offline it is the logs in RUN/wandb, read back;
`wandb sync` appends logs to each other and renumbers a step it has seen before, so a step must stand in one of them
alone.

`wandb sync` appends a log to what the server has, too, from the log's first step on. Of a run that was once online the
server has some steps, and only the server knows which: such a run's logs are marked as sent, so that `wandb sync`
passes over them. `fleetune sync RUN` (`sending.py`) asks the server first, and does for every run.

One feeder for all nodes: wandb's shared mode, in which several machines write to one run, numbers the steps by itself
and knows no resuming at a step (0.31), and the server has lost rows where a writer joined late (wandb #12269). What the
nodes do is logged with the steps instead (`node_load.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fleetune import runs
from fleetune.train.metrics_reader import MetricsReader
from fleetune.train.wandb_run import (
    FLUSH_SECONDS,
    WandbRun,
    close_all,
    locked,
    obstacle,
    open_offline,
    open_online,
    remove_logs,
    wandb_logs,
)

Mode = Literal["auto", "online", "offline", "disabled"]

FINISH_SECONDS = 5.0  # for the last upload; `stop_feeder` waits a little longer than this
LOCK_SECONDS = 120.0  # for the feeder of a killed attempt; a dead node's lock is taken from it after 90 on NFS


# --- Training's side of the feeder ---


def start_feeder(
    run: Path,
    *,
    run_id: str,
    project: str | None,
    entity: str | None,
    mode: Mode,
    name: str | None,
    tags: Sequence[str],
    config_path: Path,
    log_path: Path,
    init_timeout: float = 15.0,
) -> subprocess.Popen[bytes] | None:
    """Starts the feeder; None if the mode is "disabled", or, with a line on stderr, if it cannot be started.

    "auto" and "online" end up offline where the server cannot be used, and `status` says why. "auto" looks before it
    tries, which is sooner done, and obeys WANDB_MODE.
    """
    asked = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    if asked == "disabled":
        return None
    init = {"id": run_id, "project": project, "entity": entity, "name": name, "tags": list(tags)}
    options = {"mode": asked, "config_path": str(config_path), "init_timeout": init_timeout, "init": init}
    command = [sys.executable, "-m", "fleetune.train.tracking", str(run), json.dumps(options)]
    # The feeder runs this very code, the snapshot's or the checkout's. WANDB_SERVICE would tie it to a wandb of ours.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"WANDB_ERROR_REPORTING": "false", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("WANDB_SERVICE", None)
    try:
        (run / "wandb").mkdir(exist_ok=True)
        (run / "wandb" / "status.txt").unlink(missing_ok=True)
        runs.write_json(run / "wandb" / "feeder.json", options)  # for `fleetune sync`
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            # In a session of its own: a Ctrl-C or the kill of our group must not take it before it has flushed.
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                bufsize=0,
                start_new_session=True,
            )
    except OSError as error:
        print(f"wandb: not started ({error})", file=sys.stderr, flush=True)
        return None


def status(run: Path) -> str | None:
    """Returns the feeder's line for the user, once there is one."""
    with contextlib.suppress(OSError):
        return (run / "wandb" / "status.txt").read_text(encoding="utf-8")
    return None


def stop_feeder(process: subprocess.Popen[bytes], run: Path, timeout: float = 8.0, finished: bool = True) -> str | None:
    """Lets the feeder finish the run, or this attempt of it, and kills it after `timeout` seconds.

    Returns the last line for the user, if any.
    """
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        # A word and not the end of the file alone: data loader workers forked from us hold the pipe open too.
        process.stdin.write(b"finish" if finished else b"stop")
        process.stdin.close()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # wandb's own service ends with its parent
        process.wait()
    line = status(run)
    if process.returncode < 0 and "send it later" not in (line or ""):
        return f"wandb: stopped before all was sent; {send_later(run)}"
    return line


def send_later(run: Path) -> str:
    return f"send it later with: fleetune sync {shlex.quote(str(run))}"


# --- The feeder's side ---


def set_status(run: Path, line: str) -> None:
    runs.write_text(run / "wandb" / "status.txt", line)


def open_run(run: Path, options: dict[str, Any]) -> tuple[WandbRun, str]:
    """wandb's run, online if that can be, and the line for the user. Raises whatever wandb raises."""
    reason = "as chosen" if options["mode"] == "offline" else None
    if options["mode"] == "auto":
        reason = obstacle(min(4.0, options["init_timeout"]))
    if reason is None:
        logs = wandb_logs(run)
        try:
            online = open_online(run, options, folder=run, ends=True, finish_timeout=FINISH_SECONDS)
            return online, f"wandb: {online.url}"
        except Exception as error:
            traceback.print_exc()
            close_all()
            remove_logs(run, but=logs)
            reason = str(error).partition("\n")[0]
    return open_offline(run, options, FINISH_SECONDS), f"wandb: offline ({reason}); {send_later(run)}"


def feed(run: Path, options: dict[str, Any], ended: Callable[[], bool], last_word: bytearray) -> bool:
    """Gives wandb every step that it does not have yet, until training ends; whether it took them all.

    At the end of an attempt that goes on later, the last step is left to the next one, which may add to it. Raises
    whatever wandb raises.
    """
    wandb_run, line = open_run(run, options)
    set_status(run, line)
    reader = MetricsReader(run / "metrics.jsonl", after=wandb_run.first - 1)
    settled, settled_at, last = reader.given, time.monotonic(), False
    try:
        while not last:
            last = ended()  # asked before the read, so that nothing written before the end is missed
            for step, values in reader.steps(last and bytes(last_word) != b"stop"):
                wandb_run.log(step, values)
                # fed.json must not run ahead of wandb's log on disk: it gets what was fed a few flushes ago.
                if time.monotonic() - settled_at > 5 * FLUSH_SECONDS:
                    runs.write_json(run / "wandb" / "fed.json", {"step": settled})
                    settled, settled_at = step, time.monotonic()
        done = wandb_run.finish(0 if bytes(last_word) == b"finish" else 1)
    finally:
        wandb_run.release()
    runs.write_json(run / "wandb" / "fed.json", {"step": reader.given})
    if not done:
        set_status(run, f"{line}; not everything was sent, {send_later(run)}")
    return done


def main() -> None:
    run, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Training's own signals: a cluster sends them to every process of the job. The feeder ends with its parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent, last_word = os.getppid(), bytearray()

    def ended() -> bool:
        if not last_word and select.select([0], [], [], 0.5)[0]:
            last_word.extend(os.read(0, 16))
            return True
        return bool(last_word) or os.getppid() != parent

    try:
        with locked(run / "wandb" / "feeder.lock", LOCK_SECONDS):
            # Twice, because a SIGTERM to all ends wandb's service: what that had not written, the second one is given.
            try:
                done = feed(run, options, ended, last_word)
            except Exception:
                traceback.print_exc()
                close_all()
                done = feed(run, options, ended, last_word)
            if not done:
                os._exit(0)  # wandb's own end would wait for the server again
    except Exception:
        set_status(run, f"wandb: stopped by an error; {run / 'metrics.jsonl'} has it all")
        raise


if __name__ == "__main__":
    main()
