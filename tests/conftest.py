"""What every test runs under: one thread, fixed seeds, hypothesis profiles."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
# The default draws the same examples each time, so that a change is judged by what it changed; the others look further.
settings.register_profile("ci", _common, max_examples=40, derandomize=True, database=None)
settings.register_profile("dev", _common, max_examples=40, derandomize=False)
settings.register_profile("thorough", _common, max_examples=1000, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Small tensors gain nothing from threads, and bit-equality must not hang on how work was split.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """The same numbers in whatever order tests run; gradients as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
