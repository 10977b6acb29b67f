"""A table of similarities becomes the pairing of its rows and columns whose sum is the largest, each row with one column.

Shortest augmenting paths (Jonker & Volgenant 1987): a row at a time, each path found by relaxing all columns at once; rows x path lengths x columns.
"""

import numpy as np
from numpy.typing import NDArray


def pair_best(similarity: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and their columns, as many as the shorter side has, so that the sum of similarities is the largest."""
    if similarity.shape[0] > similarity.shape[1]:
        columns, rows = pair_best(similarity.T)
        order = rows.argsort()
        return rows[order], columns[order]
    cost = similarity.max(initial=0.0) - similarity
    n_rows, n_columns = cost.shape
    row_of = np.full(n_columns, -1, np.int64)
    row_price, column_price = np.zeros(n_rows), np.zeros(n_columns)
    for row in range(n_rows):
        distance, came_from, is_done = np.full(n_columns, np.inf), np.full(n_columns, -1, np.int64), np.zeros(n_columns, np.bool_)
        here, at, column = row, 0.0, -1
        while here >= 0:
            reached = at + cost[here] - row_price[here] - column_price
            is_nearer = ~is_done & (reached < distance)
            distance[is_nearer], came_from[is_nearer] = reached[is_nearer], column
            column = int(np.where(is_done, np.inf, distance).argmin())
            at, is_done[column] = float(distance[column]), True
            here = int(row_of[column])
        done = np.flatnonzero(is_done)
        column_price[done] += distance[done] - at
        matched = done[row_of[done] >= 0]
        row_price[row_of[matched]] += at - distance[matched]
        row_price[row] += at
        while column >= 0:
            before = int(came_from[column])
            row_of[column] = row_of[before] if before >= 0 else row
            column = before
    columns = np.flatnonzero(row_of >= 0)
    order = row_of[columns].argsort()
    return row_of[columns][order], columns[order]
