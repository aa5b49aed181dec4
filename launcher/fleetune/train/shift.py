"""`python -m fleetune.train.shift A B --model M ...`: do two data sets differ, and which rows stand out most, as JSON.

The statistic is the unbiased MMD² between an encoder's features of both, with the kernel of `fleetune_kernels.mmd`.
The p-value is a permutation test's: the share of shuffles of all rows over the two sides, the data's own among them,
whose MMD² is at least as large. It holds for any number of rows, as long as they would be exchangeable if the two sets
were of one kind. A row stands out by the witness function, f(z) = mean k(z, a) - mean k(z, b), with the row itself left
out: the function whose mean differs most between the two sides. Gretton, Borgwardt, Rasch, Schölkopf and Smola, A
Kernel Two-Sample Test, JMLR 13 (2012).

With u the 0/1 vector of the rows on side A, K the kernel matrix without its diagonal, and 1 the vector of ones, all
three sums of the statistic follow of u'Ku, u'K1 and 1'K1. Blocks of K are formed once each, and multiply the vectors of
all shuffles at once. Memory: 4 (n + m) bytes a shuffle, and some blocks of BLOCK_BYTES.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.data_section import Source
from fleetune.model_section import Model
from fleetune.recipe import local_or_hub
from fleetune.schema import DATA_SUFFIXES, RecipeError
from fleetune.strict_yaml import parse_yaml
from fleetune.train.features import BATCH_SIZE, load_encoder, mean_pooled
from fleetune.train.gaussian_kernel import GaussianKernel
from fleetune.train.model import ModelError
from fleetune.train.report import print_report
from fleetune.train.sources import DataError, Ints, no_column, open_source
from fleetune_kernels.mmd import mmd

BLOCK_BYTES = 32 * 2**20
TOLD_ROWS = 1024
TEXT_LENGTH = 200  # characters of a row's text in the report

# ---------------------------------------------------------------- the test


@dataclass(frozen=True)
class TwoSample:
    mmd: float  # MMD², unbiased: below 0 where the sides are as alike as any two halves
    null: torch.Tensor  # (P,) that of the shuffles
    rounding: float  # two values of MMD² that are nearer than this are equal
    witness: torch.Tensor  # (n + m,) of A's rows, then B's; above 0 is nearer to A

    @property
    def p_value(self) -> float:
        """NaN where the features are so large that the statistic overflows."""
        if not (math.isfinite(self.mmd) and self.null.isfinite().all()):
            return math.nan
        as_large = int((self.null >= self.mmd - self.rounding).sum())
        return (1 + as_large) / (1 + len(self.null))


@torch.inference_mode()
def two_sample(a: torch.Tensor, b: torch.Tensor, permutations: int = 1000, seed: int = 0) -> TwoSample:
    """Of features (n, D) and (m, D), at least 2 rows each, on one device."""
    n, m = len(a), len(b)
    pooled = torch.cat([a, b]).float()
    shuffled = _shuffles(n, m, permutations, seed).to(pooled.device)
    is_a = (torch.arange(n + m, device=pooled.device) < n).double()
    quadratic, nearness = _sums(pooled, shuffled, is_a)
    to_all, to_a = nearness.unbind(1)
    null = _unbiased(quadratic, shuffled.double() @ to_all, float(to_all.sum()), n, m)
    to_b = to_all - to_a
    witness = to_a / (n - is_a) - to_b / (m - 1 + is_a)
    observed = float(mmd(a.float(), b.float(), estimator="unbiased"))
    return TwoSample(observed, null.cpu(), max(1e-6, 1e-5 / min(n, m)), witness.cpu())


def _share(n: int, m: int) -> float:
    """About n / N. Taken off u, what is summed is small and keeps its digits; a 256th is exact in fp32, and 1 - it."""
    return round(256 * n / (n + m)) / 256


def _shuffles(n: int, m: int, count: int, seed: int) -> torch.Tensor:  # (P, N)
    """Each row is one shuffle, which puts n of the rows on side A: s = u - share."""
    generator = torch.Generator().manual_seed(seed)
    shuffles = torch.full((count, n + m), -_share(n, m))
    for shuffle in shuffles:
        shuffle[torch.randperm(n + m, generator=generator)[:n]] += 1
    return shuffles


def _sums(
    rows: torch.Tensor, shuffles: torch.Tensor, is_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # (N, D), (P, N), (N,) -> (P,), (N, 2) in fp64
    """s'Ks for every shuffle s, and [K1, Ku]. K is symmetric: of its blocks only those on and above the diagonal."""
    kernel, total = GaussianKernel.of(rows), len(rows)
    sides = torch.stack([torch.ones_like(is_a), is_a], 1).float()  # (N, 2)
    quadratic = rows.new_zeros(len(shuffles), dtype=torch.float64)
    nearness = rows.new_zeros(total, 2, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (4 * total))
    for start in range(0, total, step):
        stop = min(start + step, total)
        block = kernel(rows[start:stop], rows[start:])  # (R, N - start)
        block.fill_diagonal_(0)
        beyond = block[:, stop - start :]
        nearness[start:stop] += block @ sides[start:]
        nearness[stop:] += beyond.t() @ sides[start:stop]
        beyond *= 2
        quadratic += torch.einsum("pr,rp->p", shuffles[:, start:stop], block @ shuffles[:, start:].t())
    return quadratic, nearness


