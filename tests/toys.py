"""A Stable Diffusion 3 pipeline of a few thousand random parameters, and what the tests need to train it in a second: configs, rewards, processes.

Importable from subprocesses too: ``python toys.py`` is a server that forks a process for each run it is asked for, see `Launcher`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from flowrl.config import Config, load_config
from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "a yellow circle", "three red circles", "a blue triangle", "a red square"]


# --- the model ----------------------------------------------------------------------------------------------------------------------------------


def build_pipeline(folder: Path) -> Path:
    """Write a random StableDiffusion3Pipeline: 4 x 4 latents of 4 channels, 8 x 8 pixels, shift 3."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "flowrl" / "assets" / "tiny-sd3" / "tokenizer")

    def text_encoder() -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


# --- rewards, named in configs as toys:NAME -----------------------------------------------------------------------------------------------------


def brightness(batch: SampleBatch) -> torch.Tensor:
    """Mean pixel."""
    assert batch.images is not None
    return batch.images.flatten(1).mean(1)


def noisy_brightness(batch: SampleBatch) -> torch.Tensor:
    """Mean pixel and noise from the global generators, whose state a checkpoint must hold."""
    import random

    import numpy as np

    drawn = torch.rand(len(batch)) + torch.tensor([random.random() + np.random.random() for _ in range(len(batch))])
    return brightness(batch) + 0.01 * drawn


def redness(batch: SampleBatch) -> torch.Tensor:
    """Red minus blue."""
    assert batch.images is not None
    return (batch.images[:, 0] - batch.images[:, 2]).flatten(1).mean(1)


class Warmth:
    """Red minus blue, or where the prompt names ``word`` blue minus red, times ``scale``: with its gradient by the pictures."""

    def __init__(self, word: str = "no such word", scale: float = 1.0) -> None:
        self.info = RewardInfo("toys:Warmth", "red minus blue", -scale, scale, differentiable=True)
        self.word, self.scale = word, scale

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def score(self, batch: SampleBatch) -> Scores:
        assert batch.images is not None
        sign = torch.tensor([-self.scale if self.word in prompt.text else self.scale for prompt in batch.prompts], device=batch.images.device)
        return Scores(sign * (batch.images[:, 0] - batch.images[:, 2]).flatten(1).mean(1), torch.ones(len(batch), dtype=torch.bool))


def steps(batch: SampleBatch, word: str) -> torch.Tensor:
    """Brightness, but 0 for prompts with ``word``."""
    return torch.where(torch.tensor([word in prompt.text for prompt in batch.prompts]), 0.0, brightness(batch))


class Steps:
    """`steps`, which says that it lies between 0 and 1."""

    def __init__(self, word: str) -> None:
        self.info = RewardInfo("toys:Steps", "brightness, but 0 for some prompts", 0.0, 1.0)
        self.word = word

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def score(self, batch: SampleBatch) -> Scores:
        return Scores(steps(batch, self.word), torch.ones(len(batch), dtype=torch.bool))


def constant(batch: SampleBatch) -> torch.Tensor:
    """0.25 for everything."""
    return torch.full((len(batch),), 0.25)


def broken(batch: SampleBatch, how: str, word: str) -> torch.Tensor:
    """Brightness, but for prompts with ``word``: NaN, an exception, or one number too few."""
    values = brightness(batch)
    hit = torch.tensor([word in prompt.text for prompt in batch.prompts])
    if how == "raise" and bool(hit.any()):
        raise ZeroDivisionError("no red here")
    if how == "short" and bool(hit.any()):
        return values[:-1]
    return torch.where(hit, torch.nan, values) if how == "nan" else values


# --- configs ------------------------------------------------------------------------------------------------------------------------------------


