"""A process of test_objective: one step's gradients on this rank's share of a batch, averaged over the ranks.

python -m tests.recognition.objective_ranks OUT, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

import sys

import torch
import torch.distributed as dist

from gaitfast.engine.norms import synchronize_norms
from gaitfast.models import build_recognizer
from gaitfast.recognition import RecognitionObjective

LABELS = [0, 0, 3, 3, 1, 1, 4, 4]
CASES = {
    "smplgait": {"name": "smplgait"},
    "gaitset": {"name": "gaitset", "classes": None},
    "gaitgl": {"name": "gaitgl", "scale": 1.0, "smoothing": 0.0},
    "gaitbase": {"name": "gaitbase"},
    "gaitbase, lengths differ": {"name": "gaitbase", "lengths": [3, 1, 2, 4, 2, 5, 1, 3]},
    "gaitbase, frozen": {"name": "gaitbase", "freeze": True},
}


def step(name, rank=0, size=1, classes=5, lengths=None, **options):
    """(quantities, gradients by name, buffers by name) of one float64 step; gradients as DeepSpeed averages them."""
    recognizer = build_recognizer(name, "gait3d", classes, width=0.125, seed=1).double()
    options = {"identity_weight": 0.3 if classes else 0.0, **options}
    objective = RecognitionObjective(recognizer.train(), **options)
    if size > 1:
        synchronize_norms(objective, torch.device("cpu"))
    share = len(LABELS) // size
    own = slice(rank * share, (rank + 1) * share)
    generator = torch.Generator().manual_seed(7)
    clips = [torch.rand(n, 64, 44, generator=generator, dtype=torch.float64) for n in lengths or [3] * len(LABELS)]
    silhouettes = torch.cat(clips[own])[None] if lengths else torch.stack(clips[own])
    loss, quantities = objective(silhouettes, torch.tensor(LABELS[own]), lengths[own] if lengths else None)
    loss.backward()
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    for value in (*gradients.values(), quantities):
        if size > 1:
            dist.all_reduce(value)
            value /= size
    return quantities, gradients, dict(objective.named_buffers())


def main(out):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.save({case: step(rank=rank, size=size, **options) for case, options in CASES.items()}, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
