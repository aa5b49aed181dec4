"""A checkpoint's parameters by name, from files as DeepSpeed writes them for each ZeRO stage and number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from fleetune.train.reshard import STATES, WEIGHT, Stored, is_native

GROUPS = [["encoder.weight", "head.weight"], ["encoder.bias", "head.bias"]]  # as the optimizer has them
ORDER = [name for group in GROUPS for name in group]
SHAPES = {"encoder.weight": (5, 3), "head.weight": (2, 5), "encoder.bias": (5,), "head.bias": (2,)}
STEP = torch.tensor(7.0)

Tensors = dict[str, dict[str, torch.Tensor]]
Files = dict[str, dict[str, Any]]


@pytest.fixture
def tensors() -> Tensors:
    """The weights, and AdamW's state of what is trained."""
    random = torch.Generator().manual_seed(0)
    found = {key: {n: torch.randn(s, generator=random) for n, s in SHAPES.items()} for key in (WEIGHT, *STATES)}
    found[WEIGHT] |= {"frozen.weight": torch.randn(7, generator=random), "counts": torch.randn(2, generator=random)}
    return found


def _cut(flat: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Into equal parts, the last ones padded."""
    part = -(-len(flat) // ranks)
    return list(torch.cat([flat, torch.zeros(part * ranks - len(flat))]).split(part))


def _shard(stage: ZeroStageEnum, **more: Any) -> dict[str, Any]:
    return {"optimizer_state_dict": {"loss_scaler": LossScaler(scale=4.0), "zero_stage": stage, **more}}


def _states(groups: list[dict[str, torch.Tensor]], stepped: bool) -> dict[str, Any]:
    """The optimizer's state, and the weights that go with it."""
    return {"state": {i: {"step": STEP, **{k: g[k] for k in STATES}} for i, g in enumerate(groups) if stepped}}


def whole(tensors: Tensors, ranks: int, stepped: bool) -> Files:
    trained = [{key: tensors[key][name] for key in (WEIGHT, *STATES)} for name in ORDER]
    return {"mp_rank_00_model_states.pt": {"module": tensors[WEIGHT], "optimizer": _states(trained, stepped)}}


def flat(tensors: Tensors, ranks: int, stepped: bool) -> Files:
    low = {name: value.bfloat16() for name, value in tensors[WEIGHT].items()}  # whose fp32 weights are the shards'
    files: Files = {"mp_rank_00_model_states.pt": {"module": low | {"frozen.weight": tensors[WEIGHT]["frozen.weight"]}}}
    for rank in range(ranks):
        groups, places = [], []
        for names in GROUPS:
            ends = {key: torch.cat([tensors[key][name].flatten() for name in names]) for key in (WEIGHT, *STATES)}
            groups.append({key: _cut(value, ranks)[rank] for key, value in ends.items()})
            part, at, found = len(groups[-1][WEIGHT]), 0, {}
            for name in names:
                numel = tensors[WEIGHT][name].numel()
                first, last = max(at, rank * part), min(at + numel, (rank + 1) * part)
                if first < last:
                    found[name] = fragment_address(start=first - rank * part, numel=last - first)
                at += numel
            places.append(found)
        files[f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = _shard(
            ZeroStageEnum.gradients,
            base_optimizer_state=_states(groups, stepped),
            single_partition_of_fp32_groups=[group[WEIGHT] for group in groups],
            param_slice_mappings=places,
        )
    return files


def by_parameter(tensors: Tensors, ranks: int, stepped: bool) -> Files:
    files: Files = {}
    for rank in range(ranks):
        groups = [
            {key: torch.cat([_cut(tensors[key][name].flatten(), ranks)[rank] for name in names]) for key in tensors}
            for names in GROUPS
        ]
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = _shard(
            ZeroStageEnum.weights,
            optimizer_state_dict=_states(groups, stepped),
            fp32_flat_groups=[group[WEIGHT] for group in groups],
        )
        files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = {
            "module": {"counts": tensors[WEIGHT]["counts"]},
            "buffer_names": ["counts"],
            "param_shapes": [{name: tensors[WEIGHT][name].shape for name in names} for names in GROUPS],
            "frozen_param_shapes": {"frozen.weight": tensors[WEIGHT]["frozen.weight"].shape},
            "frozen_param_fragments": {"frozen.weight": _cut(tensors[WEIGHT]["frozen.weight"], ranks)[rank]},
        }
    return files


FORMS = {"whole": whole, "flat": flat, "by parameter": by_parameter}


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize(("form", "ranks"), [("whole", 1), *itertools.product(("flat", "by parameter"), (1, 2, 4, 12))])
def test_every_range_of_every_parameter_is_found_in_whosever_shards(
    tensors: Tensors, tmp_path: Path, form: str, ranks: int
) -> None:
    stored = Stored(write(tmp_path, FORMS[form](tensors, ranks, True)), ORDER)
    assert stored.step == STEP
    if form != "whole":
        assert stored.loss_scaler.cur_scale == 4.0
    if form == "flat":
        tensors[WEIGHT]["counts"] = tensors[WEIGHT]["counts"].bfloat16().float()
    for key, by_name in tensors.items():
        for name, tensor in by_name.items():
            truth = tensor.flatten()
            assert stored.numel(name) == len(truth)
            for first, last in itertools.combinations(range(len(truth) + 1), 2):
                into = torch.full((last - first + 2,), -1.0)  # two of them belong to nobody, or to what comes after
                stored.copy(name, key, first, into[:-2] if last < len(truth) else into)
                assert torch.equal(into[:-2], truth[first:last])
                assert (into[-2:] == -1.0).all()


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_there_are_weights_alone(tensors: Tensors, tmp_path: Path, form: str) -> None:
    stored = Stored(write(tmp_path, FORMS[form](tensors, 2, False)), ORDER)
    assert stored.step is None
    assert all(piece.values.keys() == {WEIGHT} for pieces in stored.pieces.values() for piece in pieces)


def test_a_shard_that_is_missing_leaves_a_parameter_short(tensors: Tensors, tmp_path: Path) -> None:
    files = flat(tensors, 4, True)
    files.pop("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    stored = Stored(write(tmp_path, files), ORDER)
    assert stored.numel("encoder.weight") < 15


def test_what_is_no_tensor_is_not_unpickled(tensors: Tensors, tmp_path: Path) -> None:
    files = whole(tensors, 1, True)
    files["mp_rank_00_model_states.pt"]["planted"] = Path("anything else")
    with pytest.raises(Exception, match="Weights only load failed"):
        Stored(write(tmp_path, files), ORDER)


class _Engine:
    def __init__(self, stage: int) -> None:
        self.zero_optimization_stage = lambda: stage


@pytest.mark.parametrize(
    ("form", "native"), [("whole", [(0, 1), (0, 2)]), ("flat", [(1, 2), (2, 2)]), ("by parameter", [(3, 2)])]
)
def test_deepspeed_loads_its_own_where_ranks_and_form_are_the_same(
    tensors: Tensors, tmp_path: Path, form: str, native: list[tuple[int, int]]
) -> None:
    write(tmp_path, FORMS[form](tensors, 2, True))
    places = itertools.product(range(4), (1, 2))
    assert [place for place in places if is_native(_Engine(place[0]), tmp_path, place[1])] == native
