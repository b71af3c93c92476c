"""VllmEngine, by what it asks of a stand-in for vLLM: requests, seeds, weights, and what it makes of the answers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from language_models import PROMPTS, answers_to, build_language_model, make_policy
from rows import ids, row, seeded

from flowrl.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_language_model(tmp_path_factory.mktemp("lm") / "llama")


class FakeLLM:
    """Says the seed's last digits; it keeps what it was made and asked with."""

    made: list[FakeLLM]

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.asked, self.rpc, self.resets = arguments, [], [], 0
        FakeLLM.made.append(self)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        self.rpc.append((method, sorted(file.name for file in Path(kwargs["weights_path"]).iterdir())))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: Any, sampling: Any, *, use_tqdm: bool, lora_request: Any) -> Any:
        files = None if lora_request is None else sorted(file.name for file in Path(lora_request[2]).iterdir())
        self.asked.append((prompts, sampling, lora_request, files))
        return [SimpleNamespace(outputs=[self.answer(one)]) for one in sampling]

    @staticmethod
    def answer(sampling: Any) -> Any:
        tokens = [100 + sampling.seed % 50, 1] if sampling.seed % 2 else [99] * sampling.max_tokens
        reason = "stop" if sampling.seed % 2 else "length"
        logprobs = [{token: SimpleNamespace(logprob=-0.5 - place)} for place, token in enumerate(tokens)]
        return SimpleNamespace(token_ids=tuple(tokens), finish_reason=reason, logprobs=logprobs)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    FakeLLM.made = []
    module, requests = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    requests.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    for name, found in {"vllm": module, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": requests}.items():
        monkeypatch.setitem(sys.modules, name, found)
    return FakeLLM


def test_vllm_is_asked_for_each_answer_with_a_seed_of_its_prompts_generator(folder: Path, vllm: type[FakeLLM]):
    policy = make_policy(folder, lora={"rank": 12})
    found = answers_to(policy, (2, 1), engine="vllm", top_k=5, top_p=0.9, stop=("x",), min_new_tokens=2)
    (llm,) = vllm.made
    assert llm.arguments | {"gpu_memory_utilization": 0} == {
        "model": str(folder),
        "tokenizer": str(folder),
        "dtype": "float32",
        "logprobs_mode": "raw_logprobs",
        "gpu_memory_utilization": 0,
        "enable_lora": True,
        "max_lora_rank": 16,
    }
    prompts, sampling, adapter, files = llm.asked[0]
    assert prompts == [{"prompt_token_ids": policy.encode(PROMPTS)[number].tolist()} for number in (0, 0, 1)]
    seeds = [torch.randint(2**31 - 1, (count,), generator=seeded(number)).tolist() for number, count in enumerate((2, 1))]
    assert [one.seed for one in sampling] == [*seeds[0], *seeds[1]]
    assert vars(sampling[0]) == {
        "n": 1,
        "seed": seeds[0][0],
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "max_tokens": 12,
        "min_tokens": 2,
        "stop": ["x"],
        "stop_token_ids": [1],
        "include_stop_str_in_output": True,
        "logprobs": 0,
    }
    assert adapter[:2] == ("policy-1", 1) and {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    for place, one in enumerate(sampling):
        ended = bool(one.seed % 2)
        assert (found.length[place].item(), found.finished[place].item()) == ((2, True) if ended else (12, False))
        assert found.log_prob[place, :2].tolist() == [-0.5, -1.5] and found.mask[place].sum() == found.length[place]
    assert found.group.tolist() == [0, 0, 1] and policy.rows.forward == sum(map(len, found.prompt_tokens)) + int((found.length - 1).sum())


def test_vllm_gets_new_weights_when_there_are_any(folder: Path, vllm: type[FakeLLM]):
    policy = make_policy(folder)
    answers_to(policy, engine="vllm")
    answers_to(policy, engine="vllm", greedy=True)
    policy.trainable()[1].data += 1
    answers_to(policy, engine="vllm")
    (llm,) = vllm.made
    assert [adapter[1] for _, _, adapter, _ in llm.asked] == [1, 1, 2] and llm.resets == 2 and llm.rpc == []
    assert llm.asked[1][1][0].temperature == 0.0
    full = make_policy(folder, adapter="full")
    answers_to(full, engine="vllm")
    assert "enable_lora" not in vllm.made[1].arguments and vllm.made[1].asked[0][2] is None
    ((method, files),) = vllm.made[1].rpc
    assert method == "reload_weights" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)


def test_vllm_goes_on_from_a_prefix(folder: Path, vllm: type[FakeLLM]):
    policy = make_policy(folder)
    starts = [ids(60, 61), ids(70)]
    found = answers_to(policy, (2,), engine="vllm", prefix=starts)
    prompts, sampling, _, _ = vllm.made[0].asked[0]
    assert prompts[0]["prompt_token_ids"][-2:] == [60, 61] and [one.max_tokens for one in sampling] == [10, 11]
    assert found.tokens[0, :2].tolist() == [60, 61] and found.mask[0, :3].tolist() == [False, False, True] and found.log_prob[0, :3].tolist() == [0, 0, -0.5]
    known = answers_to(policy, (2,), engine="vllm", prefix=starts, prefix_log_prob=[row(-1, -2).float(), row(-3).float()])
    assert known.mask[0, 0] and known.log_prob[0, :3].tolist() == [-1, -2, -0.5]


def test_what_vllm_cannot_do_is_said(folder: Path, vllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(folder)
    answers_to(policy, (1,), engine="vllm", temperature=0.7)
    assert vllm.made[0].arguments["logprobs_mode"] == "processed_logprobs"
    with pytest.raises(UserError, match=r"^generation.temperature: with vllm it cannot change within a run$"):
        answers_to(policy, (1,), engine="vllm")
    with pytest.raises(UserError, match=r"^generation.temperature: vllm reports log-probabilities either before the temperature or after top_p"):
        answers_to(make_policy(folder), (1,), engine="vllm", temperature=0.7, top_p=0.9)
    with pytest.raises(UserError, match=r"^model.lora.rank: vllm takes ranks up to 512, not 600$"):
        answers_to(make_policy(folder, lora={"rank": 600}), (1,), engine="vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"^generation.engine: vllm is not installed; pip install 'flowrl-diffusion\[vllm\]', or use transformers$"):
        answers_to(make_policy(folder), (1,), engine="vllm")
