"""Each test keeps what it caches to itself."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data():
    """The folder of real datasets, where there is one."""
    import os
    from pathlib import Path

    folder = os.environ.get("ASSAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ASSAY_DATA is not set")
    return Path(folder)
