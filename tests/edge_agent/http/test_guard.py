"""The token that lets a program of the owner's write over TCP."""

import errno
import os
from pathlib import Path

import pytest

from edge_agent.errors import RequestError
from edge_agent.http.guard import Guard, load_token
from models.contract.settings import SettingsError


def test_token_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = load_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) > 40
    assert load_token(path) == token
    assert load_token(tmp_path / "other") != token


def test_token_that_others_may_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    load_token(path)
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="others may read"):
        load_token(path)
    path.chmod(0o600)
    for content in (b"short", b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match="token"):
            load_token(path)
    with pytest.raises(SettingsError, match="No such file"):
        load_token(tmp_path / "no" / "token")


def test_token_that_could_not_be_written_whole_is_made_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", be_full)
    with pytest.raises(SettingsError, match="No space left"):
        load_token(tmp_path / "token")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert load_token(tmp_path / "token")


@pytest.mark.parametrize(
    "said", [None, b"", b"Bearer", b"Bearer x", b"Basic secret-token", b"secret-token", b"Bearer \xff"]
)
def test_only_the_bearer_passes(said: bytes | None) -> None:
    guard = Guard("127.0.0.1", "secret-token")
    with pytest.raises(RequestError) as refused:
        guard.check_owner({} if said is None else {b"authorization": said})
    assert refused.value.status == 401
    for good in (b"Bearer secret-token", b"bearer  secret-token "):
        guard.check_owner({b"authorization": good})


def test_without_a_token_nobody_does() -> None:
    with pytest.raises(RequestError, match="Unix socket only") as refused:
        Guard("127.0.0.1", None).check_owner({b"authorization": b"Bearer None"})
    assert refused.value.status == 403
