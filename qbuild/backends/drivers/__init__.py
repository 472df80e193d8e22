"""Scripts that a backend's own Python runs; nothing here imports qbuild, and qbuild imports nothing here."""
