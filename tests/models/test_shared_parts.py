"""What the recognition models share exists once, and every model is built from it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from gaitfast.models import gaitbase, gaitgl, gaitpart, parts
from gaitfast.models.recognizer import VARIANTS, build_recognizer

PACKAGE = Path(parts.__file__).resolve().parent.parent
FOLDERS = ("models", "recognition", "interop")
SHARED = {parts.ConvStack, parts.SeparateFCs, parts.SeparateBNNecks, parts.Head}
OWN = {
    "gaitset": set(),
    "smplgait": set(),
    "gaitpart": {gaitpart.MicroMotion},
    "gaitgl": {gaitgl.GlobalLocalConv, gaitgl.GeneralizedMean, gaitgl.GaitGLHead},
    "gaitbase": {gaitbase.ResidualBlock, gaitbase.Projection, gaitbase.FrameNorm},
}
EVERY = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def functions(code: str) -> Iterator[tuple[str, str]]:
    """(name, shape) of every function of three statements or more, besides its docstring.

    The shape is the code without the names of variables and without constants; what is called keeps its name.
    """
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if sum(isinstance(inner, ast.stmt) for statement in body for inner in ast.walk(statement)) < 3:
            continue
        called = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
        for inner in (part for statement in body for part in ast.walk(statement)):
            if isinstance(inner, ast.Name) and id(inner) not in called:
                inner.id = "_"
            elif isinstance(inner, ast.Constant):
                inner.value = 0
            elif isinstance(inner, ast.arg):
                inner.arg = "_"
        yield node.name, "\n".join(map(ast.dump, body))


def copies(sources: dict[str, str]) -> list[tuple[str, str]]:
    """Pairs of functions of one shape."""
    seen: dict[str, str] = {}
    found = []
    for file, code in sources.items():
        for name, shape in functions(code):
            place = f"{file}:{name}"
            if shape in seen:
                found.append((seen[shape], place))
            seen.setdefault(shape, place)
    return found


def test_no_function_is_there_twice():
    sources = {
        str(path.relative_to(PACKAGE)): path.read_text()
        for folder in FOLDERS
        for path in (PACKAGE / folder).glob("*.py")
    }
    assert len(sources) > 15
    assert copies(sources) == []


def test_a_copy_with_other_names_is_seen():
    code = '''
def pool(maps, bins):
    """Strips."""
    strips = maps.unflatten(2, (bins, -1)).flatten(3)
    best = max_over(strips, 3)
    return strips.mean(3) + best
'''
    copy = code.replace("maps", "x").replace("strips", "rows").replace("def pool", "def other").replace("3", "4")
    assert copies({"a": code, "b": copy}) == [("a:pool", "b:other")]
    assert copies({"a": code, "b": copy.replace("mean", "amax")}) == []


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_models_are_made_of_the_shared_parts(name, variant):
    """Besides PyTorch's layers: the shared parts, the model's own, and its backbone."""
    with torch.device("meta"):
        model = build_recognizer(name, variant, 5)
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn.")}
    assert kinds - SHARED - OWN[name] == {type(model), type(model.backbone)}
    assert isinstance(model.backbone, parts.Backbone) and parts.SeparateFCs in kinds
    loose = [key for key, _ in model.named_parameters() if key.rpartition(".")[2] not in ("weight", "bias", "exponent")]
    assert not loose
    convolutions = [type(module) for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    assert (len(convolutions) == 0) == (name == "gaitgl")
