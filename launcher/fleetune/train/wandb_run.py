"""A run as wandb has it: opened on the server or in a log of its own under RUN/wandb, given steps, and finished.

The only file that imports wandb. RUN/wandb holds, beside wandb's own logs:

    url.txt     where the server shows the run; there once the server has had it
    fed.json    the last step in wandb's logs here, as they may be removed
    sent.json   the last step that the server has taken for certain, as what it says of a run lags behind

One process at a time sends a run, under sending.lock: the feeder of an attempt that is online, or `fleetune sync`.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import yaml

from fleetune import runs
from fleetune.train.metrics_log import GENERATED, SHIFT, SHIFT_PICTURE

NO_KEY = "no API key"
FLUSH_SECONDS = 1.0  # wandb writes its log this often; it loses what is younger when it is killed


class BeingSent(RuntimeError):
    """Another process is sending this run."""


@dataclass
class WandbRun:
    """An open run of wandb's."""

    run: Path
    of_wandb: Any
    first: int  # the first step that wandb does not have
    refused: threading.Event  # the server takes no more, as for a key that was withdrawn
    lock: IO[str] | None = None  # that of sending; none offline
    last: int = -1  # the last step given

    @property
    def url(self) -> str:
        return str(self.of_wandb.url)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Raises whatever wandb raises."""
        shown = {key: value for key, value in values.items() if not isinstance(value, str | list)}
        if GENERATED in values:
            import wandb

            shown[GENERATED] = wandb.Table(columns=["prompt", "said"], data=values[GENERATED])
        if SHIFT in values:
            shown |= self._picture()
        self.of_wandb.log(shown, step=step, commit=True)
        self.last = step

    def _picture(self) -> dict[str, Any]:
        """Where a person has not removed it."""
        import wandb

        path = self.run / SHIFT_PICTURE
        return {SHIFT: wandb.Image(str(path))} if path.exists() else {}

    def finish(self, exit_code: int) -> bool:
        """Sends what is left, with the report where there is one; whether the server, or the log, has taken it all.

        Raises whatever wandb raises.
        """
        with contextlib.suppress(FileNotFoundError, ValueError):
            report = runs.read_json(self.run / "eval.json")
            # A killed attempt's feeder may have given the last step before its picture was drawn.
            self.of_wandb.summary.update(_flat(report, "eval") | (self._picture() if "shift" in report else {}))
        try:
            self.of_wandb.finish(exit_code=exit_code)
        except TimeoutError:
            self.refused.set()
        if self.lock is not None and self.last >= self.first and not self.refused.is_set():
            runs.write_json(self.run / "wandb" / "sent.json", {"step": self.last})
        self.release()
        return not self.refused.is_set()

    def release(self) -> None:
        """Lets another process send this run, if this one was the one that did."""
        if self.lock is not None:
            self.lock.close()


def open_online(
    run: Path,
    options: dict[str, Any],
    *,
    folder: Path,
    ends: bool,
    finish_timeout: float,
    lock_seconds: float = 30.0,
) -> WandbRun:
    """The run on the server, beside any others that this process has open. wandb's own files go to `folder`.

    `ends` says that its end here is the run's, or an attempt's: else the server shows it as running on.

    Raises:
        BeingSent: another process is sending this run.
        Exception: whatever wandb raises.
    """
    try:
        lock = locked(run / "wandb" / "sending.lock", lock_seconds)
    except TimeoutError:
        raise BeingSent("another process is sending this run") from None
    refused = threading.Event()
    try:
        online = _init(run, options, "online", folder, refused, finish_timeout, x_update_finish_state=ends)
    except BaseException:
        lock.close()
        raise
    runs.write_text(run / "wandb" / "url.txt", str(online.url))
    mark_sent(run)
    first = online.starting_step
    if online.resumed:  # of a run that the server does not know, nothing was sent, whatever stands here
        first = max(first, _noted(run, "sent") + 1)
    return WandbRun(run, online, first, refused, lock)


def open_offline(run: Path, options: dict[str, Any], finish_timeout: float) -> WandbRun:
    """The run in a log of its own. Raises whatever wandb raises."""
    refused = threading.Event()
    offline = _init(run, options, "offline", run, refused, finish_timeout)
    first = fed_step(run) + 1
    if runs.wandb_url(runs.Run(run)) is not None:  # of such a run wandb's own `sync` would send steps again
        mark_sent(run)
    return WandbRun(run, offline, first, refused)


def close_all(at_once: bool = False) -> None:
    """Whatever wandb has open in this process, and its service; `at_once` without sending what is left.

    A run that is broken stays with the service, which then refuses to open it again.
    """
    import wandb

    for child in psutil.Process().children() if at_once else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("wandb"):
                child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it exits with its service's code
        wandb.teardown()


def _init(
    run: Path,
    options: dict[str, Any],
    mode: Literal["online", "offline"],
    folder: Path,
    refused: threading.Event,
    finish_timeout: float,
    **more: Any,
) -> Any:
    import wandb

    with contextlib.suppress(ImportError, AttributeError):
        # Reports of how wandb is used, and nobody asked for them. Where the server is silent they take 10 s to give up.
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()

    def refuse() -> None:  # no bound method: wandb copies its settings deeply, and an event's lock cannot be copied
        refused.set()

    settings = _settings(options["init_timeout"], finish_timeout, refuse, **more)
    config = yaml.safe_load(Path(options["config_path"]).read_text(encoding="utf-8"))
    return wandb.init(
        **options["init"],
        mode=mode,
        dir=folder,
        resume="allow",
        reinit="create_new",
        config=config,
        settings=settings,
    )


def _settings(init_timeout: float, finish_timeout: float, refused: Callable[[], None], **more: Any) -> Any:
    import wandb

    chosen = {
        **more,
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


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= _flat(value, f"{prefix}/{key}") if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return pairs


# --- What keeps us from the server ---


def obstacle(timeout: float) -> str | None:
    """What keeps us from the server: no key, or no answer; None if nothing does."""
    return key_problem() or server_problem(timeout)


def key_problem() -> str | None:
    """Why there is no key to send with; None where there is one. Nothing is sent."""
    from wandb.errors import AuthenticationError

    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        url = wandb_setup.singleton().settings.base_url
        if wbauth.authenticate_session(host=url, source="fleetune", prompt=False, update_session=False) is None:
            return NO_KEY
    except AuthenticationError as error:
        return str(error)
    except (ImportError, AttributeError, TypeError):
        pass  # these are wandb's internals, and move; its init will find out
    return None


def server_problem(timeout: float) -> str | None:
    """Why the server does not answer; None where it does. Nothing is sent but a GET."""
    try:
        from wandb.sdk import wandb_setup

        url = wandb_setup.singleton().settings.base_url
    except (ImportError, AttributeError):
        return None  # as above
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


def will_last(error: Exception) -> bool:
    """Whether it would come again however often one tries: a key that the server does not take, a wrong use."""
    from wandb.errors import AuthenticationError, UsageError

    return isinstance(error, AuthenticationError | UsageError)


# --- What stands in RUN/wandb ---


def wandb_logs(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/*run-*/run-*.wandb"))


def mark_sent(run: Path) -> None:
    """As `wandb sync` does with a log that it has sent, and then passes over."""
    for log in wandb_logs(run):
        with contextlib.suppress(FileNotFoundError):  # removed since
            log.with_suffix(".wandb.synced").touch()


def remove_logs(run: Path, but: list[Path]) -> None:
    """An empty log would be sent with the others."""
    for log in set(wandb_logs(run)) - set(but):
        shutil.rmtree(log.parent, ignore_errors=True)


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
    return max([_noted(run, "fed"), *(step for log in wandb_logs(run) for step in logged_steps(log))])


def _noted(run: Path, name: Literal["fed", "sent"]) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(runs.read_json(run / "wandb" / f"{name}.json")["step"])
    return -1


def locked(path: Path, seconds: float) -> IO[str]:
    """The open file that holds the lock, as long as it is open. Raises TimeoutError."""
    file, give_up = path.open("w", encoding="utf-8"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= give_up:
                file.close()
                raise TimeoutError(f"{path}: another process has held this lock for {seconds:g} s") from None
            time.sleep(0.1)
        except OSError:
            return file  # a file system without locks
