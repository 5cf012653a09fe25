"""components/tls on this machine: its certificates, a Ray head that asks for them, and callers with and without one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.watch.servers import ROOT, ray_head

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
TASK = "import ray; ray.init(logging_level='ERROR'); print(ray.get(ray.remote(lambda: 'computed').remote()))"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """authority/ and other/ with ca.crt and ca.key; ours/ with a certificate of the first, theirs/ of the second."""
    made = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    for authority, owner in (("authority", "ours"), ("other", "theirs")):
        (made / authority).mkdir()
        (made / owner).mkdir()
        words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt"
        subprocess.run(["openssl", *words.split()], cwd=made / authority, check=True, capture_output=True)
        script = ROOT / "cluster" / "components" / "tls" / "certificate.sh"
        variables = {"NAMESPACE": "ns", "PATH": "/usr/bin:/bin", "POD_IP": get_node_ip_address()}
        subprocess.run(["sh", script, made / authority, made / owner], check=True, env=variables)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refused(port: int, trusted: Path, certificate: Path | None) -> bool:
    """Whether the server at `port`, whose authority is `trusted`, ends the connection of a caller so equipped."""
    context = ssl.create_default_context(cafile=str(trusted))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
    try:
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
            secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")  # as HTTP/2 begins
            return not secured.recv(16)
    except (ssl.SSLError, ConnectionError):
        return True


def answers(port: int, trusted: Path, certificate: Path) -> bool:
    """Does the server, when it has started?"""
    with contextlib.suppress(TimeoutError):
        return not refused(port, trusted, certificate)
    return False


def test_a_certificate_names_the_pod_and_its_services_and_hides_its_key(folder: Path) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-in", folder / "ours" / "tls.crt", "-noout", "-text"], capture_output=True, text=True
    ).stdout
    assert "DNS:*.ns.svc.cluster.local" in shown and "IP Address:127.0.0.1" in shown
    assert (folder / "ours" / "tls.key").stat().st_mode & 0o077 == 0
    assert sorted(file.name for file in (folder / "ours").iterdir()) == ["ca.crt", "tls.crt", "tls.key"]


def test_only_who_has_a_certificate_gets_in(folder: Path) -> None:
    ours = folder / "ours"
    variables = {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(ours / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(ours / "tls.key"),
        "RAY_TLS_CA_CERT": str(ours / "ca.crt"),
        "RAY_raylet_start_wait_time_s": "200",  # TLS makes a start slower
    }
    with ray_head(folder, 1, variables) as environment:
        port = int(environment["RAY_ADDRESS"].rsplit(":", 1)[1])
        trusted = ours / "ca.crt"
        wait_for(lambda: answers(port, trusted, ours), PATIENCE_SECONDS, "the head", every=0.5)
        assert refused(port, trusted, None)
        assert refused(port, trusted, folder / "theirs")
        assert refused(port, folder / "theirs" / "ca.crt", ours)  # and who expects another authority leaves by itself
        done = subprocess.run(
            [sys.executable, "-c", TASK], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.stdout.strip() == "computed", done.stderr
