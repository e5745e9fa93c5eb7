"""What a run will need before it starts: memory of one process, from the config and, for transfer, the dataset's index.

Weights, gradients and moments are counted. What the forward pass keeps for the backward pass is measured: two and three
clips go through the networks as they are, with the operations of this machine, and the rest is in proportion.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gaitfast.config import PretrainConfig, TransferConfig, batch_per_rank, load, to_dict, zero_stage
from gaitfast.data.packed import PackedDataset
from gaitfast.data.sampling import PeopleSampler
from gaitfast.diffusion import NoiseSchedule, loss_weights
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.engine.memory import BASE, Estimate, describe, free_bytes, saved_bytes, states
from gaitfast.engine.zero import TYPES
from gaitfast.interop.opengait import TRAINING_IDENTITIES
from gaitfast.models import build_denoiser, build_recognizer
from gaitfast.models.recognizer import Recognizer
from gaitfast.recognition import RecognitionObjective

BACKWARD = 0.35
"""Gradients of activations that a backward pass holds at its worst moment, as a share of what the forward pass kept
(measured: see docs/speed.md)."""
FRAME = 64 * 64 + 64 * 44
"""Bytes of a frame of both clips in a batch."""
ENCODER_FRAMES = 1024
"""Frames that `Pretraining.encode` hands to the encoder at a time."""


def pretraining_objective(config: PretrainConfig) -> tuple[Recognizer, DiffusionObjective]:
    """The two networks that a pretraining config names and the loss between them, on the CPU."""
    backbone, diffusion = config.backbone, config.diffusion
    recognizer = build_recognizer(backbone.name, backbone.variant, width=backbone.width, seed=config.seed)
    schedule = NoiseSchedule(diffusion.schedule)
    weights = loss_weights(schedule, diffusion.weighting, diffusion.gamma, diffusion.normalize_weights)
    denoiser = build_denoiser(config.denoiser.dim, cond_dim=recognizer.feature_channels, seed=config.seed)
    return recognizer, DiffusionObjective(recognizer.backbone, denoiser, schedule, weights, diffusion.pooling)


@contextlib.contextmanager
def _unchanged(module: nn.Module):
    """Running statistics as they were before."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in module.named_buffers():
                value.copy_(before[name])


def _kept(module: nn.Module, config: PretrainConfig | TransferConfig, clips: int, device: torch.device) -> int:
    """Bytes that a forward pass of so many clips keeps."""
    frames = config.data.frames
    silhouettes = torch.zeros(clips, frames, 64, 44, device=device)
    dtype = TYPES[config.train.precision]

    def forward() -> object:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if isinstance(config, TransferConfig):
                return module(silhouettes)
            latents = torch.zeros(clips, 4, frames, 8, 8, device=device)
            timestep = torch.ones(clips, dtype=torch.int64, device=device)
            return module(latents, silhouettes, latents, timestep, timestep == 0)

    return saved_bytes(forward, module.parameters())


def estimate(
    config: PretrainConfig | TransferConfig, module: nn.Module, device: torch.device, ranks: int = 1
) -> Estimate:
    """What one process of `ranks` needs at its peak.

    module: the objective of pretraining, or the recognizer of transfer, on `device` and not yet under ZeRO. UserError
    for a batch that does not divide.
    """
    train = config.train
    share = batch_per_rank(train, ranks)
    micro = share // train.accumulation
    with _unchanged(module):
        two, three = (_kept(module, config, clips, device) for clips in (2, 3))  # one is too few for a batch norm
    activations = two + (micro - 2) * max(0, three - two)
    transient = BACKWARD * activations + (config.data.prefetch + 3) * share * config.data.frames * FRAME
    if isinstance(config, PretrainConfig):
        frames = min(ENCODER_FRAMES, micro * config.data.frames)
        # Frames as float32, before and after scaling; on a GPU three maps of 64 channels at full resolution besides.
        transient += frames * 64 * 64 * (8 if device.type == "cpu" else 8 + 3 * 64 * 2)
    return Estimate(
        states(module.parameters(), zero_stage(train, ranks), ranks),
        int(activations),
        int(transient),
        BASE[device.type],
    )


