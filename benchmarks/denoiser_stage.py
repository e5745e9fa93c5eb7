"""Half a stage of the denoiser, ours and the reference's: a modulated block and temporal attention at full resolution.

torch.compile needs minutes for the C++ of the whole reference on two cores, and half of one for this, which has most of
the operations and the largest activations. So `python -m benchmarks.denoiser --quick` compiles this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.reference_denoiser import Unet3D
from gaitfast.models.denoiser import Denoiser

Step = Callable[[], Tensor]


class OurStage(nn.Module):
    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.stage, self.film, self.positions = model.down[0], model.film, model.positions
        self.split = 4 * model.dim

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, T, H, W), of any strides; embedding (B, E)."""
        pair = self.film(embedding[:, : self.split], embedding[:, self.split :])[:2]
        x = self.stage.block1(x.permute(0, 2, 3, 4, 1).contiguous(), pair[0])
        return self.stage.frames(x, self.positions(x.shape[1]))


class ReferenceStage(nn.Module):
    def __init__(self, reference: Unet3D) -> None:
        super().__init__()
        self.block1, _, _, self.temporal, _ = reference.downs[0]
        self.bias = reference.time_rel_pos_bias

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.temporal(self.block1(x, embedding), self.bias(x.shape[2], x.device))


def stage_step(stage: nn.Module, shape: tuple[int, ...], embedding: int, dtype: torch.dtype, device: str) -> Step:
    """Forward and backward of a stage over x of `shape` (B, C, T, H, W); our stage finds its own layout in memory."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator).to(dtype)
    if isinstance(stage, OurStage):
        x = x.to(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    given = torch.randn(shape[0], embedding, device=device, generator=generator)
    parameters = [x, *(p for p in stage.parameters() if p.requires_grad)]

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = run(x, given)
        loss = out.float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    run = torch.compile(stage, dynamic=False) if isinstance(stage, ReferenceStage) else stage
    return step
