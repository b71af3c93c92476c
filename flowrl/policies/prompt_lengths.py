"""How many tokens prompts have for a language model, from its tokenizer alone."""

from __future__ import annotations

from collections.abc import Sequence

from flowrl.policies.language_models import load_tokenizer, rendered
from flowrl.policies.pipelines import UNUSABLE, advice, first_line
from flowrl.types import Prompt, UserError

__all__ = ["prompt_lengths"]


def prompt_lengths(path: str, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt as `flowrl.policies.causal_lm.CausalLmPolicy.encode` makes them, the chat template's included.

    Raises:
        UserError: the tokenizer cannot be loaded, or refuses a prompt.
    """
    try:
        tokenizer = load_tokenizer(path)
    except (*UNUSABLE, ImportError) as error:
        raise UserError(f"model.path: the tokenizer of {path} could not be loaded: {first_line(error)}{advice(error)}") from error
    if tokenizer.chat_template is None:
        ids = tokenizer([prompt.text for prompt in prompts])["input_ids"] if prompts else []
        while any(numbers and numbers[-1] == tokenizer.eos_token_id for numbers in ids):  # some tokenizers end every text
            ids = [numbers[:-1] if numbers[-1] == tokenizer.eos_token_id else numbers for numbers in ids]
        return [len(numbers) for numbers in ids]
    texts = []
    for prompt in prompts:
        messages = prompt.metadata.get("messages")
        texts.append(rendered(tokenizer, [{"role": "user", "content": prompt.text}] if messages is None else list(messages)))
    return [len(numbers) for numbers in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
