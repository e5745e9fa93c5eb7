"""Features that are easy, and features made to break an order."""

import numpy as np
import torch

KINDS = (
    "normal",
    "integers",
    "copies",
    "multiples",
    "neighbours",
    "denormal",
    "huge",
    "sparse",
    "spread",
    "half",
    "double",
)


def features(kind, seed, count, channels, parts):
    """A tensor (count, channels, parts) of the given kind."""
    rng = np.random.default_rng(seed)
    shape = (count, channels, parts)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "integers":  # exact ties without number
        x = rng.integers(-1, 2, shape).astype(np.float32)
    elif kind == "copies":
        x = x[rng.integers(0, max(1, count // 4), count)]
    elif kind == "multiples":  # equal cosines that no float arithmetic finds equal by itself
        x = x[rng.integers(0, max(1, count // 4), count)] * rng.integers(1, 8, (count, 1, 1)).astype(np.float32)
    elif kind == "neighbours":  # each value the same, or the next float up or down
        x = np.repeat(x[:1], count, 0)
        step = rng.integers(-1, 2, shape)
        x = np.where(step == 0, x, np.nextafter(x, np.float32(1e3) * step.astype(np.float32)))
    elif kind == "denormal":
        x = rng.integers(-3, 4, shape).astype(np.float32) * np.float32(1.4e-45)
    elif kind == "huge":
        x = x * np.float32(1e37)
    elif kind == "sparse":  # whole parts of zeros among them
        x = x * (rng.random(shape) < 0.3)
    elif kind == "spread":  # differences that float64 cannot hold
        x = x * (10.0 ** rng.integers(-9, 10, shape)).astype(np.float32)
    tensor = torch.from_numpy(x.astype(np.float32))
    if kind == "half":
        return tensor.to(torch.float16 if seed % 2 else torch.bfloat16)
    if kind == "double":
        return torch.from_numpy(1.0 + 1e-12 * rng.standard_normal(shape))
    return tensor
