"""The development cluster: it does what a Slurm cluster does, fails as one fails, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from devcluster import COMMAND, DevCluster, eventually
from devcluster import devcluster as run

# Rank 0 listens under its node's name, as MASTER_ADDR is; the others say theirs to it.
MEET = """
import os, socket, subprocess, time
nodes = subprocess.check_output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True).split()
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server((nodes[0], 29500)) as server:
        for _ in range(int(os.environ["SLURM_NTASKS"]) - 1):
            connection, (address, _) = server.accept()
            print(connection.makefile().readline().strip(), "at", socket.gethostbyaddr(address)[0])
else:
    for attempt in range(100):
        try:
            connection = socket.create_connection((nodes[0], 29500), timeout=5)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    connection.sendall(f"{socket.gethostname()}\\n".encode())
"""

BROKEN = ("node1", "node2")


def traces(folder: Path) -> list[str]:
    """What there is of the cluster in this folder: processes, mounts, links."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(f"process {entry.name}")
        except OSError:
            continue
    links = json.loads(subprocess.check_output(["ip", "-json", "address"]))
    of_a_cluster = [link for link in links if link["ifname"].startswith("flt")]
    return found + [link["ifname"] for link in of_a_cluster]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleetune-devcluster-") as parent:
        folder = Path(parent) / "cluster"
        yield folder
        run(folder, "down")


def test_packages_that_are_missing_are_named_with_the_command_that_installs_them(folder: Path) -> None:
    result = run(folder, "up", PATH="/nowhere")  # sbatch is in /usr/bin
    assert result.returncode == 2
    assert "apt-get install --yes --no-install-recommends" in result.stderr
    assert "slurm-wlm" in result.stderr
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="installs only as root")
def test_a_mirror_that_cannot_be_reached_is_an_error_with_what_was_said(folder: Path, tmp_path: Path) -> None:
    apt_get, calls = tmp_path / "apt-get", tmp_path / "calls"
    apt_get.write_text(f'#!/bin/sh\necho "$1" >> {calls}\necho "E: Unable to fetch" >&2\nexit 100\n')
    apt_get.chmod(0o755)
    for command in (["up", "--install"], ["install"]):
        calls.unlink(missing_ok=True)
        result = run(folder, *command, PATH=str(tmp_path))
        assert result.returncode == 2
        assert result.stderr.endswith("failed:\nE: Unable to fetch\n")
        assert calls.read_text().split() == ["install", "update", "install"]
    assert not folder.exists()


@pytest.mark.parametrize("command", [["crash", "node1"], ["heal", "node1"], ["env"]], ids=" ".join)
def test_without_a_cluster_its_commands_say_so(folder: Path, command: list[str]) -> None:
    result = run(folder, *command)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "no cluster is up" in result.stderr or "needs root" in result.stderr


def test_one_folder_has_one_cluster(devcluster: DevCluster) -> None:
    assert "is up: 3 node(s)" in devcluster("up")
    other = run(devcluster.folder, "up", "--nodes", "2")
    assert other.returncode == 2
    assert "another is up" in other.stderr


def test_a_node_that_does_not_exist_gets_the_names_of_those_that_do(devcluster: DevCluster) -> None:
    result = run(devcluster.folder, "crash", "node9")
    assert result.returncode == 2
    assert "node1, node2, node3" in result.stderr


