"""What one rank's memory comes to at its height, before anything is started.

    python -m fleetune.train.memory RECIPE [--ranks N] [--gpu-memory GB] [--device cpu|cuda]

Weights, gradients and optimizer follow from the ZeRO stage; buckets are DeepSpeed's. Activations are counted, not
guessed: a model of one layer and one of two, of the recipe's shapes but without memory, run forward once, and what
autograd keeps of each is added up (fake tensors). Each further layer keeps what the second did.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fleetune.batch import cut_batch
from fleetune.combinations import combinations
from fleetune.losses import OF_DOMAINS
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, target_splits, teachers_of
from fleetune.train.model import auto_model, check_heads
from fleetune.train.quantization import is_quantized, quantized_bytes, quantized_weights
from fleetune.train.report import print_report
from fleetune.train.sequence_parallel import check_attention

CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 2**29}  # of logits that a fused head holds at once (fleetune_kernels.head)
LOGITS = 5  # tensors of the logits' size, in fp32, that the plain loss holds at once: they, their softmax, gradients
BUCKET = 500_000_000  # gradients that DeepSpeed reduces at once, at most: its own default
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters)


@dataclass(frozen=True)
class Model:
    """What of the model matters to memory; bytes are of one rank's micro-batch."""

    parameters: int
    trained: int
    activations: int  # bytes kept for the backward pass by all layers
    layer: int  # by one of them
    boundary: int  # bytes of a layer's input: all that checkpointing keeps of it
    layers: int
    head: int  # rows times width of a language model's head; 0 where there is none
    vocabulary: int
    teachers: tuple[int, ...]  # parameters of each that runs beside it
    trains_head: bool = True
    quantized: tuple[int, ...] = ()  # of the parameters, those in 4 bits: how many each matrix has


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, those that live on its device when they are most."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    loss: int
    teachers: int
    height: int
    host: int  # bytes of one rank in the node's memory, by offloading
    checkpoint: int  # bytes on disk of one, over all ranks


