"""Features of several data sets in the plane of their first two principal components, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Sides = Mapping[str, torch.Tensor]  # by data set: (rows, D)


def draw_features(file: Path, panels: Mapping[str, Sides]) -> None:
    """A panel for each title, with components of its own."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for sides in panels.values() for name in sides))
    palette = plt.get_cmap("tab10").colors
    colours = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5), layout="constrained", squeeze=False)
    for axis, (title, sides) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, sides, colours)
        axis.set_title(title)
    rows = {name: len(side) for sides in panels.values() for name, side in sides.items()}
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colours[name], label=f"{name} ({rows[name]})")
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8)
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def _draw_panel(axis: Any, sides: Sides, colours: Mapping[str, Any]) -> None:
    from sklearn.decomposition import PCA

    pooled = torch.cat(list(sides.values())).numpy()
    pca = PCA(2, svd_solver="covariance_eigh").fit(pooled)
    points = pca.transform(pooled)  # (N, 2)
    names = np.repeat(list(sides), [len(side) for side in sides.values()])
    order = np.random.default_rng(0).permutation(len(points))  # so that no side lies on top
    axis.scatter(*points[order].T, s=6, alpha=0.5, linewidths=0, c=[colours[name] for name in names[order]])
    for axis_of, share in zip(("x", "y"), pca.explained_variance_ratio_, strict=True):
        axis.set(**{f"{axis_of}label": f"{share:.0%} of the variance", f"{axis_of}ticks": []})
