"""A program that answers with a JSON report: the report alone goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from fleetune import runs
from fleetune.schema import RecipeError


def print_report(make: Callable[[], dict[str, Any]]) -> int:
    """The exit code: WRONG, with the error, where what the user gave does not fit."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from fleetune.train.model import ModelError
    from fleetune.train.sources import DataError

    try:
        report = make()
    except (RecipeError, DataError, ModelError) as error:
        print(f"fleetune: error: {error}", file=sys.stderr)
        return runs.WRONG
    json.dump(report, output)
    output.flush()
    return runs.DONE