def write_config(folder: Path, pipeline: Path) -> Path:
    """A run that takes about a second: 3 groups of 4 images, 4 steps, LoRA."""
    (folder / "train.txt").write_text("\n".join(PROMPTS[:5]) + "\n")
    (folder / "eval.txt").write_text("\n".join(PROMPTS[3:]) + "\n")
    config = {
        "method": "flow_grpo_fast",
        "run_dir": str(folder / "run"),
        "model": {"path": str(pipeline), "max_sequence_length": 0, "adapter": "lora", "lora": {"rank": 4, "alpha": 8}},
        "data": {"train": str(folder / "train.txt"), "eval": {"eval": str(folder / "eval.txt")}},
        "rewards": ["toys:brightness"],
        "rollout": {"num_steps": 4, "grid": "shifted", "window": {"size": 2, "low": 0, "high": 3}, "groups_per_iteration": 3, "group_size": 4},
        "objective": {"clip_low": 1e-3, "clip_high": 1e-3, "updates_per_iteration": 1},
        "optimizer": {"learning_rate": 1e-2},
        "ema": {"decay": 0.9, "every": 1},
        "training": {"iterations": 6, "checkpoint_every": 2, "device": "cpu", "max_invalid_share": 0.95},
        "evaluation": {"every": 3, "num_images": 6, "final_num_images": 8, "num_steps": 3, "grid_images": 3},
        "logging": {"tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def make_config(folder: Path, pipeline: Path, *overrides: str) -> Config:
    return load_config(write_config(folder, pipeline), overrides)


def as_prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(text) for text in texts]


# --- runs in other processes --------------------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """Of a subprocess: one thread, and this folder and the checkout importable."""
    paths = os.pathsep.join([str(TESTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **more}


def run_two(command: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """A command as two processes of one run, without a launcher, which would end the one when the other dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = environment(**{name: str(value) for name, value in place.items()})
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(command, process.returncode, out, err) for process, (out, err) in zip(started, said, strict=True)]


class Launcher:
    """Starts ``flowrl`` commands in processes of their own, without paying for the imports each time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "toys.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment()
        )

    def start(self, arguments: list[str], log: Path, die_at: str | None = None) -> int:
        """Start a command whose output goes to ``log``; returns its process id. ``die_at`` is explained at `_die_at`."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"arguments": arguments, "log": str(log), "die_at": die_at}) + "\n")
        return self._answer()

    def wait(self) -> int:
        """The exit code of the command started last; -9 after SIGKILL."""
        return os.waitstatus_to_exitcode(self._answer())

    def run(self, arguments: list[str], log: Path, die_at: str | None = None) -> int:
        self.start(arguments, log, die_at)
        return self.wait()

    def kill_later(self, arguments: list[str], log: Path, seconds: float, after: Path | None = None) -> int:
        """Send SIGKILL after some seconds, counted from the moment that a file changes; a command that has ended before is left alone."""
        before = _stamp(after)
        process = self.start(arguments, log)
        while after is not None and _stamp(after) == before and Path(f"/proc/{process}").exists():
            time.sleep(0.002)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        self._server.kill()  # it holds nothing; an orderly exit takes seconds
        self._server.wait()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the launcher has died"
        return int(line)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.exists():
        return None
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


def _die_at(place: str) -> None:
    """Make this process kill itself at the n-th time that it comes to a place, given as NAME:n."""
    from flowrl import checkpoint, evaluation, run, tracking

    name, _, count = place.partition(":")
    left = [int(count)]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_a_file(path: Path, whole: bytes) -> None:
        with path.open("ab") as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            os.fsync(file.fileno())
        die()

    def instead(module: Any, attribute: str, last_words: Any) -> None:
        original = getattr(module, attribute)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if now():
                last_words(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(module, attribute, patched)

    def half_state(path: Path, state: dict[str, Any]) -> None:
        import io

        whole = io.BytesIO()
        torch.save(state, whole)
        half_a_file(path, whole.getvalue())

    places = {
        "half of state.pt": (checkpoint, "_write", half_state),
        "before checkpoint.json": (checkpoint, "digest_of", die),
        "before the rename": (checkpoint, "_sync", die),
        "before pruning": (checkpoint, "find_checkpoints", die),
        "half a line": (tracking, "_append", half_a_file),
        "before a grid": (evaluation, "grid_of", die),
        "before the report": (run, "write_report", die),
    }
    instead(*places[name])


def _serve() -> None:
    import flowrl.cli
    import flowrl.run
    import flowrl.sampling

    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 70
            try:
                if job["die_at"]:
                    _die_at(job["die_at"])
                code = flowrl.cli.main(job["arguments"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(process, flush=True)  # noqa: T201
        print(os.waitpid(process, 0)[1], flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.modules["toys"] = sys.modules["__main__"]
    _serve()
