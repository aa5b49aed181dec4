"""A stand-in for Weights & Biases on loopback, and addresses on which nobody answers, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import gzip
import json
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "a" * 40  # of the form of an API key


class Server(ThreadingHTTPServer):
    """As much of Weights & Biases as runs need: it keeps the history that it is sent of each, by the run's id.

    A row stands at its offset, as in wandb's file stream: what is sent to the same offset again takes its place.
    With `answering` cleared it takes connections and requests, never answers them, and keeps nothing: a black hole.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}  # of the runs that were ended
        self.answering = threading.Event()
        self.answering.set()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Of the one run that there is."""
        return next(iter(self.histories.values()), [])

    @property
    def summary(self) -> dict[str, Any]:
        return next(iter(self.summaries.values()), {})

    def steps(self, run: str | None = None) -> list[int]:
        return [row["_step"] for row in (self.history if run is None else self.histories.get(run, []))]

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = str(variables.get("name"))
        history, names = self.histories.get(run, []), {"id": "b", "name": run, "displayName": run}
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        if operation == "UpsertBucket":
            bucket = names | {"project": project, "historyLineCount": len(history)}
            return {"upsertBucket": {"inserted": not history, "bucket": bucket}}
        if operation == "RunResumeStatus":
            counts = {f"{kind}LineCount": len(history) for kind in ("log", "history", "events")}
            texts = (
                {
                    "summaryMetrics": json.dumps(self.summaries.get(run, {})),
                    "historyTail": json.dumps([json.dumps(history[-1])]),
                    "eventsTail": "[]",
                    "config": "{}",
                    "wandbConfig": '{"t": 1}',
                    "tags": [],
                }
                if history
                else {}
            )
            return {"model": project | {"bucket": names | counts | texts if history else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def take(self, run: str, sent: dict[str, Any]) -> None:
        for name, part in sent.get("files", {}).items():
            rows = [json.loads(row) for row in part["content"]]
            if name == "wandb-history.jsonl":
                history = self.histories.setdefault(run, [])
                history[part["offset"] : part["offset"] + len(rows)] = rows
            if name == "wandb-summary.json":
                self.summaries[run] = rows[-1]
        if sent.get("complete"):
            self.exit_codes[run] = sent["exitcode"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.answering.is_set():
            self.server.answering.wait()
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            reply = {"data": self.server.graphql(request.get("operationName"), request["variables"])}
        elif self.path.endswith("/file_stream"):
            self.server.take(self.path.split("/")[-2], json.loads(body))
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.answering.set()
            server.shutdown()


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """An address that refuses: a port that is taken, so that nobody else listens on it, and that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address on which connects never complete: a socket that accepts none, with its backlog full.

    Linux then drops what asks for a connection, as a firewall does that says nothing.
    """
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        yield f"http://127.0.0.1:{hole.getsockname()[1]}"


def wandb_environment(url: str, home: Path) -> dict[str, str]:
    """Variables for a run that knows this server alone, and sends every second instead of every 15."""
    return {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "WANDB_CONFIG_DIR": str(home),
        "WANDB_CACHE_DIR": str(home),
        "WANDB_DATA_DIR": str(home),
        "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def without_wandb(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what this user has set for wandb, and without proxies: they must not decide what is tried here."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith("WANDB_") and not name.lower().endswith("_proxy")
    }


def sync(run: Path, environment: Mapping[str, str] | None = None) -> str:
    """`wandb sync`, as the feeder's line has it of a run that was never online; returns what wandb says to it."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(run / "wandb")]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stderr


def send_as_told(output: str, environment: Mapping[str, str]) -> str | None:
    """Does what the last "send it later with: ..." of a run's output tells; returns the command, None for none."""
    _, found, rest = output.rpartition("send it later with: ")
    if not found:
        return None
    told = rest.splitlines()[0]
    program, *arguments = shlex.split(told)
    assert program == "fleetune"
    subprocess.run([sys.executable, "-m", "fleetune.cli", *arguments], check=True, capture_output=True, env=environment)
    return told
