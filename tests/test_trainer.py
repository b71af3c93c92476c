"""The trainer: ratios of 1, the KL, the gradient, the count of network rows, and what a run writes down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import PROMPTS

import flowrl
from flowrl.assignment import Assignment
from flowrl.config import Config, load_config
from flowrl.core.advantages import edge_advantages
from flowrl.engines.diffusion import Sampled
from flowrl.run import train
from flowrl.trainer import Trainer
from flowrl.types import Rollout, Scores, UserError

Configure = Callable[..., Config]
LARGE_EPS = "optimizer.eps=0.01"  # makes AdamW's step a smooth function of the gradient, so that rounding errors stay rounding errors


def record_gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradient of every update, before clipping."""
    seen: list[list[Tensor]] = []
    apply = trainer._apply_gradients

    def record(meters: Any) -> None:
        seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.parameters])
        apply(meters)

    monkeypatch.setattr(trainer, "_apply_gradients", record)
    return seen


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def move_weights(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in trainer.parameters:
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)


# --- the ratio ----------------------------------------------------------------------------------------------------------------------------------

PLANS = {
    "chain": ["rollout.plan=chain"],
    "window": ["rollout.plan=window"],
    "window, shared noise": ["rollout.plan=window", "rollout.same_noise=true"],
    "chain, CFG": ["rollout.plan=chain", "rollout.guidance_scale=3"],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_ratio_of_the_first_update_of_every_iteration_is_one(configure: Configure, plan: str, adapter: str) -> None:
    sizes = ["training.rows_per_forward=5", "training.rows_per_backward=7", "objective.updates_per_iteration=2"]
    trainer = Trainer(configure(*PLANS[plan], *sizes, f"model.adapter={adapter}", "optimizer.learning_rate=0.003"))
    spreads = []
    for iteration in (1, 2, 3):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["ratio/max_abs_log_first"] < 1e-6
        spreads.append(metrics["ratio/std"])
    assert min(spreads) > 1e-7  # the second update of each iteration sees other ratios: the meter is not stuck


def test_the_ratio_is_one_on_the_embedded_model(configure: Configure) -> None:
    trainer = Trainer(
        configure("model={path: 'flowrl:tiny-sd3', max_sequence_length: null}", "rollout.num_steps=8", "training.rows_per_backward=9", "rollout.plan=chain")
    )
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["ratio/max_abs_log_first"] < 1e-6
        assert metrics["nfe/used"] == metrics["nfe/minimum"]


# --- the KL -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fg_code", "exact_mean", "v_mse", "x_mse"])
def test_the_kl_is_zero_at_the_start_and_has_a_gradient_after_one_step(configure: Configure, form: str) -> None:
    trainer = Trainer(configure("kl.weight=0.1", f"kl.form={form}", "rollout.guidance_scale=2"))
    first, _ = trainer.iterate(1)
    second, _ = trainer.iterate(2)
    assert first["kl/mean"] == 0.0
    assert second["kl/mean"] > 0.0
    assert second["grad_norm"] > 0.0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_kl_alone_pulls_the_policy_back_to_the_base_model(configure: Configure, adapter: str) -> None:
    # A constant reward gives advantages of 0, so that the KL is all there is.
    settings = ["rewards=[toys:constant]", "kl={weight: 1.0, form: v_mse}", "optimizer.weight_decay=0", "optimizer.learning_rate=0.002"]
    trainer = Trainer(configure(*settings, f"model.adapter={adapter}", "rollout.groups_per_iteration=1"))
    still, _ = trainer.iterate(1)
    assert (still["kl/mean"], still["grad_norm"]) == (0.0, 0.0)
    move_weights(trainer)
    course = [trainer.iterate(iteration)[0] for iteration in range(2, 30)]
    assert course[0]["grad_norm"] > 0
    assert course[-1]["kl/mean"] < 0.5 * course[0]["kl/mean"]


def test_without_a_kl_none_is_computed_or_logged(configure: Configure) -> None:
    trainer = Trainer(configure())
    metrics, _ = trainer.iterate(1)
    assert "kl/mean" not in metrics
    assert trainer.policy.reference_network is None


# --- the gradient -------------------------------------------------------------------------------------------------------------------------------


def roll_out(trainer: Trainer) -> tuple[Rollout, Tensor, list[Any]]:
    """A rollout of three groups, made-up advantages of its samples, and its prompts."""
    plan = trainer.engine.plan(1)
    prompts = trainer.prompts[:3]
    rollout, _ = trainer.engine.sample(plan, prompts, [0, 1, 2], 1)
    advantages = torch.randn(len(rollout.leaves), generator=torch.Generator().manual_seed(9))
    return rollout, advantages, prompts


def assignment_of(trainer: Trainer, rollout: Rollout, advantages: Tensor) -> Assignment:
    """All decisions trained with the given advantages of their samples."""
    objective, edges = trainer.config.objective, len(rollout.edge_row)
    low, high = torch.full((edges,), objective.clip_low), torch.full((edges,), objective.clip_high)
    return Assignment(rollout, edge_advantages(advantages, rollout.leaf_edge, edges), low, high, None, len(rollout.row_sigma), False, {})


@pytest.mark.parametrize("guidance_scale", [1, 2])
def test_the_gradient_is_that_of_reinforce_on_the_gaussian_steps(configure: Configure, monkeypatch: pytest.MonkeyPatch, guidance_scale: int) -> None:
    trainer = Trainer(configure(f"rollout.guidance_scale={guidance_scale}", "training.rows_per_backward=5", "rollout.plan=chain"))
    move_weights(trainer)
    rollout, advantages, prompts = roll_out(trainer)
    seen = record_gradients(trainer, monkeypatch)
    before = weights(trainer)
    trainer.update(Sampled(trainer.engine.plan(1), rollout, 0), assignment_of(trainer, rollout, advantages), prompts, [0, 1, 2], 1)
    for p, value in zip(trainer.parameters, before, strict=True):
        p.data.copy_(value)

    # By hand: on a chain edge e belongs to sample e // (steps), E edges; loss = -mean_e A_e log N(x'; mean, std^2) / d, flow.md 1.4.
    steps = rollout.edge_step.unique().numel()
    sigma, after = rollout.edge_sigma, rollout.edge_sigma_next
    noise = rollout.edge_noise_level * (sigma / torch.where(sigma < 1, 1 - sigma, 1 - rollout.edge_sigma_guard)).sqrt()
    length = sigma - after
    velocity = trainer.policy.velocity(guidance_scale)(
        rollout.row_x, rollout.row_sigma, trainer.policy.prompt_rows([p.text for p in prompts])[rollout.row_group]
    )

    def wide(values: Tensor) -> Tensor:
        return values.float()[:, None, None, None]

    v = velocity[rollout.edge_row]
    x = rollout.row_x[rollout.edge_row]
    drift = v + wide(noise**2 / (2 * sigma)) * (x + wide(1 - sigma) * v)
    mean, std = x - wide(length) * drift, wide(noise * length.sqrt())
    log_prob = torch.distributions.Normal(mean, std).log_prob(rollout.edge_x_next).flatten(1).mean(1)
    torch.testing.assert_close(log_prob.detach(), rollout.edge_old_log_prob, rtol=0, atol=2e-6)
    pairs = rollout.leaf_edge
    assert pairs.shape == (len(advantages) * steps, 2)
    edge_advantage = torch.zeros(len(pairs))
    edge_advantage[pairs[:, 0]] = advantages[pairs[:, 1]]
    expected = torch.autograd.grad(-(edge_advantage * log_prob).mean(), trainer.parameters)

    (found,) = seen
    scale = max(g.abs().max().item() for g in expected)
    assert scale > 1e-5
    assert difference(list(expected), found) < 1e-4 * scale


@pytest.mark.parametrize("reduction", ["mean", "group_mean"])
@pytest.mark.parametrize("same_noise", ["true", "false"])
def test_the_size_of_a_micro_batch_does_not_change_the_update(configure: Configure, monkeypatch: pytest.MonkeyPatch, reduction: str, same_noise: str) -> None:
    found = {}
    for size in (1, 5, 1000):
        trainer = Trainer(
            configure(f"training.rows_per_backward={size}", f"objective.reduction={reduction}", f"rollout.same_noise={same_noise}", "kl.weight=0.01", LARGE_EPS)
        )
        move_weights(trainer)
        rollout, advantages, prompts = roll_out(trainer)
        seen = record_gradients(trainer, monkeypatch)
        calls = []
        trainer.policy.network.register_forward_pre_hook(
            lambda _m, _a, kwargs, calls=calls: calls.append(len(kwargs["hidden_states"])) if torch.is_grad_enabled() else None, with_kwargs=True
        )
        before = weights(trainer)
        trainer.update(Sampled(trainer.engine.plan(1), rollout, 0), assignment_of(trainer, rollout, advantages), prompts, [0, 1, 2], 1)
        assert max(calls) <= size
        assert sum(calls) == len(rollout.row_sigma)
        found[size] = (seen[0], weights(trainer))
        assert difference(before, found[size][1]) > 1e-5
    for size in (1, 5):
        assert difference(found[size][0], found[1000][0]) < 1e-6
        assert difference(found[size][1], found[1000][1]) < 1e-6


def test_an_update_makes_better_samples_likelier(configure: Configure) -> None:
    trainer = Trainer(configure("optimizer.learning_rate=0.001"))
    rollout, advantages, prompts = roll_out(trainer)
    trainer.update(Sampled(trainer.engine.plan(1), rollout, 0), assignment_of(trainer, rollout, advantages), prompts, [0, 1, 2], 1)
    from flowrl.likelihoods.transition import select_rows

    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), trainer.policy.prompt_rows([p.text for p in prompts]))
    with torch.no_grad():
        log_prob = trainer.engine.likelihood(trainer.policy.velocity(), batch).log_prob
    gain = (log_prob - rollout.edge_old_log_prob)[rollout.leaf_edge[:, 0]] * advantages[rollout.leaf_edge[:, 1]]
    assert gain.mean() > 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_training_raises_the_reward(configure: Configure, adapter: str) -> None:
    settings = ["optimizer.learning_rate=0.01", "advantage={centre: group, scale: group_std}", "rollout.groups_per_iteration=4", "rollout.group_size=8"]
    trainer = Trainer(configure(*settings, f"model.adapter={adapter}", "rewards=[toys:redness]", "objective={clip_low: 0.1, clip_high: 0.1}"))
    means = [trainer.iterate(iteration)[0]["reward/total/mean"] for iteration in range(1, 26)]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.01


