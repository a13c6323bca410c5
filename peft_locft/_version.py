"""The version of this package, and of the packages that results depend on."""

from importlib.metadata import version

__version__ = "0.1.0"

PACKAGES = ("peft-locft", "peft", "transformers", "torch")


def package_versions(*others: str) -> dict[str, str]:
    """Return the installed version of each package that results depend on, and of others."""
    return {name: version(name) for name in (*PACKAGES, *others)}
