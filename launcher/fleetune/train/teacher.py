"""The teachers: frozen, in eval mode, run over the student's own micro-batches beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fleetune.batch import Batch
from fleetune.losses import Distillation
from fleetune.model_section import Model
from fleetune.schema import Recipe, Teacher, teachers_of
from fleetune.train import zero
from fleetune.train.alignment import Asked, Outputs, asked_by, run
from fleetune.train.batches import MicroBatch
from fleetune.train.cache import tokenizer_content
from fleetune.train.data import Prepared
from fleetune.train.distributed import World
from fleetune.train.head import check_head, fuse_head, has_fused_head, logit_terms
from fleetune.train.model import ModelError, auto_model, check_length, load, model_location
from fleetune.train.teacher_cache import CachedTeacher, open_cache
from fleetune.train.token_cache import CachedTokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedTeacher:
    config: Any
    weight: float  # its share; all together are 1
    module: nn.Module
    engine: Any  # DeepSpeed's where its parameters are cut over the ranks, or the module itself
    inputs: frozenset[str]  # that its forward takes
    columns: torch.Tensor | None  # (C,) its logits' order, where that is not the student's
    asked: Asked

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Outputs:
        known = {name: tensor for name, tensor in batch.inputs.items() if name in self.inputs}
        outputs = run(self.engine, self.module, known, self.asked, lambda found: found)
        if self.columns is None:
            return outputs
        assert outputs.logits is not None
        return dataclasses.replace(outputs, logits=outputs.logits[:, self.columns])


def load_teachers(
    recipe: Recipe, label_names: list[str], tokenizer: Any, batch: Batch, world: World, dtype: torch.dtype | None = None
) -> list[LoadedTeacher | CachedTeacher | CachedTokens]:
    """All that the recipe names, each in its own dtype, or in this one. Raises ModelError."""
    total = sum(teacher.weight for _, teacher in teachers_of(recipe))
    found: list[LoadedTeacher | CachedTeacher | CachedTokens] = []
    for key, teacher in teachers_of(recipe):
        if teacher.cache is not None:
            found.append(open_cache(teacher, teacher.weight / total))
            continue
        loaded = load_teacher(recipe, teacher, key, label_names, tokenizer, batch, world, dtype)
        found.append(dataclasses.replace(loaded, weight=teacher.weight / total))
    fused = [teacher for teacher in found if isinstance(teacher, LoadedTeacher) and has_fused_head(teacher.module)]
    mixed = any(isinstance(loss, Distillation) and loss.combine == "targets" for loss in recipe.losses)
    if mixed and len({logit_terms(teacher.config) for teacher in fused}) > 1:
        raise ModelError(
            "teachers: their families scale or cap logits in different ways, and the kernel that mixes their targets "
            "takes one for all; combine: losses, or kernels: reference"
        )
    return found


def load_teacher(
    recipe: Recipe,
    teacher: Teacher,
    key: str,
    label_names: list[str],
    tokenizer: Any,
    batch: Batch,
    world: World,
    dtype: torch.dtype | None = None,
) -> LoadedTeacher:
    """One of them, by itself. Raises ModelError."""
    config = load_teacher_config(recipe, teacher, key, tokenizer)
    columns = label_columns(recipe, config, label_names, key)
    model, engine, inputs = _placed(recipe, teacher, key, config, dtype or dtype_of(recipe, teacher), batch, world)
    if has_fused_head(model):
        check_head(engine, recipe, config, world.device)
    return LoadedTeacher(
        config,
        1.0,
        model,
        engine,
        inputs,
        None if columns == list(range(len(columns))) else torch.tensor(columns, device=world.device),
        asked_by(recipe),
    )


def is_broken(teacher: LoadedTeacher | CachedTeacher | CachedTokens, window: list[MicroBatch]) -> bool:
    """Whether what it says of some row that counts is not finite; of a language model, what its head reads.

    Runs it, on all ranks where it is cut over them.
    """
    broken = False
    for micro in window:
        outputs = teacher(micro)
        if outputs.head is not None:  # what it reads: its logits may be large, and its weight cut over the ranks
            said = outputs.head.hidden_states.flatten(0, 1)
            rows = said if micro.supervised is None else said[micro.supervised]
        elif outputs.logits is not None:
            rows = outputs.logits[: micro.examples]
        else:  # stored tokens, which are finite
            continue
        broken |= not bool(rows.isfinite().all())
    return broken


def _placed(
    recipe: Recipe, teacher: Teacher, key: str, config: Any, dtype: torch.dtype, batch: Batch, world: World
) -> tuple[nn.Module, Any, frozenset[str]]:
    """The model on its device, or cut over the ranks, what runs it, and the inputs that it takes."""
    settings = zero.inference_config(teacher.deepspeed, dtype, batch.micro_batch_size)
    with zero.partitioned(settings):
        model = load(auto_model(recipe), teacher, key, config=config, dtype=dtype)
    model.requires_grad_(False).eval()
    inputs = frozenset(inspect.signature(model.forward).parameters)
    if recipe.task == "causal_lm" and recipe.kernels != "reference":
        fuse_head(model)
    if teacher.deepspeed.zero_stage == 0:
        return model.to(world.device), model, inputs
    return model, zero.inference_engine(model, settings), inputs


def dtype_of(recipe: Recipe, teacher: Teacher) -> torch.dtype:
    """In which it runs: its own, or that of the training."""
    if teacher.dtype != "auto":
        return DTYPES[teacher.dtype]
    training = recipe.training
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def load_teacher_config(recipe: Recipe, teacher: Teacher, key: str, tokenizer: Any) -> Any:
    """As it runs beside the student, whose batches are padded by this tokenizer. Raises ModelError."""
    from transformers import AutoConfig

    config = load(AutoConfig, teacher, key)
    config.pad_token_id = tokenizer.pad_token_id
    if asked_by(recipe).attentions:
        config._attn_implementation = "eager"
    return config


def weights_digest(model: Model | Teacher, config: Any) -> str:
    """What a run that goes on must find as it was: the commit on the hub, or a local model's weights.

    Of these the size and both ends of each file, which another training changes: whole files of large models would
    have to be read at every start.
    """
    if getattr(config, "_commit_hash", None):
        return str(config._commit_hash)
    digest = hashlib.sha256()
    folder = Path(model_location(str(model.model_name_or_path)))
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def shared_vocabulary(student: Any, teachers: list[LoadedTeacher | CachedTeacher | CachedTokens]) -> int | None:
    """How many of the first tokens all have, where their heads are filled up to different sizes; None where equal."""
    configs = [student, *(teacher.config for teacher in teachers if isinstance(teacher, LoadedTeacher))]
    sizes = {int(config.vocab_size) for config in configs if hasattr(config, "vocab_size")}
    sizes |= {teacher.chosen.vocabulary for teacher in teachers if isinstance(teacher, CachedTokens)}
    return None if len(sizes) < 2 else min(sizes)


# ---------------------------------------------------------------- whether it fits the student


def check_teacher(recipe: Recipe, teacher: Teacher, key: str, config: Any, tokenizer: Any, data: Prepared) -> None:
    """Raises ModelError for a teacher of other tokens or labels than the student's, or of another kind."""
    from transformers import AutoTokenizer

    named = f"{key}.model_name_or_path = {teacher.model_name_or_path!r}"
    kind = (config.architectures or ["no architecture"])[0]
    language = recipe.task == "causal_lm"
    if language and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(f"{named}: is no language model ({kind})")
    highest = data.report["highest_token"]
    if language and config.vocab_size <= highest:
        raise ModelError(f"{named}: its head has {config.vocab_size} rows, and the student's tokens go up to {highest}")
    distils = any(isinstance(loss, Distillation) for loss in recipe.losses)
    if distils and not language and not kind.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{named}: is no classifier ({kind}): its soft targets would be drawn at random; fine-tune it first, or "
            "learn from its layers alone (hidden_states, embedding, attention)"
        )
    label_columns(recipe, config, data.label_names, key)
    check_length(config, recipe.data.max_length, f"the teacher ({key})")
    own = load(AutoTokenizer, teacher, key)
    types = "token_type_ids"
    if recipe.data.text_pair_column and types in own.model_input_names and types not in tokenizer.model_input_names:
        raise ModelError(f"{named}: reads which text of a pair a token is of ({types}), and the student does not")
    if tokenizer_content(own) == tokenizer_content(tokenizer):
        return
    mine, theirs = tokenizer.get_vocab(), own.get_vocab()
    if len(mine) != len(theirs):
        reason = f"it has {len(theirs)} tokens and the student's {len(mine)}"
    elif mine != theirs:
        token = min((t for t in mine if theirs.get(t) != mine[t]), key=lambda t: mine[t])
        reason = f"the student's token {mine[token]}, {token!r}, is {theirs.get(token, 'none')} there"
    else:
        reason = "the tokens are the same, but not how text is cut into them"
    raise ModelError(
        f"{named}: its tokenizer is not the student's: {reason}. "
        "A soft target stands for the student's own tokens, so both must read the same ones"
    )


