"""Exact retrieval against PyTorch, faiss and OpenGait's way.

    python -m benchmarks.retrieval --quick|--full --json FILE

Every case first checks that the contenders agree: a sample of our answers against float64, and theirs with ours
wherever their float32 can tell two distances apart. Then all are timed in turn in one process, from features in memory
to the answer. Ratios are the reference's median time over ours; the headline takes the worst over the kinds of data at
the largest size. Extra memory is measured apart, in a process of its own (benchmarks/memory.py).

The floor on a CPU, for Q x G x D values: a float32 product 2QGD / (float32 rate); three products of int8 planes
6QGD / (int8 rate), exact; each side read once, (Q + G) D x 4 bytes / (bandwidth).
At 12,000 x 12,000 x 4,096 on two cores of a Xeon with AMX (0.34 TFLOP/s float32, 12.6 int8 at the tile unit's peak, 25
GB/s): 3.5 s, 0.28 s and 0.016 s. docs/retrieval.md says how near the measured times come.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import envelope
from benchmarks.memory import Extra, extra_memory, in_child
from benchmarks.reference_retrieval import FaissSearch, opengait_report, torch_search
from benchmarks.retrieval_cases import CHANNELS, FULL, PARTS, QUICK, Case, Features, make_features
from benchmarks.retrieval_check import check_report, check_search
from benchmarks.timing import Timing, copy_ceiling
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import UserError
from gaitfast.retrieval import rank_report, search

DISTURBED = 0.15  # cores used by others during a sample
REST_S = 0.05  # before every sample, so that no threads of the side before still spin
Call = Callable[[], Any]


@contextmanager
def cpu_level(level: str):
    """GAITFAST_CPU for what runs inside."""
    before = os.environ.get("GAITFAST_CPU")
    os.environ["GAITFAST_CPU"] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ["GAITFAST_CPU"]
        else:
            os.environ["GAITFAST_CPU"] = before


def ours(case: Case, level: str, data: Features, kind: str = "") -> Any:
    """Our answer to the case, or to its other `kind` of question, with the instructions of `level`."""
    with cpu_level(level):
        if (kind or case.kind) == "search":
            return search(data.queries, data.gallery, case.k, case.metric)
        return rank_report(*data, metric=case.metric)


def side_name(level: str) -> str:
    return f"ours {level}" if level else "ours"


def third_of(data: Features, third: int | None) -> Features:
    """The probes of one third, or all."""
    if third is None:
        return data
    count = len(data.queries)
    part = slice(count * third // 3, count * (third + 1) // 3)
    return Features(data.queries[part], data.gallery, data.query_ids[part], data.gallery_ids)


def sides_of(case: Case, data: Features, without: set[str]) -> dict[str, Call]:
    """The contenders; faiss only where it has the distance."""
    sides: dict[str, Call] = {side_name(level): (lambda level=level: ours(case, level, data)) for level in case.levels}
    if case.kind == "report":
        sides["ours, search"] = lambda: ours(case, case.levels[0], data, "search")
        probes = third_of(data, case.third)
        if "opengait" not in without:
            sides["opengait"] = lambda: opengait_report(*probes, metric=case.metric)
            sides["opengait, vectorised"] = lambda: opengait_report(*probes, metric=case.metric, vectorised=True)
        return sides
    if "torch" not in without:
        sides["torch"] = lambda: torch_search(data.queries, data.gallery, case.k, case.metric)
    if "faiss" not in without and case.metric == "cosine":
        index = FaissSearch()

        def faiss() -> tuple[Tensor, Tensor]:
            return index(data.queries, data.gallery, case.k)

        faiss.index = index
        sides["faiss"] = faiss
    return sides


def others_seconds() -> float:
    """Processor seconds that were not this process's: other processes, the kernel's own, time stolen by the host."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    times = os.times()
    all_ = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return all_ - times.user - times.system


class Sample(NamedTuple):
    seconds: float
    others: float
    """Cores that others used meanwhile."""


def sampled(call: Call) -> tuple[Sample, Any]:
    """One call, timed, and its answer."""
    time.sleep(REST_S)
    before, started = others_seconds(), time.perf_counter()
    answer = call()
    taken = time.perf_counter() - started
    return Sample(taken, max(0.0, others_seconds() - before) / taken), answer


