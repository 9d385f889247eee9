"""The signaling role: it introduces the peers of any room to each other."""

import structlog
import trio

from sleap_rtc.io.nursery import open_background_nursery
from sleap_rtc.io.signaling.server import serve_signaling
from sleap_rtc.io.signals import end_on_signal
from sleap_rtc.rendezvous.rooms import Hosting, bind_problem


async def run_signaling(
    host: str,
    port: int,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a signaling server until cancelled, and log its events.

    Args:
        host: The address or the name to listen on.
        port: The port, or 0 for any that is free.
        task_status: Gets the port that the server listens on.

    Raises:
        OSError: If the server cannot listen on the address.
    """
    log = structlog.get_logger().bind(role="signaling")
    listeners = await trio.open_tcp_listeners(port, host=host)
    bound: int = listeners[0].socket.getsockname()[1]
    log.info("signaling server listens", host=host, port=bound)
    task_status.started(bound)
    await serve_signaling(listeners, log=log)


async def run_signaling_daemon(host: str, port: int) -> None:
    """Run a signaling server until Ctrl-C or SIGTERM ends it.

    Raises:
        ConfigError: If the server cannot listen on the address.
    """
    async with open_background_nursery() as nursery:
        await nursery.start(end_on_signal, nursery.cancel_scope)
        try:
            await nursery.start(run_signaling, host, port)
        except OSError as error:
            raise bind_problem(Hosting(host, port), error) from None
        await trio.sleep_forever()
