"""`prox24 prune`: prunes a model, or continues a job that was interrupted."""

from __future__ import annotations

import argparse

from cluster.command import Command
from cluster.console import Console
from cluster.dispatch.executors import connected_early, seen_by_prometheus
from cluster.options import config_from, path_text
from cluster.source import MODEL_HELP, resolve_model
from pipeline.config.prune import PruneConfig
from pipeline.text.files import check_dataset
from storage.object_store import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prox24 prune` beside the options of its config class."""
    parser.add_argument("model", metavar="MODEL", type=path_text, help=MODEL_HELP)
    parser.add_argument(
        "output", metavar="OUTPUT", type=path_text, help="folder for the pruned model, or URI"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the job and prints what it left; returns the exit status, 0."""
    config: PruneConfig = config_from(options, PruneConfig)
    output = place(options.output)
    for dataset in (config.dataset, config.eval_dataset):
        if dataset is not None:
            check_dataset(dataset)
    source = resolve_model(options.model)
    console = Console()
    console.settings(options.model, options.output, config)
    # With --scratch-dir the run directory says which rank goes to which node.
    anywhere = config.scratch_dir is None
    early = connected_early(config, console, module="pipeline.prune", place=anywhere)
    with early as make_executor:
        from pipeline.output.places import run_directory_of
        from pipeline.prune import prune

        result = prune(
            source.folder,
            output,
            config,
            make_executor,
            seen_by_prometheus(console, config, run_directory_of(output, config).name),
            source_name=source.name,
        )
    console.result(result)
    return 0


COMMAND = Command(
    name="prune",
    help="prune MODEL into the new folder OUTPUT",
    epilog="Run the same command again to continue a job that was interrupted: it continues after "
    "the last committed block and ends with the same bytes.",
    config=PruneConfig,
    arguments=add_arguments,
    run=run,
    resumes="finished blocks",
)
