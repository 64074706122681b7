"""The samples of release 0.1, which had no seal: its tables, byte for byte."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    x BLOB NOT NULL, x_dtype TEXT NOT NULL, x_shape TEXT NOT NULL,
    y BLOB NOT NULL, y_dtype TEXT NOT NULL, y_shape TEXT NOT NULL
)
"""


def save_unsealed(path: Path, samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    with connection:
        connection.execute(SCHEMA)
        for x, y in samples:
            values = [
                value
                for array in (x, y)
                for value in (array.tobytes(), array.dtype.name, "x".join(map(str, array.shape)))
            ]
            connection.execute(
                "INSERT INTO samples (x, x_dtype, x_shape, y, y_dtype, y_shape) VALUES (?, ?, ?, ?, ?, ?)", values
            )
    connection.close()
