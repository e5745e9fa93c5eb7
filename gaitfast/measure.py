"""What is measured before, during and after pretraining, on people that were never trained on.

Rank-1 of the raw feature by cosine and Euclidean distance (Fig. 2), the mean distance of anchor-positive and
anchor-negative pairs (Fig. 3), and the denoising loss under each kind of condition (diffusion/probe.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from gaitfast import randomness
from gaitfast.config import PretrainConfig, UserError
from gaitfast.data.packed import PackedDataset
from gaitfast.data.reference import ReferenceLoader
from gaitfast.data.sampling import ordered_frames, resolve_rule, unordered_frames
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.diffusion.probe import condition_losses
from gaitfast.engine.embed import CUT, embed
from gaitfast.engine.world import World
from gaitfast.retrieval import protocols

_PAIRS = 256


def rank_unseen(result: dict[str, float]) -> dict[str, float]:
    """An evaluation's metrics; where people that were trained on are ranked as well (usf17), `rank1` is the others'."""
    return {**result, "rank1_all": result["rank1"], "rank1": result.get("rank1_unseen", result["rank1"])}


class HeldOut:
    """Fixed clips of test people for the direct measure, each with its three conditions, as uint8 frames.

    `same` is another walk of the person and `other` a walk of another person, both past the camera of the clip and in
    its condition where the dataset has such walks (`matched` is their share): what a feature says about viewpoint or
    clothing then cannot pass for identity. `self` takes other frames of the clip's walk; some may be the clip's own.
    """

    def __init__(self, dataset: PackedDataset, config: PretrainConfig, sampling: tuple[str, int]):
        self.clip_walk, self.same_walk, self.other_walk, self.matched = _walks(dataset, config)
        frames = config.data.frames
        rows = np.arange(len(self.clip_walk))

        def clips(walks: np.ndarray, purpose: str, rule: str, skip: int) -> np.ndarray:
            address = {"seed": config.seed, "purpose": purpose, "step": 0, "sample": rows}
            if rule == "ordered":
                picked = ordered_frames(dataset.lengths[walks], frames, skip, **address)
            else:
                picked = unordered_frames(dataset.lengths[walks], frames, **address)
            return dataset.frames((dataset.starts[walks][:, None] + picked).reshape(-1)).reshape(-1, frames, 64, 64)

        self.clip = clips(self.clip_walk, "held-out clip", "ordered", 0)
        self.conditions = {
            "self": clips(self.clip_walk, "held-out self", *sampling)[..., CUT],
            "same": clips(self.same_walk, "held-out same", *sampling)[..., CUT],
        }
        self.conditions["other"] = clips(self.other_walk, "held-out other", *sampling)[..., CUT]


def _walks(dataset: PackedDataset, config: PretrainConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Sequence numbers of the clips, of the same person's other walks, and of other people's walks, int64 (N,) each.

    Both other walks share the clip's view and condition (clothing, surface) where there are such walks on both sides,
    else its view, else nothing; clips with closer matches come first. The last value is the share of full matches.
    Sequences of people without a name (protocols.known) serve as neither.
    """
    test = protocols.known(config.eval.protocol, dataset)
    subject, view = dataset.subject[test], dataset.view[test]
    # "nm-01" and "nm-02" are two walks in one condition: what follows the name is a number.
    condition = np.array([re.sub(r"[-_]?\d+$", "", dataset.conditions[code]) for code in dataset.condition[test]])
    draws = randomness.uniform(config.seed, "held-out walks", 0, np.arange(len(test)), 2)
    rows, levels = [], []
    for i in range(len(test)):
        own = subject == subject[i]
        sides = (own & (np.arange(len(test)) != i), ~own)
        here = view == view[i]
        for level, alike in enumerate((here & (condition == condition[i]), here, np.ones_like(here))):
            pools = [np.flatnonzero(side & alike) for side in sides]
            if all(len(pool) for pool in pools):
                rows.append((i, *(pool[int(draw * len(pool))] for pool, draw in zip(pools, draws[i]))))
                levels.append(level)
                break
    if not rows:
        raise UserError(f"eval: {dataset.path} holds no test person with two walks; the evaluation needs some")
    order = randomness.permutation(config.seed, "held-out clips", 0, len(rows))
    order = order[np.argsort(np.array(levels)[order], kind="stable")][: config.eval.condition_clips]
    clip, same, other = (test[column] for column in np.array(rows)[order].T)
    return clip, same, other, float((np.array(levels)[order] == 0).mean())


