"""Whether a language model can be sampled as `flowrl.policies.decoding` does it: a few tokens with a cache, beside the same texts as training reads them.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowrl.policies.caches import GrowingCache
from flowrl.policies.decoding import Batch
from flowrl.policies.pipelines import first_line

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import TokenNetwork

__all__ = ["Decoding", "check_decoding"]

Decoding = Literal["any", "from the prompt", "no"]
"""What a cache is good for: answers that begin with any tokens, answers that follow the prompt, nothing."""

_PROMPTS = (5, 2)
_ANSWERS = (0, 0, 1)
"""The prompt of each row."""
_BEGINNINGS = (3, 1, 0)
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)
"""What models raise that know another cache."""


class _Model:
    """A network as decoding sees it."""

    ends: Collection[int] = ()

    def __init__(self, network: TokenNetwork, pad: int, device: torch.device) -> None:
        self.network, self.pad, self.device = network, pad, device

    def new_cache(self) -> Any:
        return GrowingCache(self.network.model.config)

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, real: int, last: Tensor | None = None) -> Tensor:
        return self.network(ids, mask, positions, cache=cache, last=last)["logits"].float()

    def whole(self, texts: Sequence[Tensor]) -> Tensor:
        """[R, V] after whole texts, padded on the right and with gradient, as they are trained."""
        ids = pad_sequence(list(texts), batch_first=True, padding_value=self.pad).to(self.device)
        sizes, place = torch.tensor([len(text) for text in texts], device=self.device), torch.arange(ids.shape[1], device=self.device)
        with torch.enable_grad():
            return self.network(ids, place < sizes[:, None], place.expand_as(ids), last=sizes - 1)["logits"].detach().float()

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        raise NotImplementedError

    def in_parts(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        raise NotImplementedError


@torch.no_grad()
def check_decoding(network: TokenNetwork, pad: int, device: torch.device) -> tuple[Decoding, str]:
    """What a cache can be used for, and why for nothing more. 80 positions go through the network in 7 forwards, before anything is trained or counted.

    Padding on the left and between tokens must change nothing: it does where a layer keeps a state (Mamba) or counts places itself (learned positions of a
    decoder that is part of an encoder-decoder), and without a cache of keys and values nothing is remembered at all (RWKV).

    Raises:
        torch.OutOfMemoryError: the model leaves no room for them.
    """
    model = _Model(network, pad, device)
    size = network.model.config.get_text_config().vocab_size
    dtype = network.model.dtype
    prompts = [torch.arange(3, 3 + count) * 7 % size for count in _PROMPTS]
    beginnings = [torch.arange(11, 11 + count) * 5 % size for count in _BEGINNINGS]
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        if why := _difference(model, prompts, [part[:0] for part in beginnings]):
            return "no", why
        why = _difference(model, prompts, beginnings)
    return ("from the prompt" if why else "any"), why


def _difference(model: _Model, prompts: Sequence[Tensor], beginnings: Sequence[Tensor]) -> str:
    """What keeps the logits after the beginnings and one more token from being those of whole texts, but for rounding; empty = nothing."""
    one, live = torch.tensor([2] * len(_ANSWERS), device=model.device), torch.ones(len(_ANSWERS), dtype=torch.bool, device=model.device)
    try:
        batch = Batch(model)
        batch.begin(prompts)
        batch.select(torch.tensor(_ANSWERS, device=model.device))
        if any(map(len, beginnings)):
            batch.go_on(beginnings)
        batch.advance(one, live, len(_ANSWERS))
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        return first_line(error)
    texts = [torch.cat((prompts[number], beginning, one[:1].cpu())) for number, beginning in zip(_ANSWERS, beginnings, strict=True)]
    ours, theirs = (logits.log_softmax(-1) for logits in (batch.logits, model.whole(texts)))
    known = ours.isfinite() & theirs.isfinite()
    distance, spread = torch.where(known, ours - theirs, 0.0).square().mean(), torch.where(known, theirs, 0.0).var()
    within = bool(distance <= (1e-4 if model.network.model.dtype == torch.float32 else 0.1) * spread.clamp_min(1e-6))
    return "" if within else f"log-probabilities differ by {distance.sqrt().item():.2g}"
