"""Generated protobuf stubs, and the only code that touches them (convert.py)."""
