"""``explore`` and ``report``: a ledger as pages."""

from __future__ import annotations

import argparse
import sys

from trainer_attrib.command_line.command import DONE, Commands, add_command, add_ledger, extra, print_json


def add(commands: Commands) -> None:
    """Declare the commands."""
    report = add_command(
        commands, "report", "the explorer's page with the ledger in it, as one file that loads nothing", _report,
        "report demo-run/ledger --out report.html",
    )  # fmt: skip
    add_ledger(report)
    report.add_argument("--out", metavar="FILE", default="report.html", help="to write (default: %(default)s)")
    report.add_argument("--title", default="", help="of the page (default: the ledger's name)")
    explore = add_command(
        commands, "explore", "look at a ledger in the browser, and ask its model", _explore,
        "explore demo-run/ledger --model demo-run/model",
    )  # fmt: skip
    add_ledger(explore)
    explore.add_argument("others", nargs="*", help="ledgers to compare with")
    explore.add_argument("--model", metavar="DIR", help="folder of the model and its tokenizer, for questions")
    explore.add_argument("--port", type=int, default=0, help="of the page on this computer (default: a free one)")
    explore.add_argument("--no-browser", action="store_true", help="only print the address")


def _report(options: argparse.Namespace) -> int:
    from trainer_attrib.explorer.one_file import write_report

    path = write_report(options.ledger, options.out, options.title)
    size = path.stat().st_size
    if options.json:
        print_json({"report": str(path), "bytes": size})
    else:
        print(f"{path}: {size / 1e6:.1f} MB, opens in any browser and loads nothing")
    return DONE


def _explore(options: argparse.Namespace) -> int:
    model = tokenizer = None
    if options.model:
        with extra("huggingface"):
            from trainer_attrib.integrations.given_data import load_model
        model, tokenizer = load_model(options.model)
    from trainer_attrib.explorer.serving import explore

    def say(told: str, url: str) -> None:
        print_json({"url": url}) if options.json else print(told)
        sys.stdout.flush()  # whoever started it reads the address while it runs

    explore(
        options.ledger, *options.others, model=model, tokenizer=tokenizer, port=options.port,
        browser=not options.no_browser, say=say,
    )  # fmt: skip
    return DONE