def ways(config: PretrainConfig | TransferConfig, needed: Estimate, device: torch.device, ranks: int) -> dict[str, int]:
    """Settings that need less -> bytes: more accumulation where there is such a thing, more ranks, fewer frames.

    More ranks are no way on a CPU, whose memory they share.
    """
    moving = needed.activations + needed.transient
    fixed = needed.base + needed.states
    found: dict[str, int] = {}
    share = batch_per_rank(config.train, ranks) // config.train.accumulation
    for factor in (2, 4, 8):
        if share % factor:
            continue
        size = fixed + moving // factor
        if isinstance(config, PretrainConfig):
            found[f"train.accumulation={config.train.accumulation * factor}"] = size
        if device.type != "cpu":
            found[f"{ranks * factor} ranks"] = size
    if config.data.frames > 15:
        found["data.frames=15"] = fixed + moving * 15 // config.data.frames
    return found


def report(
    config: PretrainConfig | TransferConfig, module: nn.Module, device: torch.device, ranks: int = 1
) -> tuple[bool, str]:
    """Whether the run fits into the device's free memory, and the line that says so.

    What this process has already taken counts as free: the estimate has it too. On a CPU the ranks share the memory.
    """
    needed = estimate(config, module, device, ranks)
    free = free_bytes(device)
    if device.type == "cpu":
        free //= ranks
    free += needed.base + 4 * sum(p.numel() for p in module.parameters())
    sequences = config.train.sequences
    return needed.total <= free, describe(needed, free, sequences, ways(config, needed, device, ranks))


def stage(file: str, overrides: Sequence[str] = ()) -> type[PretrainConfig] | type[TransferConfig]:
    """Whose config a file is: the stage that knows more of its keys, and of the overrides'."""
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return PretrainConfig  # `load` says what is wrong with it
    found = dict(_entries(tree))
    for key, _, value in (text.partition("=") for text in overrides):
        found |= dict.fromkeys(itertools.accumulate(key.split("."), "{}.{}".format), value)
    pretrain, transfer = (dict(_entries(to_dict(config()))) for config in (PretrainConfig, TransferConfig))
    votes = sum((key in transfer) - (key in pretrain) for key in found)
    votes += str(found.get("train.batch", "")).lstrip().startswith("[")  # people x sequences
    return TransferConfig if votes > 0 else PretrainConfig


def _entries(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every section and value of a nested dict."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{name}", value
        yield from _entries(value, f"{prefix}{name}.")


def transfer_recognizer(config: TransferConfig) -> tuple[Recognizer, str]:
    """The network that transfer trains, on the CPU, its backbone frozen where it will be; and what had to be assumed.

    The classes are the dataset's where it is there, else the published training set's that the variant is named after.
    """
    data, backbone = config.data, config.backbone
    classes, assumed = None, ""
    if config.identity.weight and data.path and Path(data.path).exists():
        dataset = PackedDataset.open(data.path, corrupt=data.corrupt)
        split = dataset.split(data.split)
        sampler = PeopleSampler(
            dataset.starts, dataset.subject, split, data, seed=config.seed, batch=config.train.batch
        )
        classes = sampler.num_classes
    elif config.identity.weight:
        known = (number for name, number in TRAINING_IDENTITIES.items() if backbone.variant.startswith(name))
        classes = next(known, None)
        assumed = f"the dataset is not there: {classes or 'no'} classes assumed"
    recognizer = build_recognizer(backbone.name, backbone.variant, classes, width=backbone.width)
    return RecognitionObjective(recognizer, freeze=config.transfer.freeze).recognizer, assumed


def on_paper(file: str, overrides: Sequence[str] = (), ranks: int = 1) -> tuple[bool, str]:
    """`report` for a config file and `--set` overrides, on this machine's best device. UserError for a bad config."""
    config = load(stage(file, overrides), file, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, assumed = (
        (pretraining_objective(config)[1], "") if isinstance(config, PretrainConfig) else transfer_recognizer(config)
    )
    fits, line = report(config, module.to(device), device, ranks)
    return fits, f"{line} ({assumed})" if assumed else line
