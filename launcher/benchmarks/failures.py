"""How much of its time a job trains when nodes fail, saving as `checkpoint.save_steps: auto` does: a simulation.

    python launcher/benchmarks/failures.py        # 1 minute on 1 core; writes results/failures.json, slurm/failures.svg
    python launcher/benchmarks/failures.py table

Simulated are the clock, the failures and the times that a step, a save and a restart take. When to save is decided by
`fleetune.train.cadence` as the loop does, from what it has measured so far, and when to give up by the supervisor's own
`given_up`. Failures come at random and independently (exponential gaps); every policy meets the same ones. A failure
takes what was trained since the last whole save, one in a save or a restart too; the next attempt begins at once.

The share of time that counts (effective training time ratio) is compared with two formulas, for M the mean time between
failures, u the restart, w the save and t Young's interval:

    published   (1 - (u + t / 2) / M) / (1 + w / t)           arXiv 2410.21680, first order: a failure at a time
    exact       t / (M exp(u / M) (exp((t + w) / M) - 1))     Daly 2006, doi 10.1016/j.future.2004.11.016
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record

from fleetune import runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cluster.verdict import given_up
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe
from fleetune.train import cadence

PLOT = Path(__file__).parents[2] / "slurm" / "failures.svg"
GPUS = [8 * 2**doubling for doubling in range(12)]  # 8 to 16,384
MTBF_HOURS = (1.0, 4.0, 8.0)
TRACES, FAILURES = 5, 400  # so many traces of so many failures each
FIRST_SAVE = 1.5  # the first save of an attempt allocates what later ones find: so much longer
SAVES, STEPS = 0.2, 0.05  # each save, and the steps between two, are at random up to so much longer or shorter
# What the published formula gives at 4 hours: save and restart in seconds, and the share of time that counts.
PUBLISHED = ((60.0, 300.0, 0.893), (20.0, 180.0, 0.936), (2.0, 90.0, 0.977))
LONG_RESTARTS = (600.0, 1200.0, 1800.0, 3600.0)  # at 1 hour and a save of 60 s, where the first order breaks down
OTHERS = ("half", "double", "10 min", "1 h")


@dataclass(frozen=True)
class Job:
    """What a job of this size is taken to need; assumed, not measured."""

    gpus: int
    step_seconds: float
    save_seconds: float  # training stands still
    restart_seconds: float  # from a failure to the first step: queue, start, restore


@dataclass(frozen=True)
class Stand:
    """Where training stands, and what it has measured by then; a checkpoint holds one."""

    step: int = 0
    save_seconds: float | None = None
    step_seconds: float | None = None


def job_of(gpus: int) -> Job:
    """From 1 s a step, 2 s a save and 90 s a restart with 8 GPUs to 6, 60 and 300 s with 16,384."""
    size = math.log2(gpus / 8) / 11
    return Job(gpus, round(6.0**size, 2), round(2.0 * 30.0**size, 1), round(90.0 + 210.0 * size))


def attempt(
    job: Job, begin: Stand, seconds: float, restart: float, every: Callable[[Stand], int], chance: random.Random
) -> tuple[Stand, int]:
    """One attempt, ended after so many seconds: the newest checkpoint then, and the step that was reached."""
    clock, saved, now, first = restart, begin, begin, FIRST_SAVE
    while True:
        steps = every(now)
        pace = job.step_seconds * chance.uniform(1 - STEPS, 1 + STEPS)
        if clock + steps * pace > seconds:
            return saved, now.step + max(0, int((seconds - clock) / pace))
        blocked = first * job.save_seconds * chance.uniform(1 - SAVES, 1 + SAVES)
        clock += steps * pace + blocked
        if clock > seconds:
            return saved, now.step + steps
        saved = Stand(now.step + steps, now.save_seconds, now.step_seconds)  # taken before the save is timed
        now = Stand(saved.step, cadence.averaged(now.save_seconds, blocked), pace)
        first = 1.0


def interval_seconds(job: Job, mtbf_hours: float) -> float:
    return cadence.young_seconds(job.save_seconds, mtbf_hours * 3600)


def policy(name: str, job: Job, mtbf_hours: float) -> Callable[[Stand], int]:
    """Steps from where training stands to its next save."""
    if name == "auto":
        return lambda now: cadence.steps_between_saves(now.save_seconds, now.step_seconds, mtbf_hours)
    seconds = {
        "half": interval_seconds(job, mtbf_hours) / 2,
        "double": interval_seconds(job, mtbf_hours) * 2,
        "10 min": 600.0,
        "1 h": 3600.0,
    }[name]
    steps = max(1, round(seconds / job.step_seconds))
    return lambda now: steps


def gaps_of(trace: int, mtbf_hours: float, failures: int) -> list[float]:
    """Seconds from each failure to the next."""
    chance = random.Random(f"failures {trace}")
    return [chance.expovariate(1.0) * mtbf_hours * 3600 for _ in range(failures)]


def ratio(job: Job, mtbf_hours: float, name: str, trace: int, failures: int) -> float:
    """The share of the time that went into steps which were not lost."""
    stand, reached, restart, chance = Stand(), 0, 0.0, random.Random(f"times {trace}")
    gaps = gaps_of(trace, mtbf_hours, failures)
    for gap in gaps:
        stand, reached = attempt(job, stand, gap, restart, policy(name, job, mtbf_hours), chance)
        restart = job.restart_seconds
    return reached * job.step_seconds / sum(gaps)


def published(job: Job, mtbf_hours: float) -> float:
    mtbf, interval = mtbf_hours * 3600, interval_seconds(job, mtbf_hours)
    return (1 - (job.restart_seconds + interval / 2) / mtbf) / (1 + job.save_seconds / interval)


def exact(job: Job, mtbf_hours: float) -> float:
    mtbf, interval = mtbf_hours * 3600, interval_seconds(job, mtbf_hours)
    return interval / (mtbf * math.exp(job.restart_seconds / mtbf) * math.expm1((interval + job.save_seconds) / mtbf))


def case(job: Job, mtbf_hours: float, others: tuple[str, ...], traces: int, failures: int) -> dict[str, Any]:
    """The job's figures at this mean time between failures."""
    shares = {
        name: [ratio(job, mtbf_hours, name, trace, failures) for trace in range(traces)] for name in ("auto", *others)
    }
    return {
        **asdict(job),
        "mtbf_hours": mtbf_hours,
        "interval_seconds": round(interval_seconds(job, mtbf_hours), 1),
        "published": round(published(job, mtbf_hours), 4),
        "exact": round(exact(job, mtbf_hours), 4),
        **{name: round(statistics.mean(found), 4) for name, found in shares.items()},
        "auto_of_each_trace": [round(share, 4) for share in shares["auto"]],
    }


