"""Every error that mxperts raises on purpose; each message says what was expected, what came and what to do."""


class MxpertsError(Exception):
    """Base class of all errors raised on purpose by mxperts."""


class FormatError(MxpertsError, ValueError):
    """A format, scheme, scale rule or rounding is unknown, or data do not fit the format they claim."""


class ArgumentError(MxpertsError, ValueError):
    """An argument of an operation has the wrong dtype, shape, device or value."""


class CheckpointError(MxpertsError, ValueError):
    """A checkpoint is incomplete, damaged, or says something that mxperts does not support."""


class BackendUnavailable(MxpertsError, RuntimeError):
    """A backend was named that cannot run the problem here."""


class IntegrationError(MxpertsError, RuntimeError):
    """A program that mxperts plugs into is not as expected, or a step that mxperts does for it failed."""
