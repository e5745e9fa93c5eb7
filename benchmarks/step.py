"""The whole training step against plain PyTorch: `python -m benchmarks.step --quick|--full --json FILE`.

Ours is the real thing: a `Pretraining` or `Transfer` with DeepSpeed and the loader that `data.engine` chooses here. The
plain side is benchmarks/plain_step.py on the reference loader. Both take turns in one process; C library settings that
our entries make are undone for the plain side's turns. Peak memory is measured in a process of its own for each side,
from before the networks are built, after the same imports.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import envelope
from benchmarks.memory import in_child, status_kib
from benchmarks.plain_step import PlainPretraining, PlainTransfer
from benchmarks.timing import Timing, matmul_ceiling
from gaitfast import files
from gaitfast.cli import main as command
from gaitfast.config import PretrainConfig, TransferConfig, load
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
from gaitfast.data.reference import ReferenceLoader
from gaitfast.engine import world
from gaitfast.engine.memory import keep_freed_memory
from gaitfast.models import build_recognizer
from gaitfast.pretrain import Pretraining
from gaitfast.transfer import Transfer

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = ("smplgait", "gaitset", "gaitpart", "gaitgl", "gaitbase")
PAPER = {"pretrain": (120_000, 64), "transfer": (60_000, 128)}
"""Iterations and clips of a batch in the paper's schedules (Gait3D)."""


class Case(NamedTuple):
    """One configuration of one stage."""

    stage: str
    name: str
    settings: dict[str, Any]
    demo: bool = False
    """configs/pretrain/demo.yaml; otherwise published networks at 30 frames."""

    @property
    def label(self) -> str:
        return f"{self.stage}/{self.name}"


def pretraining(backbone: str, batch: int, frames: int = 30) -> Case:
    settings = {"backbone.name": backbone, "data.frames": frames, "train.batch": batch, "train.precision": "bf16"}
    return Case("pretrain", backbone, settings)


def transferring(backbone: str, batch: str, frames: int = 30) -> Case:
    settings = {"backbone.name": backbone, "data.frames": frames, "train.batch": batch, "train.precision": "bf16"}
    if backbone in ("gaitset", "gaitpart"):
        settings["identity.weight"] = 0
    return Case("transfer", backbone, settings)


HEADLINE = {"pretrain/smplgait": "", "pretrain/demo": "demo_"}
"""Rows of the headline -> prefix of their figures there; peak memory is measured for them."""
DEMO = Case("pretrain", "demo", {"eval.condition_clips": 4}, demo=True)


def make_dataset(folder: Path) -> Path:
    """Synthetic walkers, packed: enough sequences for a batch of 32."""
    tree, packed = folder / "tree", folder / "packed"
    options = ["--subjects", "10", "--test-subjects", "2", "--walks", "4", "--frames", "30", "36", "--workers", "1"]
    for arguments in (
        ["walkers", str(tree), *options],
        ["prepare", str(tree), str(packed), "--layout", "opengait", "--workers", "1"],
    ):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
            command(arguments)
    return packed


def config_of(case: Case, dataset: Path, run: Path) -> PretrainConfig | TransferConfig:
    settings = {"data.path": dataset, "run": run, "train.iterations": 100_000, **case.settings}
    if case.stage == "pretrain":
        settings |= {"eval.condition_clips": 4, "eval.condition_timesteps": 1}
    file = run.parent / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text((ROOT / "configs/pretrain/demo.yaml").read_text() if case.demo else "log_every: 50\n")
    kind = PretrainConfig if case.stage == "pretrain" else TransferConfig
    return load(kind, file, [f"{key}={value}" for key, value in settings.items()])


class Side(NamedTuple):
    """A training step that can be repeated."""

    step: Callable[[], None]
    close: Callable[[], None]
    run: Any
    batch: Callable[[], Any]


def loader_options(config: Any, sampling: Any) -> dict[str, Any]:
    return {"sampling": sampling, "seed": config.seed, "batch": config.train.batch}


def ours(case: Case, config: Any, process: world.World) -> Side:
    run = (Pretraining if case.stage == "pretrain" else Transfer)(config, process)
    loader = build_loader(run.dataset, config.data, device=process.device, **loader_options(config, run.sampling))
    steps = iter(range(10**9))

    def step() -> None:
        number = next(steps)
        batch = next(loader)
        run.engine.set_learning_rate(number)
        run.train_step(batch, number)

    def close() -> None:
        loader.close()
        run.meters.close()
        run.events.close()

    return Side(step, close, run, lambda: next(loader))


