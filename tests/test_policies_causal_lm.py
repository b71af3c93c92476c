"""CausalLmPolicy is the model that transformers loads: the same greedy answers, the same log-probabilities, files that it and peft read; no token twice."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import BUILDERS, CONTEXT, CPU, PROMPTS, SPECIAL, TEXTS, answers_to, build_language_model, build_tokenizer, make_policy
from peft import PeftModel
from rows import ids, seeded
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl.core.token_weights import min_p_log_prob, position_divergence
from flowrl.policies import families
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.sections import GenerationConfig, ModelConfig
from flowrl.types import Completions, Prompt, UserError

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build_language_model(tmp_path_factory.mktemp("lm") / kind, kind) for kind in BUILDERS}


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def whole_logits(model: Any, completions: Completions, sample: int) -> Tensor:
    """Logits [length, V] of an answer's tokens by transformers alone, the text by itself."""
    prompt = completions.prompt_tokens[int(completions.group[sample])]
    text = torch.cat((prompt, completions.tokens[sample, : completions.length[sample]]))
    with torch.no_grad():
        return model(input_ids=text[None]).logits[0, len(prompt) - 1 : -1].float()


def everything(completions: Completions) -> Tensor:
    return torch.arange(len(completions))


# --- answers ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_greedy_answers_are_those_of_transformers_token_by_token(folders: dict[str, Path], kind: str):
    """Prompts of different lengths together, with and without an end token on the way, in batches of different sizes."""
    policy, theirs = make_policy(folders[kind]), plain(folders[kind])
    free = answers_to(policy, (1, 1, 1), greedy=True)
    assert free.length.tolist() == [12] * 3
    ends = frozenset({int(free.tokens[0, 3]), int(free.tokens[1, 7])})
    for end in (policy.ends, ends):
        policy.ends = end
        for rows in (64, 2):
            policy.rows_per_forward = rows
            found = answers_to(policy, (1, 1, 1), greedy=True)
            for prompt, tokens, length, finished in zip(found.prompt_tokens, found.tokens, found.length, found.finished, strict=True):
                seen = torch.ones_like(prompt)[None]
                out = theirs.generate(prompt[None], attention_mask=seen, do_sample=False, max_new_tokens=12, eos_token_id=sorted(end), pad_token_id=0)
                assert tokens[:length].tolist() == out[0, len(prompt) :].tolist()
                assert bool(finished) == (int(tokens[length - 1]) in end)
    assert found.finished.tolist()[:2] == [True, True]


@pytest.mark.parametrize("kind", BUILDERS)
def test_sampled_log_probabilities_are_those_that_training_sees(folders: dict[str, Path], kind: str):
    policy, theirs = make_policy(folders[kind], moved=True), None
    found = answers_to(policy, temperature=0.8, top_p=0.9)
    assert len({tuple(tokens) for tokens in found.tokens.tolist()}) == 6
    out = policy.token_output(found, everything(found), temperature=0.8)
    torch.testing.assert_close(out.log_prob, found.log_prob, **CLOSE)
    theirs = plain(folders[kind])  # and before it was moved, those of transformers
    policy = make_policy(folders[kind])
    found = answers_to(policy, temperature=0.8)
    for sample, length in enumerate(found.length.tolist()):
        log_p = (whole_logits(theirs, found, sample) / 0.8).log_softmax(-1)
        torch.testing.assert_close(found.log_prob[sample, :length], log_p.gather(-1, found.tokens[sample, :length, None])[:, 0], **CLOSE)


def test_answers_do_not_depend_on_the_batch(folder: Path):
    policy = make_policy(folder)
    together = answers_to(policy, (3, 4, 2), max_new_tokens=16)
    read, policy.rows_per_forward = policy.rows.forward, 2
    apart = answers_to(policy, (3, 4, 2), max_new_tokens=16)
    assert torch.equal(together.tokens, apart.tokens) and together.texts == apart.texts
    torch.testing.assert_close(together.log_prob, apart.log_prob, **CLOSE)
    tokens = policy.encode(PROMPTS[1:2])
    again = policy.rows.forward - read
    alone = policy.generate(tokens, [4], GenerationConfig(max_new_tokens=16), [seeded(1)])
    assert torch.equal(alone.tokens, together.tokens[3:7])
    assert again > read  # a prompt is read again for each part of its group


