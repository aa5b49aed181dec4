"""Distillation from logits: every divergence, dtype and backend against the fp64 formulas, and what the op promises."""

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
from torch.nn import functional

from fleetune_kernels import distillation, distillation_loss, divergences

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd"]
Loss = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _several_blocks_in_every_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(divergences, "MEAN_BYTES", 2**14)


def example(*shape: int, teachers: int = 1, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (*shape) of a student and of its teachers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    several = [3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(1 + teachers)]
    return several[0].to(DEVICE), [logits.to(DEVICE) for logits in several[1:]]


def computed(student: torch.Tensor, teachers: list[torch.Tensor], dtype: torch.dtype, **options: Any) -> Loss:
    """The loss and the student's gradient."""
    student = student.to(dtype).requires_grad_()
    loss = distillation_loss(student, [logits.to(dtype) for logits in teachers], **options)
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), student)
    return {"loss": loss, "student_logits": gradient}


def check(
    student: torch.Tensor, teachers: list[torch.Tensor], dtype: torch.dtype, backend: str, **options: Any
) -> None:
    student, teachers = student.to(dtype).double(), [logits.to(dtype).double() for logits in teachers]
    truth = computed(student, teachers, torch.float64, backend="reference", **options)
    eager = computed(student, teachers, dtype, backend="reference", **options)
    found = computed(student, teachers, dtype, backend=backend, **options)
    assert_no_worse(found, eager, truth, dtype, {"student_logits": cancelling(truth, dtype, **options)})


def cancelling(
    truth: Loss, dtype: torch.dtype, divergence: str = "forward_kl", temperature: float = 1.0, **_: Any
) -> float:
    """The gradient's rounding where it is S (log S/T - KL) of a student that is nearly certain: both terms in brackets
    are as large as the loss, and their difference is nearly 0."""
    if dtype == torch.float64 or divergence not in ("reverse_kl", "jsd"):
        return 0.0
    loss, gradient = truth["loss"], truth["student_logits"]
    assert loss is not None
    assert gradient is not None
    size = float(loss.detach().abs().sum()) / temperature  # a loss is temperature squared times the divergence
    return 4 * torch.finfo(torch.float32).eps * size / max(float(gradient.norm()), 1e-30)


