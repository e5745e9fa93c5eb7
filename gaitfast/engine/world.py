"""The processes of a run: who am I, on which device, and a few collective helpers that leave the device alone."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gaitfast.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """What the ranks tell each other travels here, from host to host: no device is waited for. None: the default group,
    which on a CPU is such a group itself."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks; every rank must call it."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def smallest(self, value: int) -> int:
        """The smallest value over the ranks; every rank must call it."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.control)
        return int(tensor.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank must call it."""
        return self.smallest(-int(flag)) < 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks on the main one, [] elsewhere; every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def agree(self, function: Callable[[], T]) -> T:
        """What `function` returns on the main rank, which alone calls it; every rank must call this.

        A UserError there ends every rank: the main one raises it, the others leave without repeating it.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            if self.is_main:
                raise answer[1]
            sys.exit(2)
        return answer[0]


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception says that other processes of the run cannot be reached any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _free_port() -> int:
    """A port for the rendezvous of a single process, drawn high so that two runs on one machine rarely meet."""
    for _ in range(64):
        port = random.SystemRandom().randint(20_000, 60_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free local port for the process group")


def start(timeout: int = 600) -> World:
    """Join the process group: under the `deepspeed` launcher, under torchrun, or as a single process without either.

    A GPU is used when there is one (NCCL), otherwise the CPU (gloo). `timeout`: seconds that a rank waits for the
    others, here and in every exchange, before it gives up.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    import deepspeed  # after DS_ACCELERATOR is settled: the accelerator is chosen at import

    deepspeed.utils.logger.setLevel("WARNING")
    # On a CPU, DeepSpeed would compile its shared-memory collectives at the first start, and a start that is killed
    # meanwhile leaves a lock on which every later one waits for ever. Gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    limit = datetime.timedelta(seconds=timeout)
    try:
        if not dist.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=limit)
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        size = dist.get_world_size()
        control = dist.new_group(backend="gloo", timeout=limit) if cuda and size > 1 else None
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} processes did not meet at {place} within {timeout} s "
            f"({_first(error)}); start all nodes, with the same --master_addr and --master_port"
        ) from None
    return World(dist.get_rank(), size, device, control)


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]


def lost_contact(error: BaseException, world: World, step: int | None) -> UserError:
    """The message for a run whose processes lost each other; `step`: done before, None at the start."""
    when = "at the start" if step is None else f"after step {step}"
    return UserError(
        f"rank {world.rank} of {world.size} lost the other processes {when} ({_first(error)}); "
        "see which of them failed, then start the same command on all nodes: it goes on from the last checkpoint"
    )


@contextlib.contextmanager
def contact(world: World) -> Iterator[None]:
    """Inside, an error that says that the other processes are gone becomes a UserError that says what to do."""
    try:
        yield
    except Exception as error:
        if world.size > 1 and is_lost_contact(error):
            raise lost_contact(error, world, None) from None
        raise


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
