"""Other quantizers as backends: each in an environment of its own, for they cannot live beside each other.

A lock (``locks/NAME.txt``) names every package of an environment with its hash and size; what is made by a backend is
keyed by the lock's digest. A driver (``drivers/``) is a script that the environment's own Python runs: it imports the
library and nothing of qbuild, reads a request (JSON) and writes a directory as the library itself writes it.

Here nothing of torch is imported: ``environment`` makes environments, ``driver`` runs and checks them.
"""