def plain(case: Case, config: Any, process: world.World, compiled: bool = False) -> Side:
    """The same networks, drawn anew; times do not depend on their weights."""
    backbone = config.backbone
    dataset = PackedDataset.open(config.data.path)
    if case.stage == "pretrain":
        from gaitfast.diffusion import NoiseSchedule, loss_weights
        from gaitfast.diffusion.objective import DiffusionObjective
        from gaitfast.models import build_autoencoder, build_denoiser

        recognizer = build_recognizer(backbone.name, backbone.variant, width=backbone.width)
        schedule = NoiseSchedule(config.diffusion.schedule)
        weights = loss_weights(schedule, config.diffusion.weighting, config.diffusion.gamma, False)
        denoiser = build_denoiser(config.denoiser.dim, cond_dim=recognizer.feature_channels)
        objective = DiffusionObjective(recognizer.backbone, denoiser, schedule, weights)
        autoencoder = build_autoencoder(config.autoencoder.weights)
        body = PlainPretraining(config, recognizer, autoencoder, objective, process.device, compiled)
    else:
        classes = len(set(dataset.subject[dataset.split(config.data.split)])) if config.identity.weight else None
        recognizer = build_recognizer(backbone.name, backbone.variant, classes, width=backbone.width)
        body = PlainTransfer(config, recognizer, process.device, compiled)
    loader = ReferenceLoader(dataset, config.data, **loader_options(config, recognizer.sampling))
    return Side(lambda: body(next(loader)), loader.close, body, lambda: next(loader))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def in_turns(sides: dict[str, Callable[[], None]], device: torch.device, seconds: float, least: int) -> dict:
    """Milliseconds of a step of each side, in turns. Our C library settings hold for ours and for names with `+`."""
    for _ in range(2):
        for name, step in sides.items():
            keep_freed_memory(name == "ours" or "+" in name)
            timed(step, device)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or min(map(len, samples.values())) < least:
        for name, step in sides.items():
            keep_freed_memory(name == "ours" or "+" in name)
            samples[name].append(timed(step, device))
    return {name: Timing.of(taken) for name, taken in samples.items()}


# --- where the time goes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(target: Any, method: str, into: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the milliseconds of every call of target.method to into[name]."""
    original = getattr(target, method)

    def call(*arguments: Any, **options: Any) -> Any:
        result = []
        into[name] = into.get(name, 0.0) + timed(lambda: result.append(original(*arguments, **options)), device)
        return result[0]

    setattr(target, method, call)
    try:
        yield
    finally:
        delattr(target, method)


