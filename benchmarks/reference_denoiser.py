"""The denoiser in the formulation of video-diffusion-pytorch 0.6.x, as plain PyTorch: what ours is timed against.

Our own rewrite from the network's description (channels first, Conv3d, a rearrangement around every attention), under
the reference's parameter names, so that `gaitfast.interop.video_diffusion.state_dict` of our denoiser loads into it.
"""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from gaitfast.models.denoiser_blocks import DIM_HEAD, GROUPS, HEADS

INNER = HEADS * DIM_HEAD


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *arguments) -> Tensor:
        return self.fn(x, *arguments) + x


class LayerNorm(nn.Module):
    """Over channels, the second axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.gamma


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.norm = fn, LayerNorm(dim)

    def forward(self, x: Tensor, *arguments) -> Tensor:
        return self.fn(self.norm(x), *arguments)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        frequencies = 1.0 / 10_000 ** (torch.arange(0, DIM_HEAD, 2) / DIM_HEAD)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * self.freqs
        angle = angle.repeat_interleave(2, dim=-1)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
        return x * angle.cos() + turned * angle.sin()


class Attention(nn.Module):
    """Over the second axis but one."""

    def __init__(self, dim: int, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.rotary_emb = rotary
        self.to_qkv = nn.Linear(dim, 3 * INNER, bias=False)
        self.to_out = nn.Linear(INNER, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (rearrange(t, "... n (h d) -> ... h n d", h=HEADS) for t in self.to_qkv(x).chunk(3, dim=-1))
        q = q * DIM_HEAD**-0.5
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        scores = torch.einsum("... h i d, ... h j d -> ... h i j", q, k)
        if bias is not None:
            scores = scores + bias
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("... h i j, ... h j d -> ... h i d", scores.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "... h n d -> ... n (h d)"))


class Rearranged(nn.Module):
    """`fn` in another arrangement of (b, c, f, h, w)."""

    def __init__(self, arrangement: str, fn: nn.Module) -> None:
        super().__init__()
        self.arrangement, self.fn = arrangement, fn

    def forward(self, x: Tensor, *arguments) -> Tensor:
        sizes = dict(zip("bcfhw", x.shape))
        out = self.fn(rearrange(x, f"b c f h w -> {self.arrangement}"), *arguments)
        return rearrange(out, f"{self.arrangement} -> b c f h w", **{k: sizes[k] for k in "bfhw"})


class LinearAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(dim, 3 * INNER, 1, bias=False)
        self.to_out = nn.Conv2d(INNER, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        x = rearrange(x, "b c f h w -> (b f) c h w")
        q, k, v = (rearrange(t, "b (n d) x y -> b n d (x y)", n=HEADS) for t in self.to_qkv(x).chunk(3, dim=1))
        q, k = q.softmax(dim=-2) * DIM_HEAD**-0.5, k.softmax(dim=-1)
        context = torch.einsum("b n d s, b n e s -> b n d e", k, v)
        out = torch.einsum("b n d e, b n d s -> b n e s", context, q)
        out = self.to_out(rearrange(out, "b n d (x y) -> b (n d) x y", x=height, y=width))
        return rearrange(out, "(b f) c h w -> b c f h w", b=batch)


class Block(nn.Module):
    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(dim, dim_out, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.GroupNorm(GROUPS, dim_out)

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if modulation is not None:
            scale, shift = modulation
            x = x * (scale + 1) + shift
        return nn.functional.silu(x)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int, dim_out: int, embedding: int | None = None) -> None:
        super().__init__()
        if embedding is not None:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * dim_out))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.res_conv = nn.Conv3d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        modulation = None
        if embedding is not None:
            scale, shift = self.mlp(embedding)[:, :, None, None, None].chunk(2, dim=1)
            modulation = scale, shift
        return self.block2(self.block1(x, modulation)) + self.res_conv(x)


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
        angle = t[:, None] * frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class RelativePositionBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, HEADS)

    def forward(self, frames: int, device: torch.device) -> Tensor:
        frame = torch.arange(frames, device=device)
        distance = frame[None, :] - frame[:, None]
        magnitude = distance.abs()
        far = 8 + (torch.log(magnitude.clamp_min(1) / 8) / math.log(4) * 8).long()
        bucket = torch.where(magnitude < 8, magnitude, far.clamp_max(15)) + 16 * (distance > 0)
        return rearrange(self.relative_attention_bias(bucket), "i j h -> h i j")


class Unet3D(nn.Module):
    """forward as ours: latents (B, 4, T, H, W), timestep (B,), condition (B, cond_dim), bool drop_condition (B,)."""

    def __init__(self, dim: int, cond_dim: int) -> None:
        super().__init__()
        widths = [dim, dim, 2 * dim, 4 * dim]
        steps = list(itertools.pairwise(widths))
        rotary, embedding = Rotary(), 4 * dim + cond_dim

        def temporal(channels: int) -> Residual:
            inner = Rearranged("b (h w) f c", Attention(channels, rotary))
            return Residual(PreNorm(channels, inner))

        def stage(into: int, out: int, resize: nn.Module) -> nn.ModuleList:
            spatial = Residual(PreNorm(out, LinearAttention(out)))
            blocks = ResnetBlock(into, out, embedding), ResnetBlock(out, out, embedding)
            return nn.ModuleList([*blocks, spatial, temporal(out), resize])

        self.null_cond_emb = nn.Parameter(torch.randn(1, cond_dim))
        self.time_rel_pos_bias = RelativePositionBias()
        self.init_conv = nn.Conv3d(4, dim, (1, 5, 5), padding=(0, 2, 2))
        self.init_temporal_attn = temporal(dim)
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)
        )
        resize = {"kernel_size": (1, 4, 4), "stride": (1, 2, 2), "padding": (0, 1, 1)}
        self.downs = nn.ModuleList(
            stage(into, out, nn.Conv3d(out, out, **resize) if out < widths[-1] else nn.Identity())
            for into, out in steps
        )
        bottom = widths[-1]
        self.mid_block1 = ResnetBlock(bottom, bottom, embedding)
        inner = Rearranged("b f (h w) c", Attention(bottom))
        self.mid_spatial_attn = Residual(PreNorm(bottom, inner))
        self.mid_temporal_attn = temporal(bottom)
        self.mid_block2 = ResnetBlock(bottom, bottom, embedding)
        self.ups = nn.ModuleList(
            stage(2 * out, into, nn.ConvTranspose3d(into, into, **resize) if i < 2 else nn.Identity())
            for i, (into, out) in enumerate(reversed(steps))
        )
        self.final_conv = nn.Sequential(ResnetBlock(2 * dim, dim), nn.Conv3d(dim, 4, 1))

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, drop_condition: Tensor | None = None) -> Tensor:
        bias = self.time_rel_pos_bias(x.shape[2], x.device)
        x = self.init_temporal_attn(self.init_conv(x), bias)
        stem = x
        if drop_condition is not None:
            condition = torch.where(drop_condition[:, None], self.null_cond_emb, condition)
        t = torch.cat((self.time_mlp(time), condition), dim=-1)
        skips = []
        for block1, block2, spatial, temporal, shrink in self.downs:
            x = temporal(spatial(block2(block1(x, t), t)), bias)
            skips.append(x)
            x = shrink(x)
        x = self.mid_temporal_attn(self.mid_spatial_attn(self.mid_block1(x, t)), bias)
        x = self.mid_block2(x, t)
        for block1, block2, spatial, temporal, grow in self.ups:
            x = torch.cat((x, skips.pop()), dim=1)
            x = grow(temporal(spatial(block2(block1(x, t), t)), bias))
        return self.final_conv(torch.cat((x, stem), dim=1))
