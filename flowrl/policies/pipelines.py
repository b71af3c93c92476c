"""Loading diffusers pipelines from a folder, a hub id or ``flowrl:NAME``, with one clear line for everything that can be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from flowrl.types import UserError

__all__ = [
    "ASSETS",
    "DTYPE_KEYWORD",
    "UNUSABLE",
    "UNUSED",
    "advice",
    "first_line",
    "load_pipeline",
    "pipeline_class",
    "resolve_model_path",
    "without_progress_bars",
]

ASSETS = Path(__file__).parent.parent / "assets"
DTYPE_KEYWORD = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"  # diffusers renamed it in 0.40
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of pipelines that flowrl never runs; they are neither needed nor loaded
UNUSABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError)  # what diffusers raises for folders that are no pipelines


def resolve_model_path(path: str) -> str:
    """``flowrl:NAME`` -> the embedded model's folder; anything else unchanged.

    Raises:
        UserError: there is no such embedded model.
    """
    if not path.startswith("flowrl:"):
        return path
    folder = ASSETS / path.removeprefix("flowrl:")
    if not (folder / "model_index.json").is_file():
        known = ", ".join(f"flowrl:{f.parent.name}" for f in sorted(ASSETS.glob("*/model_index.json")))
        raise UserError(f"model.path: {path} is not an embedded model; known: {known or 'none (broken installation)'}")
    return str(folder)


def _located(path: str, example: str) -> tuple[str, Path | None]:
    """(what diffusers is given, the folder if it is on this machine)."""
    where = resolve_model_path(path)
    if Path(where).exists() and not (Path(where) / "model_index.json").is_file():
        raise UserError(f"model.path: {path} is not a diffusers pipeline (no model_index.json); give the folder that save_pretrained wrote")
    if not Path(where).exists() and (where.startswith((".", "/", "~")) or where.count("/") != 1):
        raise UserError(f"model.path: {path} does not exist; give a folder, a hub id such as {example}, flowrl:tiny-sd3 or flowrl:tiny-lm")
    return where, Path(where) if Path(where).exists() else None


def pipeline_class(path: str, example: str) -> str:
    """The name of the pipeline class that a model's index names, such as StableDiffusion3Pipeline.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    where, _ = _located(path, example)
    try:
        return str(DiffusionPipeline.load_config(where).get("_class_name"))
    except UNUSABLE as error:
        raise UserError(f"model.path: {path} could not be loaded as a pipeline: {first_line(error)}{advice(error)}") from error


def load_pipeline(path: str, classes: Sequence[str], title: str, example: str, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Load a pipeline of one of these classes; the VAE always in float32. Only a download shows progress.

    Args:
        classes: names of diffusers' classes; the index must name one of them. It is loaded as that one.
        title: of the family, for messages. example: a hub id of it.
        dtypes: of components by name, and of all others under ``default``.
    Raises:
        UserError: the model is missing, is gated, or is not such a pipeline.
    """
    where, local = _located(path, example)
    try:
        index = DiffusionPipeline.load_config(where)
        kind = str(index.get("_class_name"))
        if kind not in classes:
            raise UserError(f"model.path: {path} is a {kind}, not a {title} pipeline")
        parts = {name: None if name in UNUSED else entry[0] for name, entry in index.items() if isinstance(entry, (list, tuple))}
        for name in parts:
            if local and parts[name] is not None and not (local / name).is_dir():  # transformers would make an empty tokenizer without a word
                raise UserError(f"model.path: {path} has no folder {name}, which its model_index.json names; copy the whole pipeline")
        absent: dict[str, Any] = {name: None for name, library in parts.items() if library is None}  # diffusers wants to be told
        absent |= {"requires_safety_checker": False} if "safety_checker" in absent else {}
        with without_progress_bars() if local else nullcontext():
            return getattr(diffusers, kind).from_pretrained(where, **{DTYPE_KEYWORD: {"vae": torch.float32, **dtypes}}, **absent)
    except UNUSABLE as error:
        raise UserError(f"model.path: {path} could not be loaded as a {title} pipeline: {first_line(error)}{advice(error)}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within it, diffusers and transformers draw no progress bars; their warnings stay."""
    switches = [logging for logging in (diffusers_logging, transformers_logging) if logging.is_progress_bar_enabled()]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()


def advice(error: BaseException) -> str:
    """What the hub said. diffusers tells a gated model and a hub that does not answer from a missing one only in the errors underneath its own."""
    kinds, text, cause = set(), str(error), error.__cause__ or error.__context__
    while cause is not None:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in kinds or "gated" in text.lower():
        return " (it is gated: accept its licence on its page, then `hf auth login`)"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return " (the hub could not be reached, and it is not in the cache: download it elsewhere and give the folder)"
    return ""


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
