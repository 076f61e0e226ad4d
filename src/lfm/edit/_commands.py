"""The commands beside the methods of `lfm edit`: patches put on, taken off, looked at; see `_telling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfm.cli import _options as options

base_option = click.option(
    "--base", metavar="MODEL", help="What the patches lie on; looked for where it was if left out."
)
pickle_option = click.option("--allow-pickle", is_flag=True, help="Read PyTorch pickle weights (tensors only).")
json_option = click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
out_option = click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FOLDER", required=True, help="Folder to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the folder, if lfm made it.")


@click.command("plan", cls=options.Grouped)
@click.argument("model")
@click.option("--requests", metavar="DATA", required=True, help="Edits, as the methods take them.")
@options.seed_option
@json_option
@options.settings_options
def plan(model: str, requests: str, seed: int, json_: bool, **how: Any) -> None:
    """Say what a model answers to edits now, and which of them will get in each other's way; changes nothing."""
    from lfm.edit._telling import tell_plan

    tell_plan(model, options.inline(requests), options.settings_from(**how), seed, json_)


@click.command("apply", cls=options.Grouped)
@click.argument("model")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=click.Path(path_type=Path))
@out_option
@overwrite_option
@base_option
@pickle_option
@json_option
def apply(model: str, patches: tuple[Path, ...], out: Path, overwrite: bool, json_: bool, **how: Any) -> None:
    """Put patches on a model, into a new folder; an edited folder stands for all of its patches."""
    from lfm.edit._telling import tell_made
    from lfm.recipe.patches import apply

    tell_made(apply(model, patches, out, overwrite=overwrite, **how), json_)


@click.command("revert", cls=options.Grouped)
@click.argument("model")
@click.argument("ids", nargs=-1, required=True, metavar="PATCH_ID...")
@out_option
@overwrite_option
@base_option
@pickle_option
@json_option
def revert(model: str, ids: tuple[str, ...], out: Path, overwrite: bool, json_: bool, **how: Any) -> None:
    """Take patches off a model, into a new folder: in any order, exact to the last bit."""
    from lfm.edit._telling import tell_made
    from lfm.recipe.patches import revert

    tell_made(revert(model, ids, out, overwrite=overwrite, **how), json_)


@click.command("list", cls=options.Grouped)
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def list_patches(model: Path, json_: bool) -> None:
    """List the patches of an edited folder, in the order in which they came."""
    from lfm.edit._telling import tell_patches

    tell_patches(model, json_)


@click.command("show", cls=options.Grouped)
@click.argument("patch", type=click.Path(path_type=Path))
@json_option
def show(patch: Path, json_: bool) -> None:
    """Print a patch: what it asks for, by which method, what it changes, how well it does."""
    from lfm.edit._telling import tell_patch

    tell_patch(patch, json_)


@click.command("verify", cls=options.Grouped)
@click.argument("model")
@base_option
@json_option
@click.pass_context
def verify(ctx: click.Context, model: str, base: str | None, json_: bool) -> None:
    """Check that a folder is its base with its patches and nothing else. Exit code 1 if not."""
    from lfm.edit._telling import tell_verdict

    if not tell_verdict(model, base, json_):
        ctx.exit(1)


@click.command("audit", cls=options.Grouped)
@click.argument("before")
@click.argument("after")
@pickle_option
@json_option
def audit(before: str, after: str, allow_pickle: bool, json_: bool) -> None:
    """Guess what was done to a model from its weights: edited, fine-tuned, rounded, or nothing."""
    from lfm.edit._telling import tell_audit

    tell_audit(before, after, allow_pickle, json_)


@click.command("test", cls=options.Grouped)
@click.argument("model")
@click.option("--requests", metavar="DATA", required=True, help="Edits, as the methods take them.")
@click.option("--baseline", metavar="MODEL", help="The model before; of an edited folder its base if left out.")
@json_option
@options.settings_options
def test(model: str, requests: str, baseline: str | None, json_: bool, **how: Any) -> None:
    """Measure any model on edit requests: what it says to them, in other words, and beside them."""
    from lfm.edit._telling import tell_test

    tell_test(model, options.inline(requests), baseline, options.settings_from(**how), json_)


@click.command("export", cls=options.Grouped)
@click.argument("patch", type=click.Path(path_type=Path))
@out_option
@click.option(
    "--base", metavar="MODEL", help="What the adapter is to say it belongs to; as the patch has it if left out."
)
def export(patch: Path, out: Path, base: str | None) -> None:
    """Write a low-rank patch as a LoRA adapter for PEFT."""
    from lfm.recipe.patches import export

    export(patch, out, base)
    click.echo(str(out))


COMMANDS = (plan, apply, revert, list_patches, show, verify, audit, test, export)
