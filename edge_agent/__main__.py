"""The command `edge-agent`: the device service, and what asks a running one."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.errors import AgentError, RequestError
from models.contract.errors import ContractError
from models.contract.settings import SettingsError

if TYPE_CHECKING:
    from edge_agent.samples.fields import FieldRules

CONFIG_PATH = Path("edge-agent.toml")


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

    _log_to_stderr()
    run_agent(load_agent_settings(options.config))


def enroll(options: argparse.Namespace) -> None:
    """Make this machine a device, with a token of the operator."""
    from edge_agent.enrolment import enroll as enroll_here

    given: str = options.token
    device_id = enroll_here(options.server, sys.stdin.read() if given == "-" else given, options.out)
    print(f"this machine is {device_id}; start it with edge-agent run --config {options.out / CONFIG_PATH}")


def serve(options: argparse.Namespace) -> None:
    """Serve one model version, without broker or federation."""
    from edge_agent.serving import ServeOptions, serve_version

    _log_to_stderr()
    host, port = options.http
    serve_version(
        ServeOptions(
            directory=options.directory,
            host=host,
            port=port,
            uds=options.uds,
            grpc=options.grpc,
            challenger=options.challenger,
            weight=options.weight,
            shadow=options.shadow,
        )
    )


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
    from edge_agent.predictors import build_agent_inputs

    rows = _read_rows(options.file)
    with AgentClient(_find_socket(options)) as client:
        model = client.get("/v1/status")["model"]
        metadata = client.get(f"/v2/models/{model}")
        raw = _find_raw_rows(rows, metadata)
        inputs = build_agent_inputs(client, raw) if raw else _build_inputs(rows, metadata["inputs"])
        answer = client.post(f"/v2/models/{model}/infer", {"inputs": inputs})
    if options.json:
        _print_json(answer)
        return
    for line in _describe_outputs(answer["outputs"], metadata.get("parameters", {}).get("labels", ())):
        print(line)


def ingest(options: argparse.Namespace) -> None:
    """Hand samples of a file to the device; they never leave it."""
    from edge_agent.batch import ingest_file
    from edge_agent.client import AgentClient

    with AgentClient(_find_socket(options)) as client:
        kept = ingest_file(options.file, client, options.target)
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


def forget(options: argparse.Namespace) -> None:
    """Delete samples from this device, and every trace of them in its files."""
    from edge_agent.client import AgentClient

    if sum(map(bool, (options.ids, options.where, options.all))) != 1:
        raise RequestError("say which: IDs, --where COLUMN=VALUE, or --all")
    wish = {"ids": options.ids, "where": dict(options.where), "all": options.all}
    with AgentClient(_find_socket(options)) as client:
        answer = client.post("/v1/forget", wish)
    if options.json:
        _print_json(answer)
        return
    print(f"{answer['forgotten']} samples are forgotten, {answer['kept']} are left on this device")
    if answer["waiting"]:
        print(f"{answer['waiting']} answered requests wait for their truth no more")


def infer(options: argparse.Namespace) -> None:
    """Answer every row of a file with the model; goes on where it was interrupted."""
    import dataclasses
    from contextlib import ExitStack

    from edge_agent.batch import infer_file
    from edge_agent.predictors import AgentPredictor, LocalPredictor, Predictor

    with ExitStack() as stack:
        if options.version_dir is not None:
            predictor: Predictor = LocalPredictor(options.version_dir, _load_rules(options))
        else:
            from edge_agent.client import AgentClient

            predictor = AgentPredictor(stack.enter_context(AgentClient(_find_socket(options))))
        summary = infer_file(options.input, options.output, predictor)
    if options.json:
        _print_json(dataclasses.asdict(summary))
    else:
        print(f"{summary.rows} rows of {options.input} are answered in {summary.output}")


def doctor(options: argparse.Namespace) -> None:
    """Test what this device needs, and say what to do."""
    from datetime import UTC, datetime

    from edge_agent.doctor import examine
    from models.doctor.findings import describe, find_failures

    findings = examine(options.config, now=datetime.now(UTC))
    print(describe(findings, as_json=options.json))
    if failures := find_failures(findings):
        raise AgentError(failures)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent", description="Serves a model on this device and trains it in private."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serving = _add_command(commands, run)
    serving.add_argument("--config", type=Path, default=CONFIG_PATH, metavar="FILE", help="default: %(default)s")
    _describe_enroll(_add_command(commands, enroll))
    _describe_serve(_add_command(commands, serve))
    examining = _add_command(commands, doctor)
    examining.add_argument("--config", type=Path, default=CONFIG_PATH, metavar="FILE", help="default: %(default)s")
    examining.add_argument("--json", action="store_true", help="print JSON")
    for command in (status, predict, infer, ingest, feedback, forget, privacy):
        asking = _add_command(commands, command)
        asking.add_argument("--config", type=Path, metavar="FILE", help=f"default: {CONFIG_PATH}")
        asking.add_argument("--uds", type=Path, metavar="PATH", help="the agent's Unix socket, instead of --config")
        asking.add_argument("--json", action="store_true", help="print JSON")
        if command is predict:
            asking.add_argument(
                "file", metavar="FILE", help='JSON: a row, a list of rows, or {"input": rows}; - for stdin'
            )
        if command is infer:
            _describe_infer(asking)
        if command is feedback:
            asking.add_argument("id", metavar="ID", help="of the answer")
            asking.add_argument("target", metavar="TARGET", help="number or label; JSON lists for several rows")
        if command is forget:
            asking.add_argument(
                "ids", nargs="*", type=_parse_id, metavar="ID", help="of a sample or an answered request"
            )
            asking.add_argument(
                "--where", action="append", type=_parse_where, default=[], metavar="COLUMN=VALUE", help="all must hold"
            )
            asking.add_argument("--all", action="store_true", help="everything; works without the key, too")
        if command is ingest:
            asking.add_argument("file", type=Path, metavar="FILE", help="*.csv, *.jsonl, *.parquet or *.npz")
            asking.add_argument("--target", metavar="COLUMN", help="default: y, or the last column of a CSV file")
    return parser


def _describe_enroll(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server", required=True, metavar="HOST:PORT", help="of the coordinator's proxy; default port: 9444"
    )
    parser.add_argument("--token", required=True, metavar="T", help="what fl-server token printed; - for stdin")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty; holds private keys then")


def _describe_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="VERSION_DIR", help="manifest.json and the graph that it names")
    parser.add_argument(
        "--http", type=_parse_address, default=("127.0.0.1", 8080), metavar="HOST:PORT", help="default: 127.0.0.1:8080"
    )
    parser.add_argument("--uds", type=Path, metavar="PATH", help="a Unix socket beside it")
    parser.add_argument("--grpc", type=_parse_address, metavar="HOST:PORT", help="the same over gRPC, on the loopback")
    parser.add_argument("--challenger", type=Path, metavar="DIR", help="a second version of the model")
    role = parser.add_mutually_exclusive_group()
    role.add_argument(
        "--weight", type=_parse_share, default=0.0, metavar="W", help="the challenger's share of the answers, 0 to 1"
    )
    role.add_argument("--shadow", action="store_true", help="compare the challenger with each answer instead")


def _parse_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _parse_id(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parse_where(text: str) -> tuple[str, Any]:
    column, sign, value = text.partition("=")
    if not column or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    if column != "y":
        return column, value
    try:
        return column, json.loads(value)
    except ValueError:
        return column, value  # a label needs no quotes


def _parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in 0..1")
    return share


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


def _describe_infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="*.csv, *.jsonl, *.parquet or *.npz")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new file, of any of these kinds")
    parser.add_argument(
        "--version-dir",
        type=Path,
        metavar="DIR",
        help="load this version instead of asking the agent; a --config's rules hold",
    )


def _load_rules(options: argparse.Namespace) -> "FieldRules | None":
    """Return the owner's rules if a configuration was named; a version folder alone needs none."""
    if options.config is None:
        return None
    from edge_agent.collector import build_rules
    from edge_agent.config import load_agent_settings

    return build_rules(load_agent_settings(options.config))


def _add_command(commands: Any, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    line = (command.__doc__ or "").rstrip(".")
    parser: argparse.ArgumentParser = commands.add_parser(command.__name__, help=line, description=f"{line}.")
    parser.set_defaults(command=command)
    return parser


def _find_socket(options: argparse.Namespace) -> Path:
    if options.uds is not None:
        return Path(options.uds)
    from edge_agent.config import load_agent_settings

    return load_agent_settings(options.config or CONFIG_PATH).uds_path


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


def _find_raw_rows(rows: Any, metadata: dict[str, Any]) -> list[Any]:
    """Return rows by column, of which the agent makes inputs; empty if `rows` are tensors."""
    if isinstance(rows, dict) and "columns" in metadata.get("parameters", {}):
        return [] if rows.keys() == {tensor["name"] for tensor in metadata["inputs"]} else [rows]
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else []


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


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    sys.exit(main())
