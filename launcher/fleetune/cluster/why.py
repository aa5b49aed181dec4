"""`fleetune why`: what happened to a run, and what to do, as a person would tell it."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from typing import Any

from fleetune import runs
from fleetune.attempts import last_step, unended
from fleetune.cluster import slurm
from fleetune.cluster.logs import last_words
from fleetune.cluster.verdict import given_up
from fleetune.ledger import ledger_of
from fleetune.report import duration, no_run
from fleetune.schema import RecipeError

# Why Slurm lets a job wait; %r of squeue.
WAITS = (
    (r"Priority", "jobs of higher priority go first", "Wait, or ask for fewer nodes or a shorter `time`."),
    (r"Resources", "the nodes it needs are at work", "Wait, or ask for fewer nodes."),
    (r"BeginTime", "Slurm holds it back for two minutes, as every requeued job", "Wait; it starts by itself."),
    (r"its start was moved up", "it was requeued and starts as soon as its nodes are free", "Wait."),
    (r"DependencyNeverSatisfied", "the run it waits for has ended before it was done", "Cancel it, submit it again."),
    (r"Dependency", "it waits for another run (--after)", "Wait, or see why the other run is not done."),
    (r"QOS|Assoc", "a limit of your account or qos is reached", "Wait for your other jobs, or see `fleetune doctor`."),
    (r"PartitionTimeLimit", "`time` is beyond what the partition allows", "Cancel it and lower `time` in the profile."),
    (r"Partition\w*Limit|BadConstraints", "the partition has no such nodes", "Cancel it and see `fleetune doctor`."),
    (r"NotAvail|NodeDown|DOWN|DRAIN", "nodes it needs are down, or reserved", "See `sinfo -R`, or take other nodes."),
    (r"JobHeldUser", "it is held", "`scontrol release` lets it go."),
    (r"JobHeldAdmin|launch failed", "it is held by Slurm or its administrators", "Ask them; see `scontrol show job`."),
)  # fmt: skip

# What is said in a failed rank's error, or in the reason an attempt ended with.
REMEDIES = (
    (
        r"the profile's setup",
        "Mend the `setup` lines of the cluster's profile, and submit it again. A line that may fail ends with || true.",
    ),
    (
        r"execve\(\)|srun: unrecognized option '--container|apptainer|FATAL: +Image",
        "What starts the ranks is not there on the node: see `container` in the cluster's profile (pyxis and apptainer "
        "are each a site's own), or make it available by a line of `setup`, as module load apptainer.",
    ),
    (
        r"out of memory|can't allocate memory|OutOfMemory|std::bad_alloc",
        "Lower training.per_device_train_batch_size and set training.global_batch_size to what it is now (the numbers "
        "stay the same), set model.gradient_checkpointing, or raise deepspeed.zero_stage.",
    ),
    (
        r"killed by SIGKILL",
        "Mostly it is the kernel, for want of memory: the node's `dmesg` knows, and on a cluster `sacct -j JOB "
        "--format=MaxRSS`. Make the batch smaller, or ask for more `memory` in the cluster's profile; the same command "
        "goes on from the last checkpoint.",
    ),
    (
        r"killed by SIG(SEGV|BUS|ILL|ABRT|FPE)",
        "A fault in compiled code, or in the node: see the log, try another node.",
    ),
    (
        r"\bhangs?\b",
        "Its log holds the stacks of every rank that could answer. One that is stopped or does not answer is where to "
        "look: its node, its network (NCCL_DEBUG: INFO in the profile's environment), its disk.",
    ),
    (
        r"is not finite|gradient's norm is|: \w+ is (nan|-?inf)",
        "Look at the rows that it names; lower training.learning_rate, or clip by training.max_grad_norm. The last "
        "checkpoint is good.",
    ),
    (
        r"No space left|quota|cannot be written",
        "Free some space, or lower checkpoint.save_total_limit; what is saved is whole. Then submit it again.",
    ),
    (r"Connection|NCCL|Gloo|socket", "Ranks lost each other: mostly another rank, or a node, died first. See its log."),
    (r"retries\.|without a step", "Mend what ends it, or raise its budget in the recipe; submit goes on with it."),
)


AT_ONCE = 130  # the exit code of a second Ctrl-C


def why(run: runs.Run) -> list[str]:
    """Paragraphs: what happened, what to do, where its time went.

    Raises:
        RecipeError: it is no run folder.
    """
    if (fault := no_run(run.path)) is not None:
        raise RecipeError(fault)
    entries = runs.read_jsonl(run.attempts)
    ends = [entry for entry in entries if entry["event"] == "end"]
    job = _job(run)
    happened, remedy = _now(run, job, ends)
    over, lost = job is None or not job.is_live, job.lost if job is not None else ""
    paragraphs = [" ".join([happened, *_lost(run, lost), *_before(ends, over, lost)]), f"What to do: {remedy}"]
    ledger = ledger_of(run)
    if ledger.wall >= 1.0:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in ledger.parts().items() if seconds >= 0.5)
        steps = ledger.recomputed_steps
        again = f"; {steps} step{'s were' if steps > 1 else ' was'} done again" if steps else ""
        paragraphs.append(f"Of {duration(ledger.wall)}, {100 * ledger.goodput:.0f} % were productive: {spent}{again}.")
    return paragraphs


def _job(run: runs.Run) -> slurm.Job | None:
    """The run's job as Slurm knows it now; None where it knows none."""
    with contextlib.suppress(slurm.SlurmFailed):  # the run's own files say what they know
        return slurm.look([run.path]).get(run.path)
    return None


