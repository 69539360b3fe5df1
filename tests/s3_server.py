"""An S3 server on loopback with one user: Ceph's gateway where its packages are installed, and moto's mock otherwise.

For tests, and for a person to try (`make s3`). On Debian: `apt-get install --no-install-recommends ceph-mon ceph-osd
ceph-common radosgw`. Ceph runs here with one monitor, one disk file and no authentication inside; never in production.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CEPH = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
BUCKET = "artifacts"
DISK_BYTES = 4 * 2**30
STARTS = 3
SETTINGS = {
    "public_addr": "127.0.0.1",
    "cluster_addr": "127.0.0.1",
    "ms_bind_msgr2": "false",
    "auth_cluster_required": "none",
    "auth_service_required": "none",
    "auth_client_required": "none",
    "mon_initial_members": "a",
    "mon_data_avail_crit": "1",
    "mon_max_pg_per_osd": "1000",
    "mon_allow_pool_size_one": "true",
    "osd_pool_default_size": "1",
    "osd_pool_default_min_size": "1",
    "osd_pool_default_pg_num": "4",
    "osd_pool_default_pgp_num": "4",
    "osd_crush_chooseleaf_type": "0",
    "osd_crush_update_on_start": "false",
    "osd_objectstore": "bluestore",
    "bluestore_block_size": str(DISK_BYTES),
}


class S3Server(NamedTuple):
    """Where it answers, and what to say there."""

    kind: str
    endpoint: str
    key: str = "puzzlekey"
    secret: str = "puzzlesecret"

    @property
    def environment(self) -> dict[str, str]:
        """What AWS clients read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A client of boto3's."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


def available() -> str | None:
    """The kind of server that can be started here."""
    if all(shutil.which(program) for program in CEPH):
        return "ceph"
    with contextlib.suppress(ImportError):
        import moto.server  # noqa: F401

        return "moto"
    return None


@contextlib.contextmanager
def s3_server(kind: str, home: Path) -> Iterator[S3Server]:
    """A server with the bucket `artifacts`; what Ceph keeps lies in `home`, and is gone the next time."""
    with (_ceph if kind == "ceph" else _moto)(home) as server:
        server.client().create_bucket(Bucket=BUCKET)
        yield server


@contextlib.contextmanager
def _moto(_home: Path) -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        yield S3Server("moto", "http://{}:{}".format(*running.get_host_and_port()))
    finally:
        running.stop()


@contextlib.contextmanager
def _ceph(home: Path) -> Iterator[S3Server]:
    for attempt in range(STARTS):
        place = home.resolve() / str(attempt)  # on a busy machine a port may be taken between choice and use
        try:
            server = _start(place)
            break
        except (RuntimeError, subprocess.TimeoutExpired):
            _stop(place)
            if attempt == STARTS - 1:
                raise
    try:
        yield server
    finally:
        _stop(place)


def _configure(home: Path, cluster: str, monitor: int, gateway: int) -> None:
    (home / "keyring").touch()
    places = {
        "fsid": cluster,
        "mon_host": f"v1:127.0.0.1:{monitor}",
        "keyring": home / "keyring",
        "mon_data": home / "mon.$id",
        "osd_data": home / "osd.$id",
        "crash_dir": home / "crash",
        "log_file": home / "log/$name.log",
        "pid_file": home / "run/$name.pid",
        "admin_socket": home / "run/$name.asok",
    }
    lines = ["[global]", *(f"{name} = {value}" for name, value in (places | SETTINGS).items())]
    lines += ["[client.rgw.a]", f"rgw_frontends = beast endpoint=127.0.0.1:{gateway}", "rgw_enable_apis = s3, admin"]
    (home / "ceph.conf").write_text("\n".join(lines) + "\n")
    _run(home, "monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{monitor}]", "--fsid", cluster, home / "monmap")


def _start(home: Path) -> S3Server:
    shutil.rmtree(home, ignore_errors=True)
    for name in ("run", "log", "crash", "mon.a", "osd.0"):
        (home / name).mkdir(parents=True)
    monitor, gateway = _free_port(), _free_port()
    server = S3Server("ceph", f"http://127.0.0.1:{gateway}")
    _configure(home, str(uuid.uuid4()), monitor, gateway)
    conf, disk = ("-c", home / "ceph.conf"), str(uuid.uuid4())
    _run(home, "ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", home / "monmap")
    _run(home, "ceph-mon", *conf, "-i", "a")
    _run(home, "ceph", *conf, "--connect-timeout", 30, "osd", "create", disk, 0)
    _run(home, "ceph-osd", *conf, "-i", 0, "--mkfs", "--osd-uuid", disk)
    _run(home, "ceph-osd", *conf, "-i", 0)
    _run(home, "ceph", *conf, "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=local")
    _run(home, "radosgw", *conf, "-n", "client.rgw.a")
    _wait_for(server.endpoint, home)
    user = ("--uid=puzzle", "--display-name=puzzle", f"--access-key={server.key}", f"--secret={server.secret}")
    _run(home, "radosgw-admin", *conf, "user", "create", *user)
    return server


def _stop(home: Path) -> None:
    for file in sorted((home / "run").glob("*.pid"), reverse=True):  # the disk before its monitor
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGTERM)
    shutil.rmtree(home / "osd.0", ignore_errors=True)


def _run(home: Path, *command: Any) -> None:
    done = subprocess.run(list(map(str, command)), cwd=home, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed; see {home / 'log'}:\n{done.stderr[-2000:]}")


def _wait_for(endpoint: str, home: Path, longest_seconds: float = 120) -> None:
    deadline = time.monotonic() + longest_seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(endpoint, timeout=2).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"no answer at {endpoint} for {longest_seconds:.0f} s; see {home / 'log'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Start one, say how to use it, and wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="directory for what it keeps; emptied at the start")
    parser.add_argument("--kind", choices=("ceph", "moto"), default=available())
    options = parser.parse_args()
    if not options.kind:
        sys.stderr.write("neither Ceph nor moto is installed\n")
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), s3_server(options.kind, options.home) as server:
        exports = "\n".join(f"export {name}={value}" for name, value in server.environment.items())
        sys.stdout.write(f"{exports}\n# S3 by {server.kind}; then: puzzle run SPEC.yaml --set ")
        sys.stdout.write(f"runtime.store=s3://{BUCKET}/puzzle   (interrupt here to stop; its data goes)\n")
        sys.stdout.flush()
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