# --- network rows -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> tuple[Trainer, dict[str, int], Path]:
    """One trainer for many settings, and the rows that really went through its transformer."""
    from toys import make_config, write_config

    folder = tmp_path_factory.mktemp("nfe")
    trainer = Trainer(make_config(folder, pipeline))
    rows = {"forward": 0, "backward": 0}

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows["forward"] += len(kwargs["hidden_states"])
        rows["backward"] += len(kwargs["hidden_states"]) if torch.is_grad_enabled() else 0

    trainer.policy.network.register_forward_pre_hook(count, with_kwargs=True)
    return trainer, rows, write_config(folder, pipeline)


@pytest.mark.parametrize("inner_epochs", [1, 2])
@pytest.mark.parametrize("kl", [0.0, 0.01])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("plan", ["chain", "window"])
def test_every_iteration_uses_the_least_network_rows(
    counted: tuple[Trainer, dict[str, int], Path], plan: str, same_noise: bool, guidance_scale: float, kl: float, inner_epochs: int
) -> None:
    trainer, rows, config_file = counted
    window = {"size": 2, "low": 1, "high": 3}
    trainer.config = trainer.engine.config = load_config(
        config_file,
        [
            f"rollout={{plan: {plan}, same_noise: {same_noise}, guidance_scale: {guidance_scale}, window: {json.dumps(window)}}}",
            f"kl.weight={kl}",
            f"objective.inner_epochs={inner_epochs}",
            "training.rows_per_forward=9",
            "training.rows_per_backward=7",
        ],
    )
    rows["forward"] = rows["backward"] = 0
    metrics, _ = trainer.iterate(1)

    # methods/nfe.md 2, with P = 3 groups of G = 4, T = 4 steps, W trained ones from step s, c rows per evaluation, r references, K epochs.
    groups, size, num_steps = 3, 4, 4
    start, count = (1, 2) if plan == "window" else (0, 3)
    c, r, k = (2 if guidance_scale > 1 else 1), (1 if kl else 0), inner_epochs
    if same_noise:
        sampling, training = start + 1 + size * (num_steps - start - 1), 1 + size * (count - 1)
    else:
        sampling, training = size * num_steps, size * count
    forward, backward = groups * c * (sampling + (k + r) * training), groups * k * training
    assert rows == {"forward": forward, "backward": backward}
    assert (metrics["nfe/forward"], metrics["nfe/backward"]) == (forward, backward)
    assert metrics["nfe/used"] == metrics["nfe/minimum"] == forward + backward


