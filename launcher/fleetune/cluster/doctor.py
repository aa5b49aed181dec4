"""`fleetune doctor`: what this machine has, and what is not as it should be. Nothing is changed; no torch here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
from packaging.requirements import Requirement

from fleetune import runs
from fleetune.cluster.doctor_slurm import Row, slurm_rows
from fleetune.cluster.file_systems import existing, is_network, kind_of
from fleetune.cluster.preflight import hub_cache
from fleetune.cluster.profile import Profile

_Answer = TypeVar("_Answer")
PROGRAM_SECONDS = 7.0  # for one that imports torch or wandb
ANSWER_SECONDS = 3.0
LEAST_GIGABYTES, FEW_GIGABYTES = 1.0, 10.0


def examine(profile: Profile | None = None, file: Path | None = None) -> list[Row]:
    """Everything, in less than 10 seconds; `file` is the profile's."""
    parts: list[Callable[[], Iterable[Row]]] = [
        lambda: [_python(), *_packages()],
        lambda: _devices(_ask("torch"), _nvidia_smi()),
        lambda: [_memory(), *_disks()],
        lambda: _caches(profile),
        lambda: [_hub()],
        lambda: [_wandb()],
        lambda: slurm_rows(profile, file),
    ]
    with ThreadPoolExecutor(len(parts)) as threads:
        return [row for rows in threads.map(lambda part: list(part()), parts) for row in rows]


# ---------------------------------------------------------------- Python and its packages


def _python() -> Row:
    return Row("Python", f"{platform.python_version()} at {sys.executable}")


def _packages() -> list[Row]:
    """A line for each that is missing or of a version that Fleetune was not made for, and one for the others."""
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires("fleetune") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Row("packages", _listed(runs.versions())), Row("fleetune", "is not installed; runs from its sources")]
    rows, good = [], {}
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        todo = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(requirement.name, "is not installed", "problem", todo))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good[requirement.name] = version
        else:
            rows.append(Row(requirement.name, f"{version}; needed: {requirement.specifier}", "problem", todo))
    return [Row("packages", _listed(good)), *rows]


def _listed(versions: dict[str, str]) -> str:
    shown = [f"{name} {versions[name]}" for name in (*runs.PACKAGES, "triton", "submitit") if name in versions]
    return ", ".join(shown)


# ---------------------------------------------------------------- GPUs, memory


