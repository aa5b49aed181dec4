"""Cross-entropy of a linear head: as exact as eager in every chunking, with only the gradients and memory asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocation import peak_bytes
from exactness import assert_no_worse
from examples import BACKENDS, DEVICE, DTYPES, OPTIONS, example, filled
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune_kernels import cross_entropy, head, linear_cross_entropy
from fleetune_kernels.linear_cross_entropy import _op

NAMES = ("hidden_states", "lm_head_weight", "bias")


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 5)


def inputs(rows: int, classes: int, width: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """hidden_states (rows, width), lm_head_weight (classes, width), bias (classes,) in fp64; labels (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (classes, width), (classes,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]
    tensors[1] /= width**0.5 / 2
    return dict(zip(NAMES, tensors, strict=True)), example(rows, classes, seed=seed)[1]


def computed(
    tensors: dict[str, torch.Tensor], labels: torch.Tensor, dtype: torch.dtype, wanted: tuple[str, ...], **options: Any
) -> dict[str, torch.Tensor | None]:
    """The loss, and the gradients that are wanted: the others are None."""
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_(name in wanted) for name, tensor in tensors.items()}
    loss = linear_cross_entropy(labels=labels, **leaves, **options)
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weights).sum().backward()
    return {"loss": loss, **{name: leaf.grad for name, leaf in leaves.items()}}


