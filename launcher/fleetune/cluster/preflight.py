"""What Slurm would refuse, or leave waiting for ever, said before anything is written: a profile against its cluster.

What the cluster does not tell in three quick commands is left to sbatch.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fleetune.cluster import slurm
from fleetune.cluster.file_systems import existing, why_unshared
from fleetune.cluster.profile import Profile, minutes_of
from fleetune.cluster.site import Cluster, Nodes, ask
from fleetune.faults import shown
from fleetune.schema import Recipe, RecipeError, sources_of, teachers_of

Fault = tuple[str, Any, str]  # the profile's key, its value, what would be right
MOST_NAMES = 20
MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


def check(recipe: Recipe, profile: Profile, file: Path) -> list[str]:
    """What should be known before the recipe is sent with the profile: a line for each.

    Raises:
        RecipeError: Slurm would refuse the job or never start it, or the run's folder cannot be made: a line for each
            fault.
        SlurmFailed: the cluster does not answer.
    """
    slurm.require()
    _refuse_folder(Path(recipe.output_dir))
    said = [*_unshared(recipe), *_not_cached(recipe, profile), *_no_image(profile, file), *overriding()]
    cluster = ask(associations=bool(profile.account or profile.qos))
    if found := list(faults(profile, cluster)):
        raise RecipeError("\n".join(lines(found, file)))
    return [*said, *lines(warnings(profile, cluster), file)]


def lines(found: Iterable[Fault], file: Path) -> list[str]:
    file = Path(os.path.normpath(file.absolute()))  # as in what is said of the profile itself
    return [f"{file}: {key}{'' if value is None else f' = {shown(value)}'}: {message}" for key, value, message in found]


def faults(profile: Profile, cluster: Cluster) -> Iterator[Fault]:
    """Each key for which Slurm would refuse the job or never start it."""
    names = partitions_of(profile, cluster)
    unknown = [name for name in names if name not in cluster.partitions]
    if unknown:
        there = f"there is no partition {unknown[0]}; {_legal(unknown[0], cluster.partitions)}"
        yield "partition", profile.partition, there
    elif not names and cluster.config.get("JobSubmitPlugins", "(null)") == "(null)":  # which may choose one
        yield "partition", None, f"this key is required: the cluster has no default; {_legal('', cluster.partitions)}"
    yield from (fault for what, fault in _not_associated(profile, cluster, names) if cluster.enforces(what))
    for name in (profile.reservation or "").split(","):
        if name and name not in cluster.reservations:
            there = _legal(name, cluster.reservations) if cluster.reservations else "there is none at all"
            yield "reservation", profile.reservation, f"there is no reservation {name} that you may see; {there}"
    if not unknown and not _may_lift(profile, cluster):
        yield from _beyond_partition(profile, cluster)
    nodes = [alike for alike in cluster.nodes if alike.partition in names]
    total = sum(int(cluster.partitions[name].values.get("TotalNodes", 0)) for name in names if name not in unknown)
    if total > sum(alike.count for alike in nodes):  # some are powered down, and sinfo shows none of those
        if profile.nodes > total:
            yield "nodes", profile.nodes, f"{_where(names)} has {total}"
    elif nodes and not unknown:
        found = list(_beyond_nodes(profile, nodes, _where(names), cluster))
        yield from found or _beyond_all(profile, nodes, _where(names))


def warnings(profile: Profile, cluster: Cluster) -> Iterator[Fault]:
    """What Slurm lets pass and should be looked at."""
    names = partitions_of(profile, cluster)
    for what, (key, value, message) in _not_associated(profile, cluster, names):
        if not cluster.enforces(what):
            yield key, value, f"{message}; this cluster takes the job nevertheless"
    if _may_lift(profile, cluster):
        for key, value, message in _beyond_partition(profile, cluster):
            yield key, value, f"{message}, unless qos {profile.qos} lifts that"
    states = {name: cluster.partitions[name].values.get("State", "UP") for name in names if name in cluster.partitions}
    if states and "UP" not in states.values():
        yield "partition", profile.partition, f"is {', '.join(states.values()).lower()}: the job waits until it is up"


def overriding() -> list[str]:
    """Variables that sbatch puts before what stands in a script."""
    names = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    return [f"{name} is set in the environment, and sbatch puts it before the profile; unset it" for name in names]


def of_extra(said: str, profile: Profile, file: Path) -> str:
    """What sbatch said, with the profile's key before it where it names an option that `extra` sets."""
    for name, value in profile.extra.items():
        if re.search(rf"--{re.escape(name)}(?![\w-])", said):
            return lines([(f"extra.{name}", value, said)], file)[0]
    return said


def _may_lift(profile: Profile, cluster: Cluster) -> bool:
    """A qos may free its jobs from their partition's limits; only its administrators see whether it does."""
    return profile.qos is not None and cluster.has_accounting


def _where(names: list[str]) -> str:
    return f"partition {' or '.join(names)}"