def endurance(job: Job, mtbf_hours: float, failures: int) -> dict[str, Any]:
    """How often the supervisor gives the run up for want of progress; it is sent anew each time.

    The budget of node failures is lifted: it would be the end of every run that is long enough.
    """
    values = {"name": "job", "task": "classification", "model": {"model_name_or_path": "m"}}
    values |= {"data": {"train": {"path": "d"}}, "retries": {"node_failure": 10 * failures}}
    recipe = Recipe.model_validate(values)
    stand, restart, chance, sent = Stand(), 0.0, random.Random("times"), list[int]()
    gaps = gaps_of(0, mtbf_hours, failures)
    with tempfile.TemporaryDirectory() as place:
        run, number = runs.Run(Path(place) / "0"), 0
        for index, gap in enumerate(gaps):
            if number == 0:
                run = runs.Run(Path(place) / str(len(sent)))
                run.path.mkdir()
                run.recipe_file.write_text(dump_recipe(recipe), encoding="utf-8")
            number = start_attempt(run, ["node"])
            before, (stand, _) = stand.step, attempt(job, stand, gap, restart, policy("auto", job, mtbf_hours), chance)
            if stand.step > before:
                told = {"first_step": before + 1, "step": stand.step, "saved_step": stand.step}
                runs.write_json(run.logs(number) / "progress.json", told)
            end_attempt(run, number, runs.FAILED, "a node failed", kind="node_failure")
            restart = job.restart_seconds
            if given_up(run) is not None:
                sent.append(index)
                number = 0
    hours = sum(gaps) / 3600
    return {
        "gpus": job.gpus,
        "mtbf_hours": mtbf_hours,
        "failures": failures,
        "given_up": len(sent),
        "hours_until": round(hours / len(sent)) if sent else None,
    }


