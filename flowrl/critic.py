"""AC-Flow's critic: a small network that predicts a sample's shaped reward from a noisy latent of it, and when the actor may listen to it.

The actor is trained with A(x_sigma) = clip(r - V(x_sigma, sigma, prompt), -A_max, A_max) instead of the shaped reward r itself. The critic learns alone
during a warm-up, then until it explains enough of the rewards (the gate); after that the advantages grow to their full size over a ramp.

Source: AC-Flow, arXiv:2510.18072. Verified in its abstract: a light critic of intermediate states, shaped (normalised) rewards, clipped advantages and a
warm-up before the critic influences the actor. A second-hand summary adds that the critic regresses on the final reward and is made of convolutions and
normalised perceptron layers. No code or appendix was available: sizes, loss, averaging, ramp and gate are our reading.

Letters: B samples, S latents of a sample, R or N rows (latents), P prompts, L = (C, h, w) a latent's shape, D size of a pooled prompt embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.policies.ema import Ema
from flowrl.sections import CriticConfig
from flowrl.seeds import derive_seed
from flowrl.types import UserError

__all__ = ["Critic", "CriticNetwork", "critic_advantages", "potential_rewards"]

_FREQUENCIES = 32  # of the encoding of sigma
_RUNNING_DECAY = 0.9  # of the explained variance that the gate looks at


def critic_advantages(shaped: Tensor, value: Tensor, clip: float) -> Tensor:
    """A = clip(r - V, -clip, clip).

    Args:
        shaped: [B] the samples' shaped rewards. value: [B, S] of S latents of each. clip: A_max > 0.
    Returns:
        [B, S].
    """
    return (shaped[:, None] - value).clamp(-clip, clip)


def potential_rewards(shaped: Tensor, value: Tensor) -> Tensor:
    """The reward of each step of a path: r_k = V(x_(k+1)) - V(x_k), where the last step ends in the sample and V there is its shaped reward.

    They telescope: the rewards from step k on sum to shaped - V(x_k), which is the advantage of `critic_advantages` before the clip.

    Args:
        shaped: [B]. value: [B, S] along each path, in the order of sampling (from noise), without the sample itself.
    Returns:
        [B, S].
    """
    return torch.cat([value, shaped[:, None]], 1).diff(dim=1)


def _sinusoidal(sigma: Tensor) -> Tensor:
    """[R] -> [R, 2 x 32]: sine and cosine of 1000 sigma 10000^(-i/32), i = 0..31."""
    frequency = torch.exp(torch.arange(_FREQUENCIES, device=sigma.device, dtype=sigma.dtype) * (-math.log(10_000) / _FREQUENCIES))
    angle = 1000 * sigma[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class _Block(nn.Module):
    """Convolution with stride 2, group norm, a scale and a shift from the embedding (FiLM), SiLU.

    Groups have four channels or more: with one, a latent that has shrunk to 1 x 1 would be normalised to nothing.
    """

    def __init__(self, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, max(1, width // 4), width), width)
        self.film = nn.Linear(hidden, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        return F.silu(self.norm(self.convolution(x)) * (1 + scale) + shift)


class CriticNetwork(nn.Module):
    """V(x_sigma, sigma, prompt): stride-2 blocks, the mean over space, a multilayer perceptron. Its last layer is zero at the start: V = 0.

    Rows do not see each other, and any latent size will do (64 x 64 with the default widths; 8 x 8 shrinks to 1 x 1). With SD3's 16 channels and
    pooled embeddings of 2048 and the default widths it has 1.9 million parameters.
    """

    def __init__(self, channels: int, pooled_dim: int, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.sigma = nn.Linear(2 * _FREQUENCIES, hidden)
        self.pooled = nn.Linear(pooled_dim, hidden)
        self.blocks = nn.ModuleList(_Block(before, width, hidden) for before, width in zip([channels, *widths], widths, strict=False))
        self.middle = nn.Linear(widths[-1], hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor, pooled: Tensor) -> Tensor:
        """
        Args:
            x: [R, C, h, w]. sigma: [R] in [0, 1]. pooled: [R, D].
        Returns:
            [R] of the parameters' type, float32 in a `Critic`.
        """
        x, sigma, pooled = (tensor.to(self.last.weight.dtype) for tensor in (x, sigma, pooled))
        embedding = F.silu(self.sigma(_sinusoidal(sigma)) + self.pooled(pooled))
        for block in self.blocks:
            x = block(x, embedding)
        out: Tensor = self.last(F.silu(self.middle(x.mean((2, 3)))))
        return out.squeeze(1)


class Critic:
    """The network, its average that the actor sees, its optimiser, and the gate. Each iteration (counted from 1): `value`, `fit`, `update_gate`, `strength`.

    The same on every process. It never changes the state of a global random generator.

    Args:
        channels, pooled_dim: C and D of the policy.
    """

    def __init__(self, config: CriticConfig, *, channels: int, pooled_dim: int, device: torch.device, seed: int) -> None:
        self.config, self.device = config, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "critic"))  # the CPU's only: the same weights on every device
            self.network = CriticNetwork(channels, pooled_dim, config.widths, config.hidden).to(device)
        self.parameters = list(self.network.parameters())
        self.target = Ema(self.parameters, decay=config.target_decay, every=1, warmup=False)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        self.explained_variance = 0.0  # running average; V = 0 explains nothing
        self.opened: int | None = None  # the iteration in which the gate opened

    @torch.no_grad()
    def value(self, x: Tensor, sigma: Tensor, prompt_row: Tensor, *, pooled: Tensor) -> Tensor:
        """V of rows by the averaged network, without gradient.

        Args:
            x: [N, C, h, w]. sigma: [N]. prompt_row: [N] int64 into ``pooled`` [P, D]. Each on any device.
        Returns:
            [N] float32 on the CPU, where advantages are computed.
        """
        if not self.config.enabled:
            return torch.zeros(len(x))
        with self.target.applied():
            parts = [self._predict(x, sigma, prompt_row, pooled, rows) for rows in torch.arange(len(x)).split(self.config.batch_rows)]
        return torch.cat(parts).cpu()

    def fit(
        self,
        x: Tensor,
        sigma: Tensor,
        prompt_row: Tensor,
        target: Tensor,
        valid: Tensor,
        *,
        pooled: Tensor,
        generator: torch.Generator,
        accelerator: Accelerator,
        numbers: Tensor | None = None,
        value: Tensor | None = None,
    ) -> dict[str, float | None]:
        """The critic's updates of an iteration: each is a step of Adam on the mean Huber loss (delta 1) of ``batch_rows`` random rows of all processes.

        Every process must call it, also one that has no row.

        Args:
            x, sigma, prompt_row, pooled: as in `value`. target: [N] shaped rewards; anything, as x, where not valid. valid: [N] bool.
            generator: of the CPU, in the same state on every process.
            numbers: [N] int64, a number for each row that no other row of any process has. Rows are drawn by them: with numbers that do not depend on
                how rows are dealt to processes, neither does the training.
            value: [N] what `value` says of these rows, if it was asked before.
        Returns:
            ``critic/loss``, the mean over the updates, and over the valid rows of all processes, before the updates and with the averaged network:
            ``critic/explained_variance`` 1 - Var(target - V) / Var(target) and ``critic/value_mean``. None where they are not defined. Nothing if disabled.
        Raises:
            UserError: a gradient is not finite.
        """
        if not self.config.enabled:
            return {}
        valid, target = valid.cpu(), target.detach().cpu().double()
        value = self.value(x, sigma, prompt_row, pooled=pooled) if value is None else value.cpu()
        if numbers is None:
            numbers = torch.arange(len(x)) * accelerator.num_processes + accelerator.process_index
        facts = torch.stack([target[valid], value[valid].double()])
        numbers = numbers.cpu()
        everywhere = [(numbers[valid], facts)]
        if accelerator.num_processes > 1:
            everywhere = gather_object(everywhere)
        order, place = torch.cat([n for n, _ in everywhere]).sort()
        metrics = self._measure(torch.cat([f for _, f in everywhere], 1)[:, place])
        if not len(order):
            return {"critic/loss": None, **metrics}
        loss = 0.0
        for _ in range(self.config.updates_per_iteration):
            drawn = order[torch.randperm(len(order), generator=generator)[: self.config.batch_rows]]
            rows = torch.nonzero(torch.isin(numbers, drawn)).squeeze(1)
            loss += self._update(x, sigma, prompt_row, target, pooled, rows, len(drawn), accelerator)
        return {"critic/loss": loss / self.config.updates_per_iteration, **metrics}

    def _predict(self, x: Tensor, sigma: Tensor, prompt_row: Tensor, pooled: Tensor, rows: Tensor) -> Tensor:
        """V of some rows by the network as it is, on its device."""
        index = prompt_row[rows.to(prompt_row.device)].to(pooled.device)
        chosen = x[rows.to(x.device)], sigma[rows.to(sigma.device)], pooled[index]
        out: Tensor = self.network(*(tensor.detach().to(self.device) for tensor in chosen))
        return out

    def _measure(self, facts: Tensor) -> dict[str, float | None]:
        """Metrics of [2, N'] targets and values, and the running explained variance."""
        target, value = facts
        if not len(target):
            return {"critic/explained_variance": None, "critic/value_mean": None}
        spread = target.var(correction=0)
        explained = None
        if spread > 1e-12 * target.square().mean():  # else all targets are equal up to rounding: there is nothing to explain
            explained = 1 - ((target - value).var(correction=0) / spread).item()
            self.explained_variance = _RUNNING_DECAY * self.explained_variance + (1 - _RUNNING_DECAY) * explained
        return {"critic/explained_variance": explained, "critic/value_mean": value.mean().item()}

    def _update(
        self, x: Tensor, sigma: Tensor, prompt_row: Tensor, target: Tensor, pooled: Tensor, rows: Tensor, count: int, accelerator: Accelerator
    ) -> float:
        """One step on these rows of this process, which are some of the ``count`` rows of all. The loss over all of them."""
        gradients, loss = [torch.zeros_like(p) for p in self.parameters], torch.zeros((), device=self.device)
        if len(rows):
            value = self._predict(x, sigma, prompt_row, pooled, rows)
            loss = F.huber_loss(value, target[rows].to(value), reduction="sum") / count
            gradients = list(torch.autograd.grad(loss, self.parameters))
        flat = torch.cat([g.flatten() for g in [*gradients, loss.detach()]])
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(flat, "sum")
        if not torch.isfinite(flat).all():
            raise UserError("the critic's gradient is no longer finite; the last checkpoint is intact: lower critic.learning_rate or look at the rewards")
        for parameter, gradient in zip(self.parameters, flat[:-1].split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target.update()
        return flat[-1].item()

    # --- the gate ---

    def update_gate(self, iteration: int) -> None:
        """Open the gate if the warm-up is over and the critic is good enough. It stays open.

        Args:
            iteration: >= 1, the one whose `fit` was just done.
        Raises:
            UserError: it has stayed shut for too many iterations.
        """
        c = self.config
        waited = iteration - c.warmup_iterations
        if self.opened is not None or waited < 1:
            return
        if not c.enabled or self.explained_variance > c.gate:
            self.opened = iteration
        elif waited >= c.gate_patience:
            raise UserError(
                f"critic.gate: {waited} iterations after the warm-up the critic explains {self.explained_variance:.3g} of the rewards' variance, not more than "
                f"{c.gate:g}; give it more updates (critic.updates_per_iteration), a larger critic.learning_rate or critic.gate_patience, or lower critic.gate"
            )

    def strength(self, iteration: int) -> float:
        """What the actor's advantages are multiplied with: 0 until the gate opens, then 1/ramp, 2/ramp, ..., 1."""
        if self.opened is None or iteration < self.opened:
            return 0.0
        return min(1.0, (iteration - self.opened + 1) / max(1, self.config.ramp_iterations))

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "explained_variance": self.explained_variance,
            "opened": self.opened,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`; the learning rate is the config's, which may have been changed on purpose.

        Raises:
            UserError: the network has other sizes than the config's.
        """
        theirs, ours = ({name: tuple(p.shape) for name, p in s.items()} for s in (state["network"], self.network.state_dict()))
        if theirs != ours:
            raise UserError("the critic of the checkpoint has other sizes; critic.widths and critic.hidden cannot be changed on a resume")
        self.network.load_state_dict(state["network"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate
        self.explained_variance, self.opened = state["explained_variance"], state["opened"]
