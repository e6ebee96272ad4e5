"""Whether a module's call is still running: for hooks that note at its start what must be undone at its end.

Notable: torch runs no hook at all when a call ends by a KeyboardInterrupt or another exception that is no `Exception`,
`always_call=True` or not. So what a hook notes is tied to the frame of the call, and holds as long as that frame is on
the stack of the thread that asks. A frame of another thread is not, so that such notes belong to one thread each.
"""

from __future__ import annotations

import sys
from types import FrameType


def call_frame() -> FrameType:
    """The frame of the module call that runs the hook from which this is called, directly or through wrappers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # torch.nn.Module.__call__ has its hooks run by `inner` inside of `_call_impl`
        if frame.f_code.co_name == "_call_impl" and frame.f_globals.get("__name__") == "torch.nn.modules.module":
            return frame
        frame = frame.f_back
    raise RuntimeError("call_frame() was asked for outside of a module's hooks.")


def is_running(call: FrameType) -> bool:
    """Whether this frame is on the stack of the thread that asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False


def runs_in_thread(call: FrameType, thread: int) -> bool:
    """Whether this frame is on the stack of the thread with this identifier."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False
