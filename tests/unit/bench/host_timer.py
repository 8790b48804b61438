"""Times calls on this processor, in the place of CUDA events."""

from dam_vllm.bench.timing import wall_clock


class HostTimer:
    """Times calls, or tells given seconds instead."""

    def __init__(self, told=None):
        self.told = told

    def bind(self, calls):
        return lambda: [call() for call in calls]

    def seconds(self, run):
        if self.told is not None:
            run()
            return self.told
        return wall_clock(run)