def test_every_prompt_is_encoded_once_in_a_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("training.iterations=3", "rollout.guidance_scale=2")
    trainers: list[Trainer] = []
    counts = [0]
    original = Trainer.__init__

    def build(self: Trainer, given: Config) -> None:
        original(self, given)
        trainers.append(self)
        self.policy.pipeline.text_encoder.register_forward_hook(lambda _m, args, _out: counts.__setitem__(0, counts[0] + len(args[0])))

    monkeypatch.setattr(Trainer, "__init__", build)
    train(config)
    assert counts[0] == len(set(PROMPTS))  # the training and the evaluation prompts overlap; the empty prompt was encoded before
    assert len(trainers) == 1


def test_every_training_row_belongs_to_exactly_one_update_of_an_epoch(configure: Configure) -> None:
    trainer = Trainer(configure("objective.updates_per_iteration=3", "rollout.same_noise=true"))
    rollout, _, _ = roll_out(trainer)
    epochs = [trainer.split(rollout.row_group, [0, 1, 2], (1, epoch)) for epoch in (0, 1)]
    for parts in epochs:
        assert sorted(torch.cat(parts).tolist()) == list(range(len(rollout.row_sigma)))
        assert [len(part) for part in parts] == [5, 5, 5]  # 3 groups of 1 + 4 rows
    assert any(a.tolist() != b.tolist() for a, b in zip(*epochs, strict=True))
    with pytest.raises(UserError, match="updates_per_iteration: 5 updates are more than the 3 training rows of an iteration; use fewer"):
        Trainer(configure("objective.updates_per_iteration=5", "rollout.same_noise=true", "rollout.window.size=1"))


