"""How many examples a property test has whose examples are slow: few in `make test`, all in `make test-matrix`."""

from hypothesis import HealthCheck, settings


def at_most(number: int) -> settings:
    """So many, unless the profile of fresh examples is the one in use."""
    fresh = settings.get_current_profile_name() == "fresh"
    most = settings().max_examples if fresh else number
    return settings(max_examples=most, suppress_health_check=list(HealthCheck))
