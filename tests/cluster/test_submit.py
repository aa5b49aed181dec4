"""What sending a run fills in from the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_values

from fleetune.cluster.profile import Profile
from fleetune.cluster.submit import with_failures
from fleetune.schema import Recipe

PROFILE = Profile(time="4h", nodes=16, failures_per_node_day=0.0065)


def recipe(**checkpoint: Any) -> Recipe:
    return Recipe.model_validate(recipe_values(Path("/nowhere"), "sent", checkpoint=checkpoint))


def test_auto_gets_the_mean_time_between_failures_of_the_profiles_nodes() -> None:
    sent = with_failures(recipe(save_steps="auto"), PROFILE)
    assert sent.checkpoint.mtbf_hours == pytest.approx(24 / (16 * 0.0065))
    assert sent.checkpoint.save_steps == "auto"


def test_what_the_recipe_says_itself_stays() -> None:
    for asked in (recipe(save_steps="auto", mtbf_hours=30.0), recipe(save_steps=100), recipe()):
        assert with_failures(asked, PROFILE) == asked
    asked = recipe(save_steps="auto")
    assert with_failures(asked, Profile(time="4h")) == asked
