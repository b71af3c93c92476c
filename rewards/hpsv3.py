"""HPSv3: human preference by Qwen2-VL-7B with a head, from the published checkpoint; it also says how unsure it is.

h            = last hidden state at the added token <|Reward|>
(mu, s)      = Linear(16, 2) ReLU Linear(1024, 16) ReLU Linear(3584, 1024) h,    in float32
value        = mu,   hpsv3_sigma = exp(s)

The picture, resized to about 200704 pixels, and an instruction that ends with the prompt and the token are one user turn. The model was tuned on the exact
wording, so the text is read from the file of the authors' package and never retyped; that package is not imported.

Source: HPSv3, arXiv:2508.03789. Verified in its authors' code (the wheel hpsv3 1.0.0, written for transformers 4.45.2): the turn, Pillow's bicubic resizing
and its sizes, padding on the right, the token, the head and its float32, element 0 as the score, and that the training loss takes exp of element 1 as the
standard deviation. Its forward pass hands no positions to the language model, which then counts every token, patches too, by one number (0, 1, 2, ...) on all
three axes; a plain call in transformers 5 would give patches two-dimensional positions and other scores, so the positions are handed over here. Not verified:
the text of the paper, and scores of the real weights. Letters: B samples, L tokens, C width.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.checkpoints import load_pretrained, load_tensors, locate_file, packaged_file
from rewards.network import NetworkReward
from rewards.vision_language import encode, load_processor, model_of_tensors, picture_turn

__all__ = ["REWARD_TOKEN", "HpsV3", "language_model_key", "read_instruction"]

REWARD_TOKEN = "<|Reward|>"
_PLACE = "{text_prompt}"
_FILE = "hpsv3/dataset/data_collator_qwen.py"
_GET = f"install its files alone with `pip install --no-deps hpsv3==1.0.0`, or give instruction=PATH of {_FILE} from that wheel"


def read_instruction(path: Path) -> str:
    """The text of the turn, with the place ``{text_prompt}``, from the authors' file or from a text file that holds it whole. Nothing is run.

    Raises:
        UserError: the file is missing or holds no such text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"reward hpsv3: the instruction {path} cannot be read ({type(error).__name__}); {_GET}") from error
    if path.suffix == ".py":
        text = _constant(path, text, "INSTRUCTION") + _constant(path, text, "prompt_with_special_token")
    if text.count(_PLACE) != 1 or text.count(REWARD_TOKEN) != 1:
        raise UserError(f"reward hpsv3: the instruction {path} needs {_PLACE} and {REWARD_TOKEN} once each; {_GET}")
    return text


def language_model_key(key: str) -> str:
    """The name in Qwen2VLModel of transformers 5 of a tensor of the published file."""
    return "language_model." + key.removeprefix("model.") if key.startswith("model.") else key


