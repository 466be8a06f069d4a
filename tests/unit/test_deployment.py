"""What production refuses before anything starts; keys, certificates and signatures."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from fl_app.errors import DeploymentUnsafe
from fl_app.origin import ROOT
from simulations import processes
from simulations.deployment import __main__ as face
from simulations.deployment import bundle, guard, keys, preflight, runs, supervise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SAFE_ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
DEPLOY = ROOT / "configs" / "deploy"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """A command line of each program that production starts."""
    folder = tmp_path_factory.mktemp("keys")
    authority = keys.make_authority(folder)
    server = keys.issue(authority, folder, names=("127.0.0.1",))
    secret = str(keys.make_secret(folder / "secret"))
    keys.make_node_key(folder / "node")
    shared = ["--superexec-auth-secret-file", secret]
    link = ["--ssl-ca-certfile", str(authority.certificate), "--ssl-certfile", str(server.certificate)]
    link += ["--ssl-keyfile", str(server.key), "--enable-supernode-auth", "--database", str(folder / "link.db")]
    link += ["--isolation", "process", *shared, "--disable-runtime-dependency-installation"]
    node = ["--superlink", "127.0.0.1:1", "--root-certificates", str(authority.certificate)]
    node += ["--auth-supernode-private-key", str(folder / "node"), "--trusted-entities", str(folder / "trusted.yaml")]
    node += ["--node-config", 'rows="/srv/site"', "--isolation", "process", *shared]
    task = ["--runtime-api-address", "127.0.0.1:1", "--root-certificates", str(authority.certificate), *shared]
    return {
        "flower-superlink": ["flower-superlink", *link],
        "flower-supernode": ["flower-supernode", *node],
        "flower-superexec": ["flower-superexec", *task],
    }


def settings(words: list[str], **environment: str) -> set[str]:
    """Return the settings that the guard names."""
    return {finding.setting for finding in guard.findings(words, {**SAFE_ENVIRONMENT, **environment})}


def without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + (1 if flag in guard.SWITCHES else 2) :]


def with_value(words: list[str], flag: str, value: str) -> list[str]:
    return [*(without(words, flag) if flag in words else words), flag, value]


@pytest.mark.parametrize("program", guard.KNOWN)
def test_a_sound_command_passes(commands: dict[str, list[str]], program: str) -> None:
    assert settings(commands[program]) == set()


NEEDED = [
    *(
        ("flower-superlink", flag)
        for flag in (
            "--ssl-ca-certfile",
            "--ssl-certfile",
            "--ssl-keyfile",
            "--enable-supernode-auth",
            "--database",
            "--isolation",
            "--superexec-auth-secret-file",
            "--disable-runtime-dependency-installation",
        )
    ),
    *(
        ("flower-supernode", flag)
        for flag in (
            "--superlink",
            "--root-certificates",
            "--auth-supernode-private-key",
            "--trusted-entities",
            "--node-config",
            "--isolation",
            "--superexec-auth-secret-file",
        )
    ),
    ("flower-superexec", "--root-certificates"),
    ("flower-superexec", "--superexec-auth-secret-file"),
]


@pytest.mark.parametrize(("program", "flag"), NEEDED)
def test_each_needed_flag_is_missed(commands: dict[str, list[str]], program: str, flag: str) -> None:
    assert settings(without(commands[program], flag)) == {flag}


@pytest.mark.parametrize("program", guard.KNOWN)
@pytest.mark.parametrize("flag", guard.FORBIDDEN)
def test_each_forbidden_flag_is_named(commands: dict[str, list[str]], program: str, flag: str) -> None:
    if (program, flag) == ("flower-superexec", "--insecure"):  # allowed on this machine's loopback alone
        words = with_value([*commands[program], flag], "--runtime-api-address", "10.0.0.1:9094")
        assert settings([*commands[program], flag]) == set()
    else:
        words = [*commands[program], flag] if flag in guard.SWITCHES else [*commands[program], flag, "1.2.3.4:1"]
    assert settings(words) == {flag}


@pytest.mark.parametrize(
    ("program", "flag", "value"),
    [
        ("flower-superlink", "--host", "0.0.0.0"),  # noqa: S104 - refused
        ("flower-superlink", "--host", "::"),
        ("flower-superlink", "--host", "link.example.org"),
        ("flower-supernode", "--host", "10.0.0.1"),
        ("flower-superlink", "--isolation", "subprocess"),
        ("flower-supernode", "--isolation", "subprocess"),
        ("flower-superlink", "--database", ":flwr-in-memory:"),
        ("flower-superlink", "--insec", ""),  # argparse takes abbreviations
        ("flower-supernode", "--allow-runtime", ""),
        ("flower-superlink", "--fleet-api-add", "0.0.0.0:9092"),
    ],
)
def test_each_open_value_is_named(commands: dict[str, list[str]], program: str, flag: str, value: str) -> None:
    assert settings(with_value(commands[program], flag, value)) == {flag}
    assert settings([*commands[program], f"{flag}={value}"]) == {flag}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_is_fine(commands: dict[str, list[str]], host: str) -> None:
    assert settings(with_value(commands["flower-superlink"], "--host", host)) == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLWR_TELEMETRY_ENABLED", "1"),
        ("FLWR_TELEMETRY_ENABLED", ""),
        ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "0"),
        ("FLWR_INTERNAL_GRPC_CONTROL_API", "1"),
        ("FLWR_INTERNAL_GRPC_FLEET_API", "1"),
    ],
)
def test_each_open_environment_is_named(commands: dict[str, list[str]], name: str, value: str) -> None:
    for words in commands.values():
        assert settings(words, **{name: value}) == {name}
    assert guard.findings(commands["flower-superlink"], {}) != []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
@pytest.mark.parametrize("flag", guard.PRIVATE_FLAGS)
def test_a_secret_that_others_can_read_is_named(
    commands: dict[str, list[str]], flag: str, mode: int, tmp_path: Path
) -> None:
    loose = keys.make_secret(tmp_path / "loose")
    loose.chmod(mode)
    program = "flower-supernode" if flag == "--auth-supernode-private-key" else "flower-superlink"
    assert settings(with_value(commands[program], flag, str(loose))) == {flag}
    loose.chmod(0o600)
    assert settings(with_value(commands[program], flag, str(loose))) == set()
    loose.write_bytes(b"")
    assert settings(with_value(commands[program], flag, str(loose))) == {flag}
    loose.unlink()
    assert settings(with_value(commands[program], flag, str(loose))) == {flag}


def test_a_refusal_names_every_setting_and_the_way_out(commands: dict[str, list[str]]) -> None:
    words = [*without(commands["flower-superlink"], "--database"), "--insecure"]
    with pytest.raises(DeploymentUnsafe) as caught:
        guard.refuse_unsafe(words, SAFE_ENVIRONMENT)
    assert "--insecure: messages would travel in plain text; give certificates" in str(caught.value)
    assert "--database: runs and registered sites would be lost with the process; name a file" in str(caught.value)


@given(st.lists(st.sampled_from(["--host", "--insecure", "x", "--database=y", "", "-h", "--", "--port", "8000"])))
def test_no_command_line_makes_the_guard_stumble(words: list[str]) -> None:
    for program in guard.KNOWN:
        try:
            found = guard.findings([program, *words], SAFE_ENVIRONMENT)
        except DeploymentUnsafe:
            continue
        assert found


def test_other_programs_are_not_started() -> None:
    for words in ([], ["bash", "-c", "true"], ["flwr", "run"]):
        with pytest.raises(DeploymentUnsafe, match="not guarded"):
            guard.refuse_unsafe(words, SAFE_ENVIRONMENT)


# --- keys and certificates


def test_private_files_are_private_and_never_replaced(tmp_path: Path) -> None:
    authority = keys.make_authority(tmp_path)
    keys.issue(authority, tmp_path, names=("a.example",))
    keys.make_node_key(tmp_path / "node")
    keys.make_signing_key(tmp_path / "signing")
    keys.make_secret(tmp_path / "secret")
    private = ("ca.key", "server.key", "node", "signing", "secret")
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in private} == {0o600}
    before = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(DeploymentUnsafe, match=r"ca\.key is there already"):
        keys.make_authority(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == before


def test_a_certificate_names_hosts_and_addresses(tmp_path: Path) -> None:
    server = keys.issue(keys.make_authority(tmp_path / "ca"), tmp_path, names=("a.example", "10.0.0.7", "::1"))
    found = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example"]
    assert [str(value) for value in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    preflight.check_certificate(server.certificate, server.key)


def test_a_certificate_that_will_not_serve_is_named(tmp_path: Path) -> None:
    authority = keys.make_authority(tmp_path / "ca")
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)
    old = keys.issue(authority, tmp_path / "old", names=("a",), days=1, not_before=past)
    early = keys.issue(authority, tmp_path / "early", names=("a",), not_before=past + dt.timedelta(days=4))
    good, other = (keys.issue(authority, tmp_path / name, names=("a",)) for name in ("good", "other"))
    for made in (old, early):
        with pytest.raises(DeploymentUnsafe, match="is valid from"):
            preflight.check_certificate(made.certificate, made.key)
    with pytest.raises(DeploymentUnsafe, match="is not the key of"):
        preflight.check_certificate(good.certificate, other.key)
    with pytest.raises(DeploymentUnsafe, match="no subject alternative name"):
        preflight.check_certificate(authority.certificate, authority.key)
    with pytest.raises(DeploymentUnsafe, match="--ssl-certfile"):
        preflight.check_certificate(tmp_path / "absent", good.key)


# --- the server, seen from a site


@pytest.fixture
def answers() -> Iterator[Callable[[bytes], preflight.Address]]:
    """Return a function: what a plain TCP server says to whoever connects -> where it is."""
    servers: list[socket.socket] = []

    def serve(said: bytes) -> preflight.Address:
        listener = socket.create_server(("127.0.0.1", 0))
        servers.append(listener)

        def once() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1024)
                    connection.sendall(said)
            except OSError:
                return

        threading.Thread(target=once, daemon=True).start()
        return preflight.Address(host="127.0.0.1", port=listener.getsockname()[1])

    yield serve
    for listener in servers:
        listener.close()


def test_a_server_without_tls_is_named(answers: Callable[[bytes], preflight.Address], tmp_path: Path) -> None:
    authority = keys.make_authority(tmp_path)
    plain = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(DeploymentUnsafe, match="no TLS: this server speaks plain HTTP"):
        preflight.check_server(answers(plain), authority.certificate)
    preflight.check_plain(answers(plain))  # and a plain node may dial it


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    authority = keys.make_authority(tmp_path)
    nobody = preflight.Address(host="127.0.0.1", port=processes.free_port())
    with pytest.raises(DeploymentUnsafe, match="not reachable"):
        preflight.check_server(nobody, authority.certificate)
    with pytest.raises(DeploymentUnsafe, match="--root-certificates"):
        preflight.check_server(nobody, tmp_path / "absent.crt")


@pytest.mark.parametrize("ahead", [-60, 30, 0])
def test_a_clock_that_is_off_is_named(ahead: float, tmp_path: Path) -> None:
    from email.utils import format_datetime
    from ssl import PROTOCOL_TLS_SERVER, SSLContext

    authority = keys.make_authority(tmp_path / "ca")
    server = keys.issue(authority, tmp_path, names=("127.0.0.1",))
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    stamp = format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ahead), usegmt=True)

    def once(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1024)
            secure.sendall(f"HTTP/1.1 404 Not Found\r\nDate: {stamp}\r\nContent-Length: 0\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=once, args=(listener,))
        thread.start()
        address = preflight.Address(host="127.0.0.1", port=listener.getsockname()[1])
        try:
            if ahead:
                with pytest.raises(DeploymentUnsafe, match=r"clock: it is .* ahead of ours; synchronise both"):
                    preflight.check_server(address, authority.certificate)
            else:
                assert abs(preflight.check_server(address, authority.certificate)) < preflight.MAX_SKEW_S
        finally:
            thread.join()


@pytest.mark.parametrize("text", ["https://a:1", "a", "a:", ":1", "a:0", "a:65536", "a:٣"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    assert str(preflight.read_address("[::1]:8443")) == "::1:8443"
    with pytest.raises(DeploymentUnsafe, match="no address"):
        preflight.read_address(text)


# --- a site


def test_a_site_that_allows_simulation_is_refused(site_folder: Any) -> None:
    for place in (site_folder.directory, *site_folder.directory.iterdir()):
        place.chmod(0o750)
    with pytest.raises(DeploymentUnsafe, match=r"limits\.simulation is true"):
        preflight.check_site(site_folder.directory)
    site_folder.policy(limits={"simulation": False})
    preflight.check_site(site_folder.directory)
    (site_folder.directory / "rows.jsonl").chmod(0o644)
    with pytest.raises(DeploymentUnsafe, match=r"rows\.jsonl is open to every user"):
        preflight.check_site(site_folder.directory)
    (site_folder.directory / "rows.jsonl").unlink()
    with pytest.raises(DeploymentUnsafe, match=r"no rows\.jsonl"):
        preflight.check_site(site_folder.directory)


@pytest.mark.parametrize("text", ["", "rows=", "rows=/srv/a", 'rows="relative"', 'brows="/srv/a"', "rows=\"/srv/a'"])
def test_rows_are_an_absolute_path(text: str) -> None:
    assert str(supervise.rows_of("x=1 rows='/srv/a b'")) == "/srv/a b"
    with pytest.raises(DeploymentUnsafe, match="write rows="):
        supervise.rows_of(text)


# --- signatures


@pytest.fixture
def link_database(tmp_path: Path) -> Path:
    """A file as SuperLink 1.41 makes it, as far as bundles go."""
    path = tmp_path / "link.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE fab (fab_hash TEXT PRIMARY KEY, content BLOB, verifications TEXT NOT NULL)")
        connection.commit()
    return path


def stored(database: Path, content: bytes) -> dict[str, str]:
    """Store a bundle the way `flwr run` does and return what would travel with it."""
    fab_hash = bundle.digest(content)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(
            "INSERT INTO fab VALUES (?, ?, '{}') ON CONFLICT (fab_hash) DO UPDATE SET "
            "content = excluded.content, verifications = excluded.verifications",
            (fab_hash, content),
        )
        connection.commit()
        row = connection.execute("SELECT verifications FROM fab WHERE fab_hash = ?", (fab_hash,)).fetchone()
    return json.loads(row[0])


def accepted(verifications: dict[str, str], content: bytes, *publics: Path) -> bool:
    """Ask Flower's own check, with the keys that a node trusts."""
    from flwr.supercore.fab import Fab
    from flwr.supernode.start_client_internal import _verify_fab

    trusted = {bundle.key_id(public): public.read_text() for public in publics}
    fab = Fab(bundle.digest(content), content, verifications)
    return bool(verifications.get("valid_license")) and _verify_fab(fab, trusted)


