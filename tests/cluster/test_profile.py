"""Cluster profiles: what they say of a site, times with their units, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetune.cluster.profile import OURS, Container, Profile, is_profile, load_profile, minutes_of
from fleetune.faults import shown
from fleetune.schema import Recipe, RecipeError
from fleetune.sections import Section

PROFILES = Path(__file__).parents[2] / "slurm"


def written(folder: Path, text: str) -> Path:
    file = folder / "profile.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", sorted(PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_is_a_profile(file: Path) -> None:
    profile = load_profile(file)
    assert profile.ranks >= 1
    assert minutes_of(profile.time) >= 30


def table(section: type[Section] = Profile, prefix: str = "") -> list[str]:
    """Every key with its default and what it says of itself, as lines of Markdown."""
    lines = []
    for name, info in section.model_fields.items():
        default = "" if info.default in (None, [], {}) else shown(info.default).strip("'")
        default = "required" if info.is_required() else default
        said = " ".join((info.description or "").split())
        lines.append(f"| `{prefix}{name}` | {default} | {said} |")
        if name == "container":
            lines += table(Container, "container.")
    return lines


def test_the_readme_has_a_line_for_every_key() -> None:
    readme = (PROFILES / "README.md").read_text(encoding="utf-8").splitlines()
    lines = table()
    assert all(not line.endswith("|  |") for line in lines)
    assert [line for line in readme if line in lines] == lines, "write this:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("4h", 240), ("90m", 90), ("1d12h", 2160), ("2d", 2880), ("1.5h", 90), ("1h 30m", 90), ("61s", 2),
        ("08:00:00", 480), ("00:30:01", 31), ("2-00:00:00", 2880), ("1-12", 2160), ("1-00:30", 1470),
    ],
)  # fmt: skip
def test_times_and_their_minutes(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["", "4", "4.5", "10:30", "h", "4x", "4h5", "-4h", "0m", "00:00:00", "4h;rm -rf /"])
def test_no_times(time: str) -> None:
    with pytest.raises(ValueError, match=r"unit|may be|should be"):
        minutes_of(time)


@pytest.mark.parametrize(("time", "said"), [("4", r"time = 4: has no unit: 4m \(minutes\), 4h \(hours\) or 4d")])
def test_a_bare_number_is_asked_for_its_unit(tmp_path: Path, time: str, said: str) -> None:
    for text in (time, f"'{time}'"):
        with pytest.raises(RecipeError, match=said.replace("= 4", "= '?4'?")):
            load_profile(written(tmp_path, f"time: {text}\n"))


FAULTS = {
    "an unknown key": ({"partitio": "x"}, "partitio = 'x': unknown key; did you mean `partition`?"),
    "no time": ({"time": None}, "time = null: should be text"),
    "no nodes": ({"nodes": 0}, "nodes = 0: should be greater than or equal to 1"),
    "memory without a unit": ({"memory": "64"}, "memory = '64': should be a number with its unit"),
    "a number for memory": ({"memory": 4000}, "memory = 4000: should be a number with its unit, as 4000M or 64G"),
    "a cache in no folder": ({"cache_dir": "cache"}, "cache_dir = 'cache': should begin with /"),
    "a cache at home": ({"cache_dir": "~/cache"}, "cache_dir = '~/cache': should begin with /, as it is passed on"),
    "a mount of home": (
        {"container": {"kind": "pyxis", "image": "x", "mounts": ["$HOME/data"]}},
        "container.mounts.0 = '$HOME/data': should begin with /",
    ),
    "an image at home": (
        {"container": {"kind": "apptainer", "image": "~/torch.sif"}},
        "container.image = '~/torch.sif': should begin with /",
    ),
    "a second line": ({"account": "a\n#SBATCH --uid=0"}, "account = 'a\\n#SBATCH --uid=0': has a line break"),
    "an empty word": ({"qos": " "}, "qos = ' ': is empty; leave the key out"),
    "an option of ours": (
        {"extra": {"gres": "gpu:8"}},
        "extra.gres = 'gpu:8': is set by Fleetune; in its place: gpus_per_node",
    ),
    "the beginning of one": (
        {"extra": {"part": "hi"}},
        "extra.part = 'hi': is set by Fleetune; in its place: partition",
    ),
    "another cluster": (
        {"extra": {"clusters": "other"}},
        "extra.clusters = 'other': is set by Fleetune; in its place: nothing: send from that cluster's login node, or",
    ),
    "no option": ({"extra": {"mail type": "END"}}, "extra.mail type = 'END': should be the name of an sbatch"),
    "an option switched off": ({"extra": {"exclusive": False}}, "extra.exclusive = false: should be text, a whole"),
    "a line in an option": ({"extra": {"mail-user": "a\nb"}}, "extra.mail-user = 'a\\nb': has a line break"),
    "a secret": ({"environment": {"WANDB_API_KEY": "x"}}, "environment.WANDB_API_KEY: looks like"),
    "no variable": ({"environment": {"A-B": "x"}}, "environment.A-B: should be the name of an environment"),
    "two shells in one line": ({"setup": ["module load a\nrm x"]}, "setup.0 = 'module load a\\nrm x': has a line br"),
    "another container": ({"container": {"kind": "docker", "image": "x"}}, "container.kind = 'docker': legal values"),
    "more ranks than GPUs": ({"gpus_per_node": 4, "ranks_per_node": 8}, "ranks_per_node = 8: a rank needs a GPU"),
    "memory of no GPU": ({"gpu_memory": 80}, "gpu_memory = 80.0: is of GPUs, and gpus_per_node is 0"),
    "no failures at all": ({"failures_per_node_day": 0.0}, "failures_per_node_day = 0.0: should be greater than 0"),
    "no time to train": ({"time": "3m"}, "time = '3m': leaves no time to train before the 120 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_file_the_key_and_what_is_right(name: str, tmp_path: Path) -> None:
    change, said = FAULTS[name]
    file = written(tmp_path, yaml.safe_dump({"time": "4h"} | change))
    with pytest.raises(RecipeError) as caught:
        load_profile(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["hunter2", "hunter2\n", 31337])
def test_the_value_of_a_secret_is_not_shown(value: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_profile(written(tmp_path, yaml.safe_dump({"time": "4h", "environment": {"MY_TOKEN": value}})))
    assert "environment.MY_TOKEN: looks like a secret" in str(caught.value)
    assert str(value).strip() not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n", "time: [\n", "time: 4h\ntime: 5h\n", "a: !!python/name:os.system\n"])
def test_what_is_no_map_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"profile\.yaml"):
        load_profile(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "of_a_profile"),
    [
        ("time: 4h\n", True),
        ("nodes: 2\ntmie: 4h\n", True),
        ("name: a\ntask: classification\n", False),
        ("name: a\ntime: 4h\n", False),
        ("nothing: 1\n", False),
        ("- time\n", False),
        ("time: [\n", False),
    ],
)
def test_a_profile_is_known_by_its_keys(text: str, of_a_profile: bool, tmp_path: Path) -> None:
    assert is_profile(written(tmp_path, text)) is of_a_profile


def test_what_is_not_there_is_no_profile(tmp_path: Path) -> None:
    assert not is_profile(tmp_path / "none.yaml")


def test_a_recipe_and_a_profile_share_no_key() -> None:
    assert not set(Profile.model_fields) & set(Recipe.model_fields)


@pytest.mark.parametrize("text", ["name: a\ntask: classification\n", "extends: base.yaml\nnmae: a\ntraining: {}\n"])
def test_a_recipe_is_told_from_a_profile_in_one_line(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_profile(file)
    assert str(caught.value) == (
        f"{file}: is a recipe, not a cluster profile; it goes first, and --cluster names a profile"
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the cluster profile: No such file"):
        load_profile(tmp_path / "none.yaml")


def test_ranks_are_the_gpus_where_nothing_else_is_said() -> None:
    def ranks(**keys: Any) -> int:
        return Profile(time="4h", **keys).ranks

    assert [ranks(), ranks(gpus_per_node=8), ranks(gpus_per_node=8, ranks_per_node=4), ranks(ranks_per_node=2)] == [
        1, 8, 4, 2,
    ]  # fmt: skip


def test_every_key_that_is_an_option_too_is_kept_out_of_extra() -> None:
    assert set(Profile.model_fields) & {"partition", "account", "qos", "constraint", "reservation", "time"} <= set(OURS)
