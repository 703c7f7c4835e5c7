"""Files that appear whole or not at all: atomic writes, hashes, JSON with a checksum."""