def _now(run: runs.Run, job: slurm.Job | None, ends: list[dict[str, Any]]) -> tuple[str, str]:
    """Where the run stands, and what to do."""
    at = f"at step {last_step(run)} of {run.info().get('total_steps', 'a number it has not told')}"
    open_ = unended(run)
    if job is not None and job.is_live:
        if job.state == "PENDING":
            happened, remedy = _waits(job, at if ends or open_ else "not begun")
            if ends and ends[-1].get("kind") == "crash" and (known := _known_remedy(ends[-1])) is not None:
                remedy = f"{remedy} If it ends so again: {known}"
            return happened, remedy
        place = f"on {job.nodes}" if job.nodes else "on its nodes"
        if job.state in ("RUNNING", "COMPLETING") and open_:
            return f"Job {job.id} is at work {place}: attempt {open_[-1]['attempt']}, {at}.", "nothing; it gets on."
        if job.state in ("RUNNING", "COMPLETING", "CONFIGURING"):
            return f"Job {job.id} is {job.state.lower()} {place}, and trains in a moment.", "nothing; wait."
        return (
            f"Job {job.id} is {job.state.lower().replace('_', ' ')}.",
            "`scontrol show job` says more.",
        )
    if open_:
        return _cut_off(run, job, open_[-1], at)
    if not ends:
        if (run.path / "job.json").exists():
            if job is not None and job.state.startswith("CANCELLED"):
                return _cancelled(run, job)
            how = "is not known to Slurm any more" if job is None else f"ended as {job.state}"
            return (
                f"Its job {how}, and no attempt has begun. {_script_said(run)}",
                "read that; `fleetune doctor --cluster PROFILE` looks for what is wrong; then submit it again.",
            )
        return "It has not begun.", "`fleetune run` or `fleetune submit` starts it."
    is_cancelled = (run.path / "cancel.json").exists()
    if is_cancelled and ends[-1].get("kind") not in (None, "done", "wrong", "cancel"):  # an end that another follows
        waited = f"It was cancelled while it waited for its next attempt, {at}."
        return waited, "the same command again goes on from the last checkpoint."
    return _ended(run, ends[-1], at)


