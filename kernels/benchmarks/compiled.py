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
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())  # arguments divisible by 16: pointers, mostly


@dataclass(frozen=True)
class Usage:
    name: str
    architecture: str
    registers: int
    shared: int  # bytes
    spilled: int  # bytes of stack, or of scratch


def variants(architecture: str) -> Iterator[Variant]:
    """Every variant that the ops launch on the architecture, at its settings."""
    yield from ()


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
    return Usage(variant.name, architecture, registers, kernel.metadata.shared, spilled)


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