def test_tokens_are_counted_without_padding(folder: Path):
    policy = make_policy(folder)
    found = answers_to(policy, (2, 3, 1))
    sizes = [len(prompt) for prompt in found.prompt_tokens]
    assert policy.rows.forward == sum(sizes) + int((found.length - 1).sum())
    assert policy.rows.padding == 3 * max(sizes) - sum(sizes)
    policy.rows.forward = policy.rows.padding = 0
    which = ids(5, 0)
    policy.token_output(found, which)
    each = [sizes[2] + int(found.length[5]) - 1, sizes[0] + int(found.length[0]) - 1]
    assert (policy.rows.forward, policy.rows.backward, policy.rows.padding) == (sum(each), sum(each), 2 * max(each) - sum(each))


def test_a_dialogue_goes_on_from_any_context(folder: Path):
    policy = make_policy(folder)
    whole = answers_to(policy, (1, 1, 1), greedy=True, max_new_tokens=10)
    contexts = [torch.cat((prompt, tokens[:4])) for prompt, tokens in zip(whole.prompt_tokens, whole.tokens, strict=True)]
    rest = policy.generate(contexts, [1, 1, 1], GenerationConfig(max_new_tokens=6), [seeded()] * 3, greedy=True)
    assert torch.equal(rest.tokens, whole.tokens[:, 4:])
    begun = answers_to(policy, (1, 1, 1), greedy=True, max_new_tokens=10, prefix=list(whole.tokens[:, :4]))
    assert torch.equal(begun.tokens, whole.tokens) and begun.mask.sum().item() == 3 * 6


def test_different_prefixes_of_one_group_do_not_see_their_padding(folder: Path):
    policy = make_policy(folder)
    starts = [ids(60, 61, 62, 63), ids(70), ids(), ids(60, 61, 62, 63), ids(80, 81), ids()]
    found = answers_to(policy, (3, 2, 1), prefix=starts)
    out = policy.token_output(found, everything(found))
    torch.testing.assert_close(torch.where(found.mask, out.log_prob, 0.0), found.log_prob, **CLOSE)
    assert all(torch.equal(tokens[: len(start)], start) for tokens, start in zip(found.tokens, starts, strict=True))
    assert (out.log_prob[0, :4] < 0).all()  # tokens that someone else said have log-probabilities too


