"""Every error a user can meet. Each message gives the value, the bound, the consequence and the fix."""


class AsyncRLError(Exception):
    """Base of all errors raised on purpose by asyncrl."""


class ConfigError(AsyncRLError):
    """A recipe, deployment or override that can't work; raised before any actor starts."""


class DataError(AsyncRLError):
    """A data file that is missing, unreadable, or lacks a column. Names file, row and the columns found."""


class CheckpointError(AsyncRLError):
    """A checkpoint that is incomplete, damaged, or of another model."""


class DiskFull(AsyncRLError):
    """A disk, or a quota, is full. Names the folder, what is free there, and what was needed. What was durable stays so."""


class Fenced(AsyncRLError):
    """The caller is a zombie: a newer incarnation of the same worker has taken over. Stop, change nothing."""


class Closed(AsyncRLError):
    """The peer was asked to stop; whoever waits on it must end."""


class Unavailable(AsyncRLError):
    """A peer could not be reached before the deadline. Carries who, for how long, and the last cause."""


class BadTransfer(AsyncRLError):
    """Weights whose manifest or checksum does not match: never shown to an engine."""


class NonFinite(AsyncRLError):
    """Loss, gradient or log-probability was not finite too many steps in a row."""


class ActorFailed(AsyncRLError):
    """An actor died more often than its restart budget allows. Carries its name and first traceback."""


class PlacementError(AsyncRLError):
    """Actors that fit nowhere in the cluster; prints demanded against available resources."""


class SentinelFired(AsyncRLError):
    """A sentinel of the recipe ended the run, in order. Carries its condition, the rows that fired it, and what is saved."""


def exit_status(error: BaseException | None) -> int:
    """That of a command which ended with the error: 0 without any."""
    if error is None:
        return 0
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError | DataError) else 1
