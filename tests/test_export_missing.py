"""Folders that hold nothing to export, or nothing exported."""

import pytest

from rise_jax import Pipeline
from rise_jax.export import export


def test_a_folder_without_a_run_cannot_be_exported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config.json"):
        export(None, tmp_path)


def test_a_folder_without_an_export_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no export: there is no adapter/adapter.json in it"):
        Pipeline.from_export(tmp_path)