def test_a_signature_travels_with_its_bundle_and_no_other(link_database: Path, tmp_path: Path) -> None:
    ours, reviewer, foreign = (keys.make_signing_key(tmp_path / name) for name in ("ours", "reviewer", "foreign"))
    content, other = b"the bundle", b"another bundle"
    assert stored(link_database, content) == {}
    for key in ("ours", "reviewer"):
        bundle.attach(link_database, bundle.sign(bundle.digest(content), tmp_path / key))

    for travels in (stored(link_database, content), stored(link_database, content)):
        assert accepted(travels, content, ours)
        assert accepted(travels, content, foreign, reviewer)
        assert not accepted(travels, content, foreign)
        assert not accepted(travels, other, ours)
    assert stored(link_database, other) == {}
    assert not accepted({}, content, ours)


def test_a_signature_attached_after_the_run_began_counts_at_once(link_database: Path, tmp_path: Path) -> None:
    public = keys.make_signing_key(tmp_path / "ours")
    stored(link_database, b"the bundle")
    bundle.attach(link_database, bundle.sign(bundle.digest(b"the bundle"), tmp_path / "ours"))
    with closing(sqlite3.connect(link_database)) as connection:
        travels = json.loads(connection.execute("SELECT verifications FROM fab").fetchone()[0])
    assert accepted(travels, b"the bundle", public)


