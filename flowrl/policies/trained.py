"""What policies of pictures and of text share: the trained network and its reference, counted evaluations, several processes, parts that fit into memory."""

from __future__ import annotations

import copy
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowrl.memory import fitting_parts, halved
from flowrl.policies.lora import add_lora
from flowrl.sections import ModelConfig
from flowrl.sharding import Company, gathered, shard_network
from flowrl.types import UserError

__all__ = ["NetworkRows", "TrainedPolicy"]

T = TypeVar("T")
_MOST_GRAPHS = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class NetworkRows:
    """Counted network evaluations: one row = one latent, or one token of a text, through the network once."""

    forward: int = 0
    backward: int = 0
    idle: int = 0
    """Of both, what was evaluated only to keep other processes company, see `flowrl.sharding.Company`."""
    padding: int = 0
    """Positions of a text that were evaluated beside these, because the texts of a batch differ in length."""


class TrainedPolicy(ABC):
    """A network that samples and learns; in one process, or shared among several.

    Args:
        config: the ``model`` section of a run.
        device: where the networks live.
        rows_per_forward: most rows (latents, texts) in one forward without gradient.
    """

    title: ClassVar[str]
    """In messages, such as "Stable Diffusion 3"."""
    example: ClassVar[str]
    """A hub id."""
    pipelines: ClassVar[tuple[str, ...]]
    """Names of diffusers' pipeline classes that it trains."""
    medium: ClassVar[str]
    """What it makes, a key of flowrl.engines.ENGINES."""
    smaller_model: ClassVar[str]
    """What to set where not even one row fits into memory."""

    def __init__(self, config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256) -> None:
        self.config, self.device, self.rows_per_forward = config, device, rows_per_forward
        self.dtype = _DTYPES[config.dtype]
        self.network: Any
        self.training_module: nn.Module  # the trainer may wrap it (DDP); the weights are the same
        self.reference_network: nn.Module | None = None
        self.company: Company | None = None  # where the network is sharded
        self.rows = NetworkRows()
        self._reference = False

    @property
    def _weights_dtype(self) -> torch.dtype:
        """Full fine-tuning keeps float32 weights under autocast."""
        return torch.float32 if self.config.adapter == "full" else self.dtype

    @property
    def _adapted(self) -> Any:
        """The module of a library that knows adapters."""
        return self.network

    @property
    def _networks(self) -> list[Any]:
        """The trained one, and the frozen copy where there is one; both are called in the same way."""
        return [self.network] if self.reference_network is None else [self.network, self.reference_network]

    def _make_trainable(self, targets: tuple[str, ...], keep_reference: bool) -> None:
        """Add the adapter, or let the network's own weights learn. To be called once, with all weights frozen."""
        if self.config.adapter == "lora":
            add_lora(self._adapted, self.config.lora, targets)
        else:
            if keep_reference:
                self.reference_network = copy.deepcopy(self.network)
            self.network.requires_grad_(True)

    def _compile(self, networks: Sequence[Any], names: Sequence[str], title: str) -> None:
        """torch.compile as the config says; ``names`` are the classes of a network's repeated blocks."""
        config = self.config
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        if config.compile == "off":
            return
        # beyond torch's limit of 8 graphs, blocks would run as they are without a word: kinds x sizes x gradient x adapters
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        for network in networks:
            blocks = [network] if config.compile == "whole" else [module for module in network.modules() if type(module).__name__ in names]
            if not blocks:
                raise UserError(f"model.compile: {title} names no repeated blocks of {type(network).__name__}; use whole")
            for block in blocks:
                block.compile()

    def _module(self) -> Any:
        """What a forward goes through now."""
        if self._reference and self.reference_network is not None:
            return self.reference_network
        return self.training_module if torch.is_grad_enabled() else self.network

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _fewer_rows(self, rows: int) -> None:
        """Half of a number of rows that did not fit, from now on.

        Raises:
            UserError: there is no smaller number, or the network is sharded.
        """
        if self.company is not None:
            raise UserError(
                f"training.rows_per_forward: {self.rows_per_forward} do not fit into the memory of {self.device}, and the processes of a sharded "
                "network cannot step back together; the last checkpoint is kept: go on with a smaller number"
            )
        self.rows_per_forward = halved("training.rows_per_forward", rows, self.device, help=self.smaller_model)

    def in_parts(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """``work`` on ``count`` >= 1 rows, as many at a time as ``rows_per_forward``, which is halved for good when memory runs out; its results, one a row,
        joined. Without gradient only. What was evaluated in vain is not counted.
        """
        counted = self.rows.forward, self.rows.padding

        def part(rows: slice) -> Tensor:
            nonlocal counted
            counted = self.rows.forward, self.rows.padding
            return work(rows)

        def shrink(rows: int) -> None:
            self.rows.forward, self.rows.padding = counted
            self._fewer_rows(rows)

        return fitting_parts(count, lambda: self.rows_per_forward, part, shrink)

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that learn, in a fixed order."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the network is the one before training: LoRA switched off, or the frozen copy. Without gradient only."""
        if self.config.adapter == "full" and self.reference_network is None:
            raise RuntimeError("full fine-tuning keeps a reference only when it is built with keep_reference=True")
        if self.config.adapter == "lora":
            self._adapted.disable_adapters()
        self._reference = True
        try:
            with torch.no_grad(), self.in_step():
                yield
        finally:
            self._reference = False
            if self.config.adapter == "lora":
                self._adapted.enable_adapters()

    # --- prompts ---

    @staticmethod
    def for_new_prompts(config: ModelConfig) -> ModelConfig:
        """The same model where not all prompts are known beforehand."""
        return config

    def finish_prompts(self, texts: Sequence[str]) -> None:
        """To be called with all prompts of a run, before anything is sampled; a policy of text has nothing to do then."""
        return

    # --- several processes ---

    def shard(self, device: torch.device, timeout_minutes: float) -> None:
        """Share the weights, and the reference's, among all processes; every one must call it, before anything else is done with a policy made on the CPU.

        Args:
            device: where the policy works from now on.
            timeout_minutes: how long a process waits for another one.
        """
        for network in self._networks:
            shard_network(network, device, dtype=self.dtype)
        self.company = Company(self._keep_company, timeout_minutes)
        self.device = device

    def in_step(self) -> AbstractContextManager[None]:
        """Around forwards without gradient, of which the processes may make different numbers; all must enter it."""
        return nullcontext() if self.company is None else self.company.phase()

    def in_step_through(self, parts: Iterable[T]) -> Iterator[T]:
        """`in_step` around a loop over this process's share."""
        with self.in_step():
            yield from parts

    def gathered(self, *, keep: bool) -> AbstractContextManager[None]:
        """Within it, the network is whole and on the CPU, for `export`, on processes that ask to keep it; the others cannot use it. All must enter it."""
        return nullcontext() if self.company is None else gathered(self.network, keep=keep)

    @abstractmethod
    def _keep_company(self) -> None:
        """One forward of one row, without gradient; it is counted as idle."""

    # --- files ---

    @abstractmethod
    def export(self, folder: Path, form: Literal["lora", "network", "pipeline"] | None = None, dtype: torch.dtype | None = None) -> None:
        """Write what the model's own library loads.

        Args:
            form: None = the LoRA, or under full fine-tuning the network. A network or a pipeline takes a LoRA into its weights, after which this policy can
                no longer be trained.
            dtype: of the networks that are written, and so, but for a LoRA, of this policy's from then on; None = as they are.
        Raises:
            OSError: it cannot be written.
            UserError: a weight would become infinite in ``dtype``.
        """

    @abstractmethod
    def load_export(self, folder: Path) -> None:
        """Put exported weights into this policy.

        Raises:
            UserError: the folder holds no export of this kind of adapter.
        """

    @staticmethod
    @contextmanager
    def _writing(folder: Path) -> Iterator[None]:
        """Around safetensors' files: a failed write is an OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except SafetensorError as error:  # how safetensors reports a failed write
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
