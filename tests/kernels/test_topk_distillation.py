"""A stored top-k teacher: each tail's loss and gradients against the fp64 formulas, and what the op promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from allocation import peak_bytes
from exactness import assert_no_worse
from examples import BACKENDS, DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune_kernels import head, softmaxes, stored_teacher, topk_distillation, topk_distillation_loss
from fleetune_kernels.reference import distillation_loss

TAILS = ["zero", "uniform", "sampled"]
OPTIONS: dict[str, dict[str, Any]] = {
    "divergence alone": {"labels": None, "temperature": 2.0},
    "labels beside it": {"ce_weight": 0.5},
    "every option": {
        "ce_weight": 0.5,
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "softcap": 4.0,
        "logit_scale": 0.7,
        "token_weights": True,
        "mask": True,
    },
}
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def _several_chunks_in_every_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmaxes, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(head, "CHUNK_ROWS", 4)
    monkeypatch.setattr(stored_teacher, "BLOCK_BYTES", 2**11)


def example(rows: int, classes: int, places: int, tail: str, seed: int = 0) -> Tensors:
    """A head with 3 more rows than classes; the labels of some rows are among their ids, and some places are empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs, ids = torch.log_softmax(2 * normal(rows, classes), -1).topk(places, -1)
    weights = torch.rand(rows, places, generator=generator).double() if tail == "sampled" else None
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::2] = ids[::2, 0]
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    log_probs[1::3, -1] = -math.inf
    ids[1::3, -1] = ids[1::3, 0]  # an empty place repeats an id of its row
    log_probs[2::5] = -math.inf  # nothing at all is stored
    tensors = {
        "hidden_states": normal(rows, 16),
        "lm_head_weight": normal(classes + 3, 16),
        "bias": normal(classes + 3),
        "teacher_ids": ids,
        "teacher_log_probs": log_probs,
        "teacher_weights": weights,
        "labels": labels,
    }
    tensors = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}
    return tensors | {"vocab_size": classes, "tail": tail}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The model's own; what was stored of the teacher is in fp32 where it is not wider."""
    return {
        name: value.to(dtype) if name in ("hidden_states", "lm_head_weight", "bias") else value
        for name, value in tensors.items()
    }


def computed(tensors: Tensors, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor | None]:
    arguments = cast(tensors, dtype) | options
    student = {name: arguments[name].requires_grad_() for name in ("hidden_states", "lm_head_weight", "bias")}
    found = topk_distillation_loss(**(arguments | student))
    gradients = torch.autograd.grad(2 * found.loss, list(student.values()))
    return found._asdict() | dict(zip(student, gradients, strict=True))


def check(tensors: Tensors, dtype: torch.dtype, backend: str, **options: Any) -> None:
    tensors = cast(cast(tensors, dtype), torch.float64)
    truth = computed(tensors, torch.float64, backend="reference", **options)
    eager = computed(tensors, dtype, backend="reference", **options)
    assert_no_worse(computed(tensors, dtype, backend=backend, **options), eager, truth, dtype)


