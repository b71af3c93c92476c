"""Loading causal language models and their tokenizers from a folder, a hub id or ``flowrl:NAME``, with one clear line for everything that can be wrong."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flowrl.policies.pipelines import ASSETS, UNUSABLE, advice, first_line, without_progress_bars
from flowrl.types import UserError

__all__ = ["EXAMPLE", "is_language_model", "load_language_model", "located", "rendered"]

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ENDING = "ForCausalLM", "LMHeadModel"


def _located(path: str) -> tuple[str, Path | None]:
    """(what transformers is given, the folder if it is on this machine)."""
    if path.startswith("flowrl:"):
        folder = ASSETS / path.removeprefix("flowrl:")
        if not (folder / "config.json").is_file():
            known = ", ".join(f"flowrl:{file.parent.name}" for file in sorted(ASSETS.glob("*/config.json")))
            raise UserError(f"model.path: {path} is not an embedded language model; known: {known or 'none (broken installation)'}")
        return str(folder), folder
    where = str(Path(path).expanduser()) if path.startswith("~") else path
    if Path(where).exists():
        return where, Path(where)
    if where.startswith((".", "/")) or where.count("/") != 1:
        raise UserError(f"model.path: {path} does not exist; give a folder, a hub id such as {EXAMPLE}, or flowrl:tiny-lm")
    return where, None


def located(path: str) -> str:
    """What transformers is given for a path, a hub id or ``flowrl:NAME``: the folder, or the id.

    Raises:
        UserError: there is no such folder or embedded model.
    """
    return _located(path)[0]


def is_language_model(path: str) -> bool:
    """Whether a model's config.json names a causal language model, or its folder holds GGUF weights and no config. False where there is no such model."""
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
    weights = {} if local is None else _gguf(path, local)
    if local is not None and not weights and not (local / "config.json").is_file():
        raise UserError(f"model.path: {path} is not a language model (no config.json); give the folder that save_pretrained wrote")
    try:
        with without_progress_bars() if local else nullcontext():
            has_tokenizer = local is not None and any(local.glob("tokenizer*"))
            tokenizer = AutoTokenizer.from_pretrained(where, **({} if has_tokenizer else weights))
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **weights, **({} if attention is None else {"attn_implementation": attention}))
    except (*UNUSABLE, ImportError) as error:
        if attention is not None and _is_about(error, attention):
            raise UserError(f"model.attention_backend: {attention} cannot be used: {first_line(error)}{advice(error)}") from error
        raise UserError(f"model.path: {path} could not be loaded as a language model: {first_line(error)}{advice(error)}") from error
    if not len(tokenizer):
        raise UserError(f"model.path: {path} has no tokenizer; copy the tokenizer's files into it")
    return model, tokenizer


def _gguf(path: str, folder: Path) -> dict[str, str]:
    files = sorted(file.name for file in folder.glob("*.gguf")) if not (folder / "config.json").is_file() else []
    if len(files) > 1:
        raise UserError(f"model.path: {path} holds several GGUF files ({', '.join(files)}); leave one in it")
    if files and importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.path: {path} holds GGUF weights, which need the package gguf: pip install gguf")
    return {"gguf_file": files[0]} if files else {}


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
