"""The command line of the coordinator."""

import argparse
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Protocol

from fl_server import commands, key_commands, rollout_commands
from fl_server.config import CONFIG_NAME
from fl_server.errors import ServerError, UsageError
from fl_server.rounds.optimizers import OPTIMIZER_NAMES
from fl_server.rounds.rule import RULE_NAMES
from models.contract.errors import ContractError
from models.contract.privacy import Unit
from models.contract.settings import SettingsError


class _Subparsers(Protocol):
    def add_parser(self, name: str, *, help: str, description: str) -> argparse.ArgumentParser: ...  # noqa: A002


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `execute` of the parsed arguments is the function that does it."""
    parser = argparse.ArgumentParser(prog="fl-server", description="The coordinator of a federation of devices.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(subparsers)
    _add_run(subparsers)
    _add_enroll(subparsers)
    _add_token(subparsers)
    _add_revoke(subparsers)
    _add_devices(subparsers)
    _add_package(subparsers)
    _add_release(subparsers)
    _add_rollout(subparsers)
    _add_rollback(subparsers)
    _add_keys(subparsers)
    _add_train(subparsers)
    _add_simulate(subparsers)
    _add_doctor(subparsers)
    _add_demo(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 it failed, 2 bad usage or configuration."""
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.execute(parsed)
    except (UsageError, SettingsError) as error:
        return _fail(str(error), 2)
    except (ServerError, ContractError) as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str, code: int) -> int:
    print(f"fl-server: {' '.join(message.split())}", file=sys.stderr)
    return code


