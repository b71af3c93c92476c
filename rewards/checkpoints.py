"""Weights and optional packages of rewards: found, loaded, or explained in one line.

Weights come from a folder, a file, or the model hub by ``owner/name``. No pickle runs code here: tensors are read from safetensors files, or from torch files
with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowrl.types import UserError

__all__ = ["load_network", "load_pretrained", "load_tensors", "locate_file", "packaged_file", "require"]


def require(reward: str, module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed, or its import fails; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reward {reward}: needs the package {module}, which cannot be imported ({error}); install flowrl-diffusion[{extra}]") from error


def locate_file(reward: str, source: str, filename: str) -> Path:
    """A file of a checkpoint on this machine; downloaded from the hub, or found in its cache, where ``source`` is no path.

    Args:
        source: a folder that holds ``filename``, the file itself, or a hub id ``owner/name``.
    Raises:
        UserError: it is not there; the message says what was tried.
    """
    place = Path(source).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        if not (place / filename).is_file():
            raise UserError(f"reward {reward}: the folder {place} has no file {filename}")
        return place / filename
    if source.startswith((".", "/", "~")):
        raise UserError(f"reward {reward}: there is no file or folder {place}")
    from huggingface_hub import hf_hub_download

    try:
        with _quiet_hub():
            return Path(hf_hub_download(source, filename))
    except Exception as error:
        raise UserError(_unreachable(reward, f"{filename} of {source}", error)) from error


def load_pretrained(reward: str, load: Callable[..., Any], source: str, **options: Any) -> Any:
    """``load(source, **options)``, where ``load`` is a ``from_pretrained`` of transformers and ``source`` a folder or a hub id.

    Raises:
        UserError: the source cannot be reached, or is not what ``load`` expects.
    """
    place = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not place.exists():
        raise UserError(f"reward {reward}: there is no file or folder {place}")
    try:
        with _quiet_hub():
            return load(str(place) if place.exists() else source, **options)
    except Exception as error:
        if place.exists():
            raise UserError(f"reward {reward}: {place} could not be loaded ({_one_line(error)})") from error
        raise UserError(_unreachable(reward, source, error)) from error


def load_network(reward: str, load: Callable[..., Any], source: str, **options: Any) -> Any:
    """`load_pretrained` for a network of transformers, all of whose weights must be in the checkpoint.

    transformers fills weights that a checkpoint lacks with random numbers, and only warns; a reward must not. Weights that the network has no use for, such as
    the text tower where only the image tower is loaded, are passed over.

    Raises:
        UserError: as `load_pretrained`; or a weight is missing or has another shape, the message names the first.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report lists every weight that is passed over
    try:
        network, report = load_pretrained(reward, load, source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    finally:
        logging.set_verbosity(level)
    wrong = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if wrong:
        raise UserError(
            f"reward {reward}: {source} lacks {len(wrong)} weights of a {type(network).__name__}, or has them in another shape, {wrong[0]} for one; "
            "give the checkpoint that the reward's page names"
        )
    return network


def load_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch file, on the CPU, where they may be nested under ``state_dict``.

    Raises:
        UserError: the file is damaged, or holds anything but tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"reward {reward}: {path} cannot be read as weights ({_one_line(error)})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"reward {reward}: {path} holds no table of tensors")
    return found


def packaged_file(reward: str, distribution: str, path: str, extra: str) -> Path:
    """A file inside an installed distribution, which is not imported.

    Raises:
        UserError: the distribution is not installed, or has no such file.
    """
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"reward {reward}: needs the package {distribution}; {extra}") from error
    if not found.is_file():
        version = importlib.metadata.version(distribution)
        raise UserError(f"reward {reward}: {distribution} {version} holds no file {path}; install the version that the reward's page names")
    return found


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub client's lines about each of its many tries: the error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unreachable(reward: str, what: str, error: Exception) -> str:
    return (
        f"reward {reward}: {what} was neither found in the hub's cache on this machine nor could it be downloaded ({_one_line(error)}); "
        "log in if it is gated, or download it elsewhere and give the folder instead of the id"
    )


def _one_line(error: BaseException) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 200 else line[:197] + "..."
