"""What is measured before, during and after pretraining, on people that were never trained on.

Rank-1 of the raw feature by cosine and Euclidean distance (Fig. 2), the mean distance of anchor-positive and
anchor-negative pairs (Fig. 3), and the denoising loss under each kind of condition (diffusion/probe.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from gaitfast import randomness
from gaitfast.config import PretrainConfig, UserError
from gaitfast.data.packed import PackedDataset
from gaitfast.data.reference import ReferenceLoader
from gaitfast.data.sampling import ordered_frames, unordered_frames
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.diffusion.probe import condition_losses
from gaitfast.engine.embed import CUT, embed
from gaitfast.engine.world import World
from gaitfast.retrieval import protocols

_PAIRS = 256


class HeldOut:
    """Fixed clips of test people for the direct measure, each with its three conditions.

    Both walks of a person and the stranger's walk are picked at random once, so that nothing but identity tells
    `same` from `other`. All arrays are uint8 frames; N people, T frames.
    """

    def __init__(self, dataset: PackedDataset, config: PretrainConfig, sampling: tuple[str, int]):
        test = dataset.split("test")
        subjects = [test[dataset.subject[test] == code] for code in np.unique(dataset.subject[test])]
        subjects = [sequences for sequences in subjects if len(sequences) >= 2]
        if len(subjects) < 2:
            raise UserError(
                f"eval.path: {dataset.path} holds {len(subjects)} test people with two walks or more; "
                "the evaluation needs at least 2"
            )
        people = randomness.permutation(config.seed, "held-out people", 0, len(subjects))
        people = people[: config.eval.condition_subjects]
        draws = randomness.uniform(config.seed, "held-out walks", 0, np.arange(len(people)), 2)
        clip, same = [], []
        for person, (first, second) in zip(people, draws):
            sequences = subjects[person]
            a = int(first * len(sequences))
            b = (a + 1 + int(second * (len(sequences) - 1))) % len(sequences)
            clip.append(sequences[a])
            same.append(sequences[b])
        self.clip_walk, self.same_walk = np.array(clip), np.array(same)
        self.other_walk = np.roll(self.same_walk, 1)  # the next person's walk, so `same` and `other` are the same walks
        frames = config.data.frames
        rows = np.arange(len(people))

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
        self.conditions["other"] = np.roll(self.conditions["same"], 1, axis=0)


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
        self.held_out = HeldOut(self.dataset, config, sampling)
        count = len(self.held_out.clip)
        rows = torch.arange(count, device=world.device)
        self.noise = randomness.normal_tensor(config.seed, "held-out noise", 0, rows, (4, config.data.frames, 8, 8))
        # Midpoints of equal parts of 1..T: the mean over them is the mean over t, the same at every evaluation.
        steps = config.eval.condition_timesteps
        self.timesteps = ((torch.arange(steps) + 0.5) * 1000 / steps).round().to(torch.int64)
        self._pairs = self._augmented_pairs(sampling)

    def _augmented_pairs(self, sampling: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subject codes (n,), s_E cut to 44 columns and s_G, uint8 (n, T, 64, 44): one pair per test sequence."""
        count = min(_PAIRS, len(self.dataset.split("test")))
        loader = ReferenceLoader(
            self.dataset, replace(self.config.data, split="test"), sampling=sampling, seed=self.config.seed, batch=count
        )
        batch = next(iter(loader))
        subject = self.dataset.subject[batch.sequence.numpy()]
        return subject, batch.clip_e[..., CUT].contiguous(), batch.clip_g

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

    def __call__(self, objective: DiffusionObjective) -> dict[str, float]:
        """One row of evaluations.jsonl without its step. The objective is in eval mode, under the run's autocast."""
        started = time.perf_counter()
        # Partitioned weights (ZeRO-3) were gathered by the caller, so every rank may embed its own share.
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
        row = {key: cosine[key] for key in ("rank1", "rank5", "rank10", "mAP", "mINP") if key in cosine}
        row["rank1_euclidean"] = euclidean["rank1"]
        row |= self.distances(objective)
        device = self.world.device
        held = self.held_out
        silhouettes = {
            name: torch.from_numpy(np.ascontiguousarray(clips)).to(device).float() / 255
            for name, clips in held.conditions.items()
        }
        latents = torch.cat([self.encode(part.to(device)) for part in torch.from_numpy(held.clip).split(32)])
        row |= condition_losses(objective, latents, silhouettes, self.noise, self.timesteps)
        row["seconds"] = time.perf_counter() - started
        return row
