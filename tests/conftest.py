"""What every test shares: the published outputs, and hypothesis settings that a busy machine cannot fail."""

import pytest
from hypothesis import settings

from demo.small_flux import GOLDEN

# an example that is slow because the machine is busy is no failure; a failing one prints how to repeat it
settings.register_profile("pack", deadline=None, print_blob=True)
settings.load_profile("pack")


@pytest.fixture(scope="session")
def golden():
    """The folder of what the published code computed."""
    return GOLDEN
