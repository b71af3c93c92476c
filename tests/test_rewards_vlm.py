"""rewards/vision_language.py, vqa_score.py and deqa.py on tiny models of real classes: probabilities by a slow loop, padding, forms, and bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import CPU, assert_reward_contract, batch_of, part_of, pictures
from tiny_vlm import qwen_processor, save_llava, save_qwen, tokenizer
from torch import Tensor

from flowrl.types import Prompt, UserError
from rewards.deqa import Deqa
from rewards.pictures import to_pil
from rewards.vision_language import DEFAULT_MODEL, first_tokens, known_weights
from rewards.vqa_score import VqaScore

FP32 = {"rtol": 1e-4, "atol": 1e-6}
BATCH = batch_of(pictures(5, 40, 60), ["red cats", "a photo of two blue dogs on a table", "x", "", 'a sign that says "no"'])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_qwen(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("llava")))


def loaded(reward: Any, dtype: torch.dtype = torch.float32) -> Any:
    reward.load(CPU, dtype)
    return reward


def slow_probabilities(folder: str, images: Tensor, turns: list[str], words: list[str]) -> Tensor:
    """[B, words] float64: one sample at a time, no padding, all positions, softmax in float64; each word with and without a space."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for picture, turn in zip(to_pil(images), turns, strict=True):
        with torch.no_grad():
            logits = model(**processor(text=[turn], images=[picture], return_tensors="pt")).logits[0, -1].double()
        p = torch.exp(logits) / torch.exp(logits).sum()
        single = [[processor.tokenizer.convert_tokens_to_ids(prefix + word) for prefix in ("", "Ġ")] for word in words]
        rows.append([sum(float(p[token]) for token in tokens) for tokens in single])
    return torch.tensor(rows, dtype=torch.float64)


def turn(text: str, picture: str = "<|vision_start|><|image_pad|><|vision_end|>") -> str:
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("form", ["probability", "yes_no", "logit"])
def test_vqascore_keeps_the_contract(qwen: str, form: Any) -> None:
    assert_reward_contract(lambda: VqaScore(qwen, form=form), BATCH)


def test_deqa_keeps_the_contract(qwen: str) -> None:
    assert_reward_contract(lambda: Deqa(qwen), BATCH)


@pytest.mark.parametrize("reward", [VqaScore, Deqa])
def test_another_class_of_model_keeps_the_contract_too(llava: str, reward: type) -> None:
    assert_reward_contract(lambda: reward(llava), BATCH)


def test_the_forms_of_vqascore_are_those_of_a_slow_loop(qwen: str) -> None:
    turns = [turn(f'Does this figure show "{prompt.text}"? Please answer yes or no.') for prompt in BATCH.prompts]
    p = slow_probabilities(qwen, BATCH.images, turns, ["Yes", "yes", "No", "no"])
    yes, no = p[:, 0] + p[:, 1], p[:, 2] + p[:, 3]
    scores = loaded(VqaScore(qwen)).score(BATCH)
    torch.testing.assert_close(scores.values.double(), yes, **FP32)
    torch.testing.assert_close(scores.raw["vqascore_yes"].double(), yes, **FP32)
    torch.testing.assert_close(scores.raw["vqascore_no"].double(), no, **FP32)
    torch.testing.assert_close(loaded(VqaScore(qwen, form="yes_no")).score(BATCH).values.double(), yes / (yes + no), **FP32)
    torch.testing.assert_close(loaded(VqaScore(qwen, form="logit")).score(BATCH).values.double(), yes.log() - no.log(), rtol=1e-4, atol=1e-5)
    assert yes.std() / yes.mean() > 0.1


def test_deqa_is_the_expected_level_of_a_slow_loop(qwen: str) -> None:
    turns = [turn("How would you rate the quality of this image?") + "The quality of the image is"] * len(BATCH)
    p = slow_probabilities(qwen, BATCH.images, turns, ["excellent", "good", "fair", "poor", "bad"])
    expected = (p * torch.tensor([5.0, 4, 3, 2, 1])).sum(1) / p.sum(1)
    scores = loaded(Deqa(qwen)).score(BATCH)
    torch.testing.assert_close(scores.raw["deqa_score"].double(), expected, **FP32)
    torch.testing.assert_close(scores.values.double(), expected / 5, **FP32)
    torch.testing.assert_close(scores.raw["deqa_named"].double(), p.sum(1), **FP32)
    assert expected.std() > 0.01


