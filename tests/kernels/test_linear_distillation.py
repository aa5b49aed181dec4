"""Distillation between two heads: both terms and every gradient against the fp64 formulas, and what the op promises."""

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

from fleetune_kernels import Distilled, divergences, head, linear_distillation, linear_distillation_loss

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd"]
OPTIONS: dict[str, dict[str, Any]] = {
    "divergence alone": {"labels": None},
    "labels beside it": {"ce_weight": 0.5},
    "labels alone": {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.1},
    "another temperature": {"temperature": 3.0, "ce_weight": 0.5, "label_smoothing": 0.2},
    "reverse": {"divergence": "reverse_kl", "ce_weight": 0.5, "temperature": 2.0},
    "jsd": {"divergence": "jsd", "beta": 0.3, "ce_weight": 0.5},
    "tvd": {"divergence": "tvd", "ce_weight": 0.5, "temperature": 2.0},
    "soft caps and scales": {
        "student_softcap": 4.0,
        "teacher_softcap": 5.0,
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "ce_weight": 0.5,
        "temperature": 2.0,
    },
    "two teachers": {"teachers": 2, "ce_weight": 0.5, "temperature": 2.0},
    "no bias": {"biased": False, "ce_weight": 0.5},
    "token weights": {"token_weights": True, "ce_weight": 0.5},
    "a mask of its own": {"mask": True, "ce_weight": 0.5},
    "divisors of its own": {"kd_num_items": 40.0, "ce_num_items": 7.0, "ce_weight": 0.5},
}
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def _several_chunks_in_every_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(head, "CHUNK_ROWS", 4)


def example(rows: int, classes: int, teachers: int = 1, biased: bool = True, seed: int = 0) -> Tensors:
    """Heads with 3 and 5 more rows than classes, and everything that has a row, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    return {
        "student_hidden": normal(rows, 16),
        "student_weight": normal(classes + 3, 16),
        "student_bias": normal(classes + 3) if biased else None,
        "teacher_hidden": [normal(rows, 24) for _ in range(teachers)],
        "teacher_weight": [normal(classes + 5, 24) / 2 for _ in range(teachers)],
        "teacher_bias": [normal(classes + 5) if biased else None for _ in range(teachers)],
        "labels": labels.to(DEVICE),
        "vocab_size": classes,
    }


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def computed(tensors: Tensors, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor | None]:
    """The three figures and the student's gradients."""
    arguments = {name: cast(value, dtype) for name, value in tensors.items()} | options
    student = {name: arguments[name] for name in ("student_hidden", "student_weight", "student_bias")}
    student = {name: tensor.requires_grad_() for name, tensor in student.items() if tensor is not None}
    found = linear_distillation_loss(**(arguments | student))
    gradients = torch.autograd.grad(2 * found.loss, list(student.values()))
    return found._asdict() | dict(zip(student, gradients, strict=True))


def check(tensors: Tensors, dtype: torch.dtype, backend: str, **options: Any) -> None:
    tensors = {name: cast(cast(value, dtype), torch.float64) for name, value in tensors.items()}
    truth = computed(tensors, torch.float64, backend="reference", **options)
    eager = computed(tensors, dtype, backend="reference", **options)
    assert_no_worse(computed(tensors, dtype, backend=backend, **options), eager, truth, dtype)


