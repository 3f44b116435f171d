"""The version of this package, which pyproject.toml reads and exports carry."""

VERSION = "0.1.0"
