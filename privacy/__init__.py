"""What coordinator, participants and auditors must agree on, bit for bit."""

__version__ = "0.1.0"

#: Version of the round protocol and of the wire; both ends must have the same.
PROTOCOL_VERSION = 1
