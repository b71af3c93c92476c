"""Pictures in a folder: names, seeds, base and tuned weights, nothing overwritten."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import PROMPTS

from flowrl import sampling
from flowrl.cli import main
from flowrl.config import Config
from flowrl.policies.sd3 import Sd3Policy
from flowrl.run import train
from flowrl.sampling import picture_names, sample_to_folder
from flowrl.sections import ModelConfig
from flowrl.types import UserError

Configure = Callable[..., Config]


@pytest.fixture
def draw(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> Callable[..., dict[str, np.ndarray]]:
    """(prompts, options) -> file name -> pixels. The random pipeline was made without T5 tokens, which only a run's config can say."""
    monkeypatch.setattr(sampling, "ModelConfig", lambda **settings: ModelConfig(**settings, max_sequence_length=0))

    def call(prompts: list[str], out: str, run: Path | None = None, checkpoint: str = "last", **options: float) -> dict[str, np.ndarray]:
        settings = {"num_steps": 3, "guidance_scale": 1.0, "seed": 0, "images_per_prompt": 1} | options
        files = sample_to_folder(str(pipeline), prompts, tmp_path / out, run, checkpoint, **settings)
        assert sorted(files) == sorted((tmp_path / out).iterdir())
        return {file.name: np.asarray(Image.open(file)) for file in files}

    return call


def test_a_name_has_the_prompts_number_its_words_and_the_pictures_number() -> None:
    assert picture_names(["A red circle!", "«ü»", "a " * 100], 2) == [
        "000_a-red-circle_0.png",
        "000_a-red-circle_1.png",
        "001_prompt_0.png",
        "001_prompt_1.png",
        "002_" + "a-" * 23 + "a_0.png",
        "002_" + "a-" * 23 + "a_1.png",
    ]
    many = picture_names(["x"] * 1001, 1)
    assert (many[0], many[-1]) == ("0000_x_0.png", "1000_x_0.png")


def test_a_picture_follows_from_seed_prompt_and_number_only(draw: Callable[..., dict[str, np.ndarray]]) -> None:
    a = draw(PROMPTS[:3], "a", images_per_prompt=2)
    b = draw([PROMPTS[2]], "b", images_per_prompt=3)
    assert (np.abs(a["002_" + "a-green-triangle-above-a-red-square" + "_1.png"].astype(int) - b["000_a-green-triangle-above-a-red-square_1.png"]) <= 1).all()
    assert (b["000_a-green-triangle-above-a-red-square_0.png"] != b["000_a-green-triangle-above-a-red-square_1.png"]).any()
    other = draw([PROMPTS[2]], "c", images_per_prompt=1, seed=1)
    assert (other["000_a-green-triangle-above-a-red-square_0.png"] != b["000_a-green-triangle-above-a-red-square_0.png"]).any()
    assert all(pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 for pixels in a.values())


def test_the_tuned_weights_draw_other_pictures_from_the_same_noise(
    draw: Callable[..., dict[str, np.ndarray]], configure: Configure, tmp_path: Path, pipeline: Path
) -> None:
    run = train(configure("optimizer.learning_rate=0.1", "training.iterations=4"))
    base, base_again = draw(PROMPTS[:2], "a"), draw(PROMPTS[:2], "b")
    tuned, early = draw(PROMPTS[:2], "c", run=run), draw(PROMPTS[:2], "d", run=run, checkpoint="2")
    assert all((base[name] == base_again[name]).all() for name in base)
    assert any((base[name] != tuned[name]).any() for name in base)
    assert any((early[name] != tuned[name]).any() for name in base)
    policy = Sd3Policy(configure().model, torch.device("cpu"))
    policy.load_export(run / "export")
    from flowrl.seeds import generator
    from samplers.rollout import sample_ode
    from samplers.schedules import shifted_grid

    noise = torch.randn(policy.latent_shape, generator=generator("sample", 0, PROMPTS[0], 0))[None]
    with torch.no_grad():
        image = policy.decode(sample_ode(policy.velocity(), noise, shifted_grid(3, 3.0), policy.prompt_rows(PROMPTS[:1])))[0]
    shown = tuned["000_a-red-circle_0.png"].astype(int)
    assert (np.abs(shown - (image * 255).round().permute(1, 2, 0).numpy()) <= 1).all()
    with pytest.raises(UserError, match="has no checkpoint 3; it has: 2, 4"):
        draw(PROMPTS[:1], "e", run=run, checkpoint="3")
    assert not (tmp_path / "e").exists()


def test_guidance_changes_the_pictures(draw: Callable[..., dict[str, np.ndarray]]) -> None:
    a, b = draw(PROMPTS[:1], "a"), draw(PROMPTS[:1], "b", guidance_scale=4.0)
    assert (a["000_a-red-circle_0.png"] != b["000_a-red-circle_0.png"]).any()


def test_no_file_is_overwritten(draw: Callable[..., dict[str, np.ndarray]], tmp_path: Path) -> None:
    draw(PROMPTS[:1], "a")
    before = (tmp_path / "a" / "000_a-red-circle_0.png").read_bytes()
    with pytest.raises(UserError, match=r"a/000_a-red-circle_0\.png exists already; choose another folder"):
        draw(PROMPTS[:1], "a", seed=3)
    assert (tmp_path / "a" / "000_a-red-circle_0.png").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is not a folder"):
        draw(PROMPTS[:1], "file")


def test_a_full_disk_is_explained(draw: Callable[..., dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sampling, "replace_file", no_space)
    with pytest.raises(UserError, match="no space left on the disk of .*; free space and sample again"):
        draw(PROMPTS[:1], "a")


def test_the_command_draws_with_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["sample", "a red circle", "two blue squares", "--out", str(out), "--num-steps", "2", "--images-per-prompt", "2"]) == 0
    assert capsys.readouterr().out == f"4 pictures in {out}\n"
    assert len(list(out.glob("*.png"))) == 4
    with Image.open(out / "001_two-blue-squares_1.png") as picture:
        assert picture.size == (32, 32)