def estimate(recipe: Recipe, model: Model, ranks: int, device: str) -> Estimate:
    """Of the step's two heights, where the backward pass begins and where the optimizer steps, the higher one."""
    stage, trained, plain = recipe.deepspeed.zero_stage, model.trained, model.parameters
    batch, width = cut_batch(recipe.training, ranks), weight_bytes(recipe)
    share = ranks if stage else 1  # of the optimizer's state
    optimizer = 8 * trained if stage == 0 else 12 * trained // share
    weights = width * (plain - sum(model.quantized)) // (ranks if stage == 3 else 1)
    weights += sum(map(quantized_bytes, model.quantized))
    gathered = width * min(plain, LIVE) if stage == 3 else 0
    gradients = {0: 4, 1: width}.get(stage, 4) * trained // (ranks if stage > 1 else 1)
    bucket = min(trained, BUCKET) * (width if stage else 4)
    doubled = 2 if stage == 2 and device == "cuda" else 1  # communication beside computation takes a second one
    buckets = bucket * doubled if stage else bucket * (ranks > 1)
    activations = model.activations
    if recipe.model.gradient_checkpointing:
        activations = model.activations - model.layers * (model.layer - model.boundary) + model.layer
    activations += width * max(model.quantized, default=0)  # one matrix at a time is made whole
    loss = _loss_bytes(recipe, model, device)
    teachers = sum(
        (width if one.dtype == "auto" else 4 if one.dtype == "float32" else 2)
        * count
        // (ranks if one.deepspeed.zero_stage == 3 else 1)
        for (_, one), count in zip(_running(recipe), model.teachers, strict=True)
    )
    host = 0
    if recipe.deepspeed.offload_optimizer == "cpu" and device == "cuda":
        host, optimizer, gradients = optimizer + gradients, 0, 0
    if recipe.deepspeed.offload_param == "cpu" and device == "cuda":
        host, weights = host + weights, 0
    held = weights + gathered + optimizer + teachers
    accumulates = batch.gradient_accumulation_steps > 1 or stage == 3
    backward = held + (buckets if stage else 0) + activations + loss + (gradients if accumulates else 0)
    step = held + gradients + max(buckets, 4 * trained // share if stage else 0)
    return Estimate(
        weights + gathered,
        gradients,
        optimizer,
        buckets,
        activations,
        loss,
        teachers,
        max(backward, step),
        host,
        _checkpoint_bytes(recipe, model),
    )


def weight_bytes(recipe: Recipe) -> int:
    """Of each weight that the model computes with; without ZeRO bf16 is autocast over fp32."""
    return 2 if recipe.training.fp16 or (recipe.training.bf16 and recipe.deepspeed.zero_stage) else 4


def _running(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(key, teacher) for key, teacher in teachers_of(recipe) if teacher.cache is None]


def _loss_bytes(recipe: Recipe, model: Model, device: str) -> int:
    """What a language model's loss holds beside the activations."""
    if not model.head:
        return 0
    tokens = model.boundary // max(1, weight_bytes(recipe) * (model.head // model.vocabulary))
    if recipe.kernels == "reference":
        return LOGITS * 4 * tokens * model.vocabulary
    chunk = min(CHUNK_BYTES[device], weight_bytes(recipe) * tokens * model.vocabulary)
    return 4 * model.head * model.trains_head + chunk * (1 + len(model.teachers))


def _checkpoint_bytes(recipe: Recipe, model: Model) -> int:
    """Weights where the optimizer holds no fp32 copy, and the optimizer's state; of LoRA nothing that is frozen."""
    kept = model.trained if recipe.model.lora is not None else model.parameters
    return weight_bytes(recipe) * kept + (8 if recipe.deepspeed.zero_stage == 0 else 12) * model.trained


# ---------------------------------------------------------------- the model, without its memory


def measure(recipe: Recipe, longest: int, ranks: int, label_names: list[str], config: Any) -> Model:
    """`longest`: tokens of the longest row. Raises ValueError as the model's changes do."""
    from fleetune.train.lora import add_lora
    from fleetune.train.model import load
    from fleetune.train.surgery import freeze, operate
    from fleetune.train.tiled_mlp import tiles_of

    with torch.device("meta"):
        made = auto_model(recipe).from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        whole: Any = operate(made, recipe.model, recipe.training.seed)
        quantized = tuple(quantized_weights(whole, recipe)) if is_quantized(recipe) else ()
        if recipe.model.lora is not None:
            add_lora(whole, recipe, recipe.model.lora, "")
    freeze(whole, recipe.model.freeze)
    micro = cut_batch(recipe.training, ranks).micro_batch_size
    if any(loss.kind in OF_DOMAINS for loss in recipe.losses):
        micro *= 2  # as many rows of the target
    head = whole.get_output_embeddings() if recipe.task == "causal_lm" else None
    layers = int(whole.config.num_hidden_layers)
    longest = -(-longest // recipe.training.sequence_parallel_size)  # of which a rank reads a slice
    one, two = (_kept_bytes(recipe, whole.config, count, micro, longest) for count in (1, 2))
    boundary = micro * longest * int(whole.config.hidden_size) * weight_bytes(recipe)
    tile, tiles = 0, tiles_of(recipe, whole.config)
    if tiles > 1:  # each layer keeps its MLP's input instead, and one tile of one layer is there at a time
        plain = _changed(recipe, {"model.mlp_tiles": None})
        tile = (_kept_bytes(plain, whole.config, 1, micro, longest) - one) // tiles
        one, two = one + boundary, two + 2 * boundary
    teachers = []
    for key, teacher in _running(recipe):
        from transformers import AutoConfig

        with torch.device("meta"):
            trust = teacher.trust_remote_code
            built: Any = auto_model(recipe).from_config(load(AutoConfig, teacher, key), trust_remote_code=trust)
        teachers.append(sum(parameter.numel() for parameter in built.parameters()))
    return Model(
        sum(parameter.numel() for parameter in whole.parameters()),
        sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad),
        one + (layers - 1) * (two - one) + tile,
        two - one,
        boundary,
        layers,
        0 if head is None else head.weight.numel(),
        int(whole.config.vocab_size),
        tuple(teachers),
        head is not None and head.weight.requires_grad,
        quantized,
    )


def _kept_bytes(recipe: Recipe, config: Any, layers: int, rows: int, tokens: int) -> int:
    """What autograd keeps of a forward pass through so many layers, parameters aside; each storage once."""
    import copy

    from torch._subclasses.fake_tensor import FakeTensorMode

    from fleetune.train.lora import add_lora
    from fleetune.train.tiled_mlp import tile_mlps, tiles_of

    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        short.layer_types = config.layer_types[:layers]
    dtype = {2: torch.float16 if recipe.training.fp16 else torch.bfloat16, 4: torch.float32}[weight_bytes(recipe)]
    kept: dict[int, Any] = {}
    with torch.device("meta"):
        trust = recipe.model.trust_remote_code
        model: Any = auto_model(recipe).from_config(short, dtype=dtype, trust_remote_code=trust).train()
        if recipe.model.lora is not None:
            add_lora(model, recipe, recipe.model.lora, "")
    if recipe.model.mlp_tiles is not None:
        tile_mlps(model, tiles_of(recipe, config))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _on_cpu(model)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        body = model.get_decoder() if recipe.task == "causal_lm" else model
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.bf16 and dtype == torch.float32):
                found = body(input_ids=ids, attention_mask=torch.ones_like(ids))
            found[0].float().sum()
    return sum(storage.nbytes() for storage in kept.values())


