"""Model versions and their aliases; methods are named as in MLflow's client.

    registry/index.db               what exists: a version is here or it does not exist
    registry/versions/MODEL/N/      its immutable folder, in place before its row is

A kill between folder and row leaves a folder nobody sees; the next version of that number replaces it.
"""

import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fl_server.database import Database
from fl_server.errors import ServerError
from models.contract.encoding import build_digest
from models.contract.errors import ContractError
from models.contract.files import save_atomically, sync_directory
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, parse_manifest
from models.contract.terms import Role

_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    model TEXT NOT NULL,
    version INTEGER NOT NULL,
    manifest_digest TEXT NOT NULL,
    run TEXT,
    round INTEGER,
    created_at REAL NOT NULL,
    PRIMARY KEY (model, version)
) STRICT;
CREATE TABLE IF NOT EXISTS aliases (
    model TEXT NOT NULL,
    alias TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (model, alias),
    FOREIGN KEY (model, version) REFERENCES versions (model, version)
) STRICT;
CREATE TABLE IF NOT EXISTS tags (
    model TEXT NOT NULL,
    version INTEGER NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (model, version, key),
    FOREIGN KEY (model, version) REFERENCES versions (model, version)
) STRICT;
"""

_WAYS: dict[Role, str] = {  # to have a version of that alias
    "champion": "release a version first: fl-server release VERSION_DIR",
    "challenger": "release one first: fl-server release VERSION_DIR --challenger",
    "previous": "one is there once a second version is the champion",
}


class RegistryError(ServerError):
    """The version cannot be registered, or is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One registered version; `directory` holds its manifest and files."""

    model: str
    version: int
    manifest_digest: str
    run: str | None
    round: int | None
    created_at: float
    directory: Path

    def load_manifest_bytes(self) -> bytes:
        """Return the bytes that define the version.

        Raises:
            RegistryError: They are not the registered ones any more.
        """
        data = (self.directory / MANIFEST_NAME).read_bytes()
        if build_digest(data) != self.manifest_digest:
            raise RegistryError(f"{self.directory / MANIFEST_NAME} was changed after it was registered; restore it")
        return data

    def load_manifest(self) -> ModelManifest:
        """Return the parsed manifest; raises RegistryError as `load_manifest_bytes` does."""
        return parse_manifest(self.load_manifest_bytes())


class Registry(Database):
    """All versions of all models under one directory; a context, used on the thread that opened it."""

    def __init__(self, directory: Path) -> None:
        self._versions_dir = directory / "versions"
        self._versions_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(directory / "index.db", _SCHEMA)

    def create_model_version(self, source: Path) -> ModelVersion:
        """Copy the version folder `source` in; the same bytes a second time are the same version.

        Raises:
            RegistryError: A file is not what the manifest says, or the number is taken by other bytes.
        """
        data, manifest = _load_source(source)
        if known := self._find(manifest.model, manifest.version):
            if known.manifest_digest == build_digest(data):
                return known
            raise RegistryError(
                f"{manifest.model} version {manifest.version} exists with other content; "
                f"package it as version {self.get_next_version(manifest.model)}"
            )
        self._copy(source, data, manifest)
        self._database.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)",
            (
                manifest.model,
                manifest.version,
                build_digest(data),
                manifest.lineage.run,
                manifest.lineage.round,
                time.time(),
            ),
        )
        return self.get_model_version(manifest.model, manifest.version)

    def get_model_version(self, model: str, version: int) -> ModelVersion:
        """Return the version; raises RegistryError if there is none."""
        if found := self._find(model, version):
            return found
        raise RegistryError(f"{model} has no version {version}")

    def get_model_version_by_alias(self, model: str, alias: Role) -> ModelVersion:
        """Return the version `alias` stands for; raises RegistryError if there is none."""
        query = "SELECT version FROM aliases WHERE model = ? AND alias = ?"
        row = self._database.execute(query, (model, alias)).fetchone()
        if row is None:
            raise RegistryError(f"{model} has no {alias}; {_WAYS[alias]}")
        return self.get_model_version(model, row["version"])

    def set_registered_model_alias(self, model: str, alias: Role, version: int) -> None:
        """Let `alias` stand for `version`; a champion that is replaced becomes "previous", one that was challenger is none."""
        self.get_model_version(model, version)
        with self._changing():
            if alias == "champion":
                self._database.execute(
                    "INSERT OR REPLACE INTO aliases SELECT model, 'previous', version FROM aliases "
                    "WHERE model = ? AND alias = 'champion' AND version != ?",
                    (model, version),
                )
                self._database.execute(
                    "DELETE FROM aliases WHERE model = ? AND alias = 'challenger' AND version = ?", (model, version)
                )
            self._database.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (model, alias, version))

    def restore_registered_model_aliases(self, model: str, *, champion: int, previous: int | None) -> None:
        """Let both aliases stand for what they once stood for, and for nothing else."""
        with self._changing():
            self._database.execute("INSERT OR REPLACE INTO aliases VALUES (?, 'champion', ?)", (model, champion))
            self._database.execute("DELETE FROM aliases WHERE model = ? AND alias = 'previous'", (model,))
            if previous is not None:
                self._database.execute("INSERT INTO aliases VALUES (?, 'previous', ?)", (model, previous))

    def delete_registered_model_alias(self, model: str, alias: Role, *, version: int) -> None:
        """Let `alias` stand for nothing if it stands for `version` now."""
        self._database.execute(
            "DELETE FROM aliases WHERE model = ? AND alias = ? AND version = ?", (model, alias, version)
        )

    def set_model_version_tag(self, model: str, version: int, key: str, value: str) -> None:
        """Attach a text to a version, in the place of the one it had under `key`."""
        self.get_model_version(model, version)
        self._database.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", (model, version, key, value))

    def get_model_version_tags(self, model: str, version: int) -> dict[str, str]:
        """Return the version's texts by key."""
        query = "SELECT key, value FROM tags WHERE model = ? AND version = ?"
        return {row["key"]: row["value"] for row in self._database.execute(query, (model, version))}

    def search_model_versions(
        self,
        model: str,
        *,
        run: str | None = None,
        round: int | None = None,  # noqa: A002 - the field's word
    ) -> list[ModelVersion]:
        """Return the model's versions, oldest first; only those of a run or of its round, if asked."""
        query = "SELECT * FROM versions WHERE model = ?1 AND (?2 IS NULL OR run = ?2) AND (?3 IS NULL OR round = ?3)"
        rows = self._database.execute(query + " ORDER BY version", (model, run, round))
        return [self._build(row) for row in rows]

    def search_registered_models(self) -> list[str]:
        """Return the names of all models that have a version."""
        return [row["model"] for row in self._database.execute("SELECT DISTINCT model FROM versions ORDER BY model")]

    def get_next_version(self, model: str) -> int:
        """Return the number that the model's next version gets; counts from 1."""
        row = self._database.execute("SELECT max(version) AS last FROM versions WHERE model = ?", (model,)).fetchone()
        return (row["last"] or 0) + 1

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _find(self, model: str, version: int) -> ModelVersion | None:
        query = "SELECT * FROM versions WHERE model = ? AND version = ?"
        row = self._database.execute(query, (model, version)).fetchone()
        return None if row is None else self._build(row)

    def _build(self, row: sqlite3.Row) -> ModelVersion:
        return ModelVersion(**dict(row), directory=self._versions_dir / row["model"] / str(row["version"]))

    def _copy(self, source: Path, data: bytes, manifest: ModelManifest) -> None:
        model_dir = self._versions_dir / manifest.model
        model_dir.mkdir(exist_ok=True)
        sync_directory(self._versions_dir)
        target, staging = model_dir / str(manifest.version), model_dir / f".{manifest.version}.staging"
        for leftover in (target, staging):  # of a kill before its row was written
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        for name, entry in manifest.all_files.items():
            _copy_file(source / name, staging / name, entry)
        save_atomically(staging / MANIFEST_NAME, data)
        staging.rename(target)
        sync_directory(model_dir)


def _load_source(source: Path) -> tuple[bytes, ModelManifest]:
    path = source / MANIFEST_NAME
    try:
        data = path.read_bytes()
        return data, parse_manifest(data)
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}; a version folder comes from fl-server package") from error
    except ContractError as error:
        raise RegistryError(f"{path}: {error}") from error


def _copy_file(source: Path, target: Path, entry: FileEntry) -> None:
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
    except OSError as error:
        raise RegistryError(f"{source}: {error.strerror}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.digest:
        raise RegistryError(f"{source} has digest {digest[:12]}…, the manifest says {entry.digest[:12]}…")
