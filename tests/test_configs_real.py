"""The ready configs for published models: they load, say where they differ, fit their GPUs, and train on small random models of the same classes."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import BUILDERS, HEIGHT, WIDTH, build_flux
from toys import PROMPTS, ROOT

from flowrl.agreement import settings_without_effect
from flowrl.config import Config, list_methods, load_config
from flowrl.estimate import estimate
from flowrl.planning import minimum_rows, window_of
from flowrl.trainer import Trainer
from rewards.registry import load_reward

CONFIGS = ROOT / "configs"
MODELS = {"sd35_medium": "stabilityai/stable-diffusion-3.5-medium", "flux_dev": "black-forest-labs/FLUX.1-dev"}
METHODS = ["ac_flow", "awm", "dynamic_treerpo", "flow_grpo", "flow_grpo_fast", "g2rpo", "grpo_guard"]
ALONE = ["sd35_large_flow_grpo", "flux_schnell_flow_grpo_fast"]
BASES = [*(f"{model}_{method}" for model in MODELS for method in METHODS), *ALONE]
SCALES = [f"{model}_{method}_{scale}" for model in MODELS for method in METHODS for scale in ("8gpus", "nodes")]
MAY_SCALE = {
    "run_dir",
    "model.gradient_checkpointing",
    "model.text_encoders",
    "model.compile",
    "rollout.groups_per_iteration",
    "training.rows_per_forward",
    "training.rows_per_backward",
    "training.offload_rollouts",
    "training.timeout_minutes",
}
ALL_WEIGHTS = {"model.adapter", "optimizer.learning_rate", "training.sharding"}
"""What may differ too where the publication trains all weights and one GPU cannot."""


def file_of(name: str) -> Path:
    return (CONFIGS / "scale" if name.endswith(("8gpus", "nodes")) else CONFIGS) / f"{name}.yaml"


def base_of(name: str) -> str:
    return name.removesuffix("_8gpus").removesuffix("_nodes")


def flat(section: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return found


def changed(name: str) -> set[str]:
    """Keys in which a config for several GPUs and its base differ, after everything is merged."""
    ours, base = (flat(load_config(file_of(n)).model_dump(mode="json")) for n in (name, base_of(name)))
    return {key for key in ours | base if ours.get(key) != base.get(key)}


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from leaves(value, f"{where}.{key.value}" if where else key.value)
    else:
        yield where, node, node.start_mark.line


# --- files --------------------------------------------------------------------------------------------------------------------------------------


def test_every_model_and_method_has_a_config_for_one_gpu_for_eight_and_for_several_machines() -> None:
    assert {file.stem for file in CONFIGS.glob("flux_*.yaml")} | {"sd35_large_flow_grpo"} == {name for name in BASES if not name.startswith("sd35_medium")}
    assert {file.stem for file in (CONFIGS / "scale").iterdir()} == set(SCALES)
    for name in [*BASES, *SCALES]:
        config = load_config(file_of(name))
        assert f"{name.split('_')[0]}_{name.split('_')[1]}_{config.method}" == base_of(name)
        assert config.run_dir == f"runs/{name}"
        assert config.model.path == MODELS.get("_".join(name.split("_")[:2]), config.model.path)


@pytest.mark.parametrize("name", [*BASES, *SCALES])
def test_a_config_sets_nothing_without_an_effect(name: str) -> None:
    assert list(settings_without_effect(load_config(file_of(name)))) == []


@pytest.mark.parametrize("name", BASES)
def test_every_value_that_is_not_the_method_files_has_a_comment_beside_it(name: str) -> None:
    text = file_of(name).read_text()
    published = flat(list_methods()[load_config(file_of(name)).method].config)
    for key, node, line in leaves(yaml.compose(text)):
        if key in published:
            value = yaml.safe_load(yaml.serialize(node))
            same = [value] if isinstance(published[key], list) and not isinstance(value, list) else value
            assert same == published[key] or " # " in text.splitlines()[line], f"{key}: {value}, the method file has {published[key]}, and no comment says why"


@pytest.mark.parametrize("name", BASES)
def test_rewards_are_registered_and_some_are_held_out_and_wait_in_host_memory(name: str) -> None:
    config = load_config(file_of(name))
    trained = {reward.key for reward in config.rewards if reward.weight}
    watched = {reward.key: reward for reward in config.evaluation.rewards}
    for reward in (*config.rewards, *config.evaluation.rewards):
        assert load_reward(reward.name, reward.args).info.name
    assert trained <= set(watched)
    assert len(set(watched) - trained) >= 2
    assert all(watched[key].offload for key in set(watched) - trained)
    assert not any(watched[key].offload for key in trained)


@pytest.mark.parametrize("name", BASES)
def test_a_rollout_is_guided_as_the_evaluation_and_flux_by_its_input_alone(name: str) -> None:
    config = load_config(file_of(name))
    assert config.evaluation.guidance_scale == config.rollout.guidance_scale
    if name.startswith("flux"):
        assert (config.rollout.guidance_scale, config.model.guidance) == (1.0, 3.5 if name.startswith("flux_dev") else None)
        assert config.evaluation.num_steps == (28 if name.startswith("flux_dev") else 4)
    else:
        assert (config.model.guidance, config.evaluation.num_steps) == (None, 40)
    size = 720 if config.method in ("g2rpo", "dynamic_treerpo") and name.startswith("flux") else 512
    assert (config.model.height, config.model.width, config.model.dtype, config.model.adapter) == (size, size, "bfloat16", "lora")


# --- published values, by hand ------------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "sd35_medium_flow_grpo": "kl.weight 0.01, rollout.group_size 24, rollout.num_steps 10, rollout.guidance_scale 4.5, optimizer.learning_rate 3e-4",
    "sd35_medium_flow_grpo_fast": "rollout.kernel cps, rollout.group_size 18, rollout.window.size 3, objective.clip_low 1e-5, rollout.guidance_scale 1.0",
    "sd35_medium_grpo_guard": "objective.clip_low 2e-6, objective.clip_high 2e-6, optimizer.learning_rate 1e-4, kl.weight 0.0, advantage.scale group_std",
    "sd35_medium_awm": "kl.weight 5e-4, anchor.weight 5.0, matching.first_time 0, matching.num_times 6, rollout.num_steps 14, rollout.group_size 24",
    "flux_dev_flow_grpo": "rollout.num_steps 6, rollout.noise_level [0.9], kl.weight 0.0, advantage.scale batch_std, model.lora.rank 64",
    "flux_dev_flow_grpo_fast": "rollout.kernel cps, rollout.noise_level [0.8], rollout.window.high 3, objective.clip_high 1e-5, advantage.scale group_std",
    "flux_dev_grpo_guard": "objective.clip_low 4e-6, objective.clip_high 4e-6, rollout.noise_level [0.9], optimizer.learning_rate 1e-4",
    "flux_dev_awm": "matching.num_times 4, matching.time_fraction 0.7, anchor.weight 0.1, kl.weight 0.0, advantage.clip 1.0, rollout.group_size 16",
    "flux_dev_g2rpo": "rollout.num_steps 16, rollout.group_size 12, rollout.shift 3.0, advantage.aggregate advantages, model.height 720",
    "flux_dev_g2rpo_8gpus": "optimizer.learning_rate 2e-6, rollout.groups_per_iteration 16, model.adapter full, training.sharding fsdp2",
    "sd35_medium_flow_grpo_nodes": "rollout.groups_per_iteration 48, objective.updates_per_iteration 2",
    "sd35_medium_flow_grpo_fast_nodes": "rollout.groups_per_iteration 64",
    "sd35_medium_grpo_guard_nodes": "rollout.groups_per_iteration 48",
    "sd35_medium_awm_8gpus": "rollout.groups_per_iteration 24, objective.updates_per_iteration 1",
    "flux_dev_flow_grpo_8gpus": "rollout.groups_per_iteration 48",
    "flux_dev_awm_8gpus": "rollout.groups_per_iteration 48",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_has_the_published_values(name: str) -> None:
    values = flat(load_config(file_of(name)).model_dump(mode="json"))
    for pair in PUBLISHED[name].split(", "):
        key, _, value = pair.partition(" ")
        expected = float(value) if re.fullmatch(r"[\d.e-]+", value) else yaml.safe_load(value)
        assert values[key] == expected, key


def test_the_window_of_fast_on_flux_is_always_the_first_three_steps() -> None:
    rollout = load_config(file_of("flux_dev_flow_grpo_fast")).rollout
    assert {window_of(rollout, iteration, seed=iteration) for iteration in range(1, 20)} == {(0, 3)}


# --- scale --------------------------------------------------------------------------------------------------------------------------------------


def launch_of(name: str) -> tuple[Path, int]:
    """The launcher's file and the processes of the command that a config's comment gives."""
    comment = "".join(line[1:].rstrip("\\") for line in file_of(name).read_text().splitlines() if line.startswith("#"))
    words = shlex.split(comment[comment.index("accelerate launch") :])
    options = dict(itertools.pairwise(words))
    file = ROOT / options["--config_file"]
    settings = yaml.safe_load(file.read_text())
    machines, processes = (int(options.get(f"--num_{what}", settings[f"num_{what}"])) for what in ("machines", "processes"))
    assert processes == 8 * machines
    assert options["train"] == str(file_of(name).relative_to(ROOT))
    assert ("--main_process_ip" in options) == (machines > 1)
    return file, processes


@pytest.mark.parametrize("name", SCALES)
def test_a_config_for_several_gpus_changes_only_what_scale_changes(name: str) -> None:
    config, keys = load_config(file_of(name)), changed(name)
    assert {"run_dir", "rollout.groups_per_iteration"} <= keys or config.rollout.groups_per_iteration == 16
    all_weights = config.model.adapter == "full"
    assert keys - MAY_SCALE == (ALL_WEIGHTS if all_weights else set())
    assert all_weights == (name.startswith("flux") and config.method in ("dynamic_treerpo", "g2rpo"))
    assert not all_weights or (config.optimizer.learning_rate == list_methods()[config.method].config["optimizer"]["learning_rate"])
    assert not all_weights or (config.model.compile, config.optimizer.name) == ("off", "adamw")  # FSDP2 refuses 8 bits; compiled it was never run


@pytest.mark.parametrize("name", SCALES)
def test_the_command_in_a_config_for_several_gpus_starts_it_with_equal_shares(name: str) -> None:
    config = load_config(file_of(name))
    file, processes = launch_of(name)
    assert config.rollout.groups_per_iteration % processes == 0
    sharded = config.training.sharding == "fsdp2"
    assert file.stem == ("nodes" if name.endswith("nodes") else "eight_gpus_fsdp2" if sharded else "eight_gpus_ddp")


@pytest.mark.parametrize("name", [f"{model}_{method}" for model in MODELS for method in METHODS])
def test_both_scales_take_the_same_decisions(name: str) -> None:
    eight, nodes = (load_config(file_of(f"{name}_{scale}")) for scale in ("8gpus", "nodes"))
    assert nodes.model_copy(update={"run_dir": eight.run_dir, "training": eight.training}) == eight
    assert nodes.training.model_copy(update={"timeout_minutes": eight.training.timeout_minutes}) == eight.training


@pytest.mark.parametrize("name", [*BASES, *SCALES])
def test_what_a_config_costs_is_counted_without_a_model(name: str, tmp_path: Path) -> None:
    config = load_config(file_of(name), prompts_in(tmp_path) + ["training.iterations=2"])
    found, rollout = estimate(config), config.rollout
    assert found.samples == rollout.groups_per_iteration * rollout.group_size
    if config.likelihood == "matching":
        assert found.backward.mean == found.samples * config.matching.num_times
    else:
        assert found.backward.mean == rollout.groups_per_iteration * minimum_rows(rollout, iteration=1, seed=0)[1]


def test_docs_name_every_config() -> None:
    page = (ROOT / "docs" / "configs.md").read_text()
    for name in BASES:
        assert f"`{name}`" in page, name
    for file in CONFIGS.glob("*.yaml"):
        assert file.stem in page or file.stem.partition("_")[0] == "tiny" or f"`{file.stem.replace('sd35_medium_', '')}`" in page, file.stem


# --- training -----------------------------------------------------------------------------------------------------------------------------------


def prompts_in(folder: Path) -> list[str]:
    """Overrides: prompts of the toy world that quote a word, for OCR."""
    place = folder / "prompts.txt"
    place.write_text("".join(f'{text} that says "Hi"\n' for text in PROMPTS))
    return [f"data.train={place}", f"data.eval={{eval: {place}}}"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("real")
    sd3, flux = (BUILDERS[family].build(place / family) for family in ("sd3", "flux"))
    return {"sd35_medium": sd3, "sd35_large": sd3, "flux_dev": flux, "flux_schnell": build_flux(place / "schnell", guidance_embeds=False)}


def small(name: str, folders: Mapping[str, Path], folder: Path, *overrides: str) -> Config:
    """The run on a random model of its class: other pictures, rewards and prompts, two groups, float32; steps, kernel and objective stay."""
    settings = [f"model.path={folders['_'.join(name.split('_')[:2])]}", f"model.height={HEIGHT}", f"model.width={WIDTH}", "model.dtype=float32"]
    settings += [f"model.prompt_folder={folder / 'embeddings'}", "training.device=cpu", "rollout.groups_per_iteration=2", f"run_dir={folder / 'run'}"]
    config = load_config(file_of(name))
    if config.method == "g2rpo":  # 288 pictures a group otherwise
        settings += ["rollout.group_size=4"]
    if config.model.max_sequence_length == 512:  # words of letters are short
        settings += ["model.max_sequence_length=40"]
    several = len([reward for reward in config.rewards if reward.weight]) > 1
    settings += ["rewards={toys:brightness: 1.0, toys:redness: 1.0}" if several else "rewards=[toys:brightness]", "evaluation.rewards=[toys:brightness]"]
    if config.method == "ac_flow":  # a policy that is trained from the second iteration on
        settings += ["critic.warmup_iterations=1", "critic.ramp_iterations=1", "critic.gate=-1000"]
    return load_config(file_of(name), [*settings, *prompts_in(folder), *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BASES, *(f"flux_dev_{method}_8gpus" for method in ("dynamic_treerpo", "g2rpo"))])
def test_a_config_trains_two_iterations_on_a_random_model_of_its_class(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = small(name, folders, tmp_path)
    trainer = Trainer(config)
    before = [p.detach().clone() for p in trainer.parameters]
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
        if "ratio/max_abs_log_first" in metrics:
            assert metrics["ratio/max_abs_log_first"] < 1e-5
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.parameters, strict=True))
    assert all(p.isfinite().all() for p in trainer.parameters)
    assert any((tmp_path / "embeddings").rglob("*.safetensors"))
