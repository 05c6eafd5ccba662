"""`gemmart doctor`: what gemmart finds here."""

from __future__ import annotations

from typing import Any

import click

from gemmart.cli.options import Command, json_option, message_options, messages_of, print_json


@click.command("doctor", cls=Command, options_metavar="[options]")
@json_option
@message_options
def command(**given: Any) -> int:
    """What gemmart finds here: CPU, GPUs, memory, folders, versions."""
    from gemmart import doctor as doctor_module

    messages_of(given)
    found = doctor_module.report()
    if given["as_json"]:
        print_json(found)
    else:
        print(doctor_module.as_text(found))
    return 0
