"""MLflow: runs, metrics and lineage. The only folder that imports mlflow, whose settings are made here before that."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it on import
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the outbox retries; MLflow would for four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # seconds; MLflow's default is 120
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