def _unbiased(
    quadratic: torch.Tensor, linear: torch.Tensor, everything: float, n: int, m: int
) -> torch.Tensor:  # (P,), (P,) -> (P,)
    """MMD² of each shuffle, of s'Ks, s'K1 and 1'K1, where s = u - share and K has no diagonal."""
    share = _share(n, m)
    from_a = linear + share * everything  # u'K1
    within_a = quadratic + 2 * share * linear + share**2 * everything  # u'Ku
    across = from_a - within_a
    within_b = everything - from_a - across
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)


# ---------------------------------------------------------------- the data


@dataclass(frozen=True)
class Texts:
    path: str
    texts: list[str]
    index: Ints  # (rows,) each row's number in its source


def read_texts(side: str, path: str, column: str, where: dict[str, Any], limit: int | None, seed: int) -> Texts:
    """Those of one data set, or `limit` of them drawn at random. Raises DataError, which names the argument."""
    source = Source(path=local_or_hub(path, Path.cwd()), where=where)
    local = Path(source.path).is_absolute()
    if local and not Path(source.path).exists():
        raise DataError(f"{side} = {path}: there is no such file")
    if local and not source.path.endswith(DATA_SUFFIXES):
        raise DataError(f"{side} = {path}: should be a file that ends in {', '.join(DATA_SUFFIXES)}")
    try:
        table = open_source(source, side, [column], [])
    except DataError as error:
        message = str(error).replace(f"data.{side}.path = ", f"{side} = ")
        raise DataError(message.replace(f"data.{side}.where.", f"{side} = {path}: --where ")) from error
    if column not in table.columns:
        raise no_column(f"{side} = {path}: --text-column", column, table.names)
    chosen = np.arange(len(table))
    if limit is not None and limit < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, limit, replace=False))
    if len(chosen) < 2:
        raise DataError(f"{side} = {path}: has 1 row; the test needs at least 2")
    texts = [_text(table.columns[column][i], f"{side} = {path}: row {table.index[i]} (counted from 0)") for i in chosen]
    return Texts(path, texts, table.index[chosen])


def _text(cell: Any, place: str) -> str:
    if isinstance(cell, list | tuple | dict | bytes):
        raise DataError(f"{place} has {str(cell)[:80]}, which is no text")
    text = "" if cell is None else str(cell)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} is not valid Unicode, it has half of a surrogate pair: {text[:80]!r}") from None
    return text


# ---------------------------------------------------------------- the report


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises DataError or ModelError, which name the option."""
    where = _conditions(arguments.where)
    a, b = (
        read_texts(side, path, arguments.text_column, where, arguments.limit, arguments.seed)
        for side, path in (("A", arguments.a), ("B", arguments.b))
    )
    features_a, features_b = _features(a.texts, b.texts, arguments)
    found = two_sample(features_a, features_b, arguments.permutations, arguments.seed)
    if arguments.plot is not None:
        from fleetune.train.feature_plot import draw_features

        title = f"MMD² {found.mmd:.4g}, p {found.p_value:.4g}"
        draw_features(arguments.plot, {title: {a.path: features_a.cpu(), b.path: features_b.cpu()}})
    in_b = set(b.texts)
    n = len(a.texts)
    return {
        "model": arguments.model,
        "text_column": arguments.text_column,
        "max_length": arguments.max_length,
        "seed": arguments.seed,
        "rows_in_both": sum(text in in_b for text in a.texts),
        "mmd": found.mmd,
        "p_value": found.p_value,
        "permutations": len(found.null),
        "null": {"quantile_95": float(found.null.quantile(0.95)), "largest": float(found.null.max())},
        "a": {"path": a.path, "rows": n, "typical": most_typical(a, found.witness[:n], arguments.show)},
        "b": {"path": b.path, "rows": len(b.texts), "typical": most_typical(b, -found.witness[n:], arguments.show)},
    }


def _conditions(given: list[str]) -> dict[str, Any]:
    where = {}
    for condition in given:
        column, equals, value = condition.partition("=")
        if not column or not equals:
            raise RecipeError(f"--where {condition}: should be COLUMN=VALUE")
        where[column] = parse_yaml(value, f"--where {condition}")
        if not isinstance(where[column], bool | int | float | str):
            raise RecipeError(f"--where {condition}: the value should be text, a number, true or false")
    return where


def _features(a: list[str], b: list[str], arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    model = Model(
        model_name_or_path=arguments.model,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    try:
        encoder = load_encoder(model, arguments.max_length)
    except ModelError as error:
        message = str(error).replace("model.model_name_or_path = ", "--model ")
        raise ModelError(message.replace("data.max_length = ", "--max-length ")) from error
    pooled = mean_pooled(encoder, a + b, _tell).to(encoder.device)
    if not bool(pooled.isfinite().all()):
        raise ModelError(f"--model {arguments.model}: its features are not finite, on {arguments.max_length} tokens")
    return pooled[: len(a)], pooled[len(a) :]


def _tell(done: int, total: int) -> None:
    if done % TOLD_ROWS < BATCH_SIZE or done == total:
        print(f"encoded {done} of {total} rows", file=sys.stderr, flush=True)


def most_typical(side: Texts, score: torch.Tensor, count: int) -> list[dict[str, Any]]:
    """The rows with the highest score, each text once."""
    found: dict[str, dict[str, Any]] = {}
    for i in score.argsort(descending=True).tolist():
        text = " ".join(side.texts[i].split())
        shown = text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 3] + "..."
        found.setdefault(side.texts[i], {"row": int(side.index[i]), "witness": float(score[i]), "text": shown})
        if len(found) == count:
            break
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--model", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--where", action="append", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    return print_report(lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
