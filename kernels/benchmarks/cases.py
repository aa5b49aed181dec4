"""What is measured: each op on a real shape, beside eager PyTorch, torch.compile and the public kernels for the same.

A side is a function of the inputs that returns the loss; the gradients are taken by the harness. A side is left out
where its package is not installed, and its error is shown where it cannot run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.nn import functional

import fleetune_kernels as ours

Inputs = dict[str, torch.Tensor]
Side = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    shape: str
    inputs: Callable[[torch.device], Inputs]
    wanted: tuple[str, ...]  # inputs whose gradients are taken
    sides: dict[
        str, Side
    ]  # ours first; `eager` is what the ratios are to, and where it is missing the case is ours alone
    eager_runs: bool = True


def for_device(device: str, slow_peers: bool = False) -> list[Case]:
    return _on_cpu(slow_peers) if device == "cpu" else _on_gpu()


def _on_cpu(slow_peers: bool) -> list[Case]:
    rows, classes, width, fp32 = 4096, 30522, 384, torch.float32
    return [
        _cross_entropy(rows, classes, fp32),
        _linear_cross_entropy(rows, classes, width, fp32),
        _distillation(rows, classes, fp32),
        _linear_distillation(rows, classes, width, fp32, teacher_width=384),
        _topk_distillation(rows, classes, width, fp32, k=64),
        mmd(512, width, fp32),
        mmd(1024, width, fp32, slow_peers=True),
        mmd(4096, width, fp32, slow_peers=slow_peers),
        mmd(32768, width, fp32, eager_runs=False),
    ]


def _on_gpu() -> list[Case]:
    shapes = ((8192, 128256, 4096), (8192, 256000, 2304), (16384, 151936, 896))
    bf16 = torch.bfloat16
    return [
        _cross_entropy(8192, 128256, bf16),
        *(_linear_cross_entropy(rows, classes, width, bf16) for rows, classes, width in shapes),
        _distillation(8192, 128256, bf16),
        _linear_distillation(8192, 128256, 2048, bf16, teacher_width=4096),
        _topk_distillation(8192, 128256, 4096, bf16, k=64),
        mmd(4096, 2048, bf16),
        mmd(16384, 1024, bf16, eager_runs=False),
    ]


def _cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> Case:
    def eager(x: Inputs) -> torch.Tensor:
        return functional.cross_entropy(_wide(x["logits"]), x["labels"])

    sides: dict[str, Side] = {
        "fleetune": lambda x: ours.cross_entropy(x["logits"], x["labels"]),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if _there("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        sides["liger"] = lambda x: liger_cross_entropy(x["logits"].clone(), x["labels"])  # it overwrites its input
    if _there("quack"):
        from quack.cross_entropy import cross_entropy

        sides["quack"] = lambda x: cross_entropy(x["logits"], x["labels"], reduction="mean")
    return Case(
        f"cross_entropy-{rows}x{classes}",
        "cross_entropy",
        f"{rows} x {classes}",
        lambda device: {
            "logits": _randn(device, dtype, rows, classes, scale=3.0),
            "labels": _labels(device, rows, classes),
        },
        ("logits",),
        sides,
    )


def _linear_cross_entropy(rows: int, classes: int, width: int, dtype: torch.dtype) -> Case:
    def eager(x: Inputs) -> torch.Tensor:
        return functional.cross_entropy(_wide(x["hidden_states"] @ x["lm_head_weight"].T), x["labels"])

    sides: dict[str, Side] = {
        "fleetune": lambda x: ours.linear_cross_entropy(x["hidden_states"], x["lm_head_weight"], x["labels"]),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        sides["torch chunked"] = lambda x: functional.linear_cross_entropy(
            x["hidden_states"], x["lm_head_weight"], x["labels"], options=options
        )
    if _there("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        sides["liger"] = lambda x: liger(x["hidden_states"], x["lm_head_weight"], x["labels"])
        sides["liger, fp32 dW"] = lambda x: liger(
            x["hidden_states"], x["lm_head_weight"], x["labels"], accum_dtype=torch.float32
        )
    if _there("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        sides["cut cross-entropy"] = lambda x: cut(x["hidden_states"], x["lm_head_weight"], x["labels"])
    if _there("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        sides["quack"] = lambda x: quack(x["hidden_states"], x["lm_head_weight"], x["labels"])
    return Case(
        f"linear_cross_entropy-{rows}x{classes}x{width}",
        "linear_cross_entropy",
        f"{rows} x {classes} x {width}",
        lambda device: _head(device, dtype, rows, classes, width) | {"labels": _labels(device, rows, classes)},
        ("hidden_states", "lm_head_weight"),
        sides,
    )


def _distillation(rows: int, classes: int, dtype: torch.dtype) -> Case:
    def eager(x: Inputs) -> torch.Tensor:
        student, teacher = (torch.log_softmax(_wide(x[name]) / 2, dim=-1) for name in ("student", "teacher"))
        return 4 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")

    sides: dict[str, Side] = {
        "fleetune": lambda x: ours.distillation_loss(x["student"], x["teacher"], temperature=2.0),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if _there("liger_kernel"):
        from liger_kernel.transformers.functional import liger_kl_div

        def liger(x: Inputs) -> torch.Tensor:
            student, teacher = (torch.log_softmax(x[name] / 2, dim=-1) for name in ("student", "teacher"))
            return 4 * liger_kl_div(student, teacher, reduction="batchmean", log_target=True)  # type: ignore[no-any-return]

        sides["liger"] = liger
    return Case(
        f"distillation_loss-{rows}x{classes}",
        "distillation_loss",
        f"{rows} x {classes}, forward KL",
        lambda device: {
            "student": _randn(device, dtype, rows, classes, scale=3.0),
            "teacher": _randn(device, dtype, rows, classes, scale=3.0, seed=1),
        },
        ("student",),
        sides,
    )


def _linear_distillation(rows: int, classes: int, width: int, dtype: torch.dtype, teacher_width: int) -> Case:
    def eager(x: Inputs) -> torch.Tensor:
        student = torch.log_softmax(_wide(x["hidden_states"] @ x["lm_head_weight"].T) / 2, dim=-1)
        with torch.no_grad():
            teacher = torch.log_softmax(_wide(x["teacher_hidden"] @ x["teacher_weight"].T) / 2, dim=-1)
        return 4 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def fleetune(x: Inputs) -> torch.Tensor:
        tensors = (x["hidden_states"], x["lm_head_weight"], x["teacher_hidden"], x["teacher_weight"])
        return ours.linear_distillation_loss(*tensors, temperature=2.0).loss

    sides: dict[str, Side] = {"fleetune": fleetune, "eager": eager, "torch.compile": torch.compile(eager)}
    if _there("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        sides["liger (JSD)"] = lambda x: liger_fused_linear_jsd(
            x["hidden_states"], x["lm_head_weight"], x["teacher_hidden"], x["teacher_weight"], temperature=2.0
        )

    def inputs(device: torch.device) -> Inputs:
        teacher = _head(device, dtype, rows, classes, teacher_width, seed=1)
        student = _head(device, dtype, rows, classes, width)
        return student | {"teacher_hidden": teacher["hidden_states"], "teacher_weight": teacher["lm_head_weight"]}

    return Case(
        f"linear_distillation_loss-{rows}x{classes}x{width}",
        "linear_distillation_loss",
        f"{rows} x {classes} x {width}/{teacher_width}, forward KL",
        inputs,
        ("hidden_states", "lm_head_weight"),
        sides,
    )


def _topk_distillation(rows: int, classes: int, width: int, dtype: torch.dtype, k: int) -> Case:
    def eager(x: Inputs) -> torch.Tensor:
        student = torch.log_softmax(_wide(x["hidden_states"] @ x["lm_head_weight"].T) / 2, dim=-1)
        target = x["log_probs"]
        return 4 * (target.exp() * (target - student.gather(-1, x["ids"]))).sum(-1).mean()

    def inputs(device: torch.device) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(2)
        ids = torch.rand(rows, classes, device=device, generator=generator).topk(k).indices
        log_probs = torch.log_softmax(torch.randn(rows, k + 1, device=device, generator=generator), dim=-1)[:, :k]
        return _head(device, dtype, rows, classes, width) | {"ids": ids, "log_probs": log_probs.contiguous()}

    def fleetune(x: Inputs) -> torch.Tensor:
        tensors = (x["hidden_states"], x["lm_head_weight"], x["ids"], x["log_probs"])
        return ours.topk_distillation_loss(*tensors, temperature=2.0).loss

    return Case(
        f"topk_distillation_loss-{rows}x{classes}x{width}",
        "topk_distillation_loss",
        f"{rows} x {classes} x {width}, k = {k}",
        inputs,
        ("hidden_states", "lm_head_weight"),
        {"fleetune": fleetune, "eager": eager, "torch.compile": torch.compile(eager)},
    )


def mmd(rows: int, width: int, dtype: torch.dtype, eager_runs: bool = True, slow_peers: bool = False) -> Case:
    def of(pooled: torch.Tensor, distances: torch.Tensor, n: int) -> torch.Tensor:
        """One Gaussian after another."""
        bandwidth = distances.detach().sum() / (len(pooled) * (len(pooled) - 1))
        kernel = sum(torch.exp(-distances / (2 * bandwidth * 2.0 ** (q - 2))) for q in range(5))
        assert isinstance(kernel, torch.Tensor)
        return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()

    def eager(x: Inputs) -> torch.Tensor:
        """N x N distances by one matrix product, as who knows the trick writes it."""
        pooled = _wide(torch.cat([x["source"], x["target"]]))
        squares = pooled.square().sum(1)
        distances = (squares[:, None] + squares[None] - 2 * pooled @ pooled.T).clamp(min=0)
        return of(pooled, distances, len(x["source"]))

    def differences(x: Inputs) -> torch.Tensor:
        """N x N x D differences, as the published code of DAN and its kin has it (Long et al. 2015; TLLib)."""
        pooled = _wide(torch.cat([x["source"], x["target"]]))
        return of(pooled, (pooled[None] - pooled[:, None]).square().sum(2), len(x["source"]))

    sides: dict[str, Side] = {"fleetune": lambda x: ours.mmd(x["source"], x["target"])}
    if eager_runs:
        sides |= {"eager": eager, "torch.compile": torch.compile(eager)}
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if eager_runs and 21 * (2 * rows) ** 2 * width < room:  # five such in fp32
        sides["N x N x D"] = differences
    if eager_runs and _there("pykeops") and (slow_peers or torch.cuda.is_available()):
        sides["keops"] = _keops_mmd  # on 2 CPU cores some 14 s a call at 1,024 rows a side, four minutes at 4,096
    return Case(
        f"mmd-{rows}+{rows}x{width}",
        "mmd",
        f"{rows} + {rows} x {width}, five kernels",
        lambda device: {
            "source": _randn(device, dtype, rows, width),
            "target": 0.5 + _randn(device, dtype, rows, width, seed=1),
        },
        ("source", "target"),
        sides,
        eager_runs,
    )


def _keops_mmd(x: Inputs) -> torch.Tensor:
    """The same by KeOps' lazy tensors: O(N) memory, the gradient by its own differentiation."""
    from pykeops.torch import LazyTensor

    source, target = x["source"].float(), x["target"].float()
    pooled = torch.cat([source, target]).detach()
    centred = pooled - pooled.mean(0)
    bandwidth = 2 * len(pooled) * centred.square().sum() / (len(pooled) * (len(pooled) - 1))
    scale = (2 * bandwidth * 4.0).rsqrt()  # of the largest of the five; the others by squaring

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        distances = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        e = (-distances).exp()
        e2 = e * e
        e4 = e2 * e2
        e8 = e4 * e4
        total: torch.Tensor = (e + e2 + e4 + e8 + e8 * e8).sum(1)
        return total.mean() / len(b)

    a, b = source * scale, target * scale
    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32; fp64, in which the truth is worked out, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _head(device: torch.device, dtype: torch.dtype, rows: int, classes: int, width: int, seed: int = 0) -> Inputs:
    hidden = _randn(device, dtype, rows, width, seed=10 + seed)
    return {
        "hidden_states": hidden,
        "lm_head_weight": _randn(device, dtype, classes, width, scale=3 / width**0.5, seed=seed),
    }


def _randn(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Random, never zeros: a GPU multiplies zeros faster."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)


def _labels(device: torch.device, rows: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (rows,), device=device, generator=torch.Generator(device=device).manual_seed(3))


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def as_double(inputs: Inputs) -> dict[str, Any]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
