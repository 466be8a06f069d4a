"""Files that tell operators what to type (units, compose file, nginx, page): each flag exists, each command is safe."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from fl_app.origin import ROOT
from simulations import processes
from simulations.deployment import __main__ as face
from simulations.deployment import guard

if TYPE_CHECKING:
    from pathlib import Path

DEPLOY = ROOT / "configs" / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def known_flags(program: str) -> set[str]:
    """Return the flags of one of Flower's programs, by its own help."""
    env = {**processes.environment(ROOT / "build"), "COLUMNS": "200"}
    done = subprocess.run([processes.tool(program), "--help"], env=env, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z-]+", done.stdout))


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    return {program: known_flags(program) for program in guard.KNOWN}


def typed(text: str) -> list[list[str]]:
    """Return every command line of Flower's programs in a unit, a compose file or a page."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.split(match.group()) for match in re.finditer(r"flower-super(?:link|node|exec) +--[^\n#`]*", joined)]


def compose_commands() -> list[tuple[str, list[str]]]:
    tree = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return [(name, shlex.split(service["command"])) for name, service in tree["services"].items()]


SOURCES = [*UNITS, ROOT / "docs" / "deployment.md"]


@pytest.mark.parametrize("program", guard.KNOWN)
def test_the_guard_knows_flags_that_exist(flags: dict[str, set[str]], program: str) -> None:
    assert set(guard.KNOWN[program]) <= flags[program]
    dangerous = {flag for found in flags.values() for flag in found} & set(guard.FORBIDDEN)
    assert dangerous == set(guard.FORBIDDEN)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_flag_that_is_shown_exists(flags: dict[str, set[str]], source: Path) -> None:
    for words in typed(source.read_text(encoding="utf-8")):
        assert {word for word in words[1:] if word.startswith("--")} <= flags[words[0]]


def test_the_search_for_commands_finds_them() -> None:
    found = [words[0] for source in SOURCES for words in typed(source.read_text(encoding="utf-8"))]
    assert {*found} == set(guard.KNOWN)
    assert typed("flower-superlink --a b \\\n    --c 'd e'\nnext") == [["flower-superlink", "--a", "b", "--c", "d e"]]


def production(words: list[str]) -> list[str]:
    """Return what a command of a unit or compose file starts under the guard."""
    return words[words.index("--") + 1 :]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_every_unit_passes_the_guard_but_for_files_that_are_not_here(unit: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", unit.read_text(encoding="utf-8"))
    line = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    given = " ".join(re.findall(r"^Environment=(.*)$", text, re.MULTILINE)).split()
    environment = dict(pair.split("=", 1) for pair in given)
    assert line is not None
    words = shlex.split(line.group(1))
    if "simulations.deployment.gate" in words:
        return
    found = guard.findings(production(words), environment)
    assert [finding for finding in found if not finding.why.startswith("no file at /etc/stillroom/")] == []


def test_every_command_of_the_page_passes_the_guard_but_for_files_that_are_not_here() -> None:
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    commands = typed((ROOT / "docs" / "deployment.md").read_text(encoding="utf-8"))
    assert [words[0] for words in commands] == ["flower-supernode", "flower-superexec"]
    found = [finding for words in commands for finding in guard.findings(words, environment)]
    assert [finding for finding in found if not finding.why.startswith("no file at /etc/stillroom/")] == []


def test_the_supernode_waits_longer_than_the_server_holds_it_for_online() -> None:
    """flwr 1.41 refuses a key for 60 s after a crash: heartbeat interval times patience."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

    unit = (DEPLOY / "systemd" / "stillroom-supernode.service").read_text(encoding="utf-8")
    rest = re.search(r"^RestartSec=(\d+)$", unit, re.MULTILINE)
    assert rest is not None
    assert int(rest.group(1)) >= HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE + 5
    assert "\nRestart=always\n" in unit


def test_the_compose_file_starts_what_the_units_start() -> None:
    """The same flags and values, but for where state lies."""
    by_unit: dict[str, list[str]] = {}
    for unit in UNITS:
        text = re.sub(r"\\\n\s*", " ", unit.read_text(encoding="utf-8"))
        line = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
        assert line is not None
        by_unit[unit.stem.removeprefix("stillroom-")] = shlex.split(line.group(1))
    for name, words in compose_commands():
        assert [word.replace("/state/", "/var/lib/stillroom/") for word in words] == by_unit.pop(name)
    assert by_unit == {}


def test_the_compose_environment_passes_the_guard() -> None:
    tree = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for name, words in compose_commands():
        environment = tree["services"][name]["environment"]
        if "--" in words:
            found = guard.findings(production(words), environment)
            assert [finding for finding in found if "/etc/stillroom/" not in finding.why] == []


def test_gate_and_nginx_publish_the_same_calls() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    from simulations.deployment.gate import CALLS

    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    found = re.search(r"/v1/fleet/\(([a-z|-]+)\)\$", text)
    assert found is not None
    assert tuple(found.group(1).split("|")) == CALLS
    fleet = {path.rsplit("/", 1)[1] for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert set(CALLS) == fleet - {"register-node", "unregister-node"}


def test_the_example_policy_can_be_read_and_is_for_production(tmp_path: Path) -> None:
    from clients.config import read_policy

    (tmp_path / "site.toml").write_bytes((DEPLOY / "site" / "site.toml.example").read_bytes())
    policy = read_policy(tmp_path)
    assert not policy.limits.simulation
    assert not policy.limits.non_private


def test_every_verb_of_the_page_exists(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"simulations\.deployment ([a-z]+)", page))
    with pytest.raises(SystemExit):
        face.main(["--help"])
    offered = re.search(r"\{([a-z,]+)\}", capsys.readouterr().out)
    assert offered is not None
    assert shown == set(offered.group(1).split(","))
