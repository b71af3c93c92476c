"""Exports load in plain diffusers and draw the pictures of `flowrl sample --run`; their card says what they are; a failure is one line and leaves nothing."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from families import BUILDERS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_report import make_run
from torch import Tensor
from toys import PROMPTS, make_config
from unets import UNET_BUILDERS

from flowrl import exporting
from flowrl.checkpoint import load_policy
from flowrl.cli import main
from flowrl.config import Config, load_config
from flowrl.evaluation import sigmas_of
from flowrl.exporting import base_licence, export_run, loading_snippet
from flowrl.policies import families
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import make_policy
from flowrl.policies.weights import cast
from flowrl.run import train
from flowrl.sampling import sample_to_folder
from flowrl.seeds import generator
from flowrl.types import UserError
from samplers.rollout import sample_ode

CPU = torch.device("cpu")
EVERY_BUILDER = {**BUILDERS, **UNET_BUILDERS}
LORA_FILE = "pytorch_lora_weights.safetensors"
FAST = ("optimizer.learning_rate=0.1", "training.iterations=4", "evaluation.every=2")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """A trained LoRA of rank 4 and alpha 8, so that a forgotten scale shows, with checkpoints 2 and 4."""
    return train(make_config(tmp_path_factory.mktemp("lora"), pipeline, *FAST))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    return train(make_config(tmp_path_factory.mktemp("full"), pipeline, *FAST, "optimizer.learning_rate=0.01", "model.adapter=full", "ema=null"))


def start_noise(policy: DiffusionPolicy, prompt: str) -> Tensor:
    return torch.randn(policy.latent_shape, generator=generator("sample", 0, prompt, 0))[None]


def ours(policy: DiffusionPolicy, config: Config, prompt: str) -> Tensor:
    """The picture [3, H, W] of `flowrl sample`, before it is rounded."""
    e = config.evaluation
    sigmas = sigmas_of(config.rollout, e.num_steps, policy)
    with torch.no_grad():
        latents = sample_ode(policy.velocity(e.guidance_scale), start_noise(policy, prompt), sigmas, policy.prompt_rows([prompt]), prediction=policy.prediction)
        return policy.decode_with_grad(latents)[0]


def tuned(run: Path, checkpoint: str = "last") -> tuple[DiffusionPolicy, Config]:
    config = load_config(run / "config.yaml")
    policy = make_policy(config.model, CPU)
    load_policy(run, policy, checkpoint)
    return policy, config


def run_snippet(code: str, folder: Path, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The picture [3, H, W] that a card's lines draw in the export's folder, as they stand but from given noise."""
    drawn: list[Tensor] = []

    def draw(pipe: Any, **settings: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        if type(pipe).__name__.startswith("StableDiffusion") and hasattr(pipe, "unet"):
            pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8 pixels, whatever the VAE
        drawn.append(pipe(latents=latents.clone(), output_type="pt", **settings).images[0].float())
        return SimpleNamespace(images=[Image.fromarray((drawn[0] * 255).round().byte().permute(1, 2, 0).numpy())])

    assert code.count("image = pipe(") == 1
    monkeypatch.chdir(folder)
    exec(code.replace("image = pipe(", "image = draw(pipe, "), {"draw": draw})
    return drawn[0]


def snippet_of(card: Path) -> str:
    return card.read_text().split("```python\n")[1].split("\n```")[0]


def front_of(card: Path) -> dict[str, Any]:
    empty, front, _ = card.read_text().split("---\n", 2)
    assert empty == ""
    loaded = yaml.safe_load(front)
    assert isinstance(loaded, dict)
    return loaded


# --- the same pictures --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "merged", "pipeline", "transformer"])
def test_every_form_draws_the_picture_of_flowrl_sample_in_plain_diffusers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    run = request.getfixturevalue("full_run" if form == "transformer" else "lora_run")
    out = tmp_path / "out"
    capsys.readouterr()  # of the training
    assert main(["export", str(run), "--out", str(out), "--form", form]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"iteration 4 in {out}; how to load it: {out / 'README.md'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    policy, config = tuned(run)
    assert config.model.adapter == "full" or config.model.lora.alpha != config.model.lora.rank
    code = snippet_of(out / "README.md")
    prompt = PROMPTS[3]  # the first of the run's samples
    assert repr(prompt) in code
    theirs = run_snippet(code, out, start_noise(policy, prompt), monkeypatch)
    expected = ours(policy, config, prompt)
    assert (theirs - expected).abs().max() < 1e-4
    base = make_policy(config.model, CPU)
    assert (ours(base, config, prompt) - expected).abs().max() > 1e-2  # else it would pass with weights that were never loaded
    (file,) = sample_to_folder(config.model.path, [prompt], tmp_path / "drawn", run, "last", 3, 1.0, 0, 1)
    assert np.abs(np.asarray(Image.open(file)).astype(float) - theirs.permute(1, 2, 0).numpy() * 255).max() <= 0.51 + 255e-4
    assert (out / "picture.png").is_file()


@pytest.mark.parametrize("overrides", [(), ("rollout.grid=diffusers",), ("rollout.shift=1.7",), ("rollout.grid=diffusers", "rollout.shift=1.7")], ids=str)
def test_the_snippet_samples_on_the_grid_of_the_run(tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    config = make_config(tmp_path, pipeline, "evaluation.guidance_scale=2.5", *overrides)
    policy = make_policy(config.model, CPU)
    policy.export(tmp_path / "out")
    code = loading_snippet(policy, config, "lora", "float32", PROMPTS[0])
    assert (run_snippet(code, tmp_path / "out", start_noise(policy, PROMPTS[0]), monkeypatch) - ours(policy, config, PROMPTS[0])).abs().max() < 1e-4


@pytest.mark.parametrize("name", EVERY_BUILDER)
def test_the_snippet_draws_with_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    builder = EVERY_BUILDER[name]
    if not hasattr(diffusers, kind := families._load(builder.family).pipelines[0]):
        pytest.skip(f"this diffusers has no {kind}")
    folder = builder.build(tmp_path / "model")
    overrides = [*(builder.overrides.get("flow_grpo_fast") or ()), f"evaluation.guidance_scale={builder.guidance_scales[-1]}"]
    settings = {"max_sequence_length": "null"} | dict(builder.model)
    config = make_config(tmp_path, folder, *(f"model.{key}={value}" for key, value in settings.items()), *overrides)
    policy = builder.policy(folder, moved=True)
    expected = ours(policy, config, PROMPTS[0])
    latents = builder.arguments(start_noise(policy, PROMPTS[0]), 1.0, builder.model)["latents"]
    code = loading_snippet(policy, config, "lora", "float32", PROMPTS[0])
    policy.export(tmp_path / "out")
    theirs = run_snippet(code, tmp_path / "out", latents, monkeypatch)
    assert theirs.shape == expected.shape
    assert (theirs - expected).abs().max() < 1e-4


def test_the_lora_file_says_how_it_is_scaled(lora_run: Path, tmp_path: Path) -> None:
    export_run(lora_run, tmp_path / "a")
    with safe_open(tmp_path / "a" / LORA_FILE, "pt") as file:
        facts = {key.removeprefix("transformer."): value for key, value in json.loads(file.metadata()["lora_adapter_metadata"]).items()}
    assert (facts["r"], facts["lora_alpha"]) == (4, 4)  # alpha / rank = 2 is in B
    assert "attn.to_k" in facts["target_modules"]
    trained = load_file(lora_run / "export" / LORA_FILE)
    exported = load_file(tmp_path / "a" / LORA_FILE)
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[key], exported[key]) for key in trained)  # the file that the training itself wrote
    contents = [(folder / LORA_FILE).read_bytes() for folder in (tmp_path / "a", lora_run / "export")]
    assert contents[0] == contents[1]


def test_merged_is_the_network_with_the_lora_loaded(lora_run: Path, tmp_path: Path, pipeline: Path) -> None:
    export_run(lora_run, tmp_path / "merged", form="merged")
    base = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    merged = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    lora = load_file(lora_run / "export" / LORA_FILE)
    assert merged.keys() == base.keys()
    changed = 0
    for key, value in merged.items():
        name = f"transformer.{key.removesuffix('.weight')}"
        delta = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"] if f"{name}.lora_A.weight" in lora else torch.zeros(())
        torch.testing.assert_close(value, base[key] + delta, rtol=1e-5, atol=1e-7)
        changed += not torch.equal(value, base[key])
    assert changed == sum(bool(value.any()) for key, value in lora.items() if ".lora_B." in key) > 0


def test_raw_weights_are_those_that_were_trained(lora_run: Path, tmp_path: Path) -> None:
    for name, options in {"ema": {}, "raw": {"weights": "raw"}, "early": {"checkpoint": "2"}}.items():
        assert export_run(lora_run, tmp_path / name, **options) == (2 if name == "early" else 4)
    files = {name: load_file(tmp_path / name / LORA_FILE) for name in ("ema", "raw", "early")}
    key = next(key for key in files["raw"] if ".lora_A." in key)
    state = torch.load(lora_run / "checkpoints" / "step_000004" / "state.pt", weights_only=True)
    assert any(torch.equal(files["raw"][key], value) for value in state["parameters"])
    assert any(torch.equal(files["ema"][key], value) for value in state["ema"]["average"])
    assert (files["raw"][key] - files["ema"][key]).abs().max() > 1e-3
    assert (files["early"][key] - files["ema"][key]).abs().max() > 1e-3
    assert "It was the average (EMA) that was evaluated, not these raw weights." in (tmp_path / "raw" / "README.md").read_text()
    assert "averaged over the training (EMA)" in (tmp_path / "ema" / "README.md").read_text()
    assert "EMA) that was evaluated" not in (tmp_path / "ema" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_that_of_every_file(lora_run: Path, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(lora_run, tmp_path / "lora", dtype=dtype)
    export_run(lora_run, tmp_path / "pipeline", form="pipeline", dtype=dtype)
    files = [tmp_path / "lora" / LORA_FILE, *(tmp_path / "pipeline").glob("*/*.safetensors")]
    assert len(files) == 5
    for file in files:
        assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {getattr(torch, dtype)}
    policy, config = tuned(lora_run)
    if dtype == "bfloat16":
        theirs = run_snippet(snippet_of(tmp_path / "pipeline" / "README.md"), tmp_path / "pipeline", start_noise(policy, PROMPTS[3]).bfloat16(), monkeypatch)
        assert (theirs - ours(policy, config, PROMPTS[3])).abs().max() < 0.05


# --- the card -----------------------------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_weights_are(lora_run: Path, tmp_path: Path, pipeline: Path) -> None:
    export_run(lora_run, tmp_path / "out")
    front = front_of(tmp_path / "out" / "README.md")
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image" and front["license"] == "unknown"
    assert "base_model" not in front  # a folder is on no hub
    assert {"lora", "flowrl", "flow_grpo_fast"} <= set(front["tags"])
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("A LoRA (rank 4) for the transformer of `random-sd3` (Stable Diffusion 3)", "arXiv:2505.05470", "| toys:brightness | 1 | none | – |"):
        assert part in text
    assert "| Iterations | 4 (of 4) |" in text and "| Images | 48 (sampled and scored) |" in text and "| Network rows | " in text
    assert f"torch {importlib.metadata.version('torch')}, " in text
    rows = [json.loads(line) for line in (lora_run / "evals.jsonl").read_text().splitlines()]
    base, last = rows[0], rows[-1]
    cells = next(line for line in text.splitlines() if line.startswith("| toys:brightness | eval")).strip("| ").split(" | ")
    assert cells[2:5] == ["1", *(f"{row['mean']:.3f} ± {row['ci95']:.3f}" for row in (base, last))]
    assert "Unknown: the base model's card" in text
    assert yaml.safe_load(text.split("````yaml\n")[1].split("````")[0])["model"]["lora"] == {"rank": 4, "alpha": 8.0, "targets": None}
    for name in ("before_after.png", "reward_curve.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 50
    assert not [line for line in text.splitlines() if line.endswith(" ")] and "\n\n\n" not in text


def test_the_card_of_an_earlier_checkpoint_tells_no_later_numbers(lora_run: Path, tmp_path: Path) -> None:
    export_run(lora_run, tmp_path / "out", checkpoint="2")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Weights after 2 iterations" in text and "| Images | 24 (" in text and "| Iterations | 2 (of 4, not finished) |" in text
    rows = [json.loads(line) for line in (lora_run / "evals.jsonl").read_text().splitlines()]
    at = {row["iteration"]: f"{row['mean']:.3f} ± {row['ci95']:.3f}" for row in rows}
    assert at[2] in text and at[4] not in text and at[2] != at[4]


def test_a_card_without_evaluations_and_samples_says_so(lora_run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(lora_run, bare, ignore=shutil.ignore_patterns("evals.jsonl", "samples", "versions.json", "metrics.jsonl", "timings.jsonl"))
    export_run(bare, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None has been recorded." in text and "No pictures: no before/after picture can be made: No samples have been saved" in text
    assert front_of(tmp_path / "out" / "README.md")["license"] == "unknown"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", LORA_FILE]
    assert repr("a photo of a cat") in snippet_of(tmp_path / "out" / "README.md")


def test_the_card_shows_evaluations_by_prompt_set_and_guidance(tmp_path: Path) -> None:
    rows = exporting._evaluations(exporting._until(exporting.load_run(make_run(tmp_path / "run")), 12))
    assert [(row["split"], row["guidance"], row["base"], row["tuned"], row["change"], row["iteration"]) for row in rows] == [
        ("eval", "1", "0.400 ± 0.031", "0.500 ± 0.031", "+0.100 *", 10),
        ("eval", "4", "0.463 ± 0.031", "–", "–", 0),
        ("unseen", "1", "0.275 ± 0.031", "0.375 ± 0.031", "+0.100 *", 10),
        ("unseen", "4", "0.338 ± 0.031", "–", "–", 0),
    ]


def test_the_licence_is_that_of_the_base_models_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "README.md"
    assert base_licence(str(tmp_path)) == {}
    for text in ("no front matter", "---\n: : [\n---\n", "---\nlicense: [a, b]\n---\n", "---\n- license\n---\n"):
        card.write_text(text)
        assert base_licence(str(tmp_path)) == {}
    card.write_text("---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE.md\ntags: [a]\n---\n# Base\n")
    assert base_licence(str(tmp_path)) == {"license": "other", "license_name": "some-licence", "license_link": "LICENSE.md"}
    assert base_licence("flowrl:tiny-sd3") == {"license": "apache-2.0"}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(card))
    assert base_licence("owner/model")["license_link"] == "https://huggingface.co/owner/model/blob/main/LICENSE.md"

    def offline(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no such file in the cache, and no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    assert base_licence("owner/model") == {}


def test_a_base_model_of_a_hub_is_named_where_hubs_look(tmp_path: Path, pipeline: Path) -> None:
    config = make_config(tmp_path, pipeline, "model.path=owner/model")
    for form, relation in (("lora", "adapter"), ("merged", "finetune")):
        asked = SimpleNamespace(config=config, form=form)
        front = exporting._front_matter(asked, {"license": "other", "license_name": "x"})
        assert (front["base_model"], front["base_model_relation"], front["license"], front["license_name"]) == ("owner/model", relation, "other", "x")
        assert ("lora" in front["tags"]) == (form == "lora")


def test_the_embedded_model_is_found_on_any_machine(tmp_path: Path, pipeline: Path) -> None:
    config = make_config(tmp_path, pipeline, "model.path=flowrl:tiny-sd3", "model.max_sequence_length=null")
    code = loading_snippet(make_policy(config.model, CPU), config, "lora", "float32", "x")
    assert 'base = Path(flowrl.__file__).parent / "assets" / "tiny-sd3"' in code and "max_sequence_length=0" in code
    compile(code, "card", "exec")


# --- refused, or failed -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line on stderr of an export that must fail with exit code 2."""

    def call(*arguments: object) -> str:
        assert main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    return call


def test_what_cannot_be_exported_is_one_line(lora_run: Path, full_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out, new = tmp_path / "out", ("--out", tmp_path / "out")
    assert "is not a run directory" in refused(tmp_path, *new)
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copy(lora_run / "config.yaml", untrained)
    assert "untrained has no checkpoint yet; train it first" in refused(untrained, *new)
    assert "has no checkpoint 3; it has: 2, 4" in refused(lora_run, *new, "--checkpoint", "3")
    assert "trained all weights, so there is nothing to merge; use --form transformer" in refused(full_run, *new, "--form", "merged")
    assert "trained all weights, so there is no LoRA; use --form transformer" in refused(full_run, *new, "--form", "lora")
    assert "trained a LoRA; use --form merged" in refused(lora_run, *new, "--form", "transformer")
    assert "keeps no average (ema: null); use --weights raw" in refused(full_run, *new, "--weights", "ema")
    assert "holds the run" in refused(lora_run, "--out", lora_run, "--force")
    assert "holds the run" in refused(lora_run, "--out", lora_run.parent, "--force")
    (tmp_path / "file").write_text("mine")
    assert "file is not a folder" in refused(lora_run, "--out", tmp_path / "file", "--force")
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_folder_in_use_is_written_into_only_by_force(lora_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "out"
    (out / "transformer").mkdir(parents=True)
    (out / "transformer" / "old").write_text("old")
    (out / "README.md").write_text("old")
    (out / ".git").mkdir()
    (out / "mine.txt").write_text("mine")
    assert "out is not empty; choose another --out, or replace what is in it with --force" in refused(lora_run, "--out", out)
    assert (out / "README.md").read_text() == "old"
    export_run(lora_run, out, form="merged", force=True)
    assert sorted(path.name for path in out.iterdir()) == [".git", "README.md", "before_after.png", "mine.txt", "reward_curve.png", "transformer"]
    assert not (out / "transformer" / "old").exists() and (out / "README.md").read_text().startswith("---\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    export_run(lora_run, tmp_path / "empty")


def test_a_weight_that_does_not_fit_is_named(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    original = exporting.load_policy

    def with_a_large_weight(run: Path, policy: DiffusionPolicy, which: str, *, averaged: bool) -> int:
        iteration = original(run, policy, which, averaged=averaged)
        policy.network.context_embedder.bias.data[0] = 1e5
        policy.trainable()[0].data[0] = 1e6
        return iteration

    monkeypatch.setattr(exporting, "load_policy", with_a_large_weight)
    line = refused(lora_run, "--out", tmp_path / "out", "--form", "pipeline", "--dtype", "float16")
    assert "--dtype float16: transformer.context_embedder.bias holds 1e+05, and float16 ends at 6.55e+04; use bfloat16 or float32" in line
    line = refused(lora_run, "--out", tmp_path / "out", "--dtype", "float16")
    assert "lora_A.weight holds 1e+06" in line
    assert list(tmp_path.iterdir()) == []
    export_run(lora_run, tmp_path / "out", form="pipeline", dtype="bfloat16")
    with pytest.raises(UserError, match=r"x holds numbers that are not finite: the training diverged; export an earlier --checkpoint"):
        cast("x", torch.tensor([1.0, torch.nan]), torch.float32)


@pytest.mark.parametrize("place", ["weights", "card", "figures"])
def test_a_full_disk_leaves_nothing(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], place: str) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        if place == "weights":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"weights": "flowrl.policies.weights.save_file", "card": "flowrl.exporting.replace_file", "figures": "flowrl.figures.replace_file"}[place]
    monkeypatch.setattr(target, full)
    assert "no space left on the disk of" in refused(lora_run, "--out", tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_a_killed_export_left_is_removed(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "half").mkdir(parents=True)
    export_run(lora_run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()
