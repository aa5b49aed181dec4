"""The divergences of `distillation.py` over the rows of a chunk of logits, and the labels' cross-entropy beside them.

In torch by blocks of rows that fit the cache, in place; in Triton one kernel. Extreme logits give what the limit gives:
p log p is 0 at p = 0, whatever the logarithm is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from fleetune_kernels import softmax_cross_entropy
from fleetune_kernels.backends import one_of

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
# Bytes of one of the three or four blocks of rows that the passes of the torch backend share.
BLOCK_BYTES = 2**22
# Bytes of the mean of several teachers, by rows, that a Triton kernel reads.
MEAN_BYTES = 2**26


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on beside its logits and its label."""

    vocab_size: int
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    student_softcap: float = 0.0  # 0: none
    teacher_softcap: float = 0.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def of_labels(self) -> softmax_cross_entropy.Options:
        return softmax_cross_entropy.Options(
            self.vocab_size,
            self.ignore_index,
            self.label_smoothing,
            softcap=self.student_softcap,
            logit_scale=self.student_logit_scale,
        )

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.divergence == "tvd" else self.temperature**2


def checked_options(options: Options) -> Options:
    one_of("divergence", options.divergence, DIVERGENCES)
    if not 0.0 < options.temperature < math.inf:
        raise ValueError(f"temperature: {options.temperature}; should be a finite number above 0")
    if not 0.0 < options.beta < 1.0:
        raise ValueError(f"beta: {options.beta}; should be between 0 and 1")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: {options.label_smoothing}; should be 0 to 1")
    return options


