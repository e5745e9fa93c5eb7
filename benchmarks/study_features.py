"""How much the raw features of a backbone vary, along how many directions, and how much of that is between people."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gaitfast.data.packed import PackedDataset
from gaitfast.engine.embed import embed
from gaitfast.engine.portable import load_backbone
from gaitfast.models import build_recognizer


def describe(features: Tensor, subject: Tensor) -> dict[str, float]:
    """Features (S, C, P) and subject codes (S,), int64 -> three figures.

    spread: variance over the sequences as a share of the mean square; 0 where every sequence has the same feature.
    between_people: share of that variance that lies between the means of people. Means of random groups have
        (people - 1) / (S - 1) of it, `between_chance`.
    effective_rank: exp of the entropy of the covariance's normalised eigenvalues, mean over the parts: 1 where the
        features lie on a line, C where they fill all directions alike.
    """
    features = features.double()
    centred = features - features.mean(0)
    variance = centred.square().sum()
    people, code = torch.unique(subject, return_inverse=True)
    sums = torch.zeros(len(people), *features.shape[1:], dtype=torch.float64).index_add_(0, code, centred)
    between = (sums.square() / torch.bincount(code)[:, None, None]).sum()
    scatter = torch.einsum("scp,sdp->pcd", centred, centred)
    eigenvalues = torch.linalg.eigvalsh(scatter).clamp(min=0)
    tiny = torch.finfo(torch.float64).tiny  # a feature that has collapsed altogether has the figures 0, 0 and 1
    share = eigenvalues / eigenvalues.sum(1, keepdim=True).clamp(min=tiny)
    entropy = -torch.special.xlogy(share, share).sum(1)
    return {
        "spread": float(variance / features.square().sum().clamp(min=tiny)),
        "between_people": float(between / variance.clamp(min=tiny)),
        "between_chance": (len(people) - 1) / (len(features) - 1),
        "effective_rank": float(entropy.exp().mean()),
    }


def measure(backbone: Path, dataset: Path, frames_limit: int) -> dict[str, float]:
    """`describe` of the test sequences under the backbone in a file."""

    def build(config: dict) -> torch.nn.Module:
        section = config["backbone"]
        return build_recognizer(section["name"], section["variant"], width=section["width"]).backbone

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_backbone(backbone, build)[0].to(device)
    packed = PackedDataset.open(dataset)
    test = packed.split("test")
    features = embed(network, packed, test, frames_limit=frames_limit, device=device)
    return describe(features, torch.from_numpy(packed.subject[test].astype("int64")))
