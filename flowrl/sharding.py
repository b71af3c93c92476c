"""Fully sharded data parallelism (`training.sharding: fsdp2`): each process keeps its part of the network, the optimiser and the averages.

The network is sharded by torch's `fully_shard` (FSDP2) in the process group that accelerate has made, block by block. Accelerate's own FSDP plugin is not used,
because it (1.10 to 1.15) does nothing on CPUs, so that no test could run it, takes one network a run (the frozen reference is a second one), and casts inputs:
a noise level in bfloat16 is another noise level.

A forward of a sharded network needs all processes, for each gathers the others' parts. In training they make equally many by construction; elsewhere they may
have different numbers of pictures, and `Company` lets those that are done keep the others company with a row of nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "SHARDS",
    "Company",
    "clip_gradients",
    "damaged_shard",
    "digest_of",
    "fit_state",
    "gathered",
    "is_sharded",
    "local",
    "read_shards",
    "shard_like",
    "shard_network",
    "split_shards",
    "whole",
    "write_shards",
]

SHARDS = "shards"
"""The folder of a checkpoint with the sharded tensors, and the state's key for it once it was read."""
_MARK = "__shard__"
_FAMILIES = ("parameters", "optimizer", "ema", "old_policy")
"""Parts of a run's state with a tensor for each parameter."""


# --- tensors --------------------------------------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with the tensor; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(part: Tensor, like: Tensor) -> Tensor:
    """This process's part as a sharded tensor with the shape and the layout of ``like``; as it is, where that is not sharded."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


# --- the network ----------------------------------------------------------------------------------------------------------------------------------


def shard_network(network: nn.Module, device: torch.device, *, dtype: torch.dtype) -> None:
    """Shard a network's parameters over all processes, in place; those on the CPU move to ``device`` block by block, so that it never holds them all.

    Frozen and trainable parameters may have different precisions. Trainable ones in another precision than ``dtype`` stay as they are, only where the whole
    network is trained they are gathered in ``dtype``; gradients are averaged in float32.

    Args:
        network: repeated blocks are those that it names in ``_no_split_modules``, else the members of its module lists.
        dtype: of the computation.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    is_mixed = len({p.dtype for p in network.parameters()}) > 1
    cast = dtype if dtype != torch.float32 and not is_mixed else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32 if cast else None, cast_forward_inputs=False)
    for block in [*_blocks(network), network]:  # the root too gives its parameters back after a forward: weights may be swapped between two forwards
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Inner ones first."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    if found := [module for module in network.modules() if type(module).__name__ in names]:
        return found[::-1]
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


@contextmanager
def gathered(network: nn.Module, *, keep: bool) -> Iterator[None]:
    """Within it, the network is the plain one that was sharded, whole and on the CPU. Every process must enter it.

    Args:
        keep: false = on this process it only helps the others; the network must not be used there.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    kinds: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in network.modules():
        if isinstance(module, FSDPModule):  # fully_shard has given it a class of its own, whose name would be written into files
            kinds.append((module, type(module)))
            module.reshard()  # else taking the state would do so, and put the parts in the place of the whole
        for name, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter):
                found = whole(parameter.detach())
                before.append((module, name, parameter))
                if keep:
                    module._parameters[name] = nn.Parameter(found.cpu(), requires_grad=parameter.requires_grad)
    for module, kind in kinds:
        module.__class__ = next(base for base in kind.__bases__ if base is not FSDPModule)
    try:
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind
        for module, name, parameter in before:
            module._parameters[name] = parameter


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``. The norm before, the same on every process."""
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


