"""What a run logs: RUN/metrics.jsonl, always and completely, and Weights & Biases beside it.

Rank 0 appends to metrics.jsonl (`metrics_log.py`) and knows nothing of wandb. A process of its own, the feeder,
follows that file and logs each step to wandb once. Training never imports wandb, never waits for it, and may kill the
feeder at any moment:

    log = MetricsLog(run / "metrics.jsonl", resume_step)      # first: the feeder follows the file this opens
    feeder = start_feeder(run, project="fleetune", run_id="...", mode="auto", ...)
    log.write(10, {"train/loss": 0.5})
    status(run)                                               # a line for the user, once there is one
    line = stop_feeder(feeder, run)                           # after eval.json is written

Where the feeder goes on after an interruption is asked of whoever holds the steps. Online that is the server: it is
given everything after the last step that it has. Offline it is the logs in RUN/wandb, read back; `wandb sync`
appends logs to each other and renumbers a step it has seen before, so a step must stand in one of them alone.

`wandb sync` appends a log to what the server has, too, from the log's first step on. Of a run that was once online the
server has some steps, and only the server knows which: such a run's logs are marked as sent, so that `wandb sync`
passes over them. `fleetune sync RUN` asks the server first, and does for every run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fleetune import runs

Mode = Literal["auto", "online", "offline", "disabled"]

FLUSH_SECONDS = 1.0  # wandb writes its log this often; it loses what is younger when it is killed
FINISH_SECONDS = 5.0  # for the last upload; `stop_feeder` waits a little longer than this
SEND_SECONDS = 600.0  # for the upload of all that is left, where somebody waits for it


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
        runs.write_json(run / "wandb" / "feeder.json", options)  # for `send`
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


def wandb_logs(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/*run-*/run-*.wandb"))


def was_online(run: Path) -> bool:
    """Whether the server may have steps of this run that wandb's own `sync` would send again."""
    return (run / "wandb" / "online").exists()


# --- The feeder's side ---


def set_status(run: Path, line: str) -> None:
    runs.write_text(run / "wandb" / "status.txt", line)


def mark_sent(run: Path) -> None:
    """As `wandb sync` does with a log that it has sent, and then passes over."""
    for log in wandb_logs(run):
        with contextlib.suppress(FileNotFoundError):  # removed since
            log.with_suffix(".wandb.synced").touch()


def logged_steps(path: Path) -> Iterator[int]:
    """Reads the steps in a wandb log: LevelDB's framing (blocks of 32 KiB) after a header of 7 bytes, no checksums."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a chunk's head is never split; the block's end is padding
            at += left
            continue
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        kind = data[at + 6]  # 1 whole, 2 first, 3 middle, 4 last
        if kind not in (1, 2, 3, 4) or end > len(data):
            return  # the tail, torn by a kill
        record = data[at + 7 : end] if kind in (1, 2) else record + data[at + 7 : end]
        at = end
        if kind in (1, 4):
            try:
                parsed = Record.FromString(record)
            except DecodeError:
                return
            if parsed.HasField("history"):
                yield parsed.history.step.num


def fed_step(run: Path) -> int:
    """Returns the last step in wandb's logs. fed.json stands in for logs that `wandb clean` has removed."""
    noted = -1
    with contextlib.suppress(FileNotFoundError, ValueError):
        noted = runs.read_json(run / "wandb" / "fed.json")["step"]
    return max([noted, *(step for log in wandb_logs(run) for step in logged_steps(log))])


def obstacle(timeout: float) -> str | None:
    """Returns what keeps us from the server: no key, or no answer; None if nothing does. Nothing is sent but a GET."""
    from wandb.errors import AuthenticationError

    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        url = wandb_setup.singleton().settings.base_url
        if wbauth.authenticate_session(host=url, source="fleetune", prompt=False, update_session=False) is None:
            return "no API key"
    except AuthenticationError as error:
        return str(error)
    except (ImportError, AttributeError, TypeError):
        return None  # these are wandb's internals, and move; its init will find out
    reasons = [f"no answer from {url} in {timeout:g} s"]

    def ask() -> None:
        try:
            # urllib knows the proxies that wandb will use. A proxy answers 502 to 504 for a server it cannot reach.
            urllib.request.urlopen(f"{url}/healthz", timeout=timeout).close()  # noqa: S310
        except urllib.error.HTTPError as error:
            reasons.append(f"{url} answers {error.code}" if error.code in (502, 503, 504) else "")
        except Exception as error:
            reason = getattr(error, "reason", error)
            # Certificates are wandb's affair: it has its own list of authorities.
            reasons.append("" if isinstance(reason, ssl.SSLError) else f"cannot reach {url}: {reason}")
        else:
            reasons.append("")

    # A thread, because looking up a name takes no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return reasons[-1] or None


def wandb_settings(init_timeout: float, finish_timeout: float, refused: Callable[[], None]) -> Any:
    import wandb

    chosen = {
        "init_timeout": init_timeout,
        "finish_timeout": finish_timeout,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
        "stop_on_fatal_error": True,
        "stop_fn": refused,
        "silent": True,
        "console": "off",
        "symlink": False,
        "use_dot_wandb": False,
        "allow_val_change": True,
        # What it would collect unasked: code, git, packages, host, hardware, and samples of the machine's load.
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "host": "",
        "program": "",
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_disable_stats": True,
    }
    # Those with an x_ are wandb's to rename.
    return wandb.Settings(**{key: value for key, value in chosen.items() if key in wandb.Settings.model_fields})


