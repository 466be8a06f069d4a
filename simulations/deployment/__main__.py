"""What operators type. `docs/deployment.md` goes through it step by step.

keys     make keys and certificates: authority, server, node, signing, secret
start    check a process and all its settings, then run it:    start -- flower-supernode --superlink ...
check    the same checks, and those of a run's configuration; start nothing
digest   print a bundle's SHA-256;   sign   sign it
trust    write the list of keys whose signatures a site accepts;   attach   hand signatures to a SuperLink
submit   start a run, wait for its end, exit 1 unless it completed
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fl_app.errors import StillroomError
from fl_app.origin import ROOT
from simulations import processes
from simulations.deployment import bundle, keys, preflight, runs, supervise


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 2 for what was refused before anything started."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    asked = _parser().parse_args(words)
    try:
        return _act(asked, command)
    except StillroomError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deployment", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("keys", help="make keys and certificates")
    make.add_argument("what", choices=["authority", "server", "node", "signing", "secret"])
    make.add_argument("place", type=Path, help="a folder for authority and server, a file for the others")
    make.add_argument("--authority", type=Path, help="server: the folder of the authority")
    make.add_argument("--name", action="append", default=[], help="server: a host name or IP address that nodes dial")
    make.add_argument("--days", type=int, default=365)
    verbs.add_parser("start", help="check a process, then run it: start -- flower-superlink ...")
    check = verbs.add_parser("check", help="check a run, a site or a process; start nothing")
    check.add_argument("--config", type=Path)
    check.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    check.add_argument("--site", type=Path, help="a site directory")
    digest = verbs.add_parser("digest", help="print the SHA-256 of the bundle of this checkout")
    digest.add_argument("--root", type=Path, default=ROOT)
    sign = verbs.add_parser("sign", help="sign a bundle by its SHA-256; prints the signature")
    sign.add_argument("sha256")
    sign.add_argument("--key", type=Path, required=True)
    trust = verbs.add_parser("trust", help="write the list of keys whose signatures a site accepts")
    trust.add_argument("public", type=Path, nargs="+", help="public signing keys (.pub)")
    trust.add_argument("--out", type=Path, required=True)
    attach = verbs.add_parser("attach", help="hand signatures to a SuperLink")
    attach.add_argument("--database", type=Path, required=True)
    attach.add_argument("signature", type=Path, nargs="+", help="files with one signature each")
    submit = verbs.add_parser("submit", help="start a run and wait for its end")
    submit.add_argument("--config", required=True, help="a file of the bundle, from its root")
    submit.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    submit.add_argument("--run", default="", help="name of the run")
    submit.add_argument("--timeout", type=float, default=7 * 86400, help="seconds")
    submit.add_argument("connection", help="name of the SuperLink in $FLWR_HOME/config.toml")
    return parser


def _act(asked: argparse.Namespace, command: list[str]) -> int:
    if asked.verb == "keys":
        _make(asked)
    elif asked.verb == "start":
        environment = {**processes.ENVIRONMENT, **os.environ}
        supervise.prepare(command, environment)
        return supervise.run(command, environment)
    elif asked.verb == "check":
        _check(asked, command)
    elif asked.verb == "digest":
        _say(bundle.digest(bundle.build(asked.root)))
    elif asked.verb == "sign":
        _say(bundle.sign(asked.sha256, asked.key).model_dump_json())
    elif asked.verb == "trust":
        bundle.trust_file(asked.out, *asked.public)
    elif asked.verb == "attach":
        for path in asked.signature:
            bundle.attach(asked.database, bundle.from_json(path.read_text(encoding="utf-8")))
    else:
        _submit(asked)
    return 0


def _check(asked: argparse.Namespace, command: list[str]) -> None:
    if asked.config:
        runs.check_run(asked.config, "\n".join(asked.override))
    if asked.site:
        preflight.check_site(asked.site)
    if command:
        supervise.prepare(command, {**processes.ENVIRONMENT, **os.environ})
    _say("fit for production")


def _submit(asked: argparse.Namespace) -> None:
    overrides = "\n".join(asked.override)
    runs.check_run(ROOT / asked.config, overrides)
    flower = runs.Operator(connection=asked.connection, home=Path(os.environ.get("FLWR_HOME", "~/.flwr")))
    run_id = flower.submit(ROOT, {"config": asked.config, "overrides": overrides, "run": asked.run})
    _say(f"run {run_id}")
    flower.wait(run_id, timeout_s=asked.timeout)
    _say(f"run {run_id} completed")


def _make(asked: argparse.Namespace) -> None:
    place: Path = asked.place
    if asked.what == "authority":
        keys.make_authority(place)
    elif asked.what == "server":
        folder: Path = asked.authority or place
        authority = keys.Authority(certificate=folder / "ca.crt", key=folder / "ca.key")
        keys.issue(authority, place, names=asked.name or ["localhost", "127.0.0.1"], days=asked.days)
    else:
        {"node": keys.make_node_key, "signing": keys.make_signing_key, "secret": keys.make_secret}[asked.what](place)
    _say(str(place))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
