"""Language models: the same losses under ZeRO 0 to 3 over 1, 2 and 4 ranks, tied or not, with the logits or without
them, packed or not; and a real one from its data to a folder that Transformers loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Job, make_run, work_together
from safetensors.torch import load_file
from tiny import recipe_values, write_language_model, write_prompts

from fleetune import runs
from fleetune.train.metrics_log import read_metrics
from fleetune.verify import difference

STAGES, WORLD_SIZES, HEADS = (0, 1, 2, 3), (1, 2, 4), ("tied", "untied")
Key = tuple[str, str, int, int]  # head, kernels, stage, ranks


def values(folder: Path, name: str, head: str, **sections: Any) -> dict[str, Any]:
    made = recipe_values(folder, name, **{"model": {"model_name_or_path": str(folder / head)}, **sections})
    return {**made, "task": "causal_lm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    for head in HEADS:
        write_language_model(folder / head, tie_word_embeddings=head == "tied")
    write_prompts(folder / "train.jsonl", 43)
    write_prompts(folder / "validation.jsonl", 21, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Key, list[dict[str, Any]]]:
    """Three steps, the last of a short window; fused everywhere, and with the model's own logits at two stages."""
    keys: list[Key] = [(head, "torch", s, n) for head in HEADS for s in STAGES for n in WORLD_SIZES]
    keys += [(head, "reference", stage, ranks) for head in HEADS for stage, ranks in ((0, 1), (3, 2))]
    made: dict[Key, runs.Run] = {}
    for key in keys:
        head, kernels, stage, ranks = key
        recipe = values(
            folder,
            "-".join(map(str, key)),
            head,
            kernels=kernels,
            deepspeed={"zero_stage": stage},
            data={"weight_column": "weight"},
            training={"max_steps": 3, "max_grad_norm": 0.5, "per_device_train_batch_size": 2},
        )
        made[key] = make_run(recipe, ranks)
    work_together([(n, [Job(str(run.path)) for key, run in made.items() if key[3] == n]) for n in WORLD_SIZES])
    return {key: read_metrics(run.metrics) for key, run in made.items()}


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_those_of_the_plain_logits_on_one_rank(trained: dict[Key, Any], head: str) -> None:
    truth = trained[head, "reference", 0, 1]
    assert truth[0]["train/loss"] > 2.5
    for key, steps in trained.items():
        if key[0] == head:
            for expected, step in zip(truth, steps, strict=True):
                for name in ("train/loss", "train/grad_norm"):
                    assert step[name] == pytest.approx(expected[name], rel=1e-5), (key, expected["step"], name)
            assert steps[-1]["eval/perplexity"] == pytest.approx(truth[-1]["eval/perplexity"], rel=1e-5)
            assert steps[-1]["data/order"] == truth[-1]["data/order"]


CUTS = (  # kernels, packed, ranks, micro-batches
    ("torch", False, 1, 1),
    ("torch", True, 1, 1),
    ("torch", True, 1, 4),
    ("torch", True, 2, 2),
    ("torch", False, 2, 2),
    ("reference", True, 1, 1),
)


@pytest.fixture(scope="module")
def gradients(folder: Path) -> dict[tuple[str, bool, int, int, bool], dict[str, torch.Tensor]]:
    """Of all rows at once, by (kernels, packed, ranks, micro-batches, fp64)."""
    jobs: dict[tuple[str, bool, int, int, bool], Job] = {}
    for kernels, packed, ranks, micro in CUTS:
        size = 64 // ranks // micro
        training = {
            "global_batch_size": 64,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": micro,
        }
        recipe = values(
            folder,
            f"gradient-{kernels}-{packed}-{ranks}x{micro}",
            "tied",
            kernels=kernels,
            deepspeed={"zero_stage": 0},
            data={"weight_column": "weight", "packing": packed},
            training=training,
        )
        run = make_run(recipe, ranks).path
        for float64 in (False, True):
            out = run / f"{float64}.safetensors"
            jobs[kernels, packed, ranks, micro, float64] = Job(str(run), str(out), 0, float64)
    work_together([(n, [job for key, job in jobs.items() if key[2] == n]) for n in (1, 2)])
    return {key: load_file(str(job.gradient)) for key, job in jobs.items()}


@pytest.mark.parametrize(("float64", "bound"), [(True, 1e-10), (False, 1e-6)])
def test_the_gradient_is_the_same_packed_or_not_however_it_is_cut(
    gradients: dict[Any, dict[str, torch.Tensor]], float64: bool, bound: float
) -> None:
    truth = gradients["torch", False, 1, 1, True]
    assert float(sum(tensor.square().sum() for tensor in truth.values())) > 1e-4
    for key, found in gradients.items():
        if key[-1] == float64:
            assert difference(truth, found).whole < bound, key


def test_no_token_of_a_pack_sees_another_example(folder: Path) -> None:
    """The logits of each are those that it has by itself."""
    from transformers import AutoModelForCausalLM

    from fleetune.train.batches import collate_tokens
    from fleetune.train.data import prepare
    from fleetune.train.model import load_tokenizer

    recipe = make_run(values(folder, "pack", "tied"), 1).recipe()
    split = prepare(recipe, load_tokenizer(recipe)).splits["train"]
    model = AutoModelForCausalLM.from_pretrained(folder / "tied").double().eval()
    rows = np.array([3, 7, 1])
    micro = collate_tokens(split, [rows, np.array([2])], 0, packed=True)
    with torch.no_grad():
        together = model(**micro.inputs, use_cache=False).logits[0]
        alone = [model(**collate_tokens(split, [rows[i : i + 1]], 0).inputs).logits[0] for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- a real one

ROOT = Path(__file__).parents[2]


def test_a_model_folder_is_what_transformers_loads(tmp_path: Path, shared_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fleetune(*arguments: str) -> str:
        command = [sys.executable, "-m", "fleetune.cli", *arguments]
        environment = {**os.environ, "FLEETUNE_DATA": str(shared_data)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shorter = ["training.max_steps=4", "data.train.limit=60", "data.max_length=192", f"output_dir={tmp_path}"]
    fleetune("run", "recipes/lm/stories260k_alpaca.yaml", "--nproc-per-node", "2", *shorter)
    (run,) = tmp_path.iterdir()
    report = runs.read_json(run / "eval.json")
    assert 1 < report["validation"]["perplexity"] < 100
    assert f"{report['validation']['perplexity']:.4f}" in fleetune("eval", str(run))
    model: Any = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = AutoTokenizer.from_pretrained(run / "model")("Once upon a time", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
