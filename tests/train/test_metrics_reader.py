"""metrics.jsonl read while it is written: each step once and whole, through resumes and half-written lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune.train.metrics_log import MetricsLog
from fleetune.train.metrics_reader import MetricsReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def read(reader: MetricsReader, all_of_them: bool = False) -> list[tuple[int, dict[str, Any]]]:
    return list(reader.steps(all_of_them))


def steps(reader: MetricsReader, all_of_them: bool = False) -> list[int]:
    return [step for step, _ in read(reader, all_of_them)]


def test_a_step_is_given_once_nothing_can_be_added_to_it(path: Path) -> None:
    log, reader = MetricsLog(path, resume_step=0), MetricsReader(path, after=0)
    log.write(1, {"loss": 1.0})
    assert read(reader) == []
    log.write(1, {"eval/loss": 2.0})
    log.write(2, {"loss": 3.0, "none": None})
    assert read(reader) == [(1, {"loss": 1.0, "eval/loss": 2.0})]
    assert read(reader, all_of_them=True) == [(2, {"loss": 3.0})]
    assert read(reader, all_of_them=True) == []


def test_what_is_known_already_is_passed_over(path: Path) -> None:
    log = MetricsLog(path, resume_step=0)
    for step in range(1, 6):
        log.write(step, {"loss": step})
    assert steps(MetricsReader(path, after=3), all_of_them=True) == [4, 5]


@pytest.mark.parametrize("checkpoint", [0, 2, 4, 5])
@pytest.mark.parametrize("again", [1, 2, 5, 7])
def test_what_a_resume_computes_again_is_given_once(path: Path, checkpoint: int, again: int) -> None:
    """Read to step 4, the fifth being held back; cut back to the checkpoint; then written on."""
    log, reader = MetricsLog(path, resume_step=0), MetricsReader(path, after=0)
    for step in range(1, 6):
        log.write(step, {"loss": step, "seconds": 0.5})
    given = read(reader)
    log.close()
    log = MetricsLog(path, resume_step=checkpoint)
    given += read(reader)  # while it is shorter than before
    for step in range(checkpoint + 1, checkpoint + again + 1):
        log.write(step, {"loss": step, "seconds": 0.75})
    given += read(reader)
    for step in range(checkpoint + again + 1, 13):
        log.write(step, {"loss": step, "seconds": 0.75})
    given += read(reader, all_of_them=True)
    assert [step for step, _ in given] == list(range(1, 13))
    assert all(values["loss"] == step for step, values in given)


def test_the_evaluation_that_a_resume_adds_to_the_last_step_is_given_with_it(path: Path) -> None:
    log, reader = MetricsLog(path, resume_step=0), MetricsReader(path, after=0)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 2.0})
    assert steps(reader) == [1]
    log.close()
    log = MetricsLog(path, resume_step=2)
    log.write(2, {"eval/loss": 3.0})
    assert read(reader, all_of_them=True) == [(2, {"loss": 2.0, "eval/loss": 3.0})]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "lo\0\0\0\0\0\0}\n{"step": 3, "loss": 3}\n'])
def test_a_line_that_is_not_whole_yet_is_waited_for(path: Path, torn: bytes) -> None:
    """Torn at its end; or with a hole, as a network file system shows what another machine is writing."""
    whole = b'{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n'
    path.write_bytes(whole[: whole.index(b"\n") + 1] + torn)
    reader = MetricsReader(path, after=0)
    assert steps(reader) == []
    path.write_bytes(whole)
    assert steps(reader, all_of_them=True) == [1, 2, 3]
