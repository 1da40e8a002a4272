"""examples/deploy and examples/settings.toml: what they say holds, and what stands before a server leaves it whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from nodes import Cluster, nodes
from support import ROOT, Api, Sink, get_flow, running, until

from astera_lite import SETTING_FIELDS, SHIPPED, Settings, parse_duration
from astera_lite_tools import settings_table

DEPLOY = ROOT / "examples" / "deploy"
SETTINGS = (ROOT / "examples" / "settings.toml").read_text("utf-8")
FLOWS = {
    "nap": get_flow(
        "/nap/{seconds}", steps=[{"name": "n", "wait": "${params.seconds + 's'}"}], response={"body": "up"}
    ),
    "size": {
        "request": {"method": "POST", "resource": "/size", "body": {"type": "string"}},
        "response": {"body": "${len(request.body)}"},
    },
}


def need(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: apt-get install {name}")
    return found


# --- settings.toml ---


def test_the_settings_file_is_read_as_it_stands() -> None:
    assert Settings.load(str(ROOT / "examples" / "settings.toml")) == Settings()


def test_the_settings_file_tells_every_setting_and_its_default() -> None:
    told = re.findall(r"^# (.+)\n#(\w+) = (.*)$", SETTINGS, re.MULTILINE)
    none = " (default: none)"
    assert [(name, text.removesuffix(none), text.endswith(none)) for text, name, _ in told] == [
        (name, text, default == "none") for name, default, text in settings_table()
    ]
    given = tomllib.loads("\n".join(f"{name} = {value}" for _, name, value in told))
    for name, item in SETTING_FIELDS.items():
        if item.default is not None:
            assert getattr(Settings.load(**{name: given[name]}), name) == item.default, name


def test_each_line_of_the_settings_file_may_be_used(tmp_path: Path) -> None:
    lines = re.findall(r"^#(\w+ = .*)$", SETTINGS, re.MULTILINE)
    (tmp_path / "all.toml").write_text("\n".join(lines))
    Settings.load(str(tmp_path / "all.toml"))


# --- systemd, Docker ---


def test_the_unit_is_well_formed_and_closed() -> None:
    analyze, unit = need("systemd-analyze"), str(DEPLOY / "astera-lite.service")
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert "astera-lite.service" not in done.stderr.replace(unit, ""), done.stderr
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--no-pager", "--threshold=15", unit],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_unit_stops_no_sooner_than_the_server_gives_up() -> None:
    text = (DEPLOY / "astera-lite.service").read_text()
    stop = parse_duration(re.search(r"^TimeoutStopSec=(.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert stop >= 2 * Settings().shutdown_timeout + 20  # open requests; jobs; courier, housekeeper, database


def test_the_dockerfile_copies_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "python astera_lite.py zipapp" in text
    assert re.search(r"^USER [1-9]", text, re.MULTILINE)
    assert "install -y --no-install-recommends tini" in text  # what reaps the orphans of `run` steps
    assert re.search(r'^ENTRYPOINT \["tini", "--", "python", "/opt/astera_lite.pyz"\]$', text, re.MULTILINE)
    assert f"127.0.0.1:{Settings().port}/health" in text
    ignored = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    assert ignored == ["*", "!astera_lite*.py", *(f"!{name}" for name in SHIPPED)]


# --- behind a proxy ---


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def nginx(folder: Path, front: int, file: str, *replaced: tuple[str, str]) -> Iterator[None]:
    """nginx with a file that examples/deploy has, but for the names and ports in it."""
    text = (DEPLOY / file).read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    folder.chmod(0o755)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body;\n{temporary}{text}}}\n"
    )
    command = [need("nginx"), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            until(lambda: connects(front) or started.poll() is not None)
            assert started.poll() is None, started.stderr and started.stderr.read()
            yield
        finally:
            started.terminate()
            started.wait(10)


def connects(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_behind_nginx(tmp_path: Path, certificate: tuple[str, str], sink: Sink) -> None:
    need("nginx")
    front = free_port()
    url = f"https://localhost:{front}"
    with (
        running(tmp_path, FLOWS, public_url=url, token="t0k3n", callback_allow="127.0.0.1") as (_, server, _),
        nginx(
            tmp_path,
            front,
            "nginx.conf",
            ("listen 443", f"listen 127.0.0.1:{front}"),
            ("server 127.0.0.1:9261", f"server 127.0.0.1:{server.server_port}"),
            ("/etc/ssl/api.example.org.pem", certificate[0]),
            ("/etc/ssl/api.example.org.key", certificate[1]),
            ("server_name api.example.org", "server_name localhost"),
        ),
        requests.Session() as session,
    ):
        session.trust_env = False
        session.verify = certificate[0]
        assert session.get(f"{url}/api/publishing/nap/0", timeout=10).status_code == 401
        session.headers["Authorization"] = "Bearer t0k3n"
        answer = session.get(f"{url}/api/publishing/nap/0", timeout=10)
        assert (answer.json(), answer.headers["Server"].partition("/")[0]) == ("up", "nginx")

        api = Api(url)
        api.session = session
        job = api.submit("/nap/1", callbackUrl=f"{sink.url}/done")
        answer = session.get(f"{url}/api/jobs/{job}/status", headers={"Prefer": "wait=10"}, timeout=20)  # a long poll
        assert (answer.json()["status"], answer.json()["resultUrl"]) == ("Completed", f"{url}/api/jobs/{job}/result")
        headers, _ = sink.next()
        assert headers["location"] == f"{url}/api/jobs/{job}/result"
        assert session.get(headers["location"], timeout=10).json() == "up"

        for size, code in ((10_000_000, 200), (11_000_000, 413)):
            text = {"data": b'"%s"' % (b"x" * size), "headers": {"Content-Type": "application/json"}}
            answer = session.post(f"{url}/api/publishing/size", timeout=30, **text)  # type: ignore[arg-type]
            assert answer.status_code == code
            assert code != 200 or answer.json() == size
        long = session.get(f"{url}/api/publishing/nap/0?x={'y' * 15_000}", timeout=10)
        assert long.status_code == 200
        assert session.get(f"{url}/api/publishing/nap/%30", timeout=10).json() == "up"  # as it came, decoded once
        own, other = ({"Origin": origin} for origin in (url, "https://elsewhere.example"))
        assert session.get(f"{url}/api/publishing/nap/0", headers=own, timeout=10).status_code == 200
        assert session.get(f"{url}/api/publishing/nap/0", headers=other, timeout=10).status_code == 403


def test_two_servers_behind_nginx(tmp_path: Path, cluster: Cluster) -> None:
    """Each answers for both; one that dies is left out, and what it ran goes on."""
    need("nginx")
    (tmp_path / "flows").mkdir()
    for name, tree in FLOWS.items():
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(tree))
    front = free_port()
    with (
        nodes(tmp_path, cluster.create("behind_nginx"), ["a", "b"], "--lease", "2s") as (a, b),
        nginx(
            tmp_path,
            front,
            "nginx-nodes.conf",
            ("listen 80;", f"listen 127.0.0.1:{front};"),
            ("node1:9261", a.url.removeprefix("http://")),
            ("node2:9261", b.url.removeprefix("http://")),
        ),
    ):
        api = Api(f"http://127.0.0.1:{front}")
        naps = [api.submit("/nap/3") for _ in range(4)]
        b.kill()
        jobs = [*naps, *(api.submit("/nap/0") for _ in range(10))]  # none is refused
        for job in jobs:
            document = api.finished(job)
            assert document["resultUrl"] == f"{api.url}/api/jobs/{job}/result"
            assert api.result(job) == "up"
        api.session.close()


def test_two_servers_through_pgbouncer_in_session_mode(tmp_path: Path, cluster: Cluster) -> None:
    need("pgbouncer")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "nap.json").write_text(json.dumps(FLOWS["nap"]))
    cluster.create("behind_pgbouncer")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as folder:
        file = Path(folder) / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = host={cluster.folder} port={cluster.port} user=astera\n[pgbouncer]\nauth_type = any\n"
            f"pool_mode = session\ndefault_pool_size = 20\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            "unix_socket_dir =\n"
        )
        as_root = os.geteuid() == 0  # which pgbouncer refuses
        if as_root:
            shutil.chown(folder, "postgres")
        user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": ()} if as_root else {}
        command = [need("pgbouncer"), "-q", str(file)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **user) as started:
            try:
                until(lambda: connects(port) or started.poll() is not None)
                assert started.poll() is None, started.stderr and started.stderr.read()
                database = f"postgresql://astera@127.0.0.1:{port}/behind_pgbouncer"
                with nodes(tmp_path, database, ["a", "b"], "--lease", "2s") as (a, b):
                    jobs = [node.api.submit("/nap/2") for _ in range(3) for node in (a, b)]
                    b.kill()
                    for job in jobs:
                        a.api.finished(job)
            finally:
                started.terminate()
                started.wait(10)


def test_the_composition_fits_the_files(tmp_path: Path) -> None:
    """What a look at the file can tell, for Docker is not wanted here."""
    file = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = file["services"]
    upstream = re.findall(r"^ +server (\w+):(\d+)", (DEPLOY / "nginx-nodes.conf").read_text(), re.MULTILINE)
    assert sorted(upstream) == [(name, str(Settings().port)) for name in services if name.startswith("node")]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            assert source in file["volumes"] if source[0] != "." else (DEPLOY / source).exists()
            assert name != "nginx" or target == "/etc/nginx/conf.d/default.conf"
        assert set(service.get("depends_on", ())) <= set(services)
    node = services["node1"]
    assert (DEPLOY / node["build"]["context"] / node["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    given = {name.removeprefix("ASTERA_LITE_").lower(): text for name, text in node["environment"].items()}
    assert Settings.load(**given).database.endswith("@postgres/astera")
    assert services["postgres"]["environment"]["POSTGRES_USER"] == "astera"
    (front,) = services["nginx"]["ports"]
    assert given["public_url"] == f"http://localhost:{front.split(':')[1]}"
    grace, most = parse_duration(node["stop_grace_period"]), Settings().shutdown_timeout
    assert grace >= 2 * most + 20
    package = node["build"]["args"]["PACKAGES"]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["postgres"]
    assert [each.partition(">")[0] for each in wanted] == [package]


def test_the_caddyfile_is_well_formed() -> None:
    caddy = need("caddy")
    command = [caddy, "validate", "--adapter", "caddyfile", "--config", str(DEPLOY / "Caddyfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
