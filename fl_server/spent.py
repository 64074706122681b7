"""What devices must have spent on the updates that came from them, even if their own word of it never does."""

import logging
from collections.abc import Iterable
from pathlib import Path

from fl_server.fleet.roster import Roster, RosterError
from fl_server.rounds.run import SPEC_NAME, RunSpec, load_checkpoints, load_spec
from models.contract.ledger import Spent

_log = logging.getLogger(__name__)


def keep_spent(roster: Roster, spec: RunSpec, round_number: int, device_ids: Iterable[str]) -> None:
    """Keep in `roster` that updates of a round came, whatever became of them; a round counts once."""
    if not spec.privacy.noise_multiplier:
        return  # no device trains without noise
    sampling_rate, steps = spec.privacy.count_charge(spec.training.steps)
    spent = Spent(
        model=spec.model,
        sampling_rate=sampling_rate,
        noise_multiplier=spec.privacy.noise_multiplier,
        steps=steps,
    )
    for device_id in device_ids:
        try:
            roster.save_update(device_id, spec.run, round_number, spent)
        except RosterError as error:  # a device whose reports filled its own copy must not end a run of others
            _log.warning("%s", error)


def recover_spent(roster: Roster, runs_dir: Path) -> None:
    """Keep in `roster` what all runs on disk say: a coordinator may have been killed before it did, or be older.

    Raises:
        RunError: A run's specification is damaged.
    """
    for path in sorted(runs_dir.glob(f"*/{SPEC_NAME}")):
        spec = load_spec(path.parent)
        for checkpoint in load_checkpoints(path.parent):
            keep_spent(roster, spec, checkpoint.round, checkpoint.accepted)
