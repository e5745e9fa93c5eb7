"""OpenGait checkpoints in and out: its key names live here and nowhere else.

`state_dict` and `load_state_dict` are exact inverses of each other: the same tensors under the same keys, in OpenGait's
order. Loading is all or nothing: every key and shape is checked before the first weight changes.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gaitfast.config import UserError
from gaitfast.models.recognizer import VARIANTS, Recognizer, build_recognizer

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CLASSIFIERS = ("BNNecks.", "Head1.")
TRAINING_IDENTITIES = {"casia-b": 74, "gait3d": 3000, "ou-mvlp": 5153, "grew": 20000}
"""Classes of the published checkpoints: the identities of each training set."""


class LoadReport(NamedTuple):
    """What `load_state_dict` did with every key; nothing is dropped without being named here."""

    loaded: list[str]
    """OpenGait's keys whose values are in the model now."""
    ignored: list[str]
    """OpenGait's keys that were not asked for: the head for part="backbone", the classifier without `num_classes`."""
    untouched: list[str]
    """Entries of the model's own state dict that keep their value: the head for part="backbone"."""


class _Entry(NamedTuple):
    key: str
    """OpenGait's name."""
    own: str
    """Ours, in `Recognizer.state_dict()`."""
    part: tuple[int, int] | None = None
    """(p, P): the p-th of P equal slices of our tensor, where OpenGait has a module per part."""


class Checkpoint(NamedTuple):
    """What is read from a file of OpenGait."""

    weights: dict[str, Tensor]
    """On the CPU, under OpenGait's keys."""
    iteration: int | None
    """None where the file does not say."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """An OpenGait checkpoint (a dict with the entry "model") or a bare state dict.

    Only tensors and plain containers are unpickled: a file that wants to run code is refused. UserError otherwise.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:  # by its content: given a name, torch.load goes by the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it is no checkpoint of plain tensors; save its state_dict alone") from None
    except Exception as error:  # torch.load documents no set of errors for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a readable PyTorch checkpoint ({reason}); copy or download it again") from None
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f'{path}: holds no state dict, neither as entry "model" nor as a whole')
    for key, value in weights.items():  # a view may claim any size
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {key} repeats a smaller tensor, which no trained weight does; get another copy")
    iteration = content.get("iteration")
    return Checkpoint(dict(weights), iteration if type(iteration) is int and iteration >= 0 else None)


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of `read_checkpoint`."""
    return read_checkpoint(path).weights


def write_checkpoint(path: str | Path, weights: Mapping[str, Tensor], iteration: int) -> None:
    """A file that OpenGait restores from, without optimizer and scheduler, which it then starts anew."""
    torch.save({"model": OrderedDict(weights), "iteration": iteration}, path)


def keys(model: Recognizer, part: str = "all") -> list[str]:
    """OpenGait's keys of the model, in its order."""
    return [entry.key for entry in _select(model, part)]


def state_dict(model: Recognizer, part: str = "all", *, old_bnneck_order: bool = False) -> dict[str, Tensor]:
    """A copy of the model's weights under OpenGait's keys, in its order, contiguous. part: "all" or "backbone"."""
    own = model.state_dict()
    exported = {}
    for entry in _select(model, part):
        value = _slice(own[entry.own].detach(), entry)
        if old_bnneck_order and _is_neck_norm(entry.key, value):
            value = _swap_neck_order(value, model.feature_parts, to_old=True)
        exported[entry.key] = value.clone(memory_format=torch.contiguous_format)
    return exported


@torch.no_grad()
def load_state_dict(
    model: Recognizer, sd: Mapping[str, Tensor], part: str = "all", *, old_bnneck_order: bool = False
) -> LoadReport:
    """Copy OpenGait's weights into `model`, all or none of them.

    sd: OpenGait's keys -> tensors; a "module." in front of the keys is dropped.
    part: "all", or "backbone" for what makes the features (N, C, P) and nothing else.
    old_bnneck_order: the checkpoint's BN neck is indexed part * C + channel, as in OpenGait before it changed the order
    without renaming the keys. It touches the logits alone and cannot be detected from the file.

    UserError for missing, unknown or doubled keys, other shapes, values that are not finite.
    """
    wanted = _select(model, part)
    weights = _strip_prefix(sd)
    used = {entry.key for entry in wanted}
    surplus = [key for key in weights if key not in used]
    if part == "backbone":
        ignored = surplus
    else:
        without = not used.intersection(f"{name}fc_bin" for name in _CLASSIFIERS)
        ignored = [key for key in surplus if without and key.startswith(_CLASSIFIERS)]
    unknown = [key for key in surplus if key not in ignored]
    missing = [entry.key for entry in wanted if entry.key not in weights]
    if missing or unknown:
        problems = " and ".join(_enumerate(*pair) for pair in (("lacks", missing), ("has unknown", unknown)) if pair[1])
        raise UserError(f"checkpoint: {problems} for {_describe(model)}; {_advise(model, weights)}")

    own = model.state_dict()
    targets = [_slice(own[entry.own], entry) for entry in wanted]
    for entry, target in zip(wanted, targets):
        _check(model, entry.key, weights[entry.key], target)
    for entry, target in zip(wanted, targets):
        value = weights[entry.key]
        if old_bnneck_order and _is_neck_norm(entry.key, value):
            value = _swap_neck_order(value, model.feature_parts, to_old=False)
        target.copy_(value)
    loaded = {entry.own for entry in wanted}
    return LoadReport([entry.key for entry in wanted], ignored, [key for key in own if key not in loaded])


