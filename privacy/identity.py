"""The long-term Ed25519 identity of a member or of the coordinator, as a private file."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from privacy.errors import UserError
from privacy.files import read_private, write_durably

IDENTITY_FILE = "identity.key"
LOST = (
    "restore the key from your backup; if it is lost, ask the other members to approve a roster with your new key: "
    "nobody can sign in your old name any more"
)


def create_identity(directory: Path) -> Ed25519PrivateKey:
    """Make a new identity key in ``directory``, mode 0600; never replaces one.

    Raises:
        UserError: there is one already.
    """
    path = directory / IDENTITY_FILE
    if path.exists():
        raise UserError(f"{path}: expected no identity key yet, found one", hint="an identity is never replaced")
    key = Ed25519PrivateKey.generate()
    write_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_identity(directory: Path) -> Ed25519PrivateKey:
    """Read the identity key.

    Raises:
        UserError: missing, open to others, or not an Ed25519 key.
    """
    path = directory / IDENTITY_FILE
    content = read_private(path, "this site's identity key", LOST)
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: expected an Ed25519 key in PEM, found something else", hint=LOST) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: expected an Ed25519 key, found another kind", hint=LOST)
    return key