def unnamed(labels: int) -> list[str]:
    """What Transformers calls the labels of a model to which nobody has given names."""
    return [f"LABEL_{i}" for i in range(labels)]


def labels_by_number(recipe: Recipe, config: Any, labels: list[str]) -> bool:
    """Whether nothing but their order says which of the teacher's labels is which of the data's."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    numbers = [str(i) for i in range(len(labels))]
    return recipe.task == "classification" and names == unnamed(len(labels)) and labels != numbers


def label_columns(recipe: Recipe, config: Any, labels: list[str], key: str) -> list[int]:
    """Which of the teacher's logits stands for each label of the data, by name.

    Names are compared without case. A teacher that has none of its own (LABEL_0, LABEL_1, ...) is taken by number.

    Raises:
        ModelError: it has other labels.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if recipe.task != "classification" or names == unnamed(len(labels)):
        return list(range(len(names)))
    place = {name.casefold(): i for i, name in enumerate(names)}
    if sorted(place) != sorted(label.casefold() for label in labels) or len(names) != len(labels):
        raise ModelError(
            f"{key}.model_name_or_path: the teacher's labels are {', '.join(names[:10])}, and the data's are "
            f"{', '.join(labels[:10])}; model.label_names gives the data's classes other names"
        )
    return [place[label.casefold()] for label in labels]
