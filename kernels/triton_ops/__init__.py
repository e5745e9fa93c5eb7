"""The operations as Triton kernels: forward and backward, registered with PyTorch as torch.ops.gaitfast_triton.*.

One file per operation; each says what it must move at least, and `refusal` says which arguments it does not take.
Imported only where Triton is (kernels/_dispatch.py).
"""

from __future__ import annotations

from . import film, group_norm_film_silu, layer_norm, linear_attention, spatial_attention, temporal_attention
from ._launch import INTERPRETED

__all__ = ["INTERPRETED", "MODULES"]

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (film, group_norm_film_silu, layer_norm, linear_attention, spatial_attention, temporal_attention)
}
"""Per operation a module with `run` (the operation) and `refusal` (why not these arguments, or None)."""
