"""`fleetune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleetune import sizes
from fleetune.terminal import answer_of, fail


def export(
    run_or_model: Annotated[
        Path, typer.Argument(help="A run's folder, or a model folder that Fleetune wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Works a LoRA adapter into the weights.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the model's own when absent.", show_default=False)
    ] = None,
) -> None:
    """Write a trained model as a folder to deploy, and see that it says what the trained one says."""
    legal = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in legal:
        fail(f"--dtype {dtype}: legal values: {', '.join(legal)}")
    arguments = [str(run_or_model), str(out), *(["--merge"] if merge else [])]
    found = answer_of("export", arguments + (["--dtype", dtype] if dtype is not None else []))
    what = f"{sizes.count(found['parameters'])} parameters in {found['dtype']}" if "dtype" in found else "the adapter"
    typer.echo(f"{found['folder']}: {what}, {sizes.volume(found['bytes'])}")
    if "difference" in found:
        typer.echo(f"loaded again, its logits differ by {found['difference']:.1e} of the largest")
    if "from_quantized" in found:
        typer.echo(
            "the adapter was trained over 4-bit weights and is merged into whole ones: "
            f"from the trained model's, the logits differ by {found['from_quantized']:.1e} of the largest"
        )
