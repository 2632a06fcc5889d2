from __future__ import annotations

import pytest

from hf_pdecay.storage import bits


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test by the compiled functions, and by numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(bits, "library", lambda: None)
    else:
        monkeypatch.setattr(bits, "_compiling", True)
        if bits.library() is None:
            pytest.skip("needs a C++ compiler")
    return str(request.param)
