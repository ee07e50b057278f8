"""Doors to other projects' tools; each needs the extra of its name."""
