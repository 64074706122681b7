"""`fl-server keys`: who signs what, replacing keys, renewing what is kept offline."""

from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fl_server.commands import load_directory
from fl_server.errors import UsageError

if TYPE_CHECKING:
    from fl_server.rollout.repository import ReleaseRepository

ORDERS = "orders"  # no role of the repository: its public key is a target of "releases"
ROTATABLE = ("root", "targets", "graphs", "releases", "snapshot", "timestamp", ORDERS)


def run_list(arguments: Namespace) -> None:
    from fl_server.rollout.keys import KEYID_SHOWN
    from fl_server.rollout.repository import ReleaseRepository

    print(f"{'role':<10} {'version':>7} {'signed until':<17} {'needs':<6} {'key':<{KEYID_SHOWN}}  where")
    for status in ReleaseRepository(load_directory(arguments), arguments.keys).describe():
        said = f"{status.role:<10} {status.version:>7} {status.expires:%Y-%m-%d %H:%MZ} "
        said += f"{f'{status.threshold} of {len(status.keys)}':<6}"
        for key in status.keys:
            print(f"{said} {key.keyid[:KEYID_SHOWN]}  {key.place or 'not here'}")
            said = " " * len(said)


def run_rotate(arguments: Namespace) -> None:
    from fl_server.rollout.repository import ReleaseRepository
    from fl_server.rollout.trust import Rotation

    roles = tuple(dict.fromkeys(arguments.roles))
    if (arguments.signer is None) != (arguments.public_key is None):
        raise UsageError("--signer and --public-key go together: a signer does not say whose key it has")
    if len(roles) > 1 and (arguments.key or arguments.signer):
        raise UsageError("--key and --signer are about one role; give one")
    if ORDERS in roles and arguments.signer:
        raise UsageError(f"the coordinator itself signs {ORDERS}; they have no external signer")
    repository, now = ReleaseRepository(load_directory(arguments), arguments.keys), datetime.now(UTC)
    created: list[Path] = []
    if signing := tuple(role for role in roles if role != ORDERS):
        signer = None if arguments.signer is None else (arguments.signer, arguments.public_key)
        created += repository.rotate(Rotation(roles=signing, keyid=arguments.key, signer=signer), now=now)
    if ORDERS in roles:
        created += repository.rotate_order_key(now=now)
    for path in created:
        print(f"new: {path}")
    print("replaced; the coordinator offers it to the fleet within a minute, or once it runs")
    if ORDERS in roles:
        print(f"{ORDERS}: restart the coordinator; devices refuse what the old key signs")


def run_renew(arguments: Namespace) -> None:
    from fl_server.rollout.repository import ReleaseRepository
    from fl_server.rollout.trust import ROLES

    if unknown := set(arguments.roles) - set(ROLES):
        raise UsageError(f"{', '.join(sorted(unknown))}: no role; roles are {', '.join(ROLES)}")
    repository, now = ReleaseRepository(load_directory(arguments), arguments.keys), datetime.now(UTC)
    if arguments.restored:
        _outrun(repository, arguments.roles, now)
    elif arguments.roles:
        repository.renew(arguments.roles, now=now)
        print(f"signed again: {', '.join(dict.fromkeys(arguments.roles))}")
    elif missing := repository.refresh_expiring(now):
        raise UsageError(
            f"{', '.join(missing)} expire soon, and their keys are not here: name their folder with --keys"
        )
    else:
        print("whatever was to expire soon is signed again")


def _outrun(repository: "ReleaseRepository", roles: Sequence[str], now: datetime) -> None:
    from fl_server.rollout.trust import TARGETS_ROLES

    if "root" in roles:
        raise UsageError("root: its versions cannot leap; put back the newest *.root.json files of tuf/ instead")
    chosen = [role for role in TARGETS_ROLES if role in {"releases", *roles}]
    repository.outrun(chosen, now=now)
    print(f"signed again, above all that devices saw: {', '.join((*chosen, 'snapshot', 'timestamp'))}")
