"""TAESD's weights in and out of the autoencoder: original and diffusers key styles, exact round trip.

original   encoder.N..., decoder.N... with the layer numbers of the published nn.Sequential; or N... alone for one half
diffusers  encoder.layers.N..., decoder.layers.N...; AutoencoderTiny has no clamp layer, so its decoder numbers are one
           less. Its encoder takes [-1, 1] and maps it to [0, 1] itself: the weights are the same, and
           `Autoencoder.encode` takes [0, 1] whatever style they came in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gaitfast.models.autoencoder import Autoencoder, load_weights

STYLES = ("original", "diffusers")


def load_state_dict(model: Autoencoder, sd: Mapping[str, Tensor]) -> None:
    """Copy TAESD weights of either style, both halves or one, into `model`, which keeps its dtype, device and mode.

    A half whose weights have another width is rebuilt at theirs. An encoder alone takes the model's decoder away, since
    the two belong to one training; load the decoder's weights afterwards. UserError, and the model unchanged, if
    anything is missing, unknown, mis-shaped or not finite.
    """
    load_weights(model, sd)


def state_dict(model: Autoencoder, style: str = "original") -> dict[str, Tensor]:
    """The weights of `model`, copied, under combined keys of `style` ("original" or "diffusers")."""
    assert style in STYLES, f"style is one of {', '.join(STYLES)}, got {style!r}"
    out = {}
    for key, value in model.state_dict().items():
        if style == "diffusers":
            half, number, rest = key.split(".", 2)
            key = f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"
        out[key] = value.detach().clone(memory_format=torch.contiguous_format)
    return out