def _ask(what: str) -> dict[str, Any]:
    """What `fleetune.train.machine` finds, in a process of its own; `failed` says why it does not."""
    command = [sys.executable, "-m", "fleetune.train.machine", what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
        return (
            dict(json.loads(done.stdout)) if not done.returncode else {"failed": done.stderr.strip().splitlines()[-1]}
        )
    except subprocess.TimeoutExpired:
        return {"slow": True, "failed": f"is not imported in {PROGRAM_SECONDS:.0f} s"}
    except (OSError, ValueError, IndexError) as error:
        return {"failed": str(error)}


def _nvidia_smi() -> list[str]:
    """A line for each GPU that the driver sees: name, memory, driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _devices(torch: dict[str, Any], driver: list[str]) -> list[Row]:
    seen = f"nvidia-smi: {len(driver)} x {driver[0]}" if driver else "none that nvidia-smi shows"
    if "failed" in torch:
        slow = "slow" in torch
        todo = "this machine is busy, or the file system that it stands on" if slow else "install torch anew"
        return [Row("torch", torch["failed"], "warning" if slow else "problem", todo), Row("GPUs", seen)]
    row = Row("torch", f"{torch['version']}, built for {torch['built_for']}")
    if driver and not torch["gpus"] and os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1"):
        why = torch["said"] or f"a torch that is built for {torch['built_for']} does not see them"
        gpus = Row("GPUs", f"{seen}; {why}", "problem", "install the torch that fits the driver")
    elif torch["gpus"]:
        gpus = Row("GPUs", f"{len(torch['gpus'])} for torch: {torch['gpus'][0]}; {seen}")
    else:
        gpus = Row("GPUs", f"{seen}; training runs on the CPU here")
    of = "the GPUs" if torch["gpus"] else "the CPU"
    if torch["bf16"]:
        return [row, gpus, Row("bf16", f"{of} can")]
    todo = "use fp16" if torch["gpus"] else ""
    return [row, gpus, Row("bf16", f"{of} cannot: fp32 is taken in its place", "warning" if todo else "ok", todo)]


def _memory() -> Row:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        total = int(text)  # a container's, or a job's
        used = Path("/sys/fs/cgroup/memory.current")
        free = min(free, total - int(used.read_text()) if used.exists() else total)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free; {cores} CPUs"
    if free < 2e9:
        return Row("memory", found, "warning", "a rank with a small model takes some 2 GB")
    return Row("memory", found)


# ---------------------------------------------------------------- disks and caches


def _disks() -> list[Row]:
    environment = dict(os.environ)
    home = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    tokens = Path(environment.get("FLEETUNE_CACHE") or home / "fleetune")
    places = {"working folder": Path.cwd(), "hub's cache": hub_cache(environment), "cache of tokens": tokens}
    return [_in_time(lambda: _disk(what, place), _silent(what, place)) for what, place in places.items()]  # noqa: B023


def _silent(what: str, place: Path) -> Row:
    found = f"{place}: its file system does not answer in {ANSWER_SECONDS:.0f} s"
    return Row(what, found, "problem", "it may be a server that is gone; ask who keeps it, or choose another folder")


def _disk(what: str, place: Path) -> Row:
    there = existing(place.absolute())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free on {kind_of(there) or 'its disk'}, {place}"
    if not os.access(there, os.W_OK | os.X_OK):
        return Row(what, f"{found}; {there} is not yours to write to", "problem", "choose another folder")
    if free < FEW_GIGABYTES:
        few = "models and checkpoints need room"
        return Row(what, found, "problem" if free < LEAST_GIGABYTES else "warning", few)
    return Row(what, found)


def _caches(profile: Profile | None) -> list[Row]:
    """What is compiled once and read by every rank: on a network file system ranks wait for each other, or hang."""
    environment = os.environ | (profile.environment if profile is not None else {})
    home = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    places = {
        "TRITON_CACHE_DIR": Path(environment.get("TRITON_HOME") or "~").expanduser() / ".triton" / "cache",
        "TORCH_EXTENSIONS_DIR": home / "torch_extensions",
    }
    if profile is not None and profile.cache_dir:
        return [Row("compiled code", f"in {profile.cache_dir} on each node, as the profile says")]
    rows = []
    for variable, usual in places.items():
        place = Path(environment.get(variable) or usual)
        what = "Triton's cache" if variable.startswith("TRITON") else "torch's extensions"
        rows.append(_in_time(lambda: _cache(what, variable, place), _silent(what, place)))  # noqa: B023
    return rows


def _cache(what: str, variable: str, place: Path) -> Row:
    kind = kind_of(place)
    if is_network(kind):
        todo = f"set cache_dir in the cluster's profile; here: {variable}, a folder of yours on a local disk"
        return Row(what, f"{place} is on {kind}: ranks may hang there", "warning", todo)
    return Row(what, f"{place} on {kind or 'a disk'}")


def _in_time(ask: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
    """What it answers, or `otherwise`: a name server, or a file system, that is gone holds a thread for ever."""
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor's would be waited for at the end
    try:
        return answer.result(ANSWER_SECONDS)
    except TimeoutError:
        return otherwise


# ---------------------------------------------------------------- the hub, wandb


def _hub() -> Row:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Row("Hugging Face hub", "off line, as HF_HUB_OFFLINE says: what is in its cache is used")
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "token"
    has_token = bool(os.environ.get("HF_TOKEN")) or token.exists()
    url = re.sub(r"//[^/@]*@", "//", url)  # a name and a password are nobody's business
    if (why := _unanswered(url)) is not None:
        todo = "give local files, or set HF_HUB_OFFLINE=1 to use the cache without waiting"
        return Row("Hugging Face hub", why, "warning", todo)
    return Row("Hugging Face hub", f"{url} answers; {'a' if has_token else 'no'} token, which gated models need")


def _unanswered(url: str) -> str | None:
    """Why there is no answer; None where there is one, whatever it says."""

    def ask() -> str | None:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the user's own endpoint
        try:
            urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()  # noqa: S310
        except urllib.error.HTTPError as error:  # a proxy answers for a server that it cannot, or will not, reach
            return f"{url} answers {error.code}" if error.code in (407, 502, 503, 504) else None
        except Exception as error:
            return f"cannot reach {url}: {getattr(error, 'reason', error)}"
        return None

    silent: str | None = f"no answer from {url} in {ANSWER_SECONDS:.0f} s"
    return _in_time(ask, silent)


def _wandb() -> Row:
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Row("wandb", f"{mode}, as WANDB_MODE says")
    found = _ask("wandb")
    todo = "runs stay off line; `fleetune sync RUN` sends them later"
    if "failed" in found:
        return Row("wandb", found["failed"], "warning", todo)
    if found["obstacle"] == "no API key":
        return Row("wandb", "no API key", "warning", f"wandb login, or set WANDB_API_KEY; until then {todo}")
    if found["obstacle"] is not None:
        return Row("wandb", found["obstacle"], "warning", todo)
    return Row("wandb", "there is a key, and the server answers")
