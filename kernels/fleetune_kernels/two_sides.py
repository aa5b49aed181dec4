"""What the losses between two sets of features share: checks, bandwidths, weights, the rows of other ranks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from fleetune_kernels.backends import choose, floating, full_precision, readable
from fleetune_kernels.gathering import Sizes, check_sizes, gather, offset, total, with_own
from fleetune_kernels.pairwise import LEAST_DISTANCE, Along, centre_of, mean_distance, sum_along
from fleetune_kernels.pairwise_op import sum_over_pairs

Bandwidth = float | torch.Tensor


class TwoSides:
    """Source and target features, of one layer or several, of this rank or all, and the kernel to compare them with."""

    def __init__(
        self,
        source: Mapping[str, torch.Tensor],  # each layer by its argument's name
        target: Mapping[str, torch.Tensor],
        num_kernels: int,
        factor: float,
        group: torch.distributed.ProcessGroup | None,
        sizes: Sizes | None,
        backend: str,
    ) -> None:
        _check_features(source, target)
        self.sides = list(source.values()), list(target.values())
        first = self.sides[0][0]
        self.chosen = choose(backend, first)
        if num_kernels < 1 or num_kernels != int(num_kernels):
            raise ValueError(f"num_kernels: {num_kernels!r}; should be a whole number of at least 1")
        if not 0 < factor < math.inf:
            raise ValueError(f"factor: {factor!r}; should be a finite number above 0")
        self.num_kernels, self.factor, self.group = int(num_kernels), float(factor), group
        self.own_rows = len(first), len(self.sides[1][0])
        self.counts = list(zip(*check_sizes(group, sizes, self.own_rows), strict=True))  # of every rank, by side
        self.rows = sum(self.counts[0]), sum(self.counts[1])
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.bandwidths: list[torch.Tensor | None] = [None] * len(self.sides[0])  # None: the mean distance
        self.detach_bandwidth = True

    def take_bandwidths(self, given: Mapping[str, Bandwidth | None], detach: bool) -> None:
        """One for each layer. `detach`: whether a mean distance is a constant to the gradient."""
        self.detach_bandwidth, self.bandwidths = detach, []
        for name, value in given.items():
            if value is None:
                self.bandwidths.append(None)
            elif isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.device != self.sides[0][0].device:
                    raise ValueError(
                        f"{name}: shape {tuple(value.shape)} on {value.device}; "
                        f"should be one number, on {self.sides[0][0].device} like the features"
                    )
                self.bandwidths.append(value.detach().reshape(()).to(self.dtype))
            elif not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r}; should be a finite number above 0")
            else:
                self.bandwidths.append(self._full((), value))

    def need_rows(self, least: int, what: str) -> None:
        for name, rows in zip(("source", "target"), self.rows, strict=True):
            if rows < least:
                raise ValueError(f"{name}: {rows} rows; {what} needs at least {least}")

    def full_precision(self) -> AbstractContextManager[Any]:
        return full_precision(self.sides[0][0])

    # ------------------------------------------------------------ all ranks' rows

    def everyone(self, side: int) -> list[torch.Tensor]:
        """By layer; this rank's with their gradient."""
        return [with_own(layer, self.counts[side], self.group) for layer in self.sides[side]]

    def gather(self, own: torch.Tensor, side: int) -> torch.Tensor:
        own = own.detach()
        return own if self.group is None else gather(own, self.counts[side], self.group)

    def weights(self, given: torch.Tensor | None, side: int, least: int) -> torch.Tensor:
        """(rows of all ranks,), with sum 1.

        Raises:
            ValueError: a negative one, or less than `least` above 0, where looking does not wait for a device.
        """
        if given is None:
            return self._full((self.rows[side],), 1 / self.rows[side])
        everyone = self.gather(given.to(self.dtype), side)
        if readable(everyone):
            legal = bool(((everyone >= 0) & (everyone < math.inf)).all())
            if not legal or int(everyone.count_nonzero()) < least:
                name = ("source_weights", "target_weights")[side]
                raise ValueError(f"{name}: should be finite numbers of 0 or more, with at least {least} above 0")
        return everyone / everyone.sum()

    def kernel_options(self, layer: int | None = None) -> dict[str, Any]:
        """For the reference, which takes the bandwidths of all layers, or the one of a single layer."""
        bandwidth = self.bandwidths if layer is None else self.bandwidths[layer]
        kernel = {"num_kernels": self.num_kernels, "factor": self.factor}
        return {**kernel, "bandwidth": bandwidth, "detach_bandwidth": self.detach_bandwidth}

    # ------------------------------------------------------------ the losses

    def over_pairs(self, weights: list[torch.Tensor], *, unbiased: bool, uniform: bool) -> torch.Tensor:
        """sum_ij omega_ij k_ij, of the signed weights (rows of all ranks, C) of both sides."""
        features = [layer for pair in zip(*self.sides, strict=True) for layer in pair]
        wanted = [torch.is_grad_enabled() and layer.requires_grad for layer in features]
        through = not self.detach_bandwidth and None in self.bandwidths and any(wanted)
        if through:  # all rows of a layer make its bandwidth together
            wanted = [True] * len(wanted)
        offsets = [offset(counts, self.group) for counts in self.counts]
        columns, own = [], weights
        if self.group is not None:
            columns = [self.gather(layer, index % 2) for index, layer in enumerate(features)]
            own = [
                side[start : start + rows] for side, start, rows in zip(weights, offsets, self.own_rows, strict=True)
            ]
        loss, *gradients = sum_over_pairs(
            features,
            columns,
            own,
            weights if columns else [],
            offsets,
            torch.stack([self._full((), 1.0) if one is None else one for one in self.bandwidths]),
            [one is None for one in self.bandwidths],
            wanted,
            self.num_kernels,
            self.factor,
            unbiased,
            uniform,
            self.chosen,
        )
        if self.group is not None:  # the others' shares, which have no gradient here
            loss = loss + (total(loss, self.group) - loss.detach())
        if through:
            loss = loss + self._through_bandwidths(features, columns or features, gradients)
        return loss.to(self.dtype)  # type: ignore[no-any-return]

    def _through_bandwidths(
        self, features: list[torch.Tensor], everyone: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> torch.Tensor:
        """0, with the gradient that the loss has through the mean distances: -z_i (sum_j z_j · g_j) / sum_j |z_j|²."""
        pairs = [slice(2 * i, 2 * i + 2) for i, given in enumerate(self.bandwidths) if given is None]
        found = [centre_of([side.detach() for side in everyone[pair]], self.dtype) for pair in pairs]
        along = [
            sum_along(side.detach(), centre, gradient)
            for pair, (centre, _) in zip(pairs, found, strict=True)
            for side, gradient in zip(features[pair], gradients[pair], strict=True)
        ]
        totals = total(torch.stack(along), self.group).reshape(-1, 2).sum(1)
        nothing = totals.new_zeros(())
        for pair, (centre, norms), alongside in zip(pairs, found, totals, strict=True):
            share = alongside / torch.stack([side.sum(dtype=torch.float64) for side in norms]).sum()
            share = torch.where(mean_distance(norms) > LEAST_DISTANCE, share, 0.0)  # below it is a constant
            for side in features[pair]:
                nothing = nothing + Along.apply(side, centre, -share)  # type: ignore[no-untyped-call]
        return nothing

    def linear(self) -> torch.Tensor:
        """The mean of k(s, s') + k(t, t') - k(s, t') - k(s', t) over consecutive rows s, s' and t, t': O(n)."""
        sides = self.everyone(0), self.everyone(1)
        used = min(self.rows) // 2 * 2
        kernels = []
        for layer, (source, target) in enumerate(zip(*sides, strict=True)):
            bandwidth = self.bandwidths[layer]
            if bandwidth is None:
                if self.detach_bandwidth:
                    _, norms = centre_of([source.detach(), target.detach()], self.dtype)
                else:
                    rows = torch.cat([source, target]).to(self.dtype)
                    norms = [(rows - rows.mean(0)).square().sum(1)]
                bandwidth = mean_distance(norms)
            s, t = source[:used].to(self.dtype), target[:used].to(self.dtype)
            differences = [s[::2] - s[1::2], t[::2] - t[1::2], s[::2] - t[1::2], s[1::2] - t[::2]]
            distances = torch.stack([difference.square().sum(1) for difference in differences])  # (4, used / 2)
            variances = [self.factor ** (q - self.num_kernels // 2) * bandwidth for q in range(self.num_kernels)]
            kernels.append(functools.reduce(operator.add, [torch.exp(distances / (-2 * v)) for v in variances]))
        within_source, within_target, across, back = functools.reduce(operator.mul, kernels)
        loss: torch.Tensor = (within_source + within_target - across - back).mean()
        return loss

    def covariance(self, side: int) -> torch.Tensor:  # (D, D)
        """Of all ranks' rows, with the gradient of this rank's; the mean may be fixed, since sum_i (x_i - mean) = 0."""
        rows = self.sides[side][0].to(self.dtype)
        mean = total(rows.sum(0), self.group) / self.rows[side]
        centred = rows - mean
        own: torch.Tensor = centred.t() @ centred / (self.rows[side] - 1)
        return own if self.group is None else own + (total(own, self.group) - own.detach())

    def _full(self, shape: tuple[int, ...], value: float) -> torch.Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.sides[0][0].device)


def _check_features(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where layers are no matrices, or source and target differ in columns, dtype or device."""
    first = next(iter(source.values()))
    for side in (source, target):
        rows = len(next(iter(side.values())))
        for name, layer in side.items():
            floating(name, layer)
            if layer.ndim != 2 or layer.shape[1] == 0:
                raise ValueError(f"{name}: shape {tuple(layer.shape)}; should be (rows, features)")
            if len(layer) != rows:
                raise ValueError(f"{name}: {len(layer)} rows; should be {rows} as in the first layer")
            if (layer.dtype, layer.device) != (first.dtype, first.device):
                raise ValueError(
                    f"{name}: {layer.dtype} on {layer.device}; the source is {first.dtype} on {first.device}"
                )
    for (name, one), other in zip(target.items(), source.values(), strict=True):
        if one.shape[1] != other.shape[1]:
            raise ValueError(f"{name}: {one.shape[1]} features; the source has {other.shape[1]}")
