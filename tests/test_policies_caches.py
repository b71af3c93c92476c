"""Models whose layers see a window, keep a state or know another cache: sampled with a cache they say what training sees, or they are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import PROMPTS, answers_to, build_tokenizer, make_policy
from rows import ids, seeded
from text_runs import text_config
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5ForConditionalGeneration
from transformers.cache_utils import DynamicSlidingWindowLayer

from flowrl.policies import causal_lm
from flowrl.policies.caches import GrowingCache, WindowLayer
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.sections import GenerationConfig
from flowrl.trainer import Trainer
from flowrl.types import Completions, Prompt, UserError

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128, **_HEADS}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
_TWO = ["sliding_attention", "full_attention"]
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": _SIZES | {"sliding_window": 4},
    "gemma2": _SIZES | {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _SIZES | {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _TWO},
    "gpt_oss": _SIZES | {"sliding_window": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": _TWO},
    "gpt_neo": _NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},  # ALiBi counts places
}
OTHERS: dict[str, dict[str, Any]] = {
    "lfm2": _SIZES | {"layer_types": ["conv", "full_attention"]},
    "jamba": _SIZES | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 128},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 128},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of a kind, made once."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            words = build_tokenizer()
            special = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            config = CONFIG_MAPPING[kind](**special, **(WINDOWS | OTHERS)[kind])
            torch.manual_seed(0)
            model = T5ForConditionalGeneration(config) if kind == "t5" else AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim > 1 and "A_log" not in name and "conv" not in name:
                        p.normal_(0, 0.3)
            for settings in (model.config, model.generation_config):
                settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = 0, 1, None
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            words.save_pretrained(made[kind])
        return made[kind]

    return build


def assert_trains_on_what_it_sampled(policy: CausalLmPolicy, found: Completions) -> None:
    """The ratio of the first update is 1, on each token that was sampled."""
    out = policy.token_output(found, torch.arange(len(found)))
    torch.testing.assert_close(torch.where(found.mask, out.log_prob, 0.0), torch.where(found.mask, found.log_prob, 0.0), **CLOSE)


# --- windows ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_counted_in_tokens_whatever_pads_them(build: Callable[[str], Path], kind: str):
    policy = make_policy(build(kind), adapter="full")
    assert_trains_on_what_it_sampled(policy, answers_to(policy))
    starts = [ids(60, 61, 62, 63, 64, 65, 66), ids(70), ids(), ids(60, 61, 62, 63), ids(80, 81), ids()]
    found = answers_to(policy, (3, 2, 1), prefix=starts, max_new_tokens=16)
    assert found.length.max() > 8
    assert_trains_on_what_it_sampled(policy, found)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_places_that_no_token_will_see_again_are_left_behind(build: Callable[[str], Path], kind: str):
    """Far beyond the room of a window, with rows that leave on the way: the answers are those of transformers, and memory stays."""
    policy, theirs = make_policy(build(kind), adapter="full"), AutoModelForCausalLM.from_pretrained(build(kind), dtype=torch.float32).eval()
    policy.ends = frozenset()
    settings = GenerationConfig(max_new_tokens=70, stop=("never said",))
    found = policy.generate(policy.encode(PROMPTS[:2]), [1, 1], settings, [seeded(), seeded()], greedy=True)
    for prompt, tokens in zip(found.prompt_tokens, found.tokens, strict=True):
        out = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, max_new_tokens=70, eos_token_id=None, pad_token_id=0)
        assert tokens.tolist() == out[0, len(prompt) :].tolist()
    assert_trains_on_what_it_sampled(policy, found)


def test_a_window_has_what_that_of_transformers_has_within_it():
    ours, theirs, g = WindowLayer(4), DynamicSlidingWindowLayer(sliding_window=4), seeded(3)
    rows, held = 3, []
    for step in range(120):
        if step in (10, 60):
            which = ids(2, 0, 0) if step == 10 else ids(1)
            rows = len(which)
            ours.batch_select_indices(which)
            theirs.batch_select_indices(which)
        new = 6 if step == 0 else 1
        length, first = ours.get_mask_sizes(new)
        keys, values = (torch.randn(rows, 2, new, width, generator=g) for width in (4, 3))
        found, expected = ours.update(keys, values), theirs.update(keys, values)
        assert (found[0].shape[-2], first + length) == (length, 6 + step) and ours.get_seq_length() == theirs.get_seq_length() == 6 + step
        seen = min(4, length)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine[..., -seen:, :], other[..., -seen:, :])
        held.append(length)
    assert max(held) <= 3 + 1 + 32 < 120 and min(held[1:]) >= 4


def test_rows_move_to_the_right_and_what_leaves_comes_back():
    layer = WindowLayer(8)
    layer.update(torch.arange(10.0).view(2, 1, 5, 1), torch.arange(10.0).view(2, 1, 5, 1))
    layer.move_right(ids(0, 2))
    assert layer.keys[:, 0, :, 0].tolist() == [[0, 1, 2, 3, 4], [8, 9, 5, 6, 7]] and torch.equal(layer.values, layer.keys)


# --- states, and other caches ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lfm2", "jamba"])
def test_a_model_that_keeps_a_state_follows_its_prompts_and_nothing_else(build: Callable[[str], Path], kind: str, tmp_path: Path):
    policy = make_policy(build(kind), adapter="full")
    assert_trains_on_what_it_sampled(policy, answers_to(policy))
    assert_trains_on_what_it_sampled(policy, answers_to(policy, (2, 1), prefix=[ids(), ids(), ids()]))
    name = type(policy.network.model).__name__
    line = rf"answers would begin with tokens that are given, and {name} keeps a state of what it has read, which their padding would change; leave it out, or"
    with pytest.raises(UserError, match=rf"^prefix: {line} use a decoder whose layers attend$"):
        answers_to(policy, (2, 1), prefix=[ids(), ids(60), ids()])
    with pytest.raises(TypeError, match=r"^the rows of a \w+ cannot be moved$"):
        GrowingCache(policy.network.model.config).move_right(ids(1))


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("tree", ["tree={segment: 2}"]),
        ("token_credit: segments", ["method=spo", "kl.weight=0"]),
        ("partial", ["method=t_ppo"]),
        ("allocation.samples: exits", ["method=s_grpo", "generation.max_new_tokens=40"]),
    ],
)
def test_a_run_whose_answers_begin_with_given_tokens_does_not_start_with_a_state(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, more: list[str]
):
    monkeypatch.syspath_prepend(tmp_path)
    config = text_config(tmp_path, *more, f"model.path={build('lfm2')}")
    with pytest.raises(UserError, match=rf"^{where}: answers would begin with tokens that are given, and Lfm2ForCausalLM keeps a state"):
        Trainer(config)


@pytest.mark.parametrize(("kind", "name"), [("mamba", "MambaForCausalLM"), ("rwkv", "RwkvForCausalLM"), ("bart", "BartForCausalLM")])
def test_a_model_that_says_something_else_with_a_cache_is_refused_by_name(build: Callable[[str], Path], kind: str, name: str):
    policy = make_policy(build(kind), adapter="full")
    message = (
        rf"^model.path: {name} does not say with a cache of its tokens what it says of whole texts \(.+\), so that it cannot be sampled here; use a decoder"
    )
    with pytest.raises(UserError, match=message):
        policy.check_generation(GenerationConfig(max_new_tokens=4))
    policy.check_generation(GenerationConfig(max_new_tokens=4, engine="vllm"))  # which has a cache of its own


def test_memory_that_runs_out_is_no_property_of_the_model(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("flowrl.policies.decoding_check.Batch.begin", full)
    with pytest.raises(torch.OutOfMemoryError):
        make_policy(build("lfm2"))


def test_an_encoder_with_a_decoder_is_no_causal_language_model(build: Callable[[str], Path]):
    with pytest.raises(UserError, match=r"^model.path: .* could not be loaded as a language model: Unrecognized configuration class .*T5Config"):
        make_policy(build("t5"))


def test_a_layer_that_drops_out_itself_does_not(build: Callable[[str], Path]):
    """OPT's layers call dropout with a share of their own, and are put into training mode for checkpointing."""
    policy = make_policy(build("opt"), adapter="full", gradient_checkpointing=True)
    found = answers_to(policy)
    first, second = (policy.token_output(found, torch.arange(6)).log_prob for _ in range(2))
    assert first.requires_grad and torch.equal(first, second)
    assert_trains_on_what_it_sampled(policy, found)
    assert policy.network.model.config.dropout == 0.5  # and the config that is exported is the model's


# --- tokens of prompts --------------------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_prompt_are_kept_until_others_have_come(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(causal_lm, "_PROMPTS", 2)
    policy, asked = make_policy(build("mistral")), list[str]()
    inner = causal_lm.rendered

    def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
        asked.append(messages[0]["content"])
        return inner(tokenizer, messages)

    monkeypatch.setattr(causal_lm, "rendered", rendered)

    def tokens(text: str) -> Tensor:
        return policy.encode([Prompt(text)])[0]

    first = tokens("a")
    assert tokens("b") is not first and tokens("a") is first and asked == ["a", "b"]
    tokens("c")  # b was asked for longest ago
    assert tokens("a") is first and asked == ["a", "b", "c"]
    tokens("b")
    assert asked == ["a", "b", "c", "b"]
