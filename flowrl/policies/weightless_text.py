"""Language models of their real classes without weights, for estimates that read no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM

from flowrl.policies import causal_lm
from flowrl.policies.language_models import load_config, load_tokenizer
from flowrl.policies.pipelines import UNUSABLE, advice, first_line
from flowrl.types import UserError

__all__ = ["weightless_language_models"]


@contextmanager
def weightless_language_models() -> Iterator[None]:
    """Within it, and within `flowrl.policies.weightless.weightless`, `CausalLmPolicy` is made of a config and a tokenizer; of a model on the hub those files
    alone are read. Logits are taken to be the plain ones, and the model to be one that can be sampled.
    """
    stand_ins: dict[str, Any] = {"load_language_model": _without_weights, "_logit_settings": lambda _: (1.0, None), "check_decoding": lambda *_: ("any", "")}
    with patch.multiple(causal_lm, **stand_ins):
        yield


def _without_weights(path: str, dtype: torch.dtype, attention: str | None) -> tuple[Any, Any]:
    """As `flowrl.policies.language_models.load_language_model`, with parameters that are never filled."""
    try:
        with unset_fake_temporarily():
            config, tokenizer = load_config(path), load_tokenizer(path)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **({} if attention is None else {"attn_implementation": attention}))
    except (*UNUSABLE, ImportError) as error:
        raise UserError(f"model.path: the config of {path} could not be read as a language model: {first_line(error)}{advice(error)}") from error
    return model, tokenizer
