"""Confidence intervals of mean rewards."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

from torch import Tensor

__all__ = ["mean_ci95"]

Z_95 = 1.959963984540054
"""0.975 quantile of the standard normal distribution."""


def mean_ci95(values: Iterable[float] | Tensor, clusters: Iterable[Hashable] | Tensor | None = None) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval under the normal approximation.

    Without clusters, for n independent values:   half = 1.96 sqrt( sum_i (v_i - m)^2 / (n (n - 1)) ).
    With k clusters, for residual sums e_c = sum_{i in c} (v_i - m):   half = 1.96 sqrt( k / (k - 1) * sum_c e_c^2 ) / n.

    Images of one prompt succeed or fail together, so they are not independent: pass the prompt of each image as ``clusters``, or the
    interval is too narrow. The second formula is the cluster-robust (sandwich) standard error of the mean over all images. With clusters
    of equal size it is the standard error of the k cluster means; with clusters of one value it is the first formula.

    The approximation wants about 30 values (clusters) or more: with k = 8 it covers about 91 % instead of 95 %. When all values are equal
    (a strict reward that is always 0) it gives a half width of 0, which says that no spread was seen, not that the mean is known exactly.

    Args:
        values: n finite numbers, or a tensor [n]; leave out samples that could not be scored.
        clusters: n labels, or an integer tensor [n]; equal labels share a prompt. None = all values are independent.

    Returns:
        (mean, half width), both in the unit of the values. The half width is NaN when there is a single value or cluster.

    Raises:
        ValueError: without values, with a value that is not finite, or when the number of labels differs from the number of values.
    """
    numbers = [float(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    labels = list(range(len(numbers)) if clusters is None else clusters.tolist() if isinstance(clusters, Tensor) else clusters)
    if not numbers:
        raise ValueError("mean_ci95 needs at least one value")
    if len(labels) != len(numbers):
        raise ValueError(f"{len(numbers)} values but {len(labels)} cluster labels")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("mean_ci95 needs finite values; leave out samples that could not be scored")
    # fsum is exact before its one rounding, so the result does not depend on the order of the values or on the machine.
    mean = math.fsum(numbers) / len(numbers)
    residuals: dict[Hashable, list[float]] = {}
    for number, label in zip(numbers, labels, strict=True):
        residuals.setdefault(label, []).append(number - mean)
    k = len(residuals)
    if k == 1:
        return mean, math.nan
    spread = math.fsum(math.fsum(cluster) ** 2 for cluster in residuals.values())
    return mean, Z_95 * math.sqrt(k / (k - 1) * spread) / len(numbers)