def test_signatures_are_checked_and_read_strictly(tmp_path: Path, link_database: Path) -> None:
    public, other = (keys.make_signing_key(tmp_path / name) for name in ("ours", "other"))
    keys.make_node_key(tmp_path / "node")
    fab_hash = bundle.digest(b"x")
    made = bundle.from_json(bundle.sign(fab_hash, tmp_path / "ours").model_dump_json())
    bundle.verify(made, public)
    with pytest.raises(DeploymentUnsafe, match="did not sign"):
        bundle.verify(made, other)
    with pytest.raises(DeploymentUnsafe, match="did not sign"):
        bundle.verify(made.model_copy(update={"signed_at": made.signed_at + 1}), public)
    with pytest.raises(DeploymentUnsafe, match="no SHA-256"):
        bundle.sign("abc", tmp_path / "ours")
    with pytest.raises(DeploymentUnsafe, match="no Ed25519 key"):
        bundle.sign(fab_hash, tmp_path / "node")
    for text in ("", "[]", "{}", made.model_dump_json().replace(fab_hash, "y"), '{"fab_hash": 3}'):
        with pytest.raises(DeploymentUnsafe, match="no signature"):
            bundle.from_json(text)
    with pytest.raises(DeploymentUnsafe, match="no database"):
        bundle.attach(tmp_path / "absent.db", made)
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(DeploymentUnsafe, match="no table of bundles"):
        bundle.attach(empty, made)


