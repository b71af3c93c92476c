"""rewards/reward_model.py on a tiny random Llama classifier with a tiny tokenizer, saved as published models are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reward_models import assert_reward_contract
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.registry import load_reward
from rewards.reward_model import RewardModel

CPU = torch.device("cpu")
WORDS = ["<pad>", "<end>", "<unk>", "<s>", "user", "assistant", "system", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def save(folder: Path, pad: bool = True, num_labels: int = 1, template: str | None = TEMPLATE, **changes: Any) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", **({"pad_token": "<pad>"} if pad else {}), **changes}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_labels=num_labels,
        max_position_embeddings=128, pad_token_id=0 if pad else None, bos_token_id=3, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("reward_model"))


def batch(pairs: list[tuple[str, str]]) -> SampleBatch:
    return SampleBatch([Prompt(prompt) for prompt, _ in pairs], texts=[text for _, text in pairs])


PAIRS = [("a b c", "d e f g"), ("a", "b"), ("h i j k l m n", "a a <end> a"), ("x y", ""), ("q r s t", "u v w x y z a b c d e f")]


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **args: Any) -> RewardModel:
    reward = load_reward("reward_model", {"model": str(folder), **args})
    assert isinstance(reward, RewardModel)
    reward.load(CPU, dtype)
    return reward


def ids_by_hand(prompt: str, text: str) -> list[int]:
    words = ["<s>", "user", *prompt.split(), "<end>", "assistant", *text.split(), "<end>"]
    return [WORDS.index(word) for word in words]


def values_one_by_one(folder: Path, chats: list[list[int]]) -> Tensor:
    """transformers' own logits, a chat at a time, so without any padding."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.stack([network(input_ids=torch.tensor([chat])).logits[0, 0] for chat in chats])


def test_the_value_is_the_logit_of_the_last_token_of_the_chat(folder: Path) -> None:
    chats = [ids_by_hand(*pair) for pair in PAIRS]
    scores = loaded(folder).score(batch(PAIRS))
    torch.testing.assert_close(scores.values, values_one_by_one(folder, chats), rtol=0, atol=1e-5)
    assert scores.values.unique().numel() == len(PAIRS)
    assert scores.raw["reward_model_tokens"].tolist() == [len(chat) for chat in chats]


def test_padding_changes_nothing_and_an_end_token_in_the_chat_is_not_padding(folder: Path, tmp_path: Path) -> None:
    reward = loaded(folder)
    alone = torch.cat([reward.score(batch([pair])).values for pair in PAIRS])
    torch.testing.assert_close(reward.score(batch([*PAIRS, ("a", "b " * 40)])).values[:-1], alone, rtol=0, atol=1e-5)
    no_pad = loaded(save(tmp_path / "no_pad", pad=False))  # padded with <end>, which every chat ends with
    torch.testing.assert_close(no_pad.score(batch(PAIRS)).values, alone, rtol=0, atol=1e-5)


def test_a_long_chat_is_cut_from_the_left_of_the_prompt(folder: Path) -> None:
    prompt, text = " ".join("abcdefghijklmnopqrst"), "u v w x"
    reward = loaded(folder, max_length=16)
    scores = reward.score(batch([(prompt, text), ("a", "b " * 30), ("a b", "c")]))
    kept = ids_by_hand("m n o p q r s t".partition("n ")[2], text)
    assert len(kept) == 15
    kept = ids_by_hand("n o p q r s t", text)
    assert len(kept) == 16
    torch.testing.assert_close(scores.values[:1], values_one_by_one(folder, [kept]), rtol=0, atol=1e-5)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.problems == {1: "the completion alone is longer than 16 tokens"}
    assert scores.raw["reward_model_tokens"][[0, 2]].tolist() == [16, 8]
    none = reward.score(batch([("a", "b " * 30)]))
    assert not none.valid.any()
    assert none.values.isnan().all()


def test_a_system_message_goes_first(folder: Path) -> None:
    chat = [WORDS.index(word) for word in ["<s>", "system", "z", "<end>", "user", "a", "<end>", "assistant", "b", "<end>"]]
    values = loaded(folder, system="z").score(batch([("a", "b")])).values
    torch.testing.assert_close(values, values_one_by_one(folder, [chat]), rtol=0, atol=1e-5)


def test_bfloat16_is_close_and_its_head_stays_in_float32(folder: Path) -> None:
    reward = loaded(folder, torch.bfloat16)
    assert reward.network is not None
    assert {name: p.dtype for name, p in reward.network.named_parameters() if p.dtype != torch.bfloat16} == {"score.weight": torch.float32}
    low, full = reward.score(batch(PAIRS)).values, loaded(folder).score(batch(PAIRS)).values
    torch.testing.assert_close(low, full, rtol=0, atol=0.1 * full.std().item())
    reward.to(CPU)
    assert torch.equal(reward.score(batch(PAIRS)).values, low)


def test_the_reward_keeps_the_contract(folder: Path) -> None:
    assert_reward_contract(lambda: RewardModel(str(folder), max_length=20), batch([*PAIRS, ("a", "b " * 30)]))


def test_pictures_are_refused(folder: Path) -> None:
    reward = loaded(folder)
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="^reward reward_model: needs texts .*only pictures"):
        reward.score(SampleBatch([Prompt("x")], images))
    with pytest.raises(UserError, match="^reward reward_model: needs texts"):
        reward.measure(images, [Prompt("x")])


def without_head(folder: Path) -> Path:
    network = transformers.LlamaModel(transformers.LlamaConfig.from_pretrained(save(folder)))
    network.save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    save(folder)
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def damaged(folder: Path) -> Path:
    (save(folder) / "model.safetensors").write_bytes(b"no weights")
    return folder


def without_any_end(folder: Path) -> Path:
    save(folder, pad=False, eos_token=None)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "eos_token"}))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: save(path, num_labels=2), "has 2 labels where a reward model has one"),
        (lambda path: save(path, template=None), "has no chat template"),
        (without_any_end, "has neither a pad token nor an end-of-text token"),
        (without_head, "score.weight"),
        (encoder, "BertForSequenceClassification has no linear head `score`"),
        (damaged, "could not be loaded"),
        (lambda path: path, "there is no file or folder"),
    ],
)
def test_a_model_that_does_not_fit_is_one_error(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward reward_model: .*{message}"):
        loaded(make(tmp_path / "model"))


@pytest.mark.parametrize("args", [{"max_length": 15}, {"batch_size": 0}, {"max_length": True}])
def test_arguments_out_of_range_are_refused(args: dict[str, int]) -> None:
    with pytest.raises(UserError, match="^reward reward_model: .* must be a whole number from"):
        RewardModel(**args)  # type: ignore[arg-type]
