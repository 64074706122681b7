"""What batch inference writes: a journal that grows row by row and survives a kill, then the file that was asked for.

OUTPUT.part: one line that says what it belongs to, then one JSON line a row -> OUTPUT, renamed into place
"""

import csv
import fcntl
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec
import numpy as np

from edge_agent.errors import RequestError, StalledError
from edge_agent.samples.rows import import_pyarrow
from models.contract.files import sync_directory
from models.tensors.spec import TensorSpec

_ROWS_AT_ONCE = 1024


class Journal:
    """Rows already answered, in a file beside the output; a context that one process at a time can hold."""

    def __init__(self, output: Path, identity: dict[str, Any], batch_rows: int) -> None:
        """Open `OUTPUT.part`, or begin it.

        Args:
            output: The file that will be.
            identity: What decides the answers; a journal that says something else is refused.
            batch_rows: A batch that is not whole is forgotten: it is answered anew, as it would have been.

        Raises:
            RequestError: The output exists; the journal belongs to something else, or to a process that is running.
        """
        self.path = output.with_name(f"{output.name}.part")
        if output.exists():
            raise RequestError(f"{output} exists: remove it, or name another file")
        try:
            self._file: BinaryIO = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        except OSError as error:
            raise RequestError(f"{self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = self._resume(msgspec.json.encode(identity, order="sorted") + b"\n", batch_rows)
        except BlockingIOError as error:
            self._file.close()
            raise RequestError(f"{self.path}: another process is writing it") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append `rows`; after a kill they are still there."""
        self._write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        self.rows += len(rows)

    def finish(self, output: Path, write: Callable[[Path, "Journal"], None]) -> None:
        """Let `write` make a file of the journal and put it at `output`, durable on return; the journal is gone then.

        Raises:
            StalledError: It cannot be written.
        """
        staging = output.with_name(f".{output.name}.tmp")
        try:
            write(staging, self)
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(output)
            self.path.unlink()
            sync_directory(output.parent)
        except OSError as error:
            raise StalledError(f"{output}: {error.strerror or error}") from error
        finally:
            staging.unlink(missing_ok=True)

    def read(self) -> Iterator[bytes]:
        """Yield the line of each row."""
        with self.path.open("rb") as file:
            next(file)
            yield from file

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise StalledError(f"{self.path}: {error.strerror or error}") from error

    def _resume(self, header: bytes, batch_rows: int) -> int:
        """Return how many rows of whole batches there are, and cut off what follows them."""
        kept = kept_end = 0
        with self.path.open("rb") as file:
            if (found := file.readline()).endswith(b"\n"):
                _check_header(found, header, self.path)
                kept_end = end = len(header)
                for number, line in enumerate(file, 1):
                    end += len(line)
                    if line.endswith(b"\n") and number % batch_rows == 0:
                        kept, kept_end = number, end
        self._file.seek(kept_end)
        self._file.truncate()
        if kept_end == 0:  # new, or cut off at once
            self._write(header)
        return kept


def _check_header(found: bytes, expected: bytes, path: Path) -> None:
    if found != expected:
        raise RequestError(
            f"{path} belongs to another input or model version: remove it to begin anew. "
            f"Expected {expected.decode().strip()}, found {found.decode(errors='replace').strip():.1000}"
        )


def build_rows(
    first: int, outputs: dict[str, list[Any]], specs: Sequence[TensorSpec], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one document a row: its number, its label if the model names classes, and its outputs."""
    classes = find_classes(specs, labels)
    rows = []
    for number, values in enumerate(zip(*(outputs[spec.name] for spec in specs), strict=True), first):
        row = dict(zip((spec.name for spec in specs), values, strict=True))
        label = {} if classes is None else {"label": labels[int(np.argmax(row[classes.name]))]}
        rows.append({"row": number, **label, **row})
    return rows


def find_classes(specs: Sequence[TensorSpec], labels: Sequence[str]) -> TensorSpec | None:
    """Return the output that has one value a label, if there is exactly one and no output is named as a label is."""
    found = [spec for spec in specs if labels and spec.row_shape == (len(labels),) and spec.dtype != "string"]
    return found[0] if len(found) == 1 and all(spec.name != "label" for spec in specs) else None


def find_writer(output: Path, specs: Sequence[TensorSpec], labels: Sequence[str]) -> Callable[[Path, Journal], None]:
    """Return what makes a file of the kind that `output` names.

    Raises:
        RequestError: It is none of those that can be written.
        StalledError: The library that writes it is not installed.
    """
    if any(spec.name == "row" for spec in specs):
        raise RequestError("the model has an output 'row', which is the name of the column that numbers the rows")
    has_label = find_classes(specs, labels) is not None
    match output.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _write_json_lines
        case ".csv":
            return lambda path, journal: _write_csv(path, journal, specs, has_label=has_label)
        case ".npz":
            return lambda path, journal: _write_npz(path, journal, specs, labels if has_label else ())
        case ".parquet":
            import_pyarrow()
            return lambda path, journal: _write_parquet(path, journal, specs, has_label=has_label)
    raise RequestError(f"{output}: expected a file named *.csv, *.jsonl, *.parquet or *.npz")


def _write_json_lines(path: Path, journal: Journal) -> None:
    with path.open("wb") as file:
        file.writelines(journal.read())


def _write_csv(path: Path, journal: Journal, specs: Sequence[TensorSpec], *, has_label: bool) -> None:
    names = ["row", *(["label"] if has_label else [])]
    for spec in specs:
        size = math.prod(spec.row_shape)
        names += [spec.name] if spec.row_shape == () else [f"{spec.name}_{index}" for index in range(size)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for line in journal.read():
            row = json.loads(line)
            start = [row["row"], *([row["label"]] if has_label else [])]
            writer.writerow(start + [value for spec in specs for value in _flatten(row[spec.name])])


def _flatten(value: Any) -> list[Any]:
    return [inner for item in value for inner in _flatten(item)] if isinstance(value, list) else [value]


def _write_npz(path: Path, journal: Journal, specs: Sequence[TensorSpec], labels: Sequence[str]) -> None:
    """Write one array an output, in as many passes over the journal, and the labels beside them."""
    dtypes = {spec.name: _find_dtype(spec, journal) for spec in specs}
    shapes = {spec.name: spec.row_shape for spec in specs}
    if labels:
        dtypes, shapes = {"label": np.array(labels).dtype, **dtypes}, {"label": (), **shapes}
    with zipfile.ZipFile(path, "w") as archive:
        for name, dtype in dtypes.items():
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            # ZipInfo without a date: the same rows make the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header | {"shape": (journal.rows, *shapes[name])})
                rows = (json.loads(line)[name] for line in journal.read())
                while values := list(islice(rows, _ROWS_AT_ONCE)):
                    file.write(np.array(_replace_nulls(values, dtype), dtype).tobytes())


def _find_dtype(spec: TensorSpec, journal: Journal) -> np.dtype[Any]:
    if spec.dtype != "string":
        return spec.numpy_dtype
    texts = (text for line in journal.read() for text in _flatten(json.loads(line)[spec.name]))
    return np.dtype(f"<U{max(map(len, texts), default=1) or 1}")


def _replace_nulls(values: Any, dtype: np.dtype[Any]) -> Any:
    """Return `values` with NaN, which JSON does not have, for null."""
    if dtype.kind != "f":
        return values
    if isinstance(values, list):
        return [_replace_nulls(value, dtype) for value in values]
    return math.nan if values is None else values


def _write_parquet(path: Path, journal: Journal, specs: Sequence[TensorSpec], *, has_label: bool) -> None:
    import pyarrow as pa

    fields = [("row", pa.int64()), *([("label", pa.string())] if has_label else [])]
    for spec in specs:
        dtype = {"float16": np.dtype("float32")}.get(spec.dtype, spec.numpy_dtype)  # few readers know half floats
        kind = pa.string() if spec.dtype == "string" else pa.from_numpy_dtype(dtype)
        for _ in spec.row_shape:
            kind = pa.list_(kind)
        fields.append((spec.name, kind))
    schema = pa.schema(fields)
    lines = journal.read()
    with import_pyarrow().ParquetWriter(path, schema) as writer:
        while chunk := list(islice(lines, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist([json.loads(line) for line in chunk], schema=schema))
