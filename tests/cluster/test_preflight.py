"""What a cluster would refuse is said before anything is written: by the key, with what would be right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import DevCluster
from tiny import recipe_values, write_rows
from typer.testing import CliRunner, Result

from fleetune.cli import app
from fleetune.cluster import preflight, site
from fleetune.cluster.file_systems import kind_of, why_unshared
from fleetune.cluster.profile import Container, Profile
from fleetune.schema import Recipe

# ---------------------------------------------------------------- a cluster written down


def partition(name: str, **values: str) -> site.Partition:
    return site.Partition(name, {"MaxTime": "UNLIMITED", "MaxNodes": "UNLIMITED", "State": "UP", **values})


def nodes(row: str) -> site.Nodes:
    return site._nodes(row)


# gpu: 4 nodes with 8 H100 and 2 with 4 A100; long: 2 of the former, for a day at most; cpu: 10 without.
CLUSTER = site.Cluster(
    config={"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "associations,qos"},
    partitions={
        "gpu": partition("gpu", Default="YES", MaxTime="2-00:00:00", MaxNodes="4"),
        "gpu-long": partition("gpu-long", MaxTime="14-00:00:00"),
        "cpu": partition("cpu"),
    },
    nodes=[
        nodes("gpu|4|96|1000000|gpu:h100:8(S:0-1),nvme:1|ib,sapphire"),
        nodes("gpu|2|48|500000|gpu:a100:4|ib,rome"),
        nodes("gpu-long|2|96|1000000|gpu:h100:8(S:0-1)|ib,sapphire"),
        nodes("cpu|10|64|250000|(null)|(null)"),
    ],
    reservations=["course", "upgrade"],
    associations=[
        site.Association("physics", "", ("normal", "high")),
        site.Association("chemistry", "gpu-long", ("normal",)),
    ],
)

FITS: dict[str, dict[str, Any]] = {
    "nothing but a time": {},
    "all that a node has": {"gpus_per_node": 8, "gpu_type": "h100", "cpus_per_rank": 12, "memory": "900G", "nodes": 4},
    "two partitions": {"partition": "gpu,gpu-long", "time": "10d"},
    "an account of one partition": {"account": "chemistry", "partition": "gpu-long"},
    "a qos of the account": {"account": "physics", "qos": "high"},
    "an account as Slurm compares it": {"account": "Physics", "qos": "HIGH"},
    "one feature or another": {"constraint": "rome|sapphire", "nodes": 4},
    "features and numbers": {"constraint": "[ib*2&rome*1]", "nodes": 2},
    "a reservation": {"reservation": "course"},
    "all memory": {"memory": "0G", "partition": "cpu", "nodes": 10},
    "another cluster's options": {"extra": {"exclusive": True}},
}

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "partition": ({"partition": "gpus"}, "partition = 'gpus': there is no partition gpus; legal values: gpu, cpu,"),
    "a second partition": ({"partition": "gpu,tpu"}, "partition = 'gpu,tpu': there is no partition tpu; legal"),
    "account": ({"account": "phisics"}, "account = 'phisics': is no account of yours; legal values: physics"),
    "an account of elsewhere": ({"account": "chemistry"}, "account = 'chemistry': is no account of yours; legal"),
    "qos": ({"qos": "urgent"}, "qos = 'urgent': is no qos that you may use; legal values: "),
    "another account's qos": (
        {"account": "chemistry", "qos": "high", "partition": "gpu-long"},
        "qos = 'high': is no qos that you may use with account chemistry; legal values: normal",
    ),
    "time": ({"time": "3d"}, "time = '3d': partition gpu allows 2d at most; a run that is not done by then goes on"),
    "the partition's nodes": ({"partition": "cpu", "nodes": 11}, "nodes = 11: partition cpu has 10"),
    "nodes of a job": ({"nodes": 5}, "nodes = 5: partition gpu allows a job 4 at most"),
    "GPUs": ({"gpus_per_node": 9}, "gpus_per_node = 9: a node of partition gpu has 8 at most"),
    "GPUs of a type": (
        {"gpus_per_node": 8, "gpu_type": "a100"},
        "gpus_per_node = 8: a node of partition gpu has 4 a100 at most",
    ),
    "GPUs without any": (
        {"gpus_per_node": 1, "partition": "cpu"},
        "gpus_per_node = 1: no node of partition cpu has a GPU; partitions with GPUs: gpu, gpu-long",
    ),
    "the type of GPU": (
        {"gpus_per_node": 1, "gpu_type": "h200"},
        "gpu_type = 'h200': no node of partition gpu has it; legal values: h100, a100",
    ),
    "CPUs": (
        {"gpus_per_node": 8, "cpus_per_rank": 16},
        "cpus_per_rank = 16: a node of partition gpu has 96 CPUs at most; 8 rank(s) can have 12 each",
    ),
    "ranks": (
        {"partition": "cpu", "ranks_per_node": 65},
        "ranks_per_node = 65: a node of partition cpu has 64 CPUs at most, and a rank needs one",
    ),
    "memory": ({"memory": "2T"}, "memory = '2T': a node of partition gpu has 1000000M at most; 0G is all that a node"),
    "constraint": (
        {"constraint": "ib&saphire"},
        "constraint = 'ib&saphire': no node of partition gpu has the feature saphire; legal values: sapphire, ",
    ),
    "a constraint without features": (
        {"constraint": "ib", "partition": "cpu"},
        "constraint = 'ib': no node of partition cpu has the feature ib; they have none; leave the key out",
    ),
    "reservation": (
        {"reservation": "curse"},
        "reservation = 'curse': there is no reservation curse that you may see; legal values: course, upgrade",
    ),
    "all at once": (
        {"nodes": 4, "gpus_per_node": 4, "constraint": "rome"},
        "nodes = 4: 2 node(s) of partition gpu have all the GPUs, CPUs, memory and features that are asked of each",
    ),
}


def faults(cluster: site.Cluster = CLUSTER, **keys: Any) -> list[str]:
    found = preflight.faults(Profile(**{"time": "4h", **keys}), cluster)
    return [line.removeprefix("/p.yaml: ") for line in preflight.lines(found, Path("/p.yaml"))]


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_let_through(name: str) -> None:
    assert faults(**FITS[name]) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_key_and_what_is_right(name: str) -> None:
    keys, said = FAULTS[name]
    (line,) = faults(**keys)
    assert line.startswith(said)


def test_every_fault_has_its_line() -> None:
    lines = faults(partition="cpu", nodes=11, memory="1T", constraint="ib", reservation="x")
    assert [line.partition(" ")[0] for line in lines] == ["reservation", "nodes", "memory", "constraint"]


def test_a_cluster_without_a_default_wants_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    none = replace(CLUSTER, partitions={"a": partition("a"), "b": partition("b")}, nodes=[])
    assert faults(none) == ["partition: this key is required: the cluster has no default; legal values: a, b"]
    assert faults(replace(none, config={"JobSubmitPlugins": "lua"})) == []  # which may choose one


def test_without_accounting_nothing_is_said_of_accounts() -> None:
    keys = {"account": "nobody", "qos": "none"}
    assert faults(replace(CLUSTER, associations=None), **keys) == []
    taken = replace(CLUSTER, config=CLUSTER.config | {"AccountingStorageEnforce": "none"})
    assert faults(taken, **keys) == []
    ((key, _, message),) = preflight.warnings(Profile(time="4h", **keys), taken)
    assert key == "account"
    assert message.endswith("this cluster takes the job nevertheless")


def test_nodes_that_are_powered_down_count_too() -> None:
    """sinfo shows none of them, so nothing is said of what they have."""
    cloud = replace(CLUSTER, partitions=CLUSTER.partitions | {"cpu": partition("cpu", TotalNodes="500")})
    assert faults(cloud, partition="cpu", nodes=400, gpus_per_node=8) == []
    assert faults(cloud, partition="cpu", nodes=501) == ["nodes = 501: partition cpu has 500"]


def test_a_qos_may_lift_the_limits_of_a_partition() -> None:
    keys = {"qos": "high", "time": "3d", "nodes": 5}
    assert faults(**keys) == []
    warned = preflight.lines(preflight.warnings(Profile(**keys), CLUSTER), Path("/p.yaml"))
    assert [line.endswith("unless qos high lifts that") for line in warned] == [True, True]


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}), ("gpu:8", {"": 8}), ("gpu:h100:8", {"h100": 8}), ("gpu:1080:4(S:0)", {"1080": 4}),
        ("gpu:a100:2,gpu:v100:4", {"a100": 2, "v100": 4}), ("gpu", {"": 1}), ("gpu:t4", {"t4": 1}),
        ("nvme:2,gpu:a100_1g.5gb:7(S:0,2)", {"a100_1g.5gb": 7}), ("shard:64", {}),
    ],
)  # fmt: skip
def test_gpus_as_slurm_writes_them(gres: str, gpus: dict[str, int]) -> None:
    assert nodes(f"gpu|1|2|3|{gres}|(null)").gpus == gpus


# ---------------------------------------------------------------- folders


def test_what_other_nodes_hardly_see(tmp_path: Path) -> None:
    assert why_unshared(Path("/dev/shm/run")) == "stands in /dev/shm, which mostly is each machine's own"
    assert why_unshared(Path("/proc/self/run")) is None
    assert kind_of(Path("/proc/no/such/file")) == "proc"


def test_nodes_without_internet_need_the_names_of_the_hub_in_their_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    recipe = Recipe.model_validate(recipe_values(tmp_path, "hub") | {"model": {"model_name_or_path": "a/b"}})
    offline = Profile(time="4h", internet=False, environment={"HF_HOME": str(tmp_path)})
    (said,) = preflight._not_cached(recipe, offline)
    assert said.startswith(f"model.model_name_or_path = 'a/b': is not in {tmp_path}/hub")
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert list(preflight._not_cached(recipe, offline)) == []


def test_an_image_that_is_not_on_this_machine_is_named(tmp_path: Path) -> None:
    def said(image: str) -> list[str]:
        profile = Profile(time="4h", container=Container(kind="apptainer", image=image))
        return list(preflight._no_image(profile, Path("/p.yaml")))

    (tmp_path / "there.sif").touch()
    assert said(str(tmp_path / "there.sif")) == said("docker://pytorch") == []
    (line,) = said(f"{tmp_path}/none.sif")
    assert line.startswith("/p.yaml: container.image = ")
    assert ": is not there on this machine" in line


# ---------------------------------------------------------------- a real one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("preflight")
    (place / "model").mkdir()
    write_rows(place / "train.jsonl", 8)
    write_rows(place / "validation.jsonl", 8, seed=1)
    (place / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_values(place, "run") | {"output_dir": str(place / "runs")}), encoding="utf-8"
    )
    return place


def submit(folder: Path, *words: str, recipe: tuple[str, ...] = (), **keys: Any) -> Result:
    profile = folder / "profile.yaml"
    profile.write_text(yaml.safe_dump({"time": "10m", "stop_seconds": 30, **keys}), encoding="utf-8")
    return CliRunner().invoke(app, ["submit", str(folder / "recipe.yaml"), *recipe, "--cluster", str(profile), *words])


def test_a_cluster_is_asked_for_what_it_is(cluster: DevCluster) -> None:
    found = site.ask(associations=True)
    assert list(found.partitions) == ["main", "hi"]
    assert found.partitions["main"].is_default
    assert found.has_accounting
    assert not found.enforces("associations")
    assert [one.account for one in found.associations or ()] == ["root"]
    assert found.nodes == [site.Nodes(name, 3, 8, 16000, {"": 8}, frozenset()) for name in ("main", "hi")]
    assert found.reservations == []


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["sent", "dry run"])
def test_a_fault_is_said_before_anything_is_written(cluster: DevCluster, folder: Path, words: tuple[str, ...]) -> None:
    done = submit(folder, *words, partition="mian", reservation="x")
    assert done.exit_code == 2
    file = folder / "profile.yaml"
    assert done.stderr.splitlines() == [
        f"error: {file}: partition = 'mian': there is no partition mian; legal values: main, hi",
        f"error: {file}: reservation = 'x': there is no reservation x that you may see; there is none at all",
    ]
    assert not (folder / "runs").exists()


def test_what_slurm_would_leave_waiting_for_ever_is_a_fault(cluster: DevCluster, folder: Path) -> None:
    cluster.slurm("scontrol", "update", "PartitionName=hi", "MaxTime=20:00", "MaxNodes=1")
    cluster.slurm("scontrol", "update", "NodeName=node1", "AvailableFeatures=ib")
    cluster.slurm(
        "scontrol", "create", "ReservationName=mine", "StartTime=now", "Duration=9", "Users=root", "NodeCnt=1"
    )
    try:
        done = submit(folder, partition="hi", time="30m", nodes=2, constraint="ib", reservation="mine")
    finally:
        cluster.slurm("scontrol", "delete", "ReservationName=mine")
    said = [line.partition("profile.yaml: ")[2] for line in done.stderr.splitlines()]
    assert said == [
        "time = '30m': partition hi allows 20m at most; a run that is not done by then goes on in the next job",
        "nodes = 2: partition hi allows a job 1 at most",
        "nodes = 2: 1 node(s) of partition hi have all the GPUs, CPUs, memory and features that are asked of each",
    ]


def test_a_profile_that_fits_passes_with_what_should_be_known(
    cluster: DevCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXCLUSIVE", "user")
    done = submit(folder, "--dry-run", account="nobody", gpus_per_node=8, nodes=3)
    assert done.exit_code == 0, done.stderr
    assert "sbatch --test-only: sbatch: Job" in done.stdout
    assert "SBATCH_EXCLUSIVE is set in the environment" in done.stderr
    assert "account = 'nobody': is no account of yours; legal values: root; this cluster takes" in done.stderr
    assert not (folder / "runs").exists()


def test_a_job_that_sbatch_refuses_leaves_no_folder_of_its_own(cluster: DevCluster, folder: Path) -> None:
    for make in (False, True):  # a folder that stood there stays, as an interrupted sending has left it
        if make:
            (folder / "runs" / "run").mkdir(parents=True)
        done = submit(folder, extra={"nodelist": "node9"})
        assert done.exit_code == 2
        assert "the run was not sent; " in done.stderr
        assert "Invalid node name" in done.stderr
        assert (folder / "runs" / "run" / "run.json").exists() is make


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["sent", "dry run"])
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"nodez": 3}, "extra.nodez = 3: the run {} not be sent; sbatch: unrecognized option '--nodez=3'"),
        ({"mail-type": "sometimes"}, "extra.mail-type = 'sometimes': the run {} not be sent; sbatch: error: Invalid"),
    ],
)
def test_an_option_that_sbatch_does_not_take_is_named(
    extra: dict[str, Any], said: str, words: tuple[str, ...], cluster: DevCluster, folder: Path
) -> None:
    done = submit(folder, *words, extra=extra)
    assert done.exit_code == 2
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    said = said.format("would" if words else "XX").replace("XX not be", "was not")
    assert line.startswith(f"error: {folder}/profile.yaml: {said}")


def test_folders_that_other_nodes_hardly_see_are_one_warning(cluster: DevCluster, folder: Path) -> None:
    """Data, model and runs of these tests stand in one folder of /tmp."""
    warned = [line for line in submit(folder, "--dry-run").stderr.splitlines() if "see the same files" in line]
    assert [line.partition(": ")[0] for line in warned] == ([f"warning   {folder}"] if why_unshared(folder) else [])


def test_data_and_folders_are_checked_too(cluster: DevCluster, folder: Path) -> None:
    done = submit(folder, recipe=("data.train.path=/nowhere/train.jsonl",))
    assert done.exit_code == 2
    assert "data.train.path = '/nowhere/train.jsonl': there is no such file" in done.stderr
    done = submit(folder, recipe=(f"output_dir={folder}/train.jsonl",))
    assert done.exit_code == 2
    assert f"cannot be written: {folder}/train.jsonl is no folder" in done.stderr