def identify(sd: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The (name, variant) pairs, at published width, whose backbone these OpenGait weights hold; empty if none does.

    Of those, the ones that leave the fewest keys without a place: GaitPart's network contains another one's, and
    variants differ in the head. First the variant that has as many training identities as the file has classes.
    """
    weights = _strip_prefix(sd)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    classes = num_classes(weights)
    fits: dict[tuple[str, str], int] = {}
    for name, variants in VARIANTS.items():
        for variant in variants:
            with torch.device("meta"):
                model = build_recognizer(name, variant, classes)
            own = model.state_dict()
            placed = [e for e in _select(model, "all") if shapes.get(e.key) == tuple(_slice(own[e.own], e).shape)]
            if {e.key for e in _select(model, "backbone")} <= {e.key for e in placed}:
                fits[name, variant] = len(weights) - len(placed)
    best = [fit for fit, surplus in fits.items() if surplus == min(fits.values())]
    return sorted(best, key=lambda fit: TRAINING_IDENTITIES.get(fit[1].removesuffix("-bnneck")) != classes)


def holds_head(model: Recognizer, sd: Mapping[str, Tensor]) -> bool:
    """Whether any of these OpenGait keys belongs to the model's head."""
    head = set(keys(model)) - set(keys(model, "backbone"))
    return not head.isdisjoint(_strip_prefix(sd))


def num_classes(sd: Mapping[str, Tensor]) -> int | None:
    """The classes that these OpenGait weights were trained for; None without a classifier."""
    weights = _strip_prefix(sd)
    for key in (f"{name}fc_bin" for name in _CLASSIFIERS):
        if key in weights:
            shape = tuple(weights[key].shape)
            if len(shape) != 3:
                raise UserError(
                    f"checkpoint: {key} has shape {shape}, not (parts, channels, classes); get another copy"
                )
            return shape[2]
    return None


def _strip_prefix(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key, value in sd.items():
        name = key.removeprefix("module.")
        if name in weights:
            raise UserError(f"checkpoint: {name} is there twice, with and without 'module.'; keep one of the two")
        if not isinstance(value, Tensor):
            raise UserError(f"checkpoint: {name} is no tensor; OpenGait's weights are the entry 'model' of its files")
        weights[name] = value
    return weights


def _check(model: Recognizer, key: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        if key.startswith(_CLASSIFIERS) and value.dim() == 3 and value.shape[:2] == target.shape[:2]:
            raise UserError(
                f"checkpoint: {key} has {value.shape[2]} classes, the model {target.shape[2]}; build the model for"
                f" {value.shape[2]} classes or for none, or load the backbone alone"
            )
        raise UserError(
            f"checkpoint: {key} has shape {tuple(value.shape)}, {_describe(model)} needs {tuple(target.shape)};"
            " choose the variant and width that the checkpoint was trained with"
        )
    if value.is_floating_point() != target.is_floating_point():
        raise UserError(f"checkpoint: {key} holds {value.dtype}, needs {target.dtype}; the file is not OpenGait's")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UserError(f"checkpoint: {key} holds values that are not finite; take an earlier checkpoint")


def _describe(model: Recognizer) -> str:
    return f"{model.name}/{model.variant}"


def _enumerate(what: str, keys: list[str]) -> str:
    return f"{what} {len(keys)} keys ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"


def _advise(model: Recognizer, weights: Mapping[str, Tensor]) -> str:
    fits = identify(weights)
    if (model.name, model.variant) in fits:
        return "the backbone fits, load it alone"
    if fits:
        return f"the file looks like {' or '.join('/'.join(fit) for fit in fits)}"
    return "it fits none of the known models at published width"


def _is_neck_norm(key: str, value: Tensor) -> bool:
    return key.startswith("BNNecks.bn1d.") and value.dim() == 1


def _swap_neck_order(value: Tensor, parts: int, *, to_old: bool) -> Tensor:
    """Reorder (C * P,) between today's index channel * P + part and the old part * C + channel."""
    rows = value.numel() // parts if to_old else parts
    return value.reshape(rows, -1).t().reshape(-1)


def _slice(value: Tensor, entry: _Entry) -> Tensor:
    if entry.part is None:
        return value
    number, parts = entry.part
    return value.unflatten(0, (parts, -1))[number]


def _select(model: Recognizer, part: str) -> list[_Entry]:
    """The model's entries in the order of OpenGait's state dict; each of ours is used exactly once."""
    assert part in ("all", "backbone"), f"part is all or backbone, got {part!r}"
    own = model.state_dict()
    entries = [e for e in _MODELS[model.name](model) if e.own in own]
    return [e for e in entries if part == "all" or e.own.startswith("backbone.")]


def _norm(key: str, own: str) -> Iterator[_Entry]:
    return (_Entry(f"{key}.{name}", f"{own}.{name}") for name in _NORM)


def _neck() -> Iterator[_Entry]:
    yield _Entry("BNNecks.fc_bin", "head.neck.weight")
    yield from _norm("BNNecks.bn1d", "head.neck.norm")


def _stack(model: Recognizer, key: str, name: str) -> Iterator[_Entry]:
    """A `ConvStack` as OpenGait's Sequential, which counts activations and poolings as layers too."""
    position = 0
    for number, layer in enumerate(model.backbone.get_submodule(name).layers):
        yield _Entry(f"{key}.{position}.conv.weight", f"backbone.{name}.convs.{number}.weight")
        position += 3 if layer.pool else 2


def _gaitset(model: Recognizer) -> Iterator[_Entry]:
    for number in (1, 2, 3):
        yield from _stack(model, f"set_block{number}.forward_block", f"block{number}")
    for number in (2, 3):
        yield from _stack(model, f"gl_block{number}", f"global{number}")
    yield _Entry("Head.fc_bin", "head.embed.weight")


def _gaitpart(model: Recognizer) -> Iterator[_Entry]:
    yield from _stack(model, "Backbone.forward_block.feature", "frames")
    yield _Entry("Head.fc_bin", "head.embed.weight")
    parts = model.feature_parts
    for foreign, own in (("conv1d3x1", "motion3"), ("conv1d3x3", "motion5")):
        for number in range(parts):
            for position, layer in ((0, "squeeze"), (2, "score")):
                key = f"TFA.pooling_func.{foreign}.{number}.{position}.conv.weight"
                yield _Entry(key, f"backbone.{own}.{layer}.weight", (number, parts))


def _gaitgl(model: Recognizer) -> Iterator[_Entry]:
    for number in range(len(model.backbone.stem)):
        yield _Entry(f"conv3d.{2 * number}.conv3d.weight", f"backbone.stem.{number}.weight")
    yield _Entry("LTA.0.conv3d.weight", "backbone.time_pool.weight")
    for foreign, own in (("GLConvA0", "stage1"), ("GLConvA1", "stage2"), ("GLConvB2", "stage3")):
        layers = len(model.backbone.get_submodule(own))
        for number in range(layers):
            key = foreign if layers == 1 else f"{foreign}.{number}"
            yield _Entry(f"{key}.global_conv3d.conv3d.weight", f"backbone.{own}.{number}.whole.weight")
            yield _Entry(f"{key}.local_conv3d.conv3d.weight", f"backbone.{own}.{number}.local.weight")
    yield _Entry("HPP.p", "backbone.row_pool.exponent")
    yield _Entry("Head0.fc_bin", "head.embed.weight")
    yield from _norm("Bn", "head.norm")
    yield _Entry("Head1.fc_bin", "head.classifier.weight")
    yield from _neck()


def _smplgait(model: Recognizer) -> Iterator[_Entry]:
    yield from _stack(model, "Backbone.forward_block.feature", "frames")
    yield _Entry("FCs.fc_bin", "head.embed.weight")
    yield from _neck()


def _gaitbase(model: Recognizer) -> Iterator[_Entry]:
    trunk = "Backbone.forward_block"
    yield _Entry(f"{trunk}.conv1.conv.weight", "backbone.conv.weight")
    yield from _norm(f"{trunk}.bn1", "backbone.norm")
    for number in range(len(model.backbone.blocks)):
        key, own = f"{trunk}.layer{number + 1}.0", f"backbone.blocks.{number}"
        for layer in (1, 2):
            yield _Entry(f"{key}.conv{layer}.weight", f"{own}.conv{layer}.weight")
            yield from _norm(f"{key}.bn{layer}", f"{own}.norm{layer}")
        yield _Entry(f"{key}.downsample.0.weight", f"{own}.project.0.weight")
        yield from _norm(f"{key}.downsample.1", f"{own}.project.1")
    yield _Entry("FCs.fc_bin", "head.embed.weight")
    yield from _neck()


_MODELS = {
    "gaitset": _gaitset,
    "gaitpart": _gaitpart,
    "gaitgl": _gaitgl,
    "smplgait": _smplgait,
    "gaitbase": _gaitbase,
}
