"""`rayos shell`: the same commands, line after line, completed from what the daemon knows now.

It is a client like any other: each line runs as the command does, with its exit status in the prompt. From a pipe or
a file it runs line after line and ends at the first that fails, with its status.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from rayos_vmm.cli.exit_status import FAILED, INTERRUPTED, USAGE

HISTORY: Final = "shell.history"
LEAVE: Final = ("exit", "quit")
#: A command's line, and its exit status.
Run = Callable[[Sequence[str]], int]
#: The parser with the arguments of one command, of all when it is None.
ToParser = Callable[[str | None], argparse.ArgumentParser]


def split(line: str) -> list[str]:
    """A line's words; what stands behind # is a remark.

    Raises:
        ValueError: a quotation that does not end.
    """
    return shlex.split(line, comments=True)


def run_line(line: str, run: Run) -> int:
    """Runs one line; usage errors and an interrupt are statuses, as everywhere."""
    try:
        words = split(line)
    except ValueError as error:
        print(f"rayos: {error}: {line!r}", file=sys.stderr)
        return USAGE
    if not words:
        return 0
    if words[0] == "shell":
        print("rayos: this is the shell", file=sys.stderr)
        return USAGE
    if words[0] in ("help", "?"):
        words = [*words[1:], "--help"]
    try:
        return run(words)
    except SystemExit as ended:  # argparse has said why
        return ended.code if isinstance(ended.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def run_lines(lines: Iterable[str], run: Run) -> int:
    """Runs line after line up to the first that fails; its status."""
    for line in lines:
        if line.strip() in LEAVE:
            break
        if status := run_line(line, run):
            return status
    return 0


def completions(before: str, to_parser: ToParser) -> Iterator[tuple[str, int]]:
    """Returns the words that may stand at the cursor, each with the number of characters before it that it replaces."""
    from argcomplete.finders import CompletionFinder

    first = before.split(maxsplit=1)[:1]
    is_begun = len(before.split(maxsplit=1)) > 1 or before.endswith(" ")
    finder = CompletionFinder(to_parser(first[0] if first and is_begun else ""), append_space=False)
    kept = before[: before.rfind(" ") + 1]
    state = 0
    while (line := finder.rl_complete(before, state)) is not None:
        word = line[len(kept) :].rstrip()
        if not word.startswith("-") or before[len(kept) :].startswith(
            "-"
        ):  # options only where they are begun
            yield word, len(before) - len(kept)
        state += 1


def _prompts(path: Path, to_parser: ToParser) -> Callable[[int], str]:
    """Asks for a line, with the former command's status in the prompt; history is kept at `path` if that can be."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Words(Completer):
        def get_completions(self, document: Document, _event: CompleteEvent) -> Iterator[Completion]:
            for word, length in completions(document.text_before_cursor, to_parser):
                yield Completion(word, start_position=-length)

    history: History = FileHistory(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        history = InMemoryHistory()
    # In a thread: the names of machines are asked of the daemon.
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=Words(),
        complete_in_thread=True,
        complete_while_typing=False,
    )
    return lambda status: session.prompt(f"rayos [{status}]> " if status else "rayos> ")


def talk(ask: Callable[[int], str], run: Run) -> int:
    """Asks and runs until the end of the input or `exit`; the last status."""
    status = 0
    while True:
        try:
            line = ask(status)
        except EOFError:
            return status
        except KeyboardInterrupt:
            status = INTERRUPTED
            continue
        if line.strip() in LEAVE:
            return status
        status = run_line(line, run)


def add_shell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="run its lines, not the terminal's"
    )
    parser.epilog = "Tab completes from what the daemon knows. exit, quit or Ctrl-D ends."


def main(args: argparse.Namespace, run: Run, to_parser: ToParser) -> int:
    """The shell, on a terminal, a file or a pipe; returns the exit status."""
    from rayos_vmm.paths import default_paths

    if args.file is not None:
        try:
            return run_lines(args.file.read_text().splitlines(), run)
        except (OSError, UnicodeDecodeError) as error:
            print(f"rayos: {args.file}: cannot be read: {error}", file=sys.stderr)
            return USAGE
    if not sys.stdin.isatty():
        return run_lines(sys.stdin, run)
    return talk(_prompts(default_paths().state / HISTORY, to_parser), run)
