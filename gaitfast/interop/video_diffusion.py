"""Weights of video-diffusion-pytorch 0.6.x (`Unet3D` with GroupNorm) in and out of our denoiser, bit for bit.

The two networks differ in arrangement only. One of our tensors is one or more of theirs, reshaped and stacked along
the first axis (all FiLM layers are one product here), or one that they list under every layer that shares it (the
rotary frequencies).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gaitfast.config import UserError
from gaitfast.models.denoiser import Denoiser

_LISTED = 4
"""Keys that an error message spells out; the others are counted."""


class _Entry(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shared: bool = False


def load_state_dict(model: Denoiser, sd: Mapping[str, Tensor]) -> None:
    """Copy a reference checkpoint into `model`; nothing is copied unless everything fits.

    A Unet3D's state_dict, also as its GaussianDiffusion holds it (`denoise_fn.`) or with `module.` before each key.
    UserError names the missing, unexpected, mis-shaped or non-finite entries.
    """
    for prefix in ("module.", "denoise_fn."):  # beside the network, GaussianDiffusion saves its schedule
        if any(key.startswith(prefix) for key in sd):
            sd = {key.removeprefix(prefix): value for key, value in sd.items() if key.startswith(prefix)}
    entries = list(_entries(model))
    _check(entries, sd)
    own = model.state_dict()
    with torch.no_grad():
        for entry in entries:
            parts = [sd[key] for key in (entry.theirs[:1] if entry.shared else entry.theirs)]
            target = own[entry.ours]
            target.copy_(torch.cat([part.reshape(-1, *target.shape[1:]) for part in parts]))


def state_dict(model: Denoiser) -> dict[str, Tensor]:
    """The weights of `model` under the reference's keys and shapes, copied."""
    return export_tensors(model, model.state_dict())


