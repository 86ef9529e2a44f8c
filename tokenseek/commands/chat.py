"""`tokenseek chat`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokenseek.commands.arguments import add_subject_arguments, positive
from tokenseek.errors import UserError
from tokenseek.evaluation.subject import Subject, find_subject

if TYPE_CHECKING:
    from tokenseek.runs.chat import Conversation

HELP = "talk to a trained model in the terminal"
DESCRIPTION = (
    "talk to the model of a run, to an adapter or to a model; what is typed is put into the template that the run was "
    "trained with, and the answer is printed as it comes"
)
LAUNCHED = False
TEMPLATES = ("chat", "alpaca", "plain", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_arguments(parser, "model")
    group = parser.add_argument_group("conversation")
    group.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    group.add_argument("--system", metavar="TEXT", help="a system message (template chat)")
    group.add_argument(
        "--template", choices=TEMPLATES, help="default: the run's, else the tokenizer's chat template, else none"
    )
    group.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="of an answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0 takes the likeliest token (default: the model's own)"
    )


def check(args: argparse.Namespace) -> Subject:
    """The model, its template and its settings.

    Raises:
        UserError: there is no such model, or the prompt is empty.
    """
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; give a text, or leave it out to talk.")
    return find_subject(args.model, args.adapter, args.set)


def run(args: argparse.Namespace, subject: Subject) -> None:
    """Answer the prompt, or what is typed until the input ends."""
    from tokenseek.runs.chat import Conversation  # late: mistakes are reported before torch is imported

    conversation = Conversation.open(
        subject,
        template=args.template,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )
    if args.prompt is None:
        _talk(conversation)
    else:
        conversation.answer(args.prompt)


def _talk(conversation: Conversation) -> None:
    """Read what is typed, answer it, and so on until the input ends."""
    remembers = (
        "; /new forgets what was said" if conversation.template == "chat" else ", each message is answered on its own"
    )
    print(f"template: {conversation.template}{remembers}; /exit or Ctrl-D ends")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/new":
            conversation.forget()
        elif text:
            try:
                conversation.answer(text)
            except KeyboardInterrupt:
                print("\n(stopped)")


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature, such as 0 or 0.7")
    return temperature