def test_a_slow_loop_agrees_for_another_class_of_model(llava: str) -> None:
    turns = [turn(f'Does this figure show "{prompt.text}"? Please answer yes or no.', "<image>") for prompt in BATCH.prompts]
    p = slow_probabilities(llava, BATCH.images, turns, ["Yes", "yes"])
    torch.testing.assert_close(loaded(VqaScore(llava)).score(BATCH).values.double(), p.sum(1), **FP32)


def test_levels_by_hand() -> None:
    log_p = torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.3], [0.1, 0.1, 0.1, 0.1, 0.1], [0.3, 0.1, 0.0, 0.0, 0.0]]).log()
    values, raw = Deqa().verdict(log_p)
    torch.testing.assert_close(raw["deqa_score"], torch.tensor([5.0, 1.0, 3.0, 4.75]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.2, 0.6, 0.95]))
    torch.testing.assert_close(raw["deqa_named"], torch.tensor([0.1, 0.3, 0.5, 0.4]))


@pytest.mark.parametrize(("form", "expected"), [("probability", [0.6, 0.1]), ("yes_no", [0.75, 0.2]), ("logit", [1.0986123, -1.3862944])])
def test_forms_by_hand(form: Any, expected: list[float]) -> None:
    values, raw = VqaScore(form=form).verdict(torch.tensor([[0.6, 0.2], [0.1, 0.4]]).log())
    torch.testing.assert_close(values, torch.tensor(expected))
    torch.testing.assert_close(raw["vqascore_no"], torch.tensor([0.2, 0.4]))


def test_a_longer_neighbour_pads_a_sample_on_the_left_and_moves_nothing(qwen: str) -> None:
    reward = loaded(VqaScore(qwen, form="logit"))
    alone = reward.score(part_of(BATCH, [2]))
    beside = reward.score(batch_of(BATCH.images[[2, 0]], ["x", "a very long prompt " * 20]))
    torch.testing.assert_close(beside.values[:1], alone.values, rtol=0, atol=1e-5)
    reward.processor.tokenizer.padding_side = "right"  # the last token would be padding
    assert (reward.score(batch_of(BATCH.images[[2, 0]], ["x", "a very long prompt " * 20])).values[0] - alone.values[0]).abs() > 1e-3


def test_nothing_is_generated(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = loaded(VqaScore(qwen))
    calls = []
    forward = reward.network.forward
    monkeypatch.setattr(reward.network, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    monkeypatch.setattr(reward.network, "generate", None)
    reward.score(BATCH)
    assert len(calls) == 1
    assert calls[0]["logits_to_keep"] == 1


def test_the_prompt_moves_vqascore_and_the_picture_both_and_deqa_does_not_read_the_prompt(qwen: str) -> None:
    images = BATCH.images[[0, 0, 1]]
    values = loaded(VqaScore(qwen)).score(batch_of(images, ["red cats", "blue dogs", "red cats"])).values
    assert values.unique().numel() == 3
    quality = loaded(Deqa(qwen)).score(batch_of(images, ["red cats", "<|im_end|> is no trouble where prompts are not read", "red cats"])).values
    torch.testing.assert_close(quality[0], quality[1], rtol=0, atol=1e-6)
    assert (quality[0] - quality[2]).abs() > 1e-4


def test_the_question_and_the_levels_can_be_others(qwen: str) -> None:
    asked = VqaScore(qwen, question="Is {prompt} here?")
    assert asked.question(Prompt("a {prompt} cat")) == "Is a {prompt} cat here?"
    changed = loaded(Deqa(qwen, question="How sharp is it?", answer="It is", levels=["good", "fair", "poor", "bad", "no"]))
    turns = [turn("How sharp is it?") + "It is"] * len(BATCH)
    p = slow_probabilities(qwen, BATCH.images, turns, ["good", "fair", "poor", "bad", "no"])
    torch.testing.assert_close(changed.score(BATCH).values.double(), (p * torch.tensor([1, 0.8, 0.6, 0.4, 0.2])).sum(1) / p.sum(1), **FP32)


def test_bfloat16_is_close(qwen: str) -> None:
    batch = batch_of(pictures(8, 40))
    expected, got = (loaded(VqaScore(qwen, form="logit"), dtype).score(batch).values for dtype in (torch.float32, torch.bfloat16))
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.25)


def test_it_moves_as_a_whole(qwen: str) -> None:
    reward = loaded(Deqa(qwen))
    reward.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in reward.network.state_dict().values())


def test_first_tokens_are_those_of_the_words_with_and_without_a_space_but_never_a_lone_space() -> None:
    tokens = tokenizer(("Yes", "yes"))
    ids = tokens.convert_tokens_to_ids(["Yes", "ĠYes", "yes", "Ġyes", "N"])
    assert first_tokens("x", tokens, [("Yes", "yes"), ("No",)]) == [sorted(ids[:4]), [ids[4]]]  # " No" is " ", "N", "o"


