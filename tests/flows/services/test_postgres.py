"""The PostgreSQL server of a directory's services: made once, reached by its socket alone, and its errors."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from flows.services import postgres as postgres_module
from flows.services.postgres import DATABASES, PROGRAMS, Postgres
from puzzle_core.errors import PuzzleError
from tests.sockets import listening

LONG_SECONDS = 120


@pytest.fixture
def postgres(tmp_path):
    if not list(PROGRAMS.glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    found = Postgres.of(tmp_path)
    yield found
    for place in (found.data, found.socket):  # below the account's home, for root
        subprocess.run(["rm", "-rf", str(place)], check=True)


def asked(postgres, database, query):
    command = postgres.program("psql", "-h", postgres.socket, "-U", "puzzle", "-d", database, "-Atc", query)
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.long
def test_a_server_is_made_once_keeps_its_data_and_listens_on_its_socket_alone(postgres):
    for start in range(2):
        postgres.create()
        process = subprocess.Popen(postgres.command, cwd="/", stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + LONG_SECONDS
            while not postgres.answers():
                assert process.poll() is None
                assert time.monotonic() < deadline
            postgres.create_databases()
            for database in DATABASES:
                if not start:
                    asked(postgres, database, "create table kept (n int); insert into kept values (7)")
                assert asked(postgres, database, "select n from kept") == "7"
            assert not listening([psutil.Process(process.pid)])
            assert Path(postgres.socket).stat().st_mode & 0o077 == 0
        finally:
            process.terminate()
            assert process.wait() == 0


def test_without_postgresql_its_account_or_the_driver_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres_module, "PROGRAMS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PuzzleError, match="apt-get install postgresql"):
        Postgres.of(tmp_path)
    (tmp_path / "15" / "bin").mkdir(parents=True)
    (tmp_path / "15" / "bin" / "initdb").touch()
    monkeypatch.setattr(postgres_module.os, "getuid", lambda: 0)
    monkeypatch.setattr(postgres_module, "ACCOUNT", "nobody-of-this-name")
    with pytest.raises(PuzzleError, match="there is no user nobody-of-this-name"):
        Postgres.of(tmp_path)
    monkeypatch.setattr(postgres_module, "DRIVER", "no_such_driver")
    with pytest.raises(PuzzleError, match=r"pip install 'puzzle-on-prefect\[postgres\]'"):
        postgres_module.check_driver()
