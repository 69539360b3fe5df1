"""System metrics of a run: MLflow's monitor of processor, memory, disk, network and GPU use of this machine."""

import logging

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # the outbox logs what is wrong with the server
_monitors: dict[str, SystemMetricsMonitor] = {}  # by the token of the tracked run


def start_monitor(uri: str, token: str, run_id: str) -> None:
    """Log system metrics into an MLflow run every ten seconds until `stop_monitor`; start again if it runs already."""
    resumed = token in _monitors
    stop_monitor(token)
    monitor = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=uri)  # type: ignore[no-untyped-call]
    _monitors[token] = monitor
    monitor.start()  # type: ignore[no-untyped-call]


def restart_monitor(uri: str, token: str, run_id: str) -> None:
    """Start the monitor of a run again, if it had one: a monitor ends with the first request that fails."""
    if token in _monitors:
        start_monitor(uri, token, run_id)


def stop_monitor(token: str) -> None:
    """Stop the monitor of a run, if it has one."""
    if token in _monitors:
        _monitors.pop(token).finish()  # type: ignore[no-untyped-call]