def _cancelled(run: runs.Run, job: slurm.Job) -> tuple[str, str]:
    """Before it began: by a person, or by Slurm, which cancels what waits in vain."""
    sent = runs.read_json(run.path / "job.json")
    after = sent.get("after")
    if not sent.get("waits_for") or (run.path / "cancel.json").exists():
        return f"Job {job.id} was cancelled before it began.", "submit it again, if it is still wanted."
    return (
        f"Job {job.id} waited for {after}, and was cancelled: that run's job ended before the run was done.",
        f"see `fleetune why {after}`; once that is in the queue again, or done, submit this one again.",
    )


def _waits(job: slurm.Job, at: str) -> tuple[str, str]:
    for pattern, meaning, remedy in WAITS:
        if re.search(pattern, job.reason):
            return f"Job {job.id} waits in the queue, {at}: {meaning} ({job.reason}).", remedy
    return f"Job {job.id} waits in the queue, {at}: {job.reason}.", "wait; `scontrol show job` says more."


def _cut_off(run: runs.Run, job: slurm.Job | None, start: dict[str, Any], at: str) -> tuple[str, str]:
    if runs.is_at_work(run):
        return (
            f"Attempt {start['attempt']} is at work on {', '.join(start['nodes'])}, {at}.",
            "nothing; it gets on.",
        )
    ended = f"; Slurm says {job.state} of job {job.id}" if job is not None else ""
    cancelled = (run.path / "cancel.json").exists()
    what = "was cancelled at once" if cancelled else "was ended from outside, without a word"
    return (
        f"Attempt {start['attempt']} on {', '.join(start['nodes'])} {what}, {at}{ended}.",
        "the same command again goes on from the last checkpoint.",
    )


def _ended(run: runs.Run, end: dict[str, Any], at: str) -> tuple[str, str]:
    reason, _, where = end["reason"].partition("\n")
    if end["exit_code"] == runs.DONE:
        return f"It is done, {at}.", f"nothing; the model stands in {run.model}."
    if end["exit_code"] == runs.SAVED or end.get("kind") == "cancel":
        return f"It is not at work, {at}: {reason}.", "the same command again goes on from there."
    verdict = given_up(run)
    said = f"It has ended, {at}, and does not go on by itself: {reason}."
    if verdict is not None:
        said += f" It was {verdict.partition(':')[0]}."
    if where:
        said += f" {' '.join(where.split())}."
    if (remedy := _known_remedy(end)) is not None:
        return said, remedy
    if end["exit_code"] == AT_ONCE:
        return said, "the same command goes on from the last checkpoint, or begins again where there is none yet."
    return said, "mend what the message names (the rank's log says more); the same command goes on from there."


def _known_remedy(end: dict[str, Any]) -> str | None:
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, end["reason"], re.IGNORECASE)), None)


def _lost(run: runs.Run, how: str) -> list[str]:
    """The start that Slurm ended and that the next attempt will end in the run's files."""
    if not how:
        return []
    open_ = unended(run)
    what = f"Attempt {open_[-1]['attempt']} on {', '.join(open_[-1]['nodes'])}" if open_ else "Its last start"
    return [f"{what} was lost: {how}."]


def _before(ends: list[dict[str, Any]], over: bool, lost: str = "") -> list[str]:
    """The attempts before this one, by what ended them."""
    before = ends[:-1] if over else ends
    plain = {runs.DONE: "done", runs.SAVED: "stop", AT_ONCE: "stop at once"}
    counts = Counter(end.get("kind") or plain.get(end["exit_code"], "failure") for end in before)
    counts["failure"] += counts.pop("wrong", 0)
    if not before:
        return []
    kinds = ", ".join(f"{count} by {kind.replace('_', ' ')}" for kind, count in counts.items() if count)
    sentence = f"{len(before)} earlier attempt{'s' * (len(before) > 1)} ended: {kinds}."
    if not over and not lost:  # else it is not the last
        last = ends[-1]
        sentence += f" The last, {duration(last['seconds'] or 0)} long: {last['reason'].partition(chr(10))[0]}."
    return [sentence]


def _script_said(run: runs.Run) -> str:
    words = last_words(run, most=1)
    return f"Its script said last: {words[0]} ({words[1]})." if words else "Its script has said nothing."
