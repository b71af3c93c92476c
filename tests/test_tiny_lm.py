"""flowrl/assets/tiny-lm: loads by the ordinary calls without a network, reads and writes its world exactly, and answers about half of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.data import load_prompts
from flowrl.types import SampleBatch
from rewards.arithmetic import ArithmeticReward

FOLDER = Path(__file__).parent.parent / "flowrl" / "assets" / "tiny-lm"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


def answers(model: Any, tokenizer: Any, texts: list[str], *, sample: bool, seed: int = 0) -> list[str]:
    torch.manual_seed(seed)
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"temperature": None, "top_k": None, "top_p": None}
    with torch.no_grad():
        new = model.generate(**inputs, do_sample=sample, max_new_tokens=48, **chosen)[:, inputs.input_ids.shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def test_the_model_is_a_small_llama_in_float32_and_its_files_are_small(model: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM" and {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1_500_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000


def test_tokenizer_and_model_agree_on_their_special_tokens(model: Any, tokenizer: Any) -> None:
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2) and (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert all((config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids for config in (model.config, model.generation_config))
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight) < 200
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == model.config.max_position_embeddings == 512


def test_a_text_becomes_words_digits_and_signs(tokenizer: Any) -> None:
    text = "Tom has 17 apples. How many?"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<bos>", "Tom", " has", " ", "1", "7", " apples", ".", " How", " many", "?"]
    assert tokenizer("a zebra", add_special_tokens=False).input_ids == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize("split", ["train", "eval", "unseen"])
def test_every_prompt_solution_and_hint_is_written_back_as_it_was(tokenizer: Any, split: str) -> None:
    prompts = load_prompts(f"flowrl:tiny-lm/{split}")
    texts = [text for p in prompts for text in (p.text, p.metadata["solution"], *p.metadata["hints"], f"{p.text} {p.metadata['hints'][0]}")]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert all(tokenizer.unk_token_id not in row for row in ids)
    lengths = [len(tokenizer(p.text).input_ids) for p in prompts]
    working = [len(tokenizer(p.metadata["solution"], add_special_tokens=False).input_ids) for p in prompts]
    assert min(lengths) >= 15 and max(lengths) <= 45 and 8 <= sum(working) / len(working) <= 25 and max(working) <= 40


def test_about_half_of_the_samples_are_right(model: Any, tokenizer: Any) -> None:
    prompts = [prompt for prompt in load_prompts("flowrl:tiny-lm/eval")[:64] for _ in range(4)]
    scores = ArithmeticReward().score(SampleBatch(prompts, texts=answers(model, tokenizer, [prompt.text for prompt in prompts], sample=True)))
    share = scores.values.view(-1, 4).mean(1)
    assert 0.25 <= share.mean() <= 0.60
    assert ((share > 0) & (share < 1)).float().mean() >= 0.5  # groups that a group-relative method learns from
    assert scores.raw["arithmetic_format"].mean() >= 0.9
    assert scores.values[scores.raw["arithmetic_level"] == 1].mean() > scores.values[scores.raw["arithmetic_level"] == 3].mean()


def test_a_hint_behind_the_prompt_and_a_space_helps(model: Any, tokenizer: Any) -> None:
    prompts = [prompt for prompt in load_prompts("flowrl:tiny-lm/eval") if prompt.metadata["level"] == 3][:48]
    reward = ArithmeticReward()
    plain, helped = (
        reward.score(SampleBatch(prompts, texts=answers(model, tokenizer, [text.format(p=p.text, h=p.metadata["hints"][-1]) for p in prompts], sample=True)))
        for text in ("{p}", "{p} {h}")
    )
    assert helped.values.mean() >= 0.8 > plain.values.mean()


def test_padding_changes_no_answer(model: Any, tokenizer: Any) -> None:
    texts = [prompt.text for prompt in load_prompts("flowrl:tiny-lm/eval")[:4]]
    together = answers(model, tokenizer, texts, sample=False)
    assert together == [answers(model, tokenizer, [text], sample=False)[0] for text in texts]


def test_the_files_say_what_loads_them() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert {file.name for file in FOLDER.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