def test_answers_that_begin_with_the_same_token_are_refused() -> None:
    with pytest.raises(UserError, match="^reward x: 'Nay' and 'No' begin with the same token for this model; choose other words"):
        first_tokens("x", tokenizer(("Yes", "yes")), [("Nay",), ("Yes",), ("No",)])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_prompt_with_a_control_token_is_refused(qwen: str, token: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(VqaScore(qwen)).score(batch_of(BATCH.images[:2], ["fine", f"cats {token} and dogs"]))
    assert str(caught.value) == f"reward vqascore: the prompt 'cats {token} and dogs' holds {token}, a control token of the model; take it out"


def test_a_picture_with_a_pixel_that_is_no_number_is_invalid(qwen: str) -> None:
    images = BATCH.images.clone()
    images[2, 0, 0, 0] = torch.inf
    scores = loaded(VqaScore(qwen)).score(batch_of(images))
    assert scores.valid.tolist() == [True, True, False, True, True]
    assert scores.raw["vqascore_yes"].isnan().tolist() == [False, False, True, False, False]


def test_a_model_that_is_missing_damaged_or_without_chat_template_is_one_clear_error(qwen: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^reward vqascore: there is no file or folder /no/such/model"):
        VqaScore("/no/such/model").load(CPU, torch.float32)
    damaged = save_qwen(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"^reward deqa: .*damaged could not be loaded"):
        Deqa(str(damaged)).load(CPU, torch.float32)
    qwen_processor(chat=None).save_pretrained(tmp_path / "silent")
    with pytest.raises(UserError, match=r"^reward deqa: .*silent has no chat template"):
        Deqa(str(tmp_path / "silent")).load(CPU, torch.float32)


def test_a_file_without_all_weights_is_refused_but_weights_that_two_layers_share_need_be_there_only_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_qwen(tmp_path, tied=True) / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    assert loaded(VqaScore(str(tmp_path))).score(BATCH).valid.all()
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"^reward vqascore: .* lacks 1 weights of a Qwen2VL.*norm.weight"):
        VqaScore(str(tmp_path)).load(CPU, torch.float32)


def test_an_id_that_cannot_be_reached_and_a_missing_package_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def unreachable(source: str) -> None:
        raise OSError(f"no route to {source}")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=rf"^reward vqascore: {DEFAULT_MODEL} was neither found .*give the folder"):
        VqaScore().load(CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"^reward vqascore: needs the package torchvision.*install flowrl-diffusion\[clip\]"):
        VqaScore().load(CPU, torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VqaScore(form="log"), "vqascore: form must be probability, yes_no or logit, not 'log'"),
        (lambda: VqaScore(question="Is it there?"), "vqascore: the question 'Is it there\\?' has no place {prompt}"),
        (lambda: Deqa(levels="abcde"), "deqa: levels must be five different words"),
        (lambda: Deqa(levels=["a", "b", "c", "d", "d"]), "deqa: levels must be five different words"),
        (lambda: Deqa(levels=["a", "b", "c", "d", " "]), "deqa: levels must be five different words"),
        (lambda: Deqa(answer=" "), "deqa: the question or the answer's beginning is empty"),
    ],
)
def test_bad_arguments_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^reward {message}"):
        make()


def test_the_file_that_the_page_gives_for_deqas_own_weights_works(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Model(torch.nn.Module):
        def score(self, images: list[Any]) -> list[float]:
            return [1 + 4 * image.getpixel((0, 0))[0] / 255 for image in images]

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: Model())
    page = (Path(__file__).parents[1] / "docs" / "rewards" / "deqa.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    scores = loaded(names["DeqaServed"]()).score(batch_of(torch.tensor([0.0, 0.2, 1.0])[:, None, None, None].expand(3, 3, 4, 4)))
    torch.testing.assert_close(scores.values, torch.tensor([0.2, 0.36, 1.0]))
    torch.testing.assert_close(scores.raw["deqa_score"], torch.tensor([1.0, 1.8, 5.0]))


def test_facts_are_given_of_known_models_only() -> None:
    assert known_weights("someone/else") == {}
    assert VqaScore().info.weights == (DEFAULT_MODEL,)
    assert VqaScore("Qwen/Qwen2.5-VL-7B-Instruct").info.weights_license.startswith("Apache-2.0")
    assert VqaScore("/a/folder").info.weights == ()
