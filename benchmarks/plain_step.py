"""The training step as one writes it in PyTorch: the baseline of benchmarks/step.py.

The same networks with the same weights, from their published formulation: the encoder sees three equal channels and all
frames at once, activations come before pooling, strips are cut and concatenated, maps lie in PyTorch's default layout,
the denoiser is benchmarks/reference_denoiser.py, the batches come from the reference loader, the optimizer is
PyTorch's. Autocast to bfloat16, as on our side; nothing else is tuned, nothing is made slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference_denoiser import Unet3D
from gaitfast.config import PretrainConfig, TransferConfig
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.interop import video_diffusion
from gaitfast.models.autoencoder import Autoencoder, Block
from gaitfast.models.recognizer import Recognizer
from gaitfast.recognition.losses import identity_loss, triplet_loss

# --- the encoder ------------------------------------------------------------------------------------------------------


class PlainEncoder(nn.Module):
    """frames (N, 1, H, W) in [0, 1] -> latents (N, 4, H/8, W/8)."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.layers = copy.deepcopy(autoencoder.encoder).to(memory_format=torch.contiguous_format)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.repeat(1, 3, 1, 1)
        for layer in self.layers:
            if isinstance(layer, Block):
                y = x
                for part in (0, 2, 4):
                    y = layer.conv[part](y)
                    y = F.relu(y) if part < 4 else y
                x = F.relu(y + x)
            else:
                x = layer(x)
        return x


# --- the backbones ----------------------------------------------------------------------------------------------------


def stack(module: nn.Module, x: Tensor) -> Tensor:
    """Convolutions, each followed by LeakyReLU, then pooling; focal ones on strips that are cut and joined again."""
    for conv, layer in zip(module.convs, module.layers):
        strips = x.chunk(layer.strips, 2) if layer.strips > 1 else (x,)
        parts = [conv(strip) for strip in strips]
        x = F.leaky_relu(torch.cat(parts, 2) if len(parts) > 1 else parts[0], 0.01, inplace=True)
        x = F.max_pool2d(x, 2) if layer.pool else x
    return x


def frames_of(clips: Tensor) -> Tensor:
    return clips.flatten(0, 1).unsqueeze(1)


def pyramid(x: Tensor, bins: Sequence[int]) -> Tensor:
    features = []
    for count in bins:
        strips = x.reshape(*x.shape[:2], count, -1)
        features.append(strips.mean(-1) + strips.max(-1)[0])
    return torch.cat(features, -1)


def over_time(x: Tensor, clips: int) -> Tensor:
    return x.unflatten(0, (clips, -1)).max(1)[0]


def smplgait(net: nn.Module, clips: Tensor) -> Tensor:
    return pyramid(over_time(stack(net.frames, frames_of(clips)), len(clips)), net.bins)


def gaitset(net: nn.Module, clips: Tensor) -> Tensor:
    bins, count = (16, 8, 4, 2, 1), len(clips)
    frames = stack(net.block1, frames_of(clips))
    whole = stack(net.global2, over_time(frames, count))
    frames = stack(net.block2, frames)
    whole = stack(net.global3, whole + over_time(frames, count))
    pooled = over_time(stack(net.block3, frames), count)
    return torch.cat((pyramid(pooled, bins), pyramid(whole + pooled, bins)), -1)


def gaitpart(net: nn.Module, clips: Tensor) -> Tensor:
    strips = pyramid(stack(net.frames, frames_of(clips)), (16,)).unflatten(0, (len(clips), -1))  # (N, S, C, P)
    x = strips.permute(0, 3, 2, 1).flatten(1, 2)
    total = 0
    for motion in (net.motion3, net.motion5):
        score = motion.score(F.leaky_relu(motion.squeeze(x), 0.01))
        pad = motion.window // 2
        template = F.avg_pool1d(x, motion.window, 1, pad) + F.max_pool1d(x, motion.window, 1, pad)
        total = total + template * torch.sigmoid(score)
    return total.max(-1)[0].unflatten(1, (16, -1)).transpose(1, 2)


def gaitgl(net: nn.Module, clips: Tensor) -> Tensor:
    x = clips.unsqueeze(1)
    for conv in (*net.stem, net.time_pool):
        x = F.leaky_relu(conv(x), 0.01, inplace=True)
    for number, stage in enumerate((net.stage1, net.stage2, net.stage3)):
        for layer in stage:
            whole = layer.whole(x)
            local = torch.cat([layer.local(strip) for strip in x.chunk(layer.strips, 3)], 3)
            if layer.stacked:
                x = F.leaky_relu(torch.cat((whole, local), 3), 0.01, inplace=True)
            else:
                x = F.leaky_relu(whole, 0.01, inplace=True) + F.leaky_relu(local, 0.01, inplace=True)
        x = F.max_pool3d(x, (1, 2, 2)) if number == 0 else x
    rows = x.max(2)[0].float().clamp(min=1e-6).pow(net.row_pool.exponent)
    return rows.mean(-1).pow(1 / net.row_pool.exponent)


