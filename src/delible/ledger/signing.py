"""Signed statements: DSSE envelopes with Ed25519, and the keys for them.

    PAE(type, payload) = "DSSEv1" SP LEN(type) SP type SP LEN(payload) SP payload
    envelope           = {payloadType, payload: base64, signatures: [{keyid, sig: base64}]}

Source: the DSSE protocol, v1.0.2 (secure-systems-lab). ``keyid`` is the SHA-256 of the public
key's DER form (SubjectPublicKeyInfo); it only helps to find a key, and is never trusted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import MissingExtraError, RunError
from delible.files import explain_disk
from delible.ledger.store import write_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

STATEMENT = "application/vnd.in-toto+json"
HEAD = "application/vnd.delible.ledger-head+json"


def pae(kind: str, payload: bytes) -> bytes:
    """What is signed: pre-authentication encoding of a payload and its type."""
    name = kind.encode()
    return b" ".join((b"DSSEv1", b"%d" % len(name), name, b"%d" % len(payload), payload))


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtraError("signing and verifying", "ledger") from None
    return ed25519


def make_key(path: Path) -> tuple[Path, str]:
    """Makes a key pair: the private part at ``path`` (0600), the public one at ``path.pub``.

    Where only the private part is there, the public one is made from it.

    Returns:
        Where the public key lies, and its id.

    Raises:
        RunError: There is a key already, or the disk refuses it.
    """
    ed25519 = _ed25519()
    from cryptography.hazmat.primitives import serialization

    made = ed25519.Ed25519PrivateKey.generate()
    private = made.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = public_path(path)
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            write_secret(path, private)
        except FileExistsError:
            if not public.exists():  # killed between the two
                known = private_key(path).public_key()
                public.write_bytes(public_pem(known))
                return public, key_id(known)
            raise RunError(
                "there is a key already.",
                where=str(path),
                hint="What it signed is verified with it: keep it, or name another file.",
            ) from None
        public.write_bytes(public_pem(made.public_key()))
    return public, key_id(made.public_key())


def default_key(ledger: Path) -> Path:
    """Where the private key of a ledger lies, unless another one is named."""
    return ledger.with_name(f"{ledger.stem}.signing.pem")


def public_path(path: Path) -> Path:
    """Where the public part of a key lies."""
    return path.with_name(f"{path.name}.pub")


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as text."""
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key's DER form (hexadecimal)."""
    from cryptography.hazmat.primitives import serialization

    data = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(data).hexdigest()


def private_key(path: Path) -> Ed25519PrivateKey:
    """Reads a private key.

    Raises:
        RunError: It is missing, others may read it, or it is no Ed25519 key without a password.
    """
    ed25519 = _ed25519()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"the key cannot be read ({error.strerror}).",
            where=str(path),
            hint="'delible request key' makes one.",
        ) from None
    if mode & 0o077:
        raise RunError("others may read this key.", where=str(path), hint=f"Run: chmod 600 {path}")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise RunError("this is no private Ed25519 key (PEM, no password).", where=str(path))
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Reads a public key.

    Raises:
        RunError: It is missing, or is no Ed25519 key.
    """
    ed25519 = _ed25519()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise RunError(f"the key cannot be read ({error.strerror}).", where=str(path)) from None
    except ValueError:
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise RunError(
            "this is no public Ed25519 key (PEM).",
            where=str(path),
            hint="Name the file that ends in .pub.",
        )
    return key


def sealed(kind: str, payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """A signed envelope. The same payload and key give the same bytes."""
    signature = key.sign(pae(kind, payload))
    return {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
        ],
    }


def opened(envelope: Mapping[str, Any], kind: str, key: Ed25519PublicKey, where: str) -> bytes:
    """The payload of an envelope that a key has signed.

    Raises:
        RunError: It is no envelope of this kind, is damaged, or is not signed by the key.
    """
    from cryptography.exceptions import InvalidSignature

    payload, signatures = parts(envelope, kind, where)
    for one in signatures:
        try:
            key.verify(one, pae(kind, payload))
        except InvalidSignature:
            continue
        return payload
    mine = key_id(key)
    named = [str(one.get("keyid", ""))[:16] for one in envelope["signatures"]]
    if mine[:16] in named:
        raise RunError(
            "the signature does not fit: the content was changed after it was signed.", where=where
        )
    raise RunError(
        f"it is not signed by this key ({mine[:16]}); it names {', '.join(named) or 'none'}.",
        where=where,
        hint="Ask whoever made it for the public key, by another way than this file came.",
    )


def parts(envelope: Mapping[str, Any], kind: str, where: str) -> tuple[bytes, list[bytes]]:
    """Payload and signatures of an envelope, nothing verified.

    Raises:
        RunError: It is no envelope of this kind.
    """
    try:
        found = envelope["payloadType"]
        payload = _decoded(envelope["payload"])
        signatures = [_decoded(one["sig"]) for one in envelope["signatures"]]
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise RunError("this is no whole DSSE envelope.", where=where) from None
    if found != kind:
        raise RunError(f"it holds '{found}', not '{kind}'.", where=where)
    if not signatures:
        raise RunError("nobody signed it.", where=where)
    return payload, signatures


def _decoded(text: str) -> bytes:
    """Both alphabets of base64 are allowed, but nothing else."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
