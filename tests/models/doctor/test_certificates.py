import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fl_server.initialise import initialise
from models.doctor.certificates import check_certificate, check_pair, check_secret

NOW = datetime.now(UTC)
LIFETIME = timedelta(days=3650)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "federation"
    initialise(path, fleet="f", host="127.0.0.1")
    return path / "ca"


@pytest.fixture
def ca_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ca"))


@pytest.mark.parametrize(
    ("now", "level", "said"),
    [
        (NOW, "ok", "valid until"),
        (NOW + LIFETIME - timedelta(days=29), "warn", "expires on"),
        (NOW + LIFETIME + timedelta(days=1), "fail", "expired on"),
        (NOW - timedelta(days=1), "fail", "valid only from"),
    ],
)
def test_a_certificate_is_judged_by_its_time(ca_dir: Path, now: datetime, level: str, said: str) -> None:
    finding = check_certificate(ca_dir / "ca.pem", now=now, renewal="renew it")
    assert (finding.level, said in finding.found) == (level, True)
    assert bool(finding.advice) == (level != "ok")


def test_what_is_missing_or_no_certificate_is_named(ca_dir: Path) -> None:
    (ca_dir / "ca.pem").write_text("junk")
    assert "no certificate" in check_certificate(ca_dir / "ca.pem", now=NOW, renewal="renew it").found
    missing = check_certificate(ca_dir / "no.pem", now=NOW, renewal="renew it")
    assert (missing.level, "no.pem" in missing.found) == ("fail", True)


def test_a_key_belongs_to_its_certificate_and_to_its_owner_alone(ca_dir: Path) -> None:
    assert check_pair(ca_dir / "superlink.pem", ca_dir / "superlink.key.pem").level == "ok"
    assert check_pair(ca_dir / "ca.pem", ca_dir / "superlink.key.pem").level == "fail"
    (ca_dir / "superlink.key.pem").chmod(0o640)
    open_to_others = check_pair(ca_dir / "superlink.pem", ca_dir / "superlink.key.pem")
    assert (open_to_others.level, "0640" in open_to_others.found) == ("fail", True)
    assert check_secret(ca_dir / "none.key").level == "fail"