def check(
    tensors: dict[str, torch.Tensor],
    labels: torch.Tensor,
    dtype: torch.dtype,
    backend: str,
    wanted: tuple[str, ...] = NAMES,
    low_memory: bool = False,
    **options: Any,
) -> None:
    tensors = {name: tensor.to(dtype).double() for name, tensor in tensors.items()}
    truth = computed(tensors, labels, torch.float64, wanted, backend="reference", **options)
    eager = computed(tensors, labels, dtype, wanted, backend="reference", **options)
    found = computed(tensors, labels, dtype, wanted, backend=backend, low_memory=low_memory, **options)
    assert_no_worse(found, eager, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_real_size_is_exact_on_a_gpu(
    low_memory: bool, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 384)
    tensors, labels = inputs(1000, 30522, 256)
    check(tensors, labels, dtype, backend, low_memory=low_memory)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 256, 32), (13, 203, 17), (3, 30522, 8)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_as_exact_as_eager(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, backend: str
) -> None:
    tensors, labels = inputs(*shape)
    check(tensors, labels, dtype, backend, **filled(OPTIONS[name], labels, shape[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("num_items", [None, 7.0])
@pytest.mark.parametrize("rows", [None, (1, 2, 5, 8, 9, 11)])
def test_reductions_divisors_and_rows(
    reduction: str, num_items: float | None, rows: tuple[int, ...] | None, low_memory: bool, backend: str
) -> None:
    tensors, labels = inputs(13, 50, 12)
    options = {
        "reduction": reduction,
        "num_items": None if num_items is None else torch.tensor(num_items, device=DEVICE),
        "rows": None if rows is None else torch.tensor(rows, device=DEVICE),
    }
    check(tensors, labels, torch.float32, backend, low_memory=low_memory, **options)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    classes=st.integers(2, 40),
    padding=st.integers(0, 5),
    width=st.integers(1, 20),
    wanted=st.sets(st.sampled_from(NAMES), min_size=1),
    low_memory=st.booleans(),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    weighted=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 99),
)
def test_any_shape_options_and_wanted_gradients(
    rows: int,
    classes: int,
    padding: int,
    width: int,
    wanted: set[str],
    low_memory: bool,
    reduction: str,
    weighted: bool,
    backend: str,
    seed: int,
) -> None:
    """A gradient that nobody asked for is not there: `assert_no_worse` holds both sides to that."""
    tensors, labels = inputs(rows, classes + padding, width, seed)
    labels = labels.clamp(max=classes - 1)
    options = filled({"weight": weighted, "token_weights": weighted}, labels, classes)
    options = {name: value for name, value in options.items() if value is not False}
    options |= {"vocab_size": classes, "reduction": reduction, "low_memory": low_memory}
    check(tensors, labels, torch.float32, backend, tuple(sorted(wanted)), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_do_not_vanish_under_a_large_divisor(backend: str) -> None:
    tensors, labels = inputs(13, 203, 17)
    num_items = torch.tensor(2.0**24, device=DEVICE)
    found = computed(tensors, labels, torch.float16, ("lm_head_weight",), backend=backend, num_items=num_items / 2**10)
    truth = computed(tensors, labels, torch.float64, ("lm_head_weight",), backend="reference", num_items=num_items)
    scaled = {"lm_head_weight": found["lm_head_weight"].double() / 2**10}  # type: ignore[union-attr]
    expected = {"lm_head_weight": truth["lm_head_weight"]}
    assert_no_worse(scaled, expected, expected, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_odd_divisor_rounds_no_gradient_twice(backend: str, dtype: torch.dtype) -> None:
    tensors, labels = inputs(13, 203, 17)
    check(tensors, labels, dtype, backend, num_items=torch.tensor(3e3, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_row_with_every_label_there(backend: str) -> None:
    """What comes back is then one value for all rows, expanded."""
    tensors, labels = inputs(13, 50, 12)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    found = []
    for which in (backend, "reference"):
        loss = linear_cross_entropy(labels=labels.clamp(min=0), reduction="none", backend=which, **leaves)
        found.append(torch.autograd.grad(loss.sum(), list(leaves.values())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_of_nothing_has_no_gradient(backend: str) -> None:
    tensors, labels = inputs(13, 50, 12)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    loss = 65536 * linear_cross_entropy(labels=torch.full_like(labels, -100), backend=backend, **leaves)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rows", [None, (1, 2, 5)])
def test_under_autocast_it_takes_what_a_linear_layer_takes(backend: str, rows: tuple[int, ...] | None) -> None:
    tensors, labels = inputs(13, 50, 12)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    mixed = leaves | {"hidden_states": tensors["hidden_states"].bfloat16().requires_grad_()}
    picked = None if rows is None else torch.tensor(rows, device=DEVICE)
    halves = {name: leaf.bfloat16() for name, leaf in leaves.items()}
    expected = linear_cross_entropy(labels=labels, rows=picked, backend=backend, **halves)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_cross_entropy(labels=labels, rows=picked, backend=backend, **mixed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found, list(mixed.values()))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weights_gradient_is_accumulated_in_fp32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the sum over many small chunks is no worse than over one."""
    tensors, labels = inputs(256, 60, 8)
    monkeypatch.setattr(head, "CHUNK_ROWS", 2)
    check(tensors, labels, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_by_row(backend: str) -> None:
    tensors, labels = inputs(13, 50, 12)
    leaves = {name: tensor.float() for name, tensor in tensors.items()}
    logits = leaves["hidden_states"] @ leaves["lm_head_weight"].T + leaves["bias"]
    _, stats = linear_cross_entropy(labels=labels, return_stats=True, backend=backend, **leaves)
    _, expected = cross_entropy(logits, labels, return_stats=True, backend="reference")
    for found, right in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_supervised_is_zero(backend: str, reduction: str) -> None:
    tensors, labels = inputs(13, 50, 12)
    found = computed(tensors, torch.full_like(labels, -100), torch.float32, NAMES, backend=backend, reduction=reduction)
    assert not any(value.any() for value in found.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_strides(backend: str) -> None:
    tensors, labels = inputs(12, 50, 8)
    hidden = tensors["hidden_states"].float()
    turned = hidden.reshape(3, 4, 8).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    weight = tensors["lm_head_weight"].float().T.contiguous().T
    assert not turned.is_contiguous()
    found = linear_cross_entropy(turned, weight, labels.reshape(3, 4), reduction="none", backend=backend)
    expected = linear_cross_entropy(hidden, weight, labels, reduction="none", backend="reference")
    torch.testing.assert_close(found, expected.reshape(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused_and_a_second_pass_is_not(backend: str) -> None:
    tensors, labels = inputs(13, 50, 12)
    hidden = tensors["hidden_states"].float().requires_grad_()
    loss = linear_cross_entropy(hidden, tensors["lm_head_weight"].float(), labels, backend=backend)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_compiles_without_a_break(backend: str, reduction: str, low_memory: bool) -> None:
    tensors, labels = inputs(13, 50, 12)

    def loss(hidden_states: torch.Tensor, lm_head_weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"reduction": reduction, "low_memory": low_memory, "backend": backend}
        return 2 * linear_cross_entropy(hidden_states, lm_head_weight, labels, bias=bias, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, loss):
        leaves = [tensor.float().requires_grad_() for tensor in tensors.values()]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*gradients)


def test_the_op_is_registered_as_pytorch_asks() -> None:
    tensors, labels = inputs(13, 50, 12)
    leaves = [tensor.float().requires_grad_() for tensor in tensors.values()]
    flags = (True, True, True, True, False, "torch", 50, -100, 0.0, 0.0, 0.0, 1.0, True)
    torch.library.opcheck(_op, (*leaves, labels, None, None, None, *flags))


def test_nothing_waits_for_the_device() -> None:
    """On the device that has no values: asking for one raises."""
    hidden = torch.empty(13, 8, device="meta", requires_grad=True)
    weight, labels = torch.empty(50, 8, device="meta"), torch.empty(13, dtype=torch.long, device="meta")
    linear_cross_entropy(hidden, weight, labels, backend="torch").backward()
    # On this device the op's fake kernel stands in for it; the work itself:
    rows = torch.empty(6, dtype=torch.long, device="meta")
    found = _op._init_fn(
        hidden.detach(), weight, None, labels, None, None, rows, True, True, True, False, False,
        "torch", 50, -100, 0.1, 0.1, 3.0, 1.0, True,
    )  # fmt: skip
    assert found[1].shape == (13, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_a_real_gpu(backend: str) -> None:
    tensors, labels = inputs(64, 5000, 64)
    leaves = {name: tensor.bfloat16().requires_grad_() for name, tensor in tensors.items()}
    linear_cross_entropy(labels=labels, backend=backend, **leaves).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(labels=labels, backend=backend, **leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="the record of allocations is a CPU's")
@pytest.mark.parametrize("low_memory", [False, True])
def test_no_matrix_of_rows_by_classes_is_alive(low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 100)
    tensors, labels = inputs(1000, 2000, 32)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    labels = labels.clamp(min=0)

    def gradients(**options: Any) -> Any:
        loss = linear_cross_entropy(labels=labels, low_memory=low_memory, **leaves, **options)
        return torch.autograd.grad(loss, list(leaves.values()))

    chunk, weight, hidden = 4 * 100 * 2000, 4 * 2000 * 32, 4 * 1000 * 32
    # The gradients as they are formed and as they are handed out, and a chunk of logits.
    assert peak_bytes(lambda: gradients(backend="torch")) < chunk + 2 * (weight + hidden) + 2**18
    assert peak_bytes(lambda: gradients(backend="reference")) > 2 * 4 * 1000 * 2000
    held = peak_bytes(lambda: linear_cross_entropy(labels=labels, low_memory=low_memory, backend="torch", **leaves))
    assert (held < chunk + 2 * chunk + 2**17) if low_memory else (held > weight)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a head of another width": ({"lm_head_weight": torch.zeros(50, 7)}, r"lm_head_weight: shape \(50, 7\); should be"),
    "an empty head": ({"lm_head_weight": torch.zeros(0)}, r"lm_head_weight: shape \(0,\).*under ZeRO-3"),
    "a head of another dtype": ({"lm_head_weight": torch.zeros(50, 8).half()}, "lm_head_weight: torch.float16"),
    "a bias of another length": ({"bias": torch.zeros(49)}, r"bias: shape \(49,\)"),
    "labels of another shape": ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels: shape \(5,\)"),
    "rows as a mask": ({"rows": torch.ones(6, dtype=torch.bool)}, "rows: torch.bool"),
    "a row beyond the last": (
        {"rows": torch.tensor([0, 6])},
        "rows: 6 is no row; should be 0 to 5, the flattened rows",
    ),
    "a negative row": ({"rows": torch.tensor([-1])}, "rows: -1 is no row"),
    "a row twice": ({"rows": torch.tensor([2, 3, 2])}, "rows: one is there twice; should be distinct"),
    "rows elsewhere": ({"rows": torch.zeros(6, dtype=torch.long, device="meta")}, "rows: on meta"),
    "a label that is no class": ({"labels": torch.full((6,), 50)}, "labels: 50 is no class; should be 0 to 49"),
    "integer hidden states": ({"hidden_states": torch.zeros(6, 8, dtype=torch.long)}, "hidden_states: torch.int64"),
    "too large a vocabulary": ({"vocab_size": 51}, "vocab_size: 51"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_wrong_arguments_are_named(name: str, backend: str) -> None:
    arguments, message = REFUSED[name]
    right = {
        "hidden_states": torch.zeros(6, 8),
        "lm_head_weight": torch.zeros(50, 8),
        "labels": torch.zeros(6, dtype=torch.long),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(right | arguments))


def test_the_formulas_own_gradients_are_their_derivatives() -> None:
    tensors, labels = inputs(4, 6, 3)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors.values())

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1}
        return linear_cross_entropy(hidden, weight, labels, bias=bias, backend="reference", **options)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, leaves)
