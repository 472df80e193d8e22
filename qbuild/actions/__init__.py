"""Action kinds. Each is one file with a frozen ``Params`` (only what changes bytes), ``KIND`` and ``SALT``."""
