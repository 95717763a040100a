import pytest

from tests.kernels.runs import RUNS, compare


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_needs_less_memory_with_the_operation(name):
    ours, without = compare(name)
    assert ours < 0.95 * without