def _on_cpu(model: torch.nn.Module) -> None:
    """From the meta device; what is computed there says other things of attention than a CPU or a GPU does."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    own = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if own else empty
                tensors[name] = made[id(tensor)]  # one that is tied stays so


# ---------------------------------------------------------------- what would make it fit

CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (  # from the cheapest on
    ("deepspeed", {"zero_stage": 2}),
    ("training", {"per_device_train_batch_size": 1}),
    ("model", {"gradient_checkpointing": True}),
    ("model", {"mlp_tiles": "auto"}),
    ("deepspeed", {"zero_stage": 3}),
    ("training", {"sequence_parallel_size": 2}),
    ("training", {"sequence_parallel_size": 4}),
    ("training", {"sequence_parallel_size": 8}),
    ("deepspeed", {"offload_optimizer": "cpu"}),
    ("deepspeed", {"offload_param": "cpu"}),
)


def lighter(recipe: Recipe, possible: Callable[[Recipe], bool]) -> Iterator[tuple[list[str], Recipe]]:
    """Each cheaper-to-dearer change that is one here and possible, by itself, and then with those before it."""
    together: dict[str, Any] = {}
    for section, values in CHANGES:
        own = getattr(recipe, section)
        ((key, value),) = values.items()
        here = getattr(own, key)
        if here == value or (key in ("zero_stage", "sequence_parallel_size") and here > value):
            continue
        if is_quantized(recipe) and (key, value) in (("zero_stage", 3), ("offload_param", "cpu")):
            continue
        if (key == "mlp_tiles" and here is not None) or (key == "sequence_parallel_size" and value % here):
            continue
        more = together | _change(_changed(recipe, together), section, key, value)
        if not possible(_changed(recipe, more)):
            continue
        alone = _change(recipe, section, key, value)
        is_cheap = together and key not in ("offload_optimizer", "offload_param")
        if is_cheap and possible(_changed(recipe, alone)):
            yield _named(alone), _changed(recipe, alone)
        together = more
        yield _named(together), _changed(recipe, together)


def _change(recipe: Recipe, section: str, key: str, value: Any) -> dict[str, Any]:
    """With what keeps the global batch as it is: smaller micro-batches, or of fewer readers, are accumulated."""
    training, values = recipe.training, {f"{section}.{key}": value}
    if training.global_batch_size is None and section == "training":
        here = getattr(training, key)
        ratio = max(here, value) // min(here, value)
        values["training.gradient_accumulation_steps"] = ratio * (training.gradient_accumulation_steps or 1)
    return values


def _named(values: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if value is True else value}" for key, value in values.items()]


def _changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    for name, value in values.items():
        section, key = name.split(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
    return recipe


def report(recipe: Recipe, ranks: int, gpu_memory: float | None, device: str | None = None) -> dict[str, Any]:
    """Of a device like this machine's, where nothing is said of it. Raises RecipeError, DataError or ModelError."""
    from fleetune.train.data import prepare
    from fleetune.train.model import load_config, load_tokenizer

    prepared = prepare(recipe, load_tokenizer(recipe))
    config = load_config(recipe, prepared.label_names)
    splits = [prepared.splits[name] for name in ("train", *target_splits(recipe))]
    longest = recipe.data.max_length if recipe.data.packing else max(int(split.lengths.max()) for split in splits)
    limit = None if gpu_memory is None else gpu_memory * 1e9
    if limit is None and device is None and torch.cuda.is_available():
        limit = float(torch.cuda.get_device_properties(0).total_memory)
    device = device or ("cpu" if limit is None else "cuda")
    try:
        model = measure(recipe, longest, ranks, prepared.label_names, config)
    except Exception as error:  # a family may do what cannot be done without memory
        return {"unknown": f"{type(error).__name__}: {error}".partition("\n")[0]}
    found = estimate(recipe, model, ranks, device)
    answer: dict[str, Any] = {"device": device, "limit": limit, "tokens": longest, **dataclasses.asdict(found)}
    if limit is not None and found.height > limit:
        answer["change"], answer["changed"] = _cheapest(recipe, longest, ranks, prepared.label_names, config, limit)
    return answer


def _cheapest(
    recipe: Recipe, longest: int, ranks: int, label_names: list[str], config: Any, limit: float
) -> tuple[list[str], int]:
    """What is to be changed, and the height then; nothing, where nothing helps."""
    with torch.device("meta"):
        attention = auto_model(recipe).from_config(config).config._attn_implementation

    def height_of(changed: Recipe) -> int:
        return estimate(changed, measure(changed, longest, ranks, label_names, config), ranks, "cuda").height

    def is_possible(changed: Recipe) -> bool:
        if next(combinations(changed), None) is not None:
            return False
        try:
            size = changed.training.sequence_parallel_size
            check_heads(config, size)
            check_attention(attention, size)
            height_of(changed)
        except ValueError:  # the batch does not divide so, or the model has no such layers
            return False
        return True

    for names, changed in lighter(recipe, is_possible):
        if (height := height_of(changed)) <= limit:
            return names, height
    return [], 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    given = parser.parse_args()
    recipe = parse_recipe(given.recipe.read_text(encoding="utf-8"), str(given.recipe))
    return print_report(lambda: report(recipe, given.ranks, given.gpu_memory, given.device))


if __name__ == "__main__":
    sys.exit(main())
