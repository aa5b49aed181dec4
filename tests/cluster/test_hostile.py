"""Hostile values in a profile: none is executed, each is refused or passed on as it stands, by a real sbatch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import DevCluster
from tiny import recipe_values

from fleetune.cluster import slurm
from fleetune.cluster.profile import Profile, load_profile
from fleetune.cluster.submit import script
from fleetune.schema import Recipe, RecipeError

TRAP = "touch {canary}"
AROUND = (
    "$({})", "`{}`", "; {} ;", "&& {}", "|| {}", "| {}", "& {} &", "x; {} #", "\"; {}; \"", "'; {}; '", "'\"; {}; \"'",
    "\\'; {}; \\'", "\\\"; {} #", "${{IFS}}; {}", "$(echo $({}))", "<({})", ">({})", "{{ {}; }}", "( {} )", "x$({})y",
    "#; {}", "-- ; {}", "--wrap={}", "%j; {}", "$'\\n'{}", "!{}", "~$({})", "* ; {}", "a b;{}", "\\; {}",
    "\"$({})\"", "'$({})'", "\"`{}`\"", "é; {}", "{} 2>&1",
    "$((`{}`))", "${{x:-$({})}}", "[[ $({}) ]]", "if {}; then :; fi",
    "\\\\\"; {}; \"", "\t; {}", "x\n{}", "x\r{}", "x\r\n#SBATCH --wrap={}", "x\n#SBATCH --uid=0\n{}", "x\x00{}",
    "x\x0b{}", "x\x1b[2J{}", "x\u2028{}", "x\x85{}",
)  # fmt: skip
FIELDS = ("account", "constraint", "qos", "reservation", "partition", "gpu_type", "cache_dir")


def profile_with(folder: Path, values: dict[str, Any]) -> Profile:
    """Raises RecipeError."""
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump({"time": "1h", "ranks_per_node": 1} | values), encoding="utf-8")
    return load_profile(file)


def text_of(folder: Path, profile: Profile) -> str:
    return script(Recipe.model_validate(recipe_values(folder, "run") | {"output_dir": str(folder)}), profile)


def setup_of(text: str) -> str:
    """The lines that the script's shell runs before srun."""
    lines = text.splitlines()
    return "\n".join(line for line in lines[: next(i for i, s in enumerate(lines) if s.startswith("srun"))])


@pytest.mark.parametrize("around", AROUND)
def test_no_value_is_executed_and_each_is_refused_or_passed_on(
    around: str, cluster: DevCluster, tmp_path: Path
) -> None:
    """Twice for each text: as an option's value, by sbatch, and as a variable's, by the shell of the script."""
    canary = tmp_path / "canary"
    hostile = around.format(TRAP.format(canary=canary))
    option = {"extra": {"mail-user": hostile, "mail-type": "TIME_LIMIT", "hold": True}}
    variable = {"environment": {"HOSTILE": hostile}, "cache_dir": f"/{hostile}"}
    if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", hostile):
        for values in (option, variable):
            with pytest.raises(RecipeError, match=r"has a line break or another control character"):
                profile_with(tmp_path, values)
        return

    # What sbatch has read of an option stands in the job, to the letter.
    text = text_of(tmp_path, profile_with(tmp_path, option))
    sent = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=True)
    job = cluster.slurm("scontrol", "show", "job", sent.stdout.strip())
    cluster.slurm("scancel", sent.stdout.strip())
    assert f"MailUser={hostile} MailType=TIME_LIMIT" in job

    # A variable is what the script's own shell makes of it.
    text = text_of(tmp_path, profile_with(tmp_path, variable))
    program = setup_of(text) + '\nprintf "%s\\n%s" "$HOSTILE" "$TRITON_CACHE_DIR"'
    said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == f"{hostile}\n/{hostile}/fleetune-{os.getuid()}/triton"
    assert not canary.exists()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_quoted_alike(field: str, cluster: DevCluster, tmp_path: Path) -> None:
    """What is no such account, constraint or partition is Slurm's to refuse; nothing runs either way."""
    canary = tmp_path / "canary"
    for around in AROUND[:40]:
        hostile = around.format(TRAP.format(canary=canary))
        values: dict[str, Any] = {field: f"/{hostile}" if field == "cache_dir" else hostile}
        text = text_of(tmp_path, profile_with(tmp_path, values | ({"gpus_per_node": 1} if field == "gpu_type" else {})))
        subprocess.run(["bash", "-c", setup_of(text)], capture_output=True, check=False)
    sent = subprocess.run(["sbatch", "--hold", "--parsable"], input=text, capture_output=True, text=True, check=False)
    if sent.returncode == 0:
        slurm.end(sent.stdout.strip(), at_once=True)
    assert not canary.exists()