def partitions_of(profile: Profile, cluster: Cluster) -> list[str]:
    asked = profile.partition or os.environ.get("SBATCH_PARTITION")
    if asked is not None:
        return [name.strip() for name in asked.split(",") if name.strip()]
    return [name for name, partition in cluster.partitions.items() if partition.is_default]


def _legal(value: str, names: Iterable[str]) -> str:
    """The legal names, the nearest first."""
    nearest = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, value.lower(), name.lower()).ratio())
    more = f" and {len(nearest) - MOST_NAMES} more" if len(nearest) > MOST_NAMES else ""
    return f"legal values: {', '.join(nearest[:MOST_NAMES])}{more}"


def _not_associated(profile: Profile, cluster: Cluster, names: list[str]) -> Iterator[tuple[str, Fault]]:
    """Without accounting nothing is known."""
    if cluster.associations is None:
        return
    mine = [one for one in cluster.associations if not one.partition or one.partition in names]
    accounts = list(dict.fromkeys(one.account for one in mine))
    if profile.account is not None and profile.account.lower() not in map(str.lower, accounts):  # as Slurm compares
        there = _legal(profile.account, accounts) if accounts else "you have none; ask the cluster's administrators"
        yield "associations", ("account", profile.account, f"is no account of yours; {there}")
        return  # the qos are the account's
    accounts = [profile.account.lower()] if profile.account is not None else [name.lower() for name in accounts]
    qos = list(dict.fromkeys(q for one in mine for q in one.qos if one.account.lower() in accounts))
    if profile.qos is not None and profile.qos.lower() not in map(str.lower, qos):
        of = f" with account {profile.account}" if profile.account else ""
        there = _legal(profile.qos, qos) if qos else "you have none; leave it out"
        yield "qos", ("qos", profile.qos, f"is no qos that you may use{of}; {there}")


def _beyond_partition(profile: Profile, cluster: Cluster) -> Iterator[Fault]:
    """Beyond what partitions allow a job. Of several Slurm takes the one that fits."""
    names = [name for name in partitions_of(profile, cluster) if name in cluster.partitions]
    longest = max((cluster.partitions[name].most_minutes for name in names), default=float("inf"))
    if minutes_of(profile.time) > longest:
        right = "a run that is not done by then goes on in the next job"
        yield "time", profile.time, f"{_where(names)} allows {spoken(longest)} at most; {right}"
    most = max((cluster.partitions[name].most_nodes for name in names), default=float("inf"))
    if profile.nodes > most:
        yield "nodes", profile.nodes, f"{_where(names)} allows a job {most} at most"


def _beyond_nodes(profile: Profile, nodes: list[Nodes], where: str, cluster: Cluster) -> Iterator[Fault]:
    """What the partition, or not a single one of its nodes, has; key by key."""
    there = _most_in_one(nodes)
    if profile.nodes > there:
        yield "nodes", profile.nodes, f"{where} has {there}"
    if profile.gpus_per_node:
        yield from _beyond_gpus(profile, nodes, where, cluster)
    cpus, each = max(alike.cpus for alike in nodes), profile.cpus_per_rank
    if profile.ranks <= cpus < profile.ranks * each:
        right = f"{profile.ranks} rank(s) can have {cpus // profile.ranks} each"
        yield "cpus_per_rank", each, f"a node of {where} has {cpus} CPUs at most; {right}"
    elif profile.ranks > cpus and profile.ranks_per_node is not None:  # else it is the GPUs that are too many
        yield "ranks_per_node", profile.ranks, f"a node of {where} has {cpus} CPUs at most, and a rank needs one"
    most = max(alike.megabytes for alike in nodes)
    if _megabytes(profile) > most:
        yield "memory", profile.memory, f"a node of {where} has {most}M at most; 0G is all that a node has"
    features = frozenset[str]().union(*(alike.features for alike in nodes))
    if missing := [name for name in _features(profile) if name not in features]:
        there_are = _legal(missing[0], features) if features else "they have none; leave the key out"
        yield "constraint", profile.constraint, f"no node of {where} has the feature {missing[0]}; {there_are}"


def _most_in_one(nodes: list[Nodes]) -> int:
    """Nodes of the partition that has most of these: a job runs in one."""
    counts: dict[str, int] = {}
    for alike in nodes:
        counts[alike.partition] = counts.get(alike.partition, 0) + alike.count
    return max(counts.values(), default=0)


def _beyond_gpus(profile: Profile, nodes: list[Nodes], where: str, cluster: Cluster) -> Iterator[Fault]:
    kinds = {kind for alike in nodes for kind in alike.gpus}
    most = max((alike.gpus_of(profile.gpu_type) for alike in nodes), default=0)
    if not kinds:
        others = dict.fromkeys(alike.partition for alike in cluster.nodes if alike.gpus)
        there = f"partitions with GPUs: {', '.join(others)}" if others else "nor has any other node; leave the key out"
        yield "gpus_per_node", profile.gpus_per_node, f"no node of {where} has a GPU; {there}"
    elif profile.gpu_type is not None and profile.gpu_type not in kinds:
        named = kinds - {""}
        there = _legal(profile.gpu_type, named) if named else "their GPUs have no types; leave the key out"
        yield "gpu_type", profile.gpu_type, f"no node of {where} has it; {there}"
    elif profile.gpus_per_node > most:
        of = f" {profile.gpu_type}" if profile.gpu_type else ""
        yield "gpus_per_node", profile.gpus_per_node, f"a node of {where} has {most}{of} at most"


