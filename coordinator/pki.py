"""A small certificate authority for TLS (ECDSA P-256; gRPC's TLS library refuses Ed25519 certificates).

TLS certificates say who may connect; what a member signs in a round is under its identity key
(``privacy/identity.py``), so a stolen or rotated certificate changes nothing about a round. Private keys never leave
the machine that made them: a site sends a request (CSR) and gets a certificate back.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.errors import UserError
from privacy.files import read_file, read_private, write_durably

AUTHORITY_CERTIFICATE, AUTHORITY_KEY = "ca.crt", "ca.key"
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
#: Clocks of sites may be behind by this much.
LEEWAY = datetime.timedelta(minutes=10)


MAKE_FIRST = "make the coordinator first: veilsum-coordinator init"


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LEEWAY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def authority_certificate(directory: Path) -> bytes:
    """The certificate of the federation's authority, DER; where its file has several, the first."""
    content = read_file(directory / AUTHORITY_CERTIFICATE, "the authority's certificate", MAKE_FIRST)
    try:
        return x509.load_pem_x509_certificate(content).public_bytes(serialization.Encoding.DER)
    except ValueError as error:
        raise UserError(f"{directory / AUTHORITY_CERTIFICATE}: expected a certificate in PEM, found another") from error


def create_authority(directory: Path, federation: str) -> None:
    """Make the CA key (0600) and certificate of a federation; never replaces one."""
    if (directory / AUTHORITY_KEY).exists():
        raise UserError(f"{directory / AUTHORITY_KEY}: expected no authority yet, found one")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{federation} authority")
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_durably(directory / AUTHORITY_KEY, _pem(key))
    write_durably(directory / AUTHORITY_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    hint = "run this where the authority of the federation was made"
    key = serialization.load_pem_private_key(read_private(directory / AUTHORITY_KEY, "the authority's key", hint), None)
    certificate = read_file(directory / AUTHORITY_CERTIFICATE, "the authority's certificate", hint)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(certificate)


def _issue(
    directory: Path,
    public: ec.EllipticCurvePublicKey,
    common: str,
    usage: x509.ObjectIdentifier,
    names: Sequence[x509.GeneralName],
) -> bytes:
    key, authority = _load_authority(directory)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(common), authority.subject, public, CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def issue_server(directory: Path, hosts: Sequence[str]) -> None:
    """Make the coordinator's own TLS key and certificate for these host names and addresses."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = _issue(directory, key.public_key(), hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, [_host(h) for h in hosts])
    write_durably(directory / "tls.key", _pem(key))
    write_durably(directory / "tls.crt", pem)


def _server(directory: Path) -> x509.Certificate:
    content = read_file(directory / "tls.crt", "the coordinator's TLS certificate", MAKE_FIRST)
    return x509.load_pem_x509_certificate(content)


def is_server_due(directory: Path) -> bool:
    """Is less than a third of the time of the coordinator's certificate left, and can it be issued anew here?"""
    if not (directory / AUTHORITY_KEY).exists() or not (directory / "tls.crt").exists():
        return False
    try:
        found = _server(directory)
        found.verify_directly_issued_by(_load_authority(directory)[1])
    except (ValueError, TypeError, InvalidSignature):
        return False  # from another authority, whose business it is
    until, since = found.not_valid_after_utc, found.not_valid_before_utc
    return until - datetime.datetime.now(datetime.UTC) < (until - since) / 3


def renew_server(directory: Path) -> None:
    """Another certificate for the coordinator's TLS key, for the same hosts: one file changes, so nothing can part."""
    before = _server(directory)
    public = before.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    common = before.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    names = list(before.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    pem = _issue(directory, public, str(common), ExtendedKeyUsageOID.SERVER_AUTH, names)
    write_durably(directory / "tls.crt", pem)


def sign_request(directory: Path, request: bytes, member: str) -> bytes:
    """Issue the client certificate of a member for its PEM request; the name is the roster's, not the request's.

    Raises:
        UserError: not a valid request with an ECDSA P-256 key.
    """
    try:
        csr = x509.load_pem_x509_csr(request)
        public, signed = csr.public_key(), csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise UserError("expected a certificate request in PEM, found something else") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise UserError("expected a certificate request with an ECDSA key on P-256, found another kind of key")
    if not signed:
        raise UserError("expected a certificate request with a valid signature of its own key, found another")
    names = [x509.UniformResourceIdentifier(f"veilsum:member:{member}")]
    return _issue(directory, public, member, ExtendedKeyUsageOID.CLIENT_AUTH, names)