# --- a run --------------------------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_everything_down(configure: Configure) -> None:
    config = configure(
        "rewards={toys:brightness: 1.0, toys:redness: {weight: -0.5}}",
        "evaluation={rewards: [toys:redness, toys:brightness], compare_guidance_scales: [2]}",
        "kl.weight=0.01",
        "logging.tensorboard=true",
        "optimizer.warmup_updates=4",
    )
    run = train(config)
    metrics, timings, evals = (read(run / f"{name}.jsonl") for name in ("metrics", "timings", "evals"))
    assert [m["iteration"] for m in metrics] == [t["iteration"] for t in timings] == [1, 2, 3, 4, 5, 6]
    names = ["reward/toys:brightness/mean", "reward/toys:redness/std", "reward/total/mean", "reward/total/std", "reward/zero_std_groups", "reward/invalid"]
    names += ["ratio/mean", "ratio/std", "ratio/max_abs_log_first", "clip/low", "clip/high", "kl/mean", "grad_norm", "learning_rate", "loss"]
    names += ["advantage/abs_mean", "advantage/clamped", "nfe/used", "nfe/minimum", "nfe/forward", "nfe/backward", "images"]
    assert [name for name in names if not all(isinstance(m[name], int | float) for m in metrics)] == []
    assert all(sum(key.startswith("ratio/step_") for key in m) == 2 * 6 for m in metrics)  # two steps: mean, spread and clip shares
    assert [m["images"] for m in metrics] == [12, 24, 36, 48, 60, 72]
    assert [m["learning_rate"] for m in metrics] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    for m in metrics:
        assert m["reward/total/mean"] == pytest.approx(m["reward/toys:brightness/mean"] - 0.5 * m["reward/toys:redness/mean"], abs=1e-6)
    assert all({"seconds/rollout", "seconds/reward_wait", "seconds/train", "seconds/total", "elapsed"} < t.keys() for t in timings)

    facts = {(e["iteration"], e["policy"], e["guidance_scale"], e["reward"], e["n"]) for e in evals}
    both = [(reward, n) for reward in ("toys:redness", "toys:brightness") for n in (8,)]
    ends = {(i, policy, scale, reward, n) for i, policy in ((0, "base"), (6, "tuned")) for scale in (1.0, 2.0) for reward, n in both}
    assert facts == ends | {(3, "tuned", 1.0, "toys:redness", 6), (3, "tuned", 1.0, "toys:brightness", 6)}
    assert len(evals) == len(facts)

    for iteration in (0, 3, 6):
        folder = run / "samples" / f"iteration_{iteration:06d}"
        facts = json.loads((folder / "eval.json").read_text())
        assert facts["prompts"] == PROMPTS[3:6]
        assert (facts["columns"], facts["tile"], facts["pad"]) == (3, 8, 2)
        assert {name: len(values) for name, values in facts["scores"].items()} == {"toys:redness": 3, "toys:brightness": 3}
        assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(run / "config.yaml") == config
    versions = json.loads((run / "versions.json").read_text())
    assert versions["flowrl"] == flowrl.__version__
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["cpu_count"] >= 1
    assert {"python", "diffusers", "commit", "cpu", "platform", "threads", "device"} < versions.keys()
    assert any((run / "tensorboard").iterdir())
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(configure: Configure, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = train(configure(f"run_dir={tmp_path / name}", f"seed={seed}", "training.iterations=2", "rewards=[toys:noisy_brightness]"))
        texts.append(((run / "metrics.jsonl").read_text(), (run / "evals.jsonl").read_text()))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(configure: Configure) -> None:
    trainer = Trainer(configure("training.rows_per_backward=5"))
    trainer.iterate(1)
    before = weights(trainer)
    rollout, advantages, prompts = roll_out(trainer)
    advantages[0] = math.inf
    with pytest.raises(UserError, match=r"the gradient became \w+ at update 2; .*lower optimizer\.learning_rate"):
        trainer.update(Sampled(trainer.engine.plan(1), rollout, 0), assignment_of(trainer, rollout, advantages), prompts, [0, 1, 2], 1)
    assert difference(before, weights(trainer)) == 0


def test_a_setting_of_the_optimiser_can_be_changed_on_resume(configure: Configure) -> None:
    run = train(configure("training.iterations=2"))
    config = configure("training.iterations=4", "optimizer={learning_rate: 0.5, weight_decay: 0.25, betas: [0.5, 0.5]}", f"run_dir={run}")
    train(config, resume=run)
    assert [m["learning_rate"] for m in read(run / "metrics.jsonl")] == [0.01, 0.01, 0.5, 0.5]
    state = torch.load(run / "checkpoints" / "step_000004" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    assert tuple(state["optimizer"]["param_groups"][0]["betas"]) == (0.5, 0.5)


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(configure("training.iterations=2"))
    names = ("metrics.jsonl", "evals.jsonl", "export/pytorch_lora_weights.safetensors", "samples/iteration_000002/eval.png")
    before = {name: (run / name).read_bytes() for name in names}
    capsys.readouterr()
    train(configure("training.iterations=2"), resume=run)
    assert "has already done 2 of its 2 iterations" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in names} == before


def test_an_iteration_in_which_nothing_is_selected_leaves_everything_as_it_was(configure: Configure) -> None:
    settings = ["rollout.same_noise=true", "advantage={centre: group, scale: group_std}", "kl.weight=0.1", "optimizer.weight_decay=0.1"]
    trainer = Trainer(configure(*settings, "selection.contrast={high: 9, low: -9}"))
    before, moments = weights(trainer), len(trainer.optimizer.state)
    metrics, _ = trainer.iterate(1)
    assert difference(before, weights(trainer)) == 0
    assert (len(trainer.optimizer.state), trainer.num_updates, metrics["updates"], metrics["selection/kept"]) == (moments, 0, 0, 0.0)
    assert metrics["nfe/used"] == metrics["nfe/minimum"]


# --- an old policy, and other likelihoods -------------------------------------------------------------------------------------------------------

ODE = "rollout={plan: ode, num_steps: 4, group_size: 4}"


def test_sde_steps_of_an_old_policy_are_trained_with_their_ratio_to_it(configure: Configure) -> None:
    trainer = Trainer(configure("old_policy={rollout: true, every: 2, decay_slope: 0}", "objective={clip_low: 0.5, clip_high: 0.5}"))
    first, _ = trainer.iterate(1)
    assert first["ratio/std"] < 1e-6  # the old policy is the policy
    second, _ = trainer.iterate(2)
    assert second["ratio/std"] > 1e-4
    assert second["ratio/max_abs_log_first"] == 0.0  # not measured: off-policy the first ratio is not 1, and nothing is wrong
    third, _ = trainer.iterate(3)
    assert third["ratio/std"] < 1e-6  # it was copied after the second iteration
    assert all(m["nfe/used"] == m["nfe/minimum"] for m in (first, second, third))


def test_the_old_policy_samples_and_the_weights_come_back(configure: Configure) -> None:
    trainer = Trainer(configure(ODE, "method=diffusion_nft", "matching.num_times=2"))
    plan, prompts = trainer.engine.plan(1), trainer.prompts[:3]
    before, _ = trainer.engine.sample(plan, prompts, [0, 1, 2], 1)
    move_weights(trainer)
    moved = weights(trainer)
    again, _ = trainer.engine.sample(plan, prompts, [0, 1, 2], 1)
    assert torch.equal(before.leaves, again.leaves)
    assert difference(moved, weights(trainer)) == 0
    trainer.old_policy.update(1, 0)
    after, _ = trainer.engine.sample(plan, prompts, [0, 1, 2], 1)
    assert (after.leaves - before.leaves).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "part"),
    [(["method=diffusion_nft"], "old_policy"), (["method=ac_flow", "critic={widths: [8], hidden: 8}"], "critic")],
    ids=["old policy", "critic"],
)
def test_a_checkpoint_with_another_set_of_parts_is_refused(configure: Configure, settings: list[str], part: str) -> None:
    with_it, without = Trainer(configure(ODE, *settings, "matching.num_times=2")), Trainer(configure())
    for trainer, state in ((without, with_it.state()), (with_it, without.state())):
        with pytest.raises(UserError, match=f"the checkpoint and the config disagree on whether there is an? {part}"):
            trainer.load_state(state)


