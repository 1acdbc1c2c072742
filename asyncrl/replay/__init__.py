"""The replay store: the message queue between the stages, and the log of everything that was generated."""

from asyncrl.replay.log.reader import open_run as open

__all__ = ["open"]