def open_run(run: Path, options: dict[str, Any], refused: Callable[[], None]) -> tuple[Any, int, str]:
    """Returns wandb's run, online if that can be, the first step to give it, and the line for the user.

    `refused` is called if the server later takes no more, as for a key that was withdrawn. In the mode "send" nothing
    is done offline: raises whatever wandb raises.
    """
    import wandb

    with contextlib.suppress(ImportError, AttributeError):
        # Reports of how wandb is used, and nobody asked for them. Where the server is silent they take 10 s to give up.
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
    with contextlib.suppress(Exception):
        wandb.teardown()  # what a first try has left
    sends = options["mode"] == "send"
    settings = wandb_settings(options["init_timeout"], SEND_SECONDS if sends else FINISH_SECONDS, refused)
    config = yaml.safe_load(Path(options["config_path"]).read_text(encoding="utf-8"))

    def init(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(**options["init"], mode=mode, dir=run, resume="allow", config=config, settings=settings)

    reason = "as chosen" if options["mode"] == "offline" else None
    if options["mode"] == "auto":
        reason = obstacle(min(4.0, options["init_timeout"]))
    if reason is None:
        logs = wandb_logs(run)
        try:
            online = init("online")
            (run / "wandb" / "online").touch()
            mark_sent(run)
            return online, online.starting_step, f"wandb: {online.url}"
        except Exception as error:
            with contextlib.suppress(Exception):
                wandb.teardown()
            for log in set(wandb_logs(run)) - set(logs):  # or the empty log would be sent with the others
                shutil.rmtree(log.parent, ignore_errors=True)
            if sends:
                raise
            traceback.print_exc()
            reason = str(error).partition("\n")[0]
    offline, first = init("offline"), fed_step(run) + 1
    if was_online(run):
        mark_sent(run)
    return offline, first, f"wandb: offline ({reason}); {send_later(run)}"


def follow(
    path: Path, ended: Callable[[], bool], goes_on: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the steps of metrics.jsonl, each with its lines merged: once a later one begins, or at the end.

    At the end of an attempt that goes on later, the last step is left to the next one, which may add to it.
    """
    step, values, rest, last = -1, dict[str, Any](), b"", False
    with path.open("rb") as file:
        while not last:
            last = ended()  # asked before the read, so that nothing written before the end is missed
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                record = json.loads(line)
                if record["step"] != step and step >= 0:
                    yield step, values
                    values = {}
                step = record.pop("step")
                values |= {key: value for key, value in record.items() if value is not None}
    if step >= 0 and not goes_on():
        yield step, values


def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= flat(value, f"{prefix}/{key}") if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return pairs


def feed(run: Path, options: dict[str, Any], ended: Callable[[], bool], last_word: bytearray) -> bool:
    """Gives wandb every step that it does not have yet, until training ends; whether it took them all.

    Raises whatever wandb raises.
    """
    refused = threading.Event()

    def refuse() -> None:  # no bound method: wandb copies its settings deeply, and an event's lock cannot be copied
        refused.set()

    wandb_run, first, line = open_run(run, options, refuse)
    set_status(run, line)
    fed, settled, settled_at = first - 1, first - 1, time.monotonic()
    for step, values in follow(run / "metrics.jsonl", ended, lambda: bytes(last_word) == b"stop"):
        if step < first:
            continue
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        wandb_run.log(numbers, step=step, commit=True)
        # fed.json must not run ahead of wandb's log on disk: it gets what was fed a few flushes ago.
        if time.monotonic() - settled_at > 5 * FLUSH_SECONDS:
            runs.write_json(run / "wandb" / "fed.json", {"step": settled})
            settled, settled_at = step, time.monotonic()
        fed = step
    with contextlib.suppress(FileNotFoundError, ValueError):
        wandb_run.summary.update(flat(runs.read_json(run / "eval.json"), "eval"))
    try:
        wandb_run.finish(exit_code=0 if bytes(last_word) == b"finish" else 1)
    except TimeoutError:
        refused.set()
    runs.write_json(run / "wandb" / "fed.json", {"step": fed})
    if refused.is_set():
        set_status(run, f"{line}; not everything was sent, {send_later(run)}")
    return not refused.is_set()


def send(run: Path) -> bool:
    """Gives the server what it lacks of a run that is not being trained: `fleetune sync RUN`."""
    stored = runs.read_json(run / "wandb" / "feeder.json")
    options = {**stored, "mode": "send", "config_path": str(run / "recipe.yaml")}  # the folder may have moved
    last_word = bytearray(b"finish" if (run / "eval.json").exists() else b"")
    with (run / "wandb" / "feeder.lock").open("w") as lock:
        wait_for_lock(lock.fileno())
        return feed(run, options, lambda: True, last_word)


def wait_for_lock(file: int, seconds: float = 30.0) -> None:
    """The feeder of a killed attempt may still be finishing. Raises TimeoutError."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return None  # a file system without locks
    raise TimeoutError("another feeder is at work on this run")


def main() -> None:
    run = Path(sys.argv[1])
    if len(sys.argv) == 2:
        try:
            sent = send(run)
        except Exception as error:
            sys.exit(f"wandb: not sent: {error}")
        print(status(run))
        sys.exit(0 if sent else 1)
    options = json.loads(sys.argv[2])
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
        with (run / "wandb" / "feeder.lock").open("w") as lock:
            wait_for_lock(lock.fileno())
            # Twice, because a SIGTERM to all ends wandb's service: what that had not written, the second one is given.
            try:
                done = feed(run, options, ended, last_word)
            except Exception:
                traceback.print_exc()
                done = feed(run, options, ended, last_word)
            if not done:
                os._exit(0)  # wandb's own end would wait for the server again
    except Exception:
        set_status(run, f"wandb: stopped by an error; {run / 'metrics.jsonl'} has it all")
        raise


if __name__ == "__main__":
    main()
