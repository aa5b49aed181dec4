"""What this machine has, for `fleetune doctor`: `python -m fleetune.train.machine torch` (or `wandb`) prints JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any


def devices() -> dict[str, Any]:
    """torch as it runs here."""
    import torch

    from fleetune.train.prepare import has_fast_bf16

    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old
        warnings.simplefilter("always")
        has_gpus = torch.cuda.is_available()
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPUs"
    return {
        "version": torch.__version__,
        "built_for": built_for,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_gpus else [],
        "bf16": torch.cuda.is_bf16_supported() if has_gpus else has_fast_bf16(),
        "said": str(caught[0].message).partition("\n")[0] if caught else "",
    }


def tracking() -> dict[str, Any]:
    """What keeps a run from Weights & Biases, as training itself would find it; no key is shown."""
    from fleetune.train.wandb_run import obstacle

    return {"obstacle": obstacle(3.0)}


def main() -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the answer alone goes to stdout
    json.dump(devices() if sys.argv[1] == "torch" else tracking(), output)
    output.flush()


if __name__ == "__main__":
    main()
