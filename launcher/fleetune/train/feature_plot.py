"""Features of several data sets in the plane of their first two principal components, as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def draw_features(file: Path, sides: dict[str, torch.Tensor], title: str) -> None:  # name: (rows, D)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from sklearn.decomposition import PCA

    pooled = torch.cat(list(sides.values())).numpy()
    pca = PCA(2, svd_solver="covariance_eigh").fit(pooled)
    points = pca.transform(pooled)  # (N, 2)
    names = np.repeat(list(sides), [len(side) for side in sides.values()])
    order = np.random.default_rng(0).permutation(len(points))  # so that no side lies on top
    colours = dict(zip(sides, plt.get_cmap("tab10").colors, strict=False))
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    axis.scatter(*points[order].T, s=6, alpha=0.5, linewidths=0, c=[colours[name] for name in names[order]])
    for axis_of, share in zip(("x", "y"), pca.explained_variance_ratio_, strict=True):
        axis.set(**{f"{axis_of}label": f"{share:.0%} of the variance", f"{axis_of}ticks": []})
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colours[name], label=f"{name} ({len(side)})")
        for name, side in sides.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8)
    axis.set_title(title)
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
