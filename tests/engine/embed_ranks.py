"""A process of test_embed: embeds its share of a dataset with a random model and saves what it got.

python -m tests.engine.embed_ranks DATASET OUT, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist

from gaitfast.data.packed import PackedDataset
from gaitfast.engine.embed import embed
from gaitfast.models import build_recognizer


def main(path, out):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    data = PackedDataset.open(path)
    model = build_recognizer("gaitset", "gait3d", width=0.25).eval()
    result = embed(model.backbone, data, data.split("all"), batch_frames=20, rank=rank, world_size=size)
    np.save(f"{out}.{rank}.npy", result.numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
