import datetime as dt

import pytest
from cryptography import x509

from fl_server import authority as module
from fl_server.authority import Authority, AuthorityError


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "ca", fleet="demo")


def load_crl(authority: Authority) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(authority.crl_path.read_bytes())


def test_each_list_of_revoked_certificates_is_later_than_the_one_before_and_never_of_the_future(authority):
    dates = []
    for serials in ([], [7], [7, 2**158], [7]):
        authority.save_crl(serials)
        dates.append(load_crl(authority).last_update_utc)
        assert {entry.serial_number for entry in load_crl(authority)} == set(serials)
    assert dates == sorted(set(dates))
    assert dates[-1] < dt.datetime.now(dt.UTC)


def test_list_is_signed_anew_long_before_it_ends(authority, monkeypatch):
    assert not authority.is_crl_current([])
    authority.save_crl([7])
    assert authority.is_crl_current([7])
    assert not authority.is_crl_current([7, 8])
    monkeypatch.setattr(module, "CRL_LIFETIME", dt.timedelta(days=61))  # as in 16 of the 30 days
    assert not authority.is_crl_current([7])


def test_key_of_another_authority_is_refused(authority, tmp_path):
    other = Authority.create(tmp_path / "other", fleet="demo")
    (tmp_path / "ca" / "ca.key.pem").write_bytes((other.crl_path.parent / "ca.key.pem").read_bytes())
    with pytest.raises(AuthorityError, match="not the EC key"):
        Authority(tmp_path / "ca")
