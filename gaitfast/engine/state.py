"""What a run has learned, gathered from the ranks by name and dealt out again, whatever their number and ZeRO stage.

    weights/NAME      a parameter in float32, trained or not
    buffers/NAME      a buffer of the module
    exp_avg/NAME ...  one entry per tensor of the optimizer's state; `step/NAME` is its scalar

ZeRO keeps master weights and moments in flat vectors of which each rank holds a part. A `_Piece` says which part of
which parameter lies where in this rank's vectors; all else follows from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from gaitfast.config import UserError
from gaitfast.engine.world import World
from gaitfast.engine.zero import ZeroEngine


class _Piece(NamedTuple):
    """`count` elements of the parameter `name` from `offset` on, at `start` of `flat`."""

    name: str
    offset: int
    count: int
    flat: torch.Tensor
    """Key of the optimizer's state: a flat vector of ZeRO, or at stage 0 the parameter itself."""
    start: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece as it lies in `tensor`, which is `flat` or has its shape: 1-D, float32, a copy on the host."""
        part = tensor.detach().reshape(-1).narrow(0, self.start, self.count)
        return part.to("cpu", torch.float32, copy=True)

    def write(self, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        """Put the piece of `whole`, the parameter's value, where it lies in `tensor`."""
        part = whole.reshape(-1).narrow(0, self.offset, self.count)
        if tensor.shape == whole.shape:  # stage 0, where a parameter may have any memory format
            tensor.data.copy_(part.view(whole.shape))
        else:
            tensor.data.narrow(0, self.start, self.count).copy_(part)


def _pieces(engine: ZeroEngine, rank: int) -> list[_Piece]:
    """Where this rank keeps what of the trained parameters."""
    names = {id(parameter): name for name, parameter in engine.objective.named_parameters()}
    stage, zero = engine.stage, engine.engine.optimizer
    found = []
    if stage == 0:
        for group in engine.engine.basic_optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    found.append(_Piece(names[id(parameter)], 0, parameter.numel(), parameter, 0))
    elif stage < 3:
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if (place := parameter._hp_mapping) is not None:
                    ours, theirs = place.lp_fragment_address, place.hp_fragment_address
                    found.append(_Piece(names[id(parameter)], ours.start, ours.numel, flat, theirs.start))
    else:
        for group in zero.fp16_groups:
            for parameter in group:
                index, start, size = zero.grad_position[zero.get_param_id(parameter)]
                offset = rank * size  # every rank holds as many; the last of them are padding
                if (count := min(size, parameter.ds_numel - offset)) > 0:
                    flat = zero.fp32_partitioned_groups_flat[index]
                    found.append(_Piece(names[id(parameter)], offset, count, flat, start))
    return found


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _buffers(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """Persistent buffers by name."""
    parameters = {name for name, _ in engine.objective.named_parameters()}
    return {name: tensor for name, tensor in engine.objective.state_dict().items() if name not in parameters}


@contextlib.contextmanager
def _gathered(engine: ZeroEngine, parameters: list[torch.nn.Parameter], written: bool) -> Iterator[None]:
    """Whole parameters inside, also at stage 3; with `written`, what the main rank writes there is kept by all."""
    if engine.stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None):
        yield


