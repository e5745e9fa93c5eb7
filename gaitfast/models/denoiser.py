"""The video denoiser: a U-Net over clips of latents, conditioned on timestep and gait feature (Sec. 3.1.2).

The network is Ho et al.'s ("Video Diffusion Models", 2022) as video-diffusion-pytorch 0.6.3 builds it with GroupNorm,
channel multipliers 1, 2, 4, 8 heads of 32 features and an initial 5x5 kernel: 3.7, 11.6 and 40.2 M parameters at
dim 32, 64 and 128 (Table 6). `gaitfast.interop.video_diffusion` exchanges checkpoints with it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from gaitfast.models.denoiser_blocks import (
    DIM_HEAD,
    GROUPS,
    HEADS,
    MAX_FRAMES,
    Film,
    FramePositions,
    FramewiseConv,
    FramewiseConvTranspose,
    LinearAttention,
    Modulation,
    PositionEmbedding,
    ResidualBlock,
    SpatialAttention,
    TemporalAttention,
    TimeEmbedding,
)

LATENT_CHANNELS = 4
MULTIPLIERS = (1, 2, 4)


class Stage(nn.Module):
    """One resolution on the way down or up: two modulated blocks, attention over sites, attention over frames."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels_in, channels_out)
        self.block2 = ResidualBlock(channels_out, channels_out)
        self.sites = LinearAttention(channels_out)
        self.frames = TemporalAttention(channels_out)

    def forward(self, x: Tensor, modulations: tuple[Modulation, Modulation], positions: FramePositions) -> Tensor:
        x = self.block2(self.block1(x, modulations[0]), modulations[1])
        return self.frames(self.sites(x), positions)


class Middle(nn.Module):
    """The coarsest resolution: full attention over the few sites, between the two blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.sites = SpatialAttention(channels)
        self.frames = TemporalAttention(channels)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, modulations: tuple[Modulation, Modulation], positions: FramePositions) -> Tensor:
        x = self.block1(x, modulations[0])
        return self.block2(self.frames(self.sites(x), positions), modulations[1])


class Denoiser(nn.Module):
    """Predicts the noise in a clip of latents. Build it with `build_denoiser`."""

    def __init__(self, dim: int, cond_dim: int) -> None:
        super().__init__()
        assert dim > 0 and dim % GROUPS == 0, f"dim must be a multiple of {GROUPS}, got {dim}"
        assert cond_dim > 0, cond_dim
        self.dim, self.cond_dim = dim, cond_dim
        steps = _channel_steps(dim)
        bottom = steps[-1][1]

        self.null_condition = nn.Parameter(torch.randn(cond_dim))
        self.time = TimeEmbedding(dim)
        # Two modulated blocks a stage, in the order in which stages run.
        outputs = [out for _, out in steps] + [bottom] + [into for into, _ in reversed(steps)]
        self.film = Film(4 * dim + cond_dim, tuple(c for c in outputs for _ in range(2)))
        self.positions = PositionEmbedding()

        self.stem = FramewiseConv(LATENT_CHANNELS, dim, 5, padding=2)
        self.stem_frames = TemporalAttention(dim)
        self.down = nn.ModuleList(Stage(*step) for step in steps)
        self.shrink = nn.ModuleList(FramewiseConv(out, out, 4, stride=2, padding=1) for _, out in steps[:-1])
        self.middle = Middle(bottom)
        self.up = nn.ModuleList(Stage(2 * out, into) for into, out in reversed(steps))
        self.grow = nn.ModuleList(
            FramewiseConvTranspose(into, into, 4, stride=2, padding=1) for into, _ in reversed(steps[1:])
        )
        self.head_block = ResidualBlock(2 * dim, dim)
        self.head = nn.Linear(dim, LATENT_CHANNELS)

    def forward(
        self, latents: Tensor, timestep: Tensor, condition: Tensor, drop_condition: Tensor | None = None
    ) -> Tensor:
        """The predicted noise.

        Args:
            latents: (B, 4, T, H, W), 1 <= T <= 64, H and W multiples of 4.
            timestep: (B,), integer or floating, 1..1000.
            condition: (B, cond_dim).
            drop_condition: bool (B,), True where the learned null condition replaces the condition.

        Returns:
            (B, 4, T, H, W), in the type of `latents`.
        """
        self._check(latents, timestep, condition, drop_condition)
        if drop_condition is None:
            drop_condition = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        condition = torch.where(drop_condition[:, None], self.null_condition, condition)
        modulations = self.film(self.time(timestep), condition)
        pairs = iter(zip(modulations[0::2], modulations[1::2]))
        positions = self.positions(latents.shape[2])

        # The public layout is the one place where memory is rearranged: four channels in, four channels out.
        x = self.stem(latents.permute(0, 2, 3, 4, 1).contiguous())
        x = stem = self.stem_frames(x, positions)
        skips = []
        for level, stage in enumerate(self.down):
            x = stage(x, next(pairs), positions)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        x = self.middle(x, next(pairs), positions)
        for level, stage in enumerate(self.up):
            x = stage(torch.cat((x, skips.pop()), dim=-1), next(pairs), positions)
            if level < len(self.grow):
                x = self.grow[level](x)
        x = self.head(self.head_block(torch.cat((x, stem), dim=-1)))
        return x.permute(0, 4, 1, 2, 3).to(latents.dtype, memory_format=torch.contiguous_format)

    def _check(self, latents: Tensor, timestep: Tensor, condition: Tensor, drop_condition: Tensor | None) -> None:
        batch, shape = len(latents), tuple(latents.shape)
        assert latents.dim() == 5 and shape[1] == LATENT_CHANNELS, f"latents must be (B,4,T,H,W), got {shape}"
        assert 1 <= shape[2] <= MAX_FRAMES, f"1..{MAX_FRAMES} frames, got {shape[2]}"
        assert shape[3] % 4 == 0 and shape[4] % 4 == 0, f"H and W must be multiples of 4, got {shape[3:]}"
        assert timestep.shape == (batch,), f"timestep must be ({batch},), got {tuple(timestep.shape)}"
        expected = (batch, self.cond_dim)
        assert condition.shape == expected, f"condition must be {expected}, got {tuple(condition.shape)}"
        if drop_condition is not None:
            assert drop_condition.shape == (batch,) and drop_condition.dtype == torch.bool, (
                "drop_condition is bool (B,)"
            )


def _channel_steps(dim: int) -> tuple[tuple[int, int], ...]:
    """(channels in, channels out) of each resolution on the way down."""
    widths = (dim, *(dim * m for m in MULTIPLIERS))
    return tuple(itertools.pairwise(widths))


def build_denoiser(dim: int = 64, cond_dim: int = 256, *, seed: int = 0) -> Denoiser:
    """A freshly initialised denoiser: the same weights for the same seed, whatever was drawn before.

    Args:
        dim: channels at the full resolution, a multiple of 32.
        cond_dim: width of the condition.
        seed: of the initial weights, PyTorch's default distributions. The global generators stay as they are.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Denoiser(dim, cond_dim)