def _add(subparsers: _Subparsers, name: str, summary: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def _add_with_config(subparsers: _Subparsers, name: str, summary: str) -> argparse.ArgumentParser:
    parser = _add(subparsers, name, summary)
    parser.add_argument(
        "--config", type=Path, default=Path(CONFIG_NAME), metavar="FILE", help=f"default: ./{CONFIG_NAME}"
    )
    return parser


def _add_init(subparsers: _Subparsers) -> None:
    parser = _add(subparsers, "init", "create a federation: configuration, certificates, signing keys, databases")
    parser.add_argument("directory", type=Path, metavar="DIR", help="new or empty")
    parser.add_argument("--fleet", default="fleet", metavar="NAME", help="its name in every topic (default: fleet)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="where devices reach this machine (default: 127.0.0.1); is in the certificates",
    )
    parser.add_argument(
        "--broker-port", type=int, default=8883, metavar="N", help="where the broker listens (default: %(default)s)"
    )
    parser.set_defaults(execute=commands.run_init)


def _add_run(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "run", "the coordinator service, until it is told to end")
    parser.set_defaults(execute=commands.run_coordinator)


def _add_enroll(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "enroll", "write the files that make a machine a device of this fleet")
    parser.add_argument("device_id", metavar="DEVICE_ID", help="its name in topics: A-Z a-z 0-9 . _ -")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty; holds a private key then")
    parser.add_argument("--model", metavar="NAME", help="what it serves (default: the only model configured)")
    parser.set_defaults(execute=commands.run_enroll)


def _add_token(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "token", "print a word with which a machine makes itself a device, once")
    parser.add_argument("device_id", metavar="DEVICE_ID", help="its name in topics: A-Z a-z 0-9 . _ -")
    parser.add_argument("--model", metavar="NAME", help="what it serves (default: the only model configured)")
    parser.add_argument("--hours", type=float, default=24.0, metavar="H", help="until it expires (default: 24)")
    parser.add_argument(
        "--again", action="store_true", help="the device is enrolled already: it gets new keys, and keeps what it spent"
    )
    parser.set_defaults(execute=commands.run_token)


def _add_revoke(subparsers: _Subparsers) -> None:
    parser = _add_with_config(
        subparsers, "revoke", "shut a device out: of every run to come and, within a minute, of the broker"
    )
    parser.add_argument("device_id", metavar="DEVICE_ID", help="its name in topics: A-Z a-z 0-9 . _ -")
    parser.set_defaults(execute=commands.run_revoke)


def _add_devices(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "devices", "list the devices and what they last said")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(execute=commands.run_devices)


def _add_doctor(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "doctor", "test what the coordinator needs, and say what to do")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(execute=commands.run_doctor)


def _add_package(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "package", "make a model version from a definition or a finished graph")
    parser.add_argument(
        "source", metavar="FILE.py:NAME", help="or package.module:NAME; or model.onnx, model.tflite: served only"
    )
    parser.add_argument("--name", metavar="NAME", help="what a finished graph is served as")
    parser.add_argument("--labels", metavar="A,B", help="names of a finished graph's classes")
    parser.add_argument("--parameters", type=Path, metavar="F", help="safetensors (default: the untrained module's)")
    parser.add_argument(
        "--calibration", type=Path, metavar="F", help="npz of x (or an array an input, by name) for the ranges of int8"
    )
    parser.add_argument("--validation", type=Path, metavar="F", help="npz of the same and y, to measure the version on")
    parser.add_argument(
        "--runtime", choices=("onnx", "tflite"), help="of the devices (default: the configuration's, onnx)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty")
    parser.set_defaults(execute=commands.run_package)


def _add_release(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "release", "sign a model version and offer it to the fleet")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version_dir", type=Path, nargs="?", metavar="VERSION_DIR", help="made by fl-server package")
    what.add_argument("--promote", metavar="MODEL", help="make the model's challenger its champion")
    what.add_argument("--withdraw", metavar="MODEL", help="take the model's challenger back")
    parser.add_argument("--challenger", action="store_true", help="beside the champion, not in its place")
    parser.add_argument("--weight", type=_parse_decimal, metavar="W", help="the challenger's share of answers, 0 to 1")
    parser.add_argument("--shadow", action="store_true", help="compare the challenger with the champion's answers")
    _add_folders(parser)
    _add_following(parser)
    parser.set_defaults(execute=commands.run_release)


def _add_rollout(subparsers: _Subparsers) -> None:
    parser = _add(subparsers, "rollout", "bring a model version to the fleet in waves, and back if it fails")
    actions = parser.add_subparsers(required=True, metavar="ACTION", help="start, status, approve, halt, resume")
    start = _add_with_config(actions, "start", "release a version to a first wave of the fleet")
    start.add_argument("version_dir", type=Path, metavar="VERSION_DIR", help="made by fl-server package")
    start.add_argument("--plan", type=Path, metavar="FILE.toml", help="waves, rates, what ends it; see the README")
    start.add_argument("--waves", metavar="P,P", help="percentages of the fleet, rising to 100 (default: 100)")
    start.add_argument("--devices", metavar="ID,ID", help="are in every wave; with --waves 0,100 they alone come first")
    _add_folders(start)
    status = _add_with_config(actions, "status", "show how far rollouts are, and what devices say of them")
    status.add_argument("model", nargs="?", metavar="MODEL", help="default: all")
    status.add_argument("--json", action="store_true", help="for programs")
    approve = _add_with_config(actions, "approve", "let the next wave begin, once the one before is complete")
    halt = _add_with_config(actions, "halt", "let no other device begin; who has the version keeps it")
    resume = _add_with_config(actions, "resume", "go on after a halt; what failed until now counts no more")
    for action in (approve, halt, resume):
        action.add_argument("model", metavar="MODEL", help="whose rollout")
    for action in (start, approve, halt, resume):
        _add_following(action)
    start.set_defaults(execute=rollout_commands.run_start)
    status.set_defaults(execute=rollout_commands.run_status)
    approve.set_defaults(execute=rollout_commands.run_approve)
    halt.set_defaults(execute=rollout_commands.run_halt)
    resume.set_defaults(execute=rollout_commands.run_resume)


def _add_rollback(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "rollback", "make the version that was champion before the champion again")
    parser.add_argument("model", metavar="MODEL", help="whose champion goes back; ends its rollout")
    _add_following(parser)
    parser.set_defaults(execute=commands.run_rollback)


def _add_keys(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "keys", "show who signs what until when; replace keys, renew signatures")
    _add_folders(parser)
    parser.set_defaults(execute=key_commands.run_list)
    actions = parser.add_subparsers(metavar="ACTION", help="rotate or renew; without one, they are shown")
    rotate = _add(actions, "rotate", "replace the keys of roles; devices learn of it from the next offer")
    rotate.add_argument("roles", nargs="+", choices=key_commands.ROTATABLE, metavar="ROLE", help="%(choices)s")
    rotate.add_argument("--key", default="", metavar="ID", help="only this one, as fl-server keys shows it")
    rotate.add_argument("--signer", metavar="URI", help="gcpkms:, awskms:, azurekms:, hv:, file2:PATH takes over")
    rotate.add_argument("--public-key", type=Path, metavar="FILE", help="of the signer, PEM")
    rotate.set_defaults(execute=key_commands.run_rotate)
    renew = _add(actions, "renew", "sign again: what expires soon, or the roles named")
    renew.add_argument("roles", nargs="*", metavar="ROLE", help="of fl-server keys")
    renew.add_argument(
        "--restored", action="store_true", help="after a restore: with versions above all that devices saw"
    )
    renew.set_defaults(execute=key_commands.run_renew)
    for action in (rotate, renew):  # what stands before the action holds, too
        action.add_argument(
            "--config", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=f"default: ./{CONFIG_NAME}"
        )
        _add_folders(action, default=argparse.SUPPRESS)


def _add_folders(parser: argparse.ArgumentParser, default: str | list[Path] | None = None) -> None:
    parser.add_argument(
        "--keys",
        type=Path,
        action="append",
        default=[] if default is None else default,
        metavar="DIR",
        help="where further keys are, a stick for instance; may be given several times",
    )


def _add_train(subparsers: _Subparsers) -> None:
    parser = _add_with_config(subparsers, "train", "train a model on the devices' own data, in private")
    parser.add_argument("model", metavar="MODEL", help="as its [models.NAME] section names it")
    _add_plan(parser)
    _add_following(parser)
    parser.set_defaults(execute=commands.run_train)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the run (default: %(default)s)")
    decimals = {
        "epsilon": ("8", "privacy loss of the whole run, at most"),
        "delta": ("0.001", "chance that the bound fails"),
        "sampling-rate": ("0.25", "with which each sample takes part in a step, or each device in a round"),
        "clipping-norm": ("1", "L2 bound of one sample's gradient, or of one device's update"),
        "learning-rate": ("0.5", "of the devices' optimiser"),
        "momentum": ("0", "of the devices' SGD, begun anew each round"),
        "proximal-mu": ("0", "weight of FedProx's pull towards the parameters that a round begins with"),
        "expected-batch": ("32", "samples a step is divided by, a constant of the plan"),
        "server-learning-rate": ("1", "of the coordinator's optimiser"),
        "server-momentum": ("0", "of the coordinator's optimiser, where it is not fedavg"),
    }
    for name, (default, summary) in decimals.items():
        parser.add_argument(
            f"--{name}", type=_parse_decimal, default=default, metavar="X", help=f"{summary} (default: %(default)s)"
        )
    parser.add_argument(
        "--unit",
        choices=[unit.value for unit in Unit],
        default="sample",
        help="what is protected: one record, or all of a device from those who see models (default: %(default)s)",
    )
    parser.add_argument(
        "--clipping-quantile",
        type=_parse_decimal,
        metavar="X",
        help="share of updates that the clipping norm is to leave uncut, round by round; of unit device",
    )
    parser.add_argument(
        "--participation",
        choices=("hidden", "visible"),
        default="hidden",
        help="visible claims no amplification, for who can see which devices take part; of unit device "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--server-optimizer",
        choices=OPTIMIZER_NAMES,
        default="fedavg",
        help="what moves the parameters by a round's step (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizer", choices=("sgd", "adam"), default="sgd", help="of the devices (default: %(default)s)"
    )
    parser.add_argument(
        "--aggregation", choices=RULE_NAMES, default="mean", help="what makes one step of all updates (default: mean)"
    )
    parser.add_argument(
        "--byzantine", type=int, default=0, metavar="N", help="hostile devices that the aggregation is to withstand"
    )
    parser.add_argument(
        "--uplink", choices=("float32", "int8"), default="float32", help="how updates travel (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="DP-SGD steps a device makes in a round (default: 5)")


def _add_simulate(subparsers: _Subparsers) -> None:
    parser = _add(subparsers, "simulate", "the same rounds with virtual devices, to find out what a plan is worth")
    parser.add_argument("definition", metavar="FILE.py:NAME", help="or package.module:NAME")
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="one npz of x and y a device")
    parser.add_argument(
        "--test", type=Path, required=True, metavar="DIR", help="the same, measured and never trained on"
    )
    _add_plan(parser)
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="repeats a run bit by bit, without privacy (default: the system's entropy)",
    )
    parser.add_argument(
        "--engine",
        choices=("inline", "ray"),
        default="inline",
        help="a process a core, or Flower's simulation engine (extra: simulation); default: %(default)s",
    )
    parser.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="what was measured")
    parser.set_defaults(execute=commands.run_simulate)


def _add_demo(subparsers: _Subparsers) -> None:
    parser = _add(subparsers, "demo", "the whole loop on this machine: devices learn digits, versions reach them live")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, metavar="R", help="default: %(default)s")
    parser.add_argument(
        "--epsilon", type=_parse_decimal, default="8", metavar="E", help="of the whole run (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    parser.set_defaults(execute=commands.run_demo)


def _add_following(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="return once the job is queued")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")


def _parse_decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not number.is_finite():
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return number


if __name__ == "__main__":
    sys.exit(main())