def gaitbase(net: nn.Module, clips: Tensor) -> Tensor:
    def norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, net.training)

    x = F.relu(norm(net.norm, net.conv(frames_of(clips))), inplace=True)
    for block in net.blocks:
        y = F.relu(norm(block.norm1, block.conv1(x)), inplace=True)
        y = norm(block.norm2, block.conv2(y))
        x = F.relu(y + (norm(block.project[1], block.project[0](x)) if block.project else x), inplace=True)
    return pyramid(over_time(x, len(clips)), (16,))


FORWARDS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    f.__name__: f for f in (smplgait, gaitset, gaitpart, gaitgl, gaitbase)
}


class PlainBackbone(nn.Module):
    """clips (N, S, 64, 44) -> features (N, C, P), with the weights of one of our backbones."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.net = copy.deepcopy(recognizer.backbone)
        self.function = FORWARDS[recognizer.name]

    def forward(self, clips: Tensor) -> Tensor:
        return self.function(self.net, clips)


# --- the steps --------------------------------------------------------------------------------------------------------


class PlainPretraining:
    """One step: encode, noise, predict, loss, backward, AdamW."""

    def __init__(
        self,
        config: PretrainConfig,
        recognizer: Recognizer,
        autoencoder: Autoencoder,
        objective: DiffusionObjective,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.config, self.device = config, device
        self.encoder = PlainEncoder(autoencoder).to(device)
        self.backbone = PlainBackbone(recognizer).to(device)
        self.denoiser = Unet3D(config.denoiser.dim, recognizer.feature_channels)
        self.denoiser.load_state_dict(video_diffusion.state_dict(objective.denoiser))
        self.denoiser.to(device)
        self.tables = [t.to(device) for t in (objective.signal, objective.sigma, objective.weights)]
        rates = {"lr": config.optimizer.lr_denoiser}, {"lr": config.optimizer.lr_backbone}
        groups = [
            {"params": list(net.parameters()), **rate} for net, rate in zip((self.denoiser, self.backbone), rates)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
        )
        self.networks = self.encoder, self.backbone, self.denoiser
        if compiled:
            self.networks = tuple(torch.compile(network, dynamic=False) for network in self.networks)

    def autocast(self) -> torch.autocast:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def __call__(self, batch) -> Tensor:
        encoder, backbone, denoiser = self.networks
        signal, sigma, weights = self.tables
        clip_e, clip_g = (clip.to(self.device) for clip in (batch.clip_e, batch.clip_g))
        count, frames = clip_e.shape[:2]
        with torch.no_grad(), self.autocast():
            latents = encoder(clip_e.flatten(0, 1).unsqueeze(1).float() / 255).float()
        latents = latents.unflatten(0, (count, frames)).transpose(1, 2).contiguous()
        timestep = torch.randint(1, 1001, (count,), device=self.device)
        drop = torch.rand(count, device=self.device) < self.config.diffusion.p_uncond
        noise = torch.randn_like(latents)
        column = (-1, 1, 1, 1, 1)
        noisy = signal[timestep].view(column) * latents + sigma[timestep].view(column) * noise
        self.optimizer.zero_grad()
        with self.autocast():
            condition = backbone(clip_g.float() / 255).mean(-1)
            predicted = denoiser(noisy, timestep, condition, drop)
        errors = (predicted.float() - noise).square().mean((1, 2, 3, 4))
        loss = (weights[timestep] * errors).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class PlainTransfer:
    """One step of supervised training: backbone, head, triplet and identity loss, backward, Adam."""

    def __init__(
        self, config: TransferConfig, recognizer: Recognizer, device: torch.device, compiled: bool = False
    ) -> None:
        self.config, self.device = config, device
        self.backbone = PlainBackbone(recognizer).to(device).train()
        self.head = copy.deepcopy(recognizer.head).to(device).train()
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        decay = config.optimizer.weight_decay
        self.optimizer = torch.optim.Adam(parameters, lr=config.optimizer.lr, weight_decay=decay)
        self.network = torch.compile(self.backbone, dynamic=False) if compiled else self.backbone

    def __call__(self, batch) -> Tensor:
        config = self.config
        silhouettes, label = batch.silhouettes.to(self.device), batch.label.to(self.device)
        self.optimizer.zero_grad()
        enabled = config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            embedding, logits = self.head(self.network(silhouettes.float() / 255))
            loss = triplet_loss(embedding, label, config.triplet.margin, config.triplet.metric).loss
            if logits is not None:
                identity = identity_loss(
                    logits, label, scale=config.identity.scale, smoothing=config.identity.smoothing
                )
                loss = loss + config.identity.weight * identity.loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()