def test_the_trust_file_is_what_flower_reads(tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import _try_obtain_trusted_entities, _validate_public_keys_ed25519

    publics = [keys.make_signing_key(tmp_path / name) for name in ("a", "b")]
    found = _try_obtain_trusted_entities(bundle.trust_file(tmp_path / "trusted.yaml", *publics))
    assert found == {bundle.key_id(public): public.read_text().strip() for public in publics}
    _validate_public_keys_ed25519(found)


# --- runs


def test_a_simulated_run_is_refused_in_production(capsys: pytest.CaptureFixture[str]) -> None:
    assert face.main(["check", "--config", str(ROOT / "configs" / "smoke.toml")]) == 2
    assert "run.mode is 'simulation'" in capsys.readouterr().err
    runs.check_run(DEPLOY / "hospitals.toml")
    with pytest.raises(DeploymentUnsafe, match="trains without noise"):
        runs.check_run(DEPLOY / "hospitals.toml", 'client.learner={kind="plain_lora", steps=1}')


def test_an_unsafe_process_exits_2_and_is_not_started(
    commands: dict[str, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "run", lambda *_: pytest.fail("it was started"))
    assert face.main(["start", "--", *commands["flower-superlink"], "--insecure"]) == 2
    assert "--insecure" in capsys.readouterr().err
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert face.main(["check", "--", *commands["flower-superexec"]]) == 2
    assert "FLWR_TELEMETRY_ENABLED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("[code: 2004] Failed to activate SuperNode", "does not take this key"),
        ("INFO :      SuperNode terminated gracefully.", "does not accept our authentication any more"),
        ("HTTPStatusError: Client error '401 Unauthorized'", "another SuperExec secret"),
        ("INFO :      Starting Flower SuperNode", ""),
    ],
)
def test_what_flower_says_is_explained(line: str, meaning: str) -> None:
    assert meaning in supervise.explain(line)
    assert bool(meaning) == bool(supervise.explain(line))