def collect(engine: ZeroEngine, world: World) -> dict[str, torch.Tensor]:
    """Copy the state to the main rank's memory; the other ranks get {}. Every rank must call it.

    Each rank sends its pieces in one message, so that the traffic is that of the state itself: 12 bytes per parameter.
    Weights, moments and step counts are float32, buffers have their own types.
    """
    state = engine.engine.basic_optimizer.state
    table, parts, steps = [], [], {}
    pieces = _pieces(engine, world.rank)
    if engine.stage == 0 and not world.is_main:
        pieces = []  # every rank holds everything
    for piece in pieces:
        values = {"weights": piece.flat}
        values |= {key: value for key, value in state[piece.flat].items() if torch.is_tensor(value) and value.dim()}
        for key, value in values.items():
            table.append((f"{key}/{piece.name}", piece.name, piece.offset, piece.count))
            parts.append(piece.read(value))
        if "step" in state[piece.flat]:
            steps[f"step/{piece.name}"] = (
                torch.as_tensor(state[piece.flat]["step"]).to("cpu", torch.float32, copy=True).reshape(1)
            )
    # One message per rank; the main rank's own pieces go straight to their places.
    message = torch.cat(parts) if parts and not world.is_main else torch.empty(0)
    if not world.is_main:
        parts.clear()
    trained = engine.trained
    fixed = {name: p for name, p in engine.objective.named_parameters() if id(p) not in trained}
    with _gathered(engine, list(fixed.values()), written=False):
        frozen = {f"weights/{name}": p.detach().to("cpu", torch.float32, copy=True) for name, p in fixed.items()}
    everyone = world.gather((table, steps))
    if not world.is_main:
        if len(message):
            dist.send(message, 0, group=world.control)
        return {}
    shapes = {name: _shape(parameter) for name, parameter in engine.objective.named_parameters()}
    tensors = frozen | {f"buffers/{name}": t.detach().to("cpu", copy=True) for name, t in _buffers(engine).items()}
    for rank, (entries, theirs) in enumerate(everyone):
        tensors |= theirs
        counts = [count for *_, count in entries]
        if rank:
            message = torch.empty(sum(counts))
            if len(message):
                dist.recv(message, rank, group=world.control)
            parts = list(message.split(counts))
        for number, (key, name, offset, count) in enumerate(entries):
            if key not in tensors:
                tensors[key] = torch.empty(shapes[name])
            tensors[key].view(-1).narrow(0, offset, count).copy_(parts[number])
            parts[number] = None
    return tensors


def restore(engine: ZeroEngine, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Give every rank its part of the state that the main rank passes in `tensors`. Every rank must call it.

    UserError if the state is that of another network.
    """
    tensors = _share(tensors, world)
    parameters, buffers = dict(engine.objective.named_parameters()), _buffers(engine)
    wanted = {f"weights/{name}": _shape(p) for name, p in parameters.items()}
    wanted |= {f"buffers/{name}": tensor.shape for name, tensor in buffers.items()}
    found = {key: tensor.shape for key, tensor in tensors.items() if key.startswith(("weights/", "buffers/"))}
    if wanted != found:
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise UserError(f"the checkpoint holds another network ({', '.join(wrong[:3])}); choose another run folder")
    with torch.no_grad():
        with _gathered(engine, list(parameters.values()), written=True):
            if engine.stage < 3 or world.is_main:
                for name, parameter in parameters.items():
                    parameter.data.copy_(tensors[f"weights/{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffers/{name}"])
        _restore_optimizer(engine, tensors, world)


def _restore_optimizer(engine: ZeroEngine, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Master weights and moments; a state that has not stepped yet is made here."""
    optimizer = engine.engine.basic_optimizer
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    kinds = {key.split("/", 1)[0] for key in tensors} - {"weights", "buffers", "step"}
    for piece in _pieces(engine, world.rank):
        piece.write(piece.flat, tensors[f"weights/{piece.name}"])
        state = optimizer.state[piece.flat]
        for kind in sorted(kinds):
            if (value := tensors.get(f"{kind}/{piece.name}")) is not None:
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.flat)
                piece.write(state[kind], value)
        if (step := tensors.get(f"step/{piece.name}")) is not None:
            state["step"] = step.reshape(()).to(piece.flat.device if on_device else "cpu", copy=True)


def _share(tensors: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """The main rank's tensors on every rank, so that only one of the nodes needs the run's disk."""
    if world.size == 1:
        return tensors
    listing = world.agree(lambda: [(key, tuple(t.shape), t.dtype) for key, t in sorted(tensors.items())])
    shared = {}
    for key, shape, dtype in listing:
        shared[key] = tensors[key].contiguous() if world.is_main else torch.empty(shape, dtype=dtype)
        dist.broadcast(shared[key], 0, group=world.control)
    return shared
