"""Cross-entropy from logits: every option, dtype and backend against the fp64 formulas, and what the op promises."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from allocation import peak_bytes
from exactness import assert_no_worse
from examples import BACKENDS, DEVICE, DTYPES, OPTIONS, example, filled
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune_kernels import Stats, check_labels, cross_entropy, softmax_cross_entropy


@pytest.fixture(autouse=True)
def _small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_cross_entropy, "BLOCK_BYTES", 2**14)  # several blocks in every test


def computed(logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    """The loss and its gradient, of logits that were rounded to float16 or less already."""
    logits = logits.to(dtype).requires_grad_()
    loss = cross_entropy(logits, labels, **options)
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
    return {"loss": loss, "logits": gradient}


def check(logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, backend: str, **options: Any) -> None:
    logits = logits.to(dtype).double()
    truth = computed(logits, labels, torch.float64, backend="reference", **options)
    eager = computed(logits, labels, dtype, backend="reference", **options)
    assert_no_worse(computed(logits, labels, dtype, backend=backend, **options), eager, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_size_is_exact_on_a_gpu(name: str, dtype: torch.dtype, backend: str) -> None:
    logits, labels = example(512, 128256)
    check(logits, labels, dtype, backend, **filled(OPTIONS[name], labels, 128256))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 1024), (13, 203), (3, 30522)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_are_as_exact_as_eager(
    name: str, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    logits, labels = example(*shape)
    check(logits, labels, dtype, backend, **filled(OPTIONS[name], labels, shape[-1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("num_items", [None, 7.0])
def test_reductions_and_divisors(reduction: str, num_items: float | None, backend: str) -> None:
    logits, labels = example(4, 5, 50)
    divisor = None if num_items is None else torch.tensor(num_items, device=DEVICE)
    check(logits, labels, torch.float32, backend, reduction=reduction, num_items=divisor)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 70),
    padding=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_smoothing": st.floats(0, 1),
            "z_loss": st.floats(0, 0.1),
            "softcap": st.floats(1, 50),
            "logit_scale": st.floats(0.1, 2),
            "reduction": st.sampled_from(["none", "sum", "mean"]),
            "weight": st.just(True),
            "token_weights": st.just(True),
        },
    ),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 99),
)
def test_any_shape_and_options(
    rows: int, classes: int, padding: int, options: dict[str, Any], backend: str, seed: int
) -> None:
    logits, labels = example(rows, classes, seed=seed)
    padded = torch.cat([logits, torch.randn(rows, padding, dtype=torch.float64, device=DEVICE)], dim=1)
    check(padded, labels, torch.float32, backend, vocab_size=classes, **filled(options, labels, classes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_beyond_the_vocabulary_count_nothing(backend: str) -> None:
    logits, labels = example(6, 40)
    padded = torch.cat([logits, torch.full_like(logits, 1e4)], dim=1).float().requires_grad_()
    loss = cross_entropy(padded, labels, vocab_size=40, backend=backend)
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels, backend="reference"))
    (gradient,) = torch.autograd.grad(loss, padded)
    assert not gradient[:, 40:].any()
    assert gradient[:, :40].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_supervised_is_zero(backend: str, reduction: str) -> None:
    logits, labels = example(5, 300, ignored=1.1)
    found = computed(logits, labels, torch.float32, backend=backend, reduction=reduction, label_smoothing=0.1)
    assert not found["loss"].any()
    assert not found["logits"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all_are_zero(backend: str) -> None:
    logits = torch.empty(0, 300, device=DEVICE, requires_grad=True)
    loss = cross_entropy(logits, torch.empty(0, dtype=torch.long, device=DEVICE), backend=backend)
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 300)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(backend: str, dtype: torch.dtype) -> None:
    logits, labels = example(6, 300, ignored=0.0)
    logits[0], logits[1, 5], logits[2] = -6e4, 6e4, 6e4
    logits[3, ::2] = -float("inf")
    labels[3] = 1
    check(logits, labels, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_shape(backend: str) -> None:
    logits, labels = example(3, 4, 64)
    turned = logits.float().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    found = cross_entropy(turned, labels, backend=backend, reduction="none")
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, cross_entropy(logits.float(), labels, backend="reference", reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32], ids=str)
def test_rows_may_be_strided_or_expanded(backend: str, reduction: str, labels_dtype: torch.dtype) -> None:
    logits, labels = example(9, 300)
    columns = torch.stack([labels, labels.flip(0)], dim=1).to(labels_dtype)
    weights = torch.linspace(0.5, 2, 18, device=DEVICE).reshape(9, 2)
    by_class = torch.linspace(0.1, 1, 600, device=DEVICE).reshape(300, 2)
    strided = {"weight": by_class[:, 1], "token_weights": weights[:, 0], "label_smoothing": 0.1}
    check(logits, columns[:, 0], torch.float32, backend, reduction=reduction, **strided)
    expanded = torch.full((1,), 0.5, device=DEVICE).expand(9)
    check(logits, columns[:, 1], torch.float32, backend, reduction=reduction, token_weights=expanded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_scale_reaches_gradients_that_a_large_divisor_makes_small(backend: str, dtype: torch.dtype) -> None:
    logits, labels = example(9, 300)
    found, num_items = {}, torch.tensor(3e6, device=DEVICE)
    for which, kind in ((backend, dtype), ("reference", torch.float64)):
        leaf = logits.to(dtype).to(kind).requires_grad_()
        num_items = torch.tensor(3e6, device=DEVICE)
        (found[which],) = torch.autograd.grad(
            2**20 * cross_entropy(leaf, labels, num_items=num_items, backend=which), leaf
        )
    scaled = {"logits": found["reference"]}
    assert_no_worse({"logits": found[backend]}, scaled, scaled, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_of_nothing_has_no_gradient(backend: str) -> None:
    logits, labels = example(5, 300, ignored=1.1)
    leaf = logits.float().requires_grad_()
    (gradient,) = torch.autograd.grad(65536 * cross_entropy(leaf, labels, backend=backend), leaf)
    assert not gradient.any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    logits, labels = example(9, 300)
    options = filled({"weight": True, "label_smoothing": 0.1}, labels, 300)
    outside = cross_entropy(logits.float(), labels, backend=backend, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(cross_entropy(logits.float(), labels, backend=backend, **options), outside)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_unsigned_labels_do_not_wrap_round_to_the_ignored_one(backend: str) -> None:
    logits, _ = example(6, 300)
    labels = torch.full((6,), 156, device=DEVICE)  # -100 in eight bits
    found = cross_entropy(logits.float(), labels.to(torch.uint8), backend=backend)
    torch.testing.assert_close(found, cross_entropy(logits.float(), labels, backend="reference"))


@pytest.mark.parametrize("backend", ["triton"])
def test_a_label_beyond_32_bits_is_no_class(backend: str) -> None:
    logits, labels = example(6, 300)
    ignored = labels.where(labels != -100, 2**40)
    found = cross_entropy(logits.float(), ignored, ignore_index=2**40, backend=backend)
    torch.testing.assert_close(found, cross_entropy(logits.float(), labels, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_come_with_the_loss(backend: str, dtype: torch.dtype) -> None:
    logits, labels = example(3, 4, 500)
    labels[0, 0] = logits[0, 0].argmax()
    logits = logits.to(dtype).requires_grad_()
    loss, stats = cross_entropy(logits, labels, return_stats=True, backend=backend)
    expected_loss, expected = cross_entropy(logits, labels, return_stats=True, backend="reference")
    torch.testing.assert_close(loss, expected_loss)
    assert expected.accuracy[0, 0] == 1
    for name in Stats._fields:
        assert getattr(stats, name).shape == labels.shape
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert not stats.lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_tensors_are_never_written(backend: str) -> None:
    logits, labels = example(6, 300)
    logits, before = logits.float().requires_grad_(), logits.float()
    cross_entropy(logits, labels, backend=backend, softcap=3.0, return_stats=True)[0].backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_formed_where_none_is_asked_for(backend: str) -> None:
    logits, labels = example(6, 300)
    assert not cross_entropy(logits.float(), labels, backend=backend).requires_grad
    with torch.no_grad():
        assert not cross_entropy(logits.float().requires_grad_(), labels, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    logits, labels = example(6, 300)
    loss = cross_entropy(logits.float().requires_grad_(), labels, backend=backend)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass_is_refused_and_never_wrong(backend: str) -> None:
    logits, labels = example(6, 300)
    loss = 3 * cross_entropy(logits.float().requires_grad_(), labels, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_compiles_without_a_break(backend: str, reduction: str) -> None:
    logits, labels = example(6, 300)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return 2 * cross_entropy(logits, labels, backend=backend, label_smoothing=0.1, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = logits.float().requires_grad_(), logits.float().requires_grad_()
    compiled(found).backward()
    loss(expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_fake_kernel_fits_the_real_one() -> None:
    logits, labels = example(6, 300)
    arguments = (
        logits.float().requires_grad_(),
        labels,
        None,
        None,
        torch.ones((), device=DEVICE),
        True,
        True,
        "torch",
    )
    torch.library.opcheck(
        softmax_cross_entropy._op,
        (*arguments, 300, -100, 0.0, 0.0, 0.0, 1.0, True),
        # A gradient handed out in place cannot be taken twice, which the third check does.
        test_utils=("test_schema", "test_faketensor"),
    )


def test_nothing_waits_for_the_device() -> None:
    """On the device that has no values: asking for one raises."""
    logits = torch.empty(9, 300, device="meta", requires_grad=True)
    labels = torch.empty(9, dtype=torch.long, device="meta")
    options: dict[str, Any] = {"weight": torch.empty(300, device="meta"), "softcap": 3.0, "label_smoothing": 0.1}
    loss, _ = cross_entropy(logits, labels, backend="torch", return_stats=True, **options)
    loss.backward()
    # On this device the op's fake kernel stands in for it; the work itself:
    every = softmax_cross_entropy.Options(300, label_smoothing=0.1, softcap=3.0, with_stats=True)
    ones = torch.ones(9, device="meta")
    softmax_cross_entropy.rows(
        logits.detach(), torch.empty_like(logits), labels, ones, options["weight"], every, "torch"
    )
    with pytest.raises(RuntimeError, match="meta"):
        check_labels(labels, 300)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_a_real_gpu(backend: str) -> None:
    logits, labels = example(64, 5000)
    logits = logits.float().requires_grad_()
    cross_entropy(logits, labels, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(logits, labels, backend=backend, label_smoothing=0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="the record of allocations is a CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_cross_entropy, "BLOCK_BYTES", 2**18)
    logits, labels = example(1000, 2000)
    logits = logits.to(dtype).requires_grad_()
    allowed = logits.numel() * logits.element_size() + 2 * 2**18 + 2**17
    assert peak_bytes(lambda: torch.autograd.grad(cross_entropy(logits, labels, backend="torch"), logits)) < allowed
    eager = peak_bytes(lambda: torch.autograd.grad(cross_entropy(logits, labels, backend="reference"), logits))
    assert eager > 2 * allowed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few labels": ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels: shape \(5,\)"),
    "labels that are not integers": ({"labels": torch.zeros(6)}, "labels: torch.float32"),
    "a label that is no class": ({"labels": torch.full((6,), 300)}, "labels: 300 is no class; should be 0 to 299"),
    "a negative label": ({"labels": torch.full((6,), -1)}, "labels: -1 is no class"),
    "a divisor that is none": ({"num_items": "7"}, "num_items: str; should be a tensor, a number or None"),
    "several divisors": ({"num_items": torch.ones(2)}, "num_items: tensor"),
    "integer logits": ({"logits": torch.zeros(6, 300, dtype=torch.long)}, "logits: torch.int64"),
    "class weights of another length": ({"weight": torch.ones(4)}, r"weight: shape \(4,\)"),
    "token weights of another shape": ({"token_weights": torch.ones(4)}, r"token_weights: shape \(4,\)"),
    "class weights elsewhere": ({"weight": torch.ones(300, device="meta")}, "weight: on meta; logits is on cpu"),
    "a wrong reduction": ({"reduction": "average"}, "reduction: 'average'; should be one of none, mean, sum"),
    "too large a vocabulary": ({"vocab_size": 301}, "vocab_size: 301; should be 1 to 300"),
    "too much smoothing": ({"label_smoothing": 1.5}, "label_smoothing: 1.5"),
    "no cap": ({"softcap": 0.0}, "softcap: 0.0"),
    "a cap without end": ({"softcap": math.inf}, "softcap: inf; should be a finite number above 0, or None"),
    "an unknown backend": ({"backend": "cuda"}, "backend: 'cuda'; should be one of auto, triton, torch, reference"),
    "fp64 in triton": ({"logits": torch.zeros(6, 300).double(), "backend": "triton"}, "backend: triton takes float32"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_wrong_arguments_are_named(name: str, backend: str) -> None:
    arguments, message = REFUSED[name]
    right = {"logits": torch.zeros(6, 300), "labels": torch.zeros(6, dtype=torch.long), "backend": backend}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(right | arguments))


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: triton needs a GPU"):
        cross_entropy(torch.zeros(6, 300), torch.zeros(6, dtype=torch.long), backend="triton")
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.parametrize("name", OPTIONS)
def test_the_formulas_own_gradients_are_their_derivatives(name: str) -> None:
    logits, labels = example(4, 6)
    options = filled(OPTIONS[name], labels, 6)
    options |= {key: value.double() for key, value in options.items() if isinstance(value, torch.Tensor)}
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, backend="reference", **options), logits)


def test_numpy_agrees_by_hand() -> None:
    logits, labels = np.array([[1.0, 2.0, 0.5]]), 1
    cap, smoothing, z = 4.0, 0.3, 0.01
    x = cap * np.tanh(2.0 * logits[0] / cap)
    lse = np.log(np.exp(x).sum())
    expected = (1 - smoothing) * (lse - x[labels]) + smoothing / 3 * (lse - x).sum() + z * lse**2
    found = cross_entropy(
        torch.tensor(logits),
        torch.tensor([labels]),
        softcap=cap,
        logit_scale=2.0,
        label_smoothing=smoothing,
        z_loss=z,
        backend="torch",
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)
