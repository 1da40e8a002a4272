"""The settings: four spellings of one name, and every fault at once."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import PROGRAM, process

from astera_lite import (
    AsteraLite,
    ConfigError,
    Settings,
    parse_duration,
    parse_size,
    show_duration,
    show_size,
)
from astera_lite_tools import settings_table


def faults(**sources: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Settings.load(**sources)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("24h", 86400), ("7d", 604800), ("1.5h", 5400), ("12", 12), ("0", 0),
     (30, 30), (0.5, 0.5), ("0.5s", 0.5)],
)  # fmt: skip
def test_durations(text: Any, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "s", "-5s", "+5s", "5 s", " 5s", "5S", "5min", "1_0s", "٣s", "²", "1e3", "nan", "inf", ".5s", "5.s", "9" * 50,
     "1h30m", "5s\n", -1, True, None, [], {}, float("nan"), float("inf"), 1e30],
)  # fmt: skip
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ValueError, match="write 250ms, 30s, 5m, 24h"):
        parse_duration(text)


@pytest.mark.parametrize(
    "seconds", [0, 0.001, 0.25, 1, 1.5, 59, 60, 90.5, 3600, 5400, 86400, 1234.5, 123456.789, 31536000, 9e9]
)
def test_a_shown_duration_reads_back(seconds: float) -> None:
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("64KiB", 65536), ("10MiB", 10 << 20), ("2GiB", 2 << 30), (5, 5)])
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(show_size(size)) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1KB", "64kib", "1.5MiB", "1 MiB", "1_0", "٣", -1, 1.0, True, None, "9" * 50]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="write 64KiB, 10MiB"):
        parse_size(text)


def test_the_later_spelling_wins(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text('workers = 1\nport = 1\nretention = "1h"\nmax_wait = "1s"\n')
    environ = {"ASTERA_LITE_PORT": "2", "ASTERA_LITE_RETENTION": "2h", "ASTERA_LITE_MAX_WAIT": "2s", "PORT": "9"}
    flags = {"retention": "3h", "max_wait": "3s"}
    found = Settings.load(str(config), environ, flags, max_wait="4s")
    assert (found.workers, found.port, found.retention, found.max_wait) == (1, 2, 3 * 3600, 4)


def test_a_process_takes_file_environment_and_flag(tmp_path: Path) -> None:
    (tmp_path / "astera_lite.toml").write_text('database = "from_file.db"\nflows = "nowhere"\nlog = "json"\n')
    (tmp_path / "mine").mkdir()
    env = {"ASTERA_LITE_FLOWS": "elsewhere", "ASTERA_LITE_LOG": "off"}
    with process(tmp_path, "--flows", "mine", env=env) as (_, url, _lines):
        assert url.startswith("http://127.0.0.1:")
        assert (tmp_path / "from_file.db").exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("insecure_open", "yes", True),
        ("insecure_open", "OFF", False),
        ("insecure_open", True, True),
        ("callback_retries", "5s,5m", (5.0, 300.0)),
        ("callback_retries", ["1s", 2], (1.0, 2.0)),
        ("callback_retries", "", ()),
        ("database", Path("a/b.db"), str(Path("a/b.db"))),
        ("port", "0", 0),
        ("public_url", None, None),
        ("log", "json", "json"),
        ("max_database", "1MiB", 1 << 20),
    ],
)
def test_values(name: str, text: Any, value: Any) -> None:
    assert getattr(Settings.load(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "65536", "must be at most 65535"),
        ("port", "-1", "is not a whole number"),
        ("port", -1, "must be"),
        ("port", "1_0", "is not a whole number"),
        ("port", "٣", "is not a whole number"),
        ("port", "", "is not a whole number"),
        ("port", True, "is not a whole number"),
        ("port", 1.0, "is not a whole number"),
        ("workers", 0, "must be at least 1"),
        ("workers", 2000, "must be at most 1024"),
        ("retention", "0s", "must be at least 1s"),
        ("retention", "1 day", "is not a duration"),
        ("retention", "999999999999d", ""),
        ("max_url", 5, "must be at least 256"),
        ("max_database", "5KiB", "must be at least 1MiB"),
        ("max_body", "1MB", "is not a size"),
        ("insecure_open", "maybe", "is neither true nor false"),
        ("log", "xml", "is not one of text, json, off"),
        ("durability", "FULL", "is not one of full, normal"),
        ("host", 5, "is not text"),
        ("host", None, "is not text"),
        *((name, "a\0b", "is not text without NUL") for name in ("flows", "database", "data", "tls_cert", "secrets")),
        *(("host", text, "is not a host name or an address") for text in ("", "a b", "[::1]", "\udcff", "x" * 254)),
        ("callback_retries", "5s,,x", "is not a duration"),
        ("callback_retries", 5, "is not a list of durations"),
    ],
)
def test_a_fault_says_what_is_right(name: str, value: Any, message: str) -> None:
    (fault,) = faults(flags={name: value})
    assert fault.startswith(f"--{name.replace('_', '-')}: ")
    assert message in fault


def test_every_fault_of_every_source_is_named_where_it_stands(tmp_path: Path) -> None:
    config = str(tmp_path / "a.toml")
    Path(config).write_text('workers = "many"\nretentoin = "1h"\n')
    found = faults(config=config, environ={"ASTERA_LITE_PORT": "x"}, flags={"max_wait": "y"}, max_body="z", prot=1)
    assert [fault.split(": ")[0] for fault in found] == [
        config, config, "ASTERA_LITE_PORT", "--max-wait", "max_body", "prot",
    ]  # fmt: skip
    assert "workers: " in found[0]
    assert 'retentoin: is not a setting; did you mean "retention"?' in found[1]
    assert 'did you mean "port"?' in found[5]


def test_an_environment_variable_that_is_nearly_a_setting_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    assert faults(environ={"ASTERA_LITE_PROT": "1"}) == ['ASTERA_LITE_PROT: is not a setting; did you mean "port"?']
    platforms = {"PORT": "tcp://10.0.0.1:80", "PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_ADDR": "10.0.0.1"}
    platforms |= {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80"}
    with caplog.at_level(logging.WARNING):  # as Kubernetes sets them for a service of that name
        assert Settings.load(environ={f"ASTERA_LITE_{name}": text for name, text in platforms.items()}) == Settings()
    for name in platforms:
        assert f"ASTERA_LITE_{name} is ignored: it is not a setting, or a container platform" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        (b"port = \n", "line 1"),
        (b"port = 1\nport = 2\n", "is not TOML"),
        (b"\xff", "cannot"),
        (b"port = " + b"9" * 5000, "is not TOML"),
        (b"port = " + b"[" * 5000, "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: bytes | None, message: str) -> None:
    config = tmp_path / "a.toml"
    if text is not None:
        config.write_bytes(text)
    (fault,) = faults(config=str(config), flags=None)
    assert fault.startswith(str(config))
    assert message in fault


def test_an_empty_token_protects_nothing_and_is_refused() -> None:
    (fault,) = faults(environ={"ASTERA_LITE_TOKEN": ""})
    assert fault.startswith("ASTERA_LITE_TOKEN: ")


def test_keywords_of_an_embedding_program_are_settings() -> None:
    app = AsteraLite(retention="2h", workers=3)
    assert (app.settings.retention, app.settings.workers, app.settings.flows) == (7200, 3, "")
    assert AsteraLite(app.settings, workers=4).settings.retention == 7200
    with pytest.raises(ConfigError, match='did you mean "workers"'):
        AsteraLite(worker=3)


def test_the_table_of_help_has_every_setting_and_reads_back() -> None:
    rows = {name: default for name, default, _ in settings_table()}
    assert list(rows) == [*Settings._fields]
    given = {name: text for name, text in rows.items() if text != "none"}
    assert Settings.load(**given) == Settings()


def _command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=20)


def test_secrets_are_not_flags_and_not_in_the_messages(tmp_path: Path) -> None:
    answer = _command("serve", "--help", folder=tmp_path)
    assert answer.returncode == 0
    assert "--max-wait" in answer.stdout
    assert "ASTERA_LITE_TOKEN" in answer.stdout
    assert "--token" not in answer.stdout
    assert "--callback-secret" not in answer.stdout
    assert _command("serve", "--token", "s3cret", folder=tmp_path).returncode == 2


def test_the_command_prints_every_fault_and_ends_with_1(tmp_path: Path) -> None:
    answer = _command("serve", "--port", "x", "--log", "xml", "--workers", "0", folder=tmp_path)
    assert answer.returncode == 1
    lines = answer.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["--log", "--port", "--workers"]
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


@pytest.mark.parametrize("allow", ["10.0.0.0/8,example.com", "auto", "none", "localhost", "[::1]"])
def test_callback_allow(allow: str) -> None:
    assert AsteraLite(callback_allow=allow).settings.callback_allow == allow


def test_a_word_that_stands_alone_in_callback_allow_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match='"auto" must be the only word: write localhost, 127'):
        AsteraLite(callback_allow="auto,10.0.0.0/8")
    AsteraLite(callback_allow="localhost, 127.0.0.0/8, ::1/128, 10.0.0.0/8")


@pytest.mark.parametrize("allow", ["auto,10.0.0.0/8", "10.0.0.0/99", "http://x", "a b", "ex_ample..com"])
def test_a_faulty_callback_allow_is_refused(allow: str) -> None:
    with pytest.raises(ConfigError, match="callback_allow"):
        AsteraLite(callback_allow=allow)


def test_secrets_file_must_be_private(tmp_path: Path) -> None:
    secrets = tmp_path / "s.toml"
    secrets.write_text('key = "v"\n')
    secrets.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        AsteraLite(secrets=str(secrets))
    secrets.chmod(0o600)
    assert AsteraLite(secrets=str(secrets)).outside.secrets == {"key": "v"}


def test_secrets_and_env_by_name() -> None:
    environ = {"A": "1", "B": "2", "ASTERA_FLOW_X": "x", "ASTERA_LITE_TOKEN": "t"}
    app = AsteraLite(secrets="A, B", environ=environ)
    assert app.outside.secrets == {"A": "1", "B": "2"}
    assert app.outside.env == {"ASTERA_FLOW_X": "x"}
    with pytest.raises(ConfigError, match="no environment variable C"):
        AsteraLite(secrets="A,C", environ=environ)
    assert AsteraLite(env_allow="A*,B", environ={**environ, "AB": "3"}).outside.env.keys() == {
        "A",
        "AB",
        "ASTERA_FLOW_X",
        "ASTERA_LITE_TOKEN",
        "B",
    }
    assert AsteraLite(env_allow="", environ=environ).outside.env == {}
    with pytest.raises(ConfigError, match="the environment variable C is not UTF-8"):
        AsteraLite(secrets="C", environ={"C": "key \udcff"})
