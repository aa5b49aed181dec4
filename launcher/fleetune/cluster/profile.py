"""A cluster profile: what a site's Slurm wants to know, in one YAML file of its own (`slurm/*.yaml`).

Strict as a recipe: an unknown key, a wrong type or a time without its unit is one error with the file, the key and what
would be right. Every value but `setup` is passed on literally, quoted; `setup` alone is shell.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from fleetune.faults import fault_lines, shown
from fleetune.schema import Recipe, RecipeError
from fleetune.sections import Section
from fleetune.strict_yaml import parse_yaml

CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_UNITS = {"d": 1440.0, "h": 60.0, "m": 1.0, "s": 1 / 60}


def _literal(text: str) -> str:
    """A newline would end the #SBATCH line, and what follows it would be script, however it is quoted."""
    if CONTROL.search(text):
        raise PydanticCustomError("control", "has a line break or another control character; should be one plain line")
    return text


def _word(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "is empty; leave the key out")
    return _literal(text)


def minutes_of(time: str) -> int:
    """Minutes, rounded up, of `4h`, `90m`, `1d12h`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`.

    Raises:
        ValueError: no such time, or a number without a unit: Slurm takes it for minutes, people for hours.
    """
    text = time.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"has no unit: {text}m (minutes), {text}h (hours) or {text}d (days)?")
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, *fields = match.groups()
        if days is not None or fields[2] is not None:
            hours, minutes, seconds = (int(field or 0) for field in fields)
            total = int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
            return _whole(total)
        raise ValueError("may be minutes and seconds or hours and minutes; write 4h, 90m or HH:MM:SS")
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError("should be a time as 4h, 90m, 1d12h, 08:00:00 or 2-00:00:00")
    return _whole(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _whole(minutes: float) -> int:
    if minutes <= 0:
        raise ValueError("should be more than nothing")
    return -int(-minutes // 1)


def _time(text: Any) -> Any:
    if not isinstance(text, str | int | float) or isinstance(text, bool):
        return text  # the type's own message
    text = str(text)
    try:
        minutes_of(_literal(text))
    except ValueError as error:
        raise PydanticCustomError("time", "{reason}", {"reason": str(error)}) from None
    return text


def _value(value: Any) -> Any:
    """One message where the union would give three."""
    if value is not True and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise PydanticCustomError("value", "should be text, a whole number, or true for an option without a value")
    return _literal(value) if isinstance(value, str) else value


def _memory(value: Any) -> Any:
    """One message, whether it is a bare number or text without a unit."""
    if not isinstance(value, str) or not re.fullmatch(r"\d+[KMGT]", value):
        raise PydanticCustomError(
            "memory", "should be a number with its unit, as 4000M or 64G; 0G is all that a node has"
        )
    return value


def _absolute(text: str) -> str:
    """Values are quoted, so that the shell makes nothing of ~ and $."""
    if not text.startswith("/"):
        raise PydanticCustomError("absolute", "should begin with /, as it is passed on literally: no ~, no $")
    return text


def _image(text: str) -> str:
    return _absolute(text) if text.startswith(("~", "$")) else text  # else it may be a registry's name


def _option(name: str) -> str:
    """sbatch takes the beginning of a name for the name."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise PydanticCustomError("option", "should be the name of an sbatch option without its dashes, as mail-type")
    if (ours := name if name in OURS else next((one for one in OURS if one.startswith(name)), None)) is not None:
        raise PydanticCustomError("option", "is set by Fleetune; in its place: {instead}", {"instead": OURS[ours]})
    return name


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise PydanticCustomError("variable", "should be the name of an environment variable")
    if re.search(r"KEY|TOKEN|SECRET|PASSWORD", name, re.IGNORECASE):
        raise PydanticCustomError(
            "secret", "looks like a secret, and a script is plain text; set it in the nodes' own environment"
        )
    return name


# The sbatch options that the other keys, or Fleetune itself, set.
OURS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "nodes": "nodes",
    "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node",
    "gres": "gpus_per_node and gpu_type",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node (this one hides GPUs from their neighbours)",
    "cpus-per-task": "cpus_per_rank",
    "mem": "memory",
    "time": "time",
    "job-name": "the recipe's name",
    "comment": "nothing: it carries the token by which the job is found",
    "signal": "stop_seconds",
    "requeue": "nothing: Fleetune requeues by itself",
    "no-requeue": "nothing: Fleetune requeues by itself",
    "array": "nothing: a run is one job",
    "output": "nothing: logs stand in the run folder",
    "error": "nothing: logs stand in the run folder",
    "open-mode": "nothing: logs stand in the run folder",
    "export": "environment",
    "chdir": "nothing: jobs start in the run folder",
    "clusters": "nothing: send from that cluster's login node, or export SLURM_CLUSTERS",
    "dependency": "fleetune submit --after RUN",
    "wrap": "setup",
}

Word = Annotated[str, AfterValidator(_word)]
Literal_ = Annotated[str, AfterValidator(_literal)]
Count = Annotated[int, Field(ge=1)]


class Container(Section):
    """The ranks run inside an image; the launcher's own lines outside it."""

    kind: Literal["pyxis", "apptainer"]
    """What runs it: srun's pyxis plugin, or apptainer."""
    image: Annotated[Word, AfterValidator(_image)]
    """A file, or a registry's name as the runtime takes it."""
    mounts: list[Annotated[Word, AfterValidator(_absolute)]] = []
    """HOST or HOST:INSIDE. The run's folder and the code are mounted by themselves."""
    python: Word = "python"
    """The command inside the image."""


class Profile(Section):
    partition: Word | None = None
    """The queue; Slurm's default when absent."""
    account: Word | None = None
    """Whose budget pays; your default when absent."""
    qos: Word | None = None
    """The quality of service, with its limits and priority."""
    constraint: Word | None = None
    """Features that the nodes must have, e.g. h100&ib."""
    reservation: Word | None = None
    """Nodes that were set aside under this name."""
    nodes: Count = 1
    """How many the run is spread over."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """None trains on CPUs."""
    gpu_type: Word | None = None
    """As in the cluster's gres: h100, a100."""
    gpu_memory: Annotated[float, Field(ge=1.0)] | None = None
    """GB that each GPU has, e.g. 80: `fleetune check --cluster` says whether a recipe fits."""
    ranks_per_node: Count | None = None
    """The GPUs of a node when absent; on nodes without any, 1."""
    cpus_per_rank: Count = 1
    """CPUs, and so threads, of each rank."""
    memory: Annotated[str, BeforeValidator(_memory)] | None = None
    """Of each node, as 64G; 0G is all that a node has."""
    time: Annotated[str, BeforeValidator(_time)]
    """4h, 90m, 2-00:00:00: what one attempt may take. The run goes on in the next one."""
    stop_seconds: Annotated[int, Field(ge=30, le=3600)] = 120
    """How long before its end Slurm says so, for the run to save."""
    failures_per_node_day: Annotated[float, Field(gt=0.0)] | None = None
    """What this cluster's nodes are known for, e.g. 0.0065, which is 6.5 in 1,000 days of a node: recipes with
    checkpoint.save_steps: auto save as often as that asks for."""
    setup: list[Literal_] = []
    """Lines of shell before the ranks start: [module load cuda]. The one field that is shell."""
    container: Container | None = None
    """An image that the ranks run in; without one they run the Python that submits."""
    environment: dict[Annotated[str, AfterValidator(_variable)], Literal_] = {}
    """Variables of every rank, NCCL's too."""
    cache_dir: Annotated[Word, AfterValidator(_absolute)] | None = None
    """A folder on each node's own disk, as /tmp: in it you get one that is closed to others, for Triton's cache and
    torch's extensions. On a network file system they hang."""
    internet: bool = True
    """Whether the nodes reach it; else hub and wandb are off line there, and `fleetune sync` sends wandb the rest."""
    extra: dict[Annotated[str, AfterValidator(_option)], Annotated[str | int | bool, BeforeValidator(_value)]] = {}
    """Any further sbatch options, without their dashes: exclusive: true."""

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def is_profile(file: Path) -> bool:
    """Whether a file that is no recipe is a cluster profile."""
    with contextlib.suppress(OSError, UnicodeDecodeError, RecipeError):
        return _is_of(parse_yaml(file.read_text(encoding="utf-8"), str(file)), Profile, Recipe)
    return False


def _is_of(values: Any, one: type[Section], other: type[Section]) -> bool:
    """By its keys: some of the one's, however many are misspelt, and none of the other's."""
    keys = set(values) if isinstance(values, dict) else set()
    return bool(keys & set(one.model_fields)) and not keys & set(other.model_fields)


def load_profile(file: Path) -> Profile:
    """Raises RecipeError with a line for each fault."""
    file = Path(os.path.normpath(file.absolute()))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{file}: cannot read the cluster profile: {reason}") from None
    values: Any = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a cluster profile is a map of keys, this is {shown(values)}")
    if _is_of(values, Recipe, Profile):
        raise RecipeError(f"{file}: is a recipe, not a cluster profile; it goes first, and --cluster names a profile")
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(fault_lines(error, values, Profile, lambda path: str(file)))) from None
    if profile.gpus_per_node and profile.ranks > profile.gpus_per_node:
        raise RecipeError(
            f"{file}: ranks_per_node = {profile.ranks}: a rank needs a GPU of its own and a node has "
            f"{profile.gpus_per_node}"
        )
    if profile.gpu_memory and not profile.gpus_per_node:
        raise RecipeError(f"{file}: gpu_memory = {profile.gpu_memory}: is of GPUs, and gpus_per_node is 0")
    if minutes_of(profile.time) * 60 <= 2 * profile.stop_seconds:
        raise RecipeError(
            f"{file}: time = {profile.time!r}: leaves no time to train before the {profile.stop_seconds} s "
            "(stop_seconds) that saving is given"
        )
    return profile