def test_memory_that_runs_out_halves_the_rows_and_counts_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    policy, usual = make_policy(folder), make_policy(folder, rows_per_forward=2)
    expected = answers_to(usual, (3, 2, 1))
    inner = policy.network.forward

    def small(batch: Tensor, *args: Any, **more: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(batch, *args, **more)

    monkeypatch.setattr(policy.network, "forward", small)
    found = answers_to(policy, (3, 2, 1))
    assert torch.equal(found.tokens, expected.tokens) and policy.rows.forward == usual.rows.forward
    assert policy.rows == usual.rows and policy.rows_per_forward == 2
    assert "training.rows_per_forward: 3 do not fit" in caplog.text
    with torch.no_grad():
        policy.rows_per_forward = 64
        out = policy.token_output(found, everything(found))
    torch.testing.assert_close(out.log_prob, found.log_prob, **CLOSE)


# --- log-probabilities --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_columns_are_those_of_the_whole_softmax(folders: dict[str, Path], kind: str):
    policy, theirs = make_policy(folders[kind]), plain(folders[kind])
    ends = answers_to(policy, (1,), greedy=True)
    policy.ends = frozenset({int(ends.tokens[0, 5])})
    found = answers_to(policy, (2, 3, 1), stop=("e", "a", "t"), temperature=1.3)
    names = ("entropy", "square_sum", "mean_log_prob", "min_p", "distribution", "hidden")
    which = ids(4, 1, 5, 1)
    out = policy.token_output(found, which, columns=names, temperature=1.3, kappa=0.3)
    assert set(out.columns) == set(names) and out.column("log_prob") is out.log_prob
    for place, sample in enumerate(which.tolist()):
        length = int(found.length[sample])
        log_p = (whole_logits(theirs, found, sample) / 1.3).log_softmax(-1)
        tokens = found.tokens[sample, :length]
        expected = {
            "log_prob": log_p.gather(-1, tokens[:, None])[:, 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "square_sum": log_p.exp().square().sum(-1),
            "mean_log_prob": log_p.mean(-1),
            "min_p": min_p_log_prob(log_p, tokens, kappa=0.3),
            "distribution": log_p,
        }
        for name, value in expected.items():
            torch.testing.assert_close(out.column(name)[place, :length], value, **CLOSE)
        for name in (*names, "log_prob"):
            assert out.column(name).shape[:2] == (4, found.tokens.shape[1]) and out.column(name).dtype == torch.float32
            assert not out.column(name)[place, length:].any()
        logits = theirs.get_output_embeddings()(out.column("hidden")[place, :length]) / 1.3
        torch.testing.assert_close(logits.log_softmax(-1), log_p, **CLOSE)
    weights = position_divergence(out.column("distribution"), found.mask[which], ids(0, 0, 1, 0), 2)
    assert weights.isfinite().all()


def test_without_gradient_the_parts_are_joined_in_order(folder: Path):
    policy = make_policy(folder)
    found = answers_to(policy, (2, 3, 1))
    which = ids(5, 2, 0, 4, 1)
    whole = policy.token_output(found, which, columns=["entropy", "hidden"])
    policy.rows_per_forward = 2
    with torch.no_grad():
        parts = policy.token_output(found, which, columns=["entropy", "hidden"])
    assert not parts.log_prob.requires_grad and whole.log_prob.requires_grad
    for name in ("log_prob", "entropy", "hidden"):
        torch.testing.assert_close(parts.column(name), whole.column(name).detach(), **CLOSE)


def gradients(policy: CausalLmPolicy, found: Completions) -> list[Tensor]:
    out = policy.token_output(found, everything(found), columns=["entropy"], temperature=0.9)
    (out.log_prob * torch.randn(out.log_prob.shape, generator=seeded(3)) + 0.1 * out.column("entropy")).sum().backward()
    return [torch.zeros(0) if p.grad is None else p.grad for p in policy.trainable()]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradients_are_those_of_plain_transformers(folder: Path, adapter: str):
    policy = make_policy(folder, adapter=adapter, moved=adapter == "lora")
    found = answers_to(policy, (2, 1, 1))
    ours = gradients(policy, found)
    for p in policy.trainable():
        p.grad = None
    loss, weights = torch.zeros(()), torch.randn(found.tokens.shape, generator=seeded(3))
    for sample, length in enumerate(found.length.tolist()):
        prompt = found.prompt_tokens[int(found.group[sample])]
        text = torch.cat((prompt, found.tokens[sample, :length]))
        log_p = (policy.network.model(input_ids=text[None]).logits[0, len(prompt) - 1 : -1] / 0.9).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        loss = loss + (log_p.gather(-1, text[len(prompt) :, None])[:, 0] * weights[sample, :length]).sum() + 0.1 * entropy
    loss.backward()
    for mine, p in zip(ours, policy.trainable(), strict=True):
        assert p.grad is not None and p.grad.abs().max() > 0
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", BUILDERS)
def test_checkpointing_and_eager_attention_do_not_change_gradients(folders: dict[str, Path], kind: str):
    usual = make_policy(folders[kind], moved=True)
    found = answers_to(usual, (2, 1, 1))
    expected = gradients(usual, found)
    saving = make_policy(folders[kind], moved=True, gradient_checkpointing=True)
    calls: list[bool] = []
    inner = next(iter(saving.network._checkpointed[0].children()))
    inner.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert torch.equal(answers_to(saving, (2, 1, 1)).tokens, found.tokens)  # sampling still has its cache
    calls.clear()
    for mine, other in zip(gradients(saving, found), expected, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    assert calls == [True, True]  # the second time in the backward pass
    eager = make_policy(folders[kind], moved=True, attention_backend="eager")
    assert eager.network.model.config._attn_implementation == "eager"
    for mine, other in zip(gradients(eager, found), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_dropout_never_runs(folders: dict[str, Path]):
    policy = make_policy(folders["gpt2"], gradient_checkpointing=True)
    assert policy.network.model.config.resid_pdrop > 0
    found = answers_to(policy, (1, 1, 1))
    first, second = (policy.token_output(found, everything(found)).log_prob for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.detach(), found.log_prob, **CLOSE)


def test_bfloat16_keeps_adapters_and_statistics_in_float32(folder: Path):
    policy = make_policy(folder, dtype="bfloat16", moved=True)
    assert {p.dtype for p in policy.trainable()} == {torch.float32} and policy.network.model.dtype == torch.bfloat16
    found = answers_to(policy)
    out = policy.token_output(found, everything(found), columns=["entropy", "hidden"])
    assert {out.log_prob.dtype, *(value.dtype for value in out.columns.values()), found.log_prob.dtype} == {torch.float32}
    torch.testing.assert_close(out.log_prob, found.log_prob, rtol=0.1, atol=0.5)
    full = make_policy(folder, dtype="bfloat16", adapter="full")
    assert {p.dtype for p in full.trainable()} == {torch.float32}
    assert full.token_output(found, everything(found)).log_prob.requires_grad


# --- adapters and references --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_adapters_are_on_all_linear_layers_but_the_head(folders: dict[str, Path], kind: str):
    policy = make_policy(folders[kind])
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name, p in policy.network.named_parameters() if p.requires_grad}
    assert names == ({"c_attn", "c_proj", "c_fc"} if kind == "gpt2" else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    if kind == "llama":
        assert len(make_policy(folders[kind], lora={"rank": 2, "targets": ["lm_head"]}).trainable()) == 2


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_reference_is_the_model_before_training(folder: Path, adapter: str):
    before = make_policy(folder, adapter=adapter)
    found = answers_to(before, (1, 1, 1))
    expected = before.token_output(found, everything(found)).log_prob.detach()
    policy = make_policy(folder, adapter=adapter, moved=True, keep_reference=True)
    with policy.reference():
        out = policy.token_output(found, everything(found))
        assert not out.log_prob.requires_grad
    torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=0)
    assert (policy.token_output(found, everything(found)).log_prob - expected).abs().max() > 1e-2
    if adapter == "full":
        with pytest.raises(RuntimeError, match="^full fine-tuning keeps a reference only when"), make_policy(folder, adapter="full").reference():
            pass


# --- prompts ------------------------------------------------------------------------------------------------------------------------------------


def test_prompts_are_rendered_by_the_chat_template_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(folder)
    words = policy.tokenizer
    (found,) = policy.encode([Prompt("hi")])
    assert words.decode(found) == "<|user|>hi<|end|><|assistant|>" and found[0].item() == SPECIAL.index("<|user|>")
    dialogue = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (long,) = policy.encode([Prompt("ignored", {"messages": dialogue})])
    assert words.decode(long) == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    with monkeypatch.context() as patched:
        patched.setattr(type(words), "__call__", None)
        assert policy.encode([Prompt("hi"), Prompt("other", {"messages": dialogue})])[1] is long
    bare = make_policy(build_language_model(tmp_path / "bare", template=False))
    assert bare.tokenizer.decode(bare.encode([Prompt("2 + 3")])[0]) == "2 + 3"
    end = SPECIAL.index("<|end|>")
    bare.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", end)])
    assert bare.tokenizer("7")["input_ids"][-1] == end  # some tokenizers end every text
    assert bare.tokenizer.decode(bare.encode([Prompt("3 + 4")])[0]) == "3 + 4"


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["fine", " \n"], {}, "prompt 2 is empty"),
        (
            ["fine", "x" * 50],
            {"max_new_tokens": 20},
            rf"prompt 2 \('x+'\) has 53 tokens, and the model's context is {CONTEXT} less generation.max_new_tokens, 20",
        ),
        (["x" * 90], None, rf"prompt 1 \('x{{57}}...'\) has 93 tokens, and the model's context is {CONTEXT}; shorten one of them"),
        (["x" * 9], {"max_prompt_tokens": 8}, r"prompt 1 \('x+'\) has 12 tokens, more than generation.max_prompt_tokens, 8"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(folder: Path, prompts: list[str], settings: dict[str, int] | None, message: str):
    with pytest.raises(UserError, match=f"^{message}"):
        make_policy(folder).encode([Prompt(text) for text in prompts], None if settings is None else GenerationConfig(**{"max_new_tokens": 8, **settings}))


def test_messages_that_are_none_are_an_error(folder: Path, tmp_path: Path):
    for wrong in ("hi", [], [{"role": "user"}], {"role": "user", "content": "hi"}):
        with pytest.raises(UserError, match=r"^the messages of prompt 'hi' are not a list of mappings with role and content$"):
            make_policy(folder).encode([Prompt("hi", {"messages": wrong})])
    bare = make_policy(build_language_model(tmp_path / "bare", template=False))
    with pytest.raises(UserError, match=r"^prompt 'hi' has messages, and the tokenizer of .*bare has no chat template$"):
        bare.encode([Prompt("hi", {"messages": [{"role": "user", "content": "hi"}]})])
    policy = make_policy(folder)
    policy.tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(UserError, match=r"^the chat template refuses the messages of a prompt: only two turns$"):
        policy.encode([Prompt("hi")])


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    bare, usual = (make_policy(build_language_model(tmp_path / str(pad), pad=pad)) for pad in (False, True))
    end = SPECIAL.index("<|end|>")
    assert (bare.pad, bare.ends) == (end, frozenset({end})) and caplog.text.count("no padding token") == 1
    ours, theirs = answers_to(bare), answers_to(usual)
    assert ours.texts == theirs.texts and torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0, atol=0)
    torch.testing.assert_close(bare.token_output(ours, everything(ours)).log_prob, usual.token_output(theirs, everything(theirs)).log_prob, rtol=0, atol=0)


def test_without_an_end_token_something_else_must_end_an_answer(tmp_path: Path):
    policy = make_policy(build_language_model(tmp_path / "endless", end=False))
    assert policy.ends == frozenset()
    with pytest.raises(UserError, match=r"^generation.stop: the tokenizer of .*endless has no end token, so that nothing would end an answer; give a text$"):
        answers_to(policy)
    assert len(answers_to(policy, stop=("\n",))) == 6


def test_all_end_tokens_of_the_model_count(tmp_path: Path):
    assert make_policy(build_language_model(tmp_path / "two", ends=[7, 9])).ends == frozenset({1, 7, 9})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": CONTEXT}, f"generation.max_new_tokens: {CONTEXT} leave no room for a prompt in the model's context of {CONTEXT} tokens"),
        ({"max_new_tokens": 60}, f"a text of 17 tokens and generation.max_new_tokens, 60, are more than the model's context, {CONTEXT}"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_an_error(folder: Path, settings: dict[str, int], message: str):
    policy = make_policy(folder)
    with pytest.raises(UserError, match=f"^{message}$"):
        policy.generate(policy.encode(PROMPTS[:1]), [1], GenerationConfig(**settings), [seeded()])


# --- loading ------------------------------------------------------------------------------------------------------------------------------------


def test_language_models_are_found_by_their_config(folder: Path, pipeline: Path):
    assert families.family_of(ModelConfig(path=str(folder))) is CausalLmPolicy
    assert families.family_of(ModelConfig(path=str(folder), family="causal_lm")) is CausalLmPolicy
    assert families.family_of(ModelConfig(path=str(pipeline))).__name__ == "Sd3Policy"
    policy = families.make_policy(ModelConfig(path=str(folder), lora={"rank": 2}), CPU, rows_per_forward=3)
    assert isinstance(policy, CausalLmPolicy) and policy.rows_per_forward == 3 and policy.medium == "text"


def test_the_embedded_model_answers():
    assert families.family_of(ModelConfig(path="flowrl:tiny-lm")) is CausalLmPolicy
    policy = make_policy("flowrl:tiny-lm")
    found = answers_to(policy, (2, 1))
    words = AutoTokenizer.from_pretrained(policy.where)
    assert found.prompt_tokens[0].tolist() == words(TEXTS[0])["input_ids"] and found.prompt_tokens[0][-1] not in policy.ends
    torch.testing.assert_close(policy.token_output(found, everything(found)).log_prob, found.log_prob, **CLOSE)


def test_models_that_cannot_be_loaded_are_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = {
        "./nowhere": "model.path: ./nowhere does not exist; give a folder, a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, package:NAME, or ",
        "flowrl:nothing": "model.path: flowrl:nothing is not an embedded language model; known: ",
        str(tmp_path): f"model.path: {tmp_path} is not a language model (no config.json); give the folder that save_pretrained wrote",
    }
    for path, message in cases.items():
        with pytest.raises(UserError) as error:
            make_policy(path)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^model.path: someone/some-lm could not be loaded as a language model: .*") as error:
        make_policy("someone/some-lm")
    assert "\n" not in str(error.value)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(b"{" if file.name == "model.safetensors" else file.read_bytes())
    with pytest.raises(UserError, match=r"^model.path: .*broken could not be loaded as a language model: "):
        make_policy(broken)


def test_gguf_weights_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert families.family_of(ModelConfig(path=str(tmp_path))) is CausalLmPolicy
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^model.path: .* holds GGUF weights, which need the package gguf: pip install gguf$"):
        make_policy(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"^model.path: .* holds several GGUF files \(a.gguf, b.gguf\); leave one in it$"):
        make_policy(tmp_path)


@pytest.mark.parametrize("setting", [{"height": 64}, {"guidance": 3.5}, {"text_encoders": "free"}, {"vae_tiling": True}, {"prompt_storage": "disk"}])
def test_what_only_image_generators_have_is_refused(folder: Path, setting: dict[str, Any]):
    (name,) = setting
    with pytest.raises(UserError, match=rf"^model.{name}: only image generators have it, and .* is a language model; leave it out$"):
        make_policy(folder, **setting)


def test_settings_of_the_network_that_do_not_work_are_named(folder: Path):
    with pytest.raises(UserError, match=r"^model.attention_backend: flash_attention_9 cannot be used: "):
        make_policy(folder, attention_backend="flash_attention_9")
    with pytest.raises(UserError, match=r"^model.lora.targets: to_q match no module of the network"):
        make_policy(folder, lora={"targets": ["to_q"]})


def test_logits_that_are_made_in_an_unknown_way_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = plain(folder)
    kind, inner = type(model), type(model).forward

    def shifted(self: Any, *args: Any, **more: Any) -> Any:
        out = inner(self, *args, **more)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(kind, "forward", shifted)
    with pytest.raises(UserError, match=r"^model.path: LlamaForCausalLM makes its logits in a way that flowrl does not know"):
        make_policy(folder)


@pytest.mark.parametrize(
    ("name", "value", "change"), [("logits_scaling", 4.0, lambda x: x / 4), ("final_logit_softcapping", 2.0, lambda x: 2 * torch.tanh(x / 2))]
)
def test_logits_that_the_config_scales_or_caps_are_followed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, change: Any):
    kind = type(plain(folder))
    inner = kind.forward

    def changed(self: Any, *args: Any, **more: Any) -> Any:
        setattr(self.config, name, value)
        out = inner(self, *args, **more)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(kind, "forward", changed)
    loaded = AutoModelForCausalLM.from_pretrained

    def with_setting(*args: Any, **more: Any) -> Any:
        model = loaded(*args, **more)
        setattr(model.config, name, value)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", with_setting)
    policy = make_policy(folder)
    found = answers_to(policy, (1, 1, 1))
    for sample in range(3):
        log_p = whole_logits(policy.network.model, found, sample).log_softmax(-1)
        torch.testing.assert_close(found.log_prob[sample], log_p.gather(-1, found.tokens[sample, :, None])[:, 0], **CLOSE)


# --- files --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_lora_is_loaded_by_peft(folders: dict[str, Path], kind: str, tmp_path: Path):
    policy = make_policy(folders[kind], moved=True)
    found = answers_to(policy, (1, 1, 1))
    policy.export(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in tmp_path.iterdir()}
    theirs = PeftModel.from_pretrained(plain(folders[kind]), tmp_path)
    assert_same_model(theirs, found)
    fresh = make_policy(folders[kind])
    fresh.load_export(tmp_path)
    for p, q in zip(policy.trainable(), fresh.trainable(), strict=True):
        assert torch.equal(p, q)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"], facts["base_model_name_or_path"]) == (4, 6.0, str(folders[kind]))
    again = tmp_path / "again"
    policy.export(again)
    assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json"))


def assert_same_model(theirs: Any, found: Completions) -> None:
    for sample, length in enumerate(found.length.tolist()):
        log_p = whole_logits(theirs, found, sample).log_softmax(-1)
        torch.testing.assert_close(log_p.gather(-1, found.tokens[sample, :length, None])[:, 0], found.log_prob[sample, :length], **CLOSE)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(("adapter", "form"), [("full", None), ("lora", "network")])
def test_a_whole_network_is_loaded_by_transformers_with_its_tokenizer(folders: dict[str, Path], kind: str, adapter: str, form: Any, tmp_path: Path):
    policy = make_policy(folders[kind], moved=True, adapter=adapter)
    found = answers_to(policy, (1, 1, 1))
    policy.export(tmp_path, form)
    assert_same_model(plain(tmp_path), found)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.chat_template == policy.tokenizer.chat_template and words.pad_token_id == policy.pad
    assert not any("lora" in file.name or "adapter" in file.name for file in tmp_path.iterdir())
    if adapter == "full":
        fresh = make_policy(folders[kind], adapter="full")
        fresh.load_export(tmp_path)
        assert all(torch.equal(p, q) for p, q in zip(policy.trainable(), fresh.trainable(), strict=True))


def test_an_export_in_another_precision_or_of_another_kind(folder: Path, tmp_path: Path):
    policy = make_policy(folder, moved=True)
    policy.export(tmp_path / "half", dtype=torch.bfloat16)
    fresh = make_policy(folder)
    fresh.load_export(tmp_path / "half")
    torch.testing.assert_close(fresh.trainable()[0], policy.trainable()[0], rtol=1e-2, atol=1e-3)
    with pytest.raises(UserError, match=r"holds no exported language model \(config.json\)$"):
        make_policy(folder, adapter="full").load_export(tmp_path / "half")
    with pytest.raises(UserError, match=r"holds no LoRA weights \(adapter_model.safetensors\)$"):
        make_policy(folder).load_export(tmp_path)
    with pytest.raises(UserError, match=r"does not fit this model: unexpected "):
        make_policy(folder, lora={"rank": 4, "targets": ["q_proj"]}).load_export(tmp_path / "half")


def test_the_builders_vocabulary_has_every_byte():
    words = build_tokenizer()
    assert all(words.decode(words(text)["input_ids"]) == text for text in (*TEXTS, "äöü €\n"))
