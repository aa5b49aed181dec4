"""Which layer of the student is drawn to which of the teacher's, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, LlamaConfig

from fleetune.schema import Recipe
from fleetune.train.alignment import Asked, Match, add_projections, asked_by, matches_of, run


def recipe(*losses: dict[str, Any]) -> Recipe:
    values = {
        "name": "tiny",
        "task": "classification",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}},
        "losses": list(losses),
        "teacher": {"model_name_or_path": "none"},
    }
    return Recipe.model_validate(values)


def bert(layers: int, width: int = 32, heads: int = 4, attention: str = "sdpa", dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        attn_implementation=attention,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout,
    )


def matches(loss: dict[str, Any], student: Any, teacher: Any) -> list[Match]:
    return matches_of(recipe(loss), student, [teacher])


def pairs(layer_map: Any, student: int, teacher: int) -> list[tuple[int, int]]:
    found = matches({"kind": "hidden_states", "layer_map": layer_map}, bert(student), bert(teacher))
    return [(match.student_layer, match.teacher_layer) for match in found]


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, [(0, 1), (1, 3), (2, 5)]),
        (6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]),
        (4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (1, 5, [(0, 4)]),
        (4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
    ],
)
def test_uniform_is_as_deep_in_its_own_model_and_last_to_last(student: int, teacher: int, expected: Any) -> None:
    assert pairs("uniform", student, teacher) == expected


def test_last_and_pairs_as_they_are_given() -> None:
    assert pairs("last", 3, 6) == [(2, 5)]
    assert pairs([[0, 5], [2, 0]], 3, 6) == [(0, 5), (2, 0)]


def test_layers_are_counted_in_every_familys_config() -> None:
    student = DistilBertConfig(n_layers=3, dim=32, n_heads=4)
    teacher = LlamaConfig(num_hidden_layers=6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    found = matches({"kind": "hidden_states"}, student, teacher)
    assert [(m.student_layer, m.teacher_layer, m.widths) for m in found] == [
        (0, 1, (32, 64)), (1, 3, (32, 64)), (2, 5, (32, 64)),
    ]  # fmt: skip


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "said"),
    [
        (
            {"kind": "hidden_states", "layer_map": [[0, 1], [3, 5]]}, bert(3), bert(6),
            r"losses\.0\.layer_map = .*: the student has no layer 3; its layers are 0 to 2",
        ),
        (
            {"kind": "hidden_states", "layer_map": [[0, 6]]}, bert(3), bert(6),
            r"losses\.0\.layer_map = .*: the teacher has no layer 6; its layers are 0 to 5",
        ),
        (
            {"kind": "hidden_states", "projection": False}, bert(3, 32), bert(3, 48),
            r"losses\.0\.projection = False: the student's features are 32 wide and the teacher's 48",
        ),
        (
            {"kind": "embedding", "projection": False}, bert(3, 32), bert(3, 48),
            r"losses\.0\.projection = False: .* need a projection",
        ),
        (
            {"kind": "attention", "compare": "maps"}, bert(3, attention="eager"), bert(3, heads=8),
            r"losses\.0\.compare = 'maps': the student has 4 heads and the teacher 8",
        ),
        (
            {"kind": "attention", "compare": "maps"}, bert(3), bert(3),
            r"losses\.0\.compare = 'maps': needs model\.attn_implementation: eager",
        ),
        (
            {"kind": "attention", "compare": "maps"}, bert(3, attention="eager", dropout=0.1), bert(3),
            r"set model\.config\.attention_probs_dropout_prob: 0\.0 \(it is 0\.1\)",
        ),
        (
            {"kind": "attention", "relation_heads": 5}, bert(3, 40), bert(3, 32),
            r"losses\.0\.relation_heads = 5: does not divide the teacher's values, 32 wide",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(loss: dict[str, Any], student: Any, teacher: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        matches(loss, student, teacher)


# ---------------------------------------------------------------- one forward pass


def inputs(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).view(rows, length) % 50
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_only_what_the_losses_need_is_kept() -> None:
    assert asked_by(recipe({"kind": "distillation"})) == Asked()
    assert asked_by(recipe({"kind": "embedding"})) == Asked(hidden_states=True)
    assert asked_by(recipe({"kind": "attention"})) == Asked(values=True)
    model = BertForSequenceClassification(bert(3, attention="eager")).eval()
    few = run(model, model, inputs(), Asked(), lambda outputs: outputs)
    assert (few.hidden_states, few.attentions, few.values, few.projected) == ((), (), (), {})
    all_of_it = run(
        model, model, inputs(), Asked(hidden_states=True, attentions=True, values=True), lambda outputs: outputs
    )
    assert [state.shape for state in all_of_it.hidden_states] == [(2, 5, 32)] * 4
    assert [each.shape for each in all_of_it.attentions] == [(2, 4, 5, 5)] * 3
    assert [each.shape for each in all_of_it.values] == [(2, 5, 32)] * 3
    torch.testing.assert_close(all_of_it.logits, few.logits)
    values = [module for name, module in model.named_modules() if name.endswith("self.value")]
    assert len(values) == 3
    assert not any(module._forward_hooks for module in values)


def test_a_projection_is_a_parameter_of_the_student_and_runs_within_its_forward_pass() -> None:
    loss = {"kind": "hidden_states", "layer_map": [[1, 5]]}
    student = bert(3)
    found = matches(loss, student, bert(6, 48))
    model = BertForSequenceClassification(student).eval()
    before = run(model, model, inputs(), Asked(hidden_states=True), lambda outputs: outputs)
    add_projections(model, found, recipe(loss))
    weight = dict(model.named_parameters())["projections.losses_0_teacher_0_1_5.weight"]
    after = run(model, model, inputs(), Asked(hidden_states=True), lambda outputs: outputs)
    (projected,) = after.projected.values()
    torch.testing.assert_close(projected, before.hidden_states[2] @ weight.T)
    torch.testing.assert_close(after.logits, before.logits)


def test_equal_widths_take_no_projection() -> None:
    loss = {"kind": "hidden_states"}
    model = BertForSequenceClassification(bert(3))
    names = [name for name, _ in model.named_parameters()]
    add_projections(model, matches(loss, bert(3), bert(6)), recipe(loss))
    assert [name for name, _ in model.named_parameters()] == names
