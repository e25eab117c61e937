# uvloop: what the benchmarks use of it, where it is not installed.
from asyncio import AbstractEventLoop

def new_event_loop() -> AbstractEventLoop: ...