def some(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask with both values in it, and weights of the rows."""
    count = math.prod(shape)
    mask = (torch.arange(count) % 3 != 1).reshape(shape)
    return mask.to(DEVICE), torch.linspace(0, 2, count).reshape(shape).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_real_size_is_exact_on_a_gpu(divergence: str, dtype: torch.dtype, backend: str) -> None:
    student, teachers = example(512, 128256)
    check(student, teachers, dtype, backend, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 512), (7, 203)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient_are_as_exact_as_eager(
    divergence: str, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    student, teachers = example(*shape)
    check(student, teachers, dtype, backend, divergence=divergence, temperature=2.0, beta=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_real_vocabulary(divergence: str, backend: str) -> None:
    student, teachers = example(2, 30522)
    check(student, teachers, torch.float32, backend, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp64_is_computed_in_fp64(divergence: str) -> None:
    student, teachers = example(5, 300, teachers=2)
    check(student, teachers, torch.float64, "torch", divergence=divergence, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("num_items", [None, 7.0])
def test_reductions_and_divisors(reduction: str, num_items: float | None, backend: str) -> None:
    student, teachers = example(4, 5, 50)
    mask, token_weights = some(4, 5)
    divisor = None if num_items is None else torch.tensor(num_items, device=DEVICE)
    options = {"mask": mask, "token_weights": token_weights, "reduction": reduction, "num_items": divisor}
    check(student, teachers, torch.float32, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_several_teachers_are_the_mean_of_their_soft_targets(divergence: str, backend: str) -> None:
    student, teachers = example(6, 200, teachers=3)
    check(student, teachers, torch.float32, backend, divergence=divergence, temperature=3.0)
    soft = [torch.softmax(logits / 3.0, -1) for logits in teachers]
    mean = 3.0 * torch.stack(soft).mean(0).log()
    together = distillation_loss(student.float(), teachers, divergence=divergence, temperature=3.0, backend=backend)
    alone = distillation_loss(student, mean, divergence=divergence, temperature=3.0, backend="torch")
    torch.testing.assert_close(together.double(), alone, rtol=1e-5, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 7),
    classes=st.integers(8, 70),
    paddings=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    options=st.fixed_dictionaries(
        {"divergence": st.sampled_from(DIVERGENCES), "reduction": st.sampled_from(["none", "sum", "mean"])},
        optional={"temperature": st.floats(0.5, 8), "beta": st.floats(0.05, 0.95)},
    ),
    masked=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 99),
)
def test_any_shape_and_options(
    rows: int,
    classes: int,
    paddings: tuple[int, int],
    options: dict[str, Any],
    masked: bool,
    backend: str,
    seed: int,
) -> None:
    student, (teacher,) = example(rows, classes + 9, seed=seed)
    student, teacher = student[:, : classes + paddings[0]], teacher[:, : classes + paddings[1]]
    if masked:
        options = options | {"mask": some(rows)[0]}
    check(student, [teacher], torch.float32, backend, vocab_size=classes, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unequal_vocabularies_are_cut_and_the_rest_has_no_gradient(backend: str) -> None:
    student, (teacher,) = example(6, 40)
    wide = torch.cat([student, torch.full_like(student, 1e4)], dim=1).float().requires_grad_()
    teacher = torch.cat([teacher, torch.full_like(teacher[:, :3], 1e4)], dim=1).float()
    loss = distillation_loss(wide, teacher, vocab_size=40, backend=backend)
    torch.testing.assert_close(loss, distillation_loss(student.float(), teacher[:, :40], backend="reference"))
    (gradient,) = torch.autograd.grad(loss, wide)
    assert not gradient[:, 40:].any()
    assert gradient[:, :40].any()
    with pytest.raises(ValueError, match="teacher_logits: 43 columns, student_logits have 80; vocab_size cuts both"):
        distillation_loss(wide, teacher, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_supervised_is_zero(divergence: str, reduction: str, backend: str) -> None:
    student, teachers = example(5, 300)
    mask = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    student[0] = math.nan  # what is masked may hold anything
    found = computed(
        student, teachers, torch.float32, backend=backend, reduction=reduction, mask=mask, divergence=divergence
    )
    assert not found["loss"].any()
    assert not found["student_logits"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all_are_zero(backend: str) -> None:
    student = torch.empty(0, 300, device=DEVICE, requires_grad=True)
    loss = distillation_loss(student, student, backend=backend)
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 300)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence: str, dtype: torch.dtype, backend: str) -> None:
    student, (teacher,) = example(7, 300)
    # The gradient of the reverse divergence contains s - t, and with it no more digits than that has.
    large = 500.0 if divergence == "reverse_kl" else 6e4
    student[0], student[1, 5], student[2] = -large, large, large
    teacher[1, 9], teacher[3] = large, -large
    student[4, ::2] = -math.inf  # neither has these classes
    teacher[4, ::2] = -math.inf
    if divergence != "reverse_kl":
        teacher[5, 1::2] = -math.inf  # the student alone has these: the reverse divergence is infinite
    check(student, [teacher], dtype, backend, divergence=divergence)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_input_that_is_no_number_is_never_hidden(divergence: str, backend: str) -> None:
    student, (teacher,) = example(3, 300)
    student[0, 7] = math.nan
    teacher[1, 7] = math.nan
    losses = distillation_loss(
        student.float(), teacher.float(), divergence=divergence, reduction="none", backend=backend
    )
    assert losses.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(divergence: str, backend: str) -> None:
    student, _ = example(4, 300)
    found = computed(student, [student], torch.float32, backend=backend, divergence=divergence)
    assert found["loss"].abs() < 1e-6
    assert found["student_logits"].abs().max() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_shape(backend: str) -> None:
    student, (teacher,) = example(3, 4, 64)
    turned, turned_teacher = (
        logits.float().permute(2, 0, 1).contiguous().permute(1, 2, 0) for logits in (student, teacher)
    )
    assert not turned.is_contiguous()
    found = distillation_loss(turned, turned_teacher, backend=backend, reduction="none")
    assert found.shape == (3, 4)
    expected = distillation_loss(student.float(), teacher.float(), backend="reference", reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_of_another_dtype_is_read_as_it_is(backend: str) -> None:
    student, (teacher,) = example(4, 64)
    teacher = teacher.bfloat16()
    found = distillation_loss(student.float(), teacher, backend=backend)
    torch.testing.assert_close(found, distillation_loss(student.float(), teacher.float(), backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_tensors_are_never_written(backend: str) -> None:
    student, teachers = example(6, 300, teachers=2)
    tensors = [student.float().requires_grad_(), *(logits.float() for logits in teachers)]
    before = [tensor.detach().clone() for tensor in tensors]
    distillation_loss(tensors[0], tensors[1:], backend=backend, divergence="jsd").backward()
    assert all(torch.equal(tensor.detach(), old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_is_never_differentiated(backend: str) -> None:
    student, (teacher,) = example(6, 300)
    teacher = teacher.float().requires_grad_()
    distillation_loss(student.float().requires_grad_(), teacher, backend=backend).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_formed_where_none_is_asked_for(backend: str) -> None:
    student, teachers = example(6, 300)
    assert not distillation_loss(student.float(), teachers, backend=backend).requires_grad
    with torch.no_grad():
        assert not distillation_loss(student.float().requires_grad_(), teachers, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_derivative_is_refused(reduction: str, backend: str) -> None:
    student, teachers = example(6, 300)
    loss = distillation_loss(student.float().requires_grad_(), teachers, backend=backend, reduction=reduction)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
        loss.sum().backward(create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass_is_refused_and_never_wrong(backend: str) -> None:
    student, teachers = example(6, 300)
    loss = 3 * distillation_loss(student.float().requires_grad_(), teachers, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_compiles_without_a_break(reduction: str, backend: str) -> None:
    student, teachers = example(6, 300, teachers=2)
    mask, token_weights = some(6)

    def loss(student: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"mask": mask, "token_weights": token_weights, "reduction": reduction}
        return 2 * distillation_loss(student, teachers, backend=backend, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = student.float().requires_grad_(), student.float().requires_grad_()
    compiled(found).backward()
    loss(expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_fake_kernel_fits_the_real_one() -> None:
    student, teachers = example(6, 300, teachers=2)
    divisor = torch.ones((), device=DEVICE)
    torch.library.opcheck(
        distillation._op,
        (student.float(), teachers, None, None, divisor, True, True, "torch", 300, 2.0, "jsd", 0.5),
        # A gradient handed out in place cannot be taken twice, which the third check does.
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_waits_for_the_device(divergence: str) -> None:
    """On the device that has no values: asking for one raises."""
    student, teacher = torch.empty(9, 300, device="meta", requires_grad=True), torch.empty(9, 300, device="meta")
    mask = torch.ones(9, dtype=torch.bool, device="meta")
    distillation_loss(student, teacher, divergence=divergence, mask=mask, backend="torch").backward()
    # On this device the op's fake kernel stands in for it; the work itself:
    ones, labels = torch.ones(9, device="meta"), torch.zeros(9, dtype=torch.long, device="meta")
    options = divergences.Options(300, 2.0, divergence, student_softcap=3.0, label_smoothing=0.1)
    student = student.detach()
    losses = divergences.rows(
        student, torch.empty_like(student), [teacher] * 2, mask, ones, labels, ones, options, "torch"
    )
    assert losses.shape == (2, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_a_real_gpu(backend: str) -> None:
    student, teachers = example(64, 5000, teachers=2)
    student = student.float().requires_grad_()
    distillation_loss(student, teachers, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distillation_loss(student, teachers, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="the record of allocations is a CPU's")
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_some_blocks(
    dtype: torch.dtype, teachers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 2**17)
    student, several = example(500, 2000, teachers=teachers)
    student, several = student.to(dtype).requires_grad_(), [logits.to(dtype) for logits in several]
    allowed = student.numel() * student.element_size() + 4 * 2**17 + 2**17

    def height(backend: str) -> int:
        return peak_bytes(
            lambda: torch.autograd.grad(distillation_loss(student, several, divergence="jsd", backend=backend), student)
        )

    assert height("torch") < allowed
    assert height("reference") > 4 * allowed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another shape of the teacher": (
        {"teacher_logits": torch.zeros(5, 300)},
        r"teacher_logits: shape \(5, 300\); should be \(6, V\), the rows of student_logits",
    ),
    "one teacher of several": (
        {"teacher_logits": [torch.zeros(6, 300), torch.zeros(6, 299)]},
        r"teacher_logits\[1\]: 299 columns, student_logits have 300",
    ),
    "no teacher": ({"teacher_logits": []}, "teacher_logits: an empty list"),
    "an integer teacher": ({"teacher_logits": torch.zeros(6, 300, dtype=torch.long)}, "teacher_logits: torch.int64"),
    "a teacher elsewhere": ({"teacher_logits": torch.zeros(6, 300, device="meta")}, "teacher_logits: on meta"),
    "an integer student": ({"student_logits": torch.zeros(6, 300, dtype=torch.long)}, "student_logits: torch.int64"),
    "a mask of another shape": (
        {"mask": torch.ones(5, dtype=torch.bool)},
        r"mask: shape \(5,\); should be \(6,\), one for each row of student_logits",
    ),
    "a mask of numbers": ({"mask": torch.ones(6)}, "mask: torch.float32; should be bool"),
    "token weights of another shape": ({"token_weights": torch.ones(6, 1)}, r"token_weights: shape \(6, 1\)"),
    "token weights elsewhere": ({"token_weights": torch.ones(6, device="meta")}, "token_weights: on meta"),
    "no temperature": ({"temperature": 0.0}, "temperature: 0.0; should be a finite number above 0"),
    "an infinite temperature": ({"temperature": math.inf}, "temperature: inf; should be a finite number above 0"),
    "no middle": ({"divergence": "jsd", "beta": 1.0}, "beta: 1.0; should be between 0 and 1"),
    "an unknown divergence": ({"divergence": "kl"}, "divergence: 'kl'; should be one of forward_kl, reverse_kl"),
    "an unknown reduction": ({"reduction": "average"}, "reduction: 'average'; should be one of none, mean, sum"),
    "too large a vocabulary": ({"vocab_size": 301}, "vocab_size: 301; should be 1 to 300"),
    "an unknown backend": ({"backend": "cuda"}, "backend: 'cuda'; should be one of auto, triton, torch, reference"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_wrong_arguments_are_named(name: str, backend: str) -> None:
    arguments, message = REFUSED[name]
    right = {"student_logits": torch.zeros(6, 300), "teacher_logits": torch.zeros(6, 300), "backend": backend}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(right | arguments))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_formulas_own_gradients_are_their_derivatives(divergence: str) -> None:
    student, teachers = example(4, 6, teachers=2)
    mask, token_weights = some(4)
    options = {"divergence": divergence, "mask": mask, "token_weights": token_weights.double(), "temperature": 1.5}
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teachers, backend="reference", beta=0.3, **options), student
    )


def test_pytorch_agrees_on_the_forward_divergence() -> None:
    student, (teacher,) = example(8, 40)
    expected = functional.kl_div(
        torch.log_softmax(student / 2, -1), torch.softmax(teacher / 2, -1), reduction="batchmean"
    )
    found = distillation_loss(student, teacher, temperature=2.0, backend="torch")
    torch.testing.assert_close(found, 4 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_may_be_strided_or_expanded(backend: str, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 300, generator=generator).to(DEVICE) for _ in range(2))
    mask = (torch.arange(18, device=DEVICE).reshape(9, 2) % 3 > 0)[:, 1]
    weights = torch.linspace(0.5, 2, 18, device=DEVICE).reshape(9, 2)[:, 0]
    found = []
    for which in (backend, "reference"):
        leaf = student.clone().requires_grad_()
        options = {"mask": mask, "token_weights": weights, "reduction": reduction, "backend": which}
        loss = distillation_loss(leaf, teacher, **options)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_one_launch_takes_all_rows(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetune_kernels.triton import distillation as kernels

    launched, rows = [], kernels.rows

    def counted(student: torch.Tensor, *arguments: Any, **options: Any) -> None:
        launched.append(len(student))
        rows(student, *arguments, **options)

    monkeypatch.setattr(kernels, "rows", counted)
    student, teacher = torch.randn(2, 13, 300, device=DEVICE).unbind()
    found = distillation_loss(student, teacher, divergence=divergence, backend="triton")
    assert launched == [13]
    torch.testing.assert_close(found, distillation_loss(student, teacher, divergence=divergence, backend="reference"))
