"""The reviews of flowrl:sentiment: what the script writes, with answers that the reward of the configs takes and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loading import load_script

from flowrl.config import load_config
from flowrl.data import load_prompts
from flowrl.evaluation import build_rewards
from flowrl.types import Prompt, SampleBatch

ROOT = Path(__file__).parent.parent
SCRIPT = load_script("scripts/build_sentiment_prompts.py")
SPLITS = ("train", "eval")


def words_of(prompts: list[Prompt]) -> set[str]:
    return {word for prompt in prompts for word in prompt.text.lower().strip(".!").split()}


def test_the_files_are_those_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["build_sentiment_prompts.py", "--out", str(tmp_path)])
    SCRIPT.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (SCRIPT.FOLDER / f"{split}.jsonl").read_bytes()


def test_things_and_adjectives_of_the_evaluation_are_new_and_answers_balanced() -> None:
    train, evaluation = (load_prompts(f"flowrl:sentiment/{split}") for split in SPLITS)
    assert (len(train), len(evaluation)) == (192, 128)
    assert words_of(train) & words_of(evaluation) == {"the", "was", "i", "found", "what", "a", "an", "my", "friends", "called"}
    for prompts in (train, evaluation):
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        assert sum(prompt.metadata["answer"] == "positive" for prompt in prompts) == len(prompts) / 2
        assert all(prompt.metadata["messages"][-1]["content"] == prompt.text for prompt in prompts)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_the_reward_takes_the_answer_alone(method: str) -> None:
    config = load_config(ROOT / "configs" / f"smollm2_{method}.yaml")
    reward = build_rewards(config.rewards)
    reward.load(torch.device("cpu"), torch.float32)
    for split in SPLITS:
        prompts = load_prompts(f"flowrl:sentiment/{split}")
        answers = [prompt.metadata["answer"] for prompt in prompts]
        other = [{"positive": "negative", "negative": "positive"}[answer] for answer in answers]
        values = {
            wanted: {float(value) for value in reward.score(SampleBatch(prompts, None, texts))["total"].values}
            for wanted, texts in {
                "right": answers,
                "right, in capitals": [f" {answer.upper()}\n" for answer in answers],
                "wrong": other,
                "sentence": [f"It is {answer}." for answer in answers],
                "both": [f"{answer} or {wrong}" for answer, wrong in zip(answers, other, strict=True)],
                "nothing": ["" for _ in answers],
            }.items()
        }
        assert values == {"right": {1.0}, "right, in capitals": {1.0}, "wrong": {0.0}, "sentence": {0.0}, "both": {0.0}, "nothing": {0.0}}