def filled(options: dict[str, Any], rows: int, classes: int) -> tuple[Tensors, dict[str, Any]]:
    """Tensors for the options, and the options with real tensors where they say True or a number."""
    options = dict(options)
    made = {name: options.pop(name) for name in ("teachers", "biased") if name in options}
    if options.get("token_weights"):
        options["token_weights"] = torch.linspace(0, 2, rows, device=DEVICE)
    if options.get("mask"):
        options["mask"] = torch.arange(rows, device=DEVICE) % 3 != 1
    for name in ("kd_num_items", "ce_num_items"):
        if name in options:
            options[name] = torch.tensor(options[name], device=DEVICE)
    return example(rows, classes, **made), options


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_vocabulary_is_exact_on_a_gpu(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 128)
    tensors, options = filled(OPTIONS[name], 512, 128256)
    check(tensors, dtype, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_figures_and_gradients_are_as_exact_as_eager(name: str, dtype: torch.dtype, backend: str) -> None:
    tensors, options = filled(OPTIONS[name], 9, 61)
    check(tensors, dtype, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(dtype: torch.dtype, backend: str) -> None:
    check(example(3, 30522), dtype, backend, ce_weight=0.5, temperature=2.0)


@pytest.mark.parametrize("name", ["jsd", "soft caps and scales", "two teachers", "another temperature"])
def test_fp64_is_computed_in_fp64(name: str) -> None:
    tensors, options = filled(OPTIONS[name], 9, 61)
    check(tensors, torch.float64, "torch", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["labels beside it", "a mask of its own", "two teachers", "no bias"])
def test_low_memory_gives_the_same_to_the_last_bit(name: str, backend: str) -> None:
    tensors, options = filled(OPTIONS[name], 9, 61)
    expected = computed(tensors, torch.float32, backend=backend, **options)
    found = computed(tensors, torch.float32, backend=backend, low_memory=True, **options)
    assert all(torch.equal(found[key], expected[key]) for key in expected)  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(8, 50),
    options=st.fixed_dictionaries(
        {"divergence": st.sampled_from(DIVERGENCES)},
        optional={
            "temperature": st.floats(0.5, 4),
            "ce_weight": st.floats(0.1, 2),
            "kd_weight": st.floats(0.1, 2),
            "student_softcap": st.floats(2, 30),
            "student_logit_scale": st.floats(0.5, 1.5),
            "label_smoothing": st.floats(0, 0.5),
            "token_weights": st.just(True),
            "teachers": st.integers(1, 3),
        },
    ),
    backend=st.sampled_from(BACKENDS),
)
def test_any_shape_and_options(rows: int, classes: int, options: dict[str, Any], backend: str) -> None:
    tensors, options = filled(options, rows, classes)
    tensors["labels"][0] = 1  # a row counts
    if "token_weights" in options:
        options["token_weights"] = options["token_weights"] + 0.1
    check(tensors, torch.float32, backend, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_left_out_are_as_if_ignored(backend: str) -> None:
    tensors = cast(list(example(9, 61).values()), torch.float32)
    tensors = dict(zip(example(9, 61), tensors, strict=True))
    rows = torch.tensor([7, 2, 3], device=DEVICE)
    ignored = tensors["labels"].clone()
    others = [row for row in range(9) if row not in (7, 2, 3)]
    ignored[others] = -100
    found = computed(tensors, torch.float32, backend=backend, rows=rows, ce_weight=0.5)
    expected = computed(tensors | {"labels": ignored}, torch.float32, backend="reference", ce_weight=0.5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    alone = computed(tensors | {"labels": None}, torch.float32, backend=backend, rows=rows)
    in_rows = torch.zeros(9, dtype=torch.bool, device=DEVICE).index_fill(0, rows, True)
    expected = computed(tensors | {"labels": None}, torch.float32, backend="reference", mask=in_rows)
    for name, tensor in expected.items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_term_has_its_own_rows_and_divisor(backend: str) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(9, 61).items()}
    mask = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    mask[4] = True
    found = linear_distillation_loss(**tensors, mask=mask, kd_weight=2.0, ce_weight=3.0, backend=backend)
    torch.testing.assert_close(found.loss, 2 * found.kd + 3 * found.ce)
    without = linear_distillation_loss(**(tensors | {"labels": None}), mask=mask, backend=backend)
    torch.testing.assert_close(found.kd, without.kd)
    assert without.ce == 0
    no_rows = linear_distillation_loss(**tensors, mask=mask & False, ce_weight=3.0, backend=backend)
    torch.testing.assert_close(no_rows.ce, found.ce)
    assert no_rows.kd == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_loss_does_not_underflow_in_fp16(backend: str) -> None:
    """Divided by 10 million items, gradients of the logits would be below the smallest fp16."""
    items = torch.tensor(1e7, device=DEVICE)
    tensors = example(9, 61)
    small = computed(tensors, torch.float16, backend=backend, kd_num_items=items, ce_num_items=items, ce_weight=0.5)
    one = torch.ones((), device=DEVICE)
    whole = computed(tensors, torch.float16, backend=backend, kd_num_items=one, ce_num_items=one, ce_weight=0.5)
    arguments = {name: cast(value, torch.float16) for name, value in tensors.items()}
    weight = arguments.pop("student_weight").requires_grad_()
    loss = linear_distillation_loss(
        student_weight=weight, **arguments, kd_num_items=items, ce_num_items=items, ce_weight=0.5, backend=backend
    ).loss
    (gradient,) = torch.autograd.grad(2**20 * loss, weight)  # as a loss scaler does
    assert isinstance(whole["student_weight"], torch.Tensor)
    torch.testing.assert_close(gradient, (whole["student_weight"].float() * (2**19 / 1e7)).half(), rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(small["loss"], whole["loss"] / 1e7)  # type: ignore[operator]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_supervised_is_zero(divergence: str, backend: str) -> None:
    tensors = example(5, 61)
    tensors["labels"][:] = -100
    found = computed(tensors, torch.float32, backend=backend, divergence=divergence, kd_weight=9.0, ce_weight=1.0)
    assert not any(tensor.any() for tensor in found.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_shape(backend: str) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(12, 61).items()}
    expected = linear_distillation_loss(**tensors, ce_weight=0.5, backend="reference")
    turned = tensors | {
        "student_hidden": tensors["student_hidden"].T.contiguous().T.reshape(3, 4, 16),
        "student_weight": tensors["student_weight"].T.contiguous().T,
        "teacher_hidden": [hidden.reshape(3, 4, 24) for hidden in tensors["teacher_hidden"]],
        "teacher_weight": [weight.T.contiguous().T for weight in tensors["teacher_weight"]],
        "labels": tensors["labels"].reshape(3, 4),
    }
    found = linear_distillation_loss(**turned, ce_weight=0.5, backend=backend)
    assert isinstance(found, Distilled)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_gradients_are_formed_for_whoever_wants_one(low_memory: bool, backend: str) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(5, 61).items()}
    names = ("student_hidden", "student_weight", "student_bias")
    wanting = {name: tensors[name].clone().requires_grad_() for name in names}
    whole = linear_distillation_loss(**(tensors | wanting), backend=backend)
    expected = torch.autograd.grad(whole.loss, list(wanting.values()))
    assert not whole.kd.requires_grad
    assert not whole.ce.requires_grad
    assert not linear_distillation_loss(**tensors, backend=backend).loss.requires_grad
    for name, gradient in zip(names, expected, strict=True):
        alone = tensors[name].clone().requires_grad_()
        loss = linear_distillation_loss(**(tensors | {name: alone}), backend=backend, low_memory=low_memory).loss
        assert torch.equal(torch.autograd.grad(loss, alone)[0], gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_and_arguments_stay_as_they_are(backend: str) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(5, 61).items()}
    teacher = tensors["teacher_weight"][0].requires_grad_()
    tensors["student_weight"].requires_grad_()
    flat = [tensors["student_hidden"], tensors["student_weight"], teacher, *tensors["teacher_hidden"]]
    before = [tensor.detach().clone() for tensor in flat]
    linear_distillation_loss(**tensors, ce_weight=0.5, temperature=2.0, backend=backend).loss.backward()
    assert teacher.grad is None
    assert all(torch.equal(tensor.detach(), old) for tensor, old in zip(flat, before, strict=True))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_second_derivative_is_refused(low_memory: bool) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(5, 61).items()}
    tensors["student_hidden"].requires_grad_()
    loss = linear_distillation_loss(**tensors, backend="torch", low_memory=low_memory).loss
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_it_compiles_without_a_break(low_memory: bool, backend: str) -> None:
    tensors = {name: cast(value, torch.float32) for name, value in example(5, 61, teachers=2).items()}
    hidden = tensors.pop("student_hidden")

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"ce_weight": 0.5, "low_memory": low_memory, "backend": backend}
        return 2 * linear_distillation_loss(student_hidden=hidden, **tensors, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    compiled(found).backward()
    loss(expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_nothing_waits_for_the_device() -> None:
    """On the device that has no values: asking for one raises."""
    hidden, weight = (torch.empty(rows, 16, device="meta", requires_grad=True) for rows in (9, 70))
    labels, mask = (torch.empty(9, dtype=dtype, device="meta") for dtype in (torch.long, torch.bool))
    linear_distillation_loss(hidden, weight, hidden, weight, labels=labels, mask=mask, backend="torch").loss.backward()
    # On this device the op's fake kernel stands in for it; the work itself:
    x, w, one = hidden.detach(), weight.detach(), torch.ones((), device="meta")
    found = linear_distillation._op._init_fn(
        x, w, None, [x, x], [w, w], [w[:0, 0], w[:0, 0]], mask, labels, None, None, one, one, True, True, False, False,
        "torch", 70, 2.0, "jsd", 0.5, 3.0, 3.0, 1.0, 1.0, -100, 0.1,
    )  # fmt: skip
    assert found[2].shape == (9, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_a_real_gpu(backend: str) -> None:
    tensors = {name: cast(value, torch.bfloat16) for name, value in example(64, 5000, teachers=2).items()}
    tensors["student_weight"].requires_grad_()
    rows = torch.arange(0, 64, 2, device=DEVICE)
    linear_distillation_loss(**tensors, ce_weight=0.5, backend=backend).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_distillation_loss(**tensors, ce_weight=0.5, rows=rows, backend=backend).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="the record of allocations is a CPU's")
@pytest.mark.parametrize("low_memory", [False, True])
def test_memory_is_two_chunks_and_the_gradients(low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 2**15)
    tensors = {name: cast(value, torch.float32) for name, value in example(512, 2000).items()}
    hidden, weight = tensors.pop("student_hidden").requires_grad_(), tensors.pop("student_weight").requires_grad_()

    def height(backend: str) -> int:
        options: dict[str, Any] = {"backend": backend, "low_memory": low_memory}
        return peak_bytes(
            lambda: torch.autograd.grad(
                linear_distillation_loss(hidden, weight, **tensors, **options).loss, (hidden, weight)
            )
        )

    gradients = 4 * (hidden.numel() + 2 * weight.numel())
    assert height("torch") < 2 * 16 * 2000 * 4 + gradients + 4 * 2**15 + 2**17
    assert height("reference") > 8 * height("torch")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a head of another width": ({"student_weight": torch.zeros(61, 8)}, r"student_weight: shape \(61, 8\)"),
    "a gathered head that is empty": ({"student_weight": torch.zeros(0)}, "under ZeRO-3"),
    "a teacher of another width": ({"teacher_weight": torch.zeros(61, 8)}, r"teacher_weight: shape \(61, 8\)"),
    "a head of another dtype": ({"student_weight": torch.zeros(61, 16).half()}, "student_weight: torch.float16"),
    "other rows of the teacher": (
        {"teacher_hidden": torch.zeros(4, 16)},
        r"teacher_hidden: shape \(4, 16\); should be \(5, E\)",
    ),
    "another vocabulary": (
        {"teacher_weight": torch.zeros(60, 16)},
        "teacher_weight: 60 rows; student_weight has 61, and vocab_size cuts both",
    ),
    "another vocabulary of one of two": (
        {"teacher_hidden": [torch.zeros(5, 16)] * 2, "teacher_weight": [torch.zeros(61, 16), torch.zeros(60, 16)]},
        r"teacher_weight\[1\]: 60 rows",
    ),
    "a bias of another length": ({"student_bias": torch.zeros(3)}, r"student_bias: shape \(3,\); should be \(61,\)"),
    "a head less than teachers": ({"teacher_hidden": [torch.zeros(5, 16)] * 2}, "teacher_weight: 1 for 2 teachers"),
    "a bias more than teachers": ({"teacher_bias": [None, None]}, "teacher_bias: 2 for 1 teachers"),
    "a teacher elsewhere": ({"teacher_hidden": torch.zeros(5, 16, device="meta")}, "teacher_hidden: on meta"),
    "a label that is no class": ({"labels": torch.full((5,), 61)}, "labels: 61 is no class"),
    "too few labels": ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels: shape \(4,\)"),
    "labels of floats": ({"labels": torch.zeros(5)}, "labels: torch.float32"),
    "a mask of numbers": ({"mask": torch.ones(5)}, "mask: torch.float32"),
    "rows that are no indices": ({"rows": torch.ones(5)}, "rows: torch.float32"),
    "a row beyond the last": ({"rows": torch.tensor([5])}, "rows: 5 is no row; should be 0 to 4, .* of student_hidden"),
    "no temperature": ({"temperature": -1.0}, "temperature: -1.0"),
    "no middle": ({"beta": 0.0}, "beta: 0.0"),
    "an unknown divergence": ({"divergence": "kl"}, "divergence: 'kl'"),
    "no cap": ({"teacher_softcap": 0.0}, "teacher_softcap: 0.0"),
    "a cap without end": ({"teacher_softcap": math.inf}, "teacher_softcap: inf; should be a finite number above 0"),
    "too much smoothing": ({"label_smoothing": 2.0}, "label_smoothing: 2.0"),
    "too large a vocabulary": ({"vocab_size": 62}, "vocab_size: 62; should be 1 to 61"),
    "an unknown backend": ({"backend": "cuda"}, "backend: 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_named(name: str) -> None:
    arguments, message = REFUSED[name]
    right = {"student_hidden": torch.zeros(5, 16), "student_weight": torch.zeros(61, 16)}
    right |= {"teacher_hidden": torch.zeros(5, 16), "teacher_weight": torch.zeros(61, 16)}
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(**(right | arguments))


@pytest.mark.parametrize("name", ["labels beside it", "jsd", "soft caps and scales", "two teachers", "token weights"])
def test_the_formulas_own_gradients_are_their_derivatives(name: str) -> None:
    tensors, options = filled(OPTIONS[name], 4, 6)
    names = ("student_hidden", "student_weight", "student_bias")
    student = [tensors.pop(key).requires_grad_() for key in names]

    def loss(*student: torch.Tensor) -> torch.Tensor:
        return linear_distillation_loss(
            **dict(zip(names, student, strict=True)), **tensors, **options, backend="reference"
        ).loss

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)


def test_a_cross_entropy_without_labels_is_refused() -> None:
    from fleetune_kernels import linear_distillation_loss, topk_distillation_loss

    hidden, head = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"ce_weight: 0\.5; needs labels"):
        linear_distillation_loss(hidden, head, hidden, head, ce_weight=0.5)
    ids = torch.arange(2).expand(3, 2)
    with pytest.raises(ValueError, match=r"ce_weight: 0\.5; needs labels"):
        topk_distillation_loss(hidden, head, ids, torch.full((3, 2), -1.0), ce_weight=0.5)
