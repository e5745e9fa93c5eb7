"""Recognizers as ONNX graphs, and what onnxruntime makes of them beside PyTorch.

Input: `silhouettes` float32 (N, S, 64, 44) in [0, 1], any number of clips and frames. Outputs: `features` (N, C, P)
and, of a whole recognizer, `embedding` (N, E, P) and, with a classifier, `logits` (N, K, P). One length per batch: an
ONNX graph takes no packed clips.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gaitfast.config import UserError
from gaitfast.models.recognizer import Recognition, Recognizer

PACKAGES = ("onnx", "onnxscript")
OPSET = 18
LARGEST = 2**31 - 2**24
"""Bytes of weights: a protobuf file ends at 2 GiB, and the graph needs some of them."""
TRACED = (2, 6)
"""Clips and frames of the batch that the exporter sees; the graph takes any."""


class _Graph(nn.Module):
    """A recognizer, or its backbone, whose outputs are a tuple without gaps."""

    def __init__(self, recognizer: Recognizer, part: str) -> None:
        super().__init__()
        self.backbone = recognizer.backbone
        self.head = recognizer.head if part == "all" else None

    def forward(self, silhouettes: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(silhouettes)
        rest = () if self.head is None else self.head(features)
        return tuple(output for output in (features, *rest) if output is not None)


def require_packages() -> None:
    """UserError unless the exporter's packages are installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format onnx: needs {' and '.join(missing)}, which is not installed; pip install -e '.[onnx]'"
        )


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def write(path: Path, recognizer: Recognizer, part: str, facts: Mapping[str, str]) -> None:
    """Write the graph of a recognizer, which is put into eval mode. part: "all" or "backbone".

    `facts` become the file's metadata. UserError if the weights do not fit into one file.
    """
    graph = _Graph(recognizer, part).eval()
    if (size := sum(value.numel() * value.element_size() for value in graph.state_dict().values())) > LARGEST:
        raise UserError(
            f"{path}: {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2 at most; use --part backbone"
        )
    clips = torch.zeros(*TRACED, 64, 44)
    with torch.no_grad():
        count = len(graph(clips))
    with _quiet():
        program = torch.onnx.export(
            graph,
            (clips,),
            dynamo=True,
            input_names=["silhouettes"],
            output_names=Recognition._fields[:count],
            dynamic_shapes=({0: "N", 1: "S"},),
            opset_version=OPSET,
            verbose=False,
        )
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


def differences(path: Path, recognizer: Recognizer, part: str, batches: Sequence[Tensor]) -> dict[str, float]:
    """How far onnxruntime, on the CPU, is from PyTorch: output -> the largest difference over all batches.

    In units of the output's largest magnitude where that is above 1. NaN if either has one, infinity if shapes differ.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    graph = _Graph(recognizer, part).eval()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    worst = torch.zeros(len(names))
    for clips in batches:
        with torch.no_grad():
            expected = graph(clips)
        found = [torch.from_numpy(array) for array in session.run(names, {"silhouettes": clips.numpy()})]
        assert len(expected) == len(found), f"{len(found)} outputs, expected {len(expected)}"
        here = [_difference(*pair) for pair in zip(found, expected)]
        worst = torch.maximum(worst, torch.tensor(here))  # NaN stays NaN
    return dict(zip(names, worst.tolist()))


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its own deprecations and of packages that these networks do not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