def flops_per_sample(dim: int = 64, frames: int = 30, cond_dim: int = 256, *, height: int = 8, width: int = 8) -> int:
    """Floating-point operations of one clip's forward pass: two per multiply-add of every matrix product."""
    inner = HEADS * DIM_HEAD
    steps = _channel_steps(dim)
    sites = [height * width // 4**level for level in range(len(steps))]

    def conv(into: int, out: int, kernel: int, n: int) -> int:
        return 2 * into * out * kernel**2 * n

    def block(into: int, out: int, n: int) -> int:
        return conv(into, out, 3, n) + conv(out, out, 3, n) + (conv(into, out, 1, n) if into != out else 0)

    def attention(channels: int, n: int, keys: int) -> int:
        """`keys`: how many keys a query meets; DIM_HEAD stands for the context matrix of linear attention."""
        return 8 * channels * inner * n + 4 * inner * keys * n

    def stage(into: int, out: int, n: int) -> int:
        return block(into, out, n) + block(out, out, n) + attention(out, n, DIM_HEAD) + attention(out, n, frames)

    frame = conv(LATENT_CHANNELS, dim, 5, sites[0]) + attention(dim, sites[0], frames)
    for level, (into, out) in enumerate(steps):
        frame += stage(into, out, sites[level]) + stage(2 * out, into, sites[level])
        if level:
            # Shrinking computes each coarse site from 4x4 fine ones; growing spreads it over as many.
            frame += conv(steps[level - 1][1], steps[level - 1][1], 4, sites[level]) + conv(into, into, 4, sites[level])
    bottom, n = steps[-1][1], sites[-1]
    frame += 2 * block(bottom, bottom, n) + attention(bottom, n, n) + attention(bottom, n, frames)
    frame += block(2 * dim, dim, sites[0]) + conv(dim, LATENT_CHANNELS, 1, sites[0])

    modulated = 2 * (sum(into + out for into, out in steps) + bottom)
    once = 2 * dim * 4 * dim + 2 * (4 * dim) ** 2 + 2 * (4 * dim + cond_dim) * 2 * modulated
    return frame * frames + once
