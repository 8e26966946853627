"""Attacks: a malicious coordinator, and malicious members, as real peers of the real state machines."""
