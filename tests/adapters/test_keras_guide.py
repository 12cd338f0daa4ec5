"""The code of the guide runs and prints what stands below it."""

import pytest

keras = pytest.importorskip("keras")

from guides import check_code  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="once is enough")
def test_the_code_of_the_guide_runs(capsys):
    check_code("docs/adapters/keras.md", capsys)
