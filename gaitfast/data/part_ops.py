"""RandomPartDilate and RandomPartBlur on the CPU, in place: compiled where the extension is built, else OpenCV."""

from __future__ import annotations

import functools

import torch

from gaitfast.data import reference
from gaitfast.data.augment import KERNELS, ClipParameters

_HALF_WIDTHS = torch.tensor([kernel.half_widths for kernel in KERNELS])


@functools.cache
def compiled() -> bool:
    """Whether the compiled form is there (torch.ops.gaitfast.part_ops_)."""
    try:
        import gaitfast._C  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.gaitfast, "part_ops_")


def tensors(parameters: ClipParameters) -> dict[str, torch.Tensor]:
    """The part operations of B clips as the compiled operators take them: half_widths, dilate_rows, blur_rows."""
    return {
        "half_widths": _HALF_WIDTHS[torch.from_numpy(parameters.kernel)],
        "dilate_rows": torch.from_numpy(parameters.dilate_rows),
        "blur_rows": torch.from_numpy(parameters.blur_rows),
    }


def apply(clips: torch.Tensor, parameters: ClipParameters, backend: str = "auto") -> None:
    """Part dilation, then part blur, of the clips uint8 (B, T, H, W) that drew them. `backend`: compiled, plain, auto.

    Both backends change the same bytes.
    """
    assert backend in ("auto", "compiled", "plain")
    if backend == "compiled" or (backend == "auto" and compiled()):
        torch.ops.gaitfast.part_ops_(clips, **tensors(parameters))
        return
    rows = zip(parameters.kernel.tolist(), parameters.dilate_rows.tolist(), parameters.blur_rows.tolist())
    for clip, (kernel, dilated, blurred) in zip(clips.numpy(), rows):
        if any(dilated) or any(blurred):
            clip[:] = reference.blur_part(reference.dilate_part(clip, kernel, dilated), blurred)