def parts_of(case: Case, side: Side, device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds a step of ours spends in: data, encode, forward, backward, optimizer (with ZeRO), the rest.

    forward and backward are split by what the two networks take alone, without ZeRO.
    """
    keep_freed_memory()
    run, found = side.run, {}
    engine = run.engine.engine
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context
        if case.stage == "pretrain":
            watch(watched(run, "encode", found, "encode", device))
        watch(watched(engine, "forward", found, "forward", device))
        watch(watched(engine, "backward", found, "backward", device))
        watch(watched(engine, "step", found, "optimizer", device))
        total = 0.0
        for number in range(steps):
            before = time.perf_counter()
            batch = side.batch()
            found["data"] = found.get("data", 0.0) + (time.perf_counter() - before) * 1e3
            total += timed(functools.partial(run.train_step, batch, number), device)
    found["rest"] = total - sum(value for key, value in found.items() if key != "data")
    found = {key: value / steps for key, value in found.items()}
    if case.stage == "pretrain":
        alone = networks_alone(run, side.batch(), device)
        both, whole = sum(alone.values()), found.pop("forward") + found.pop("backward")
        found |= {"backbone": whole * alone["backbone"] / both, "denoiser": whole * alone["denoiser"] / both}
    return {key: round(value, 2) for key, value in found.items()}


def networks_alone(run: Pretraining, batch: Any, device: torch.device) -> dict[str, float]:
    """Milliseconds of forward and backward of each network on its own."""
    objective = run.engine.objective
    silhouettes = batch.clip_g.float() / 255
    latents = run.encode(batch.clip_e)
    timestep = torch.full((len(latents),), 500, device=device)
    with torch.no_grad(), run.engine.autocast():
        condition = objective.condition(silhouettes).float()

    def backbone() -> None:
        with run.engine.autocast():
            loss = objective.condition(silhouettes).float().square().mean()
        torch.autograd.grad(loss, [p for p in objective.backbone.parameters() if p.requires_grad], allow_unused=True)

    def denoiser() -> None:
        with run.engine.autocast():
            loss = objective.denoiser(latents, timestep, condition, None).float().square().mean()
        torch.autograd.grad(loss, [p for p in objective.denoiser.parameters() if p.requires_grad], allow_unused=True)

    return {call.__name__: min(timed(call, device) for _ in range(3)) for call in (backbone, denoiser)}


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(name: str, case: Case, dataset: str, device: str, threads: int) -> dict[str, float]:
    """MiB of three steps of one side, in this process: beyond what lay there before, and all of it."""
    torch.set_num_threads(threads)
    import deepspeed  # noqa: F401 (both sides, so that neither pays for it)

    process = world.start()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, Path(dataset), Path(folder) / "run")
        gc.collect()
        before = status_kib("VmRSS")
        keep_freed_memory(name != "plain")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        side = plain(case, config, process) if name == "plain" else ours(case, config, process)
        for _ in range(3):
            side.step()
        if device == "cuda":
            result = {"extra_mib": torch.cuda.max_memory_allocated() / 2**20}
        else:
            result = {"extra_mib": (status_kib("VmHWM") - before) / 1024}
        result["process_mib"] = status_kib("VmHWM") / 1024
        side.close()
    world.stop()
    return {key: round(value, 1) for key, value in result.items()}


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(case: Case, dataset: Path, process: world.World, arguments: argparse.Namespace) -> dict:
    """A row: times of both sides, parts, FLOPs, projected hours, peak memory."""
    device = process.device
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, dataset, Path(folder) / "run")
        one = ours(case, config, process)
        other = plain(case, config, process)
        sides = {"plain": other.step, "ours": one.step}
        if arguments.full and case.label in HEADLINE:
            sides["plain + malloc"] = other.step
        if arguments.compile:
            sides["compiled"] = plain(case, config, process, compiled=True).step
        with FlopCounterMode(display=False) as counter:
            other.step()
        least = arguments.least if case.label in HEADLINE else 2
        timings = in_turns(sides, device, arguments.seconds, least)
        parts = parts_of(case, one, device, least)
        one.close()
    count = config.train.sequences
    median = timings["ours"].median
    row = {
        "case": case.label,
        "batch": count,
        "frames": config.data.frames,
        "precision": config.train.precision,
        "ms": {name: [round(v, 1) for v in timing] for name, timing in timings.items()},
        "steps_per_s": {name: round(1e3 / timing.median, 3) for name, timing in timings.items()},
        "vs": {name: round(timing.median / median, 3) for name, timing in timings.items() if name != "ours"},
        "parts_ms": parts,
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        "tflops": round(counter.get_total_flops() / median / 1e9, 3),
    }
    if not case.demo:
        iterations, batch = PAPER[case.stage]
        row["paper_hours"] = round(iterations * batch / count * median / 3.6e6, 1)
    if not arguments.no_memory and case.label in HEADLINE:
        found = {
            name: in_child(peak_memory, name, case, str(dataset), device.type, torch.get_num_threads())
            for name in ("plain", "ours")
        }
        row["memory"] = found
        row["memory_ratio"] = {key: round(value / found["plain"][key], 3) for key, value in found["ours"].items()}
    return row


def headline_of(rows: list[dict]) -> dict[str, float]:
    """Of SMPLGait at 4 x 30 frames and of the demo."""
    found: dict[str, float] = {}
    for row in rows:
        prefix = HEADLINE.get(row["case"])
        if prefix is None:
            continue
        found[f"{prefix}vs_plain"] = row["vs"]["plain"]
        if "compiled" in row["vs"]:
            found[f"{prefix}vs_plain_compile"] = row["vs"]["compiled"]
        if "memory_ratio" in row:
            found[f"{prefix}peak_memory_ratio"] = row["memory_ratio"]["extra_mib"]
    return found


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    batch = arguments.batch or 4
    chosen = [pretraining("smplgait", batch), DEMO]
    if arguments.full:
        chosen += [pretraining(name, batch) for name in BACKBONES[1:]]
        chosen += [transferring(name, f"[{max(2, batch // 2)}, 2]") for name in BACKBONES]
    return [case for case in chosen if not arguments.cases or case.label in arguments.cases]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split(":")[0])
    size = found.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="SMPLGait and the demo, pretraining; the default")
    size.add_argument("--full", action="store_true", help="five backbones, both stages")
    found.add_argument("--compile", action="store_true", help="also the plain side under torch.compile (minutes)")
    found.add_argument("--batch", type=int, help="clips in a batch; 4, on a GPU 64")
    found.add_argument("--cases", nargs="+", metavar="STAGE/NAME")
    found.add_argument("--device", choices=["cpu", "cuda"], help="as torch has it")
    found.add_argument("--seconds", type=float, default=0.0, help="of timing for each case")
    found.add_argument("--least", type=int, default=0, help="steps of each side")
    found.add_argument("--no-memory", action="store_true")
    found.add_argument("--json", type=Path, metavar="FILE")
    return found


def main() -> int:
    arguments = parser().parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.batch = arguments.batch or (64 if device == "cuda" else 4)
    arguments.least = arguments.least or (5 if arguments.full or device == "cuda" else 3)
    process = world.start()
    if process.device.type != device:
        parser().error(f"no {device} device (or DS_ACCELERATOR says otherwise)")
    dtype = torch.bfloat16
    ceiling = matmul_ceiling(device, dtype)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder))
        for case in cases_of(arguments):
            row = measure(case, dataset, process, arguments)
            row["utilisation"] = round(row["tflops"] / ceiling, 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.json:
                content = envelope(headline_of(rows), rows)
                files.write_json(arguments.json, {**content, "matmul_tflops": round(ceiling, 3)})
    print(json.dumps({**headline_of(rows), "matmul_tflops": round(ceiling, 3)}))
    world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