def _beyond_all(profile: Profile, nodes: list[Nodes], where: str) -> Iterator[Fault]:
    """Each key fits some node, and yet too few nodes have all that is asked of one."""
    all_of: list[Callable[[Nodes], bool]] = [
        lambda alike: alike.gpus_of(profile.gpu_type) >= profile.gpus_per_node,
        lambda alike: alike.cpus >= profile.ranks * profile.cpus_per_rank,
        lambda alike: alike.megabytes >= _megabytes(profile),
    ]
    if re.fullmatch(r"[^|*\[\]()!]*", profile.constraint or ""):  # all of its features are asked of every node
        all_of.append(lambda alike: alike.features >= set(_features(profile)))
    fitting = _most_in_one([alike for alike in nodes if all(fits(alike) for fits in all_of)])
    if fitting < profile.nodes:
        what = "GPUs, CPUs, memory and features"
        yield "nodes", profile.nodes, f"{fitting} node(s) of {where} have all the {what} that are asked of each"


def _megabytes(profile: Profile) -> float:
    return 0.0 if profile.memory is None else int(profile.memory[:-1]) * MEGABYTES[profile.memory[-1]]


def _features(profile: Profile) -> list[str]:
    """The names in a constraint: a100&ib, [rack1|rack2], fast*2."""
    return re.findall(r"[\w.:=/-]+", re.sub(r"\*\d+", "", profile.constraint or ""))


def spoken(minutes: float) -> str:
    """1d12h; "" where there is no limit."""
    if minutes == float("inf"):
        return ""
    parts = (int(minutes // 1440), "d"), (int(minutes % 1440 // 60), "h"), (int(minutes % 60), "m")
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0m"


# ---------------------------------------------------------------- folders


def _refuse_folder(folder: Path) -> None:
    """Raises RecipeError where no run's folder can be made in it."""
    there = existing(folder)
    if not there.is_dir():
        raise RecipeError(f"output_dir = {str(folder)!r}: cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"output_dir = {str(folder)!r}: cannot be written: {there} is not yours to write to")


def _unshared(recipe: Recipe) -> Iterator[str]:
    """The folders that the nodes would have to see, and most probably do not: a line for each kind of them."""
    named = [("output_dir", recipe.output_dir), ("model.model_name_or_path", recipe.model.model_name_or_path)]
    named += [(f"data.{split}.path", path) for split, path in _data(recipe)]
    for key, teacher in teachers_of(recipe):
        named += [
            (f"{key}.{name}", path) for name in ("model_name_or_path", "cache") if (path := getattr(teacher, name))
        ]
    whys: dict[str, dict[Path, None]] = {}
    for key, path in named:
        if Path(path).is_absolute() and (why := why_unshared(Path(path))) is not None:
            whys.setdefault(why, {})[Path(path).parent if key.endswith(".path") else Path(path)] = None
    for why, places in whys.items():
        highest = [str(place) for place in places if not any(above in places for above in place.parents)]
        each = "each " if len(highest) > 1 else ""
        yield f"{', '.join(highest)}: {each}{why}; the nodes must see the same files there"


def _not_cached(recipe: Recipe, profile: Profile) -> Iterator[str]:
    """A line for each name of the hub that nodes without internet will not find."""
    if profile.internet:
        return
    cache = hub_cache({**os.environ, **profile.environment})
    named = [("model.model_name_or_path", "models", recipe.model.model_name_or_path)]
    named += [(f"data.{split}.path", "datasets", path) for split, path in _data(recipe)]
    for key, teacher in teachers_of(recipe):
        named += [(f"{key}.model_name_or_path", "models", name)] if (name := teacher.model_name_or_path) else []
    for key, kind, name in named:
        is_hub = not Path(name).is_absolute() and "://" not in name
        if is_hub and not (cache / f"{kind}--{name.replace('/', '--')}").exists():
            yield f"{key} = {shown(name)}: is not in {cache}, and the profile says that nodes have no internet"


def _no_image(profile: Profile, file: Path) -> Iterator[str]:
    image = profile.container.image if profile.container is not None else ""
    if Path(image).is_absolute() and not Path(image).exists():
        yield from lines(
            [("container.image", image, "is not there on this machine; the nodes must find it there")], file
        )


def hub_cache(environment: dict[str, str]) -> Path:
    """Where Hugging Face keeps what was taken from its hub."""
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _data(recipe: Recipe) -> list[tuple[str, str]]:
    return [(split, source.path) for split, source in sources_of(recipe)]