def test_what_is_no_cluster_is_left_alone(devcluster: DevCluster, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").touch()
    assert "holds something that is no cluster" in run(folder, "up").stderr
    run(folder, "down")
    assert (folder / "thesis.tex").exists()


def test_a_daemon_that_fails_is_named_with_what_it_said_and_all_is_taken_away(
    devcluster: DevCluster, folder: Path
) -> None:
    (folder / "etc").mkdir(parents=True)
    (folder / "cluster.json").touch()
    (folder / "etc" / "munge.key").write_bytes(b"short")
    (folder / "etc" / "munge.key").chmod(0o600)
    before = traces(folder)  # the other cluster's links
    result = run(folder, "up", "--no-accounting")
    assert result.returncode == 1
    assert "munged on control ended with exit code" in result.stderr
    assert "key" in result.stderr.lower()
    assert traces(folder) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_up_that_is_stopped_halfway_leaves_no_trace(devcluster: DevCluster, folder: Path, stop: signal.Signals) -> None:
    before = traces(folder)
    command = [sys.executable, str(COMMAND), "up", "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as up:
        assert eventually(lambda: (folder / "database").exists(), 20)
        up.send_signal(stop)
        _, said = up.communicate(timeout=30)
    assert up.returncode == 128 + stop
    assert said == ""
    assert traces(folder) == before
    assert not folder.exists()


def test_two_clusters_do_not_disturb_each_other_and_down_leaves_no_trace(devcluster: DevCluster, folder: Path) -> None:
    before = traces(folder)
    second = DevCluster(folder)
    second("up", "--nodes", "1", "--no-accounting", "--gpus-per-node", "0")
    assert second.slurm("srun", "hostname") == "node1\n"
    assert second.node_states().keys() == {"node1"}
    assert devcluster.node_states().keys() == {"node1", "node2", "node3"}
    assert len(traces(folder)) > len(before)
    job = second.submit("sleep 600")
    assert eventually(lambda: second.job(job)["JobState"] == "RUNNING", 20)
    second("down")
    assert traces(folder) == before
    assert not folder.exists()
    assert devcluster.slurm("srun", "hostname")


def test_its_environment_is_all_that_slurm_needs(devcluster: DevCluster) -> None:
    script = devcluster("env") + "sinfo -ho %P\ndevcluster status"
    said = subprocess.check_output(["bash", "-c", script], text=True)
    assert said.splitlines()[:2] == ["main*", "hi"]
    assert "node3    " in said


def test_tasks_have_host_names_of_their_own(devcluster: DevCluster) -> None:
    said = devcluster.slurm("srun", "--nodes=2", "--ntasks-per-node=2", "--label", "hostname")
    assert sorted(line.split(": ")[1] for line in said.splitlines()) == ["node1", "node1", "node2", "node2"]


def test_tasks_reach_each_other_by_name(devcluster: DevCluster) -> None:
    said = devcluster.slurm("srun", "--nodes=3", "--ntasks-per-node=1", sys.executable, "-c", MEET)
    assert sorted(said.splitlines()) == ["node2 at node2", "node3 at node3"]


def test_a_batch_job_gets_its_gpus_and_is_in_the_accounts(devcluster: DevCluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = "echo $CUDA_VISIBLE_DEVICES; exit 3"
    command = ["sbatch", "--parsable", "--wait", "--gres=gpu:3", f"--output={output}", "--wrap", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=devcluster.environment)
    assert result.returncode == 3
    assert output.read_text() == "0,1,2\n"

    def account() -> dict[str, object]:
        jobs = json.loads(devcluster.slurm("sacct", "--json", "--jobs", job))["jobs"]
        return {name: jobs[0][name] for name in ("partition", "name", "nodes")} if jobs else {}

    job = result.stdout.strip()
    # Its end may stand there before its beginning.
    whole = {"partition": "main", "name": "wrap", "nodes": "node1"}
    assert eventually(lambda: account() == whole, 30), account()
    # The JSON of Slurm 22.05 gives every job the exit code 0.
    assert devcluster.slurm("sacct", "-nXPo", "ExitCode", "--jobs", job) == "3:0\n"


def test_a_job_in_hi_takes_the_place_of_one_in_main(devcluster: DevCluster, tmp_path: Path) -> None:
    low = devcluster.submit("exec sleep 600", "--nodes=3", "--exclusive", "--requeue", f"--output={tmp_path}/low")
    try:
        assert eventually(lambda: devcluster.job(low)["JobState"] == "RUNNING", 20)
        assert devcluster.slurm("srun", "--partition=hi", "--nodes=3", "hostname", timeout=60).count("node") == 3
        job = devcluster.job(low)
        assert (job["JobState"], job["Restarts"]) == ("PENDING", "1")
    finally:
        devcluster.slurm("scancel", low)


@pytest.mark.slow
def test_nodes_that_crash_and_nodes_that_are_cut_off_lose_their_jobs_to_the_others(
    devcluster: DevCluster, tmp_path: Path
) -> None:
    """Both at once: Slurm takes half a minute to notice."""
    script = 'echo "$(hostname) ${SLURM_RESTART_COUNT:-0}"; exec sleep 600'
    append = ["--requeue", "--open-mode=append"]
    jobs = {n: devcluster.submit(script, *append, f"--output={tmp_path}/{n}", f"--nodelist={n}") for n in BROKEN}
    try:
        assert eventually(lambda: all((tmp_path / node).exists() for node in BROKEN), 20)
        crashed, cut_off = BROKEN
        devcluster("crash", crashed)
        devcluster("partition", cut_off)
        assert eventually(lambda: all(devcluster.node_states()[node] == "down*" for node in BROKEN), 60)
        said = devcluster("status").splitlines()
        assert [line.split()[2] for line in said if line.startswith("node")] == ["crashed", "partitioned", "runs"]
        for job in jobs.values():
            assert eventually(lambda job=job: devcluster.job(job)["JobState"] == "PENDING", 20)
            assert devcluster.job(job)["Restarts"] == "1"
            # It would wait two minutes, and for its node.
            devcluster.slurm("scontrol", "update", f"JobId={job}", "StartTime=now", "ReqNodeList=")
        for node in BROKEN:
            assert eventually(lambda node=node: (tmp_path / node).read_text() == f"{node} 0\nnode3 1\n", 20)
        for node in BROKEN:
            assert devcluster("heal", node) == f"{node} is idle\n"
        assert devcluster.slurm("srun", "--nodes=3", "--overcommit", "hostname").count("node") == 3
    finally:
        devcluster.slurm("scancel", *jobs.values())
        for node in BROKEN:
            devcluster("heal", node)
