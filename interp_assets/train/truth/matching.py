"""A table of similarities becomes the pairing of its rows and columns whose sum is the largest, each row with one column.

Jonker & Volgenant 1987, for tables with more columns than rows too:

1. Each row takes its cheapest column, if that is free.
2. Twice, each row that is left bids for its cheapest column as much as the second cheapest is dearer, and displaces the row that has it.
3. Each row that is still left takes the shortest augmenting path: all columns are relaxed at once, path by path.

Most of 16,384 latents of two SAEs agree on their nearest, so few paths are left. Costs are computed where they are needed: nothing of the table's
size is written.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.compiled import compiled


def pair_best(similarity: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and their columns, as many as the shorter side has, so that the sum of similarities is the largest."""
    if similarity.shape[0] > similarity.shape[1]:
        columns, rows = pair_best(similarity.T)
        order = rows.argsort()
        return rows[order], columns[order]
    if not similarity.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.arange(len(similarity)), _pair(np.ascontiguousarray(similarity))


@compiled
def _pair(similarity: Any) -> Any:
    """Return the column of each row; there are at least as many columns as rows."""
    n_rows, n_columns = similarity.shape
    column_of, row_of = np.full(n_rows, -1, np.int64), np.full(n_columns, -1, np.int64)
    row_price, column_price = np.zeros(n_rows), np.zeros(n_columns)
    for row in range(n_rows):
        best = np.argmax(similarity[row])
        row_price[row] = -similarity[row, best]
        if row_of[best] < 0:
            row_of[best], column_of[row] = row, best
    left = np.flatnonzero(column_of < 0)
    for _ in range(2):
        n_left = 0
        for row in left:
            cheapest, second, place = np.inf, np.inf, -1
            for column in range(n_columns):
                reduced = -similarity[row, column] - column_price[column]
                if reduced < cheapest:
                    cheapest, second, place = reduced, cheapest, column
                elif reduced < second:
                    second = reduced
            row_price[row] = second if np.isfinite(second) else cheapest
            displaced = row_of[place]
            if displaced >= 0 and not cheapest < second:
                row_price[row] = cheapest  # as dear as the next: nobody is displaced for nothing
                left[n_left], n_left = row, n_left + 1
                continue
            if displaced < 0:
                row_price[row] = cheapest  # a free column's price stays 0
            else:
                column_price[place] -= row_price[row] - cheapest
                column_of[displaced] = -1
                left[n_left], n_left = displaced, n_left + 1
            row_of[place], column_of[row] = row, place
        left = left[:n_left]
    _augment(similarity, left, column_of, row_of, row_price, column_price)
    return column_of


@compiled
def _augment(similarity: Any, left: Any, column_of: Any, row_of: Any, row_price: Any, column_price: Any) -> None:
    """Give each row that is left a column, by the path on which the fewest similarities are lost."""
    n_columns = len(row_of)
    for row in left:
        distance, came_from, is_done = np.full(n_columns, np.inf), np.full(n_columns, -1, np.int64), np.zeros(n_columns, np.bool_)
        here, at, column = row, 0.0, -1
        while here >= 0:
            nearest, place = np.inf, -1
            for other in range(n_columns):
                if not is_done[other]:
                    reached = at - similarity[here, other] - row_price[here] - column_price[other]
                    if reached < distance[other]:
                        distance[other], came_from[other] = reached, column
                    if distance[other] < nearest:
                        nearest, place = distance[other], other
            column, at, is_done[place] = place, nearest, True
            here = row_of[place]
        row_price[row] += at
        for other in range(n_columns):
            if is_done[other]:
                if row_of[other] >= 0:
                    row_price[row_of[other]] += at - distance[other]
                column_price[other] += distance[other] - at
        while column >= 0:
            before = came_from[column]
            row_of[column] = row_of[before] if before >= 0 else row
            column_of[row_of[column]] = column
            column = before
