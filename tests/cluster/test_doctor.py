"""What `fleetune doctor` says of a machine and its Slurm, and by which exit code."""

from __future__ import annotations

import http.server
import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from devcluster import DevCluster
from typer.testing import CliRunner

from fleetune.cli import app
from fleetune.cluster import doctor, site
from fleetune.cluster.doctor_slurm import Row, slurm_rows
from fleetune.cluster.doctor_slurm import _grace as grace
from fleetune.cluster.doctor_slurm import _of_cluster as of_cluster
from fleetune.cluster.doctor_slurm import _of_partition as of_partition
from fleetune.cluster.file_systems import is_network
from fleetune.cluster.profile import Profile

NO_GPU = {"version": "2.13.0+cpu", "built_for": "CPUs", "gpus": [], "bf16": False, "said": ""}


def fleetune(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "SBATCH_"))}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(folder), **environment}
    command = [sys.executable, "-m", "fleetune.cli", "doctor", *words]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)


def lines(output: str) -> dict[str, str]:
    """The table's lines by their first cell, without the frame."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {first: " | ".join(rest) for first, *rest in cells if first}


def row(rows: list[Row], what: str) -> Row:
    (found,) = [one for one in rows if one.what == what]
    return found


# ---------------------------------------------------------------- the command


def test_a_machine_without_slurm_or_gpus_and_off_line_is_well(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "5ec3e7" * 7 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    began = time.monotonic()
    done = fleetune(
        tmp_path, PATH="/nowhere", HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9", CUDA_VISIBLE_DEVICES=""
    )
    assert time.monotonic() - began < 20  # 10 on a machine that does nothing else
    assert done.returncode == 0, done.stdout + done.stderr
    said = lines(done.stdout)
    assert said["Slurm"].startswith("none here | ok")
    assert said["torch"].startswith(("2.", "is not imported in 7 s"))  # on a busy machine
    assert said["GPUs"].startswith("none that nvidia-smi shows")
    assert said["Hugging Face hub"].startswith("off line")
    assert "| warning" in said["wandb"]  # there is a key, and no server
    assert "no API key" not in said["wandb"]
    assert "5ec3e7" not in done.stdout + done.stderr


def test_a_profile_without_its_cluster_is_a_problem_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.yaml").write_text("time: 4h\n")
    monkeypatch.setattr(doctor, "PROGRAM_SECONDS", 0.1)  # who is slow is not waited for
    for name, value in {"PATH": "/nowhere", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["doctor", "--cluster", str(tmp_path / "p.yaml")])
    assert done.exit_code == 1
    assert "none here | problem | use a login node" in lines(done.stdout)["Slurm"]
    assert lines(done.stdout)["torch"].startswith("is not imported in 0 s | warning")
    assert done.stderr.strip() == "error: Slurm: none here"


def test_a_profile_that_is_none_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("tme: 4h\n")
    done = fleetune(tmp_path, "--cluster", "p.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean `time`?" in done.stderr


# ---------------------------------------------------------------- the machine


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROGRAM_SECONDS", 60.0)  # a busy machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor._ask("torch")
    assert found == NO_GPU | {name: found[name] for name in ("version", "built_for", "bf16", "said")}
    assert found["version"] == importlib.metadata.version("torch")
    rows = doctor._devices(found, [])
    assert [one.what for one in rows] == ["torch", "GPUs", "bf16"]
    assert "training runs on the CPU here" in rows[1].found


def test_packages_are_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["psutil>=6", "rich>=999", "no-such-package>=1", "nothing-either; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: asked)
    rows = doctor._packages()
    assert [(one.what, one.state) for one in rows[1:]] == [("rich", "problem"), ("no-such-package", "problem")]
    assert rows[1].todo == "pip install 'rich>=999'"
    assert rows[1].found.endswith("; needed: >=999")


def test_gpus_that_torch_does_not_see_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.54"] * 8
    found = row(doctor._devices(NO_GPU, driver), "GPUs")
    assert found.state == "problem"
    assert found.found.startswith("nvidia-smi: 8 x NVIDIA H100")
    assert "built for CPUs does not see them" in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as chosen
    assert row(doctor._devices(NO_GPU, driver), "GPUs").state == "ok"


def test_a_torch_that_breaks_is_a_problem_and_a_slow_one_a_warning() -> None:
    assert doctor._devices({"failed": "ImportError: libcudart.so"}, [])[0].state == "problem"
    assert doctor._devices({"failed": "is not imported in 8 s", "slow": True}, [])[0].state == "warning"


def test_gpus_without_bf16_are_told_of_fp16() -> None:
    found = row(doctor._devices(NO_GPU | {"gpus": ["Tesla V100"]}, []), "bf16")
    assert (found.state, found.todo) == ("warning", "use fp16")


def test_network_file_systems_are_known() -> None:
    assert all(is_network(kind) for kind in ("nfs4", "lustre", "gpfs", "beegfs", "fuse.sshfs", "wekafs"))
    assert not any(is_network(kind) for kind in ("ext4", "xfs", "tmpfs", "overlay", ""))


def test_caches_on_a_network_file_system_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(doctor, "kind_of", lambda path: "nfs4")  # none can be mounted here
    found = row(doctor._caches(None), "Triton's cache")
    assert found.state == "warning"
    assert "ranks may hang there" in found.found
    (own,) = doctor._caches(Profile(time="4h", cache_dir="/local/cache"))
    assert own.state == "ok"


def test_a_file_system_that_does_not_answer_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose server is gone: whoever asks it is held, and lets go when the test is over."""
    gone = threading.Event()

    def held(path: Path) -> Path:
        gone.wait(60)
        return path

    for name in ("existing", "kind_of"):
        monkeypatch.setattr(doctor, name, held)
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.2)
    rows = [*doctor._disks(), *doctor._caches(None)]
    gone.set()
    assert {row.state for row in rows} == {"problem"}
    assert all("its file system does not answer" in row.found for row in rows)
    assert len(rows) == 5


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._disk("working folder", tmp_path / "not" / "there").found.endswith("/not/there")
    monkeypatch.setattr(doctor, "FEW_GIGABYTES", 1e9)
    assert doctor._disk("working folder", tmp_path).state == "warning"
    monkeypatch.setattr(doctor, "LEAST_GIGABYTES", 1e9)
    assert doctor._disk("working folder", tmp_path).state == "problem"


