"""What devices must have spent on the updates that came from them, even if their own word of it never does."""

import logging
from collections.abc import Iterable
from pathlib import Path

from fl_server.fleet.roster import Roster, RosterError
from fl_server.rounds.run import SPEC_NAME, RunSpec, build_round_dir, load_checkpoints, load_spec
from fl_server.rounds.spool import UPDATES_NAME, list_spooled
from models.contract.ledger import Spent
from models.contract.privacy import Unit

_log = logging.getLogger(__name__)

_WHOLE_RUN = 1  # not above any round that a device has charged, and above 0, which it says before the first


def keep_spent(roster: Roster, spec: RunSpec, round_number: int, device_ids: Iterable[str]) -> None:
    """Keep in `roster` that updates of a round came, whatever became of them.

    A round counts once, and of unit `device` the run, whose rounds a device has all paid with the first it was in.
    """
    if not spec.privacy.noise_multiplier:
        return  # no device trains without noise
    spent = Spent(
        model=spec.model,
        sampling_rate=spec.privacy.claimed_rate,
        noise_multiplier=spec.privacy.noise_multiplier,
        steps=spec.privacy.count_charged_steps(spec.training),
    )
    number = _WHOLE_RUN if spec.privacy.unit is Unit.DEVICE else round_number
    for device_id in device_ids:
        try:
            roster.save_update(device_id, spec.run, number, spent)
        except RosterError as error:  # a device whose reports filled its own copy must not end a run of others
            _log.warning("%s", error)


def keep_spooled(roster: Roster, spec: RunSpec, run_dir: Path, round_number: int) -> None:
    """Keep in `roster` whose updates a round has that is not complete, and may never be."""
    keep_spent(roster, spec, round_number, list_spooled(build_round_dir(run_dir, round_number) / UPDATES_NAME))


def recover_spent(roster: Roster, runs_dir: Path) -> None:
    """Keep in `roster` what all runs on disk say: a coordinator may have been killed before it did, or be older.

    Raises:
        RunError: A run's specification is damaged.
    """
    for path in sorted(runs_dir.glob(f"*/{SPEC_NAME}")):
        spec = load_spec(path.parent)
        for checkpoint in load_checkpoints(path.parent):
            keep_spent(roster, spec, checkpoint.round, checkpoint.accepted)
        for directory in path.parent.glob("rounds/[0-9]*/updates"):
            keep_spooled(roster, spec, path.parent, int(directory.parent.name))