# --- the process itself


def script(folder: Path, body: str) -> list[str]:
    """Return a program that stands for one of Flower's: a few words of shell under its name."""
    path = folder / "flower-supernode"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return [str(path)]


def started(folder: Path, body: str) -> subprocess.Popen[str]:
    """Start a program under `supervise.run`, in a process of its own."""
    words = script(folder, body)
    code = (
        f"import os, sys\nfrom simulations.deployment import supervise\nsys.exit(supervise.run({words!r}, os.environ))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("echo '[code: 2004] Failed to activate SuperNode'; exit 1", 1, "does not take this key"),
        ("echo 'SuperNode terminated gracefully.'; exit 0", supervise.UNASKED, "any more: key never registered"),
        ("kill -9 $$", 137, "see above"),
        ('test -z "$PYTHONPATH" || exit 9; exit 7', 7, "see above"),
    ],
)
def test_a_program_that_ends_by_itself_is_a_failure_with_a_reason(
    body: str, code: int, said: str, tmp_path: Path
) -> None:
    process = started(tmp_path, body)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in err.splitlines()[-1]
    assert ("code: 2004" in body) == ("code: 2004" in out)


def test_a_program_that_is_asked_to_end_ends_with_0(tmp_path: Path) -> None:
    process = started(tmp_path, "trap 'echo leaving; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "leaving\n", "")