def filled(options: dict[str, Any], rows: int) -> dict[str, Any]:
    options = dict(options)
    if options.get("token_weights"):
        options["token_weights"] = torch.linspace(0.1, 2, rows, device=DEVICE)
    if options.get("mask"):
        options["mask"] = torch.arange(rows, device=DEVICE) % 3 != 2
    return options


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_a_real_vocabulary_is_exact_on_a_gpu(
    tail: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 128)
    check(example(512, 128256, 64, tail), dtype, backend, ce_weight=0.5, temperature=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", OPTIONS)
def test_figures_and_gradients_are_as_exact_as_eager(name: str, tail: str, dtype: torch.dtype, backend: str) -> None:
    check(example(9, 61, 5, tail), dtype, backend, **filled(OPTIONS[name], 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_a_real_vocabulary(tail: str, dtype: torch.dtype, backend: str) -> None:
    check(example(3, 30522, 16, tail), dtype, backend, ce_weight=0.5)


@pytest.mark.parametrize("tail", TAILS)
def test_fp64_is_computed_in_fp64(tail: str) -> None:
    check(example(9, 61, 5, tail), torch.float64, "torch", **filled(OPTIONS["every option"], 9))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(8, 50),
    places=st.integers(1, 8),
    tail=st.sampled_from(TAILS),
    options=st.fixed_dictionaries(
        {"ce_weight": st.floats(0.1, 2)},
        optional={
            "temperature": st.floats(0.5, 4),
            "softcap": st.floats(2, 30),
            "label_smoothing": st.floats(0, 0.5),
            "token_weights": st.just(True),
            "mask": st.just(True),
        },
    ),
    backend=st.sampled_from(BACKENDS),
)
def test_any_shape_and_options(
    rows: int, classes: int, places: int, tail: str, options: dict[str, Any], backend: str
) -> None:
    tensors = example(rows, classes, places, tail)
    tensors["labels"][0] = 1  # a row counts
    check(tensors, torch.float32, backend, **filled(options, rows))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tail", ["zero", "uniform"])
def test_all_classes_stored_are_the_whole_divergence(tail: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 16, generator=generator), torch.randn(12, 16, generator=generator)
    teacher = 2 * torch.randn(5, 12, generator=generator)
    log_probs, ids = torch.log_softmax(teacher / 2, -1).sort(-1, descending=True)
    found = topk_distillation_loss(
        *(tensor.to(DEVICE) for tensor in (hidden, weight, ids, log_probs)), tail=tail, temperature=2.0, backend=backend
    )
    torch.testing.assert_close(found.kd.cpu(), distillation_loss(hidden @ weight.T, teacher, temperature=2.0))


def test_ten_thousand_draws_average_to_the_whole_divergence() -> None:
    """Sampled is unbiased, in the loss and in its gradient: five draws a row, 10,000 times."""
    generator = torch.Generator().manual_seed(0)
    classes, draws, times = 12, 5, 10_000
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, 8, generator=generator, dtype=torch.float64) / 2
    teacher = torch.randn(1, classes, generator=generator, dtype=torch.float64)
    log_probs = torch.log_softmax(teacher / 2, -1)
    drawn = torch.multinomial(log_probs.exp().expand(times, -1), draws, replacement=True, generator=generator)
    counts = torch.zeros(times, classes, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    shares, ids = (counts / draws).sort(-1, descending=True)
    shares, ids = shares[:, :draws], ids[:, :draws]
    stored = log_probs.expand(times, -1).gather(1, ids).masked_fill(shares == 0, -math.inf)
    many, one = hidden.expand(times, -1).clone().requires_grad_(), hidden.clone().requires_grad_()
    found = topk_distillation_loss(
        many, weight, ids, stored, teacher_weights=shares, tail="sampled", temperature=2.0, backend="torch"
    ).loss
    expected = distillation_loss(one @ weight.T, teacher, temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    gradient = torch.autograd.grad(found, many)[0].sum(0)
    whole = torch.autograd.grad(expected, one)[0][0]
    assert (gradient - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_place_may_hold_any_id(tail: str, backend: str) -> None:
    tensors = example(9, 61, 5, tail)
    expected = computed(tensors, torch.float32, backend=backend, ce_weight=0.5)
    empty = tensors["teacher_log_probs"] == -math.inf
    tensors["teacher_ids"] = tensors["teacher_ids"].masked_fill(empty, -1)
    found = computed(tensors, torch.float32, backend=backend, ce_weight=0.5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_low_memory_gives_the_same_to_the_last_bit(tail: str, backend: str) -> None:
    tensors = example(9, 61, 5, tail)
    expected = computed(tensors, torch.float32, backend=backend, ce_weight=0.5)
    found = computed(tensors, torch.float32, backend=backend, ce_weight=0.5, low_memory=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_left_out_are_as_if_ignored(backend: str) -> None:
    tensors = example(9, 61, 5, "uniform")
    rows = torch.tensor([7, 4, 3], device=DEVICE)
    left = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    found = computed(tensors, torch.float32, backend=backend, rows=rows, ce_weight=0.5)
    tensors["labels"] = tensors["labels"].masked_fill(left, -100)
    expected = computed(tensors, torch.float32, backend="reference", ce_weight=0.5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_supervised_is_zero(tail: str, backend: str) -> None:
    tensors = example(5, 61, 3, tail)
    tensors["labels"][:] = -100
    tensors["teacher_log_probs"][0] = math.nan  # what is masked may hold anything
    found = computed(tensors, torch.float32, backend=backend, kd_weight=9.0, ce_weight=1.0)
    assert not any(tensor.any() for tensor in found.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_that_is_no_number_makes_the_loss_none(
    tail: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_distillation, "check_values", lambda *_: None)  # as on a GPU, which is not looked at
    tensors = example(6, 61, 5, tail)
    tensors["teacher_log_probs"][3] = math.nan
    tensors["labels"][3] = 1  # a row that counts
    assert computed(tensors, torch.float32, backend=backend)["loss"].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_extreme_logits_stay_finite(tail: str, backend: str) -> None:
    tensors = example(6, 61, 5, tail)
    tensors["hidden_states"][:3] *= 1e3
    tensors["teacher_log_probs"][3, 0] = 0.0  # the teacher is certain
    tensors["teacher_log_probs"][3, 1:] = -200.0
    tensors["teacher_log_probs"][4, 1:] = -math.inf
    check(tensors, torch.float32, backend, ce_weight=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_shape(backend: str) -> None:
    tensors = cast(example(12, 61, 5, "zero"), torch.float32)
    expected = topk_distillation_loss(**tensors, ce_weight=0.5, backend="reference")
    turned = tensors | {
        "hidden_states": tensors["hidden_states"].T.contiguous().T.reshape(3, 4, 16),
        "teacher_ids": tensors["teacher_ids"].int().T.contiguous().T.reshape(3, 4, 5),
        "teacher_log_probs": tensors["teacher_log_probs"].reshape(3, 4, 5),
        "labels": tensors["labels"].reshape(3, 4),
    }
    for ours, theirs in zip(topk_distillation_loss(**turned, ce_weight=0.5, backend=backend), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobodys_tensors_are_written_and_no_gradient_is_formed_unasked(backend: str) -> None:
    tensors = cast(example(6, 61, 5, "zero"), torch.float32)
    assert not topk_distillation_loss(**tensors, backend=backend).loss.requires_grad
    before = {name: tensor.clone() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    tensors["hidden_states"].requires_grad_()
    tensors["teacher_log_probs"].requires_grad_()
    topk_distillation_loss(**tensors, ce_weight=0.5, backend=backend).loss.backward()
    assert tensors["lm_head_weight"].grad is None
    assert tensors["teacher_log_probs"].grad is None
    assert all(torch.equal(tensors[name].detach(), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_second_derivative_is_refused(low_memory: bool) -> None:
    tensors = cast(example(6, 61, 5, "zero"), torch.float32)
    tensors["hidden_states"].requires_grad_()
    loss = topk_distillation_loss(**tensors, backend="torch", low_memory=low_memory).loss
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_without_a_break(backend: str) -> None:
    tensors = cast(example(6, 61, 5, "sampled"), torch.float32)
    hidden = tensors.pop("hidden_states")

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return 2 * topk_distillation_loss(hidden, **tensors, ce_weight=0.5, backend=backend).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    compiled(found).backward()
    loss(expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_waits_for_the_device(tail: str) -> None:
    """On the device that has no values: asking for one raises."""
    hidden, weight = (torch.empty(rows, 16, device="meta", requires_grad=True) for rows in (9, 70))
    labels, ids = (torch.empty(*shape, dtype=torch.long, device="meta") for shape in ((9,), (9, 5)))
    values = torch.empty(9, 5, device="meta")
    weights = values if tail == "sampled" else None
    topk_distillation_loss(
        hidden, weight, ids, values, teacher_weights=weights, tail=tail, labels=labels, backend="torch"
    ).loss.backward()
    # On this device the op's fake kernel stands in for it; the work itself:
    one, mask = torch.ones((), device="meta"), torch.empty(9, dtype=torch.bool, device="meta")
    found = topk_distillation._op._init_fn(
        hidden.detach(), weight.detach(), None, ids, values, weights, mask, labels, None, None, one, one, True, True,
        False, False, "torch", 70, tail, 2.0, 3.0, 1.0, -100, 0.1,
    )  # fmt: skip
    assert found[2].shape == (9, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_waits_for_a_real_gpu(tail: str, backend: str) -> None:
    tensors = cast(example(64, 5000, 16, tail), torch.bfloat16)
    tensors["lm_head_weight"].requires_grad_()
    topk_distillation_loss(**tensors, ce_weight=0.5, backend=backend).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_distillation_loss(**tensors, ce_weight=0.5, backend=backend).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="the record of allocations is a CPU's")
def test_memory_is_a_chunk_and_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(softmaxes, "BLOCK_BYTES", 2**15)
    tensors = cast(example(512, 2000, 8, "uniform"), torch.float32)
    hidden, weight = tensors.pop("hidden_states").requires_grad_(), tensors.pop("lm_head_weight").requires_grad_()

    def height(backend: str) -> int:
        return peak_bytes(
            lambda: torch.autograd.grad(
                topk_distillation_loss(hidden, weight, **tensors, backend=backend).loss, (hidden, weight)
            )
        )

    gradients = 4 * (hidden.numel() + 2 * weight.numel())
    assert height("torch") < 16 * 2000 * 4 + gradients + 2**15 + 2**18
    assert height("reference") > 8 * height("torch")


IDS, PROBS = torch.arange(3).repeat(5, 1), torch.zeros(5, 3)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another temperature": ({"teacher_temperature": 1.0, "temperature": 2.0}, "temperature: 2.0; .* stored at 1.0"),
    "no weights to sample": ({"tail": "sampled"}, "teacher_weights: should be given with tail 'sampled'"),
    "weights without sampling": ({"teacher_weights": PROBS}, "teacher_weights: should be given with tail 'sampled'"),
    "an unknown tail": ({"tail": "top"}, "tail: 'top'; should be one of zero, uniform, sampled"),
    "an id that is no class": ({"teacher_ids": IDS + 61}, "teacher_ids: 61 is no class; should be 0 to 60"),
    "an id of a float": ({"teacher_ids": PROBS}, "teacher_ids: torch.float32"),
    "ids of other rows": (
        {"teacher_ids": IDS[:4]},
        r"teacher_ids: shape \(4, 3\); should be \(5, k\), the rows of hidden_states",
    ),
    "no ids": ({"teacher_ids": IDS[:, :0]}, r"teacher_ids: shape \(5, 0\); should have at least one class"),
    "values of another shape": (
        {"teacher_log_probs": PROBS[:, :2]},
        r"teacher_log_probs: shape \(5, 2\); should be \(5, 3\)",
    ),
    "values of integers": ({"teacher_log_probs": IDS}, "teacher_log_probs: torch.int64"),
    "probabilities": ({"teacher_log_probs": torch.full((5, 3), 0.3)}, "teacher_log_probs: 0.3; should be 0 or less"),
    "no number": ({"teacher_log_probs": torch.full((5, 3), math.nan)}, "teacher_log_probs: nan; should be 0 or less"),
    "a class twice": ({"teacher_ids": torch.tensor([[1, 2, 3]] * 4 + [[4, 7, 4]])}, "teacher_ids: 4 is twice in a row"),
    "a negative share": (
        {"teacher_weights": torch.full((5, 3), -0.5), "tail": "sampled"},
        "teacher_weights: -0.5; should be 0 or more",
    ),
    "values elsewhere": ({"teacher_log_probs": PROBS.to("meta")}, "teacher_log_probs: on meta"),
    "a head of another width": ({"lm_head_weight": torch.zeros(61, 8)}, r"lm_head_weight: shape \(61, 8\)"),
    "a label that is no class": ({"labels": torch.full((5,), 61)}, "labels: 61 is no class"),
    "a mask of numbers": ({"mask": torch.ones(5)}, "mask: torch.float32"),
    "a row beyond the last": ({"rows": torch.tensor([5])}, "rows: 5 is no row; should be 0 to 4"),
    "no temperature": ({"temperature": 0.0}, "temperature: 0.0"),
    "no cap": ({"softcap": -1.0}, "softcap: -1.0"),
    "too much smoothing": ({"label_smoothing": 2.0}, "label_smoothing: 2.0"),
    "too large a vocabulary": ({"vocab_size": 62}, "vocab_size: 62"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_named(name: str) -> None:
    arguments, message = REFUSED[name]
    right = {"hidden_states": torch.zeros(5, 16), "lm_head_weight": torch.zeros(61, 16)}
    right |= {"teacher_ids": IDS, "teacher_log_probs": PROBS}
    with pytest.raises(ValueError, match=message):
        topk_distillation_loss(**(right | arguments))


@pytest.mark.skipif(DEVICE != "cpu", reason="nobody looks on a GPU")
def test_rows_that_do_not_count_and_empty_places_may_hold_anything() -> None:
    hidden, head_ = torch.randn(3, 16), torch.randn(61, 16)
    ids = torch.tensor([[5, 7, 5], [5, 7, 9], [8, 8, 8]])
    log_probs = torch.tensor([[-1.0, -2.0, -math.inf], [-1.0, 0.005, -2.0], [3.0, 3.0, 3.0]])
    mask = torch.tensor([True, True, False])
    found = [
        topk_distillation_loss(hidden, head_, ids, log_probs, backend=backend, **counting).loss
        for backend in ("torch", "reference")
        for counting in ({"mask": mask}, {"rows": torch.tensor([0, 1])}, {"labels": torch.tensor([1, 2, -100])})
    ]
    torch.testing.assert_close(torch.stack(found), found[0].expand(6))


@pytest.mark.parametrize("tail", TAILS)
def test_the_formulas_own_gradients_are_their_derivatives(tail: str) -> None:
    tensors = example(4, 9, 3, tail)
    names = ("hidden_states", "lm_head_weight", "bias")
    student = [tensors.pop(name).requires_grad_() for name in names]

    def loss(*student: torch.Tensor) -> torch.Tensor:
        arguments = dict(zip(names, student, strict=True)) | tensors
        return topk_distillation_loss(**arguments, ce_weight=0.5, temperature=1.5, backend="reference").loss

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)
