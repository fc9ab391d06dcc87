"""``forecast``: what would DPO on these pairs do to the model?"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

from trainer_attrib.command_line.behaviors import add_behaviors
from trainer_attrib.command_line.command import DONE, Commands, add_command, add_model, extra, print_json

METHODS = ("frozen", "warm", "linearised", "look_ahead", "gradient", "counts", "projection")
WAYS = ("reweight", "drop", "flip", "offset", "mask")
"""In the order of the help; tests hold both against those of the library."""
EXAMPLE = (
    "forecast --model out/chat --data pairs.jsonl --rate 'flattery=(?i)great question' --prompts prompts.jsonl "
    "--contributions"
)


def add(commands: Commands) -> None:
    """Declare the command."""
    what = "what DPO on a file of pairs would do, before it trains"
    parser = add_command(commands, "forecast", what, _forecast, EXAMPLE)
    add_model(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="JSON lines: prompt, chosen, rejected; id, source")
    add_behaviors(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--learning-rate", type=float, default=1e-6, help="falls linearly to 0 (default: %(default)s)")
    add("--epochs", type=float, default=1.0, help="over the pairs (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="pairs of an optimizer step (default: %(default)s)")
    add("--beta", type=float, default=0.1, help="of the DPO loss (default: %(default)s)")
    add = parser.add_argument_group("the forecast").add_argument
    add(
        "--method", nargs="+", choices=METHODS, default=["frozen"], metavar="METHOD",
        help=f"one or several of {', '.join(METHODS)} (default: frozen)",
    )  # fmt: skip
    add("--share", type=float, default=1.0, help="of the batches that are differentiated (default: all)")
    add("--contributions", action="store_true", help="which pairs would do it")
    add = parser.add_argument_group("other data").add_argument
    bound: dict[str, Any] = {"metavar": "BEHAVIOR=VALUE", "nargs": "+"}
    add("--keep-below", help="largest predicted change of behaviors: weighs the pairs anew", **bound)
    add("--keep-above", help="smallest predicted change of behaviors", **bound)
    add("--how", choices=WAYS, default="reweight", help="to change the data (default: %(default)s)")
    add("--drop-at-most", type=float, default=1.0, help="share of the data's weight (default: %(default)s)")
    add("--out", metavar="DIR", help="new folder for the pairs with the plan as columns (datasets.load_from_disk)")


def _forecast(options: argparse.Namespace) -> int:
    with extra("demo"):
        from trainer_attrib.integrations.forecast_pairs import PairsForecast

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the trainer's own, about the trainer's own arguments
        asked = PairsForecast.asked(options, folder)
        outlook = asked.outlook()
        answer: dict[str, Any] = {"forecast": outlook.to_dict()}
        _say(options, outlook)
        if options.contributions:
            told = outlook.contributions()
            answer["contributions"] = told.to_dict()
            _say(options, "", told)
        if asked.wish:
            reshaped = asked.reshaped(outlook)
            answer["reshaped"] = reshaped.to_dict()
            _say(options, "", reshaped)
            if options.out:
                answer["out"] = str(asked.write(reshaped))
                _say(options, f"\n{answer['out']}: the pairs with the plan as columns; apply_plan(trainer) follows it")
    if options.json:
        print_json(answer)
    return DONE


def _say(options: argparse.Namespace, *lines: object) -> None:
    if not options.json:
        print(*lines, sep="\n", flush=True)
