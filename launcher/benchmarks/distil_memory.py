"""A distillation step of a language model, without the logits against with them: memory and time, head by head.

    python launcher/benchmarks/distil_memory.py [--rounds 5]      # about 6 minutes on 2 cores

Two Llamas of two layers, student and teacher of widths 256 and 512, in fp32, 1,024 tokens a step, heads of 32,000 and
128,256 rows. `fused` and `plain` are what `kernels: torch` and `kernels: reference` make of one recipe's losses; Liger
is its fused Jensen-Shannon loss on the same hidden states, where liger-kernel is installed. A step is the teacher's
forward pass, the student's, and the backward pass; memory is its height beyond the weights and the gradients. On a GPU
the weights are in bf16 and `fused` is Triton's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "kernels"))
from allocation import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from fleetune.schema import Recipe
from fleetune.train.alignment import Asked, Outputs, run
from fleetune.train.batches import IGNORED, MicroBatch
from fleetune.train.head import fuse_head
from fleetune.train.objectives import build_terms
from fleetune.train.window import Replay, weighted

HEADS, TOKENS, WIDTHS = (32_000, 128_256), 1024, (256, 512)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
DIVERGENCES = ("forward_kl", "jsd")
SIDES = {"plain": "reference", "fused": "auto"}

Step = Callable[[], dict[str, torch.Tensor]]  # -> the gradients


def recipe(kernels: str, divergence: str) -> Recipe:
    losses = [
        {"kind": "cross_entropy", "weight": 0.5},
        {"kind": "distillation", "weight": 0.5, "temperature": 2.0, "divergence": divergence},
    ]
    values = {
        "name": "distil-memory",
        "task": "causal_lm",
        "model": {"model_name_or_path": "student"},
        "data": {"train": {"path": "train"}},
        "teacher": {"model_name_or_path": "teacher"},
        "kernels": kernels,
        "losses": losses,
    }
    return Recipe.model_validate(values)


def model(rows: int, width: int, *, fused: bool) -> Any:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width
    )
    made = LlamaForCausalLM(config).to(DEVICE, DTYPE)
    if fused:
        fuse_head(made)
    return made


def batch(rows: int) -> MicroBatch:
    ids = torch.randint(0, rows, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(TOKENS // 2) < TOKENS // 2 - 1, ids.roll(-1, 1), IGNORED)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    supervised = torch.nonzero(labels.flatten() != IGNORED).flatten()
    made = MicroBatch(inputs, labels, torch.ones(ids.shape), torch.arange(2).numpy(), TOKENS, 2, supervised)
    return made.to(DEVICE)


def ours(rows: int, kernels: str, divergence: str) -> Step:
    """A step as the loop makes it."""
    fused = kernels != "reference"
    student, teacher = (model(rows, width, fused=fused) for width in WIDTHS)
    micro = batch(rows)
    terms = build_terms(recipe(kernels, divergence), DEVICE, shares=[1.0])
    counts = [term.divisor(micro) for term in terms]

    def loss_of(taught: Outputs, outputs: Outputs) -> torch.Tensor:
        return weighted(terms, 0.0, [taught], micro, Replay(), counts, outputs)[-1]

    def step() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            taught = run(teacher, teacher, micro.inputs, Asked(), lambda outputs: outputs)
        loss = run(student, student, micro.inputs, Asked(), functools.partial(loss_of, taught))
        return gradients(student, loss)

    return step


def liger(rows: int) -> Step:
    """Its loss has the same two parts: cross-entropy, and the Jensen-Shannon divergence at the temperature."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, teacher = (model(rows, width, fused=False) for width in WIDTHS)
    micro = batch(rows)
    loss_of = LigerFusedLinearJSDLoss(0.5, 0.5, temperature=2.0, ignore_index=IGNORED, compiled=False)

    def hidden(of: Any) -> torch.Tensor:
        states: torch.Tensor = of.model(**micro.inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    def step() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            taught = hidden(teacher)
        loss = loss_of(
            hidden(student), student.lm_head.weight, taught, teacher.lm_head.weight.detach(), micro.labels.flatten()
        )
        return gradients(student, loss)

    return step


def gradients(student: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(student.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def steps_of(rows: int, divergence: str) -> dict[str, Step]:
    made = {name: ours(rows, kernels, divergence) for name, kernels in SIDES.items()}
    if divergence == "jsd":
        try:
            made["liger"] = liger(rows)
        except ImportError:
            print("liger-kernel is not installed: left out", flush=True)
    return made


def height(step: Step) -> float:
    """MB at the step's height, without the gradients that it returns."""
    returned = sum(gradient.numel() * gradient.element_size() for gradient in step().values())  # warms up too
    if DEVICE.type == "cpu":
        return (peak_bytes(step) - returned) / 1e6
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before - returned) / 1e6


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(step: Step, truth: dict[str, torch.Tensor]) -> float:
    """Of the whole gradient, relative."""
    mine = step()
    off = sum(float((mine[name] - gradient).double().square().sum()) for name, gradient in truth.items())
    return float((off / sum(float(g.double().square().sum()) for g in truth.values())) ** 0.5)


def measure(rows: int, divergence: str, rounds: int) -> dict[str, Any]:
    steps = steps_of(rows, divergence)
    memory = {name: height(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):  # in turn, so that a slow moment is not one side's alone
        for name, step in steps.items():
            times[name].append(seconds(step))
    found = {name: {"memory_mb": round(memory[name], 1), "seconds": statistics.median(times[name])} for name in steps}
    found["fused"]["gradient_difference"] = difference(steps["fused"], steps["plain"]())
    for name, figures in found.items():
        figures["memory_ratio"] = round(figures["memory_mb"] / found["plain"]["memory_mb"], 4)
        figures["time_ratio"] = round(figures["seconds"] / found["plain"]["seconds"], 3)
        print(f"{rows:7} rows  {divergence:10}  {name:6} {figures}", flush=True)
    return {"rows": rows, "divergence": divergence, "sides": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = [measure(rows, divergence, arguments.rounds) for rows in HEADS for divergence in DIVERGENCES]
    packages = (*record.PACKAGES, "liger-kernel")
    command = f"python launcher/benchmarks/distil_memory.py --rounds {arguments.rounds}"
    record.write(f"distil_memory_{DEVICE.type}", command, {"tokens": TOKENS, "cases": found}, packages=packages)


if __name__ == "__main__":
    main()
