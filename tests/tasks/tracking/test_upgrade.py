"""The database of another MLflow: an older one is upgraded, and a newer one is refused by name and left as it is."""

import sqlite3

import pytest
from alembic import command
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_alembic_config

from tasks.tracking.mlflow_client import mlflow_client


@pytest.fixture
def database(tmp_path):
    file = tmp_path / "mlflow.db"
    MlflowClient(f"sqlite:///{file}", f"sqlite:///{file}").create_experiment("before")
    return file


def revision(file):
    with sqlite3.connect(file) as opened:
        return opened.execute("SELECT version_num FROM alembic_version").fetchone()[0]


def test_an_older_database_is_upgraded_and_a_copy_stays(database):
    newest = revision(database)
    command.downgrade(_get_alembic_config(f"sqlite:///{database}"), "-1")
    older = revision(database)
    assert older != newest
    assert [
        found.name
        for found in mlflow_client(f"sqlite:///{database}").search_experiments(filter_string="name = 'before'")
    ]
    assert revision(database) == newest
    assert revision(database.with_name(f"mlflow.db.{older}")) == older


def test_a_newer_database_is_refused_and_left_as_it_is(database):
    with sqlite3.connect(database) as opened:
        opened.execute("UPDATE alembic_version SET version_num = 'fffffffffff0'")
    with pytest.raises(
        MlflowException, match=r"mlflow.db cannot be upgraded; is it of a newer MLflow than .*fffffffffff0"
    ):
        mlflow_client(f"sqlite:///{database}")
    assert revision(database) == "fffffffffff0"
