"""Errors that explain themselves in one line, the same on every rank."""


class ExpectedError(Exception):
    """What a person mends, not a programmer: no traceback, no folder of failures.

    The message names key, value, rule and fix.
    """

    exit_code = 78  # of train.py: "cannot run as it is configured"; see cluster.requeue