class Answering(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("code", "is_there"), [(200, True), (404, True), (401, True), (503, False), (407, False)])
def test_any_answer_is_one_but_a_proxys(code: int, is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "code", code)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        why = doctor._unanswered(f"http://127.0.0.1:{server.server_port}")
    assert (why is None) is is_there


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        why = doctor._unanswered(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert why is not None


# ---------------------------------------------------------------- Slurm


def test_a_cluster_is_described(cluster: DevCluster) -> None:
    rows = list(slurm_rows(None, None))
    assert "cluster devcluster, answers in" in row(rows, "Slurm").found
    assert str(cluster.folder) in row(rows, "Slurm").found
    found = {one.what: one.found for one in rows}
    nodes = "3 nodes of 8 CPUs, 16 GB, 8 GPUs; no time limit"
    assert found["partition main*"] == f"{nodes}; preempted: requeue after 5 s"
    assert found["partition hi"] == f"{nodes}; not preempted"
    assert found["requeueing"] == "by default; KillWait 5 sec"
    assert found["job arrays"] == "of 1001 at most (MaxArraySize)"
    assert found["preemption"].startswith("by partition_prio, REQUEUE")
    assert found["accounting"] == "on; no job is refused for its account or qos"
    assert found["accounts"] == "root (qos normal)"
    assert {one.state for one in rows} == {"ok"}


def test_a_profile_is_held_against_it(cluster: DevCluster, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    cluster.slurm("scontrol", "update", "PartitionName=main", "MaxTime=60", "AllowAccounts=physics")
    rows = list(slurm_rows(Profile(partition="main", time="4h", nodes=9), file))
    faults = [one.found for one in rows if one.state == "problem"]
    assert [fault.partition(": ")[2].partition(":")[0] for fault in faults] == ["time = '4h'", "nodes = 9"]
    assert row(rows, "grace").state == "warning"  # 5 s, where the profile gives a save 120
    assert "gets 5 s to save; stop_seconds = 120" in row(rows, "grace").found
    assert "1h at most" in row(rows, "partition main*").found
    assert "not for you: it is for accounts physics" in row(rows, "partition main*").found
    fits = list(slurm_rows(Profile(partition="hi", time="4h"), file))
    assert row(fits, "profile").found == f"{file} fits the cluster"
    assert "grace" not in {one.what for one in fits}


def test_where_qos_decide_the_grace_is_theirs(cluster: DevCluster) -> None:
    by_qos = replace(site.ask(associations=False), config={"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"})
    profile = Profile(time="4h", qos="normal")
    assert list(grace(profile, by_qos.partitions["main"], by_qos)) == []  # nobody may preempt it
    cluster.slurm("sacctmgr", "--immediate", "add", "qos", "urgent", "preempt=normal")
    try:
        (found,) = grace(profile, by_qos.partitions["main"], by_qos)
    finally:
        cluster.slurm("sacctmgr", "--immediate", "delete", "qos", "urgent")
    assert found.found == "a job of qos normal that is preempted gets 0 s to save; stop_seconds = 120"


def test_variables_that_override_the_profile_are_named(cluster: DevCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "hi")
    assert row(list(slurm_rows(None, None)), "environment").found.startswith("SBATCH_PARTITION is set")


def test_without_accounting_it_says_what_cannot_be_known(cluster: DevCluster) -> None:
    found = site.ask(associations=False)
    off = replace(found, config=found.config | {"AccountingStorageType": "accounting_storage/none"})
    said = row(list(of_cluster(off)), "accounting")
    assert said.state == "warning"
    assert said.found.startswith("off: how a job ended is known for 300 sec")
    assert "accounts" not in {one.what for one in of_cluster(off)}


def test_who_has_no_account_where_one_is_needed_has_a_problem(cluster: DevCluster) -> None:
    found = site.ask(associations=False)
    config = found.config | {"AccountingStorageEnforce": "associations"}
    assert row(list(of_cluster(replace(found, config=config, associations=[]))), "accounts").state == "problem"
    assert (
        "not preempted"
        in of_partition(found.partitions["main"], replace(found, config=config | {"PreemptType": "preempt/none"})).found
    )


def test_commands_without_a_configuration_are_no_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/usr/bin/sbatch").exists() or Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("needs Slurm's commands and no configuration")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    (found,) = slurm_rows(None, None)
    assert (found.state, found.found) == ("ok", "its commands are here, and no configuration")
    (found,) = slurm_rows(Profile(time="4h"), tmp_path / "p.yaml")
    assert found.state == "problem"
