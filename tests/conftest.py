import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of small real CT volumes that the environment variable REAL_CT names."""
    folder = os.environ.get("REAL_CT", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_CT does not name a folder of real CT volumes")
    return Path(folder)