class Company:
    """Processes that have made all their forwards of a phase make idle ones until the others have made theirs.

    Without it a process that is done would go on to something else, and the others would wait for its part of the network for ever.

    Args:
        idle: makes one forward of one row, without gradient.
        timeout_minutes: how long to wait for another process.
    """

    def __init__(self, idle: Callable[[], None], timeout_minutes: float) -> None:
        self._idle = idle
        group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))  # on the CPU: no forward waits for a device to answer
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._depth = 0
        self._is_idle = False

    def turn(self) -> None:
        """To be called before every forward; in a phase, it tells the others that one follows."""
        if self._depth and not self._is_idle:
            self.most(1)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Forwards within it need not be equally many on all processes, but all must enter it, in the same state of the network. A phase may lie in another.
        An error leaves it at once.
        """
        if self._depth:
            self._meet()
        self._depth += 1
        try:
            yield
            self._meet()
        finally:
            self._depth -= 1

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return int(found)

    def _meet(self) -> None:
        self._is_idle = True
        try:
            while self.most(0):
                self._idle()
        finally:
            self._is_idle = False


# --- checkpoints ----------------------------------------------------------------------------------------------------------------------------------


def split_shards(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state with marks in place of its sharded tensors, and these by name."""
    found: dict[str, Tensor] = {}

    def replace(path: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = ".".join(map(str, path))
        found[name] = value
        return {_MARK: name}

    plain = _walk(state, replace)
    return (plain if found else state), found


def fit_state(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """A state that was read, with tensors that are sharded as the parameters are, however they lie on the disk. Every process must call it.

    Raises:
        ValueError: a file of the checkpoint cannot be read; the message says why.
    """
    folder = str(state.get(SHARDS, ""))
    if not folder and not any(is_sharded(p) for p in parameters):
        return state
    targets: dict[str, Tensor] = {}

    def replace(path: tuple[Any, ...], value: Any) -> Any:
        if path[0] not in _FAMILIES:
            return value
        index = next((part for part in path if isinstance(part, int)), None)
        if index is None or index >= len(parameters):
            return value
        like = parameters[index].detach()
        if isinstance(value, dict) and set(value) == {_MARK}:
            targets[value[_MARK]] = torch.empty_like(like)
            return targets[value[_MARK]]
        if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return value

    fitted = _walk(state, replace)
    if targets:
        read_shards(Path(folder), targets)
    return fitted


def _walk(value: Any, replace: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """A copy of nested dictionaries and lists with some values replaced."""
    found = replace(path, value) if path else value
    if found is not value:
        return found
    if isinstance(value, Mapping):
        return {key: _walk(part, replace, (*path, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_walk(part, replace, (*path, index)) for index, part in enumerate(value)]
    return value


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Each process writes its parts; every one must call it. ``folder`` must exist on all (a shared file system).

    Returns:
        File name -> sha256, of all processes.
    Raises:
        OSError: a process could not write; on every process.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:
        raise _cause(error) from error
    mine = sorted(folder.glob(f"__{dist.get_rank()}_*")) + ([folder / ".metadata"] if dist.get_rank() == 0 else [])
    return {name: digest for part in _everywhere({file.name: digest_of(file) for file in mine}) for name, digest in part.items()}


def read_shards(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded in any way, with what was saved under their names. Every process must call it where some are sharded.

    Raises:
        ValueError: they cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose, where nothing is sharded
            load(targets, storage_reader=FileSystemReader(folder), no_dist=not any(is_sharded(t) for t in targets.values()))
    except (CheckpointException, OSError) as error:
        raise ValueError(f"cannot be read ({error})") from error


def damaged_shard(folder: Path, digests: Mapping[str, str]) -> str:
    """What is wrong with the files of a checkpoint, or "". Of several processes each looks at its share, and all say the same."""
    is_group = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_group else (0, 1)
    problem = ""
    for name in sorted(digests)[rank::world]:
        file = folder / name
        if not file.is_file():
            problem = f"is incomplete ({folder.name}/{name} is missing)"
        elif digest_of(file) != digests[name]:
            problem = f"is truncated or damaged (checksum of {folder.name}/{name} differs)"
    found = [other for other in (_everywhere(problem) if is_group else [problem]) if other]
    return found[0] if found else ""


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _cause(error: Any) -> Exception:
    """The first OSError that a process met."""
    for failure, _ in error.failures.values():
        while failure is not None:
            if isinstance(failure, OSError):
                return failure
            failure = failure.__cause__ or failure.__context__
    return RuntimeError(str(error))
