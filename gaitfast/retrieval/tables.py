"""Figures as tables for people: one model on one dataset, or models against datasets."""

from __future__ import annotations

from collections.abc import Sequence

from gaitfast.retrieval.scoring import Evaluation, Table

EMPTY = "-"
"""A cell that no mean counts."""


def grid(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], corner: str = ""
) -> str:
    """Lines of aligned percentages with two decimals; None becomes `EMPTY`.

    >>> print(grid(["000", "018"], ["000", "018"], [[None, 87.5], [100.0, None]]))
            000     018
    000       -   87.50
    018  100.00       -
    """
    cells = [[EMPTY if value is None else f"{value:.2f}" for value in row] for row in values]
    left = max(map(len, (corner, *rows)))
    widths = [max(6, len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    lines = [_line(corner, columns, left, widths)]
    lines += [_line(name, row, left, widths) for name, row in zip(rows, cells)]
    return "\n".join(lines)


def _line(head: str, cells: Sequence[str], left: int, widths: Sequence[int]) -> str:
    return f"{head:<{left}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths))


def metrics(results: dict[str, Evaluation]) -> str:
    """Every metric of one model on one dataset; `results` by distance."""
    keys = list(next(iter(results.values())))
    return grid(list(results), keys, [[result[key] for key in keys] for result in results.values()], "percent")


def by_view(table: Table, distance: str) -> str:
    """A table by view, with the mean of each row: what publications print per probe view."""
    values = [[*row, mean] for row, mean in zip(table.values, table.row_means)]
    title = f"{table.title}, {distance}; rows: probe view, columns: gallery view"
    return f"{title}\n{grid(table.rows, [*table.columns, 'mean'], values)}"


def matrix(models: Sequence[str], datasets: Sequence[str], values: Sequence[Sequence[float]], title: str) -> str:
    """One metric of several models (rows) on several datasets (columns)."""
    return f"{title}; rows: model, columns: dataset\n{grid(models, datasets, values)}"