def timed(sides: dict[str, Call], case: Case) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Samples of every side, the least disturbed ones, and every side's answer.

    While a side lacks undisturbed samples its turns go on, to twice their number. OpenGait's loops, which take
    minutes, run once.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    ready: list[Sample] = []
    answers = {name: call() for name, call in sides.items() if not name.startswith("opengait")}
    for turn in range(2 * case.rounds):
        for name, call in sides.items():
            slow = name.startswith("opengait")
            undisturbed = sum(sample.others < DISTURBED for sample in samples[name])
            if undisturbed >= case.rounds or (slow and turn > 0):
                continue
            sample, answer = sampled(call)
            samples[name].append(sample)
            if slow:
                answers[name] = answer
            if name == "faiss":
                ready.append(Sample(call.index.ready_seconds, sample.others))
            del answer
    if ready:
        samples["faiss, index ready"] = ready
    return {name: sorted(of, key=lambda s: s.others)[: case.rounds] for name, of in samples.items()}, answers


def memory_of(case: Case, side: str) -> Extra:
    """Runs in a process of its own."""
    tiny = make_features(case.data, 40, 80)
    data = case.features()
    for features in (tiny, data):
        calls = sides_of(case, features, {"faiss"} if side != "faiss" else set())
        if features is tiny:
            small = Case(kind=case.kind, queries=40, gallery=80, k=min(case.k, 80), metric=case.metric, data=case.data)
            sides_of(small, tiny, {"faiss"} if side != "faiss" else set())[side]()
    return extra_memory(calls[side])


def rates() -> dict[str, float]:
    """TFLOP/s of products as deep as ours, the best of a few undisturbed ones, and GB/s."""
    n, depth = 2048, CHANNELS * PARTS
    a, b = torch.randn(n, depth), torch.randn(n, depth)
    products: dict[str, Call] = {"float32": lambda: a @ b.T}
    a16, b16 = a.bfloat16(), b.bfloat16()
    products["bfloat16"] = lambda: a16 @ b16.T
    a8, b8 = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (a, b))
    products["int8"] = lambda: torch._int_mm(a8, b8.T)

    def best(call: Call) -> float:
        call()
        samples = []
        while len(samples) < 3 or (len(samples) < 15 and min(s.others for s in samples) > DISTURBED):
            samples.append(sampled(call)[0])
        return min(sample.seconds for sample in samples)

    found = {name + "_tflops": round(2 * n * n * depth / best(call) / 1e12, 3) for name, call in products.items()}
    values = torch.zeros(2**28)
    found["read_gb_per_s"] = round(values.nbytes / best(values.sum) / 1e9, 1)
    found["copy_gb_per_s"] = round(copy_ceiling("cpu"), 1)
    return found


def measure(case: Case, speed: dict[str, float], without: set[str]) -> list[dict]:
    """The rows of one case."""
    data = case.features()
    samples, answers = timed(sides_of(case, data, without), case)
    if case.kind == "search":
        checked = check_search(case.metric, data, answers)
    else:
        probes = third_of(data, case.third)
        checked = check_report(case.metric, probes, ours(case, case.levels[0], probes), answers)
    del data, answers
    seconds = {side: [sample.seconds for sample in taken] for side, taken in samples.items()}
    own = Timing.of(seconds[side_name(case.levels[0])]).median
    rows = []
    for side, taken in samples.items():
        time_ = Timing.of(seconds[side])
        share = 1 / 3 if side.startswith("opengait") and case.third is not None else 1.0
        rate = case.operations * share / time_.median / 1e12
        row = {
            "case": case.name,
            "side": side,
            "seconds": [round(value, 5) for value in time_],
            "samples": len(taken),
            "other_cores": round(max(sample.others for sample in taken), 2),
            "over_ours": round(time_.median / own / share, 3),
            "tflops": round(rate, 4),
            "of_float32_rate": round(rate / speed["float32_tflops"], 3),
            "of_bfloat16_rate": round(rate / speed["bfloat16_tflops"], 3),
        }
        if side in checked:
            row["checked"] = checked[side]
        rows.append(row)
        show(row)
    return rows


def add_memory(case: Case, rows: list[dict], sides: set[str]) -> None:
    """Writes the memory of some sides into the rows of a case. Of thirds the first tells all."""
    for row in rows:
        if row["case"] == case.name and row["side"] in sides and case.third in (None, 0):
            extra = in_child(memory_of, case, row["side"])
            row["extra_mib"] = {key: round(value, 1) for key, value in extra._asdict().items()}
            print(f"{row['case']:<46} {row['side']:<21} +{extra.resident:.0f} MiB", flush=True)


