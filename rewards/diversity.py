"""Diversity: how unlike the other pictures of its prompt a picture is. Put beside a reward of quality, it works against collapse.

With f_1 .. f_n the unit features of the pictures of a group (rewards/features.py):

    distance    value_i = mean over j != i of (1 - f_i . f_j)
    dpp         value_i = logdet S - logdet S without i = -log (S^-1)_ii,     S = F F^T + eps I,  eps = 1e-3

"distance" credits the odd one out. "dpp", the marginal gain of a determinantal point process, is the log of the squared part of f_i (plus eps) that the
others do not span: nearly 0 for a picture unlike all others, log(eps) = -6.9 for one of many copies. Both are values of a sample: a bonus equal for all
members of a group would be cancelled by the standardisation of advantages inside it. Products of DINO features can be negative; of MobileNetV2 they cannot.

Source: Kulesza and Taskar, arXiv:1207.6083, for determinantal point processes; the marginal as a reward is ours. Verified: the identity above, by
determinants. Computed by one Cholesky factor a group in float64. A group of one has no value.
Letters: B samples, n members of a group, D numbers of a feature.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flowrl.types import RewardInfo, SampleBatch, Scores
from rewards.features import DINO, FAMILIES, MOBILENET, Family, Features, build_features
from rewards.groups import groups_of
from rewards.network import check_choice
from rewards.pictures import not_finite, pictures_of

__all__ = ["Diversity", "dpp_marginals", "log_determinant", "mean_distances"]

_EPS = 1e-3
_WEIGHTS = {"dinov2": (DINO, "Apache-2.0", 86_580_480), "mobilenet_v2": (MOBILENET, "torchvision BSD-3-Clause, trained on ImageNet", 2_223_872)}


def mean_distances(features: Tensor) -> Tensor:
    """Mean cosine distance [n] in [0, 2] of each unit vector [n, D] from the others; n >= 2."""
    cosines = features.double() @ features.double().T
    others = cosines.sum(1) - cosines.diagonal()
    return 1 - others / (len(features) - 1)


def dpp_marginals(features: Tensor) -> Tensor:
    """What each of n unit vectors [n, D] adds to the log-determinant of the module's text: [n] float64 in [log eps, log(1 + eps)]."""
    return -torch.cholesky_inverse(_factor(features)).diagonal().log()


def log_determinant(features: Tensor) -> Tensor:
    """logdet S of unit vectors [n, D], a float64 scalar."""
    return 2 * _factor(features).diagonal().log().sum()


def _factor(features: Tensor) -> Tensor:
    similarity = features.double() @ features.double().T
    return torch.linalg.cholesky(similarity + _EPS * torch.eye(len(features), dtype=torch.float64))


class Diversity:
    """How unlike the others of its group a picture is. See the module's text.

    Args:
        form: "distance" or "dpp".
        features: of "dinov2" or "mobilenet_v2".
        model: of the features: a hub id, a folder or a file (rewards/features.py); None = the published weights.
    Raises:
        UserError: another form or other features.
    """

    def __init__(self, form: Literal["distance", "dpp"] = "distance", features: Family = "dinov2", model: str | None = None) -> None:
        check_choice("diversity", "form", form, ("distance", "dpp"))
        check_choice("diversity", "features", features, FAMILIES)
        default, weights_license, parameters = _WEIGHTS[features]
        self.form = form
        self.features = features
        self.model = model or default
        self.network: Features | None = None
        what = "mean distance of the picture's features from those" if form == "distance" else "what the picture adds to the volume spanned by the features"
        self.info = RewardInfo(
            name="diversity",
            description=f"{what} of the other pictures of its prompt ({features})",
            low=0.0 if form == "distance" else math.log(_EPS),
            high=2.0 if form == "distance" else math.log1p(_EPS),
            source="flowrl; determinantal point processes: arXiv:1207.6083",
            weights=(self.model,),
            weights_license=weights_license,
            parameters=parameters,
            reads=("images",),
            scope="group",
            batch_size=64,
            dtype="bfloat16",
            extra="clip" if features == "mobilenet_v2" else "",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights, once; a second call only moves them.

        Raises:
            UserError: a package is missing, or the weights cannot be found or are of another network.
        """
        if self.network is None:
            self.network = build_features("diversity", self.features, self.model, dtype)
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Move the network.

        Raises:
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError("reward diversity: load must be called before to")
        self.network.to(device)
        self.device = device

    def score(self, batch: SampleBatch) -> Scores:
        """Diversity of pictures [B, 3, H, W] float in [0, 1] of any size inside their groups; ``info.batch_size`` go through the network at a time.

        Returns:
            values [B] float32; raw["diversity_group"] [B] float32: the mean over the group for "distance", logdet S for "dpp". A picture with NaN or infinite
            pixels is invalid and none of its group; so is one that is alone in its group.
        Raises:
            UserError: the batch has no RGB pictures in floating point.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError("reward diversity: load must be called before score")
        images, finite = pictures_of("diversity", batch)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            features = torch.cat([self.network(part.to(self.device)).cpu() for part in images.split(self.info.batch_size)])
        values, whole = torch.full((2, len(batch)), torch.nan)
        problems = not_finite(finite)
        for group in groups_of(batch):
            members = group[finite[group]]
            if len(members) < 2:
                problems |= dict.fromkeys(members.tolist(), "no other picture of its prompt to compare it with")
                continue
            found = features[members]
            distances = mean_distances(found)
            values[members] = (distances if self.form == "distance" else dpp_marginals(found)).float()
            whole[members] = (distances.mean() if self.form == "distance" else log_determinant(found)).float()
        valid = torch.tensor([index not in problems for index in range(len(batch))])
        return Scores(values, valid, {"diversity_group": whole}, problems)
