"""The five recognition models behind one door: `build_recognizer(name, variant)` and their initialisation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gaitfast.config import UserError
from gaitfast.models import gaitbase, gaitgl, gaitpart, gaitset, smplgait
from gaitfast.models.parts import Backbone, SeparateBNNecks, SeparateFCs

_MODELS = {
    "gaitset": (gaitset.build, gaitset.CHANNELS),
    "gaitpart": (gaitpart.build, gaitpart.LAYERS),
    "gaitgl": (gaitgl.build, gaitgl.LARGE),
    "smplgait": (smplgait.build, smplgait.NETWORKS),
    "gaitbase": (gaitbase.build, gaitbase.CHANNELS),
}

VARIANTS = {name: tuple(variants) for name, (_, variants) in _MODELS.items()}
"""Model name -> the variants (training sets) that it exists for."""

INITIALIZATIONS = ("xavier_uniform", "xavier_normal", "he")


class Recognition(NamedTuple):
    """What a recognizer returns."""

    features: Tensor
    """(N, C, P): what the backbone returns, the condition of pretraining."""
    embedding: Tensor
    """(N, E, P): for the triplet loss and for retrieval."""
    logits: Tensor | None
    """(N, K, P) per part, or None: GaitSet and GaitPart have no classifier, nor has a model without `num_classes`."""


class Recognizer(nn.Module):
    """A backbone and its head. `backbone` is a module of its own; see `parts.Backbone` for what it takes."""

    def __init__(self, name: str, variant: str, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.variant = variant
        self.backbone = backbone
        self.head = head

    @property
    def feature_channels(self) -> int:
        """C of the features (N, C, P)."""
        return self.backbone.feature_channels

    @property
    def feature_parts(self) -> int:
        """P of the features (N, C, P)."""
        return self.backbone.feature_parts

    @property
    def sampling(self) -> tuple[str, int]:
        """The authors' rule for picking frames: ("unordered" | "ordered", frames skipped)."""
        return self.backbone.sampling

    def forward(self, silhouettes: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Recognition:
        """silhouettes: float in [0, 1], (N, S, 64, 44), or packed (1, sum(lengths), 64, 44) with `lengths` (N,)."""
        features = self.backbone(silhouettes, lengths)
        return Recognition(features, *self.head(features))


def build_recognizer(
    name: str, variant: str, num_classes: int | None = None, *, width: float = 1.0, seed: int = 0
) -> Recognizer:
    """The model `name` as published for the dataset `variant`, initialised from `seed` as OpenGait does.

    num_classes: identities of the training set; None builds no classifier (the embedding is there all the same).
    width: multiplies every channel count, rounded to multiples of 8; 1 is the published network.
    UserError for an unknown name or variant, or values out of range.
    """
    if name not in _MODELS:
        raise UserError(f"backbone.name: {name!r} is unknown; {_suggest(name, _MODELS)}")
    build, variants = _MODELS[name]
    if variant not in variants:
        raise UserError(f"backbone.variant: {name} has no {variant!r}; {_suggest(variant, variants)}")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes: must be positive or None, got {num_classes}")
    if not (math.isfinite(width) and width > 0):
        raise UserError(f"backbone.width: must be positive, got {width}")
    with torch.random.fork_rng(devices=[]):  # PyTorch's own initialisation must not advance the caller's generator
        model = Recognizer(name, variant, *build(variant, num_classes, width))
    initialize(model, seed=seed)
    return model


def _suggest(word: str, choices: Collection[str]) -> str:
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return (f"did you mean {near[0]}? " if near else "") + f"choose one of {', '.join(choices)}"


@torch.no_grad()
def initialize(model: nn.Module, method: str = "xavier_uniform", seed: int = 0) -> None:
    """Draw every weight of a recognizer, or of its backbone alone, anew from an explicit generator.

    Convolutions by `method`: "xavier_uniform" (OpenGait's), "xavier_normal" or "he" (the paper's A.9). The matrices of
    the heads are Xavier uniform whatever the method, batch norm weights come from N(1, 0.02), biases are 0, running
    statistics are cleared. The backbone is drawn first, so it does not depend on the head or on the number of classes.
    Parameters on the meta device are skipped.
    """
    if method not in INITIALIZATIONS:
        raise UserError(f"initialization: {method!r} is unknown; {_suggest(method, INITIALIZATIONS)}")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            _draw(module.weight, method, generator, module.groups)
        elif isinstance(module, (SeparateFCs, SeparateBNNecks)):
            _draw(module.weight, "xavier_uniform", generator)
        elif isinstance(module, gaitgl.GeneralizedMean):
            module.exponent.fill_(module.INITIAL)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.reset_running_stats()
            _fill(module.weight, lambda out: out.normal_(1.0, 0.02, generator=generator))
            module.bias.zero_()


def _draw(weight: Tensor, method: str, generator: torch.Generator, groups: int = 1) -> None:
    # The three-dimensional matrices (P, in, out) of the heads take the fans of a one-dimensional convolution, as in
    # OpenGait: fan_in = in * out, fan_out = P * out. Parts that are groups here are convolutions of their own there.
    receptive = weight[0, 0].numel()
    fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] // groups * receptive
    if method == "xavier_uniform":
        bound = math.sqrt(6 / (fan_in + fan_out))
        _fill(weight, lambda out: out.uniform_(-bound, bound, generator=generator))
    else:
        std = math.sqrt(2 / (fan_in + fan_out) if method == "xavier_normal" else 2 / fan_in)
        _fill(weight, lambda out: out.normal_(0.0, std, generator=generator))


def _fill(parameter: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Draw on the CPU in memory order of the shape, so that neither device nor memory format changes the numbers."""
    if parameter.device.type != "meta":
        parameter.copy_(draw(torch.empty(parameter.shape, dtype=torch.float32, device="cpu")))
