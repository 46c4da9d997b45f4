"""Teachers and students of the fine-tuning tests."""

import pytest


@pytest.fixture
def teacher(make_transformer):
    return make_transformer(3)


@pytest.fixture
def student(make_transformer):
    return make_transformer(2, seed=1)
