"""Policies of a model's real classes without its weights: for estimates that read no checkpoint, and for benchmarks that need none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.policies import base
from flowrl.policies.pipelines import UNUSABLE, UNUSED, pipeline_class, resolve_model_path
from flowrl.types import UserError

__all__ = ["Loader", "pipelines_from", "weightless"]

Loader = Callable[[str, Sequence[str], str, str, Mapping[str, torch.dtype]], Any]
"""(path, classes, title, example, dtypes) -> a pipeline, as `flowrl.policies.pipelines.load_pipeline`."""


@contextmanager
def pipelines_from(loader: Loader) -> Iterator[None]:
    """Within it, policies get their pipelines from ``loader`` instead of a folder or the hub."""
    with patch.object(base, "load_pipeline", loader):
        yield


@contextmanager
def weightless(loader: Loader | None = None) -> Iterator[None]:
    """Within it, tensors have shapes and no memory, and policies are made of configs and tokenizers; of a model on the hub those files alone are read.

    Where a value decides, it is taken to be 1, and a comparison to fail. Networks must not be copied in it (`copy.deepcopy`, so no frozen reference), for torch
    would copy memory that is not there.

    Args:
        loader: of pipelines; None = from the configs of the model's folder or its hub page.
    """
    made = pipelines_from(loader or _without_weights)
    with warnings.catch_warnings(), patch.object(nn.Module, "_apply", _apply), FakeTensorMode(allow_non_fake_inputs=True), _Answers(), made:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


class _Answers(TorchDispatchMode):
    """What a program is told that asks for a value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _without_weights(path: str, classes: Sequence[str], title: str, example: str, dtypes: Mapping[str, torch.dtype]) -> Any:
    """As `load_pipeline`, with parameters that are never filled."""
    kind, where = pipeline_class(path, example), resolve_model_path(path)
    if kind not in classes:
        raise UserError(f"model.path: {path} is a {kind}, not a {title} pipeline")
    try:
        with unset_fake_temporarily():
            index = DiffusionPipeline.load_config(where)
        entries = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and name not in UNUSED}
        parts: dict[str, Any] = dict.fromkeys((*entries, *(name for name in UNUSED if name in index)))
        parts |= {name: _part(where, name, entry[0], entry[1], dtypes.get(name, dtypes["default"])) for name, entry in entries.items() if entry[0] is not None}
        parts |= {name: value for name, value in index.items() if not name.startswith("_") and name not in parts}
        parts |= {"requires_safety_checker": False} if "safety_checker" in parts else {}
        return getattr(diffusers, kind)(**parts)
    except UNUSABLE as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.path: the configs of {path} could not be read as a {title} pipeline: {said}") from error


def _part(where: str, name: str, library: str, kind: str, dtype: torch.dtype) -> Any:
    """One component: networks without weights, tokenizers and schedulers as they are."""
    found: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    if not (_is_network(found)):
        with unset_fake_temporarily():
            return found.from_pretrained(where, subfolder=name)
    with unset_fake_temporarily():
        settings = found.load_config(where, subfolder=name) if library == "diffusers" else found.config_class.from_pretrained(where, subfolder=name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if name == "vae" else dtype)
    try:
        network = found.from_config(settings) if library == "diffusers" else found._from_config(settings)
    finally:
        torch.set_default_dtype(before)
    return network


def _is_network(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` does, for parameters that torch would want to swap and cannot."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        source = parameter.detach()
        new = function(source)
        if new is not source:
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module
