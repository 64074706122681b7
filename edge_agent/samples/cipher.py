"""AES-256-GCM by the OpenSSL that Python's own `ssl` has loaded already.

`cryptography` brings an OpenSSL of its own: an agent at rest that has kept a sample takes 91.6 MB with it and 83.7 MB
so, of the 90 MB that it may. It does the work where a Python has OpenSSL built in and there is nothing to share, and
where it is loaded anyway, as in the training process: there it takes 1.6 MB less, and a fifth of the time.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Protocol

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16

_LIBRARY = "libcrypto.so.3"
_GET_TAG, _SET_TAG = 0x10, 0x11  # EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG; nonces have 12 bytes by default
_POINTER, _BYTES, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_START = (_INT, (_POINTER, _POINTER, _POINTER, _BYTES, _BYTES))
_UPDATE = (_INT, (_POINTER, _POINTER, ctypes.POINTER(_INT), _BYTES, _INT))
_FINAL = (_INT, (_POINTER, _POINTER, ctypes.POINTER(_INT)))
_PROTOTYPES = {
    "EVP_aes_256_gcm": (_POINTER, ()),
    "EVP_CIPHER_CTX_new": (_POINTER, ()),
    "EVP_CIPHER_CTX_free": (None, (_POINTER,)),
    "EVP_CIPHER_CTX_ctrl": (_INT, (_POINTER, _INT, _INT, _POINTER)),
    **{f"EVP_{way}Init_ex": _START for way in ("Encrypt", "Decrypt")},
    **{f"EVP_{way}Update": _UPDATE for way in ("Encrypt", "Decrypt")},
    **{f"EVP_{way}Final_ex": _FINAL for way in ("Encrypt", "Decrypt")},
}


class TagError(Exception):
    """Another key, other associated data, or other bytes than were sealed."""


class Cipher(Protocol):
    """AES-256-GCM under one key; may be used from several threads."""

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """Return ciphertext and tag."""
        ...

    def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """Return what ciphertext and tag were made of; raises TagError."""
        ...


def open_cipher(key: bytes) -> Cipher:
    """Return the cipher under `key`, 32 bytes, by the library that takes the least memory."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes, expected {KEY_BYTES}")
    library = None if "cryptography" in sys.modules else _load_library()
    return LoadedCipher(key, library) if library else PackagedCipher(key)


class PackagedCipher:
    """By `cryptography`."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead = AESGCM(key)

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        return self._aead.encrypt(nonce, data, associated)

    def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(nonce, data, associated)
        except InvalidTag as error:
            raise TagError from error


class LoadedCipher:
    """By the shared library; a context a call, so that threads share none."""

    def __init__(self, key: bytes, library: ctypes.CDLL) -> None:
        self._key = key
        self._library = library

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        output, written = ctypes.create_string_buffer(len(data) + TAG_BYTES), _INT()
        context = self._begin(self._library.EVP_EncryptInit_ex, nonce)
        try:
            self._feed(self._library.EVP_EncryptUpdate, context, data, associated, output)
            _check(self._library.EVP_EncryptFinal_ex(context, None, ctypes.byref(written)))
            tag = ctypes.byref(output, len(data))
            _check(self._library.EVP_CIPHER_CTX_ctrl(context, _GET_TAG, TAG_BYTES, tag))
        finally:
            self._library.EVP_CIPHER_CTX_free(context)
        return output.raw

    def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        if len(data) < TAG_BYTES:
            raise TagError
        sealed, tag = data[:-TAG_BYTES], ctypes.create_string_buffer(data[-TAG_BYTES:], TAG_BYTES)
        output, written = ctypes.create_string_buffer(max(1, len(sealed))), _INT()
        context = self._begin(self._library.EVP_DecryptInit_ex, nonce)
        try:
            self._feed(self._library.EVP_DecryptUpdate, context, sealed, associated, output)
            _check(self._library.EVP_CIPHER_CTX_ctrl(context, _SET_TAG, TAG_BYTES, tag))
            if self._library.EVP_DecryptFinal_ex(context, None, ctypes.byref(written)) != 1:
                raise TagError
        finally:
            self._library.EVP_CIPHER_CTX_free(context)
        return output.raw[: len(sealed)]

    def _begin(self, start: Callable[..., int], nonce: bytes) -> int:
        if len(nonce) != NONCE_BYTES:  # OpenSSL would read past its end
            raise ValueError(f"a nonce of {len(nonce)} bytes, expected {NONCE_BYTES}")
        context: int | None = self._library.EVP_CIPHER_CTX_new()
        if not context:
            raise MemoryError
        try:
            _check(start(context, self._library.EVP_aes_256_gcm(), None, self._key, nonce))
        except BaseException:
            self._library.EVP_CIPHER_CTX_free(context)
            raise
        return context

    def _feed(
        self,
        update: Callable[..., int],
        context: int,
        data: bytes,
        associated: bytes,
        output: "ctypes.Array[ctypes.c_char]",
    ) -> None:
        written = _INT()
        _check(update(context, None, ctypes.byref(written), associated, len(associated)))
        if data:
            _check(update(context, output, ctypes.byref(written), data, len(data)))


def _check(status: int) -> None:
    if status != 1:
        raise RuntimeError("OpenSSL refused to encrypt or decrypt")


@cache
def _load_library() -> ctypes.CDLL | None:
    import ssl  # noqa: F401 - it brings the library, which is then found by its name alone

    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library
