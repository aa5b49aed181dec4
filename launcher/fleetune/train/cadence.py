"""When `checkpoint.save_steps: auto` saves: from what a save and a step were measured to take, and how often jobs fail.

A save that stops training for w seconds, every t seconds, costs w / t of the time; a failure loses t / 2 on average,
once in the mean time M between failures. w / t + t / (2 M) is least at t = sqrt(2 w M) (Young 1974, doi
10.1145/361147.361115), and flat around it: with half of that interval, or double, it is a quarter more.

Nothing here reads a clock or knows its rank: from the same figures all ranks decide alike, as a collective save needs.
"""

from __future__ import annotations

import math

# Until a save was measured nothing says how often to: the interval follows from a save's own time. One that comes early
# costs a run that one save, and by ten steps a step's time is known too; a failure before it loses no more than these.
FIRST_STEPS = 10
# What else ends a run (a kill by hand, a full memory) stands in no mean time between failures. An hour between saves
# that each take a minute costs a sixtieth at most.
LONGEST_SECONDS = 3600.0


def young_seconds(save_seconds: float, mtbf_seconds: float) -> float:
    """Between two saves; at most the mean time between failures itself, where Young's formula holds no more."""
    return min(math.sqrt(2.0 * save_seconds * mtbf_seconds), mtbf_seconds)


def steps_between_saves(save_seconds: float | None, step_seconds: float | None, mtbf_hours: float) -> int:
    """Optimizer steps from one save to the next; None is what was not measured yet."""
    if save_seconds is None or step_seconds is None:
        return FIRST_STEPS
    seconds = min(young_seconds(save_seconds, mtbf_hours * 3600.0), LONGEST_SECONDS)
    return max(1, round(seconds / max(step_seconds, 1e-9)))


def averaged(known: float | None, measured: float) -> float:
    """Follows what changes for good within a few saves, and gives a single slow one half a say."""
    return measured if known is None else (known + measured) / 2.0


def sentence(save_seconds: float, step_seconds: float, mtbf_hours: float, is_given: bool) -> str:
    """What the log says of the interval, and what it was chosen from."""
    steps = steps_between_saves(save_seconds, step_seconds, mtbf_hours)
    every = "every step" if steps == 1 else f"every {steps} steps"
    return (
        f"saving {every} ({_span(steps * step_seconds)}): a save stops training for {_span(save_seconds)}, mean time "
        f"between failures {_span(mtbf_hours * 3600.0)}{'' if is_given else ' (no mtbf_hours given)'}"
    )


def _span(seconds: float) -> str:
    sizes = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))
    size, unit = next(((size, unit) for size, unit in sizes if seconds >= 2.0 * size), (1.0, "s"))
    value = seconds / size
    return f"{value:.2g} {unit}" if value < 10.0 else f"{value:.0f} {unit}"
