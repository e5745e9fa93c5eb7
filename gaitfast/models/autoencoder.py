"""The frozen autoencoder E: TAESD's architecture, on silhouettes (Sec. 3.1.1, appendix A.1).

TAESD (Tiny AutoEncoder for Stable Diffusion, Ollin Boer Bohan) maps a frame in [0, 1] to four latent channels at an
eighth of the resolution, about unit variance each, and back. Here its channel width is a parameter: 64 in the published
weights, 32 in the built-in ones, which were trained on silhouettes alone and cost a quarter of the arithmetic. The
encoder is the largest single cost of a pretraining step, so one-channel frames never become three (see `encode`).

Module names are those of the original checkpoints: `state_dict()` has TAESD's keys, `encoder.N...` and `decoder.N...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaitfast.config import UserError
from gaitfast.models.weight_files import official_version, read_weights, require_official

LATENT_CHANNELS = 4
BUILTIN = Path(__file__).resolve().parent.parent / "assets" / "silhouette_autoencoder.safetensors"
CPU_CHUNK = 8
"""Frames that a CPU encodes at a time: at width 32 and 64x64 one bf16 activation is 2 MB then and stays in a core's
cache, which is about twice as fast as a whole batch at once."""


class Clamp(nn.Module):
    """3 tanh(x / 3): nearly the identity where latents live, bounded beyond."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """relu(conv(relu(conv(relu(conv(x))))) + x), all 3x3, on (N, width, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.conv = nn.Sequential(_conv(width, width), relu, _conv(width, width), relu, _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).add_(x).relu_()


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def build_encoder(width: int) -> nn.Sequential:
    """(N, 3, H, W) in [0, 1] -> (N, 4, H/8, W/8)."""
    layers: list[nn.Module] = [_conv(3, width), Block(width)]
    for _ in range(3):
        layers += [_conv(width, width, stride=2, bias=False), Block(width), Block(width), Block(width)]
    return nn.Sequential(*layers, _conv(width, LATENT_CHANNELS))


def build_decoder(width: int) -> nn.Sequential:
    """(N, 4, H/8, W/8) -> (N, 3, H, W), not clamped."""
    layers: list[nn.Module] = [Clamp(), _conv(LATENT_CHANNELS, width), nn.ReLU(inplace=True)]
    for _ in range(3):
        layers += [Block(width), Block(width), Block(width)]
        layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
    return nn.Sequential(*layers, Block(width), _conv(width, 3))


class Autoencoder(nn.Module):
    """Encoder and, where its weights are at hand, decoder; the two may differ in width.

    `decoder` is None for an encoder-only model, whose `decode` raises UserError. `facts` holds the metadata of the file
    that the weights came from (strings).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.encoder = build_encoder(width)
        self.decoder: nn.Sequential | None = build_decoder(width)
        self.no_decoder = ""
        """Why there is no decoder."""
        self.facts: dict[str, str] = {}
        self.foreign: set[str] = set()
        """The halves whose weights came after the model was built: a decoder loaded before its encoder stays."""
        self.to(memory_format=torch.channels_last)

    @property
    def width(self) -> int:
        """Channels inside the encoder."""
        return self.encoder[0].out_channels

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (N, 4, H/8, W/8) of float frames (N, 1 or 3, H, W) in [0, 1]; H and W are multiples of 8.

        A one-channel frame stands for three equal channels (Sec. 3.1.1). They are not materialised: the first
        convolution is linear, so its weights summed over the input channels give the same result from one channel.
        Without gradients on a CPU, frames go through a few at a time, and in bf16 bias, residual and ReLU are fused
        into the convolutions; the result is the plain one up to rounding.
        """
        shape = tuple(frames.shape)
        assert frames.ndim == 4 and shape[1] in (1, 3), f"frames are (N, 1 or 3, H, W), got {shape}"
        assert shape[2] % 8 == 0 and shape[3] % 8 == 0, f"H and W are multiples of 8, got {shape}"
        assert frames.is_floating_point(), f"frames are floats in [0, 1], got {frames.dtype}"
        first = self.encoder[0]
        weight = first.weight.sum(1, keepdim=True) if shape[1] == 1 else first.weight
        frames = frames.to(weight.dtype, memory_format=torch.channels_last)
        if torch.is_grad_enabled() or frames.device.type != "cpu" or not len(frames):
            return self._encode_plain(frames, weight)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        run = self._fused_encoder(weight, dtype) if fuses(dtype) else lambda part: self._encode_plain(part, weight)
        return torch.cat([run(part) for part in frames.split(CPU_CHUNK)])

    def _encode_plain(self, frames: Tensor, weight: Tensor) -> Tensor:
        x = F.conv2d(frames, weight, self.encoder[0].bias, padding=1)
        return self.encoder[1:](x)

    def _fused_encoder(self, weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The encoder as a function of frames (n, 1 or 3, H, W), its weights cast to `dtype` once."""
        convolution = torch.ops.mkldnn._convolution_pointwise
        cast = {id(p): p.to(dtype) for p in self.encoder.parameters()}
        cast[id(self.encoder[0].weight)] = weight.to(dtype)

        def settings(layer: nn.Conv2d) -> tuple:
            bias = None if layer.bias is None else cast[id(layer.bias)]
            return cast[id(layer.weight)], bias, layer.padding, layer.stride, layer.dilation, 1

        def run(x: Tensor) -> Tensor:
            x = x.to(dtype)
            for layer in self.encoder:
                if isinstance(layer, Block):
                    y = convolution(x, *settings(layer.conv[0]), "relu", [], "")
                    y = convolution(y, *settings(layer.conv[2]), "relu", [], "")
                    x = convolution.binary(y, x, *settings(layer.conv[4]), "add", 1.0, "relu", [], "")
                else:
                    x = convolution(x, *settings(layer), "none", [], "")
            return x

        return run

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (N, 3, H, W) of latents (N, 4, H/8, W/8), as TAESD puts them out: not clamped to [0, 1].

        UserError when the model has no decoder.
        """
        if self.decoder is None:
            raise UserError(f"autoencoder.weights: cannot decode: {self.no_decoder}; put the decoder's file beside it")
        shape = tuple(latents.shape)
        assert latents.ndim == 4 and shape[1] == LATENT_CHANNELS, (
            f"latents are (N, {LATENT_CHANNELS}, h, w), got {shape}"
        )
        return self.decoder(latents.to(self.decoder[1].weight.dtype, memory_format=torch.channels_last))

    def decode_silhouette(self, latents: Tensor) -> Tensor:
        """Silhouettes (N, 1, H, W) in [0, 1] of latents (N, 4, H/8, W/8): `decode`, mean over its channels, clamped."""
        return self.decode(latents).mean(1, keepdim=True).clamp(0, 1)


def fuses(dtype: torch.dtype) -> bool:
    """Whether the CPU encoder uses oneDNN's fused convolutions (those of torch.compile): bf16, where both support it.

    In float32 the arithmetic itself takes the time and fusing gained nothing.
    """
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def original_keys(weights: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """The weights under TAESD's own keys, `{"encoder": {...}, "decoder": {...}}`, a half that is absent left out.

    Known styles: original, both halves (`encoder.N...`, or one dict a half) or one half alone (`N...`),
    and diffusers (`encoder.layers.N...`; its decoder has no clamp layer, so N is one less). UserError for anything
    else.
    """
    if weights.keys() <= {"encoder", "decoder"} and all(isinstance(half, Mapping) for half in weights.values()):
        weights = {f"{half}.{key}": value for half, state in weights.items() for key, value in state.items()}
    bare = "encoder" if "0.weight" in weights else "decoder"
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = re.fullmatch(r"(?:(encoder|decoder)\.)?(layers\.)?(\d+)\.(.+)", key)
        if match is None:
            raise UserError(f"{source}: {key} is no key of TAESD; give a TAESD file in the original or diffusers style")
        half, diffusers, number, rest = match.groups()
        half = half or bare
        index = int(number) + (1 if diffusers and half == "decoder" else 0)
        halves.setdefault(half, {})[f"{index}.{rest}"] = value
    if not halves:
        raise UserError(f"{source}: holds no weights; give a TAESD file")
    return halves


def load_weights(model: Autoencoder, weights: Mapping[str, Tensor], source: str = "TAESD weights") -> None:
    """Put TAESD weights of any known key style into `model`, which keeps its dtype, device and mode.

    A half of another width is rebuilt at the width of the weights. An encoder alone leaves the model without a decoder,
    because the decoder of another training draws nonsense from its latents; a decoder alone leaves the encoder alone.
    UserError, with the model unchanged, for missing or unknown keys, wrong shapes and values that are not finite.
    """
    builders = {"encoder": build_encoder, "decoder": build_decoder}
    halves = original_keys(weights, source)
    widths = {half: _checked_width(half, builders[half], state, source) for half, state in halves.items()}
    like = next(model.parameters())
    for half, state in halves.items():
        module = getattr(model, half)
        if module is None or next(module.parameters()).shape[0] != widths[half]:
            module = builders[half](widths[half]).to(like.device, like.dtype, memory_format=torch.channels_last)
            module.train(model.training).requires_grad_(like.requires_grad)
            setattr(model, half, module)
        module.load_state_dict(state)
    model.foreign |= halves.keys()
    if "decoder" not in model.foreign:
        model.decoder = None
        model.no_decoder = f"{source} holds only an encoder"


def _checked_width(half: str, build: Callable[[int], nn.Sequential], state: Mapping[str, Tensor], source: str) -> int:
    """The channel width of one half's weights, after all their keys, shapes and values were found right."""
    first = {"encoder": "0.weight", "decoder": "1.weight"}[half]
    if first not in state or state[first].ndim != 4:
        raise UserError(f"{source}: {half}.{first} is missing or no convolution; give a TAESD file")
    width = state[first].shape[0]
    with torch.device("meta"):
        expected = build(width).state_dict()
    for key, value in expected.items():
        if key not in state:
            raise UserError(f"{source}: {half}.{key} is missing; the file is incomplete or of another architecture")
        found, wanted = tuple(state[key].shape), tuple(value.shape)
        if found != wanted:
            raise UserError(f"{source}: {half}.{key} has shape {found}, but TAESD of width {width} has {wanted}")
        if not state[key].is_floating_point() or not torch.isfinite(state[key]).all():
            raise UserError(f"{source}: {half}.{key} holds values that are not finite floats; get the file again")
    for key in state:
        if key not in expected:
            raise UserError(f"{source}: {half}.{key} is no part of TAESD; the file is of another architecture")
    return width


def build_autoencoder(weights: str | Path = "builtin") -> Autoencoder:
    """A frozen autoencoder (float32, eval mode, no gradients) from `autoencoder.weights` of the config.

    `builtin`: the weights shipped with this package. A path: a local TAESD file, original or diffusers keys,
    .safetensors or .pth; beside an encoder-only file (`taesd_encoder.*`) the decoder's (`taesd_decoder.*`) is read too,
    and without it only `decode` fails. `official:FILE`: the same, if the file's published digest is right; a decoder
    beside it whose digest is not known is left alone. UserError for files that are missing, damaged or something else.
    """
    name = str(weights)
    official = name.startswith("official:")
    path = BUILTIN if name == "builtin" else Path(name.removeprefix("official:")).expanduser()
    if official:
        require_official(path)
    state, facts = read_weights(path)
    if "encoder" not in original_keys(state, str(path)):
        raise UserError(f"{path}: holds only a decoder; give the encoder's file (the decoder is found beside it)")
    model = Autoencoder()
    load_weights(model, state, str(path))
    model.facts = facts
    beside = path.with_name(path.name.replace("encoder", "decoder"))
    if model.decoder is None and beside != path and beside.is_file():
        if official and official_version(beside) is None:
            model.no_decoder = f"{beside}, beside the official encoder, has no known digest"
        else:
            load_weights(model, read_weights(beside)[0], str(beside))
    model.foreign = set()
    return model.eval().requires_grad_(False)
