"""A PostgreSQL server for the services of one directory, from the distribution's programs, on a Unix socket alone.

It holds the databases of Prefect and of MLflow. The socket lies in a directory that only its owner may enter, so no
password is needed. PostgreSQL refuses to run as root: for root, the user `postgres` that Debian's package makes runs it
and owns its files.
"""

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from puzzle_core.errors import PuzzleError
from tasks.runtime.private_files import check_owned

DATABASES = ("prefect", "mlflow")
USER = "puzzle"
DRIVER = "psycopg2"
PROGRAMS = Path("/usr/lib/postgresql")
ACCOUNT = "postgres"


class Postgres(NamedTuple):
    """Where a server's programs, data and socket lie, and how its commands begin."""

    programs: Path
    data: Path
    socket: Path
    prefix: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path) -> "Postgres":
        """The server of a directory's services.

        Raises:
            PuzzleError: PostgreSQL or its account is not installed.
        """
        programs = _programs()
        name = f"puzzle-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]}"
        if os.getuid():
            return cls(programs, directory / ".puzzle" / "postgres", _socket_directory(name), ())
        try:
            home = Path(pwd.getpwnam(ACCOUNT).pw_dir)
        except KeyError as error:
            raise PuzzleError(
                f"PostgreSQL does not run as root, and there is no user {ACCOUNT}: install Debian's package postgresql"
            ) from error
        return cls(
            programs,
            home / name,
            _socket_directory(name, ACCOUNT),
            ("setpriv", "--reuid", ACCOUNT, "--regid", ACCOUNT, "--init-groups", "--"),
        )

    @property
    def command(self) -> list[str]:
        """The server's command; it listens on the socket alone."""
        return self.program("postgres", "-D", self.data, "-k", self.socket, "-c", "listen_addresses=")

    def program(self, name: str, *arguments: object) -> list[str]:
        """The command of one of PostgreSQL's programs, as the owner of the files."""
        return [*self.prefix, str(self.programs / name), *map(str, arguments)]

    def url(self, database: str, driver: str) -> str:
        """The URL of a database, as SQLAlchemy reads it."""
        return f"postgresql+{driver}://{USER}@/{database}?host={self.socket}"

    def create(self) -> None:
        """Make the data directory, unless it is there.

        Raises:
            PuzzleError: it cannot be made.
        """
        if not self._call("test", "-e", self.data / "PG_VERSION"):
            made = self.program("initdb", "-D", self.data, "-U", USER, "--auth=trust", "--encoding=UTF8")
            done = subprocess.run(made, cwd="/", capture_output=True, text=True, check=False)
            if done.returncode:
                raise PuzzleError(f"no PostgreSQL database could be made in {self.data}: {done.stderr.strip()}")

    def answers(self) -> bool:
        """Whether the server takes connections."""
        done = subprocess.run(self.program("pg_isready", "-h", self.socket), cwd="/", capture_output=True, check=False)
        return done.returncode == 0

    def create_databases(self) -> None:
        """Make the databases that are not there yet.

        Raises:
            PuzzleError: the server refuses.
        """
        client = ("-h", self.socket, "-U", USER)
        asked = self.program("psql", *client, "-d", "postgres", "-Atc", "select datname from pg_database")
        present = subprocess.run(asked, cwd="/", capture_output=True, text=True, check=False).stdout.split()
        for database in DATABASES:
            if database not in present:
                made = self.program("createdb", *client, database)
                done = subprocess.run(made, cwd="/", capture_output=True, text=True, check=False)
                if done.returncode:
                    raise PuzzleError(f"PostgreSQL makes no database {database}: {done.stderr.strip()}")

    def _call(self, *command: object) -> bool:
        return subprocess.run([*self.prefix, *map(str, command)], cwd="/", check=False).returncode == 0


def check_driver() -> None:
    """Check that MLflow can use PostgreSQL.

    Raises:
        PuzzleError: its driver is not installed.
    """
    if importlib.util.find_spec(DRIVER) is None:
        raise PuzzleError(f"{DRIVER} is not installed, which MLflow needs: pip install 'puzzle-on-prefect[postgres]'")


def _programs() -> Path:
    """The directory of the newest PostgreSQL's programs.

    Raises:
        PuzzleError: there is none.
    """
    found = [path.parent for path in PROGRAMS.glob("*/bin/initdb")]
    if initdb := shutil.which("initdb"):
        found.append(Path(initdb).resolve().parent)
    if not found:
        raise PuzzleError("PostgreSQL is not installed here: `apt-get install postgresql`, or leave out --database")
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", str(path))])


def _socket_directory(name: str, owner: str | None = None) -> Path:
    """A directory with a short path, since a socket's path holds 107 bytes, that only its owner may enter."""
    directory = Path(tempfile.gettempdir()) / name
    directory.mkdir(mode=0o700, exist_ok=True)
    if owner:
        shutil.chown(directory, owner, owner)
    else:
        check_owned(directory)
    return directory
