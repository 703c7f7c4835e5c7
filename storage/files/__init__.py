"""Atomic and durable writes, hashes, and JSON with a checksum."""
