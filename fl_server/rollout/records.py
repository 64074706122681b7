"""The last rollout of each model, in the coordinator's database."""

from pathlib import Path

from fl_server.database import Database
from fl_server.rollout.waves import Rollout
from models.contract.encoding import build_json, parse_json

_SCHEMA = "CREATE TABLE IF NOT EXISTS rollouts (model TEXT PRIMARY KEY, rollout BLOB NOT NULL) STRICT"


class RolloutRecords(Database):
    """Rollouts on disk; every method returns once its effect is durable. A context, of the thread that opened it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _SCHEMA)

    def find(self, model: str) -> Rollout | None:
        """Return the model's last rollout, None if it has had none since the last release to everybody."""
        row = self._database.execute("SELECT rollout FROM rollouts WHERE model = ?", (model,)).fetchone()
        return None if row is None else parse_json(row["rollout"], Rollout)

    def list_all(self) -> list[Rollout]:
        """Return the last rollout of every model, by the model's name."""
        rows = self._database.execute("SELECT rollout FROM rollouts ORDER BY model")
        return [parse_json(row["rollout"], Rollout) for row in rows]

    def save(self, rollout: Rollout) -> None:
        """Keep the rollout in the place of the model's last one."""
        self._database.execute("INSERT OR REPLACE INTO rollouts VALUES (?, ?)", (rollout.model, build_json(rollout)))

    def forget(self, model: str) -> None:
        """Keep no rollout of the model."""
        self._database.execute("DELETE FROM rollouts WHERE model = ?", (model,))