def show(row: dict) -> None:
    median, low, high = row["seconds"]
    print(
        f"{row['case']:<46} {row['side']:<21} {median:9.4f} s ({low:.4f}-{high:.4f})  x{row['over_ours']:<8} "
        f"{100 * row['of_bfloat16_rate']:.0f} % of bf16  others {row['other_cores']}",
        flush=True,
    )


def headline_of(rows: list[dict], cases: list[Case]) -> dict[str, float]:
    """At the largest size in `rows`; a figure whose cases were not run is left out."""
    by_case = {case.name: case for case in cases}
    cosine = [row for row in rows if by_case[row["case"]].metric == "cosine"]

    def largest(kind: str) -> list[dict]:
        of_kind = [r for r in cosine if by_case[r["case"]].kind == kind]
        sizes = [by_case[r["case"]].operations for r in of_kind]
        return [r for r, size in zip(of_kind, sizes) if size == max(sizes) and not by_case[r["case"]].levels[0]]

    found: dict[str, float] = {}
    for key, side in (
        ("search_vs_faiss", "faiss"),
        ("search_vs_faiss_index_ready", "faiss, index ready"),
        ("search_vs_torch", "torch"),
    ):
        ratios = [r["over_ours"] for r in largest("search") if r["side"] == side]
        if ratios:
            found[key] = min(ratios)
    reports = largest("report")
    for key, side in (("report_vs_opengait", "opengait"), ("report_vs_opengait_vectorised", "opengait, vectorised")):
        ratios = [r["over_ours"] for r in reports if r["side"] == side]
        if ratios:
            found[key] = round(sum(ratios) / len(ratios), 1)  # of the thirds: together, all probes
    searches = [1.0 / r["over_ours"] for r in reports if r["side"] == "ours, search"]
    if searches:
        found["report_over_search"] = round(max(searches), 3)
    extra = [
        r["extra_mib"]["resident"] for r in largest("search") + reports if r["side"] == "ours" and "extra_mib" in r
    ]
    if extra:
        found["extra_mib"] = max(extra)
    # Of every case and level: PyTorch's time over ours at that level.
    worst = {}
    for row in rows:
        if row["side"] == "torch":
            for own in rows:
                if own["case"] == row["case"] and own["side"].startswith("ours") and own["side"] != "ours, search":
                    worst[f"{row['case']} {own['side']}"] = round(row["seconds"][0] / own["seconds"][0], 3)
    if worst:
        found["vs_torch_at_worst"] = min(worst.values())
    return found


def known_rows(path: Path | None, cases: list[Case]) -> list[dict]:
    """What a file holds of these cases."""
    if path is None or not path.exists():
        return []
    names = {case.name for case in cases}
    return [row for row in json.loads(path.read_text())["rows"] if row["case"] in names]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.split("\n\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="3,000 x 3,000, within a minute; the default")
    size.add_argument("--full", action="store_true", help="12,000 x 12,000 and more cases: about 15 minutes")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--without", nargs="+", default=[], choices=["torch", "faiss", "opengait"])
    parser.add_argument("--part", choices=["all", "time", "memory"], default="all", help="memory: of rows in FILE")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows of other cases that FILE holds are kept")
    arguments = parser.parse_args()
    cases = FULL if arguments.full else QUICK
    chosen = [case for case in cases if not arguments.only or any(text in case.name for text in arguments.only)]
    if not chosen:
        raise UserError(f"--only: no case of {len(cases)} matches; --list prints their names")
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    without = set(arguments.without)
    if "faiss" not in without:
        try:
            FaissSearch()
        except UserError as error:
            print(f"{error}; going on without it", flush=True)
            without.add("faiss")
    memory = {"ours", "torch", "faiss", "opengait"} if arguments.full else {"ours"}
    speed = rates()
    print(json.dumps(speed), flush=True)
    rows = known_rows(arguments.json, cases)
    for case in chosen:
        if arguments.part != "memory":
            rows = [row for row in rows if row["case"] != case.name] + measure(case, speed, without)
        if arguments.part != "time":
            add_memory(case, rows, memory)
        if arguments.json:
            result = {**envelope(headline_of(rows, cases), rows), "rates": speed, "threads": torch.get_num_threads()}
            files.write_json(arguments.json, result)
    print(json.dumps(headline_of(rows, cases)))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
