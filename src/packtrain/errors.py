"""What a user can get wrong, and how we say it.

    UserError       the input is wrong: exit code 2, no traceback; holds every problem found, not the first
    Stopped         a signal asked for an end and the state is saved: exit code 75
    Fault           something broke that no flag explains: exit code 1
    Reported        another rank says it

A problem is one sentence that says what, where (flag, file, row, tensor, rank), what was expected and what
to do. `UserError` is raised once, with all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75


class PacktrainError(Exception):
    """Base of every error that is shown as a message and not as a traceback."""

    exit_code = EXIT_FAULT


class UserError(PacktrainError):
    """The user's input is wrong. `problems` lists all that was found, a sentence each."""

    exit_code = EXIT_USER

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Stopped(PacktrainError):
    """A signal ended the run after its state was saved."""

    exit_code = EXIT_STOPPED


class Fault(PacktrainError):
    """The run cannot go on, and not because of what the user typed."""


class Reported(PacktrainError):
    """An error that another rank tells: says nothing here, and keeps its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def raise_if(problems: Iterable[str]) -> None:
    """Raise one `UserError` with every problem, or return if there is none."""
    found = list(problems)
    if found:
        raise UserError(found)
