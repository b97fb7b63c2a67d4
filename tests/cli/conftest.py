"""A model and data of a user."""

import json

import pytest
from cli_cases import MODEL


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "helper.py").write_text("SCALE = 10.0\n")
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"x": [0.0, 1.0, 2.0], "y": [0.1, 2.2, 3.9]}))
    return path
