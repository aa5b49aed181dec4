"""The run folder: whose it is, when it is taken up again, how attempts are counted, and that one alone is at work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleetune import comparison, opening, runs, sync
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cluster import slurm
from fleetune.cluster.profile import Profile
from fleetune.cluster.submit import standing
from fleetune.cluster.why import why
from fleetune.opening import open_run
from fleetune.recipe import dump_recipe, parse_recipe
from fleetune.report import no_run
from fleetune.runs import Run, lease
from fleetune.schema import Recipe, RecipeError

LAYOUT = {"nodes": 1, "nproc_per_node": 2, "threads": 1}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "task": "classification",
    "model": {"model_name_or_path": "some/model"},
    "data": {"train": {"path": "some/data"}},
    "losses": [{"kind": "cross_entropy"}, {"kind": "l2_penalty", "weight": 0.5}],
    "training": {"max_steps": 10},
}


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Keys as in `training__seed`."""
    values = json.loads(json.dumps(VALUES | {"output_dir": str(folder / "runs")}))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for part in parents:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[int(part)]
        place[last] = value
    return Recipe.model_validate(values)


def refusal(again: Recipe, layout: dict[str, int] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        open_run(again, layout or LAYOUT)
    return str(caught.value)


def trained(run: Run) -> Run:
    """As if a step had been done: what was never trained may be of any recipe."""
    run.metrics.write_text('{"step": 1, "train/loss": 0.5}\n')
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- making one


def test_a_new_run_is_its_owners_alone_and_says_what_made_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = open_run(recipe(tmp_path), LAYOUT)
    finally:
        os.umask(before)
    assert run.path == tmp_path / "runs" / "tiny"
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert run.recipe() == recipe(tmp_path)
    info = run.info()
    assert info["name"] == "tiny"
    assert info["layout"] == LAYOUT
    assert info["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(info["id"]) == 8
    assert open_run(recipe(tmp_path, name="other"), LAYOUT).info()["id"] != info["id"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_is_taken_and_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True, mode=0o755)
    run = open_run(recipe(tmp_path), LAYOUT)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


def test_a_foreign_folder_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    assert refusal(recipe(tmp_path)) == (
        f"output_dir/name = {str(folder)!r}: is there already and is no run folder; choose another name, or --fresh"
    )
    assert contents(folder) == {"thesis.txt": b"mine"}


def test_a_place_where_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    assert "cannot be written: Not a directory" in refusal(recipe(tmp_path))


@pytest.mark.parametrize("left", [[".run.json.123"], ["run.json"], ["run.json", ".recipe.yaml.123"]])
def test_a_folder_whose_making_was_killed_is_made(tmp_path: Path, left: list[str]) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    text = (run.path / "run.json").read_text()
    shutil.rmtree(run.path)
    run.path.mkdir()
    for name in left:
        (run.path / name).write_text(text if name == "run.json" else "{")
    assert open_run(recipe(tmp_path), LAYOUT).recipe() == recipe(tmp_path)
    assert run.info()["layout"] == LAYOUT


def test_the_commit_is_fleetunes_own_and_not_that_of_the_repository_it_is_installed_in(tmp_path: Path) -> None:
    shutil.copytree(Path(runs.__file__).parent, tmp_path / "site" / "fleetune", ignore=shutil.ignore_patterns("train"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / ".gitignore").write_text("site/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    code = "from fleetune.runs import source_commit; print(source_commit())"

    def commit() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert commit() == "None"
    for command in (["add", "-f", "site"], ["commit", "-qm", "b"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(commit())


# ---------------------------------------------------------------- taking it up again


def test_the_same_recipe_takes_up_the_same_run(tmp_path: Path) -> None:
    first = open_run(recipe(tmp_path), LAYOUT)
    before = contents(first.path)
    again = open_run(recipe(tmp_path), LAYOUT)
    assert again == first
    assert contents(again.path) == before


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"training__seed": 1}, ["training.seed: 0 in the run, 1 now"]),
        ({"model__num_labels": 3}, ["model.num_labels: nothing in the run, 3 now"]),
        ({"losses__1__weight": 0.25}, ["losses.1.weight: 0.5 in the run, 0.25 now"]),
        ({"model__config__dropout": 0.1}, ["model.config.dropout: nothing in the run, 0.1 now"]),
        ({"model__freeze": ["*.bias"]}, ["model.freeze: nothing in the run, ['*.bias'] now"]),
        (
            {"losses": [{"kind": "cross_entropy"}]},
            [
                "losses.1.kind: 'l2_penalty' in the run, nothing now",
                "losses.1.weight: 0.5 in the run, nothing now",
                "losses.1.parameters: ['*.weight'] in the run, nothing now",
            ],
        ),
        (
            {"training__learning_rate": 0.5, "data__max_length": 64, "training__max_steps": 5},
            ["data.max_length: 128 in the run, 64 now", "training.learning_rate: 5e-05 in the run, 0.5 now"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_recipe_is_refused_with_the_keys_that_differ(
    tmp_path: Path, changes: dict[str, Any], lines: list[str]
) -> None:
    run = trained(open_run(recipe(tmp_path), LAYOUT))
    before = contents(run.path)
    first, *rest = refusal(recipe(tmp_path, **changes)).splitlines()
    assert first == f"{run.path} is a run of another recipe (--fresh takes the next free name):"
    assert [line.strip() for line in rest] == lines
    assert contents(run.path) == before


def test_a_run_that_failed_before_its_first_step_may_be_of_another_recipe_now(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT, data="one")
    run.metrics.touch()  # opened, and nothing logged
    mended = recipe(tmp_path, training__learning_rate=1e-4, data__max_length=64)
    again = open_run(mended, LAYOUT, data="another")
    assert again.recipe() == mended
    assert again.info()["data"] == "another"


def test_it_forgets_in_which_precision_the_old_one_would_have_run(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    runs.write_json(run.path / "run.json", run.info() | {"fp32_for_bf16": True})
    assert open_run(recipe(tmp_path, training__bf16=True), LAYOUT).recipe().training.bf16
    assert "fp32_for_bf16" not in run.info()


def test_who_opened_it_before_another_recipe_came_is_told_so(tmp_path: Path) -> None:
    mine, theirs = recipe(tmp_path), recipe(tmp_path, training__seed=1)
    run = open_run(mine, LAYOUT)
    opening.refuse_replaced(run, mine)
    open_run(theirs, LAYOUT)
    with pytest.raises(
        RecipeError, match=r"tiny: another recipe has just taken its place:\n  training\.seed: 1 in the run"
    ):
        opening.refuse_replaced(run, mine)
    fresh = open_run(mine, LAYOUT, fresh=True)
    opening.refuse_replaced(fresh, mine)


def test_not_where_a_job_of_the_old_one_may_be_in_a_queue(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    runs.write_json(run.path / "job.json", {"id": "1"})
    asked = recipe(tmp_path, training__seed=1)
    assert "training.seed: 0 in the run, 1 now" in refusal(asked)
    assert open_run(asked, LAYOUT, is_queued=False).recipe() == asked


@pytest.mark.parametrize(
    "changes",
    [
        *({f"training__{key}": 99} for key in ("max_steps", "logging_steps")),
        {"training__num_train_epochs": 9.5},
        {"tracking__wandb": {"project": "p", "tags": ["a"]}},
        *({f"checkpoint__{key}": 99} for key in ("save_steps", "save_total_limit")),
        {"checkpoint__save_steps": "auto", "checkpoint__mtbf_hours": 30.0},
        {"deepspeed__zero_stage": 3, "deepspeed__offload_optimizer": "cpu"},
        {"training__per_device_train_batch_size": 4, "training__gradient_accumulation_steps": 2},
        {"losses": [*VALUES["losses"]], "model__config": {}},
    ],
    ids="-".join,
)
def test_length_tracking_logging_and_resources_may_change_and_are_stored(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = open_run(recipe(tmp_path), LAYOUT)
    run_id = first.info()["id"]
    again = open_run(recipe(tmp_path, **changes), LAYOUT)
    assert again.recipe() == recipe(tmp_path, **changes)
    assert again.info()["id"] == run_id


def test_a_run_that_began_in_fp32_for_want_of_bf16_goes_on_so(tmp_path: Path) -> None:
    run = trained(open_run(recipe(tmp_path), LAYOUT))
    asked = recipe(tmp_path, training__bf16=True)
    assert "training.bf16: False in the run, True now" in refusal(asked)
    runs.write_json(run.path / "run.json", run.info() | {"fp32_for_bf16": True})
    assert open_run(asked, LAYOUT).recipe().training.bf16 is False


def test_a_run_that_was_moved_goes_on(tmp_path: Path) -> None:
    run_id = open_run(recipe(tmp_path), LAYOUT).info()["id"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").rename(tmp_path / "disk" / "runs")
    moved = open_run(recipe(tmp_path / "disk"), LAYOUT)
    assert moved.info()["id"] == run_id
    assert moved.recipe().output_dir == str(tmp_path / "disk" / "runs")


def test_other_ranks_go_on_where_the_global_batch_is_the_same(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    single = LAYOUT | {"nproc_per_node": 1, "threads": 2}
    assert refusal(recipe(tmp_path), single).splitlines() == [
        f"{run.path} goes on only as it began (--fresh begins anew):",
        "  8 examples a step = 1 rank(s) x 1 micro-batch(es) x 8: the run's steps are of 16; "
        "training.global_batch_size=16 keeps that on any number of ranks",
    ]
    assert run.info()["layout"] == LAYOUT
    open_run(recipe(tmp_path, training__global_batch_size=16), single)
    assert run.info()["layout"] == single
    open_run(recipe(tmp_path), LAYOUT)
    assert run.info()["layout"] == LAYOUT


def test_other_data_and_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT, data="one", steps=10)
    checkpoint = run.checkpoints / "step-00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").touch()
    with pytest.raises(RecipeError, match="the data are not those it was trained on"):
        open_run(recipe(tmp_path), LAYOUT, data="another", steps=10)
    with pytest.raises(RecipeError, match=r"the recipe comes to 7 steps, and .* has done 8"):
        open_run(recipe(tmp_path, training__max_steps=7), LAYOUT, data="one", steps=7)
    assert open_run(recipe(tmp_path, training__max_steps=8), LAYOUT, data="one", steps=8).path == run.path


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may enter, with a run of root's in it; the test runs as another user."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    monkeypatch.setattr(slurm, "require", lambda: None)
    folder = Path(tempfile.mkdtemp(prefix="fleetune-tests-"))
    folder.chmod(0o755)
    open_run(recipe(folder), LAYOUT)
    os.setresuid(65534, 65534, 0)
    try:
        yield folder
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "look",
    [
        lambda folder: open_run(recipe(folder), LAYOUT),
        lambda folder: standing(recipe(folder), Profile(time="4h")),
        lambda folder: why(Run(folder / "runs" / "tiny")),
        lambda folder: comparison.find([folder / "runs" / "tiny"]),
        lambda folder: sync.sync([folder / "runs" / "tiny"], watch=False),
    ],
    ids=["run", "submit", "why", "compare", "sync"],
)
def test_a_run_of_another_user_is_refused_though_nobody_else_may_look_into_it(
    look: Callable[[Path], object], foreign: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        look(foreign)
    run = foreign / "runs" / "tiny"
    assert str(caught.value) == f"{run}: belongs to another user; what stands in it is not opened"


def test_a_folder_that_may_not_be_looked_into_is_no_run_to_be_shown(foreign: Path) -> None:
    run = foreign / "runs" / "tiny"
    assert no_run(run) == f"{run}: belongs to another user; what stands in it is not opened"
    assert no_run(foreign) == f"{foreign}: is no run folder (it has no run.json)"


def test_fresh_takes_the_next_free_name(tmp_path: Path) -> None:
    names = [open_run(recipe(tmp_path), LAYOUT, fresh=True).path.name for _ in range(3)]
    assert names == ["tiny", "tiny-2", "tiny-3"]
    shutil.rmtree(tmp_path / "runs" / "tiny-2")
    run = open_run(recipe(tmp_path, training__seed=5), LAYOUT, fresh=True)
    assert run.path.name == run.info()["name"] == run.recipe().name == "tiny-2"
    assert len({Run(path).info()["id"] for path in (tmp_path / "runs").iterdir()}) == 3
    (tmp_path / "runs" / "foreign").mkdir()
    assert open_run(recipe(tmp_path, name="foreign"), LAYOUT, fresh=True).path.name == "foreign-2"


def test_a_fresh_name_that_has_grown_too_long_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    long = recipe(tmp_path, name="a" * 100)
    open_run(long, LAYOUT)
    with pytest.raises(RecipeError, match=f"name = '{'a' * 76}.*at most 100"):
        open_run(long, LAYOUT, fresh=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a" * 100]


def test_a_run_is_done_again_from_its_folder_alone(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    text = run.recipe_file.read_text()
    assert parse_recipe(text, "recipe.yaml") == recipe(tmp_path)
    assert dump_recipe(parse_recipe(text, "recipe.yaml")) == text


# ---------------------------------------------------------------- attempts


def test_a_whole_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    runs.append_jsonl(tmp_path / "a.jsonl", {"a": 2})
    assert runs.read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_line_may_hold_any_text(tmp_path: Path) -> None:
    text = "a\nb\u2028c\x85d\ud800"
    runs.append_jsonl(tmp_path / "a.jsonl", {"text": text})
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert runs.read_jsonl(tmp_path / "a.jsonl") == [{"text": text}]
    assert runs.read_jsonl(tmp_path / "b.jsonl") == [{"text": "a\u2028b"}]
    assert runs.read_jsonl(tmp_path / "nothing.jsonl") == []


def test_a_run_is_finished_when_its_last_attempt_ended_well_at_the_steps_asked_for(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path), LAYOUT)
    assert not opening.is_finished(run, 10)
    runs.write_json(run.eval, {"total_steps": 10})
    assert not opening.is_finished(run, 10)
    end_attempt(run, 1, runs.DONE, "done")
    assert opening.is_finished(run, 10)
    assert not opening.is_finished(run, 20)
    start_attempt(run, [])
    assert not opening.is_finished(run, 10)
    end_attempt(run, 2, runs.FAILED, "broke")
    assert not opening.is_finished(run, 10)


def test_what_is_written_at_once_is_never_seen_half(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    runs.write_json(file, {"a": 1})
    before = file.stat().st_ino
    runs.write_json(file, {"a": 2})
    assert runs.read_json(file) == {"a": 2}
    assert file.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# ---------------------------------------------------------------- the lease

HOLD = """
import sys, time
from pathlib import Path
from fleetune.runs import Run, lease
with lease(Run(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(recipe(tmp_path), LAYOUT)


def write_lease(run: Run, **changes: Any) -> None:
    values = {"host": socket.gethostname(), "pid": os.getpid(), "token": "other", "time": time.time()}
    runs.write_json(run.path / "lease.json", {**values, "started": psutil.Process().create_time(), **changes})


def is_free(run: Run) -> bool:
    try:
        with lease(run):
            return True
    except RecipeError:
        return False


def test_a_lease_is_given_back(run: Run) -> None:
    with lease(run):
        held = runs.read_json(run.path / "lease.json")
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        assert sorted(path.name for path in run.path.iterdir()) == ["lease.json", "recipe.yaml", "run.json"]
    assert not (run.path / "lease.json").exists()
    assert is_free(run)


def test_one_attempt_at_a_time_and_a_killed_ones_place_is_free_at_once(run: Run, tmp_path: Path) -> None:
    root = Path(runs.__file__).parents[1]
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = f"another attempt is at work on this run (process {holder.pid} on {socket.gethostname()})"
        with pytest.raises(RecipeError) as caught, lease(run):
            pass
        assert str(caught.value) == f"{run.path}: {message}"
        stored = contents(run.path)
        assert message in refusal(recipe(tmp_path, training__max_steps=99))
        assert contents(run.path) == stored
        holder.kill()
        while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert is_free(run)
    assert is_free(run)


def test_the_number_of_a_process_that_has_been_given_again_holds_nothing(run: Run) -> None:
    write_lease(run)
    assert not is_free(run)
    write_lease(run, started=psutil.Process().create_time() - 3600)
    assert is_free(run)


def test_on_another_host_the_heartbeat_decides(run: Run) -> None:
    write_lease(run, host="elsewhere", pid=1, time=time.time() - 0.5 * runs.LEASE_SECONDS)
    assert not is_free(run)
    write_lease(run, host="elsewhere", pid=1, time=time.time() - 1.5 * runs.LEASE_SECONDS)
    assert is_free(run)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}'])
def test_a_lease_that_says_nothing_holds_nothing(run: Run, text: str) -> None:
    (run.path / "lease.json").write_text(text)
    assert is_free(run)


def test_a_heartbeat_is_written_every_10_seconds(run: Run) -> None:
    with lease(run) as held:
        first = runs.read_json(run.path / "lease.json")
        held.beat()
        assert runs.read_json(run.path / "lease.json") == first
        held.beaten -= 11
        held.beat()
        again = runs.read_json(run.path / "lease.json")
        assert again["time"] > first["time"]
        assert again | {"time": 0} == first | {"time": 0}


def test_an_attempt_that_slept_while_another_took_over_stops_and_leaves_the_others_lease(run: Run) -> None:
    def sleep_and_wake() -> None:
        with lease(run) as held:
            write_lease(run, host="elsewhere", pid=7)
            held.beaten -= 11
            held.beat()

    with pytest.raises(RecipeError, match=r"another attempt is at work on this run \(process 7 on elsewhere\)"):
        sleep_and_wake()
    assert runs.read_json(run.path / "lease.json")["token"] == "other"


def test_an_attempt_that_fails_gives_its_lease_back(run: Run) -> None:
    with pytest.raises(OSError, match="full"), lease(run):
        raise OSError("the disk is full")
    assert not (run.path / "lease.json").exists()