def export_tensors(model: Denoiser, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that lie beside our parameters (weights, gradients, averages) under the reference's keys and shapes."""
    out = {}
    for entry in _entries(model):
        tensor = tensors[entry.ours].detach()
        rows = [tensor] * len(entry.theirs) if entry.shared else tensor.split([_rows(tensor, s) for s in entry.shapes])
        for key, shape, part in zip(entry.theirs, entry.shapes, rows):
            out[key] = part.reshape(shape).clone()
    return {key: out[key] for key in sorted(out, key=_reference_place)}


def _reference_place(key: str) -> tuple:
    """Where the reference's state_dict has `key`: by top-level module, then by level and by layer within it."""
    top, *rest = key.split(".")
    path = tuple((0, int(name)) if name.isdigit() else (1, _ORDER.index(name)) for name in rest if name != "fn")
    return (_ORDER.index(top), path)


_ORDER = (
    *("null_cond_emb", "time_rel_pos_bias", "relative_attention_bias", "init_conv", "init_temporal_attn", "time_mlp"),
    *("downs", "ups", "mid_block1", "mid_spatial_attn", "mid_temporal_attn", "mid_block2", "final_conv"),
    *("mlp", "block1", "block2", "res_conv", "proj", "rotary_emb", "freqs", "to_qkv", "to_out", "norm", "gamma"),
    *("weight", "bias"),
)
"""The names in the reference's keys in the order in which it registers them."""


def _rows(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """How many rows of `tensor` hold a part of `shape`."""
    return torch.Size(shape).numel() // tensor[0].numel()


def _entries(model: Denoiser) -> Iterator[_Entry]:
    """How every tensor of ours corresponds to the reference's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def entry(ours: str, theirs: str, *, lead: int = 0, inner: int | None = None, trail: int = 0) -> _Entry:
        """`lead` and `trail` axes of length 1 around ours, and one more before axis `inner`: a frame axis, say."""
        shape = list(shapes[ours])
        if inner is not None:
            shape.insert(inner, 1)
        return _Entry(ours, (theirs,), ((1,) * lead + tuple(shape) + (1,) * trail,))

    def convolution(ours: str, theirs: str) -> Iterator[_Entry]:
        yield entry(f"{ours}.weight", f"{theirs}.weight", inner=2)
        yield entry(f"{ours}.bias", f"{theirs}.bias")

    def pointwise(ours: str, theirs: str, axes: int, bias: bool = True) -> Iterator[_Entry]:
        yield entry(f"{ours}.weight", f"{theirs}.weight", trail=axes)
        if bias:
            yield entry(f"{ours}.bias", f"{theirs}.bias")

    def block(ours: str, theirs: str) -> Iterator[_Entry]:
        for i in (1, 2):
            yield from convolution(f"{ours}.conv{i}", f"{theirs}.block{i}.proj")
            yield from pointwise(f"{ours}.norm{i}", f"{theirs}.block{i}.norm", axes=0)
        if f"{ours}.shortcut.weight" in shapes:
            yield from pointwise(f"{ours}.shortcut", f"{theirs}.res_conv", axes=3)

    def attention(ours: str, theirs: str, nested: str, axes: int = 0) -> Iterator[_Entry]:
        yield entry(f"{ours}.norm", f"{theirs}.fn.norm.gamma", lead=1, trail=3)
        yield from pointwise(f"{ours}.qkv", f"{theirs}.{nested}.to_qkv", axes, bias=False)
        yield from pointwise(f"{ours}.out", f"{theirs}.{nested}.to_out", axes, bias=f"{ours}.out.bias" in shapes)

    def stage(ours: str, theirs: str) -> Iterator[_Entry]:
        yield from block(f"{ours}.block1", f"{theirs}.0")
        yield from block(f"{ours}.block2", f"{theirs}.1")
        yield from attention(f"{ours}.sites", f"{theirs}.2", "fn.fn", axes=2)
        yield from attention(f"{ours}.frames", f"{theirs}.3", "fn.fn.fn")

    downs = [f"downs.{i}" for i in range(len(model.down))]
    ups = [f"ups.{i}" for i in range(len(model.up))]
    yield entry("null_condition", "null_cond_emb", lead=1)
    yield from pointwise("time.expand", "time_mlp.1", axes=0)
    yield from pointwise("time.project", "time_mlp.3", axes=0)
    modulated = [f"{s}.{i}" for s in downs for i in (0, 1)] + ["mid_block1", "mid_block2"]
    modulated += [f"{s}.{i}" for s in ups for i in (0, 1)]
    for kind in ("weight", "bias"):
        rest = shapes[f"film.{kind}"][1:]
        parts = tuple((2 * c, *rest) for c in model.film.channels)
        yield _Entry(f"film.{kind}", tuple(f"{b}.mlp.1.{kind}" for b in modulated), parts)
    yield entry("positions.bias.weight", "time_rel_pos_bias.relative_attention_bias.weight")
    temporal = ["init_temporal_attn", *(f"{s}.3" for s in downs), "mid_temporal_attn", *(f"{s}.3" for s in ups)]
    rotary = tuple(f"{layer}.fn.fn.fn.rotary_emb.freqs" for layer in temporal)
    yield _Entry("positions.frequencies", rotary, (shapes["positions.frequencies"],) * len(rotary), shared=True)
    yield from convolution("stem", "init_conv")
    yield from attention("stem_frames", "init_temporal_attn", "fn.fn.fn")
    for i, name in enumerate(downs):
        yield from stage(f"down.{i}", name)
    for i in range(len(model.shrink)):
        yield from convolution(f"shrink.{i}", f"{downs[i]}.4")
    yield from block("middle.block1", "mid_block1")
    yield from attention("middle.sites", "mid_spatial_attn", "fn.fn.fn")
    yield from attention("middle.frames", "mid_temporal_attn", "fn.fn.fn")
    yield from block("middle.block2", "mid_block2")
    for i, name in enumerate(ups):
        yield from stage(f"up.{i}", name)
    for i in range(len(model.grow)):
        yield from convolution(f"grow.{i}", f"{ups[i]}.4")
    yield from block("head_block", "final_conv.0")
    yield from pointwise("head", "final_conv.1", axes=3)


def _check(entries: list[_Entry], sd: Mapping[str, Tensor]) -> None:
    shapes = {key: shape for entry in entries for key, shape in zip(entry.theirs, entry.shapes)}
    missing = [key for key in shapes if key not in sd]
    unexpected = [key for key in sd if key not in shapes]
    problems = [f"{kind} {_list(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    odd = [
        f"{key} is {_describe(sd[key])}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in sd and not (_is_real(sd[key]) and tuple(sd[key].shape) == shape)
    ]
    if odd:
        problems.append(_list(odd))
    if problems:
        raise UserError(
            f"video-diffusion-pytorch checkpoint: {'; '.join(problems)}; "
            "it must hold the state_dict of a 0.6.x Unet3D with the dim and cond_dim of this denoiser"
        )
    for key in shapes:
        if not torch.isfinite(sd[key]).all():
            raise UserError(f"video-diffusion-pytorch checkpoint: {key} holds values that are not finite")
    for entry in entries:
        if entry.shared:
            for key in entry.theirs[1:]:
                if not torch.equal(sd[key], sd[entry.theirs[0]]):
                    raise UserError(
                        f"video-diffusion-pytorch checkpoint: {key} differs from {entry.theirs[0]}, "
                        "but one set of rotary frequencies serves all layers"
                    )


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return str(list(value.shape)) if value.is_floating_point() else f"{list(value.shape)} of {value.dtype}"


def _list(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
