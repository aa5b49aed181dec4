"""What sbatch is asked for a run, and the lines of shell around its srun. All but the profile's `setup` is quoted."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.cluster.profile import Profile, minutes_of


def job_name(run: runs.Run, token: str) -> str:
    return f"{run.path.name}-{token}"


def parameters(run: runs.Run, profile: Profile, token: str, code: Path, before: str | None) -> dict[str, Any]:
    words = {name: getattr(profile, name) for name in ("partition", "account", "qos", "constraint")}
    gpus = profile.gpus_per_node
    more: dict[str, Any] = dict(profile.extra) | {"requeue": True, "chdir": str(run.path)}
    if before:
        more = {"kill-on-invalid-dep": "yes"} | more  # else it waits for ever
    if profile.reservation:
        more["reservation"] = profile.reservation
    if gpus:
        more["gres"] = f"gpu:{profile.gpu_type}:{gpus}" if profile.gpu_type else f"gpu:{gpus}"
    if profile.memory:
        more["mem"] = profile.memory
    words, more = _literally(words), _literally(more)
    return {
        **{name: value for name, value in words.items() if value},
        "job_name": job_name(run, token),
        "comment": f"fleetune:{token}",
        "time": minutes_of(profile.time),
        "nodes": profile.nodes,
        "ntasks_per_node": profile.ranks,
        "cpus_per_task": profile.cpus_per_rank,
        "signal_delay_s": profile.stop_seconds,
        "dependency": f"afterok:{before}" if before else None,
        "additional_parameters": more,
        # One rank's end that is no success ends them all; srun has not passed cpus-per-task on since 22.05.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_rank}", *_container(profile, run)],
        "setup": _setup(run, profile, code),
        # Runs once srun has ended, in whatever way: records it, and requeues where there is more to do.
        "teardown": [f"{_verdict(run)} $?"],
    }


def _literally(options: dict[str, Any]) -> dict[str, Any]:
    """sbatch takes a backslash in an #SBATCH line for the sign that quotes the next letter, in quotes too."""
    return {name: v.replace("\\", "\\\\") if isinstance(v, str) else v for name, v in options.items()}


def _setup(run: runs.Run, profile: Profile, code: Path) -> list[str]:
    variables = {"PYTHONUNBUFFERED": "1", **profile.environment}
    if profile.cache_dir:
        own = f"{profile.cache_dir}/fleetune-{os.getuid()}"  # made, closed to others, by each node's tasks
        variables |= {
            "FLEETUNE_COMPILED": own,
            "TRITON_CACHE_DIR": f"{own}/triton",
            "TORCH_EXTENSIONS_DIR": f"{own}/torch_extensions",
        }
    if not profile.internet:
        variables |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return [
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(_watched(profile.setup, run) if profile.setup else ()),
    ]


def _watched(lines: list[str], run: runs.Run) -> list[str]:
    """Lines of shell whose first failure, or own `exit`, is the job's end. Not by set -e: what a function such as
    `module` or `conda` tries inside may fail, if the function then does not."""
    return [
        "trap 'exit $?' ERR",
        f"trap {shlex.quote(f'{_verdict(run)} $? setup')} EXIT",
        "trap 'trap - ERR EXIT; exit 143' TERM",  # it is Slurm that ends the job
        *lines,
        "trap - ERR EXIT TERM",
    ]


def _verdict(run: runs.Run) -> str:
    return f"exec {shlex.quote(sys.executable)} -m fleetune.cluster.verdict {shlex.quote(str(run.path))}"


def python_of(profile: Profile, run: runs.Run) -> str:
    if profile.container is not None and profile.container.kind == "apptainer":
        image, mounts = profile.container.image, [str(run.path), *profile.container.mounts]
        words = ["apptainer", "exec", *(("--nv",) if profile.gpus_per_node else ()), "--bind", ",".join(mounts), image]
        return shlex.join([*words, profile.container.python])
    return shlex.quote(profile.container.python if profile.container else sys.executable)


def _container(profile: Profile, run: runs.Run) -> list[str]:
    if profile.container is None or profile.container.kind != "pyxis":
        return []
    mounts = ",".join([f"{run.path}:{run.path}", *profile.container.mounts])
    return [f"--container-image={profile.container.image}", f"--container-mounts={mounts}"]