class HpsV3(NetworkReward):
    """Human preference for a picture, given its prompt; unbounded.

    Args:
        instruction: path of the authors' ``data_collator_qwen.py``, or of a text file with the turn; None = from the installed distribution hpsv3.
        model: hub id or folder with ``HPSv3.safetensors``, or that file.
        base: hub id or folder of Qwen2-VL-7B-Instruct, of which configuration, tokenizer and chat template are read, not the weights.
        pixels: area that pictures are resized to; the published model knows its default only.
    Attributes:
        instruction_sha256: of the text of the turn as UTF-8, after ``load``.
    Raises:
        UserError: ``pixels`` is not a whole number of 784 or more.
    """

    info = RewardInfo(
        name="hpsv3",
        description="HPSv3: human preference for a picture, given its prompt, by Qwen2-VL-7B",
        low=float("-inf"),
        high=float("inf"),
        source="HPSv3, arXiv:2508.03789",
        weights=("MizzenAI/HPSv3:HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"),
        weights_license="Apache-2.0; the instruction text MIT",
        parameters=8_300_000_000,
        batch_size=4,
        dtype="bfloat16",
        extra="clip",
    )
    instruction_sha256: str

    def __init__(
        self, instruction: str | None = None, model: str = "MizzenAI/HPSv3", base: str = "Qwen/Qwen2-VL-7B-Instruct", pixels: int = 256 * 28 * 28
    ) -> None:
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 28 * 28:
            raise UserError(f"reward hpsv3: pixels must be a whole number of 784 or more, not {pixels!r}")
        self.instruction, self.model, self.base, self.pixels = instruction, model, base, pixels

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Qwen2-VL without its output layer in ``dtype``, the head in float32."""
        name = self.info.name
        file = packaged_file(name, "hpsv3", _FILE, _GET) if self.instruction is None else Path(self.instruction).expanduser()
        self.text = read_instruction(file)
        self.instruction_sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.processor = load_processor(name, self.base, "right")
        from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

        self.processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=self.pixels, max_pixels=self.pixels)
        self.processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.token: int = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        config = load_pretrained(name, Qwen2VLConfig.from_pretrained, self.base)
        path = locate_file(name, self.model, "HPSv3.safetensors")
        tensors = load_tensors(name, path)
        head = _head(name, {key.removeprefix("rm_head."): tensors.pop(key) for key in list(tensors) if key.startswith("rm_head.")}, path)
        tensors.pop("lm_head.weight", None)
        tensors = {language_model_key(key): tensor for key, tensor in tensors.items()}
        rows = len(tensors.get("language_model.embed_tokens.weight", ()))
        if rows != len(self.processor.tokenizer):
            raise UserError(
                f"reward {name}: {path} has {rows} tokens, {self.base} with {REWARD_TOKEN} {len(self.processor.tokenizer)}; give the model it was tuned from"
            )
        config.text_config.vocab_size = rows
        return _Network(model_of_tensors(name, Qwen2VLModel, config, tensors, dtype, path), head)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] float32, mu; raw["hpsv3_sigma"] [B] float32, positive."""
        assert isinstance(self.network, _Network)
        turns = [picture_turn(self.processor, self.text.replace(_PLACE, prompt.text)) for prompt in prompts]
        inputs = encode(self.info.name, self.processor, images, prompts, turns, self.network.dtype)
        mu, log_sigma = self.network(inputs, self.token).unbind(1)
        return mu, {"hpsv3_sigma": log_sigma.exp()}


class _Network(nn.Module):
    """Tokens and patches -> (mu, log sigma) [B, 2] float32."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def forward(self, inputs: Any, token: int) -> Tensor:
        """Raises ValueError unless each row holds the token once."""
        tokens = inputs["input_ids"]
        at = tokens == token
        if (at.sum(1) != 1).any():
            raise ValueError(f"each row needs the token {REWARD_TOKEN} once, found {at.sum(1).tolist()}")
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)  # see the module's text
        states = self.backbone(
            input_ids=tokens,
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            use_cache=False,
        ).last_hidden_state
        return self.head(states[at].float())


def _head(name: str, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The head in float32; its sizes are those of the tensors."""
    if set(tensors) != {f"{i}.{kind}" for i in (0, 3, 5) for kind in ("weight", "bias")}:
        raise UserError(f"reward {name}: {path} is not the published checkpoint: its head rm_head has the tensors {sorted(tensors)}")
    shapes = {i: tensors[f"{i}.weight"].shape for i in (0, 3, 5)}
    linear = {i: nn.Linear(width, wide) for i, (wide, width) in shapes.items()}
    head = nn.Sequential(linear[0], nn.ReLU(), nn.Identity(), linear[3], nn.ReLU(), linear[5])  # 2 was dropout
    head.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return head


def _constant(path: Path, source: str, name: str) -> str:
    """The text that a module gives to a name at its top level."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise UserError(f"reward hpsv3: the instruction {path} is no Python file; {_GET}") from error
    for statement in statements:
        if isinstance(statement, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in statement.targets):
            value = statement.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    raise UserError(f"reward hpsv3: the instruction {path} has no text {name}; {_GET}")
