"""What the study runs: the arms, their settings, and the order, all known before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gaitfast.config import PretrainConfig, TransferConfig, UserError, load, to_dict

CONFIGS = Path(__file__).resolve().parent.parent / "configs/study"
DATA = ("walkers", "usf17")


@dataclass(frozen=True)
class Arm:
    """One way to train the recognizer, at the same supervised iterations, seed and batches as the others."""

    name: str
    label: str
    settings: tuple[str, ...]
    pretrained: bool

    def overrides(self, backbone: Path) -> tuple[str, ...]:
        """`--set` of the transfer command; `backbone` is the pretrained one of the same seed."""
        return (*self.settings, f"transfer.init={backbone}") if self.pretrained else self.settings


ARMS = (
    Arm("scratch", "from scratch", (), False),
    Arm("finetune-0.1", "finetuned, r = 0.1", ("transfer.ratio=0.1",), True),
    Arm("finetune-0.5", "finetuned, r = 0.5", ("transfer.ratio=0.5",), True),
    Arm("finetune-1.0", "finetuned, r = 1.0", ("transfer.ratio=1.0",), True),
    Arm("frozen", "pretrained, frozen", ("transfer.freeze=true",), True),
    # The control of the frozen arm: the very weights that pretraining of the same seed started from.
    Arm("frozen-random", "random, frozen", ("transfer.freeze=true",), False),
)


@dataclass(frozen=True)
class Size:
    """How large the study is: the configs of this name under configs/study/, and the synthetic people."""

    name: str
    walkers: tuple[str | int, ...]
    """Options of `gaitfast walkers`."""


SIZES = {
    size.name: size
    for size in (
        Size("quick", ("--subjects", 24, "--test-subjects", 16, "--walks", 6, "--cameras", 3, "--frames", 12, 16)),
        Size("default", ("--subjects", 160, "--test-subjects", 96, "--walks", 8, "--cameras", 4, "--frames", 20, 28)),
        Size("large", ("--subjects", 2000, "--test-subjects", 500, "--walks", 12)),
    )
}


@dataclass(frozen=True)
class Run:
    """One training run: a folder of its own, the command that fills it, and what it belongs to."""

    folder: Path
    stage: str
    """pretrain or transfer: the gaitfast command."""
    label: str
    seed: int
    config: Path
    settings: tuple[str, ...]
    arm: str = ""

    @property
    def command(self) -> list[str]:
        """The arguments of `gaitfast`."""
        return [self.stage, "--config", str(self.config), *(part for s in self.settings for part in ("--set", s))]

    def finished(self) -> bool:
        """Whether the folder holds this run, complete. UserError if it holds another one."""
        if not (self.folder / "summary.json").exists():
            return False
        kind = PretrainConfig if self.stage == "pretrain" else TransferConfig
        ours = to_dict(load(kind, self.config, self.settings))
        theirs = to_dict(load(kind, self.folder / "config.resolved.yaml"))
        for config in (ours, theirs):
            del config["run"], config["data"]["path"]  # wherever they lie
        changed = sorted(key for key in ours if ours[key] != theirs[key])
        if changed:
            raise UserError(
                f"{self.folder}: holds a run with another {', '.join(changed)}; delete it, or choose another --out"
            )
        return True


@dataclass(frozen=True)
class Plan:
    """The whole study in the order in which it runs."""

    data: str
    size: Size
    out: Path
    runs: tuple[Run, ...]

    @property
    def dataset(self) -> Path:
        return self.out / "dataset"

    def preparation(self, usf17: Path) -> list[list[str]]:
        """Commands that make the dataset where there is none; `usf17`: folder of the .mat files."""
        if self.dataset.exists():  # complete or absent
            return []
        tree, packing = self.out / "tree", ["prepare", "--layout", "opengait"]
        if self.data == "usf17":
            return [["prepare", str(usf17), str(self.dataset), "--layout", "usf17"]]
        return [["walkers", str(tree), *map(str, self.size.walkers)], [*packing, str(tree), str(self.dataset)]]


def plan(data: str, size: Size, out: Path, seeds: Sequence[int], configs: Path | None = None) -> Plan:
    """One pretraining per seed, then every arm with that seed.

    `configs`: a folder with pretrain.yaml and transfer.yaml; by default that of the size.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {' '.join(map(str, seeds))} names a seed twice")
    configs = configs or CONFIGS / size.name
    runs = []
    for seed in seeds:
        source = out / f"pretrain-seed{seed}"

        def run(folder: Path, stage: str, label: str, settings: Sequence[str], arm: str = "", seed: int = seed) -> Run:
            common = (f"run={folder}", f"seed={seed}", f"data.path={out / 'dataset'}")
            return Run(folder, stage, label, seed, configs / f"{stage}.yaml", (*common, *settings), arm)

        runs.append(run(source, "pretrain", "pretraining", ()))
        for arm in ARMS:
            settings = arm.overrides(source / "backbone.safetensors")
            runs.append(run(out / f"{arm.name}-seed{seed}", "transfer", arm.label, settings, arm.name))
    return Plan(data, size, out, tuple(runs))
