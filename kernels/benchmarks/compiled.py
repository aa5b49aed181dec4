"""Compiles every kernel ahead of time for each architecture, without a GPU, and reads registers and spills back.

    python kernels/benchmarks/compiled.py [--json]

Exit code 1 where a kernel spills at the settings of `fleetune_kernels/launch.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has no binary

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fleetune_kernels.launch import Launch, for_architecture
from fleetune_kernels.triton import cross_entropy, distillation, mmd, softmaxes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time choices."""

    name: str
    settings: str  # its entry in the table of `launch.py`
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())  # arguments divisible by 16: pointers, mostly


@dataclass(frozen=True)
class Usage:
    name: str
    kernel: str  # the function's name
    architecture: str
    registers: int
    shared: int  # bytes
    spilled: int  # bytes of stack, or of scratch


def variants(architecture: str) -> Iterator[Variant]:
    """Every variant that the ops launch on the architecture, at its settings."""
    yield from _cross_entropy_variants(architecture)
    yield from _distillation_variants(architecture)
    yield from _softmaxes_variants(architecture)
    yield from _mmd_variants(architecture)


def variant(
    name: str,
    settings: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    launch: Launch,
    *aligned_counts: str,
) -> Variant:
    """`arguments` are those passed at run time, by type; whatever else the kernel takes is None or a constant."""
    signature = {argument: arguments.get(argument, "constexpr") for argument in kernel.arg_names}
    fixed = {argument: constants.get(argument) for argument, kind in signature.items() if kind == "constexpr"}
    aligned = tuple(argument for argument, kind in arguments.items() if kind.startswith("*"))
    aligned += aligned_counts
    return Variant(name, settings, kernel, signature, fixed, launch.num_warps, launch.num_stages, aligned)


