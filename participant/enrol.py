"""What a site makes for itself before it joins: identity key, TLS key and certificate request, and its pins.

Private keys are made here and never leave the site's directory.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from privacy.files import make_private_directory, write_durably
from privacy.identity import create_identity
from privacy.roster import parse_roster
from privacy.secagg.keys import identity_public

TLS_KEY, TLS_CERTIFICATE, AUTHORITY, ROSTER, ROSTER_PIN = "tls.key", "tls.crt", "ca.crt", "roster.toml", "roster.pin"


def create_site(directory: Path) -> str:
    """Make a site's directory with a new identity; its public key in hex, for the roster."""
    return identity_public(create_identity(make_private_directory(directory))).hex()


def create_request(directory: Path, member: str) -> bytes:
    """Make the site's TLS key (ECDSA P-256, 0600) and return a PEM certificate request for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_durably(directory / TLS_KEY, key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(encoding)


def install_certificates(directory: Path, certificate: bytes, authority: bytes) -> None:
    """Keep the issued client certificate and the authority that the coordinator's certificate must come from."""
    write_durably(directory / TLS_CERTIFICATE, certificate)
    write_durably(directory / AUTHORITY, authority)


def pin_roster(directory: Path, raw: bytes) -> bytes:
    """Pin a roster after its people compared it: keeps the file and its hash H_R; returns the hash."""
    found = parse_roster(raw).hash
    write_durably(directory / ROSTER, raw)
    write_durably(directory / ROSTER_PIN, found.hex().encode() + b"\n")
    return found
