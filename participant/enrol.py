"""What a site makes for itself before it joins: identity key, TLS key and certificate request, and its pins.

Private keys are made here and never leave the site's directory. Whatever is cut short goes on with the same keys.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from privacy.errors import ProtocolError
from privacy.files import (
    as_its_owner,
    disk_errors,
    exclusively,
    make_private_directory,
    read_file,
    read_private,
    replace_durably,
    write_durably,
)
from privacy.identity import IDENTITY_FILE, create_identity, load_identity
from privacy.roster import parse_roster
from privacy.secagg.keys import identity_public

TLS_KEY, TLS_CERTIFICATE, AUTHORITY, ROSTER, ROSTER_PIN = "tls.key", "tls.crt", "ca.crt", "roster.toml", "roster.pin"
#: A certificate request that was sent, or is about to be, for the key in ``TLS_KEY``.
TLS_REQUEST = "tls.csr"
#: What takes the place of key and certificate, the certificate last; with it both go in.
NEXT_KEY, NEXT_CERTIFICATE = "tls.key.next", "tls.crt.next"


def create_site(directory: Path) -> str:
    """Make a site's directory with a new identity; its public key in hex, for the roster."""
    return identity_public(create_identity(make_private_directory(directory))).hex()


def own_identity(directory: Path) -> Ed25519PrivateKey:
    """The identity of the site in this directory, made now if there is none.

    Raises:
        UserError: root asks, and the directory is another account's.
    """
    as_its_owner(directory)
    make_private_directory(directory)
    return load_identity(directory) if (directory / IDENTITY_FILE).exists() else create_identity(directory)


def create_request(directory: Path, member: str, key_file: str = TLS_KEY) -> bytes:
    """Make the site's TLS key (ECDSA P-256, 0600) and return a PEM certificate request for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_durably(directory / key_file, key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(encoding)


def pending_request(directory: Path, member: str) -> bytes:
    """The certificate request of this site: the same bytes again, until its certificate is here."""
    path = directory / TLS_REQUEST
    if not path.exists():
        write_durably(path, create_request(directory, member))
    return path.read_bytes()


def check_certificate(certificate: bytes, request: bytes, authority: bytes, member: str) -> None:
    """Is this the certificate that was asked for?

    Raises:
        ProtocolError: not a certificate, of another key, name or authority.
    """
    try:
        found, asked = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_csr(request)
        found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ProtocolError("expected a certificate of the federation's authority, found something else") from error
    names = [name.value for name in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [member] or found.public_key() != asked.public_key():
        raise ProtocolError(f"expected a certificate for '{member}' and the key of this site, found another")


def install_renewed(directory: Path, certificate: bytes) -> None:
    """Put a new certificate and its key, ``NEXT_KEY``, in the place of the old ones; both or neither."""
    write_durably(directory / NEXT_CERTIFICATE, certificate)
    finish_renewal(directory)


def finish_renewal(directory: Path) -> None:
    """Go on with a change of certificates that was cut short."""
    if not (directory / NEXT_CERTIFICATE).exists():
        return
    with exclusively(directory / "tls.lock"), disk_errors(directory / TLS_CERTIFICATE):
        for staged, name in ((NEXT_KEY, TLS_KEY), (NEXT_CERTIFICATE, TLS_CERTIFICATE)):
            if (directory / staged).exists():
                replace_durably(directory / staged, directory / name)


def tls_files(directory: Path) -> tuple[bytes, bytes, bytes]:
    """Authority, key and certificate of a site that has joined, PEM.

    Raises:
        UserError: it has not joined, or a file is missing or open to others.
    """
    finish_renewal(directory)
    hint = "join the federation first: veilsum-participant join"
    return (
        read_file(directory / AUTHORITY, "the federation's authority certificate", hint),
        read_private(directory / TLS_KEY, "this site's TLS key", hint),
        read_file(directory / TLS_CERTIFICATE, "this site's TLS certificate", hint),
    )


def install_certificates(directory: Path, certificate: bytes, authority: bytes) -> None:
    """Keep the authority that the coordinator's certificate must come from, and the issued client certificate."""
    write_durably(directory / AUTHORITY, authority)
    write_durably(directory / TLS_CERTIFICATE, certificate)
    (directory / TLS_REQUEST).unlink(missing_ok=True)


def pinned_before(directory: Path, roster: bytes) -> Path:
    """Where a roster that was once pinned is kept, by its hash: counts of rounds under it are about its members."""
    return directory / "rosters" / f"{roster.hex()}.toml"


def pin_roster(directory: Path, raw: bytes) -> bytes:
    """Pin a roster after its people compared it: keeps the file and its hash H_R; returns the hash."""
    found = parse_roster(raw).hash
    kept = pinned_before(directory, found)
    make_private_directory(kept.parent)
    write_durably(kept, raw)
    write_durably(directory / ROSTER, raw)
    write_durably(directory / ROSTER_PIN, found.hex().encode() + b"\n")
    return found
