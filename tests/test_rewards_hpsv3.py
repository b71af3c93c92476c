"""rewards/hpsv3.py on a tiny Qwen2-VL with the published names: scores against a slow pass like the authors' own, instruction, token, and bad input."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_models import CPU, assert_reward_contract, batch_of, part_of, pictures
from safetensors.torch import save_file
from tiny_vlm import enlarge, qwen_config, qwen_processor
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.hpsv3 import REWARD_TOKEN, HpsV3, language_model_key, read_instruction
from rewards.pictures import to_pil

FP32 = {"rtol": 1e-5, "atol": 1e-5}
PIXELS = 4 * 28 * 28
INSTRUCTION = "\nJudge it from 0 to 10.\nTextual prompt - {text_prompt}\n\n"
ENDING = "\nOverall: <|Reward|>\n\nEND\n"
SOURCE = f'''import something_not_installed
from dataclasses import dataclass

INSTRUCTION = """{INSTRUCTION}"""
INSTRUCTION_debug = """
{{text_prompt}}
"""
prompt_with_special_token = """{ENDING}"""
raise SystemExit("this file must not be run")
'''
BATCH = batch_of(pictures(5, 64), ["red cats", "a photo of two blue dogs on a table", "x", "", "braces {} and {text_prompt}"])


class Checkpoint:
    """A folder as a user has it: the authors' file, the published weights, and configuration and processor of the base model."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        self.folder = folder
        self.instruction = folder / "data_collator_qwen.py"
        self.instruction.write_text(SOURCE)
        torch.manual_seed(0)
        processor = qwen_processor()
        processor.save_pretrained(folder / "base")
        qwen_config(processor.tokenizer, 400).save_pretrained(folder / "base")  # more rows than tokens, as in the base model
        self.rows = len(processor.tokenizer) + 1
        self.network = enlarge(Qwen2VLForConditionalGeneration(qwen_config(processor.tokenizer, self.rows)))
        self.head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        self.save(self.state())

    def state(self) -> dict[str, Tensor]:
        """Under the published names, those of transformers 4.45."""
        state = {f"rm_head.{key}": tensor for key, tensor in self.head.state_dict().items()}
        for key, tensor in self.network.state_dict().items():
            state[key.removeprefix("model.") if key.startswith("model.visual.") else key.replace("model.language_model.", "model.")] = tensor
        return {key: tensor.contiguous() for key, tensor in state.items()}

    def save(self, state: dict[str, Tensor], name: str = "weights") -> str:
        (self.folder / name).mkdir(exist_ok=True)
        save_file(state, self.folder / name / "HPSv3.safetensors")
        return str(self.folder / name)

    def reward(self, **options: Any) -> HpsV3:
        given = {"instruction": str(self.instruction), "model": str(self.folder / "weights"), "base": str(self.folder / "base"), "pixels": PIXELS}
        return HpsV3(**{**given, **options})

    def loaded(self, dtype: torch.dtype = torch.float32, **options: Any) -> HpsV3:
        reward = self.reward(**options)
        reward.load(CPU, dtype)
        return reward


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("hpsv3"))


