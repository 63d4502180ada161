"""Two principal components of detector features, the same for the same features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Projection:
    """A plane in feature space."""

    mean: np.ndarray  # (F,) float64
    axes: np.ndarray  # (2, F) float64, orthonormal; the largest entry of each is positive
    explained: tuple[float, float]  # share of the variance along each axis, in [0, 1]

    @classmethod
    def fit(cls, features: np.ndarray) -> Projection:
        """Return the two directions of largest variance of features (N, F); with fewer, the rest is zero."""
        rows = np.asarray(features, np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        count, width = centred.shape
        total = float((centred * centred).sum())
        if count < width:  # the smaller of the two symmetric matrices has the same eigenvalues
            values, vectors = np.linalg.eigh(centred @ centred.T)
            directions = (vectors[:, ::-1][:, :2].T @ centred).astype(np.float64)
        else:
            values, vectors = np.linalg.eigh(centred.T @ centred)
            directions = vectors[:, ::-1][:, :2].T
        axes = np.zeros((2, width))
        shares = [0.0, 0.0]
        for index, direction in enumerate(directions):
            length = float(np.sqrt((direction * direction).sum()))
            value = max(0.0, float(values[::-1][index]))
            if length <= 0.0 or total <= 0.0 or value <= 1e-12 * total:
                continue
            sign = 1.0 if direction[np.abs(direction).argmax()] > 0 else -1.0  # eigenvectors have no sign of their own
            axes[index], shares[index] = sign * direction / length, value / total
        return cls(mean, axes, (shares[0], shares[1]))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return features (N, F) as points (N, 2)."""
        points: np.ndarray = (np.asarray(features, np.float64) - self.mean) @ self.axes.T
        return points