def test_the_memory_of_noised_states_and_of_latents_to_start_from_is_counted(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = 4 * 4 * 4 * 4  # bytes

    def refused(available: int, *settings: str) -> bool:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": available})())
        try:
            Trainer(configure(ODE, *settings))
        except UserError as error:
            assert "GiB are free" in str(error)
            return True
        return False

    # 3 groups of 4 samples; noise, reference and old velocities at 2 levels of each
    awm = ["method=awm", "matching.num_times=2"]
    needed = 3 * 4 * (1 + 2 * 3) * latent
    assert refused(needed - 1, *awm)
    assert not refused(needed, *awm)
    assert not refused(3 * 4 * (1 + 2) * latent, *awm, "kl.weight=0", "anchor.weight=0", "old_policy=null")
    refl = ["method=refl", "direct={low: 2, high: 4}", "rewards=[ink]"]
    assert refused(3 * 4 * 2 * latent - 1, *refl)
    assert not refused(3 * 4 * 2 * latent, *refl)


def test_saved_rollouts_hold_the_samples_of_every_group_in_order(configure: Configure) -> None:
    trainer = Trainer(configure("logging.rollouts_every=2"))
    trainer.iterate(1)
    assert trainer.sampled is None
    trainer.iterate(2)
    kept = trainer.sampled
    assert kept is not None
    indices = trainer.engine.sampler.groups(1)
    assert [p.text for p in kept.prompts] == [trainer.prompts[i].text for i in indices for _ in range(4)]
    assert (kept.iteration, kept.group.tolist()) == (2, [0] * 4 + [1] * 4 + [2] * 4)
    pictures = trainer.policy.decode(kept.latents)
    torch.testing.assert_close(kept.scores["total"].values, pictures.flatten(1).mean(1))


def test_an_iteration_without_a_score_is_an_error_for_samples_too(configure: Configure) -> None:
    trainer = Trainer(configure(ODE, "method=awm", "matching.num_times=2"))
    rollout, _ = trainer.engine.sample(trainer.engine.plan(1), trainer.prompts[:3], [0, 1, 2], 1)
    nothing = {"total": Scores(torch.full((12,), math.nan), torch.zeros(12, dtype=torch.bool))}
    with pytest.raises(UserError, match="12 of the 12 samples of iteration 1 could not be scored"):
        trainer.assign(Sampled(trainer.engine.plan(1), rollout, 0), nothing, trainer.prompts[:3], [0, 1, 2], 1)