def simulate(gpus: list[int], traces: int, failures: int) -> dict[str, Any]:
    """All figures, as they are recorded."""
    return {
        "traces": traces,
        "failures_a_trace": failures,
        "published_figures": [
            {"figure": figure, **case(Job(0, 5.0, save, restart), 4.0, (), traces, failures)}
            for save, restart, figure in PUBLISHED
        ],
        "long_restarts": [case(Job(0, 6.0, 60.0, restart), 1.0, (), traces, failures) for restart in LONG_RESTARTS],
        "jobs": [case(job_of(size), hours, OTHERS, traces, failures) for hours in MTBF_HOURS for size in gpus],
        "given_up": [endurance(job_of(size), hours, failures) for hours in MTBF_HOURS for size in (gpus[0], gpus[-1])],
    }


def table(figures: dict[str, Any]) -> None:
    for one in figures["published_figures"]:
        print(
            f"save {one['save_seconds']:.0f} s, restart {one['restart_seconds']:.0f} s, failures every 4 h: "
            f"{one['auto']:.3f}, published {one['figure']}"
        )
    for one in figures["long_restarts"]:
        print(
            f"save {one['save_seconds']:.0f} s, restart {one['restart_seconds']:.0f} s, failures every 1 h: "
            f"{one['auto']:.3f}, by the published formula {one['published']:.3f}, exact {one['exact']:.3f}"
        )
    print("| MTBF | GPUs | step, save, restart | interval | auto | published | exact | " + " | ".join(OTHERS) + " |")
    for one in figures["jobs"]:
        others = " | ".join(f"{one[name]:.3f}" for name in OTHERS)
        needs = f"{one['step_seconds']:.1f} s, {one['save_seconds']:.1f} s, {one['restart_seconds']:.0f} s"
        print(
            f"| {one['mtbf_hours']:.0f} h | {one['gpus']:,} | {needs} | {one['interval_seconds'] / 60:.1f} min | "
            f"{one['auto']:.3f} | {one['published']:.3f} | {one['exact']:.3f} | {others} |"
        )
    for against in ("published", "exact"):
        errors = {(one["mtbf_hours"], one["gpus"]): one["auto"] - one[against] for one in figures["jobs"]}
        worst = max(errors, key=lambda key: abs(errors[key]))
        print(f"furthest from {against}: {100 * errors[worst]:+.2f} points at {worst[0]:.0f} h, {worst[1]:,} GPUs")
    for name in OTHERS:
        gains = [one["auto"] - one[name] for one in figures["jobs"]]
        print(f"auto against {name}: {100 * min(gains):+.2f} to {100 * max(gains):+.2f} points")
    for one in figures["given_up"]:
        print(f"{one['gpus']:,} GPUs at {one['mtbf_hours']:.0f} h: given up {one['given_up']} times in "
              f"{one['failures']} failures, every {one['hours_until']} h")  # fmt: skip


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": "failures"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for hours, colour in zip(MTBF_HOURS, ("tab:red", "tab:orange", "tab:green"), strict=True):
        jobs = [one for one in figures["jobs"] if one["mtbf_hours"] == hours]
        gpus = [one["gpus"] for one in jobs]
        left.plot(gpus, [one["published"] for one in jobs], color=colour, linewidth=1)
        left.plot(gpus, [one["auto"] for one in jobs], ".", color=colour, label=f"every {hours:.0f} h")
        if hours == 4.0:
            for name in OTHERS:
                right.plot(gpus, [100 * (one["auto"] - one[name]) for one in jobs], ".-", linewidth=1, label=name)
    left.set_ylabel("share of time that counts")
    left.set_title("save_steps: auto; lines: the published formula", fontsize=8)
    left.legend(title="a failure", frameon=False)
    right.set_title("points lost against auto, a failure every 4 h", fontsize=8)
    right.legend(title="interval", frameon=False)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 64, 512, 4096, 16384], ["8", "64", "512", "4,096", "16,384"])
        axis.set_xlabel("GPUs")
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "table", "plot"), nargs="?", default="all")
    what = parser.parse_args().what
    if what == "all":
        command = "python launcher/benchmarks/failures.py"
        record.write("failures", command, simulate(GPUS, TRACES, FAILURES), packages=("fleetune", "matplotlib"))
    figures = record.read("failures")
    if figures is None:
        raise SystemExit("nothing is recorded yet")
    table(figures)
    if what != "table":
        draw(figures, PLOT)


if __name__ == "__main__":
    main()
