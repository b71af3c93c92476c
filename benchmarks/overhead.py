"""What does flowrl add to the bare network? Rollout and training time over the time of the bare transformer on the same rows, in one run.

    python benchmarks/overhead.py --out benchmarks/overhead.md      (make bench)

A: this package's rollout, then its training phase. B: diffusers' transformer called on the same rows with the same batch sizes, forward only and
forward + backward. A and B are timed in turn, A B A B ..., and the median of the ratios is reported, so that a machine whose speed drifts does not
matter. Decoding and scoring the pictures is work of other networks; the row that includes it is for information and has no bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from flowrl.assignment import Assignment
from flowrl.config import load_config
from flowrl.core.advantages import edge_advantages
from flowrl.engines.diffusion import Sampled
from flowrl.seeds import generator
from flowrl.trainer import Trainer
from flowrl.versions import versions
from samplers.forest import concatenate
from samplers.rollout import execute

RECIPES = {
    "window, shared noise (make demo)": [],
    "window, independent noise": ["rollout.same_noise=false"],
    "chain, 9 of 10 steps": ["rollout.plan=chain", "rollout.num_steps=10", "rollout.same_noise=false", "rollout.groups_per_iteration=4"],
}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Case:
    """One recipe: its rollout and training phase, and the bare network on the same rows."""

    def __init__(self, config: Path, overrides: list[str]) -> None:
        # no KL: the reference is one more forward of the same rows, which the bare side does not make
        self.trainer = Trainer(load_config(config, ["run_dir=unused", "kl.weight=0", *overrides]))
        trainer, rollout = self.trainer, self.trainer.config.rollout
        self.prompts = [trainer.prompts[i] for i in trainer.engine.sampler.groups(0)]
        self.prompt_rows = trainer.policy.prompt_rows([p.text for p in self.prompts])
        self.plan = trainer.engine.plan(1)
        self.velocity = trainer.policy.velocity(rollout.guidance_scale)
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rollout = self.roll_out(record=True)
        advantages = torch.randn(len(self.rollout.leaves), generator=torch.Generator().manual_seed(0))
        objective, edges = trainer.config.objective, len(self.rollout.edge_row)
        low, high = torch.full((edges,), objective.clip_low), torch.full((edges,), objective.clip_high)
        edge = edge_advantages(advantages, self.rollout.leaf_edge, edges)
        self.assignment = Assignment(self.rollout, edge, low, high, None, len(self.rollout.row_sigma), False, {})

    def roll_out(self, record: bool = False):  # noqa: ANN201
        trainer = self.trainer
        chunk = max(1, trainer.config.training.rows_per_forward // max(len(wave) for wave in self.plan.waves))

        def recording(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            self.batches.append((x.clone(), sigma, rows))
            return self.velocity(x, sigma, rows)

        parts = []
        for start in range(0, len(self.prompts), chunk):
            numbers = range(start, min(start + chunk, len(self.prompts)))
            generators = [generator(0, "noise", 1, g) for g in numbers]
            rows = self.prompt_rows[start : start + len(generators)]
            velocity = recording if record else self.velocity
            parts.append(execute(velocity, self.plan, rows, generators, trainer.policy.latent_shape, device=trainer.policy.device))
        return concatenate(parts)

    def sample_and_score(self) -> None:
        _, futures = self.trainer.engine.sample(self.plan, self.prompts, list(range(len(self.prompts))), 1)
        for future in futures:
            future.result()

    def train(self) -> None:
        self.trainer.update(Sampled(self.plan, self.rollout, 0), self.assignment, self.prompts, list(range(len(self.prompts))), 1)

    def network(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        policy = self.trainer.policy
        size = self.trainer.config.training.rows_per_forward
        prompts = policy.prompts.take(torch.arange(len(policy.prompts)))
        embeds, pooled = prompts["embeds"], prompts["pooled"]
        out = [
            policy.network(hidden_states=a, timestep=(s * 1000).float(), encoder_hidden_states=embeds[r], pooled_projections=pooled[r], return_dict=False)[0]
            for a, s, r in zip(x.split(size), sigma.split(size), rows.split(size), strict=True)
        ]
        return torch.cat(out)

    def bare_forward(self) -> None:
        with torch.no_grad():
            for batch in self.batches:
                self.network(*batch)

    def bare_forward_backward(self) -> None:
        trainer, rollout = self.trainer, self.rollout
        for rows in trainer.split(rollout.row_group, list(range(len(self.prompts))), (1, 0)):
            for chunk in rows.split(trainer.config.training.rows_per_backward):
                v = self.network(rollout.row_x[chunk], rollout.row_sigma[chunk], self.prompt_rows[rollout.row_group[chunk]])
                v.mean().backward()
            for parameter in trainer.parameters:
                parameter.grad = None


def main(
    out: Annotated[Path, typer.Option(help="the table to write")] = Path("benchmarks/overhead.md"),
    config: Annotated[Path, typer.Option(help="the run to measure")] = Path("configs/tiny_flow_grpo.yaml"),
    rounds: Annotated[int, typer.Option(help="timed rounds of A B")] = 15,
) -> None:
    """Measure, print and write the table."""
    lines = [
        "| recipe | phase | rows | flowrl rows/s | bare rows/s | ratio, median | min | max | bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, overrides in RECIPES.items():
        case = Case(config, overrides)
        phases = (
            ("rollout", case.roll_out, case.bare_forward, case.rollout.forward_rows, "1.15"),
            ("rollout, decoding, scoring", case.sample_and_score, case.bare_forward, case.rollout.forward_rows, ""),
            ("training", case.train, case.bare_forward_backward, len(case.rollout.row_sigma), "1.20"),
        )
        for phase, ours, bare, rows, bound in phases:
            ours(), bare()
            pairs = [(timed(ours), timed(bare)) for _ in range(rounds)]
            ratios = [a / b for a, b in pairs]
            ours_s, bare_s = (statistics.median(column) for column in zip(*pairs, strict=True))
            spread = f"{statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {bound}"
            lines.append(f"| {name} | {phase} | {rows} | {rows / ours_s:.0f} | {rows / bare_s:.0f} | {spread} |")
    facts = versions(torch.device("cpu"))
    machine = f"{facts['cpu']}, {facts['cpu_count']} cores, {facts['threads']} threads; python {facts['python']}, torch {facts['torch']}"
    made_with = f"{machine}, diffusers {facts['diffusers']}; commit {facts['commit']}; {rounds} rounds."
    head = ["# Overhead over the bare network", "", __doc__.split("\n\n")[-1].strip().replace("\n", " "), "", made_with, ""]
    out.write_text("\n".join(head + lines) + "\n", encoding="utf-8")
    typer.echo(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
