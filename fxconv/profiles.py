"""Device profiles: the shipped ones, and the one measured on this machine."""

from __future__ import annotations

from fxconv.cost import CPU, Profile
from fxconv.errors import OptionError

PROFILES: dict[str, Profile] = {"default": CPU}


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        OptionError: there is none of that name (the message lists those there are).
    """
    if name not in PROFILES:
        raise OptionError(f"there is no device profile {name!r}; known: {', '.join(PROFILES)}")
    return PROFILES[name]
