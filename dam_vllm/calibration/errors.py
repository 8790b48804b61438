"""What calibration raises."""

from dam_vllm.options import OptionError


class CalibrationError(OptionError):
    """An input that cannot be honoured; the message names it, its value and what is allowed."""


class CalibrationStopped(Exception):  # noqa: N818 - the user's wish, no error
    """Calibration was asked to stop; its state lies in the checkpoint folder."""
