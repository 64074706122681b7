"""Both libraries make the same bytes, and what was changed does not open."""

import subprocess
import sys

import pytest

from edge_agent.samples.cipher import (
    KEY_BYTES,
    NONCE_BYTES,
    Cipher,
    LoadedCipher,
    PackagedCipher,
    TagError,
    _load_library,
    open_cipher,
)

KEY, NONCE = bytes(range(KEY_BYTES)), bytes(range(NONCE_BYTES))


def build_ciphers(key: bytes = KEY) -> list[Cipher]:
    library = _load_library()
    assert library is not None, "this Python has OpenSSL built in: one implementation is not tested here"
    return [LoadedCipher(key, library), PackagedCipher(key)]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 70_000])
@pytest.mark.parametrize("associated", [b"", b"row 1\0"])
def test_both_libraries_seal_alike_and_open_what_the_other_sealed(size: int, associated: bytes) -> None:
    data = bytes(i % 251 for i in range(size))
    ours, theirs = build_ciphers()
    sealed = ours.encrypt(NONCE, data, associated)
    assert sealed == theirs.encrypt(NONCE, data, associated)
    assert ours.decrypt(NONCE, sealed, associated) == theirs.decrypt(NONCE, sealed, associated) == data


def test_known_answer() -> None:
    """Test case 14 of the GCM specification (McGrew & Viega 2004), all zeros."""
    for cipher in build_ciphers(bytes(KEY_BYTES)):
        sealed = cipher.encrypt(bytes(NONCE_BYTES), bytes(16), b"")
        assert sealed.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


@pytest.mark.parametrize("change", ["data", "tag", "nonce", "associated", "key", "cut", "nothing left"])
def test_what_was_changed_does_not_open(change: str) -> None:
    for number, cipher in enumerate(build_ciphers()):
        sealed = cipher.encrypt(NONCE, b"seven", b"row 1")
        nonce, associated = NONCE, b"row 1"
        match change:
            case "data":
                sealed = bytes([sealed[0] ^ 1]) + sealed[1:]
            case "tag":
                sealed = sealed[:-1] + bytes([sealed[-1] ^ 1])
            case "nonce":
                nonce = bytes(NONCE_BYTES)
            case "associated":
                associated = b"row 2"
            case "key":
                cipher = build_ciphers(bytes(KEY_BYTES))[number]  # noqa: PLW2901
            case "cut":
                sealed = sealed[:-1]
            case _:
                sealed = b""
        with pytest.raises(TagError):
            cipher.decrypt(nonce, sealed, associated)


@pytest.mark.parametrize(("first", "used"), [("pass", "LoadedCipher"), ("import cryptography", "PackagedCipher")])
def test_the_library_that_is_loaded_already_is_used(first: str, used: str) -> None:
    program = (
        f"{first}; from edge_agent.samples.cipher import open_cipher; print(type(open_cipher(bytes(32))).__name__)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.decode().strip() == used
    )


def test_key_or_nonce_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        open_cipher(bytes(31))
    with pytest.raises(ValueError, match="11 bytes"):
        build_ciphers()[0].encrypt(bytes(11), b"", b"")
