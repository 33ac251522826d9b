"""`fxpasses tune SPEC --input SIZES`: measures what a model needs on this device, and keeps it."""

from __future__ import annotations

import argparse
import dataclasses
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.cli.console import measuring, positive, show
from fxpasses.cli.model_arguments import (
    add_model,
    add_options,
    current_directory_importable,
    dtype_of,
    option_of,
)
from fxpasses.errors import FxpassesError

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands

TUNE_HELP = """\
Measures how long this device takes for the convolutions, layout copies and layout-dependent operators of a
model in either layout, and keeps that in the device's store, where compiling finds it.

Compiling measures by itself, for at most Options.tune_seconds, what its plan depends on. This measures all of
it, once, so that no compilation has to. What was compiled before is planned anew.
"""


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    tune = commands.add_parser(
        "tune",
        help="measure what a model costs on this device, for its layout plans",
        description=TUNE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(tune, required=False)
    tune.add_argument(
        "--seconds", type=positive, default=60, metavar="N", help="how long to measure at most (60)"
    )
    add_options(tune)
    store = tune.add_mutually_exclusive_group()
    store.add_argument("--show", action="store_true", help="list what is kept, for all devices")
    store.add_argument("--export", type=Path, metavar="FILE", help="write this device's store to a file")
    store.add_argument(
        "--import", type=Path, metavar="FILE", dest="taken", help="add a file that --export wrote"
    )
    tune.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures a model, or shows, writes or reads what is kept."""
    about_store = arguments.show or arguments.export or arguments.taken
    if about_store and (arguments.spec or arguments.input):
        raise FxpassesError("--show, --export and --import take no SPEC and no --input.")
    if arguments.show:
        return _show()
    if arguments.export:
        return _export(arguments.export)
    if arguments.taken:
        return _import(arguments.taken)
    if not arguments.spec or not arguments.input:
        raise FxpassesError("name a model and its inputs, such as: tune timm:resnet18 --input 1,3,224,224")
    return _tune(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from fxpasses.backend.tuning import tune
    from fxpasses.cli.model_specs import load_model
    from fxpasses.devices.own import own_store
    from fxpasses.options import Options
    from fxpasses.report.text import layout_line

    options = Options.of(dict(option_of(option) for option in arguments.options))
    dtype = dtype_of(arguments.dtype)
    with current_directory_importable(), measuring(arguments.spec) as progress:
        torch.manual_seed(0)
        model = load_model(arguments.spec).to(dtype).train(arguments.full_train)
        inputs = [spec.build(dtype) for spec in arguments.input]
        with torch.set_grad_enabled(arguments.train or arguments.full_train):
            report = tune(model, inputs, options, arguments.seconds, progress)
    if report.layout is None:
        show(f"{arguments.spec} has no convolutions whose layout could be chosen: nothing to measure")
        return 0
    store = own_store(inputs[0].device)
    store.merge(dataclasses.replace(store.empty, revision=uuid.uuid4().hex))
    show(layout_line(report.layout), f"kept in {store.path}")
    return 0


def _show() -> int:
    from fxpasses.devices.store import cache_folder, load

    found = [(path, profile) for path in sorted(cache_folder().glob("*.json")) if (profile := load(path))]
    show(f"in {cache_folder()}:" if found else f"nothing is kept in {cache_folder()}")
    for path, profile in found:
        settings = ", ".join(f"{name} {value}" for name, value in sorted(profile.settings.items()))
        count = len(profile.measurements)
        show(f"\n{path.name}", f"  {profile.device}", f"  torch {profile.torch_version}, {settings}")
        show(f"  {count} measurements, {len(profile.verdicts)} verdicts of races")
    return 0


def _export(path: Path) -> int:
    from fxpasses.devices.own import own_store

    profile = own_store().profile()
    if not profile.measurements:
        raise FxpassesError(
            "nothing was measured on this device yet: run `fxpasses tune SPEC --input SIZES`, or compile."
        )
    try:
        profile.save(path)
    except OSError as error:
        raise FxpassesError(f"cannot write the profile to {path}: {error.strerror}.") from error
    show(f"{len(profile.measurements)} measurements on {profile.device} are in {path}")
    return 0


def _import(path: Path) -> int:
    from fxpasses.devices.own import own_store
    from fxpasses.devices.store import UnusableProfileError, device_name, read_profile

    store = own_store()
    try:
        profile = read_profile(path, device_name())
        store.merge(dataclasses.replace(profile, libraries={}, revision=uuid.uuid4().hex))
    except (UnusableProfileError, ValueError) as error:
        raise FxpassesError(f"{path} is not imported, and nothing is changed: {error}.") from error
    show(f"{len(profile.measurements)} measurements from {path} are now in {store.path}")
    return 0