def rows(
    student: torch.Tensor,  # (N, V or more) logits, the last axis contiguous
    gradient: torch.Tensor | None,  # (N, V or more) to write it to; may be the student's logits themselves
    teachers: Sequence[torch.Tensor],  # (N, V or more) each
    mask: torch.Tensor | None,  # (N,)
    kd_coefficients: torch.Tensor,  # (N,)
    labels: torch.Tensor | None,  # (N,)
    ce_coefficients: torch.Tensor | None,  # (N,), with the labels
    options: Options,
    backend: str,
) -> torch.Tensor:
    """Losses (2, N), without the coefficients: the divergence, and the labels' cross-entropy (0 without labels).

    Writes the gradient of sum_i kd_coefficients_i losses_0i + ce_coefficients_i losses_1i. The columns beyond the
    vocabulary get 0.
    """
    losses = kd_coefficients.new_zeros(2, len(student))
    triton = backend == "triton"
    count = max(1, len(student))
    if not triton or len(teachers) > 1:  # one kernel takes all rows of one teacher
        block = MEAN_BYTES if triton else BLOCK_BYTES
        count = min(count, max(1, block // (options.vocab_size * losses.element_size())))
    work = None if triton else Workspace(count, options, losses)
    for start in range(0, len(student), count):
        at = slice(start, start + count)
        arguments = (
            student[at],
            None if gradient is None else gradient[at],
            [logits[at] for logits in teachers],
            None if mask is None else mask[at],
            kd_coefficients[at],
            None if labels is None else labels[at],
            None if ce_coefficients is None else ce_coefficients[at],
            losses[:, at],
        )
        if work is None:
            _on_gpu(*arguments, options)
        else:
            work.block(*arguments)
    return losses


def _on_gpu(
    student: torch.Tensor,
    gradient: torch.Tensor | None,
    teachers: list[torch.Tensor],
    mask: torch.Tensor | None,
    kd_coefficients: torch.Tensor,
    labels: torch.Tensor | None,
    ce_coefficients: torch.Tensor | None,
    losses: torch.Tensor,  # (2, R), written
    options: Options,
) -> None:
    from fleetune_kernels.triton.distillation import rows as rows_on_gpu

    fields = asdict(options) | {"loss_scale": options.loss_scale}
    (teacher, *others) = teachers
    if others:
        teacher = losses.new_empty(len(student), options.vocab_size)
        mean_teacher(teacher, torch.empty_like(teacher), teachers, options).mul_(options.temperature)
        fields |= {"teacher_softcap": 0.0, "teacher_logit_scale": 1.0}
    teacher = teacher if teacher.stride(-1) == 1 else teacher.contiguous()
    rows_on_gpu(student, gradient, teacher, mask, kd_coefficients, labels, ce_coefficients, losses, **fields)


def tempered(out: torch.Tensor, logits: torch.Tensor, softcap: float, logit_scale: float) -> torch.Tensor:
    """The capped logits in the dtype of `out`, written there."""
    if out is not logits:
        out.copy_(logits[:, : out.shape[1]])
    if logit_scale != 1.0:
        out.mul_(logit_scale)
    if softcap:
        out.div_(softcap).tanh_().mul_(softcap)
    return out


def divided_(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return x if temperature == 1.0 else x.div_(temperature)


def mean_teacher(
    out: torch.Tensor,  # (R, V)
    spare: torch.Tensor,  # (R, V), overwritten where there are several teachers
    teachers: Sequence[torch.Tensor],
    options: Options,
) -> torch.Tensor:
    """Written to `out`: a teacher's logits / tau, or of several the logarithm of their mean soft target."""
    cap = (options.teacher_softcap, options.teacher_logit_scale)
    divided_(tempered(out, teachers[0], *cap), options.temperature)
    if len(teachers) > 1:
        torch.log_softmax(out, 1, out=out)
        for logits in teachers[1:]:
            divided_(tempered(spare, logits, *cap), options.temperature)
            torch.logaddexp(out, torch.log_softmax(spare, 1, out=spare), out=out)
        out.sub_(math.log(len(teachers)))
    return out


class Workspace:
    """The buffers of the torch backend, and what it does with a block of rows that fits the cache."""

    def __init__(self, rows: int, options: Options, like: torch.Tensor) -> None:
        self.options = options
        shape = (rows, options.vocab_size)
        self.s, self.t = like.new_empty(shape), like.new_empty(shape)
        self.spare = [like.new_empty(shape) for _ in range(2 if options.divergence == "jsd" else 1)]
        self.capped = like.new_empty(shape) if options.student_softcap else None

    def block(
        self,
        student: torch.Tensor,  # (R, V or more)
        gradient: torch.Tensor | None,
        teachers: list[torch.Tensor],
        mask: torch.Tensor | None,  # (R,)
        kd_coefficients: torch.Tensor,  # (R,)
        labels: torch.Tensor | None,  # (R,)
        ce_coefficients: torch.Tensor | None,  # (R,)
        losses: torch.Tensor,  # (2, R), written
    ) -> None:
        options, count = self.options, len(student)
        s, t, spare = self.s[:count], self.t[:count], [buffer[:count] for buffer in self.spare]
        tempered(s, student, options.student_softcap, options.student_logit_scale)
        if self.capped is not None:
            self.capped[:count].copy_(s)
        divided_(s, options.temperature)
        mean_teacher(t, spare[0], teachers, options)
        losses[0] = options.loss_scale * _IN_PLACE[options.divergence](s, t, spare, options.beta)
        if mask is not None:
            losses[0].masked_fill_(~mask, 0.0)
        of_labels = None
        if labels is not None:
            assert ce_coefficients is not None
            of_labels = None if gradient is None else t
            losses[1], _ = softmax_cross_entropy.rows(
                student, of_labels, labels, ce_coefficients, None, options.of_labels, "torch"
            )
        if gradient is not None:
            self._write(gradient, s, of_labels, mask, kd_coefficients)

    def _write(
        self,
        gradient: torch.Tensor,  # (R, V or more)
        s: torch.Tensor,  # (R, V): the divergence's, with respect to s / tau
        of_labels: torch.Tensor | None,  # (R, V): the cross-entropy's, with its coefficients
        mask: torch.Tensor | None,
        kd_coefficients: torch.Tensor,
    ) -> None:
        options = self.options
        factor = kd_coefficients * (options.loss_scale / options.temperature * options.student_logit_scale)
        s.mul_(factor.unsqueeze(1))
        if self.capped is not None:
            s.addcmul_(s, self.capped[: len(s)].div_(options.student_softcap).square_(), value=-1)
        if mask is not None:
            s.masked_fill_(~mask.unsqueeze(1), 0.0)  # where a factor of 0 would keep a nan
        if of_labels is not None:
            s.add_(of_labels)
        gradient[:, : options.vocab_size] = s
        gradient[:, options.vocab_size :] = 0


# Each takes s / tau and t / tau (R, V), and spare blocks of that shape, which it may overwrite. It returns the
# divergences (R,) without tau², and leaves in s the gradient with respect to s / tau.


def _forward_kl(s: torch.Tensor, t: torch.Tensor, spare: list[torch.Tensor], _: float) -> torch.Tensor:
    torch.sub(t, s, out=spare[0])
    more = _more(softmax_(t), softmax_(s))
    losses = spare[0].mul_(t).nansum(1) - more  # nan where the teacher has 0; where an input is nan, so is `more`
    s.sub_(t)
    return losses


def _reverse_kl(s: torch.Tensor, t: torch.Tensor, spare: list[torch.Tensor], _: float) -> torch.Tensor:
    torch.sub(s, t, out=spare[0])
    more = _more(softmax_(t), softmax_(s))
    mean = _product_(spare[0], s).sum(1)
    torch.addcmul(spare[0], s, mean.unsqueeze(1), value=-1, out=s)
    return mean + more


def _jsd(s: torch.Tensor, t: torch.Tensor, spare: list[torch.Tensor], beta: float) -> torch.Tensor:
    nothing = 0 * _more(softmax_(t), softmax_(s))  # nan where an input is: `_product_` would hide it
    middle = torch.mul(t, beta, out=spare[0]).add_(s, alpha=1 - beta)
    of_teacher = _product_(torch.div(t, middle, out=spare[1]).log_(), t).sum(1)
    each = _product_(torch.div(s, middle, out=t).log_(), s)
    of_student = each.sum(1)
    torch.addcmul(each, s, of_student.unsqueeze(1), value=-1, out=s).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student + nothing


def _tvd(s: torch.Tensor, t: torch.Tensor, spare: list[torch.Tensor], _: float) -> torch.Tensor:
    softmax_(s)
    softmax_(t)
    difference = torch.sub(s, t, out=spare[0])
    losses: torch.Tensor = 0.5 * torch.linalg.vector_norm(difference, 1, dim=1)
    each = difference.sign_().mul_(s).mul_(0.5)
    torch.addcmul(each, s, each.sum(1, keepdim=True), value=-1, out=s)
    return losses


_IN_PLACE: dict[str, Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor], float], torch.Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
}


def softmax_(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place; returns by row the two parts of the log-sum-exp: the largest, and log sum exp(x - the largest).

    They stay apart: beside a large logit the second would lose its digits. Of the largest the softmax is exp(-second).
    """
    largest = x.amax(1)
    torch.softmax(x, 1, out=x)
    return largest, -x.amax(1).log()


def _more(teacher: tuple[torch.Tensor, torch.Tensor], student: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The log-sum-exp of the teacher less that of the student."""
    return (teacher[0] - student[0]) + (teacher[1] - student[1])


def _product_(logarithms: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """p log q in place of log q; 0 where p is 0."""
    return logarithms.mul_(probabilities).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
