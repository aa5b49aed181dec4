"""The cache on this machine's disk: where it is, and what prepared data are known by."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleetune.schema import Recipe, sources_of
from fleetune.train.sources import DataError, load_hub

CACHE_FORMAT = 6  # raise it when the arrays or the cleaning change


def cache_folder() -> Path:
    """Node-local where the user says so (FLEETUNE_CACHE), else under the user's cache."""
    root = (
        os.environ.get("FLEETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fleetune"
    )
    return Path(root) / "tokens"


def file_hash(path: str, key: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.{key}.path = {path!r}: cannot be read: {error.strerror}") from error


def cache_key(recipe: Recipe, tokenizer: Any) -> str:
    """What the arrays depend on: the data's content, the tokenizer's, and the settings that make one of the other."""
    sources = {}
    for name, source in sources_of(recipe):
        local = Path(source.path).is_absolute()
        # On the hub, what datasets makes of the revision and the loading.
        content = file_hash(source.path, name) if local else load_hub(source, name)._fingerprint
        sources[name] = [content, source.name, source.split, source.limit, source.where, Path(source.path).suffix]
    data = recipe.data.model_dump(exclude={"train", "validation", "test", "source", "target", "augmentation"})
    parts = [
        CACHE_FORMAT,
        recipe.task,
        sources,
        data,
        bool(recipe.data.augmentation),
        recipe.model.num_labels,
        recipe.model.label_names,
        recipe.training.seed if recipe.data.validation_fraction else None,
        sorted(tokenizer.model_input_names),
        tokenizer_hash(tokenizer),
        tokenizer.special_tokens_map,  # which of its tokens ends a text, say
        tokenizer.chat_template if recipe.task == "causal_lm" else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_content(tokenizer: Any) -> Any:
    """All that decides which tokens a text becomes: equal for equal tokenizers, wherever they were loaded from."""
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is.
        return {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    return [type(tokenizer).__name__, tokenizer.init_kwargs, tokenizer.get_vocab()]


def tokenizer_hash(tokenizer: Any) -> str:
    text = json.dumps([tokenizer_content(tokenizer), tokenizer.truncation_side], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """One process at a time, and True; False where the file system has no flock, and others may be at it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
