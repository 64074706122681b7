"""Files of any size, a batch at a time: samples into the agent, rows through a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edge_agent.client import AgentClient
from edge_agent.errors import AgentError, RequestError, StalledError
from edge_agent.predictors import Predictor, build_bodies, shift_row
from edge_agent.progress import Progress
from edge_agent.results import Journal, build_rows, find_writer
from edge_agent.samples.ingest import read_inputs, read_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class InferSummary:
    """What batch inference did; `resumed` rows were answered by an earlier process."""

    rows: int
    resumed: int
    model: str
    version: str
    output: str


def ingest_file(path: Path, client: AgentClient, target: str | None) -> int:
    """Hand all samples in `path` to the agent; return how many it keeps.

    Raises:
        AgentError: A row is no sample, or is refused; the message says how many were kept before.
    """
    progress = Progress("samples")
    samples = ({"x": x, "y": y} for x, y in read_samples(path, target))
    try:
        for body, _ in build_bodies("samples", samples):
            progress.add(len(client.post("/v1/samples", body)["ids"]))
    except AgentError as error:
        reason = shift_row(str(error), progress.done + 1)
        raise AgentError(f"{reason} ({progress.done} samples of {path} were kept before)") from error
    finally:
        progress.end()
    return progress.done


def infer_file(path: Path, output: Path, predictor: Predictor) -> InferSummary:
    """Answer every row of `path` and write `output`; after a kill, the same call goes on where it ended.

    Raises:
        AgentError: A row is of no use to the model, the model is gone, or `output` cannot be written.
    """
    description = predictor.description
    write = find_writer(output, description.outputs, description.labels)
    with Journal(output, _identify(path, predictor), description.batch_rows) as journal:
        resumed = journal.rows
        progress = Progress("rows", done=resumed)
        try:
            for batch in _batch(read_inputs(path), skip=resumed, size=description.batch_rows):
                journal.add(_answer(predictor, batch, journal.rows + 1))
                progress.add(len(batch))
        except KeyboardInterrupt:
            raise StalledError(f"stopped after {journal.rows} rows; the same command goes on from there") from None
        finally:
            progress.end()
        journal.finish(output, write)
        return InferSummary(
            rows=journal.rows,
            resumed=resumed,
            model=description.model,
            version=description.version,
            output=str(output),
        )


def _answer(predictor: Predictor, batch: list[tuple[str, Any]], first: int) -> list[dict[str, Any]]:
    description = predictor.description
    try:
        outputs = predictor.predict([row for _, row in batch])
    except RequestError as error:
        raise RequestError(_locate(str(error), [where for where, _ in batch]), status=error.status) from error
    lists = {spec.name: outputs[spec.name].tolist() for spec in description.outputs}
    return build_rows(first, lists, description.outputs, description.labels)


def _batch(rows: Iterator[tuple[str, Any]], *, skip: int, size: int) -> Iterator[list[tuple[str, Any]]]:
    if sum(1 for _ in islice(rows, skip)) < skip:
        raise RequestError(f"the input has fewer than the {skip} rows that were answered before")
    while batch := list(islice(rows, size)):
        yield batch


def _locate(message: str, places: list[str]) -> str:
    """Return `message` with the place in the file for the number in `row N: `."""
    word, _, rest = message.partition(" ")
    number, colon, reason = rest.partition(": ")
    if word == "row" and colon and number.isdecimal() and int(number) < len(places):
        return f"{places[int(number)]}: {reason}"
    return f"{places[0]} and the rows after it: {message}"


def _identify(path: Path, predictor: Predictor) -> dict[str, Any]:
    """Return what decides the answers, so that a journal of something else is not taken for this one's."""
    try:
        status = path.stat()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from error
    description = predictor.description
    return {
        "input": str(path.resolve()),
        "size_bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "model": description.model,
        "version": description.version,
        "batch_rows": description.batch_rows,
    }