class Measures:
    """Everything an evaluation needs, prepared once; calling it measures.

    Args:
        config: the run's.
        dataset: the one trained on; `eval.path` names another to evaluate on.
        encode: uint8 clips (B, T, 64, 64) -> latents (B, 4, T, 8, 8).
        sampling: the backbone's rule for the frames of s_G.
        world: this process. Embeddings are shared out over the ranks, the rest is the same on each.
    """

    def __init__(
        self,
        config: PretrainConfig,
        dataset: PackedDataset,
        encode: Callable[[torch.Tensor], torch.Tensor],
        sampling: tuple[str, int],
        world: World,
    ):
        self.config, self.world, self.encode = config, world, encode
        self.dataset = PackedDataset.open(config.eval.path) if config.eval.path else dataset
        self.protocol = self.dataset.protocol if config.eval.protocol == "auto" else config.eval.protocol
        protocols.check(self.protocol, self.dataset)
        self.held_out = HeldOut(self.dataset, config, resolve_rule(config.data, sampling))
        count = len(self.held_out.clip)
        rows = torch.arange(count, device=world.device)
        self.noise = randomness.normal_tensor(config.seed, "held-out noise", 0, rows, (4, config.data.frames, 8, 8))
        # Midpoints of equal parts of 1..T: the mean over them is the mean over t, the same at every evaluation.
        steps = config.eval.condition_timesteps
        self.timesteps = ((torch.arange(steps) + 0.5) * 1000 / steps).round().to(torch.int64)
        self._pairs = self._augmented_pairs(sampling)

    def _augmented_pairs(self, sampling: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subject codes (n,), s_E cut to 44 columns and s_G, uint8 (n, T, 64, 44): one pair per test sequence.

        Of people with a name (protocols.known), for two without one may be the same person.
        """
        known, drawn_from = protocols.known(self.protocol, self.dataset), len(self.dataset.split("test"))
        count = min(_PAIRS * drawn_from // len(known), drawn_from)
        loader = ReferenceLoader(
            self.dataset, replace(self.config.data, split="test"), sampling=sampling, seed=self.config.seed, batch=count
        )
        batch = next(iter(loader))
        sequence = batch.sequence.numpy()
        rows = np.flatnonzero(np.isin(sequence, known))[:_PAIRS]
        return self.dataset.subject[sequence[rows]], batch.clip_e[rows][..., CUT].contiguous(), batch.clip_g[rows]

    @torch.no_grad()
    def features(self, objective: DiffusionObjective, clips: torch.Tensor, batch: int = 32) -> torch.Tensor:
        """clips uint8 (n, T, 64, 44) -> features float32 (n, C, P)."""
        parts = clips.split(batch)
        return torch.cat([objective.backbone(part.to(self.world.device).float() / 255).float() for part in parts])

    def distances(self, objective: DiffusionObjective) -> dict[str, float]:
        """Mean cosine distance of anchor-positive and anchor-negative pairs (Fig. 3), and the gap between them.

        A positive is an augmented pair (s_E, s_G) of one sequence; a negative takes s_G from another person.
        """
        subject, clips_e, clips_g = self._pairs
        a, b = self.features(objective, clips_e), self.features(objective, clips_g)
        a, b = (torch.nn.functional.normalize(x.double(), dim=1, eps=0) for x in (a, b))
        distance = 1 - torch.einsum("icp,jcp->ij", a, b).cpu().numpy() / a.shape[2]
        positive = float(np.diag(distance).mean())
        negative = float(distance[subject[:, None] != subject[None]].mean())
        return {"distance_positive": positive, "distance_negative": negative, "gap": negative - positive}

    def _identity(self, losses: dict[str, torch.Tensor]) -> dict[str, float]:
        """(other - same) / same, and its standard error: clips of one person are not independent, people are."""
        difference = (losses["other"] - losses["same"]).numpy()
        subject = self.dataset.subject[self.held_out.clip_walk]
        people = np.array([difference[subject == code].mean() for code in np.unique(subject)])
        same = float(losses["same"].mean())
        row = {"identity": float(difference.mean()) / same}
        if len(people) > 1:
            row["identity_error"] = float(people.std(ddof=1)) / len(people) ** 0.5 / same
        return row

    def __call__(self, objective: DiffusionObjective) -> dict[str, float]:
        """One row of evaluations.jsonl without its step. The objective is in eval mode, under the run's autocast."""
        started = time.perf_counter()
        embeddings = embed(
            objective.backbone,
            self.dataset,
            protocols.sequences(self.protocol, self.dataset),
            frames_limit=self.config.eval.frames_limit,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        cosine = protocols.evaluate(self.protocol, self.dataset, embeddings, metric="cosine")
        euclidean = protocols.evaluate(self.protocol, self.dataset, embeddings, metric="euclidean")
        row = {**rank_unseen(cosine), "rank1_euclidean": rank_unseen(euclidean)["rank1"]}
        row |= self.distances(objective)
        device = self.world.device
        held = self.held_out
        silhouettes = {name: torch.from_numpy(np.ascontiguousarray(clips)) for name, clips in held.conditions.items()}
        latents = torch.cat([self.encode(part.to(device)) for part in torch.from_numpy(held.clip).split(32)])
        # In float32 whatever the run's precision: bf16 would round away what tells the conditions apart.
        with torch.autocast(device.type, enabled=False):
            losses = condition_losses(objective, latents, silhouettes, self.noise, self.timesteps)
        row |= {f"loss_{name}": float(loss.mean()) for name, loss in losses.items()}
        row |= self._identity(losses)
        row["condition_matched"] = held.matched
        row["seconds"] = time.perf_counter() - started
        return row
