"""How to get what is optional, said one way everywhere."""

from __future__ import annotations


def how_to_install(extra: str, *packages: str) -> str:
    """A sentence that names packages of an index, and the extra of this package, for whoever has a checkout.

    Args:
        extra: one of `project.optional-dependencies`.
        packages: those of the extra that are missing, with a floor where an older one would not do.
    """
    wanted = " ".join(f"'{package}'" if set(package) & set("<>=[") else package for package in packages)
    return f"Install it with: pip install {wanted} (or, in a checkout of peft_dynamic, pip install '.[{extra}]')."
