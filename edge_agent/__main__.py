"""The command `edge-agent`: the device service, and what asks a running one."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from edge_agent.errors import AgentError, RequestError
from models.contract.errors import ContractError
from models.contract.settings import SettingsError

CONFIG_PATH = Path("edge-agent.toml")
BATCH_SAMPLES = 200  # one transaction; 200 images of 28 x 28 are 0.7 MB of the 4 MiB a request may have


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except SettingsError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 2
    except (AgentError, ContractError) as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Run the device service."""
    from edge_agent.agent import run_agent
    from edge_agent.config import load_agent_settings

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    run_agent(load_agent_settings(options.config))


def status(options: argparse.Namespace) -> None:
    """Show how the device is."""
    document = _ask(options, "/v1/status")
    if options.json:
        _print_json(document)
        return
    width = max(map(len, document))
    for name, value in document.items():
        print(f"{name.replace('_', ' '):<{width}}  {'-' if value is None else value}")


def privacy(options: argparse.Namespace) -> None:
    """Show what training has cost in privacy."""
    document = _ask(options, "/v1/privacy")
    if options.json:
        _print_json(document)
    else:
        from edge_agent.owner import build_privacy_text, parse_privacy_report

        print(build_privacy_text(parse_privacy_report(json.dumps(document).encode())))


def predict(options: argparse.Namespace) -> None:
    """Ask the model for the outputs of rows given as JSON."""
    from edge_agent.client import AgentClient

    rows = _read_rows(options.file)
    with AgentClient(_find_socket(options)) as client:
        model = client.get("/v1/status")["model"]
        metadata = client.get(f"/v2/models/{model}")
        answer = client.post(f"/v2/models/{model}/infer", {"inputs": _build_inputs(rows, metadata["inputs"])})
    if options.json:
        _print_json(answer)
        return
    for line in _describe_outputs(answer["outputs"], metadata.get("parameters", {}).get("labels", ())):
        print(line)


def ingest(options: argparse.Namespace) -> None:
    """Hand samples of a file to the device; they never leave it."""
    from edge_agent.client import AgentClient
    from edge_agent.samples.ingest import read_samples

    kept = 0
    with AgentClient(_find_socket(options)) as client:
        for batch in _split(read_samples(options.file), BATCH_SAMPLES):
            document = {"samples": [{"x": x, "y": y} for x, y in batch]}
            try:
                kept += len(client.post("/v1/samples", document)["ids"])
            except AgentError as error:
                raise AgentError(f"{options.file}: after {kept} samples were kept: {error}") from error
            if sys.stderr.isatty():
                print(f"\r{kept} samples", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if options.json:
        _print_json({"kept": kept})
    else:
        print(f"{kept} samples of {options.file} are kept on this device")


def feedback(options: argparse.Namespace) -> None:
    """Tell the truth about an earlier request, which becomes a sample."""
    from edge_agent.client import AgentClient

    try:
        target = json.loads(options.target)
    except ValueError:
        target = options.target  # a label needs no quotes
    with AgentClient(_find_socket(options)) as client:
        kept = len(client.post("/v1/feedback", {"id": options.id, "target": target})["ids"])
    if options.json:
        _print_json({"kept": kept})
    else:
        print(f"{kept} samples are kept on this device" if kept else "not kept: samples.keep_share left it out")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent", description="Serves a model on this device and trains it in private."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serving = _add_command(commands, run)
    serving.add_argument("--config", type=Path, default=CONFIG_PATH, metavar="FILE", help="default: %(default)s")
    for command in (status, predict, ingest, feedback, privacy):
        asking = _add_command(commands, command)
        asking.add_argument("--config", type=Path, default=CONFIG_PATH, metavar="FILE", help="default: %(default)s")
        asking.add_argument("--uds", type=Path, metavar="PATH", help="the agent's Unix socket, instead of --config")
        asking.add_argument("--json", action="store_true", help="print JSON")
        if command is predict:
            asking.add_argument(
                "file", metavar="FILE", help='JSON: a row, a list of rows, or {"input": rows}; - for stdin'
            )
        if command is feedback:
            asking.add_argument("id", metavar="ID", help="of the answer")
            asking.add_argument("target", metavar="TARGET", help="number or label; JSON lists for several rows")
        if command is ingest:
            asking.add_argument("file", type=Path, metavar="FILE", help="*.npz (x, y), *.jsonl or *.csv (target last)")
    return parser


def _add_command(commands: Any, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    line = (command.__doc__ or "").rstrip(".")
    parser: argparse.ArgumentParser = commands.add_parser(command.__name__, help=line, description=f"{line}.")
    parser.set_defaults(command=command)
    return parser


def _find_socket(options: argparse.Namespace) -> Path:
    if options.uds is not None:
        return Path(options.uds)
    from edge_agent.config import load_agent_settings

    return load_agent_settings(options.config).uds_path


def _ask(options: argparse.Namespace, path: str) -> Any:
    from edge_agent.client import AgentClient

    with AgentClient(_find_socket(options)) as client:
        return client.get(path)


def _read_rows(name: str) -> Any:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise RequestError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise RequestError(f"{name}: not JSON: {error}") from error


def _build_inputs(rows: Any, tensors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the inputs of a request; a lone row becomes a batch of one."""
    names = [tensor["name"] for tensor in tensors]
    by_name = rows if isinstance(rows, dict) else {names[0]: rows}
    if sorted(by_name) != sorted(names):
        raise RequestError(f"expected the inputs {', '.join(names)}, got {', '.join(by_name)}")
    return [_build_input(by_name[tensor["name"]], tensor) for tensor in tensors]


def _build_input(rows: Any, tensor: dict[str, Any]) -> dict[str, Any]:
    shape, inner = [], rows
    while isinstance(inner, list) and inner:
        shape.append(len(inner))
        inner = inner[0]
    if len(shape) == len(tensor["shape"]) - 1:
        shape, rows = [1, *shape], [rows]
    return {"name": tensor["name"], "shape": shape, "datatype": tensor["datatype"], "data": rows}


def _describe_outputs(outputs: Iterable[dict[str, Any]], labels: Sequence[str]) -> Iterator[str]:
    for output in outputs:
        rows, *inner = output["shape"]
        width = len(output["data"]) // rows
        for row in range(rows):
            values = output["data"][row * width : (row + 1) * width]
            best = f" {labels[values.index(max(values))]}" if inner == [len(labels)] else ""
            shown = " ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
            yield f"{output['name']}[{row}]{best}: {shown}"


def _split(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    sys.exit(main())