def _cross_entropy_variants(architecture: str) -> Iterator[Variant]:
    plain = {"LABEL_SMOOTHING": 0.0, "Z_LOSS": 0.0, "SOFTCAP": 0.0, "LOGIT_SCALE": 1.0, "WEIGHTED": False}
    every = {"LABEL_SMOOTHING": 0.1, "Z_LOSS": 1e-4, "SOFTCAP": 30.0, "LOGIT_SCALE": 0.5, "WEIGHTED": True}
    sizes = dict.fromkeys(("N", "V", "WIDTH", "logits_stride", "gradient_stride", "ignore_index"), "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        rows = {"logits": f"*{dtype}", "gradient": f"*{dtype}", "labels": "*i64", "coefficients": "*fp32"}
        rows |= {"losses": "*fp32"} | sizes
        for name, options, more in (
            ("loss alone", plain | {"WITH_GRADIENT": False, "WITH_STATS": False}, {}),
            ("plain", plain | {"WITH_GRADIENT": True, "WITH_STATS": False}, {}),
            (
                "every option",
                every | {"WITH_GRADIENT": True, "WITH_STATS": True},
                {"class_weight": "*fp32", "class_weight_sum": "*fp32", "stats": "*fp32"},
            ),
        ):
            entry = "cross_entropy_options" if more else "cross_entropy"
            launch = for_architecture(entry, architecture)
            constants = options | {"BLOCK": launch.block[0]}
            kernel = cross_entropy.rows_kernel
            yield variant(f"cross_entropy {dtype} {name}", entry, kernel, rows | more, constants, launch)
        scale = for_architecture("scale", architecture)
        arguments = {"gradient": f"*{dtype}", "factor": "*fp32", "size": "i64"}
        constants = {"BLOCK": scale.block[0]}
        yield variant(f"scale {dtype}", "scale", cross_entropy.scale_kernel, arguments, constants, scale)


def _distillation_variants(architecture: str) -> Iterator[Variant]:
    plain: dict[str, Any] = {
        "TEMPERED": False,
        "MASKED": False,
        "LABELED": False,
        "SMOOTHED": False,
        "WITH_GRADIENT": True,
    }
    plain |= {"STUDENT_SOFTCAP": 0.0, "TEACHER_SOFTCAP": 0.0, "STUDENT_LOGIT_SCALE": 1.0, "TEACHER_LOGIT_SCALE": 1.0}
    every: dict[str, Any] = {"TEMPERED": True, "MASKED": True, "LABELED": True, "SMOOTHED": True, "WITH_GRADIENT": True}
    every |= {"STUDENT_SOFTCAP": 30.0, "TEACHER_SOFTCAP": 30.0, "STUDENT_LOGIT_SCALE": 0.5, "TEACHER_LOGIT_SCALE": 0.5}
    more = {"mask": "*u8", "labels": "*i64", "ce_coefficients": "*fp32"}
    numbers = dict.fromkeys(("N", "V", "WIDTH", "student_stride", "gradient_stride", "teacher_stride"), "i32")
    numbers |= {"ignore_index": "i32"}
    numbers |= dict.fromkeys(("inverse_temperature", "loss_scale", "beta", "label_smoothing"), "fp32")
    launch = for_architecture("distillation", architecture)
    for dtype in ("bf16", "fp32"):  # fp16 differs from bf16 in nothing but its loads and stores
        rows = {"student": f"*{dtype}", "gradient": f"*{dtype}", "teacher": f"*{dtype}", "kd_coefficients": "*fp32"}
        rows |= {"kd_losses": "*fp32", "ce_losses": "*fp32"} | numbers
        for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
            constants = {"DIVERGENCE": divergence, "BLOCK": launch.block[0]}
            name, kernel = f"distillation {divergence} {dtype}", distillation.rows_kernel
            if dtype == "bf16":
                yield variant(f"{name} plain", "distillation", kernel, rows, plain | constants, launch)
                labels = every | {"STUDENT_SOFTCAP": 0.0, "TEACHER_SOFTCAP": 0.0}
                yield variant(f"{name} labels", "distillation", kernel, rows | more, labels | constants, launch)
            yield variant(f"{name} every option", "distillation", kernel, rows | more, every | constants, launch)


def _softmaxes_variants(architecture: str) -> Iterator[Variant]:
    launch = for_architecture("softmaxes", architecture)
    factors = dict.fromkeys(("of_tempered", "of_plain", "background", "figures"), "*fp32")
    numbers = {"N": "i32", "V": "i32", "inverse_temperature": "fp32"}
    for dtype in ("bf16", "fp32"):
        arguments = {"logits": f"*{dtype}"} | factors | numbers
        for name, tempered, softcap in (("plain", False, 0.0), ("every option", True, 30.0)):
            constants = {"SOFTCAP": softcap, "LOGIT_SCALE": 1.0, "TEMPERED": tempered, "PLAIN": True, "SUMMED": True}
            constants |= {"WITH_GRADIENT": True, "BLOCK": launch.block[0]}
            kernel = softmaxes.softmaxes_kernel
            yield variant(f"softmaxes {dtype} {name}", "softmaxes", kernel, arguments, constants, launch)


def _mmd_variants(architecture: str) -> Iterator[Variant]:
    options = {"FACTOR": 2.0, "NUM_KERNELS": 5, "UNBIASED": True}
    figures = ("row_norms", "column_norms", "weights", "same", "scale", "kernel_sums")
    precision = "ieee" if architecture.startswith("gfx") else "tf32x3"
    for dtype, kind in (("bf16", "half"), ("fp32", "fp32")):
        launch = for_architecture("mmd_slopes", architecture)
        arguments = {"slopes": f"*{dtype}"} | dict.fromkeys(("products", *figures, "row_sums"), "*fp32")
        counts = ("row_count", "column_count", "column_split", "side", "diagonal_offset", "width")
        arguments |= dict.fromkeys(counts, "i32")
        constants: dict[str, Any] = options | {"BLOCK_M": launch.block[0], "BLOCK_N": launch.block[1]}
        kernel = mmd.slopes_kernel
        yield variant(f"mmd_slopes {dtype}", "mmd_slopes", kernel, arguments, constants, launch, "column_count")
        for block_d in (16, 64, 128, 256) if kind == "half" else (16, 64, 128):
            entry = f"mmd_sweep_{kind}_{max(64, block_d)}"
            launch = for_architecture(entry, architecture)
            arguments = {"rows": f"*{dtype}", "columns": f"*{dtype}"}
            gradients = ("source_gradient", "target_gradient")
            arguments |= dict.fromkeys((*figures, "row_scales", *gradients), "*fp32")
            counts = ("source_rows", "target_rows", "column_count", "column_split", "source_offset", "target_offset")
            arguments |= dict.fromkeys((*counts, "dimension"), "i32")
            constants = options | {"WANT_SOURCE": True, "WANT_TARGET": True, "UPCAST": False, "PRECISION": precision}
            constants |= {"BLOCK_M": launch.block[0], "BLOCK_N": launch.block[1], "BLOCK_D": block_d}
            name, kernel = f"mmd_sweep {dtype} D={block_d}", mmd.sweep_kernel
            yield variant(name, entry, kernel, arguments, constants, launch, "dimension")


def compile_variant(variant: Variant, architecture: str) -> Usage:
    names = list(variant.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=TARGETS[architecture], options=options)
    if architecture.startswith("gfx"):
        registers, spilled = _of_hsaco(kernel.asm["amdgcn"])
    else:
        registers, spilled = _of_cubin(kernel.asm["cubin"])
    return Usage(variant.name, variant.kernel.__name__, architecture, registers, kernel.metadata.shared, spilled)


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def _of_hsaco(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch, as the assembly's own metadata states them."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    assert registers, "the assembly states no registers"
    assert scratch, "the assembly states no scratch"
    return int(registers[1]), int(scratch[1])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    as_json = arguments.parse_args().json
    usages = [compile_variant(variant, name) for name in TARGETS for variant in variants(name)]
    if as_json:
        print(json.dumps([asdict(usage) for usage in usages]))
    else:
        print(f"{'kernel':<44} {'target':<8} {'registers':>9} {'shared':>8} {'spilled':>8}")
        for usage in usages:
            print(f"{usage.name:<44} {usage.architecture:<8} {usage.registers:>9} {usage.shared:>8} {usage.spilled:>8}")
    return int(any(usage.spilled for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