def patches_of(picture: Any, height: int, width: int) -> Tensor:
    """[patches, 3 * 2 * 14 * 14]: Pillow's bicubic resizing, CLIP's constants, 2 x 2 neighbours in a row, each patch twice as two frames of a film."""
    from PIL import Image

    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    rows = []
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for y, x in ((top, left), (top, left + 14), (top + 14, left), (top + 14, left + 14)):
                patch = pixels[y : y + 14, x : x + 14].transpose(2, 0, 1)
                rows.append(np.stack([patch, patch], 1).reshape(-1))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def slow_scores(checkpoint: Checkpoint, batch: Any, height: int = 56, width: int = 56) -> Tensor:
    """[B, 2], one sample at a time without padding, as in the authors' forward pass: patches among the embeddings, the language model told no positions."""
    tokenizer = qwen_processor().tokenizer
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    places = height // 28 * (width // 28)
    model, scores = checkpoint.network.model, []
    for prompt, picture in zip(batch.prompts, to_pil(batch.images), strict=True):
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * places + "<|vision_end|>"
            f"\nJudge it from 0 to 10.\nTextual prompt - {prompt.text}\n\n\nOverall: <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
        )
        tokens = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            embedded = model.language_model.embed_tokens(tokens)
            seen = model.visual(patches_of(picture, height, width), grid_thw=torch.tensor([[1, height // 14, width // 14]])).pooler_output
            embedded[tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = seen
            states = model.language_model(inputs_embeds=embedded).last_hidden_state
            at = tokens[0].tolist().index(tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
            scores.append(checkpoint.head(states[0, at]))
    return torch.stack(scores)


def test_it_keeps_the_contract(checkpoint: Checkpoint) -> None:
    assert_reward_contract(checkpoint.reward, BATCH)


@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (30, 30, 56, 56), (100, 50, 56, 28), (56, 56, 56, 56)])
def test_scores_are_those_of_the_authors_way(checkpoint: Checkpoint, shape: tuple[int, int, int, int]) -> None:
    height, width, to_height, to_width = shape
    batch = batch_of(pictures(len(BATCH), height, width), [prompt.text for prompt in BATCH.prompts])
    expected = slow_scores(checkpoint, batch, to_height, to_width)
    scores = checkpoint.loaded().score(batch)
    torch.testing.assert_close(scores.values, expected[:, 0], **FP32)
    torch.testing.assert_close(scores.raw["hpsv3_sigma"], expected[:, 1].exp(), **FP32)
    assert expected[:, 0].std() > 1e-3


def test_patches_with_positions_of_two_axes_would_score_otherwise(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = checkpoint.loaded()
    ours = reward.score(BATCH).values
    forward, kinds = reward.network.backbone.forward, []

    def plain(**inputs: Any) -> Any:
        kinds.append(inputs.pop("position_ids").shape)
        image = inputs["input_ids"] == reward.processor.image_token_id
        return forward(**inputs, mm_token_type_ids=image.int())

    monkeypatch.setattr(reward.network.backbone, "forward", plain)
    assert (reward.score(BATCH).values - ours).abs().max() > 1e-4
    assert [len(kind) for kind in kinds] == [3]


def test_a_longer_neighbour_pads_a_sample_on_the_right_and_moves_nothing(checkpoint: Checkpoint) -> None:
    reward = checkpoint.loaded()
    alone = reward.score(part_of(BATCH, [2]))
    beside = reward.score(batch_of(BATCH.images[[2, 0]], ["x", "a very long prompt " * 20]))
    torch.testing.assert_close(beside.values[:1], alone.values, rtol=0, atol=1e-5)
    assert reward.processor.tokenizer.padding_side == "right"
    torch.testing.assert_close(beside.raw["hpsv3_sigma"][:1], alone.raw["hpsv3_sigma"], rtol=0, atol=1e-5)


def test_the_score_is_read_at_the_reward_token_and_nothing_behind_it_matters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    values = checkpoint.loaded().score(BATCH).values
    path = tmp_path / "turn.txt"
    path.write_text(INSTRUCTION + ENDING.replace("END", "something else and longer"))
    torch.testing.assert_close(checkpoint.loaded(instruction=str(path)).score(BATCH).values, values, **FP32)
    path.write_text(INSTRUCTION + ENDING.replace("Overall", "In all"))
    assert (checkpoint.loaded(instruction=str(path)).score(BATCH).values - values).abs().max() > 1e-3


def test_element_0_is_the_value_and_the_exponential_of_element_1_the_deviation(checkpoint: Checkpoint) -> None:
    state = checkpoint.state()
    state["rm_head.5.weight"] = torch.zeros(2, 6)
    state["rm_head.5.bias"] = torch.tensor([7.5, math.log(0.25)])
    scores = checkpoint.loaded(model=checkpoint.save(state, "constant")).score(BATCH)
    torch.testing.assert_close(scores.values, torch.full((5,), 7.5))
    torch.testing.assert_close(scores.raw["hpsv3_sigma"], torch.full((5,), 0.25))


def test_each_row_needs_the_reward_token_once(checkpoint: Checkpoint) -> None:
    reward = checkpoint.loaded()
    reward.text = reward.text.replace(REWARD_TOKEN, "")
    with pytest.raises(ValueError, match=r"each row needs the token <\|Reward\|> once, found \[0, 0, 0, 0, 0\]"):
        reward.score(BATCH)
    reward.text = INSTRUCTION + ENDING + ENDING
    with pytest.raises(ValueError, match=r"once, found \[2\]"):
        reward.score(part_of(BATCH, [0]))
    with pytest.raises(UserError, match=r"^reward hpsv3: the prompt 'I am <\|Reward\|>' holds <\|Reward\|>, a control token"):
        checkpoint.loaded().score(batch_of(BATCH.images[:1], ["I am <|Reward|>"]))


def test_preparation_of_pictures_has_the_published_constants(checkpoint: Checkpoint) -> None:
    assert HpsV3().pixels == 200704 == 256 * 28 * 28
    prepare = checkpoint.loaded(pixels=200704).processor.image_processor
    assert prepare(to_pil(pictures(1, 512)), return_tensors="pt")["image_grid_thw"].tolist() == [[1, 32, 32]]  # 448 pixels
    assert prepare(to_pil(pictures(1, 64, 128)), return_tensors="pt")["image_grid_thw"].tolist() == [[1, 24, 46]]  # 316.8, 633.6 up to multiples of 28
    white = prepare(to_pil(torch.ones(1, 3, 448, 448)), return_tensors="pt")["pixel_values"]
    assert white.shape == (1024, 1176)
    expected = [(1 - mean) / std for mean, std in ((0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711))]
    torch.testing.assert_close(white[0].view(3, -1).mean(1), torch.tensor(expected), **FP32)


def test_the_picture_and_the_prompt_both_matter(checkpoint: Checkpoint) -> None:
    values = checkpoint.loaded().score(batch_of(BATCH.images[[0, 0, 1]], ["red cats", "blue dogs", "red cats"])).values
    assert (values[0] - values[1]).abs() > 1e-3
    assert (values[0] - values[2]).abs() > 1e-3


def test_bfloat16_is_close_and_its_head_stays_in_float32(checkpoint: Checkpoint) -> None:
    half = checkpoint.loaded(torch.bfloat16)
    assert half.network.backbone.dtype == half.network.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.network.head.parameters()} == {torch.float32}
    expected = checkpoint.loaded().score(BATCH).values
    torch.testing.assert_close(half.score(BATCH).values, expected, rtol=0, atol=0.05)


def test_it_moves_as_a_whole(checkpoint: Checkpoint) -> None:
    reward = checkpoint.loaded()
    reward.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in reward.network.state_dict().values())


def test_the_names_of_the_published_file_are_translated() -> None:
    assert language_model_key("visual.blocks.0.attn.qkv.weight") == "visual.blocks.0.attn.qkv.weight"
    assert language_model_key("model.layers.3.mlp.up_proj.weight") == "language_model.layers.3.mlp.up_proj.weight"
    assert language_model_key("model.embed_tokens.weight") == "language_model.embed_tokens.weight"


def test_the_instruction_is_read_from_the_authors_file_which_is_not_run_and_its_hash_is_kept(checkpoint: Checkpoint) -> None:
    text = INSTRUCTION + ENDING
    assert read_instruction(checkpoint.instruction) == text
    assert checkpoint.loaded().instruction_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_without_a_path_the_instruction_is_that_of_the_installed_files(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hpsv3-1.0.0.dist-info").mkdir()
    (tmp_path / "hpsv3-1.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0.0\n")
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.testing.assert_close(checkpoint.loaded(instruction=None).score(BATCH).values, checkpoint.loaded().score(BATCH).values)


def test_without_instruction_it_says_where_to_get_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nowhere)
    with pytest.raises(UserError) as caught:
        checkpoint.reward(instruction=None).load(CPU, torch.float32)
    assert str(caught.value) == (
        "reward hpsv3: needs the package hpsv3; install its files alone with `pip install --no-deps hpsv3==1.0.0`, "
        "or give instruction=PATH of hpsv3/dataset/data_collator_qwen.py from that wheel"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "INSTRUCTION = ", "is no Python file"),
        ("a.py", "OTHER = 'x'", "has no text INSTRUCTION"),
        ("a.py", "INSTRUCTION = make()", "has no text INSTRUCTION"),
        ("a.py", "INSTRUCTION = '{text_prompt}'", "has no text prompt_with_special_token"),
        ("a.py", "INSTRUCTION = 'no place'\nprompt_with_special_token = '<|Reward|>'", "needs {text_prompt} and <|Reward|> once each"),
        ("a.txt", "{text_prompt} <|Reward|> <|Reward|>", "needs {text_prompt} and <|Reward|> once each"),
        ("a.txt", None, r"cannot be read \(FileNotFoundError\)"),
        ("a.txt", b"\xff\xfe", r"cannot be read \(UnicodeDecodeError\)"),
    ],
)
def test_a_file_that_is_no_instruction_is_refused(tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^reward hpsv3: the instruction .*{message.replace('|', '[|]')}.*pip install --no-deps hpsv3"):
        read_instruction(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rm_head.3.bias"), "its head rm_head has the tensors"),
        (lambda state: state.pop("model.embed_tokens.weight"), "has 0 tokens"),
        (
            lambda state: state.update({"model.embed_tokens.weight": torch.zeros(400, 32)}),
            r"has 400 tokens, .* with <\|Reward\|> 298; give the model it was tuned from",
        ),
        (lambda state: state.pop("model.norm.weight"), "lacks 1 weights of a Qwen2VLModel, .*language_model.norm.weight for one"),
        (lambda state: state.update({"else": torch.zeros(1)}), "is not the published checkpoint: 1 tensors are unknown, else for one"),
        (lambda state: state.update({"visual.merger.ln_q.bias": torch.zeros(3)}), "lacks 1 weights of a Qwen2VLModel, or has them in another shape"),
    ],
)
def test_a_checkpoint_that_is_not_the_published_one_is_refused(checkpoint: Checkpoint, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = checkpoint.state()
    change(state)
    with pytest.raises(UserError, match=rf"^reward hpsv3: .*{message}"):
        checkpoint.loaded(model=checkpoint.save(state, "spoilt"))


def test_missing_and_damaged_sources_are_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"^reward hpsv3: there is no file or folder /no/base"):
        checkpoint.loaded(base="/no/base")
    with pytest.raises(UserError, match=r"^reward hpsv3: the folder .*base has no file HPSv3.safetensors"):
        checkpoint.loaded(model=str(checkpoint.folder / "base"))
    path = checkpoint.folder / "damaged.safetensors"
    path.write_bytes((checkpoint.folder / "weights" / "HPSv3.safetensors").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^reward hpsv3: .*damaged.safetensors cannot be read as weights"):
        checkpoint.loaded(model=str(path))


@pytest.mark.parametrize("pixels", [0, 783, 200704.0, True])
def test_a_picture_area_that_is_none_is_refused(pixels: Any) -> None:
    with pytest.raises(UserError, match="^reward hpsv3: pixels must be a whole number of 784 or more"):
        HpsV3(pixels=pixels)


def test_a_picture_with_a_pixel_that_is_no_number_is_invalid(checkpoint: Checkpoint) -> None:
    images = BATCH.images.clone()
    images[1, 0, 0, 0] = torch.nan
    scores = checkpoint.loaded().score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True, True, True]
    assert scores.raw["hpsv3_sigma"].isnan().tolist() == [False, True, False, False, False]
