"""The server's door: a run configuration in, a strategy started. Nothing but wiring."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fl_app.origin import check_origin

check_origin()

from fl_app.config import read_tree, shared  # noqa: E402
from strategies.config import build_pipeline, read_server  # noqa: E402
from strategies.knowledge import Knowledge  # noqa: E402

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run that `config` and `overrides` describe."""
    tree = read_tree(str(context.run_config["config"]), str(context.run_config["overrides"]))
    server = read_server(tree)
    run = str(context.run_config["run"] or context.run_id)
    pipeline = build_pipeline(tree, shared(tree), server, run=run)
    Knowledge(pipeline, server.network).start(grid, ArrayRecord())
